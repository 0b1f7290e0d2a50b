"""The study's runs: which there are, and working them off in slices, each leaving its record in the results folder.

It refuses to know how the records are shown. A run's weights and checkpoints stay in a work folder; what is kept for
good are ``NAME.json`` and the reduced trace ``NAME.safetensors``, and both are written whole, when the run is done.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from shallowdeep.checkpoints import OtherRun, OutOfTime, alone, seconds_of, until
from shallowdeep.collection import NotFinite, collect
from shallowdeep.effects import answers
from shallowdeep.features import data_digest
from shallowdeep.files import FormatError, read_tensors, replacing, write_tensors, write_text
from shallowdeep.graph import evaluating
from shallowdeep.inputs import placed
from shallowdeep.network import ShallowDeepNetwork, save
from shallowdeep.paper.datasets import read_rows, split_rows, study_set
from shallowdeep.paper.downloads import require
from shallowdeep.paper.networks import NETWORKS, Normalised
from shallowdeep.paper.recipes import REGIMES, Recipe, Regime, Rows, fresh_network, make_recipe, train
from shallowdeep.paper.records import RUN, ReducedTrace, figures, fits, read_record, reduce_traces
from shallowdeep.runs import describe_device, plain, versions
from shallowdeep.types import DataError, Trace

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """One training of the study. Raises ``ValueError`` for names it does not have."""

    dataset: str
    network: str
    regime: Regime
    recipe: str
    seed: int = 0

    def __post_init__(self) -> None:
        study_set(self.dataset)
        if self.network not in NETWORKS:
            raise ValueError(f"No network {self.network!r} in the study. Networks: {', '.join(NETWORKS)}.")
        if self.regime not in REGIMES:
            raise ValueError(f"No regime {self.regime!r}. Regimes: {', '.join(REGIMES)}.")
        make_recipe(self.recipe, self.network)

    @property
    def name(self) -> str:
        """``dataset-network-regime-recipe``, and the seed unless it is 0."""
        seed = f"-seed{self.seed}" if self.seed else ""
        return f"{self.dataset}-{self.network}-{self.regime}-{self.recipe}{seed}"

    @property
    def cnn(self) -> StudyRun | None:
        """The run of the plain network, from which this one starts or with which it is compared; None for itself."""
        return None if self.regime == "cnn" else dataclasses.replace(self, regime="cnn")

    @property
    def starts_trained(self) -> bool:
        """Whether it starts from the weights of ``cnn``."""
        return self.regime in ("ic-only", "mixed")


def run_of(record: Mapping[str, Any]) -> StudyRun:
    """The run that left ``record``."""
    return StudyRun(**{field.name: record[field.name] for field in dataclasses.fields(StudyRun)})


def all_runs(
    datasets: Sequence[str] = ("cifar10", "cifar100"),
    networks: Sequence[str] = NETWORKS,
    regimes: Sequence[Regime] = REGIMES,
    recipe: str = "fast",
    seed: int = 0,
) -> list[StudyRun]:
    """Every combination, so ordered that what a run needs comes before it."""
    return [
        StudyRun(dataset=dataset, network=network, regime=regime, recipe=recipe, seed=seed)
        for dataset, network, regime in itertools.product(datasets, networks, regimes)
    ]


def work_off(
    runs: Iterable[StudyRun], data_dir: Path, *, results: Path, work: Path, minutes: float = math.inf
) -> dict[str, list[str]]:
    """Make every one of ``runs``, and the plain networks they need, whose record is missing from ``results`` or short.

    Stops between two epochs when ``minutes`` are over; the next call goes on there. A plain network whose record is
    there but whose very weights are not is trained again where an open run starts from it; ICs recorded over another
    network than the plain one's are then trained again too, asked for or not, and what was compared with it is compared
    anew. Returns the names of the runs that were ``done`` now, were there ``before``, are still ``open`` and have
    ``failed``; why is said on stderr, the others go on, and what needs a plain network that failed stays open. Raises
    ``DataError`` before anything trains where data that are needed are not whole or a folder cannot be written.
    """
    report: dict[str, list[str]] = {"done": [], "before": [], "open": [], "failed": []}
    end = time.monotonic() + 60 * minutes
    wanted, again = _planned(runs, results, work)
    missing = [run for run in wanted if run in again or not _recorded(run, results)]
    check_before(data_dir, [run.dataset for run in missing], results, work)
    for run in wanted:
        if run not in again and _recorded(run, results):
            state = "before"
        elif run.cnn is not None and run.cnn.name in report["failed"]:
            state = "open"
        else:
            state = attempt(run.name, end, partial(make, run, data_dir, results=results, work=work))
            end = 0.0 if state == "open" else end  # what comes next may start from this one
        report[state].append(run.name)
    for run in dict.fromkeys(dataclasses.replace(one, regime=regime) for one in wanted for regime in REGIMES):
        if run.name not in report["done"]:
            _refresh(run, results, remade=run.cnn is not None and run.cnn.name in report["done"])
    return report


def _planned(runs: Iterable[StudyRun], results: Path, work: Path) -> tuple[list[StudyRun], set[StudyRun]]:
    """``runs``, the plain networks that they need, and ICs over those that change; and which of them change."""
    wanted = dict.fromkeys(one for run in runs for one in (run.cnn, run) if one is not None)
    over = {run: dataclasses.replace(run, regime="ic-only") for run in wanted if run.regime == "cnn"}
    over = {cnn: ics for cnn, ics in over.items() if (results / f"{ics.name}.json").is_file()}
    wanted |= dict.fromkeys(ics for ics in over.values() if not same_network(ics, results))  # left by a killed call
    starting = {run.cnn for run in wanted if run.starts_trained and not _recorded(run, results)}

    def changes(cnn: StudyRun) -> bool:
        return not _recorded(cnn, results) or (cnn in starting and not has_weights(cnn, results, work))

    again = {run for run in wanted if run.regime == "cnn" and changes(run)}
    wanted |= dict.fromkeys(ics for cnn, ics in over.items() if cnn in again)
    return list(wanted), again


def check_before(data_dir: Path, datasets: Sequence[str], *folders: Path) -> None:
    """Raise ``DataError`` where training on ``datasets`` would end in nothing: they are not whole, or nothing can be
    written into ``folders``. Without data sets nothing is looked at.
    """
    if not datasets:
        return
    for folder in folders:
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        try:
            with tempfile.TemporaryFile(dir=nearest):
                pass
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            raise DataError(f"Nothing can be written into {folder} ({nearest}: {why}): give another folder.") from None
    require(data_dir, dict.fromkeys(datasets))


def attempt(name: str, end: float, begin: Callable[[], object]) -> str:
    """How ``begin``, the making of ``name``, ended: "done", "open" when it ran out of time, or "failed", said why."""
    try:
        with until(end):
            begin()
    except OutOfTime:
        return "open"
    except (DataError, FormatError) as error:
        print(f"{name} failed: {error}", file=sys.stderr)
        return "failed"
    return "done"


def _recorded(run: StudyRun, results: Path) -> bool:
    """Whether ``run`` left a record and its trace, made as its recipe asks, ICs over the plain network recorded now."""
    path, recipe = results / f"{run.name}.json", make_recipe(run.recipe, run.network)
    if not (path.is_file() and path.with_suffix(".safetensors").is_file()):
        return False
    record, wanted = read_record(path, with_figures=False), _asked(run, recipe)
    if any(record[name] != wanted[name] for name in wanted):
        return False
    if not fits(record, ReducedTrace.load(path.with_suffix(".safetensors"))):  # killed between the two files
        return False
    return run.regime != "ic-only" or same_network(run, results)


def same_network(run: StudyRun, results: Path) -> bool:
    """Whether the ICs recorded as ``run`` sit on the plain network recorded: the full exit answers as that does.

    One row in a thousand may differ, where rounding decides between two classes; another training moves tens of them.
    """
    assert run.cnn is not None
    paths = [results / f"{name}.safetensors" for name in (run.name, run.cnn.name)]
    if not all(path.is_file() for path in paths):
        return False
    own, plain = (ReducedTrace.load(path).said_EN[-1] for path in paths)
    return own.shape == plain.shape and float((own != plain).double().mean()) <= 0.001


def _asked(run: StudyRun, recipe: Recipe) -> dict[str, Any]:
    """What a record says of how ``run`` is trained."""
    training, epochs = recipe.of(run.regime)
    earlier = recipe.epochs if run.starts_trained else 0
    return {"epochs": epochs, "epochs_before": earlier, "training": plain(dataclasses.asdict(training))}


def has_weights(run: StudyRun, results: Path, work: Path) -> bool:
    """Whether the work folder holds the weights of which the record speaks: their trace gives the same answers."""
    weights, test = (work / run.name / f"{name}.safetensors" for name in ("network", "test"))
    if not (weights.is_file() and test.is_file()):
        return False
    recorded = ReducedTrace.load(results / f"{run.name}.safetensors").part("test")
    return torch.equal(answers(Trace.load(test)), recorded.said_EN.long())


def _refresh(run: StudyRun, results: Path, *, remade: bool) -> None:
    """Write the figures of a recorded run again from its trace if some are missing, or its plain network is another."""
    path = results / f"{run.name}.json"
    if not path.is_file() or (run.cnn is not None and not (results / f"{run.cnn.name}.safetensors").is_file()):
        return
    cnn = plain_network(run, results)
    try:
        known = read_record(path)["paper"]["accuracy_cnn"]
    except FormatError:  # the record of an earlier version
        known = None
    if known is None or (cnn is not None and (remade or known != cnn.accuracy("test"))):
        record = read_record(path, with_figures=False)
        reduced = ReducedTrace.load(results / f"{run.name}.safetensors")
        if fits(record, reduced):  # what does not, is refused by whoever shows it
            again = {name: record[name] for name in RUN} | figures(reduced, cnn)
            write_text(path, json.dumps(plain(again), indent=1) + "\n")


def make(run: StudyRun, data_dir: Path, *, results: Path, work: Path) -> dict[str, Any]:
    """Train, collect and write one run; returns its record. Raises ``OutOfTime`` inside a ``time_limit``, and
    ``DataError`` where another process is at it or the training diverged.

    What another recipe or another plain network left in the work folder is set aside there, and the run starts afresh;
    so is what diverged, for the next call.
    """
    recipe, folder = make_recipe(run.recipe, run.network), work / run.name
    rows, held_out, test = study_rows(run.dataset, data_dir, recipe)  # damaged files are found before hours of training
    cnn = plain_network(run, results)  # and so is a record that is needed in the end
    with at_work(folder):
        trained, precision = resumed(folder, lambda: _trained(run, recipe, rows, work))
        traces = {name: _collect(trained, part) for name, part in (("test", test), ("held_out", held_out)) if part}
        _save_trained(trained, folder)
        about = _asked(run, recipe) | provenance(rows, held_out, precision, seconds_of(folder))
        return _write_record(run, about, traces, cnn, folder, results)


@contextmanager
def at_work(folder: Path) -> Iterator[None]:
    """``alone`` in ``folder``; where the network that was trained there answers NaN, ``DataError`` after setting it
    aside: its checkpoint would go on with NaN for ever.
    """
    with alone(folder):
        try:
            yield
        except NotFinite:  # the images are bytes, so it is the weights
            raise DataError(
                f"The training of {folder.name} diverged: its logits are not finite. What it left is now in "
                f"{_set_aside(folder)}; the next call starts afresh."
            ) from None


def resumed(folder: Path, begin: Callable[[], T]) -> T:
    """What ``begin`` returns, which trains in ``folder``; what another run left there is set aside first."""
    try:
        return begin()
    except OtherRun as error:
        print(f"{error} It is now in {_set_aside(folder)}; {folder.name} starts afresh.", file=sys.stderr)
        return begin()


def _set_aside(folder: Path) -> Path:
    return folder.rename(next(p for i in itertools.count(1) if not (p := Path(f"{folder}.old{i}")).exists()))


def _write_record(
    run: StudyRun,
    about: Mapping[str, Any],
    traces: Mapping[str, Trace],
    cnn: ReducedTrace | None,
    folder: Path,
    results: Path,
) -> dict[str, Any]:
    reduced = reduce_traces(traces.get("held_out"), traces["test"])
    record = {**dataclasses.asdict(run), **about, **figures(reduced, cnn)}
    for name, trace in traces.items():
        trace.save(folder / f"{name}.safetensors")
    with replacing(results / f"{run.name}.safetensors", results / f"{run.name}.json") as (kept, written):
        reduced.save(kept)
        write_text(written, json.dumps(plain(record), indent=1) + "\n")
    return record


def study_rows(dataset: str, data_dir: Path, recipe: Recipe) -> tuple[Rows, Rows | None, Rows]:
    """Rows to train on, rows held out (None where ``recipe`` holds none out) and test rows; the former on the GPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, labels_N = (part.to(device) for part in read_rows(dataset, data_dir, "train"))
    test = read_rows(dataset, data_dir, "test")
    if not recipe.holds_out:
        return (images, labels_N), None, test
    kept, held = ((images[part], labels_N[part]) for part in (p.to(device) for p in split_rows(labels_N.cpu())))
    return kept, held, test


def provenance(rows: Rows, held_out: Rows | None, precision: str, seconds: float) -> dict[str, Any]:
    """What a record says of the rows that taught and of the machine."""
    return {
        "training_rows": len(rows[1]),
        "held_out_rows": len(held_out[1]) if held_out else 0,
        "data_fingerprint": data_digest(rows),
        "device": describe_device(),
        "precision": precision,
        "versions": versions(),
        "seconds": seconds,
    }


def _trained(run: StudyRun, recipe: Recipe, rows: Rows, work: Path) -> tuple[nn.Module, str]:
    chosen = study_set(run.dataset)
    start = fresh_network(run.network, chosen, run.seed).to(rows[0].device)
    if run.cnn is not None and run.starts_trained:
        load_network(start, work / run.cnn.name, run.cnn.name)
    return train(run.regime, recipe, run.network, chosen, rows, start=start, folder=work / run.name, seed=run.seed)


def plain_network(run: StudyRun, results: Path) -> ReducedTrace | None:
    """The reduced trace of the plain network with which ``run`` is compared; None where its own full exit is that."""
    if run.cnn is None or run.regime == "ic-only":
        return None
    return ReducedTrace.load(results / f"{run.cnn.name}.safetensors")


def _collect(trained: nn.Module, rows: Rows) -> Trace:
    if isinstance(trained, ShallowDeepNetwork):
        return collect(trained, rows)
    device = next(trained.parameters()).device
    with evaluating(trained):
        logits = [trained(placed(part, device)).cpu() for part in torch.split(rows[0], 256)]
    logits_NC = torch.cat(logits).float()
    if not bool(logits_NC.isfinite().all()):
        raise NotFinite("The plain network's logits are not finite.")
    return Trace(
        logits_ENC=logits_NC.unsqueeze(0),
        labels_N=rows[1].cpu(),
        cost_E=torch.ones(1),
        exit_names=("full",),
    )


def _save_trained(trained: nn.Module, folder: Path) -> None:
    network = trained.backbone if isinstance(trained, ShallowDeepNetwork) else trained
    assert isinstance(network, Normalised)
    write_tensors(folder / "network.safetensors", network.network.state_dict(), {})
    if isinstance(trained, ShallowDeepNetwork):
        save(trained, folder / "sdn")


def load_network(network: Normalised, folder: Path, name: str) -> None:
    """Put the weights that the run ``name`` left in ``folder`` into ``network``. Raises ``DataError``."""
    path = folder / "network.safetensors"
    if not path.is_file():
        raise DataError(f"{name} must be trained first: its weights are not in {folder}.")
    weights, _ = read_tensors(path)
    try:
        network.network.load_state_dict(weights)
    except RuntimeError:
        raise DataError(f"{path} holds the weights of another network than {name}'s.") from None
