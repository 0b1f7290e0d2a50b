"""How soon a monitor notices shifts of real CIFAR-10 images, what it advises, and how often it alarms without a shift.

python benchmarks/drift.py SDN WEIGHTS DATA OUT.json [NAME=TRACE ...]

SDN is a folder of `sdn demo --data cifar10`, WEIGHTS its public ResNet, DATA cifar-10-batches-py. More shifts come as
traces of the same exits: attack=runs/attack/trace.safetensors. Streams are drawn from traces with replacement.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shallowdeep.attacks import DEEPSLOTH, Pixels, universal
from shallowdeep.audits import Audit
from shallowdeep.calibration import calibrate
from shallowdeep.data import Preprocessing, read_data
from shallowdeep.demo import public_resnet
from shallowdeep.files import write_text
from shallowdeep.monitor import Monitor
from shallowdeep.network import load
from shallowdeep.policies import Fixed, Policy
from shallowdeep.reference import Reference, SeenRows, refer, seen_in
from shallowdeep.runs import describe_device, plain
from shallowdeep.runtime.engine import Engine
from shallowdeep.sequential import share_limits
from shallowdeep.shifts import blurred, faded, noisy, overlaid, reweighted
from shallowdeep.types import Trace, table
from shallowdeep.verbs import IMAGENET_MEAN, IMAGENET_STD
from shallowdeep.walking import simulate

ALPHA, DROP, AUDITED = 0.05, 0.005, 0.05
FALSE_STREAMS, REUSED_STREAMS, FALSE_ROWS = 500, 60, 10_000
LIVE = 2_500
ORDERS, CLEAN, LONGEST, BATCH = 11, 5_000, 20_000, 500
STEPS = 100
"""Of the universal attack, as in results/trust/attack.json."""


@dataclass(frozen=True)
class World:
    """A trace as a population of rows, and what the policy does on each."""

    seen: SeenRows
    answered_N: Tensor
    full_N: Tensor
    labels_N: Tensor

    @classmethod
    def of(cls, policy: Policy, trace: Trace) -> World:
        outcome = simulate(policy, trace)
        return cls(seen_in(outcome), outcome.labels_N, trace.logits_ENC[trace.full_exit].argmax(1), trace.labels_N)

    def feed(self, monitor: Monitor, row_B: Tensor, draw: torch.Generator) -> None:
        """Rows go by; a random share of them is audited, and its labels are known at once."""
        parts = (self.seen.exit_B, self.seen.confidence_B, self.seen.confusion_B, self.seen.valid_B)
        exit_B, confidence_B, confusion_B, valid_B = (part[row_B] for part in parts)
        monitor.see(SeenRows(exit_B=exit_B, confidence_B=confidence_B, confusion_B=confusion_B, valid_B=valid_B))
        row_S = row_B[torch.rand(len(row_B), generator=draw) < AUDITED]
        audit = Audit(row_S=row_S, answered_S=self.answered_N[row_S], full_S=self.full_N[row_S])
        monitor.audit(audit)
        monitor.labels(audit, self.labels_N[row_S])

    def facts(self, cost_E: Tensor) -> dict[str, float]:
        right = [float((said_N == self.labels_N).double().mean()) for said_N in (self.full_N, self.answered_N)]
        return {
            "mean_cost": float(cost_E[self.seen.exit_B].mean()),
            "accuracy_full": right[0],
            "drop": right[0] - right[1],
            "disagreement": float((self.full_N != self.answered_N).double().mean()),
        }


def false_alarms(
    trace: Trace, draw: torch.Generator, rows: int, streams: int, chosen: Policy | None
) -> dict[str, object]:
    """How often a stream from the reference's own population raises an alarm; without ``chosen``, the thresholds come
    from the reference rows themselves.
    """
    everywhere, said = World.of(chosen, trace) if chosen else None, Counter[str]()
    for _ in range(streams):
        reference = trace.rows(torch.randint(trace.num_samples, (rows,), generator=draw))
        policy = chosen or calibrate(reference, max_accuracy_drop=2 * DROP)
        world = everywhere or World.of(policy, trace)
        monitor = Monitor(refer(policy, reference, alpha=ALPHA, max_accuracy_drop=2 * DROP))
        world.feed(monitor, torch.randint(trace.num_samples, (FALSE_ROWS,), generator=draw), draw)
        said[monitor.verdict().action] += 1
    alarms = streams - said["keep"]
    return {
        "reference_rows": rows,
        "thresholds_from_the_reference": chosen is None,
        "streams": streams,
        "rows_each": FALSE_ROWS,
        "alarms": alarms,
        "limits_95": share_limits(alarms, streams, 0.05),
        "said": dict(said),
    }


def delays(
    clean: World, shifted: World, references: list[Reference], before: int, draw: torch.Generator
) -> dict[str, object]:
    """Rows from the shift to the first alarm, and to switching exits off, over stream orders; what was said last."""
    alarms, offs, said, why = [], [], Counter[str](), Counter[str]()
    for reference in references:
        monitor = Monitor(reference)
        if before:
            clean.feed(monitor, torch.randint(len(clean.labels_N), (before,), generator=draw), draw)
        alarm = off = float("inf")
        for first in range(0, LONGEST, BATCH):
            shifted.feed(monitor, torch.randint(len(shifted.labels_N), (BATCH,), generator=draw), draw)
            off = min(off, float("inf") if monitor.exits_on else first + BATCH)
        verdict = monitor.verdict()
        if monitor.drift is not None:
            row, name = monitor.drift
            alarm = row - before if row > before else alarm
            why[name] += 1
        alarms.append(alarm)
        offs.append(off)
        said[verdict.action] += 1
    return {
        "clean_rows_before": before,
        "found": sum(alarm < float("inf") for alarm in alarms) / len(alarms),
        "rows_to_alarm": sorted(alarms),
        "median_rows_to_alarm": statistics.median(alarms),
        "median_rows_to_off": statistics.median(offs),
        "said": dict(said),
        "first_seen_in": dict(why),
    }


def main(sdn_dir: Path, weights: Path, data: Path, out: Path, *more: str) -> None:
    torch.set_num_threads(1)
    start, draw = time.process_time(), torch.Generator().manual_seed(0)
    sdn = load(sdn_dir, public_resnet(weights)).eval()
    preprocessing = Preprocessing(mean=IMAGENET_MEAN, std=IMAGENET_STD, size=(32, 32))
    test = read_data(data, split="test")
    assert isinstance(test.inputs, Tensor)
    ready, images, labels_N = preprocessing.apply, test.inputs, test.labels_N
    # Three parts: one chooses the policy, one is the reference, one is what the stream brings.
    choose, refer_to, live = torch.split(torch.randperm(len(test), generator=draw), [3000, 4500, LIVE])
    runner = Engine(sdn, Fixed(exit=sdn.num_exits - 1), backend="torch")
    trace = runner.collect((ready(images), labels_N))
    policy = calibrate(trace.rows(choose), max_accuracy_drop=DROP)
    attack = dataclasses.replace(DEEPSLOTH, steps=STEPS)
    pattern = universal(sdn, ready(images[choose[:500]]), attack, pixels=Pixels.of(preprocessing))
    mine, truth = images[live], labels_N[live]
    shifts: dict[str, Callable[[Tensor], Tensor]] = {
        "blur, 0.5 pixels": lambda x: blurred(x, 0.5),
        "blur, 1 pixel": lambda x: blurred(x, 1.0),
        "noise, 2 %": lambda x: noisy(x, 0.02, draw),
        "noise, 5 %": lambda x: noisy(x, 0.05, draw),
        "contrast, three quarters": lambda x: faded(x, 0.75),
        "contrast, half": lambda x: faded(x, 0.5),
        "slowdown, universal 8/255": lambda x: overlaid(x, pattern),
    }
    traces = {name: runner.collect((ready(change(mine)), truth)) for name, change in shifts.items()}
    print(f"traces after {time.process_time() - start:.0f} s", file=sys.stderr, flush=True)
    clean = trace.rows(live)
    animals = torch.tensor([0.25, 0.25, 1, 1, 1, 1, 1, 1, 0.25, 0.25])
    traces["labels, vehicles four times rarer"] = clean.rows(reweighted(truth, animals, LIVE, draw))
    traces["labels, cats and dogs thrice as common"] = clean.rows(
        reweighted(truth, torch.tensor([1, 1, 1, 3, 1, 3, 1, 1, 1, 1.0]), LIVE, draw)
    )
    world = World.of(policy, clean)
    harmed = ((world.full_N == truth) & (world.answered_N != truth)).long()
    traces["rows that exits harm, eight times as common"] = clean.rows(
        reweighted(harmed, torch.tensor([1.0, 8.0]), LIVE, draw)
    )
    traces |= {name: Trace.load(path) for name, _, path in (one.partition("=") for one in more)}
    cost_E = torch.tensor(refer(policy, clean).cost_E, dtype=torch.float64)
    found = []
    for rows in (1000, 4500):
        picks = (refer_to[torch.randperm(len(refer_to), generator=draw)[:rows]] for _ in range(ORDERS))
        references = [refer(policy, trace.rows(pick), alpha=ALPHA, max_accuracy_drop=2 * DROP) for pick in picks]
        for name, changed in traces.items():
            shifted = World.of(policy, changed)
            about = {"shift": name, "reference_rows": rows, **shifted.facts(cost_E)}
            found += [about | delays(world, shifted, references, before, draw) for before in (0, CLEAN)]
    print(f"delays after {time.process_time() - start:.0f} s", file=sys.stderr)
    wrong = [false_alarms(trace, draw, rows, FALSE_STREAMS, policy) for rows in (1000, 5000)]
    wrong.append(false_alarms(trace, draw, 1000, REUSED_STREAMS, None))
    result: dict[str, Any] = {
        "alpha": ALPHA, "tolerated_drop": 2 * DROP, "audited_share": AUDITED, "stream_orders": ORDERS,
        "longest_stream_after_the_shift": LONGEST, "without_a_shift": world.facts(cost_E), "false_alarms": wrong,
        "shifts": found, "device": describe_device(), "processor_seconds": round(time.process_time() - start, 1),
    }  # fmt: skip
    write_text(out, json.dumps(plain(result), indent=1) + "\n")
    print(shown(result))


def shown(result: dict[str, Any]) -> str:
    """The tables, for people."""
    lines = [("shift", "cost", "drop", "differ", "reference", "alarm", "after 5,000", "exits off", "said")]
    for now, later in zip(result["shifts"][::2], result["shifts"][1::2], strict=True):
        rows = (f"{one['median_rows_to_alarm']:,.0f}" for one in (now, later))
        said = ", ".join(f"{action} {count}" for action, count in now["said"].items())
        numbers = f"{now['mean_cost']:.3f}", f"{now['drop']:.2%}", f"{now['disagreement']:.2%}"
        off = f"{now['median_rows_to_off']:,.0f}"
        lines.append((now["shift"], *numbers, f"{now['reference_rows']:,}", *rows, off, said))
    wrong = [("reference rows", "thresholds chosen", "streams", "alarms")]
    for one in result["false_alarms"]:
        where = "on them" if one["thresholds_from_the_reference"] else "elsewhere"
        wrong.append((f"{one['reference_rows']:,}", where, f"{one['streams']}", f"{one['alarms']}"))
    return f"{table(lines)}\n\n{table(wrong)}\n{result['processor_seconds']:.0f} s of one core"


if __name__ == "__main__":
    sdn_dir, weights, data, out = map(Path, sys.argv[1:5])
    main(sdn_dir, weights, data, out, *sys.argv[5:])
