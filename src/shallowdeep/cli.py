"""The command line ``sdn``: thin doors to the library, each verb joined to the next by files.

It refuses to do any work itself, and imports torch only inside a verb, so that help does not wait for it.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from cyclopts import App, CycloptsError, Parameter

from shallowdeep import engine_cli, report_cli, trust_cli
from shallowdeep.certificates import Method, Risk
from shallowdeep.choices import CONVERT, FASTER, LOOK, OPTIONS, RUNS, TRUST, Backend, Count, Device, Folder, Rows
from shallowdeep.paper.cli import app as paper_app


def _shown(default: object) -> str | None:
    """A default as it is typed; None where there is nothing to type."""
    if isinstance(default, tuple):
        return " ".join(map(str, default)) or None
    if isinstance(default, float):
        return f"{default:.4g}"
    return None if default is None or default is False or default == "" else str(default)


app = App(
    name="sdn",
    help="Turn any PyTorch classifier into a Shallow-Deep Network that answers as early as it safely can.",
    version_flags=["--version"],
    group_commands=OPTIONS,
    help_format="plaintext",  # as markdown it takes 30 ms more
    default_parameter=Parameter(show_default=_shown),
)


def plan(
    model: str,
    rows: Rows,
    *,
    out: Folder = RUNS / "plan",
    weights: Path | None = None,
    num_classes: int | None = None,
    at: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=())] = (),
    classifier: Literal["strong", "paper"] = "strong",
    mean: Annotated[tuple[float, ...], Parameter(consume_multiple=True, negative=())] = (),
    std: Annotated[tuple[float, ...], Parameter(consume_multiple=True, negative=())] = (),
) -> dict[str, Any]:
    """Find where a model can be cut and choose exits.

    Parameters
    ----------
    model
        module:callable (this RUNS the user's code), timm:NAME, or hf:FOLDER (safetensors only).
    out
        Folder to write.
    weights
        Weights of the model: .safetensors, or a torch file of plain tensors.
    num_classes
        Classes the model answers; default: those of the data.
    at
        Exits: fractions of the model's macs (0.15 0.3 ...) or names of cut points.
    classifier
        Kind of internal classifier.
    mean
        Mean per channel of pixels in [0, 1]; default ImageNet's for colour images.
    std
        Standard deviation per channel.
    """
    from shallowdeep import verbs

    return verbs.plan_verb(
        model,
        rows.choice(),
        out,
        weights=weights,
        num_classes=num_classes,
        at=_wishes(at),
        classifier=classifier,
        mean=mean,
        std=std,
    )


def train(
    rows: Rows,
    *,
    plan_dir: Annotated[Path, Parameter(name="--plan")] = RUNS / "plan",
    out: Folder = RUNS / "train",
    epochs: Count | None = None,
    jointly: bool = False,
    augment: Literal["none", "crop", "flip-crop"] = "none",
    views: Count | None = None,
    lr: float | None = None,
    seed: int = 0,
    device: Device = "cpu",
) -> dict[str, Any]:
    """Train the internal classifiers of a plan; a killed run goes on when it is started again.

    Parameters
    ----------
    plan_dir
        Folder of `sdn plan`.
    out
        Folder to write.
    epochs
        Passes over the training rows; default: the recipe's (exits 12, paper's 25, jointly 100).
    jointly
        Train the backbone, too (a copy of it; its weights are written to OUT).
    augment
        Random views of images: shifts (crop), also mirrored (flip-crop).
    views
        How many random views are made once and used in turn; default: the recipe's.
    lr
        Learning rate of joint training.
    seed
        Of initial weights, order and augmentation.
    """
    from shallowdeep import verbs

    return verbs.train_verb(
        plan_dir,
        rows.choice(),
        out,
        epochs=epochs,
        jointly=jointly,
        augment=augment,
        views=views,
        lr=lr,
        seed=seed,
        device=device,
    )


def collect(
    rows: Rows,
    *,
    sdn_dir: Annotated[Path, Parameter(name="--sdn")] = RUNS / "train",
    out: Folder = RUNS / "collect",
    second_look: Literal["mirror"] | None = None,
    batch_size: Count = 256,
    reference: bool = False,
    device: Device = "cpu",
    backend: Backend | None = None,
) -> dict[str, Any]:
    """Record what every exit says about every row: a trace.

    Parameters
    ----------
    sdn_dir
        Folder of `sdn train`.
    out
        Folder to write.
    second_look
        Ask the network once more on this view of every row, as an exit behind its own answer.
    batch_size
        Rows run at once.
    reference
        Also keep these rows' confusion as the reference that standardises later confusions.
    backend
        Of the engine that answers, where thresholds shall suit it: a must for openvino-bf16. Default: PyTorch.
    """
    from shallowdeep import verbs

    return verbs.collect_verb(
        sdn_dir,
        rows.choice(),
        out,
        second_look=second_look,
        batch_size=batch_size,
        reference=reference,
        device=device,
        backend=backend,
    )


def analyze(*, trace: Path = RUNS / "collect", out: Folder = RUNS / "analyze") -> dict[str, Any]:
    """Show how much the network overthinks, how well confusion finds its errors, and the accuracy-cost curve.

    Parameters
    ----------
    trace
        Folder of `sdn collect`.
    out
        Folder to write.
    """
    from shallowdeep import verbs

    return verbs.analyze_verb(trace, out)


def calibrate(
    *,
    trace: Path = RUNS / "collect",
    out: Folder = RUNS / "calibrate",
    max_accuracy_drop: float | None = None,
    max_mean_cost: float | None = None,
    confidence: float | None = None,
    method: Method = "auto",
    risk: Risk = "drop",
    exits_of: Path | None = None,
) -> dict[str, Any]:
    """Choose thresholds on held-out rows for an accuracy drop or a mean cost.

    Parameters
    ----------
    trace
        Folder of `sdn collect`, of rows that nothing was trained on.
    out
        Folder to write.
    max_accuracy_drop
        Drop allowed, as a fraction (0.005 is half a point).
    max_mean_cost
        Mean cost allowed, as a share of the whole network.
    confidence
        Test the drop on rows held back, to hold with this probability; without it the target is an aim.
    method
        auto, ltt: bounded by exact tests, betting: by betting, both with a confidence; crc: on average; split: not.
    risk
        What max_accuracy_drop bounds, where it is bounded.
    exits_of
        Folder of `sdn tune`: ask only the exits that its policy asks.
    """
    if (max_accuracy_drop is None) == (max_mean_cost is None):
        raise ValueError("Give one target: sdn calibrate --max-accuracy-drop 0.005, say, or --max-mean-cost 0.5.")
    from shallowdeep import verbs

    return verbs.calibrate_verb(
        trace,
        out,
        max_accuracy_drop=max_accuracy_drop,
        max_mean_cost=max_mean_cost,
        confidence=confidence,
        method=method,
        risk=risk,
        exits_of=exits_of,
    )


def evaluate(
    *, policy: Path = RUNS / "calibrate", trace: Path = RUNS / "collect", out: Folder = RUNS / "evaluate"
) -> dict[str, Any]:
    """Report what a policy does on a trace that it was not chosen on.

    Parameters
    ----------
    policy
        Folder of `sdn calibrate`.
    trace
        Folder of `sdn collect`, of other rows.
    out
        Folder to write.
    """
    from shallowdeep import verbs

    return verbs.evaluate_verb(policy, trace, out)


def demo(
    *,
    data: Literal["digits", "cifar10"] = "digits",
    data_dir: Path | None = None,
    weights: Path | None = None,
    out: Folder = RUNS / "demo",
    at: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=())] = (),
    classifier: Literal["strong", "paper"] = "strong",
    seed: int = 0,
) -> dict[str, Any]:
    """Run the whole job: train or load a network, convert it, choose thresholds, report on unseen rows.

    Parameters
    ----------
    data
        scikit-learn's digits (comes with the library), or CIFAR-10 with a public ResNet.
    data_dir
        Folder of the CIFAR-10 python files.
    weights
        ResNet-20 or ResNet-56 weights of akamaster/pytorch_resnet_cifar10.
    out
        Folder to write.
    at
        Exits of the CIFAR-10 demo: fractions of the model's macs, or names of cut points.
    classifier
        Kind of internal classifier.
    seed
        Of everything random.
    """
    from shallowdeep import demo as demos

    if data == "digits":
        if data_dir is not None or weights is not None or at:
            raise ValueError("--data-dir, --weights and --at are of the CIFAR-10 demo: give --data cifar10, too.")
        return demos.digits_demo(out, classifier=classifier, seed=seed)
    return demos.cifar10_demo(out, data_dir=data_dir, weights=weights, at=_wishes(at), classifier=classifier, seed=seed)


@app.command(name="--install-completion")
def install_completion(*, shell: Literal["bash", "zsh", "fish"] | None = None, output: Path | None = None) -> None:
    """Complete verbs, options and choices: writes a script, and a line into .bashrc or .zshrc that loads it.

    Parameters
    ----------
    shell
        Which one; default: the one that runs.
    output
        Write the script to this file and change nothing else.
    """
    # cyclopts' own command costs every other one 6 ms of imports.
    written = app.install_completion(shell=shell, output=output, add_to_startup=output is None)
    print(f"Written: {written}. Open a new shell, or load it in this one.")


Doors: TypeAlias = tuple[Callable[..., dict[str, Any]], ...]
CONVERSION: Doors = (plan, train, collect, analyze, calibrate, evaluate, engine_cli.predict)
CHECKS: Doors = (demo, *report_cli.DOORS, engine_cli.doctor)
SPEED = tuple(door for door in engine_cli.DOORS if door not in (*CONVERSION, *CHECKS))
for group, doors in ((CONVERT, CONVERSION), (FASTER, SPEED), (TRUST, trust_cli.DOORS), (LOOK, CHECKS)):
    for place, door in enumerate(doors):
        app.command(door, group=group, sort_key=place)
app.command(paper_app)


def _wishes(at: tuple[str, ...]) -> tuple[float | str, ...]:
    """Fractions as numbers, names as they are; the usual fractions when nothing is asked."""
    from shallowdeep.cuts import FRACTIONS

    def wish(text: str) -> float | str:
        try:
            return float(text)
        except ValueError:
            return text

    return tuple(map(wish, at)) or FRACTIONS


def _load() -> None:
    """Import what verbs share, torch above all, which takes seconds, while the user is told."""
    from shallowdeep.progress import waiting

    with waiting("load libraries"):
        import shallowdeep.verbs  # noqa: F401


def main(arguments: list[str] | None = None) -> None:
    """Run one verb; what goes wrong is one sentence on stderr and what to type next (the traceback with SDN_DEBUG=1).

    The exit status is 2 for what the caller can mend, 1 for a failed check and for errors that nobody foresaw.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"sdn: warning: {message}", file=sys.stderr)
            command, bound, _ = app.parse_args(arguments, exit_on_error=False, print_error=False)
            if command.__module__.startswith("shallowdeep") and command is not install_completion:
                _load()
            _check_out(command.__name__, bound.arguments.get("out"))
            result = command(*bound.args, **bound.kwargs)
    except KeyboardInterrupt:
        print("sdn: interrupted; files that were there are whole.", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if os.environ.get("SDN_DEBUG"):
            raise
        sys.exit(_say(error))
    if isinstance(result, dict):
        print(json.dumps(result))
        if result.get("failed"):
            sys.exit(1)


MAKERS = {
    "plan.json": "plan",
    "sdn.json": "train",
    "trace.safetensors": "collect",
    "policy.json": "calibrate",
    "alarm.json": "alarms",
    "bench.json": "bench",
}
"""Which verb writes what another one misses."""
VERBS = {door.__name__.replace("_", "-") for doors in (CONVERSION, SPEED, trust_cli.DOORS, CHECKS) for door in doors}


def _maker(missed: Path) -> str | None:
    """The verb that writes the file: the usual one, or that after which its folder is called."""
    maker, folder = MAKERS.get(missed.name), missed.parent.name
    if maker == "calibrate" and folder == "tune":
        return folder
    return maker or (folder if folder in VERBS else None)


def _check_out(command: str, out: object) -> None:
    """Refuse to write into the folder of another verb, whose ``run.json`` would be lost."""
    verb = command.replace("_", "-")
    if out is None or verb not in VERBS or not (about := Path(str(out)) / "run.json").is_file():
        return
    from shallowdeep.files import read_json

    found = read_json(about)
    wrote = found.get("verb") if isinstance(found, dict) else None
    if wrote in VERBS and wrote != verb:
        raise ValueError(f"{out} is a folder of `sdn {wrote}`, which sdn {verb} would spoil: give another --out.")


def _say(error: Exception) -> int:
    """Print ``error`` as one sentence; the exit status."""
    sentence, status = " ".join(str(error).split()) or type(error).__name__, 2
    if isinstance(error, CycloptsError):
        verb = " ".join(("sdn", *(error.command_chain or ())))
        sentence = sentence.rstrip("., ")
        sentence += f"{'' if sentence.endswith('?') else '.'} See {verb} --help."
    elif isinstance(error, FileNotFoundError) and (maker := _maker(Path(str(error.filename)))):
        sentence = f"{sentence.rstrip('.')}: sdn {maker} writes one (sdn {maker} --help)."
    elif isinstance(error, OSError) and error.strerror:
        sentence = f"{error.filename or 'a file'}: {error.strerror.lower()}."
    elif not isinstance(error, (ValueError, TypeError, ImportError, OSError)):
        sentence, status = f"{type(error).__name__}: {sentence} (unforeseen; SDN_DEBUG=1 sdn ... shows where)", 1
    print(f"sdn: {sentence}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
