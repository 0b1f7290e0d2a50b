"""The study's runs: which there are, and working them off in slices, each leaving its record in the results folder.

It refuses to know how the records are shown. A run's weights and checkpoints stay in a work folder; what is kept for
good are ``NAME.json`` and the reduced trace ``NAME.safetensors``, and both are written whole, when the run is done.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shallowdeep.checkpoints import OutOfTime, seconds_of, time_limit
from shallowdeep.collection import collect
from shallowdeep.files import read_json, read_tensors, write_tensors, write_text
from shallowdeep.graph import evaluating
from shallowdeep.inputs import placed
from shallowdeep.network import ShallowDeepNetwork, save
from shallowdeep.paper.datasets import read_rows, split_rows, study_set
from shallowdeep.paper.networks import NETWORKS, Normalised
from shallowdeep.paper.recipes import REGIMES, Recipe, Regime, Rows, fresh_network, make_recipe, train
from shallowdeep.paper.records import figures, reduce_traces
from shallowdeep.runs import LIBRARIES, describe_device, plain
from shallowdeep.types import DataError, Trace


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
    def needs(self) -> StudyRun | None:
        """The run whose network this one starts from, if any."""
        starts = self.regime in ("ic-only", "mixed")
        return dataclasses.replace(self, regime="cnn") if starts else None


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
    runs: Iterable[StudyRun], data_dir: Path, *, results: Path, work: Path, minutes: float | None = None
) -> dict[str, list[str]]:
    """Make every one of ``runs`` whose record is missing from ``results``, for at most ``minutes``.

    Stops between two epochs when the time is over; the next call goes on there. Returns the names of the runs that
    were ``done`` now, were there ``before``, and are still ``open``.
    """
    report: dict[str, list[str]] = {"done": [], "before": [], "open": []}
    end = None if minutes is None else time.monotonic() + 60 * minutes
    for run in runs:
        if (results / f"{run.name}.json").is_file():
            report["before"].append(run.name)
            continue
        left = float("inf") if end is None else end - time.monotonic()
        if left <= 0:
            report["open"].append(run.name)
            continue
        try:
            with time_limit(left):
                make(run, data_dir, results=results, work=work)
        except OutOfTime:
            report["open"].append(run.name)
        else:
            report["done"].append(run.name)
    return report


def make(run: StudyRun, data_dir: Path, *, results: Path, work: Path) -> dict[str, Any]:
    """Train, collect and write one run; returns its record. Raises ``OutOfTime`` inside a ``time_limit``."""
    chosen, recipe = study_set(run.dataset), make_recipe(run.recipe, run.network)
    folder = work / run.name
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, labels_N = (rows.to(device) for rows in read_rows(run.dataset, data_dir, "train"))
    kept, held = split_rows(labels_N.cpu()) if recipe.holds_out else (torch.arange(len(labels_N)), None)
    start = fresh_network(run.network, chosen, run.seed).to(device)
    if run.needs is not None:
        load_network(start, work / run.needs.name, run.needs.name)
    trained = train(
        run.regime,
        recipe,
        run.network,
        chosen,
        (images[kept.to(device)], labels_N[kept.to(device)]),
        start=start,
        folder=folder,
        seed=run.seed,
    )
    test = read_rows(run.dataset, data_dir, "test")
    traces = {"test": _collect(trained, test)}
    if held is not None:
        traces["held_out"] = _collect(trained, (images[held.to(device)], labels_N[held.to(device)]))
    _save_trained(trained, folder)
    return _write_record(run, recipe, traces, len(kept), seconds_of(folder), folder, results)


def _write_record(
    run: StudyRun, recipe: Recipe, traces: dict[str, Trace], rows: int, seconds: float, folder: Path, results: Path
) -> dict[str, Any]:
    reduced = reduce_traces(traces.get("held_out"), traces["test"])
    about = figures(reduced)
    joint_epochs = recipe.after_epochs if run.regime == "mixed" else recipe.epochs
    record = {
        "dataset": run.dataset,
        "network": run.network,
        "regime": run.regime,
        "recipe": run.recipe,
        "epochs": recipe.exits.epochs if run.regime == "ic-only" else joint_epochs,
        "training_rows": rows,
        "held_out_rows": reduced.held_out,
        "seed": run.seed,
        "device": describe_device(),
        "precision": "bf16-mixed" if recipe.bf16 else "fp32",
        "versions": {name: version(name) for name in LIBRARIES},
        "seconds": seconds,
        "accuracy_cnn": _accuracy_cnn(run, about, results),
        **about,
    }
    reduced.save(results / f"{run.name}.safetensors")
    write_text(results / f"{run.name}.json", json.dumps(plain(record), indent=1) + "\n")
    for name, trace in traces.items():
        trace.save(folder / f"{name}.safetensors")
    return record


def _accuracy_cnn(run: StudyRun, about: dict[str, Any], results: Path) -> float | None:
    """Test accuracy of the plain network of this pair and recipe, None while there is none."""
    if run.regime in ("cnn", "ic-only"):
        return float(about["accuracy_exits"][-1])
    path = results / f"{dataclasses.replace(run, regime='cnn').name}.json"
    return float(read_json(path)["accuracy_cnn"]) if path.is_file() else None


def _collect(trained: nn.Module, rows: Rows) -> Trace:
    if isinstance(trained, ShallowDeepNetwork):
        return collect(trained, rows)
    device = next(trained.parameters()).device
    with evaluating(trained):
        logits = [trained(placed(part, device)).cpu() for part in torch.split(rows[0], 256)]
    return Trace(
        logits_ENC=torch.cat(logits).float().unsqueeze(0),
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
    network.network.load_state_dict(weights)
