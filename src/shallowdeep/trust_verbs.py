"""The work behind the verbs of guarantees, alarms, drift and attacks: files in, a folder of files out.

It refuses to know how choices are typed; that is the command line's. Every function returns what the last line prints.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from shallowdeep.attack_study import StudyChoices, attack_study, write_study
from shallowdeep.attacks import Attack, Pixels
from shallowdeep.comparison import Comparison, compare
from shallowdeep.data import Dataset
from shallowdeep.files import FormatError, write_text
from shallowdeep.paper.figures import line_figure, save_figure
from shallowdeep.reliability import temper
from shallowdeep.runs import plain, read_run, write_run
from shallowdeep.tuning import MachineCosts
from shallowdeep.types import DataError, MissingExtra, Trace
from shallowdeep.verbs import DataChoice, halves, load_sdn, ready


def attack_verb(
    sdn_dir: Path,
    data: DataChoice,
    out: Path,
    *,
    attack: Attack,
    rows: int,
    max_accuracy_drop: float,
    training: DataChoice | None,
    seed: int,
) -> dict[str, Any]:
    """What a slowdown attack does and what defences make of it: writes ``attack.json`` and ``table.txt``.

    One fixed half of the rows chooses thresholds, ``rows`` rows of the other half are attacked.
    """
    sdn, preprocessing = load_sdn(sdn_dir)
    own, others = data.read(), None if training is None else training.read()

    def pair(rows: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = ready(rows, preprocessing)
        if not isinstance(inputs, torch.Tensor):
            raise DataError(f"An attack moves one tensor of images; the rows of {rows.source} are {type(inputs)}.")
        return inputs, rows.labels_N

    half, other = halves(len(own))
    choices = StudyChoices(
        attack=attack,
        pixels=Pixels() if preprocessing is None else Pixels.of(preprocessing),
        max_accuracy_drop=max_accuracy_drop,
        seed=seed,
    )
    found = attack_study(
        sdn,
        out,
        choices,
        calibration=pair(own.rows(half)),
        reported=pair(own.rows(spread(other, rows))),
        training=None if others is None else pair(others),
    )
    print(write_study(out, found))
    about = {"sdn": sdn_dir, "data": data.__dict__, "data_fingerprint": own.fingerprint, "rows": rows}
    about |= {"training": training and training.__dict__, "choices": plain(choices.__dict__)}
    write_run(out, "attack", about, found)
    brief = {kind: found["undefended"]["found"][kind] for kind in ("clean", "slowdown")}
    return dict(plain({"verb": "attack", "out": out, **brief}))


def spread(positions_N: torch.Tensor, rows: int) -> torch.Tensor:
    """``rows`` of ``positions_N``, evenly spread; all where there are no more.

    >>> spread(torch.arange(10), 3).tolist()
    [0, 4, 9]
    """
    if rows >= len(positions_N):
        return positions_N
    return positions_N[torch.linspace(0, len(positions_N) - 1, rows).long()]


Result = dict[str, Any]


def _finish(out: Path, verb: str, choices: Result, result: Result) -> Result:
    write_run(out, verb, choices, result)
    return dict(plain({"verb": verb, "out": out, **result}))


def reliability_verb(trace_dir: Path, out: Path) -> Result:
    """ECE, Brier and likelihood of every exit before and after temperatures: writes ``reliability.json``."""
    found = temper(Trace.load(trace_dir / "trace.safetensors"))
    print(found)
    write_text(out / "reliability.json", json.dumps(plain(dataclasses.asdict(found)), indent=1) + "\n")
    result = {"exits": found.before.exit_names, "temperature": found.temperature_E}
    result |= {"ece_before": found.before.ece_E, "ece_after": found.after.ece_E}
    return _finish(out, "reliability", {"trace": trace_dir}, result)


def compare_verb(
    trace_dir: Path, out: Path, *, max_accuracy_drops: Sequence[float], splits: int, tuned: Path | None = None
) -> Result:
    """Every policy on one accuracy-cost plane: writes ``compare.json`` and, with the extra ``report``, a figure."""
    clock = None if tuned is None else _clock(tuned)
    found = compare(
        Trace.load(trace_dir / "trace.safetensors"), max_accuracy_drops=max_accuracy_drops, splits=splits, clock=clock
    )
    print(found)
    write_text(out / "compare.json", json.dumps(plain(dataclasses.asdict(found)), indent=1) + "\n")
    try:
        save_figure(_plane(found, "cost"), out / "compare.svg")
        if clock is not None:
            save_figure(_plane(found, "ms"), out / "compare_ms.svg")
    except MissingExtra as missing:
        print(missing)
    levels: dict[str, Result] = {}
    for one in found.differences:
        levels.setdefault(f"{one.what} at {one.drop:g}", {})[one.name] = one.level
    choices = {"trace": trace_dir, "splits": splits, "tuned": tuned}
    return _finish(out, "compare", choices, {"default": found.default, **levels, "verdict": found.verdict()})


def _plane(found: Comparison, what: Literal["cost", "ms"]) -> Any:
    """The figure: accuracy of every line against what it pays, on rows that did not choose."""
    axis = {"cost": "mean cost (full network = 1)", "ms": "milliseconds per row"}[what]
    rows = [
        {"paid": paid, "accuracy": found.full_accuracy - drop, "what": line.name}
        for line in found.lines
        for paid, drop in zip(getattr(line, f"{what}_A").tolist(), line.drop_A.tolist(), strict=True)
    ]
    return line_figure(rows, "paid:Q", axis, "accuracy:Q", "accuracy", f"{len(found.lines)} lines of policies")


def _clock(tuned: Path) -> MachineCosts:
    """The milliseconds that ``sdn tune`` measured. Raises ``FormatError`` for another folder."""
    facts = read_run(tuned)["results"]
    try:
        reach_E, own_E = (torch.tensor(facts[name], dtype=torch.float64) for name in ("reach_ms", "own_ms"))
        about = {name: facts[name] for name in ("backend", "batch_size", "full_ms")}
    except KeyError as missing:
        raise FormatError(f"{tuned}/run.json holds no {missing}: it is not a folder of `sdn tune`.") from None
    return MachineCosts(**about, reach_ms_E=reach_E, own_ms_E=own_E)
