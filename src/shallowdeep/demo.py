"""The whole job on real images, end to end: a classifier in; exits, thresholds and an honest report out.

It refuses to contain anything that a user could not type with the public interface.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shallowdeep.augment import FlipCrop
from shallowdeep.calibration import Evaluation, calibrate, evaluate
from shallowdeep.collection import collect
from shallowdeep.cuts import FRACTIONS, plan
from shallowdeep.data import Preprocessing, digits, halves, read_data
from shallowdeep.disagreement import error_finding, fit_confusion
from shallowdeep.effects import overthinking
from shallowdeep.engine_verbs import time_engine
from shallowdeep.files import write_text
from shallowdeep.joint import JointRecipe, train_backbone
from shallowdeep.models import load_weights
from shallowdeep.network import ShallowDeepNetwork, attach, save
from shallowdeep.paper.networks import ResNet, resnet20, resnet56
from shallowdeep.policies import Policy
from shallowdeep.progress import steps
from shallowdeep.runs import plain, write_run
from shallowdeep.runtime.engine import Engine
from shallowdeep.spelling import to_json
from shallowdeep.timing import threads_of_torch
from shallowdeep.training import train_exits
from shallowdeep.types import DataError, Trace, table
from shallowdeep.verbs import IMAGENET_MEAN, IMAGENET_STD

Kind = Literal["strong", "paper"]
DIGITS_DROP, CIFAR_DROP, CIFAR_SPLITS, CIFAR_VIEWS = 0.0, 0.0058, 20, 6


class SmallNet(nn.Module):
    """A plain CNN for small grey images: what the demo takes for somebody's classifier."""

    def __init__(self, width: int = 64, depth: int = 8, num_classes: int = 10) -> None:
        super().__init__()
        channels = [1, *([width] * depth)]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True))
            for a, b in itertools.pairwise(channels)
        )
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


@threads_of_torch(1)  # for a network this small a second one saves little, and minutes are lost where others hold it up
def digits_demo(out: Path, *, classifier: Kind = "strong", seed: int = 0) -> dict[str, Any]:
    """Train a small CNN on scikit-learn's digits, convert it, choose thresholds, report on rows nobody has seen."""
    start = time.perf_counter()
    data = digits()
    preprocessing = Preprocessing(mean=(0.5,), std=(0.5,), size=(8, 8))
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    images, labels = preprocessing.apply(data.inputs), data.labels_N  # type: ignore[arg-type]
    train, validation, test = ((images[i], labels[i]) for i in torch.split(order, [900, 450, len(data) - 1350]))
    shift = FlipCrop(padding=1, mirror=False, fill=(-1.0,))
    torch.manual_seed(seed)
    model = SmallNet()
    recipe = JointRecipe(lr=0.05, nesterov=True, batch_size=64, milestones=())
    train_backbone(model, train, num_classes=10, epochs=25, recipe=recipe, augment=shift, seed=seed)
    sdn = attach(model, plan(model, train[0][:2], classifier=classifier))
    sdn.class_names, sdn.preprocessing = data.class_names, preprocessing.to_json()
    trained = train_exits(sdn, train, augment=shift, seed=seed)
    held_out, reported = collect(sdn, validation), collect(sdn, test)
    fit_confusion(sdn, held_out)
    policy = calibrate(held_out, max_accuracy_drop=DIGITS_DROP)
    found = evaluate(policy, reported)
    timed = time_engine(Engine(sdn, policy), test[0], 64, rounds=15, limit=len(test[0]))
    result = {
        "data": "digits",
        "classifier": classifier,
        "aimed_drop": DIGITS_DROP,
        "seconds_exits": trained.seconds,
        **figures(reported, found),
        **timed,
        "seconds": time.perf_counter() - start,
    }
    return finish(out, sdn, policy, reported, result, {"seed": seed, "data_fingerprint": data.fingerprint})


def cifar10_demo(
    out: Path,
    *,
    data_dir: Path | None,
    weights: Path | None,
    at: Sequence[float | str] = FRACTIONS,
    classifier: Kind = "strong",
    seed: int = 0,
) -> dict[str, Any]:
    """A public ResNet on CIFAR-10: frozen, converted, and judged over 20 splits of the test set.

    Its weights were made from the whole training set, where it is right about everything; thresholds therefore come
    from one half of the test set, and what is reported from the other.
    """
    if data_dir is None or weights is None:
        raise DataError(
            "The CIFAR-10 demo needs --data-dir (cifar-10-batches-py) and --weights (a public ResNet file)."
        )
    start = time.perf_counter()
    sets = {split: read_data(data_dir, split=split) for split in ("train", "test")}
    model = public_resnet(weights)
    preprocessing = Preprocessing(mean=IMAGENET_MEAN, std=IMAGENET_STD, size=(32, 32))
    train, test = ((preprocessing.apply(s.inputs), s.labels_N) for s in sets.values())  # type: ignore[arg-type]
    black = tuple(-m / s for m, s in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True))
    torch.manual_seed(seed)
    sdn = attach(model, plan(model, train[0][:2], at=at, classifier=classifier))
    sdn.class_names, sdn.preprocessing = sets["train"].class_names, preprocessing.to_json()
    trained = train_exits(sdn, train, augment=FlipCrop(padding=4, fill=black), views=CIFAR_VIEWS, seed=seed)
    trace = collect(sdn, test)
    fit_confusion(sdn, trace.rows(halves(len(test[0]))[0]))
    found, policy = judged(trace, CIFAR_DROP)
    reported = halves(len(test[0]))[1]
    timed = time_engine(Engine(sdn, policy), test[0][reported], 64, rounds=5, limit=1024)
    result = {
        "data": "cifar10",
        "weights": weights.name,
        "classifier": classifier,
        "splits": CIFAR_SPLITS,
        "views": CIFAR_VIEWS,
        "aimed_drop": CIFAR_DROP,
        "seconds_features": trained.feature_seconds,
        "seconds_exits": trained.seconds,
        **found,
        **timed,
        "seconds": time.perf_counter() - start,
    }
    about = {
        "seed": seed,
        "at": at,
        "weights": weights.name,
        "data_fingerprints": {k: s.fingerprint for k, s in sets.items()},
    }
    trace.save(out / "trace.safetensors")
    return finish(out, sdn, policy, trace, result, about)


def public_resnet(weights: Path) -> ResNet:
    """ResNet-20 or ResNet-56, whichever the public weights fit."""
    for build in (resnet56, resnet20):
        model = build()
        try:
            load_weights(model, weights)
        except ValueError:
            continue
        return model.eval()
    raise DataError(f"{weights} holds neither ResNet-20 nor ResNet-56 weights of akamaster/pytorch_resnet_cifar10.")


def judged(trace: Trace, drop: float) -> tuple[dict[str, Any], Policy]:
    """Means over random splits, half to calibrate and half to report, with their spread; and the first split's
    policy.
    """
    each: list[dict[str, Any]] = []
    first: Policy | None = None
    for split in steps(range(CIFAR_SPLITS), "splits", CIFAR_SPLITS):
        chosen, reported = halves(trace.num_samples, split)
        policy = calibrate(trace.rows(chosen), max_accuracy_drop=drop)
        first = first or policy
        each.append(figures(trace.rows(reported), evaluate(policy, trace.rows(reported))))
    assert first is not None
    means = {name: _mean([facts[name] for facts in each]) for name in each[0]}
    costs, drops = [f["mean_cost"] for f in each], [f["drop"] for f in each]
    means |= {"mean_cost_std": statistics.stdev(costs), "drop_std": statistics.stdev(drops)}
    return means, first


def _mean(values: list[Any]) -> Any:
    if isinstance(values[0], dict):
        return {name: _mean([value[name] for value in values]) for name in values[0]}
    return statistics.fmean(values)


def figures(trace: Trace, found: Evaluation) -> dict[str, Any]:
    """What the last line of a demo says of one policy on one trace."""
    thought, errors = overthinking(trace), error_finding(trace)
    return {
        "accuracy_full": found.accuracy_full,
        "accuracy_early_exit": found.accuracy_early_exit,
        "drop": found.drop,
        "mean_cost": found.mean_cost,
        "exits": dict(zip(trace.exit_names, found.share_E.tolist(), strict=True)),
        "accuracy_exits": dict(zip(trace.exit_names, thought.accuracy_E.tolist(), strict=True)),
        "wasteful": thought.wasteful,
        "destructive": thought.destructive,
        "destructive_of_errors": thought.destructive_of_errors,
        "destructive_corrected": thought.destructive_corrected,
        "oracle_cost": thought.oracle_cost,
        "confusion_auroc": errors.confusion_auroc,
        "msp_auroc": errors.msp_auroc,
    }


def finish(
    out: Path, sdn: ShallowDeepNetwork, policy: Policy, trace: Trace, result: dict[str, Any], about: dict[str, Any]
) -> dict[str, Any]:
    """Save everything, print the table, and return what the last line prints."""
    save(sdn, out)
    write_text(out / "policy.json", json.dumps(to_json(policy), indent=1))
    text = summary(trace, result)
    write_text(out / "table.txt", text + "\n")
    write_run(out, "demo", about, result)
    print(text)
    return dict(plain(result))


def summary(trace: Trace, result: dict[str, Any]) -> str:
    """The demo's table, for people."""
    rows: list[tuple[str, ...]] = [("exit", "cost", "accuracy", "leave here")]
    for name, cost in zip(trace.exit_names, trace.cost_E.tolist(), strict=True):
        shares = f"{result['accuracy_exits'][name]:.2%}", f"{result['exits'][name]:.1%}"
        rows.append((name, f"{cost:.3f}", *shares))
    low, high = result["speedup_quartiles"]
    return "\n".join(
        [
            table(rows),
            "",
            f"whole network   accuracy {result['accuracy_full']:.2%}, cost 1.000",
            f"early exits     accuracy {result['accuracy_early_exit']:.2%}, cost {result['mean_cost']:.3f}, "
            f"{result['speedup_measured']:.2f}x in seconds ({low:.2f} to {high:.2f}, batches of "
            f"{result['timed_batch_size']}, {result['timed_backend']})",
            f"overthinking    {result['wasteful']:.1%} were right before the end; "
            f"{result['destructive_of_errors']:.1%} of the errors were right earlier",
            f"finding errors  AUROC of confusion {result['confusion_auroc']:.3f}, "
            f"of max-softmax {result['msp_auroc']:.3f}",
        ]
    )
