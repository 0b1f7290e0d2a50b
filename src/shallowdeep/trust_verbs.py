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

from shallowdeep.comparison import Comparison, compare
from shallowdeep.files import FormatError, write_text
from shallowdeep.paper.figures import line_figure, save_figure
from shallowdeep.reliability import temper
from shallowdeep.runs import plain, read_run, write_run
from shallowdeep.tuning import MachineCosts
from shallowdeep.types import MissingExtra, Trace

Result = dict[str, Any]


def _finish(out: Path, verb: str, choices: Result, result: Result) -> Result:
    write_run(out, verb, choices, result)
    return dict(plain({"verb": verb, "out": out, **result}))


# ---------------------------------------------------------------- reliability and comparison


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
