"""The work behind the verbs about seconds: tune, measure, export, answer rows.

It refuses to know how choices are typed, as ``verbs`` does.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from shallowdeep.costs import exits_of
from shallowdeep.files import write_text
from shallowdeep.inputs import Inputs, num_rows, take
from shallowdeep.models import load_model
from shallowdeep.network import ShallowDeepNetwork, plan_to_json
from shallowdeep.policies import Fixed, Policy
from shallowdeep.progress import steps
from shallowdeep.runs import plain, write_run
from shallowdeep.runtime.backends import BackendName
from shallowdeep.runtime.bench import bench, verdict
from shallowdeep.runtime.engine import Engine
from shallowdeep.spelling import to_json
from shallowdeep.timing import compare, threads_of_torch
from shallowdeep.trajectory import Alarm
from shallowdeep.tuning import machine_costs, tune
from shallowdeep.types import table
from shallowdeep.verbs import DataChoice, Result, check_policy, load_sdn, read_alarm, read_policy, read_trace, ready
from shallowdeep.views import second_look_of, view_of

EXPORT_ROWS = 1024
"""Real rows on which an export is compared with the engine."""


def tune_verb(
    sdn_dir: Path,
    trace_dir: Path,
    out: Path,
    *,
    max_accuracy_drop: float,
    backend: BackendName,
    threads: int | None,
    batch_size: int,
    device: str,
) -> Result:
    """Exits and thresholds for the least time on this machine: writes ``policy.json`` and, where training fewer exits
    anew would pay, their plan as ``plan.json``.
    """
    sdn, _ = load_sdn(sdn_dir, device)
    trace = read_trace(trace_dir)
    look = trace.info.get("second_look")
    own = exits_of(sdn, second_look_of(look)).exit_names
    if own != trace.exit_names:
        raise ValueError(
            f"{trace_dir} was collected from another network than {sdn_dir}: its exits are "
            f"{', '.join(trace.exit_names)}, not {', '.join(own)}. Collect a trace of this one: sdn collect."
        )
    costs = machine_costs(sdn, second_look=look, backend=backend, threads=threads, batch_size=batch_size)
    tuned = tune(sdn, trace, costs, max_accuracy_drop=max_accuracy_drop)
    asked = tuned.policy.asks(trace.num_exits, trace.full_exit)
    lines = [("exit", "ms", "of the network", "asked")]
    for name, ms, on in zip(trace.exit_names, costs.reach_ms_E.tolist(), asked, strict=True):
        lines.append((name, f"{ms:.3f}", f"{ms / costs.full_ms:.2f}", "yes" if on else ""))
    print(f"{table(lines)}\nnetwork in one piece: {costs.full_ms:.3f} ms ({costs.backend}, batches of {batch_size})")
    print(f"expected: {tuned.expected_time:.2f} of its time")
    if isinstance(tuned.policy, Fixed):
        gain = " (nor does the whole network gain anything on itself)" if max_accuracy_drop < 0 else ""
        print(f"No exits keep the aim and save time here{gain}: the policy is the whole network.")
    write_text(out / "policy.json", json.dumps(to_json(tuned.policy), indent=1))
    (out / "plan.json").unlink(missing_ok=True)  # of an earlier run
    if tuned.plan is not None:
        write_text(out / "plan.json", json.dumps(plan_to_json(tuned.plan), indent=1))
        names = " ".join(cut.name for cut in tuned.plan.cuts)
        print("ICs that nobody asks run because they feed others.")
        print(f"Trained anew with few exits, {tuned.plan_time:.2f} is to be expected: --at {names}")
    choices = {"sdn": sdn_dir, "trace": trace_dir, "max_accuracy_drop": max_accuracy_drop, "threads": threads}
    choices |= {"device": device}
    facts = {"backend": costs.backend, "batch_size": batch_size, "full_ms": costs.full_ms, "asked": asked}
    facts |= {"expected_time": tuned.expected_time, "plan_time": tuned.plan_time}
    return write_run(out, "tune", choices, facts | {"reach_ms": costs.reach_ms_E, "own_ms": costs.own_ms_E})


def bench_verb(
    sdn_dir: Path,
    policy_dir: Path,
    data: DataChoice,
    out: Path,
    *,
    backends: Sequence[BackendName],
    batch_sizes: Sequence[int],
    threads: Sequence[int],
    blocks: int,
    rival: str | None,
    rival_weights: Path | None,
    device: str,
) -> Result:
    """Seconds of early exits against the fastest whole network, on real rows: writes ``bench.json``."""
    if rival_weights is not None and rival is None:
        raise ValueError("rival_weights are the weights of a rival: give --rival, too.")
    sdn, preprocessing = load_sdn(sdn_dir, device)
    rows = data.read(sdn.class_names)
    rivals = {}
    if rival is not None:
        other = load_model(rival, weights=rival_weights, num_classes=sdn.plan.num_classes)
        rivals[rival.rpartition(":")[2]] = other.to(device)
    policy = _policy_for(sdn, policy_dir)
    found = bench(
        sdn,
        policy,
        (ready(rows, preprocessing), rows.labels_N),
        backends=backends,
        batch_sizes=batch_sizes,
        threads=threads,
        blocks=blocks,
        rivals=rivals,
        second_look=view_of(policy),
    )
    lines = [("backend", "threads", "batch", "network ms", "early ms", "speedup", "ideal", "efficiency")]
    for one in found["measured"]:
        efficiency = "" if one["efficiency"] is None else f"{one['efficiency']:.2f}"
        times = f"{one['full_ms']:.2f}", f"{one['early_exit_ms']:.2f}", f"{one['speedup']:.2f}"
        numbers = str(one["threads"]), str(one["batch_size"])
        lines.append((one["backend"], *numbers, *times, f"{one['ideal_speedup']:.2f}", efficiency))
    found["verdict"] = verdict(found)
    print(f"{table(lines)}\n\n{found['verdict']}")
    write_text(out / "bench.json", json.dumps(plain(found), indent=1))
    choices = {"sdn": sdn_dir, "policy": policy_dir, "data": data.__dict__, "data_fingerprint": rows.fingerprint}
    return write_run(out, "bench", choices | {"rival": rival, "device": device}, found)


def export_verb(
    sdn_dir: Path,
    policy_dir: Path,
    data: DataChoice,
    out: Path,
    *,
    kind: Literal["folder", "file", "programs"],
    alarm_dir: Path | None,
) -> Result:
    """Artefacts that run without this library, compared with the engine on real rows before they are left behind."""
    from shallowdeep import export  # its libraries are an extra

    sdn, preprocessing = load_sdn(sdn_dir)
    rows = ready(data.read(sdn.class_names), preprocessing)
    ways = {"folder": export.export_folder, "file": export.export_file, "programs": export.export_programs}
    policy = _policy_for(sdn, policy_dir)
    alarm = _alarm(alarm_dir)
    some, look = take(rows, slice(0, EXPORT_ROWS)), view_of(policy)
    ways[kind](sdn, policy, out, some, second_look=look, alarm=alarm)
    files = {file.name: file.stat().st_size for file in sorted(out.iterdir())}
    print(table([("file", "kB"), *((name, f"{size / 1000:,.0f}") for name, size in files.items())]))
    choices = {"sdn": sdn_dir, "policy": policy_dir, "data": data.__dict__, "kind": kind, "alarm": alarm_dir}
    return write_run(out, "export", choices, {"kind": kind, "bytes": sum(files.values())})


def predict_verb(
    sdn_dir: Path,
    policy_dir: Path,
    data: DataChoice,
    out: Path,
    *,
    alarm_dir: Path | None,
    batch_size: int,
    backend: BackendName,
    threads: int | None,
    device: str,
) -> Result:
    """Answers that stop early: writes ``predictions.csv``; measures seconds against the whole backbone on the same
    rows. With an alarm there is a column of how probably each answer is wrong and, where the alarm has a threshold, one
    of which answers it keeps.
    """
    sdn, preprocessing = load_sdn(sdn_dir, device)
    policy, alarm = _policy_for(sdn, policy_dir), _alarm(alarm_dir)
    rows = data.read(sdn.class_names)
    inputs = ready(rows, preprocessing)
    text = io.StringIO()
    writer = csv.writer(text)
    more = [] if alarm is None else ["alarm"] if alarm.threshold is None else ["alarm", "kept"]
    writer.writerow(["row", "label", "class", "exit", "confidence", "confusion", "cost", "valid", *more])
    right_N, kept_N, cost = list[bool](), list[bool](), 0.0
    with threads_of_torch(threads):
        engine = Engine(sdn, policy, second_look=view_of(policy), alarm=alarm, backend=backend, threads=threads)
        names, exits = sdn.class_names or rows.class_names, exits_of(sdn, engine.second_look).exit_names
        for start in steps(range(0, len(rows), batch_size), "predict", -(-len(rows) // batch_size)):
            answer = engine(take(inputs, slice(start, start + batch_size)))
            told: list[list[Any]] = [
                _spelled(answer.confidence_B),
                _spelled(answer.confusion_B),
                _spelled(answer.cost_B),
            ]
            told.append(answer.valid_B.int().tolist())
            right_N += (answer.labels_B.cpu() == rows.labels_N[start : start + batch_size]).tolist()
            if alarm is not None and answer.alarm_B is not None:
                told.append(_spelled(answer.alarm_B))
                if alarm.threshold is not None:
                    kept_N += alarm.keeps(answer.alarm_B).tolist()
                    told.append([int(kept) for kept in kept_N[start:]])
            lines = zip(answer.labels_B.tolist(), answer.exit_B.tolist(), *told, strict=True)
            for row, (label, exit, *figures) in enumerate(lines, start):
                writer.writerow([row, label, names[label], exits[exit], *figures])
            cost += float(answer.cost_B.sum())
        timed = time_engine(engine, inputs, batch_size, rounds=5, limit=16 * batch_size)
    write_text(out / "predictions.csv", text.getvalue())
    result = {"rows": len(rows), "accuracy": sum(right_N) / len(rows), "mean_cost": cost / len(rows), **timed}
    if kept_N:
        kept, right = sum(kept_N), sum(one for one, keep in zip(right_N, kept_N, strict=True) if keep)
        result |= {"kept": kept / len(rows), "accuracy_kept": right / kept if kept else None}
        print(f"{kept} of {len(rows)} answers are kept" + (f", {right / kept:.2%} of them right" if kept else ""))
    shown = f"{result['accuracy']:.2%}", f"{result['mean_cost']:.3f}", f"{timed['speedup_measured']:.2f}x"
    print(table([("rows", "accuracy", "mean cost", "speedup"), (str(len(rows)), *shown)]))
    about = {"sdn": sdn_dir, "policy": policy_dir, "data": data.__dict__, "data_fingerprint": rows.fingerprint}
    return write_run(out, "predict", about | {"batch_size": batch_size, "alarm": alarm_dir, "device": device}, result)


def _spelled(figure_B: Tensor) -> list[str]:
    return [f"{figure:.6f}" for figure in figure_B.tolist()]


def _alarm(path: Path | None) -> Alarm | None:
    return None if path is None else read_alarm(path)


def time_engine(engine: Engine, inputs: Inputs, batch_size: int, *, rounds: int, limit: int) -> Result:
    """Seconds of the whole backbone against the engine on the same rows in the same batches, in turn.

    The whole backbone runs as an engine too, on the same backend, in one step without ICs: what folding alone saves is
    not counted.
    """
    rows = min(num_rows(inputs), limit)
    parts = [take(inputs, slice(i, min(i + batch_size, rows))) for i in range(0, rows, batch_size)]
    whole = Engine(engine.sdn, Fixed(exit=engine.sdn.num_exits - 1), backend=engine.backend, threads=engine.threads)
    timed = compare(lambda: [whole(part) for part in parts], lambda: [engine(part) for part in parts], rounds=rounds)
    return {
        "speedup_measured": timed.ratio,
        "speedup_quartiles": [timed.ratio_low, timed.ratio_high],
        "full_ms_per_row": timed.a_ms / rows,
        "early_exit_ms_per_row": timed.b_ms / rows,
        "timed_batch_size": batch_size,
        "timed_backend": engine.backend,
    }


def _policy_for(sdn: ShallowDeepNetwork, folder: Path) -> Policy:
    """The policy in ``folder``, which must be of ``sdn``."""
    policy = read_policy(folder)
    exits = exits_of(sdn, second_look_of(view_of(policy)))
    check_policy(policy, folder, exits.exit_names, exits.full_exit)
    return policy
