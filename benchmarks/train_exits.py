"""IC-only training with cached features against the original code's way, on CIFAR-10 and a public ResNet-56.

    python benchmarks/train_exits.py DATA_DIR WEIGHTS OUT.json [--streamed]

The original code runs the whole backbone in training mode, fp32, in every one of 25 epochs (batches of 128); a tenth
of one such epoch is timed here, in turn with nothing else, and multiplied. `--streamed` also trains without a cache
(the backbone runs every epoch, with fresh augmentation) to compare accuracies; it takes a quarter of an hour on two
cores.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import shallowdeep as sd
from shallowdeep.augment import FlipCrop
from shallowdeep.data import Preprocessing, read_data
from shallowdeep.demo import Kind, public_resnet
from shallowdeep.features import Cache
from shallowdeep.network import ShallowDeepNetwork
from shallowdeep.runs import describe_device
from shallowdeep.verbs import IMAGENET_MEAN, IMAGENET_STD

EPOCHS, TENTH = 25, 5000


def original_way(sdn: ShallowDeepNetwork, rows: tuple[Tensor, Tensor], augment: FlipCrop) -> float:
    """Seconds of a tenth of an epoch as the original code trains ICs: every batch through the whole network."""
    for parameter in sdn.backbone.parameters():
        parameter.requires_grad_(False)
    sdn.train()
    optimizer = torch.optim.Adam(sdn.classifiers.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(rows[0]), generator=generator)[:TENTH]
    start = time.perf_counter()
    for batch in torch.split(order, 128):
        answers = sdn(augment(rows[0][batch], generator))
        loss = torch.stack([F.cross_entropy(answer, rows[1][batch]) for answer in answers[:-1]]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--streamed", action="store_true")
    choices = parser.parse_args()
    preprocessing = Preprocessing(mean=IMAGENET_MEAN, std=IMAGENET_STD, size=(32, 32))
    train, test = (
        (preprocessing.apply(rows.inputs), rows.labels_N)
        for rows in (read_data(choices.data, split=split) for split in ("train", "test"))
        if isinstance(rows.inputs, Tensor)
    )
    black = tuple(-m / s for m, s in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True))
    augment = FlipCrop(padding=4, fill=black)
    result: dict[str, Any] = {"device": describe_device(), "torch": torch.__version__, "epochs_paper": EPOCHS}

    def fresh(classifier: Kind) -> ShallowDeepNetwork:
        model = public_resnet(choices.weights)
        torch.manual_seed(0)
        return sd.attach(model, sd.plan(model, train[0][:2], classifier=classifier))

    result["original_epoch_seconds"] = 10 * original_way(fresh("paper"), train, augment)
    ways: list[tuple[Kind, Cache]] = [("paper", "auto"), ("strong", "auto")]
    for kind, cache in [*ways, ("paper", "off")] if choices.streamed else ways:
        sdn = fresh(kind)
        done = sd.train_exits(sdn, train, augment=augment, cache=cache)
        trace = sd.collect(sdn, test)
        name = f"{kind}_{'streamed' if cache == 'off' else 'cached'}"
        result[f"{name}_seconds"] = done.seconds
        result[f"{name}_feature_seconds"] = done.feature_seconds
        result[f"{name}_accuracy"] = (trace.logits_ENC.argmax(-1) == trace.labels_N).double().mean(1).tolist()
        print(name, json.dumps(result), flush=True)
    original = EPOCHS * result["original_epoch_seconds"]
    result["speedup_over_original"] = original / result["paper_cached_seconds"]
    choices.out.parent.mkdir(parents=True, exist_ok=True)
    choices.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
