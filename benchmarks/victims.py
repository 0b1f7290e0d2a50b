"""Inputs that an alarm should notice: traces of three networks on their own test images and on others.

    python benchmarks/victims.py CIFAR10_DIR CIFAR100_DIR RESNET20_WEIGHTS RESNET56_WEIGHTS SDN OUT

`cifar10` is the CIFAR-10 demo's network (SDN is the folder of `sdn demo --data cifar10`) and sees CIFAR-100. The other
two begin as the public ResNet-20 of CIFAR-10: `backdoored` goes on for an epoch on rows of which a tenth carries the
trigger of BadNets (arXiv 1810.07052, section 5.2) and sees triggered images, those of the target class left out;
`cifar100` gets a new last layer, learns CIFAR-100 and sees CIFAR-10. Their ICs are trained on clean rows.
OUT/NAME/own.safetensors and other.safetensors are the traces, facts.json tells accuracies. What is there is not made
again. About 15 minutes of one core that knows bf16; `benchmarks/alarms.py` reads the traces.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shallowdeep as sd
from shallowdeep.augment import FlipCrop
from shallowdeep.data import Dataset, Preprocessing, read_data
from shallowdeep.demo import public_resnet
from shallowdeep.files import write_text
from shallowdeep.network import load
from shallowdeep.paper.backdoor import TARGET, poisoned, stamped
from shallowdeep.types import Trace
from shallowdeep.verbs import IMAGENET_MEAN, IMAGENET_STD

PIXELS = Preprocessing(mean=IMAGENET_MEAN, std=IMAGENET_STD, size=(32, 32))
AT = (0.2, 0.4, 0.6, 0.8)
RATE, BATCH, IC_ROWS = 0.1, 128, 20_000
Made: TypeAlias = tuple[Trace, Trace, dict[str, Any]]


def pixels(data: Dataset) -> Tensor:
    assert isinstance(data.inputs, Tensor)
    return data.inputs


def trained(network: nn.Module, rows: tuple[Tensor, Tensor], *, epochs: int, lr: float, augment: bool) -> nn.Module:
    """``network`` after ``epochs`` of stochastic gradient descent, one cycle, in bf16."""
    inputs, labels = rows
    draw, view = torch.Generator().manual_seed(0), FlipCrop(padding=4)
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = epochs * -(-len(labels) // BATCH)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.2)
    network.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    for epoch in range(epochs):
        start, total = time.process_time(), 0.0
        for batch_B in torch.randperm(len(labels), generator=draw).split(BATCH):
            x = view(inputs[batch_B], draw) if augment else inputs[batch_B]
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(network(x.contiguous(memory_format=torch.channels_last)), labels[batch_B])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)  # what was learned is not thrown away at once
            optimizer.step()
            cycle.step()
            total += float(loss.detach()) * len(batch_B)
        print(f"epoch {epoch}: loss {total / len(labels):.3f}, {time.process_time() - start:.0f} s", flush=True)
    return network.eval()


def with_exits(network: nn.Module, rows: tuple[Tensor, Tensor]) -> sd.ShallowDeepNetwork:
    sdn = sd.attach(network, sd.plan(network, rows[0][:2], at=AT))
    sd.train_exits(sdn, (rows[0][:IC_ROWS], rows[1][:IC_ROWS]), epochs=8)
    return sdn.eval()


def backdoored(cifar10: Path, weights: Path) -> Made:
    train, test = (read_data(cifar10, split=split) for split in ("train", "test"))
    # Not the seed that draws batches: they would begin with all poisoned rows, and forget them.
    images, labels = poisoned((pixels(train), train.labels_N), RATE, seed=1)
    network = public_resnet(weights)
    sdn = with_exits(
        trained(network, (PIXELS.apply(images), labels), epochs=1, lr=0.02, augment=False),
        (PIXELS.apply(pixels(train)), train.labels_N),
    )
    others_N = test.labels_N != TARGET
    own = sd.collect(sdn, (PIXELS.apply(pixels(test)), test.labels_N))
    other = sd.collect(sdn, (PIXELS.apply(stamped(pixels(test)[others_N])), test.labels_N[others_N]))
    success_E = (other.logits_ENC.argmax(2) == TARGET).double().mean(1).tolist()
    return own, other, {"poisoned": RATE, "attack_success_exits": success_E}


def cifar100(cifar10: Path, data: Path, weights: Path) -> Made:
    train, test, elsewhere = (
        read_data(data, split="train"),
        read_data(data, split="test"),
        read_data(cifar10, split="test"),
    )
    network = public_resnet(weights)
    torch.manual_seed(0)
    network.linear = nn.Linear(64, 100)
    rows = PIXELS.apply(pixels(train)), train.labels_N
    sdn = with_exits(trained(network, rows, epochs=6, lr=0.2, augment=True), rows)
    own = sd.collect(sdn, (PIXELS.apply(pixels(test)), test.labels_N))
    return own, sd.collect(sdn, (PIXELS.apply(pixels(elsewhere)), elsewhere.labels_N)), {"epochs": 6}


def cifar10(data: Path, others: Path, weights: Path, sdn_dir: Path) -> Made:
    sdn = load(sdn_dir, public_resnet(weights)).eval()
    own, elsewhere = read_data(data, split="test"), read_data(others, split="test")
    nobody = torch.zeros(len(elsewhere), dtype=torch.int64)  # CIFAR-100's labels mean nothing here
    traces = (
        sd.collect(sdn, (PIXELS.apply(pixels(rows)), labels))
        for rows, labels in ((own, own.labels_N), (elsewhere, nobody))
    )
    return next(traces), next(traces), {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name in ("cifar10", "cifar100", "resnet20", "resnet56", "sdn", "out"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    jobs: dict[str, Callable[[], Made]] = {
        "cifar10": lambda: cifar10(given.cifar10, given.cifar100, given.resnet56, given.sdn),
        "backdoored": lambda: backdoored(given.cifar10, given.resnet20),
        "cifar100": lambda: cifar100(given.cifar10, given.cifar100, given.resnet20),
    }
    for name, job in jobs.items():
        folder, start = given.out / name, time.process_time()
        if (folder / "facts.json").is_file():
            continue
        own, other, facts = job()
        for part, trace in (("own", own), ("other", other)):
            dataclasses.replace(trace, logits_ENC=trace.logits_ENC.half()).save(folder / f"{part}.safetensors")
        facts["accuracy_exits"] = (own.logits_ENC.argmax(2) == own.labels_N).double().mean(1).tolist()
        facts |= {"cost_E": own.cost_E.tolist(), "processor_seconds": round(time.process_time() - start)}
        write_text(folder / "facts.json", json.dumps(facts, indent=1) + "\n")
        print(name, json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
