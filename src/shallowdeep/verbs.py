"""The work behind the command line's verbs: files in, a folder of files out, each verb to be rerun alone.

It refuses to know how choices are typed; that is the command line's. Every function returns what the last line prints.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shallowdeep.augment import FlipCrop
from shallowdeep.calibration import calibrate, evaluate, tradeoff
from shallowdeep.certificates import Method, Risk
from shallowdeep.collection import collect
from shallowdeep.costs import costs_of, exits_of, table_of
from shallowdeep.cuts import FRACTIONS, plan
from shallowdeep.data import Dataset, Preprocessing, read_data
from shallowdeep.disagreement import error_finding, fit_confusion
from shallowdeep.effects import overthinking
from shallowdeep.files import read_json, write_text
from shallowdeep.inputs import Inputs, each, num_rows, take
from shallowdeep.joint import JointRecipe, train_jointly
from shallowdeep.models import load_model
from shallowdeep.network import ShallowDeepNetwork, attach, load, plan_from_json, plan_to_json, save
from shallowdeep.policies import Fixed, Policy
from shallowdeep.progress import steps, waiting
from shallowdeep.runs import plain, read_run, write_run
from shallowdeep.runtime.backends import BackendName
from shallowdeep.runtime.bench import bench, verdict
from shallowdeep.runtime.engine import Engine
from shallowdeep.spelling import from_json, in_words, to_json
from shallowdeep.timing import compare
from shallowdeep.training import train_exits
from shallowdeep.trajectory import Alarm
from shallowdeep.tuning import machine_costs, tune
from shallowdeep.types import DataError, Trace, table
from shallowdeep.views import second_look_of, view_of

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Half = Literal["all", "a", "b"]
Result = dict[str, Any]
EXPORT_ROWS = 1024
"""Real rows on which an export is compared with the engine."""


@dataclass(frozen=True, kw_only=True)
class DataChoice:
    """Which rows: where they are, of which split, at which size, how many, and which half of them."""

    source: str
    split: str | None = None
    size: tuple[int, int] | None = None
    limit: int | None = None
    half: Half = "all"

    def read(self) -> Dataset:
        """The rows. ``half`` "a" and "b" part them by a fixed shuffle, so that one can choose what the other
        reports.
        """
        data = read_data(self.source, split=self.split, size=self.size, limit=self.limit)
        return data if self.half == "all" else data.rows(halves(len(data))[self.half == "b"])


def halves(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Positions of a random half of ``rows`` rows and of the other half, each in order."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    return order[: rows // 2].sort().values, order[rows // 2 :].sort().values


def plan_verb(
    model: str,
    data: DataChoice,
    out: Path,
    *,
    weights: Path | None = None,
    num_classes: int | None = None,
    at: Sequence[float | str] = FRACTIONS,
    classifier: Literal["strong", "paper"] = "strong",
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
) -> Result:
    """Where ``model`` can be cut: writes ``plan.json``."""
    rows = data.read()
    network = load_model(model, weights=weights, num_classes=num_classes or len(rows.class_names))
    preprocessing = _preprocessing(rows, mean, std)
    example = ready(rows.rows(torch.arange(min(2, len(rows)))), preprocessing)
    with waiting("find cut points"):
        found = plan(network, example, at=at, classifier=classifier)
    if found.num_classes < len(rows.class_names):
        raise DataError(
            f"{model} answers {found.num_classes} classes, {data.source} has {len(rows.class_names)}: "
            f"give --num-classes {len(rows.class_names)}, or rows of fewer classes."
        )
    print(found)
    write_text(out / "plan.json", json.dumps(plan_to_json(found), indent=1))
    about = {
        "model": model,
        "weights": weights and str(weights.resolve()),
        "num_classes": num_classes or len(rows.class_names),
        "preprocessing": preprocessing and preprocessing.to_json(),
        "class_names": rows.class_names,
        "data": data.__dict__,
    }
    result = {"exits": found.exit_names, "cost": found.cost_E, "macs": found.total_macs, "params": found.total_params}
    return write_run(out, "plan", about, result)


def train_verb(
    plan_dir: Path,
    data: DataChoice,
    out: Path,
    *,
    epochs: int | None = None,
    jointly: bool = False,
    augment: Literal["none", "flip-crop", "crop"] = "none",
    views: int | None = None,
    lr: float | None = None,
    seed: int = 0,
) -> Result:
    """ICs (or everything, ``jointly``) trained: writes ``sdn.json`` and ``sdn.safetensors``; resumes by itself."""
    about = read_run(plan_dir)["choices"]
    rows = data.read()
    preprocessing = _saved_preprocessing(about["preprocessing"])
    network = _network(about)
    torch.manual_seed(seed)
    sdn = attach(network, plan_from_json(read_json(plan_dir / "plan.json")))
    sdn.class_names, sdn.preprocessing = tuple(about["class_names"]), about["preprocessing"] or {}
    print(sdn)
    pair = (ready(rows, preprocessing), rows.labels_N)
    views_of = _augmentation(augment, preprocessing)
    start = time.perf_counter()
    result: Result = {"rows": len(rows), "regime": "joint" if jointly else "exits"}
    if jointly:
        epochs = epochs or 100
        recipe = JointRecipe() if lr is None else JointRecipe(lr=lr)
        sdn = train_jointly(
            sdn, pair, epochs=epochs, recipe=recipe, augment=views_of, seed=seed, in_place=True, checkpoint_dir=out
        )
        write_backbone(sdn, out)
        about = {**about, "weights": str((out / "backbone.safetensors").resolve())}
    else:
        done = train_exits(sdn, pair, epochs=epochs, augment=views_of, views=views, seed=seed, checkpoint_dir=out)
        epochs = len(done.loss_per_epoch)
        result |= {"loss": done.loss_per_epoch[-1], "cache": done.cache, "precision": done.precision}
    result["epochs"] = epochs
    save(sdn, out)
    (out / "checkpoint.pt").unlink(missing_ok=True)
    print(table_of(costs_of(sdn)))
    result["seconds"] = round(time.perf_counter() - start, 2)
    choices = {
        **about,
        "plan": plan_dir,
        "train_data": data.__dict__,
        "train_fingerprint": rows.fingerprint,
        "seed": seed,
    }
    return write_run(out, "train", choices | {"augment": augment, "views": views, "lr": lr}, result)


def collect_verb(
    sdn_dir: Path,
    data: DataChoice,
    out: Path,
    *,
    second_look: str | None = None,
    batch_size: int = 256,
    reference: bool = False,
) -> Result:
    """What every exit says about every row: writes ``trace.safetensors``. ``reference`` stores the confusion's
    moments.
    """
    sdn, preprocessing = load_sdn(sdn_dir)
    rows = data.read()
    trace = collect(sdn, (ready(rows, preprocessing), rows.labels_N), second_look=second_look, batch_size=batch_size)
    if reference:
        trace = dataclasses.replace(trace, confusion_reference=fit_confusion(sdn, trace))
        save(sdn, sdn_dir)
    trace.save(out / "trace.safetensors")
    accuracy_E = (trace.logits_ENC.argmax(-1) == trace.labels_N).double().mean(1)
    lines = [("exit", "cost", "accuracy")]
    lines += [(n, f"{c:.3f}", f"{a:.2%}") for n, c, a in zip(trace.exit_names, trace.cost_E, accuracy_E, strict=True)]
    print(table(lines))
    about = {"sdn": sdn_dir, "data": data.__dict__, "data_fingerprint": rows.fingerprint, "reference": reference}
    about |= {"second_look": second_look}
    return write_run(out, "collect", about, {"rows": len(rows), "exits": trace.exit_names, "accuracy": accuracy_E})


def analyze_verb(trace_dir: Path, out: Path) -> Result:
    """How much the network overthinks and how well confusion finds its errors: writes ``overthinking.json``."""
    trace = Trace.load(trace_dir / "trace.safetensors")
    found, errors = overthinking(trace), error_finding(trace)
    curve = tradeoff(trace)
    print(f"{found}\n\n{errors}\n\n{curve}")
    facts = {name: value for name, value in found.__dict__.items() if name != "first_correct_N"} | errors.__dict__
    write_text(out / "overthinking.json", json.dumps(plain(facts), indent=1))
    return write_run(out, "analyze", {"trace": trace_dir}, facts)


def calibrate_verb(
    trace_dir: Path,
    out: Path,
    *,
    max_accuracy_drop: float | None = None,
    max_mean_cost: float | None = None,
    confidence: float | None = None,
    method: Method = "auto",
    risk: Risk = "drop",
    exits_of: Path | None = None,
) -> Result:
    """Thresholds from held-out rows, for all exits or those that the policy in ``exits_of`` asks: writes
    ``policy.json``.
    """
    trace = Trace.load(trace_dir / "trace.safetensors")
    tuned = from_json(read_json(exits_of / "policy.json")) if exits_of is not None else None
    policy = calibrate(
        trace,
        max_accuracy_drop=max_accuracy_drop,
        max_mean_cost=max_mean_cost,
        confidence=confidence,
        method=method,
        risk=risk,
        enabled_E=tuned.asks(trace.num_exits, trace.full_exit) if tuned is not None else None,
    )
    facts = to_json(policy)
    write_text(out / "policy.json", json.dumps(facts, indent=1))
    record = facts.pop("calibrated_on", {"info": {}})
    print(in_words(policy, trace.exit_names, trace.full_exit))
    choices: Result = {"trace": trace_dir, "max_accuracy_drop": max_accuracy_drop, "max_mean_cost": max_mean_cost}
    choices |= {"confidence": confidence, "method": method, "risk": risk, "exits_of": exits_of}
    return write_run(out, "calibrate", choices, {**facts, "info": record["info"]})


def tune_verb(
    sdn_dir: Path,
    trace_dir: Path,
    out: Path,
    *,
    max_accuracy_drop: float,
    backend: BackendName = "auto",
    threads: int | None = None,
    batch_size: int = 1,
) -> Result:
    """Exits and thresholds for the least time on this machine: writes ``policy.json`` and, where training fewer exits
    anew would pay, their plan as ``plan.json``.
    """
    sdn, _ = load_sdn(sdn_dir)
    trace = Trace.load(trace_dir / "trace.safetensors")
    look = trace.info.get("second_look")
    with waiting("measure and choose exits"):
        costs = machine_costs(sdn, second_look=look, backend=backend, threads=threads, batch_size=batch_size)
        tuned = tune(sdn, trace, costs, max_accuracy_drop=max_accuracy_drop)
    asked = tuned.policy.asks(trace.num_exits, trace.full_exit)
    lines = [("exit", "ms", "of the network", "asked")]
    for name, ms, on in zip(trace.exit_names, costs.reach_ms_E.tolist(), asked, strict=True):
        lines.append((name, f"{ms:.3f}", f"{ms / costs.full_ms:.2f}", "yes" if on else ""))
    print(f"{table(lines)}\nnetwork in one piece: {costs.full_ms:.3f} ms ({costs.backend}, batches of {batch_size})")
    print(f"expected: {tuned.expected_time:.2f} of its time")
    write_text(out / "policy.json", json.dumps(to_json(tuned.policy), indent=1))
    if tuned.plan is not None:
        write_text(out / "plan.json", json.dumps(plan_to_json(tuned.plan), indent=1))
        names = " ".join(cut.name for cut in tuned.plan.cuts)
        print("ICs that nobody asks run because they feed others.")
        print(f"Trained anew with few exits, {tuned.plan_time:.2f} is to be expected: --at {names}")
    choices = {"sdn": sdn_dir, "trace": trace_dir, "max_accuracy_drop": max_accuracy_drop, "threads": threads}
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
    rival: str | None = None,
    rival_weights: Path | None = None,
) -> Result:
    """Seconds of early exits against the fastest whole network, on real rows: writes ``bench.json``."""
    sdn, preprocessing = load_sdn(sdn_dir)
    rows = data.read()
    rivals = {}
    if rival is not None:
        rivals[rival.rpartition(":")[2]] = load_model(rival, weights=rival_weights, num_classes=sdn.plan.num_classes)
    policy = _policy_for(sdn, policy_dir)
    with waiting("measure early exits against whole networks"):
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
    return write_run(out, "bench", choices | {"rival": rival}, found)


def evaluate_verb(policy_dir: Path, trace_dir: Path, out: Path) -> Result:
    """What a policy does on a trace: accuracy, cost, where rows leave; writes ``evaluation.json``."""
    trace = Trace.load(trace_dir / "trace.safetensors")
    found = evaluate(from_json(read_json(policy_dir / "policy.json")), trace)
    print(found)
    write_text(out / "evaluation.json", json.dumps(plain(found.__dict__), indent=1))
    return write_run(out, "evaluate", {"policy": policy_dir, "trace": trace_dir}, found.__dict__)


def export_verb(
    sdn_dir: Path,
    policy_dir: Path,
    data: DataChoice,
    out: Path,
    *,
    kind: Literal["folder", "file", "programs"],
    alarm_dir: Path | None = None,
) -> Result:
    """Artefacts that run without this library, compared with the engine on real rows before they are left behind."""
    from shallowdeep import export  # its libraries are an extra

    sdn, preprocessing = load_sdn(sdn_dir)
    rows = ready(data.read(), preprocessing)
    ways = {"folder": export.export_folder, "file": export.export_file, "programs": export.export_programs}
    policy = _policy_for(sdn, policy_dir)
    alarm = _alarm(alarm_dir)
    some, look = take(rows, slice(0, EXPORT_ROWS)), view_of(policy)
    with waiting("export, and compare with the engine"):
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
    alarm_dir: Path | None = None,
    batch_size: int = 64,
    backend: BackendName = "auto",
    threads: int | None = None,
) -> Result:
    """Answers that stop early: writes ``predictions.csv``; measures seconds against the whole backbone on the same
    rows. With an alarm there is a column of how probably each answer is wrong and, where the alarm has a threshold, one
    of which answers it keeps.
    """
    sdn, preprocessing = load_sdn(sdn_dir)
    policy, alarm = _policy_for(sdn, policy_dir), _alarm(alarm_dir)
    with waiting("start the engine"):
        engine = Engine(sdn, policy, second_look=view_of(policy), alarm=alarm, backend=backend, threads=threads)
    rows = data.read()
    inputs = ready(rows, preprocessing)
    text = io.StringIO()
    writer = csv.writer(text)
    more = [] if alarm is None else ["alarm"] if alarm.threshold is None else ["alarm", "kept"]
    writer.writerow(["row", "label", "class", "exit", "confidence", "confusion", "cost", "valid", *more])
    names, exits = sdn.class_names or rows.class_names, exits_of(sdn, engine.second_look).exit_names
    right_N, kept_N, cost = list[bool](), list[bool](), 0.0
    for start in steps(range(0, len(rows), batch_size), "predict", -(-len(rows) // batch_size)):
        answer = engine(take(inputs, slice(start, start + batch_size)))
        told: list[list[Any]] = [_spelled(answer.confidence_B), _spelled(answer.confusion_B), _spelled(answer.cost_B)]
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
    write_text(out / "predictions.csv", text.getvalue())
    with waiting("measure against the whole network"):
        timed = time_engine(engine, inputs, batch_size, rounds=5, limit=16 * batch_size)
    result = {"rows": len(rows), "accuracy": sum(right_N) / len(rows), "mean_cost": cost / len(rows), **timed}
    if kept_N:
        kept, right = sum(kept_N), sum(one for one, keep in zip(right_N, kept_N, strict=True) if keep)
        result |= {"kept": kept / len(rows), "accuracy_kept": right / kept if kept else None}
        print(f"{kept} of {len(rows)} answers are kept" + (f", {right / kept:.2%} of them right" if kept else ""))
    shown = f"{result['accuracy']:.2%}", f"{result['mean_cost']:.3f}", f"{timed['speedup_measured']:.2f}x"
    print(table([("rows", "accuracy", "mean cost", "speedup"), (str(len(rows)), *shown)]))
    about = {"sdn": sdn_dir, "policy": policy_dir, "data": data.__dict__, "data_fingerprint": rows.fingerprint}
    return write_run(out, "predict", about | {"batch_size": batch_size, "alarm": alarm_dir}, result)


def _spelled(figure_B: Tensor) -> list[str]:
    return [f"{figure:.6f}" for figure in figure_B.tolist()]


def _alarm(folder: Path | None) -> Alarm | None:
    return None if folder is None else Alarm.from_json(read_json(folder / "alarm.json"))


def time_engine(engine: Engine, inputs: Inputs, batch_size: int, *, rounds: int, limit: int) -> Result:
    """Seconds of the whole backbone against the engine on the same rows in the same batches, in turn.

    The whole backbone runs as an engine too, on the same backend, in one step without ICs: what folding alone saves is
    not counted.
    """
    rows = min(num_rows(inputs), limit)
    parts = [take(inputs, slice(i, min(i + batch_size, rows))) for i in range(0, rows, batch_size)]
    whole = Engine(engine.sdn, Fixed(exit=engine.sdn.num_exits - 1), backend=engine.backend)
    timed = compare(lambda: [whole(part) for part in parts], lambda: [engine(part) for part in parts], rounds=rounds)
    return {
        "speedup_measured": timed.ratio,
        "speedup_quartiles": [timed.ratio_low, timed.ratio_high],
        "full_ms_per_row": timed.a_ms / rows,
        "early_exit_ms_per_row": timed.b_ms / rows,
        "timed_batch_size": batch_size,
        "timed_backend": engine.backend,
    }


# ---------------------------------------------------------------- what the verbs share


def _preprocessing(rows: Dataset, mean: tuple[float, ...], std: tuple[float, ...]) -> Preprocessing | None:
    """For uint8 images: the given mean and std, else ImageNet's for three channels and a half for others."""
    if not isinstance(rows.inputs, Tensor) or rows.inputs.dtype != torch.uint8:
        if mean or std:
            raise DataError("mean and std are for uint8 images; these rows are used as they are.")
        return None
    if rows.inputs.ndim != 4:
        raise DataError(
            f"uint8 rows must be images [N, C, H, W], found {list(rows.inputs.shape)}; give floats instead."
        )
    channels = rows.inputs.shape[1]
    usual = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,) * channels, (0.5,) * channels)
    size = (rows.inputs.shape[2], rows.inputs.shape[3])
    return Preprocessing(mean=mean or usual[0], std=std or usual[1], size=size)


def _saved_preprocessing(about: dict[str, Any] | None) -> Preprocessing | None:
    return Preprocessing.from_json(about) if about else None


def ready(rows: Dataset, preprocessing: Preprocessing | None) -> Inputs:
    if preprocessing is None:
        return rows.inputs
    return each(rows.inputs, preprocessing.apply)


def _augmentation(name: str, preprocessing: Preprocessing | None) -> FlipCrop | None:
    if name == "none":
        return None
    if preprocessing is None:
        raise DataError(f"augment={name!r} is for uint8 images.")
    black = tuple(-m / s for m, s in zip(preprocessing.mean, preprocessing.std, strict=True))
    return FlipCrop(padding=max(1, min(preprocessing.size) // 8), mirror=name == "flip-crop", fill=black)


def _network(about: dict[str, Any]) -> nn.Module:
    weights = Path(about["weights"]) if about["weights"] else None
    return load_model(about["model"], weights=weights, num_classes=about["num_classes"])


def load_sdn(folder: Path) -> tuple[ShallowDeepNetwork, Preprocessing | None]:
    about = read_run(folder)["choices"]
    return load(folder, _network(about)).eval(), _saved_preprocessing(about["preprocessing"])


def _policy_for(sdn: ShallowDeepNetwork, folder: Path) -> Policy:
    """The policy in ``folder``. Raises ``ValueError`` where it speaks of another number of exits than ``sdn`` has."""
    policy = from_json(read_json(folder / "policy.json"))
    exits = exits_of(sdn, second_look_of(view_of(policy)))
    try:
        policy.asks(len(exits.exit_names), exits.full_exit)
    except ValueError as error:
        raise ValueError(
            f"The policy in {folder} is of another network: {error} Calibrate one on a trace of this network: "
            "sdn collect, then sdn calibrate."
        ) from None
    return policy


def write_backbone(sdn: ShallowDeepNetwork, out: Path) -> None:
    """The jointly trained backbone's own weights, beside the ICs: ``backbone.safetensors``."""
    from safetensors.torch import save_model

    out.mkdir(parents=True, exist_ok=True)
    save_model(sdn.backbone, str(out / "backbone.safetensors"))
