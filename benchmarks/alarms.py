"""Which score finds wrong answers, and which inputs from elsewhere: on traces, by cross-fitting and over 20 splits.

    python benchmarks/alarms.py TRACE OUT.json [--second TRACE_WITH_SECOND_LOOK] [--networks FOLDER]

Traces are those of `sdn collect`, of rows that neither the network nor its exits trained on; FOLDER is what
`benchmarks/victims.py` wrote (without it, what OUT.json says of other inputs stays). A few minutes of one core.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shallowdeep.abstention import Judged, calibrate_alarm, judged, last_passing
from shallowdeep.alarming import alarms, fit_alarm, full_network, suspicions, wrong_answers
from shallowdeep.calibration import calibrate, evaluate
from shallowdeep.data import halves
from shallowdeep.files import read_json, write_text
from shallowdeep.finding import error_scores, risk_coverage
from shallowdeep.policies import Confidence, Policy
from shallowdeep.runs import describe_device, plain
from shallowdeep.types import Trace
from shallowdeep.walking import simulate

BARS = (0.85, 0.9, 0.95, 0.98, 0.99, 0.995, 0.9965, 0.999)
"""Global confidence thresholds of plain policies, from cheap to dear."""
PLAIN, AIM, SPLITS, DRAWS = 0.9965, 0.005, 20, 1000
COVERAGES = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0)


def crossfitted(trace: Trace) -> dict[str, Any]:
    """All scores, every row judged by an alarm fitted without it; paired bootstrap over rows."""
    full = float((trace.logits_ENC[trace.full_exit].argmax(1) == trace.labels_N).double().mean())
    found: dict[str, Any] = {}
    for name, policy in {"full": None, **{str(bar): Confidence(threshold=bar) for bar in BARS}}.items():
        scored = alarms(trace, policy)
        print(f"\n{name}\n{scored}", flush=True)
        found[name] = dataclasses.asdict(scored) | {"drop": full - scored.accuracy}
    return found


def other_inputs(folder: Path) -> dict[str, Any]:
    """How well scores tell a network's own rows from others. One half of its own chooses a policy for an aim of half a
    point; the other half, which also cross-fits the alarm, and the other inputs are reported.
    """
    own, other = (Trace.load(folder / f"{name}.safetensors") for name in ("own", "other"))
    chosen, reported = halves(own.num_samples)
    policy, found = calibrate(own.rows(chosen), max_accuracy_drop=AIM), dict[str, Any](read_json(folder / "facts.json"))
    for name, one in {"full": None, "policy": policy}.items():
        scored = alarms(own.rows(reported), one, against=other)
        print(f"\n{folder.name}, {name}\n{scored}", flush=True)
        answers_N = simulate(one or full_network(other), other).labels_N
        said = answers_N.bincount(minlength=other.num_classes).double() / other.num_samples
        right = float((answers_N == other.labels_N).double().mean())
        found[name] = dataclasses.asdict(scored) | {"other_said_C": said, "other_accuracy": right}
    return found


def splits(trace: Trace, policy: Policy | None) -> dict[str, Any]:
    """Alarm and threshold from one half, everything reported on the other, 20 times: means and deviations."""
    policy, kept = policy or full_network(trace), list[dict[str, float]]()
    for seed in range(SPLITS):
        mine, others = (trace.rows(half) for half in halves(trace.num_samples, seed))
        alarm = fit_alarm(mine, policy)
        scores = suspicions(others, policy, alarm)
        outcome = simulate(policy, others, alarm)
        wrong_N, told = wrong_answers(outcome, others), evaluate(policy, others)
        facts = {"mean_cost": told.mean_cost, "drop": told.drop, "errors": float(wrong_N.sum())}
        for name in ("alarm", "near log-odds", "log-odds", "confusion", "max-softmax"):
            own = error_scores(scores[name], wrong_N)
            facts |= {f"{name}, AUROC": own.auroc, f"{name}, AURC": own.aurc}
            curve = risk_coverage(scores[name], wrong_N)
            for coverage in COVERAGES:
                at = math.ceil(coverage * len(wrong_N)) - 1
                facts[f"{name}, errors at coverage {coverage:g}"] = float(curve.risk_P[at])
        for max_error in (0.005, 0.01, 0.02):
            bounded = calibrate_alarm(mine, policy, max_error=max_error)
            alarm_N = simulate(policy, others, bounded).alarm_N
            assert alarm_N is not None
            keep_N = bounded.keeps(alarm_N)
            facts[f"coverage under a bound of {max_error:g}"] = float(keep_N.double().mean())
            share = float(wrong_N[keep_N].double().mean()) if keep_N.any() else 0.0
            facts[f"errors under a bound of {max_error:g}"] = share
        kept.append(facts)
    return {
        name: [statistics.fmean(each := [facts[name] for facts in kept]), statistics.stdev(each)] for name in kept[0]
    }


def violations(trace: Trace, policy: Policy) -> list[dict[str, float]]:
    """How often the bound on errors among kept answers is broken: rows drawn with replacement from half of the trace,
    the population, whose share of errors is known; the alarm is fitted on the other half.
    """
    mine, population = (trace.rows(half) for half in halves(trace.num_samples))
    known, rng, found = judged(population, policy, fit_alarm(mine, policy)), np.random.default_rng(0), []
    for rows in (500, 1000, 5000):
        for max_error in (0.005, 0.01, 0.02):
            given, violated, coverage = 0, 0, 0.0
            for _ in range(DRAWS):
                parts = (rng.integers(population.num_samples, size=n) for n in (3 * rows // 10, 7 * rows // 10))
                choose, test = (Judged(known.alarm_N[rows], known.wrong_N[rows]) for rows in map(np.sort, parts))
                step = last_passing(choose, test, max_error, 0.95)
                kept = int(np.searchsorted(known.alarm_N, step.threshold, side="right")) if step.passed else 0
                given, coverage = given + step.passed, coverage + kept / population.num_samples
                violated += kept > 0 and bool(known.wrong_N[:kept].mean() > max_error)
            one = {"rows": rows, "max_error": max_error, "given": given / DRAWS, "violated": violated / DRAWS}
            found.append(one | {"mean_coverage": coverage / DRAWS})
            print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--second", type=Path)
    parser.add_argument("--networks", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")  # thresholds that keep nothing are counted
    torch.set_num_threads(1)
    trace, plain_policy = Trace.load(given.trace), Confidence(threshold=PLAIN)
    result = {"rows": trace.num_samples, "draws": DRAWS, "device": describe_device(), "info": dict(trace.info)}
    result["errors"] = crossfitted(trace)
    if given.networks:
        result["other_inputs"] = {folder.name: other_inputs(folder) for folder in sorted(given.networks.iterdir())}
    elif given.out.is_file():
        result["other_inputs"] = read_json(given.out)["other_inputs"]
    result["splits"] = {"full": splits(trace, None), str(PLAIN): splits(trace, plain_policy)}
    result["violations"] = violations(trace, plain_policy)
    if given.second:
        twice = Trace.load(given.second)
        # Early exits by one threshold; at the end, only the unsure look a second time.
        policy = Confidence(threshold=(*(PLAIN,) * twice.full_exit, 0.9))
        scored = alarms(twice, policy)
        print(f"\nsecond look\n{scored}", flush=True)
        result["second_look"] = dataclasses.asdict(scored)
    write_text(given.out, json.dumps(_rounded(plain(result)), indent=1) + "\n")


def _rounded(value: Any) -> Any:
    """Five digits say all that the rows can."""
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return round(value, 5) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
