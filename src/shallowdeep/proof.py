"""How often a certificate is wrong, and what it costs: drawn again and again from populations whose risk is known.

It refuses to know how certificates are made: it calls ``calibrate`` as anybody does.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import binom

from shallowdeep.calibration import calibrate
from shallowdeep.effects import answers
from shallowdeep.families import families_for, fit_ensemble
from shallowdeep.files import read_json, write_text
from shallowdeep.guarantees import full_cost_of
from shallowdeep.paths import answering, brings_of, read_rows
from shallowdeep.policies import Fixed
from shallowdeep.progress import steps
from shallowdeep.types import Trace, table
from shallowdeep.walking import simulate

BOUNDS, DELTAS, SIZES = (0.005, 0.01, 0.02), (0.05, 0.1), (500, 1000, 5000)
RATIOS = {0.005: 1.20, 0.01: 1.17, 0.02: 1.13}
"""Mean cost allowed over the population's best, at 5,000 rows and delta .05."""
BLOCK = 25
"""Draws whose results are kept together; a block is the unit of resuming."""
SURE = 0.001
"""A rate of violations is worse than delta when so many or more would be so improbable."""
SIMULATED = ("helpful", "harmful")


def simulated(kind: str, rows: int = 10_000, seed: int = 0) -> Trace:
    """A population of ``rows`` rows, four exits and ten classes: "helpful" exits know what they do not know; "harmful"
    ones are surest where they are wrong, on a tenth of the rows.
    """
    rng = np.random.default_rng(seed)
    truth_N, hard_N = rng.integers(10, size=rows), rng.normal(size=rows)
    noise_NC = rng.normal(size=(rows, 10))
    trap_N = (rng.random(rows) < 0.1) & (kind == "harmful")
    logits_ENC = np.empty((4, rows, 10))
    for exit in range(4):
        noise_NC = 0.8 * noise_NC + 0.6 * rng.normal(size=noise_NC.shape)
        logits_ENC[exit] = noise_NC
        logits_ENC[exit, np.arange(rows), truth_N] += 3.0 + exit - 1.2 * hard_N
        if exit < 3:
            logits_ENC[exit, trap_N, (truth_N[trap_N] + 1) % 10] += 12.0
        logits_ENC[exit] *= 1.3
    return Trace(
        logits_ENC=torch.from_numpy(logits_ENC).float(),
        labels_N=torch.from_numpy(truth_N),
        cost_E=torch.tensor([0.25, 0.5, 0.75, 1.0]),
        info={"backend": "simulated", "precision": "torch.float32"},
    )


def prove(
    trace_file: Path, out: Path, *, draws: int = 1000, processes: int = 2, minutes: float = math.inf
) -> dict[str, Any]:
    """The rates of violation of ``draws`` calibration sets a cell, from the trace and from simulated populations.

    Blocks of draws are kept under ``out/draws`` and not made again; after ``minutes`` no further block begins. What is
    finished is summed up in ``out/proof.json`` and returned; ``seconds`` is None where an earlier call made a part.
    """
    start = time.perf_counter()
    names = ("trace", *SIMULATED)
    population = _population(str(trace_file), "trace")  # whether it can be read is said before hours of simulations
    _same_trace(out, population)
    todo = [
        (name, first) for first in range(0, draws, BLOCK) for name in names if not _file(out, name, first).is_file()
    ]
    with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        start_by = time.time() + 60 * minutes
        waiting = [pool.submit(_block, str(trace_file), str(out), name, first, start_by) for name, first in todo]
        for done in steps(as_completed(waiting), "draws", len(todo)):
            done.result()
    seconds = time.perf_counter() - start if len(todo) == len(names) * len(range(0, draws, BLOCK)) else None
    found = {"trace": str(trace_file), "draws": draws, "seconds": seconds, "block": BLOCK}
    found |= {"populations": {name: summary(_population(str(trace_file), name), _drawn(out, name)) for name in names}}
    found["verdict"] = verdict(found)
    write_text(out / "proof.json", json.dumps(found, indent=1) + "\n")
    return found


def _same_trace(out: Path, population: Trace) -> None:
    """Draws from one trace say nothing of another. Raises ``ValueError`` where ``out`` holds another's."""
    own = hashlib.sha256(population.logits_ENC.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
    known = out / "draws" / "trace.txt"
    if not known.is_file():
        write_text(known, own + "\n")
    elif known.read_text().strip() != own:
        raise ValueError(f"{out}/draws holds draws from another trace; give another folder, or remove it.")


def _file(out: Path, name: str, first: int) -> Path:
    return out / "draws" / f"{name}-{first:05d}.json"


@lru_cache(maxsize=1)
def _population(trace_file: str, name: str) -> Trace:
    """Without hashes and marks: rows are drawn again and again on purpose."""
    trace = simulated(name) if name in SIMULATED else Trace.load(trace_file)
    return dataclasses.replace(trace, hash_N=None, trained_N=None)


def _block(trace_file: str, out: str, name: str, first: int, start_by: float) -> None:
    if time.time() > start_by:
        return
    population = _population(trace_file, name)
    full_N = answers(population)[population.full_exit] == population.labels_N
    rows = [one for draw in range(first, first + BLOCK) for one in _draw(population, full_N, draw)]
    write_text(_file(Path(out), name, first), json.dumps(rows))


def _draw(population: Trace, full_N: torch.Tensor, draw: int) -> Iterable[dict[str, float]]:
    """One calibration set of every size, drawn with replacement, under every bound and delta.

    Equal rows may fall into the part that chooses and into the part that tests. That is as it must be: rows drawn
    independently from a population of 10,000 repeat, and the tested ones are independent of those that chose.
    """
    for size in SIZES:
        index = np.random.default_rng([draw, size]).integers(population.num_samples, size=size)
        drawn = population.rows(torch.from_numpy(index))
        for bound in BOUNDS:
            for delta in DELTAS:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that nothing could be certified is what is counted
                    policy = calibrate(drawn, max_accuracy_drop=bound, confidence=1 - delta)
                drop, cost = 0.0, full_cost_of(population)
                if not isinstance(policy, Fixed):
                    outcome = simulate(policy, population)
                    drop = float((full_N.double() - (outcome.labels_N == population.labels_N).double()).mean())
                    cost = float(outcome.cost_N.mean())
                assert policy.calibrated_on is not None
                certified = policy.calibrated_on.certificate is not None
                facts = {"rows": size, "bound": bound, "delta": delta, "certified": certified}
                yield facts | {"drop": drop, "cost": cost}


def _drawn(out: Path, name: str) -> list[dict[str, float]]:
    files = sorted((out / "draws").glob(f"{name}-*.json"))
    return [one for file in files for one in read_json(file)]


def summary(population: Trace, drawn: list[dict[str, float]]) -> dict[str, Any]:
    """What the draws from one population came to, a cell for each number of rows, bound and delta."""
    best = best_costs(population)
    cells = []
    for size in SIZES:
        for bound in BOUNDS:
            for delta in DELTAS:
                mine = [one for one in drawn if (one["rows"], one["bound"], one["delta"]) == (size, bound, delta)]
                if not mine:
                    continue
                broken = sum(one["drop"] > bound + 1e-9 for one in mine)
                cells.append(
                    {
                        "rows": size,
                        "bound": bound,
                        "delta": delta,
                        "draws": len(mine),
                        "certified": sum(one["certified"] for one in mine) / len(mine),
                        "violations": broken / len(mine),
                        "holds": bool(binom.sf(broken - 1, len(mine), delta) >= SURE),
                        "mean_cost": float(np.mean([one["cost"] for one in mine])),
                        "mean_drop": float(np.mean([one["drop"] for one in mine])),
                        "over_best": float(np.mean([one["cost"] for one in mine])) / best[bound],
                    }
                )
    full = float((answers(population)[population.full_exit] == population.labels_N).double().mean())
    about = {"rows": population.num_samples, "accuracy_full": full}
    return about | {"best_cost": {f"{bound:g}": best[bound] for bound in BOUNDS}, "cells": cells}


def best_costs(population: Trace) -> dict[float, float]:
    """The least cost whose drop is within each bound, over every family that ``calibrate`` searches, fitted on the
    whole population and judged by it: what nobody can know beforehand.
    """
    rows = read_rows(population, (True,) * population.num_exits)
    best = dict.fromkeys(BOUNDS, full_cost_of(population))
    for ensemble in (None, fit_ensemble(rows)):
        seen = answering(rows, ensemble)
        for family in families_for(rows):
            path = family.fit(seen, None)
            brings = brings_of(path.leaving(seen), seen, path.steps)
            drop_P = rows.full_N.mean() - brings.accuracy_P
            for bound in BOUNDS:
                best[bound] = min(best[bound], float(brings.cost_P[drop_P <= bound + 1e-12].min(initial=best[bound])))
    return best


def verdict(found: dict[str, Any]) -> str:
    """The table and whether every certificate held as often as it said, and cost no more than was allowed."""
    lines = [("population", "rows", "bound", "delta", "draws", "certified", "violations", "mean cost", "over best")]
    broken, dear = [], []
    for name, one in found["populations"].items():
        for cell in one["cells"]:
            shares = (f"{cell[key]:.1%}" for key in ("certified", "violations"))
            costs = (f"{cell['mean_cost']:.3f}", f"{cell['over_best']:.3f}")
            place = (name, str(cell["rows"]), f"{cell['bound']:.1%}", f"{cell['delta']:g}")
            lines.append((*place, str(cell["draws"]), *shares, *costs))
            broken += [] if cell["holds"] else [place]
            measured = name == "trace" and cell["rows"] == max(SIZES) and cell["delta"] == min(DELTAS)
            if measured and cell["over_best"] > RATIOS[cell["bound"]]:
                dear.append(place)
    held = "Every rate of violation is within delta." if not broken else f"Broken too often: {broken}."
    paid = "Every cost is within its allowance." if not dear else f"Dearer than allowed: {dear}."
    return f"{table(lines)}\n{held} {paid}"
