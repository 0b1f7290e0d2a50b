"""The command line's doors to the engine: choosing exits for its seconds, timing it, exporting, answering, checking it.

It refuses to do any work itself, and imports torch only inside a verb, so that help does not wait for it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from shallowdeep.choices import RUNS, Backend, Count, Device, Folder, Measured, Rows


def tune(
    *,
    sdn_dir: Annotated[Path, Parameter(name="--sdn")] = RUNS / "train",
    trace: Path = RUNS / "collect",
    out: Folder = RUNS / "tune",
    max_accuracy_drop: float = 0.005,
    backend: Backend = "auto",
    threads: Count | None = None,
    batch_size: Count = 1,
    device: Device = "cpu",
) -> dict[str, Any]:
    """Choose exits and thresholds for the least time on this machine.

    Parameters
    ----------
    sdn_dir
        Folder of `sdn train`.
    trace
        Folder of `sdn collect`, of rows that nothing was trained on.
    out
        Folder to write.
    max_accuracy_drop
        Drop allowed, as a fraction (0.005 is half a point); an aim.
    backend
        What runs the network; auto measures.
    threads
        Threads of the backend.
    batch_size
        Rows answered at once.
    """
    from shallowdeep import engine_verbs

    return engine_verbs.tune_verb(
        sdn_dir,
        trace,
        out,
        max_accuracy_drop=max_accuracy_drop,
        backend=backend,
        threads=threads,
        batch_size=batch_size,
        device=device,
    )


def bench(
    rows: Rows,
    *,
    sdn_dir: Annotated[Path, Parameter(name="--sdn")] = RUNS / "train",
    policy: Path = RUNS / "tune",
    out: Folder = RUNS / "bench",
    backends: Annotated[tuple[Measured, ...], Parameter(consume_multiple=True, negative=())] = (),
    batch_sizes: Annotated[tuple[Count, ...], Parameter(consume_multiple=True, negative=())] = (1, 8, 64, 256),
    threads: Annotated[tuple[Count, ...], Parameter(consume_multiple=True, negative=())] = (1, 2),
    blocks: Count = 12,
    rival: str | None = None,
    rival_weights: Path | None = None,
    device: Device = "cpu",
) -> dict[str, Any]:
    """Measure early exits against the fastest whole network, in seconds, on real rows.

    Parameters
    ----------
    sdn_dir
        Folder of `sdn train`.
    policy
        Folder of `sdn tune` or `sdn calibrate`.
    out
        Folder to write.
    backends
        What to compare; default: torch, onnxruntime and openvino, those installed; on a GPU torch and torch-compile.
    batch_sizes
        Rows answered at once.
    threads
        Numbers of threads.
    blocks
        How often every contender's turn comes.
    rival
        A smaller network to beat: module:callable, timm:NAME or hf:FOLDER.
    rival_weights
        Its weights.
    """
    from shallowdeep import engine_verbs

    return engine_verbs.bench_verb(
        sdn_dir,
        policy,
        rows.choice(),
        out,
        backends=backends,
        batch_sizes=batch_sizes,
        threads=threads,
        blocks=blocks,
        rival=rival,
        rival_weights=rival_weights,
        device=device,
    )


def export(
    rows: Rows,
    *,
    sdn_dir: Annotated[Path, Parameter(name="--sdn")] = RUNS / "train",
    policy: Path = RUNS / "calibrate",
    out: Folder = RUNS / "export",
    kind: Literal["folder", "file", "programs"] = "folder",
    alarm: Path | None = None,
) -> dict[str, Any]:
    """Write the network with its exits and its policy as files that run without this library.

    Parameters
    ----------
    sdn_dir
        Folder of `sdn train`.
    policy
        Folder of `sdn calibrate` or `sdn tune`.
    out
        Folder to write; an earlier export there is replaced.
    kind
        folder: an ONNX file a step and a loop without torch; file: one ONNX file; programs: torch.export programs.
    alarm
        Folder of `sdn alarms`: answers also say how probably they are wrong.
    """
    from shallowdeep import engine_verbs

    return engine_verbs.export_verb(sdn_dir, policy, rows.choice(), out, kind=kind, alarm_dir=alarm)


def predict(
    rows: Rows,
    *,
    sdn_dir: Annotated[Path, Parameter(name="--sdn")] = RUNS / "train",
    policy: Path = RUNS / "calibrate",
    alarm: Path | None = None,
    out: Folder = RUNS / "predict",
    batch_size: Count = 64,
    backend: Backend = "auto",
    threads: Count | None = None,
    device: Device = "cpu",
) -> dict[str, Any]:
    """Answer rows, stopping early, and time it against the whole network.

    Parameters
    ----------
    sdn_dir
        Folder of `sdn train`.
    policy
        Folder of `sdn calibrate`.
    alarm
        Folder of `sdn alarms` for the same policy: also say how probably each answer is wrong and, where it was made
        with --max-error, which answers are kept.
    out
        Folder to write.
    batch_size
        Rows answered at once.
    backend
        What runs the network; auto measures.
    threads
        Threads of the backend.
    """
    from shallowdeep import engine_verbs

    return engine_verbs.predict_verb(
        sdn_dir,
        policy,
        rows.choice(),
        out,
        alarm_dir=alarm,
        batch_size=batch_size,
        backend=backend,
        threads=threads,
        device=device,
    )


def doctor(*, compiling: Annotated[bool, Parameter(name="--compile", negative=())] = False) -> dict[str, Any]:
    """Say what is installed and which backends work here, for a bug report; exit status 1 if a check fails.

    Parameters
    ----------
    compiling
        Try torch.compile, too, which may take half a minute.
    """
    from shallowdeep.doctor import doctor_verb

    return doctor_verb(compiling=compiling)


DOORS: tuple[Callable[..., dict[str, Any]], ...] = (tune, bench, export, predict, doctor)
