"""What policies cost at an aimed drop of accuracy: 20 splits of a trace, one half chooses, the other reports.

    python benchmarks/policies.py TRACE OUT.json

Every family alone, with and without an ensemble at the ends, then `calibrate`'s own choice among them, for aims and for
budgets. `mean_cost` at a measured drop is read off the mean curve of the reported halves: the family's worth, apart
from how well aims are met.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from functools import partial
from pathlib import Path as File
from typing import Any

import numpy as np
import torch

from shallowdeep.families import FAMILIES, SECOND_LOOK, Family, fit_ensemble, without_second_look
from shallowdeep.files import write_text
from shallowdeep.guarantees import full_cost_of
from shallowdeep.paths import Floats, Path, Rows, answering, brings_of, read_rows
from shallowdeep.rivals import rivals_for
from shallowdeep.thresholds import choose, fits, within_cost, within_drop
from shallowdeep.types import Trace

SPLITS = 20
AIMS, AIMS_WITH_A_SECOND_LOOK = (0.005, 0.0055, 0.006, 0.01), (-0.005, -0.0045, -0.0005, 0.0, 0.005)
BUDGETS = (0.52, 0.59, 0.69)
READ_AT = (-0.005, 0.0, 0.0025, 0.005, 0.01)


def everywhere(rows: Rows, grid_P: Floats | None) -> Path:
    """Zero Time Waste's way: a fitted ensemble of all exits so far at each, compared and answered; one threshold."""
    ensemble = fit_ensemble(rows, first=1)
    path = FAMILIES[-1].fit(answering(rows, ensemble), grid_P)
    return dataclasses.replace(path, ensemble=ensemble)


def candidates(rows: Rows) -> dict[str, tuple[Family, bool]]:
    """Families by name, and whether the ends are answered by an ensemble."""
    tried = [*FAMILIES, *rivals_for(rows)]
    if rows.full < len(rows.exits) - 1:
        tried = [SECOND_LOOK, without_second_look(FAMILIES[0], 0.0)]
    found = {f"{family.name}{', ensemble at the ends' * on}": (family, on) for on in (False, True) for family in tried}
    if rows.full == len(rows.exits) - 1:
        found["ensembles at every exit (ZTW)"] = Family("ensembles", everywhere), False
    return found


def reported(path: Path, step: int, rows: Rows) -> tuple[float, float]:
    brings = brings_of(path.leaving(rows), path.seen(rows), path.steps)
    return float(rows.full_N.mean() - brings.accuracy_P[step]), float(brings.cost_P[step])


def summary(pairs: list[tuple[float, float]]) -> dict[str, float]:
    drop_S, cost_S = np.array(pairs).T
    spread = {"drop_std": drop_S.std(ddof=1), "mean_cost_std": cost_S.std(ddof=1)}
    means = {"drop": drop_S.mean(), "mean_cost": cost_S.mean()}
    return {name: round(float(value), 5) for name, value in (means | spread).items()}


def main(file: File, out: File) -> None:
    trace = Trace.load(file)
    rows = read_rows(trace, (True,) * trace.num_exits)
    orders = [np.random.default_rng(split).permutation(trace.num_samples) for split in range(SPLITS)]
    halves = [(rows.take(np.sort(o[: len(o) // 2])), rows.take(np.sort(o[len(o) // 2 :]))) for o in orders]
    curves: dict[str, Any] = {}
    for name, (family, ensembles) in candidates(rows).items():
        drops, costs = [], []
        for chosen, others in halves:
            ensemble = fit_ensemble(chosen) if ensembles else None
            path = family.fit(answering(chosen, ensemble), None)
            path = path if ensemble is None else dataclasses.replace(path, ensemble=ensemble)
            brings = brings_of(path.leaving(others), path.seen(others), path.steps)
            drops.append(others.full_N.mean() - brings.accuracy_P)
            costs.append(brings.cost_P)
        drop_P, cost_P = np.maximum.accumulate(np.mean(drops, 0)), np.mean(costs, 0)
        curves[name] = {str(x): round(float(np.interp(x, drop_P, cost_P)), 4) for x in READ_AT if x >= drop_P[0]}
        print(name, curves[name], flush=True)
    aims = AIMS if rows.full == len(rows.exits) - 1 else AIMS_WITH_A_SECOND_LOOK
    choices: dict[str, Any] = {}
    within: dict[float, list[tuple[float, float]]] = {budget: [] for budget in BUDGETS}
    for label, only in (("calibrate", None), ("levels alone, as before", FAMILIES[:1])):
        taken: dict[float, list[tuple[float, float, str]]] = {aim: [] for aim in aims}
        for chosen, others in halves:
            given, judged = (chosen.until_full(), others.until_full()) if only else (chosen, others)
            fitted, full = fits(given, families=only, ensembles=only is None), float(chosen.full_N.mean())
            for aim in aims:
                choice = choose(given, partial(within_drop, accuracy_full=full, max_accuracy_drop=aim), fitted)
                if choice is None:
                    taken[aim].append((0.0, full_cost_of(trace), "full network"))
                    continue
                name = choice.family + " + ensemble" * (choice.path.ensemble is not None)
                taken[aim].append((*reported(choice.path, choice.step, judged), name))
            for budget in () if only else BUDGETS:
                choice = choose(given, partial(within_cost, max_mean_cost=budget), fitted)
                assert choice is not None, "no rule is as cheap as that"
                within[budget].append(reported(choice.path, choice.step, judged))
        for aim, found in taken.items():
            names = Counter(name for *_, name in found)
            means = summary([(drop, cost) for drop, cost, _ in found])
            choices.setdefault(str(aim), {})[label] = means | {"families": dict(names)}
            print(aim, label, choices[str(aim)][label], flush=True)
    budgets = {str(budget): summary(found) for budget, found in within.items()}
    print(budgets, flush=True)
    report = {"trace": file.stem, "splits": SPLITS, "cost_at_drop": curves, "aims": choices, "budgets": budgets}
    write_text(out, json.dumps(report, indent=1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(File(sys.argv[1]), File(sys.argv[2]))
