"""The work behind the command line's verbs: files in, a folder of files out, each verb to be rerun alone.

It refuses to know how choices are typed; that is the command line's. Every function returns what the last line prints.
"""

from __future__ import annotations

import dataclasses
import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from shallowdeep.augment import FlipCrop
from shallowdeep.calibration import calibrate, evaluate, tradeoff
from shallowdeep.certificates import Method, Risk
from shallowdeep.collection import collect
from shallowdeep.costs import costs_of, table_of
from shallowdeep.cuts import plan
from shallowdeep.data import Dataset, Preprocessing, as_classes, halves, read_data
from shallowdeep.disagreement import error_finding, fit_confusion
from shallowdeep.effects import overthinking
from shallowdeep.files import FormatError, read_json, replacing, write_text
from shallowdeep.graph import told
from shallowdeep.guarantees import unseen
from shallowdeep.inputs import Inputs, each
from shallowdeep.joint import JointRecipe, train_jointly
from shallowdeep.models import load_model
from shallowdeep.network import ShallowDeepNetwork, attach, load, plan_from_json, plan_to_json, save
from shallowdeep.policies import Fixed, Policy
from shallowdeep.progress import waiting
from shallowdeep.runs import inside, plain, read_run, write_run
from shallowdeep.runtime.backends import BackendName
from shallowdeep.runtime.engine import Engine
from shallowdeep.spelling import from_json, in_words, to_json
from shallowdeep.training import train_exits
from shallowdeep.trajectory import Alarm
from shallowdeep.types import DataError, Trace, table

Parsed = TypeVar("Parsed")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Half = Literal["all", "a", "b"]
Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class DataChoice:
    """Which rows: where they are, of which split, at which size, how many, and which half of them."""

    source: str
    split: str | None = None
    size: tuple[int, int] | None = None
    limit: int | None = None
    half: Half = "all"

    def read(self, classes: Sequence[str] = ()) -> Dataset:
        """The rows, their labels numbered as ``classes``. ``half`` "a" and "b" part them by a fixed shuffle, so that
        one can choose what the other reports.
        """
        data = read_data(self.source, split=self.split, size=self.size, limit=self.limit)
        data = as_classes(data, classes)
        return data if self.half == "all" else data.rows(halves(len(data))[self.half == "b"])


def plan_verb(
    model: str,
    data: DataChoice,
    out: Path,
    *,
    weights: Path | None,
    num_classes: int | None,
    at: Sequence[float | str],
    classifier: Literal["strong", "paper"],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Result:
    """Where ``model`` can be cut: writes ``plan.json``."""
    rows = data.read()
    network = load_model(model, weights=weights, num_classes=num_classes or len(rows.class_names))
    if model.startswith("timm:") and weights is None:
        warnings.warn(f"{model} has random weights: give trained ones with --weights.", stacklevel=2)
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
        "class_names": (*rows.class_names, *(f"class {i}" for i in range(len(rows.class_names), found.num_classes))),
        "data": data.__dict__,
    }
    result = {"exits": found.exit_names, "cost": found.cost_E, "macs": found.total_macs, "params": found.total_params}
    return write_run(out, "plan", about, result)


def train_verb(
    plan_dir: Path,
    data: DataChoice,
    out: Path,
    *,
    epochs: int | None,
    jointly: bool,
    augment: Literal["none", "flip-crop", "crop"],
    views: int | None,
    lr: float | None,
    seed: int,
    device: str,
) -> Result:
    """ICs (or everything, ``jointly``) trained: writes ``sdn.json`` and ``sdn.safetensors``; resumes by itself."""
    if lr is not None and not jointly:
        raise ValueError("lr is the rate of joint training: give --jointly, too.")
    if views is not None and views > 1 and (jointly or augment == "none"):
        raise ValueError("Views are drawn for ICs alone, and with an augmentation: give --augment, and not --jointly.")
    there = device_called(device)
    about = read_run(plan_dir, "plan")["choices"]
    rows = data.read(about["class_names"])
    preprocessing = _saved_preprocessing(about["preprocessing"])
    network = _network(about).to(there)
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
    print(table_of(costs_of(sdn)))
    result["seconds"] = round(time.perf_counter() - start, 2)
    choices = {
        **about,
        "plan": plan_dir,
        "train_data": data.__dict__,
        "train_fingerprint": rows.fingerprint,
        "seed": seed,
        "device": device,
    }
    written = write_run(out, "train", choices | {"augment": augment, "views": views, "lr": lr}, result)
    (out / "checkpoint.pt").unlink(missing_ok=True)
    return written


def collect_verb(
    sdn_dir: Path,
    data: DataChoice,
    out: Path,
    *,
    second_look: str | None,
    batch_size: int,
    reference: bool,
    device: str,
    backend: BackendName | None,
) -> Result:
    """What every exit says about every row, on the engine's ``backend`` or, without one, in PyTorch: writes
    ``trace.safetensors``. ``reference`` stores the confusion's moments.
    """
    sdn, preprocessing = load_sdn(sdn_dir, device)
    rows = data.read(sdn.class_names)
    pair = ready(rows, preprocessing), rows.labels_N
    if backend is None:
        trace = collect(sdn, pair, second_look=second_look, batch_size=batch_size)
    else:
        engine = Engine(sdn, Fixed(exit=sdn.num_exits - 1), second_look=second_look, backend=backend)
        trace = engine.collect(pair, batch_size=batch_size)
    if reference:
        trace = dataclasses.replace(trace, confusion_reference=fit_confusion(sdn, trace))
        save(sdn, sdn_dir)
    trace.save(out / "trace.safetensors")
    accuracy_E = (trace.logits_ENC.argmax(-1) == trace.labels_N).double().mean(1)
    lines = [("exit", "cost", "accuracy")]
    lines += [(n, f"{c:.3f}", f"{a:.2%}") for n, c, a in zip(trace.exit_names, trace.cost_E, accuracy_E, strict=True)]
    print(table(lines))
    about = {"sdn": sdn_dir, "data": data.__dict__, "data_fingerprint": rows.fingerprint, "reference": reference}
    about |= {"second_look": second_look, "device": device, "backend": backend}
    return write_run(out, "collect", about, {"rows": len(rows), "exits": trace.exit_names, "accuracy": accuracy_E})


def analyze_verb(trace_dir: Path, out: Path) -> Result:
    """How much the network overthinks and how well confusion finds its errors: writes ``overthinking.json``."""
    trace = read_trace(trace_dir)
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
    max_accuracy_drop: float | None,
    max_mean_cost: float | None,
    confidence: float | None,
    method: Method,
    risk: Risk,
    exits_of: Path | None,
) -> Result:
    """Thresholds from held-out rows, for all exits or those that the policy in ``exits_of`` asks: writes
    ``policy.json``.
    """
    trace = read_trace(trace_dir)
    tuned = policy_for(trace, exits_of) if exits_of is not None else None
    if tuned is not None and (confidence is not None or method == "crc"):
        trace = trace.rows(torch.from_numpy(unseen(trace, tuned.calibrated_on, "policy of these exits")))
    policy = calibrate(
        trace,
        max_accuracy_drop=max_accuracy_drop,
        max_mean_cost=max_mean_cost,
        confidence=confidence,
        method=method,
        risk=risk,
        enabled_E=tuned.asks(trace.num_exits, trace.full_exit) if tuned is not None else None,
    )
    if tuned is not None and policy.calibrated_on is not None:
        frozen: Any = policy  # every policy is a dataclass, which a protocol cannot say
        policy = dataclasses.replace(frozen, calibrated_on=policy.calibrated_on.also(tuned.calibrated_on))
    facts = to_json(policy)
    write_text(out / "policy.json", json.dumps(facts, indent=1))
    record = facts.pop("calibrated_on", {"info": {}})
    print(in_words(policy, trace.exit_names, trace.full_exit))
    choices: Result = {"trace": trace_dir, "max_accuracy_drop": max_accuracy_drop, "max_mean_cost": max_mean_cost}
    choices |= {"confidence": confidence, "method": method, "risk": risk, "exits_of": exits_of}
    return write_run(out, "calibrate", choices, {**facts, "info": record["info"]})


def evaluate_verb(policy_dir: Path, trace_dir: Path, out: Path) -> Result:
    """What a policy does on a trace: accuracy, cost, where rows leave; writes ``evaluation.json``."""
    trace = read_trace(trace_dir)
    found = evaluate(policy_for(trace, policy_dir), trace)
    print(found)
    write_text(out / "evaluation.json", json.dumps(plain(found.__dict__), indent=1))
    return write_run(out, "evaluate", {"policy": policy_dir, "trace": trace_dir}, found.__dict__)


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
    """What the network takes; warns where images are numbers that its preprocessing is not for."""
    if preprocessing is None:
        return rows.inputs
    if isinstance(rows.inputs, Tensor) and rows.inputs.is_floating_point():
        warnings.warn(
            f"{rows.source} holds floating numbers, which are taken as they are; the network's own preprocessing "
            f"(mean {preprocessing.mean}, std {preprocessing.std}) is for uint8 images.",
            stacklevel=2,
        )
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


def device_called(name: str) -> torch.device:
    """The device ``name`` ("cpu", "cuda", "cuda:1", ...). Raises ``ValueError`` where PyTorch cannot compute on it."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as error:
        raise ValueError(f"PyTorch cannot compute on {name!r} here: {told(error).partition('. ')[0]}.") from None
    return device


def read_trace(path: Path) -> Trace:
    """The trace at ``path``, a folder of ``sdn collect`` or a file."""
    return Trace.load(inside(path, "trace.safetensors"))


def read_policy(path: Path) -> Policy:
    """The policy at ``path``, a folder of ``sdn calibrate`` or ``sdn tune``, or a file. Raises ``FormatError``."""
    return _parsed(path, "policy", from_json)


def read_alarm(path: Path) -> Alarm:
    """The alarm at ``path``, a folder of ``sdn alarms``, or a file. Raises ``FormatError``."""
    return _parsed(path, "alarm", Alarm.from_json)


def _parsed(path: Path, what: str, parse: Callable[[Any], Parsed]) -> Parsed:
    file = inside(path, f"{what}.json")
    facts = read_json(file)
    try:
        return parse(facts)
    except (KeyError, TypeError) as error:
        raise FormatError(f"{file} holds no {what}: {error!r}") from None
    except ValueError as error:
        raise FormatError(f"{file} holds no {what}: {error}") from None


def check_policy(policy: Policy, path: Path, exit_names: Sequence[str], full_exit: int) -> None:
    """Raise ``ValueError`` where the policy at ``path`` was made for other exits than these."""
    record, why = policy.calibrated_on, ""
    try:
        policy.asks(len(exit_names), full_exit)
    except ValueError as error:
        why = str(error)
    if record is not None and record.of_others(exit_names):
        why = f"It was calibrated for the exits {', '.join(record.exit_names)}; here are {', '.join(exit_names)}."
    if why:
        raise ValueError(
            f"The policy in {path} is of another network: {why} Calibrate one on a trace of this network: "
            "sdn collect, then sdn calibrate."
        )


def policy_for(trace: Trace, path: Path) -> Policy:
    """The policy at ``path``, which must be of the network that ``trace`` is of."""
    policy = read_policy(path)
    check_policy(policy, path, trace.exit_names, trace.full_exit)
    return policy


def load_sdn(folder: Path, device: str = "cpu") -> tuple[ShallowDeepNetwork, Preprocessing | None]:
    there, about = device_called(device), read_run(folder, "train")["choices"]
    return load(folder, _network(about)).to(there).eval(), _saved_preprocessing(about["preprocessing"])


def write_backbone(sdn: ShallowDeepNetwork, out: Path) -> None:
    """The jointly trained backbone's own weights, beside the ICs: ``backbone.safetensors``."""
    with replacing(out / "backbone.safetensors") as (partial,):
        save_model(sdn.backbone, str(partial))
