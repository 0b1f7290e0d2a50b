"""Scoring the CIFAR-10 test images: engines in batches of 256 against the original code's way, side by side.

The original way is one image at a time through eager modules, a question after every internal classifier, a softmax
brought back to Python to be compared. Both stop where the policy says; in bf16 its exits are kept, and its thresholds
come from what that backend says of one half of the images. Accuracies are of the other half.

python benchmarks/original.py SDN_DIR POLICY_DIR CIFAR_DIR OUT.json
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from shallowdeep.calibration import calibrate
from shallowdeep.classifiers import Said
from shallowdeep.data import halves, read_data
from shallowdeep.files import read_json
from shallowdeep.network import ShallowDeepNetwork
from shallowdeep.paper.networks import ResNet
from shallowdeep.policies import Confidence
from shallowdeep.runs import describe_device
from shallowdeep.runtime.backends import BackendName
from shallowdeep.runtime.engine import Engine
from shallowdeep.spelling import from_json
from shallowdeep.timing import quartiles
from shallowdeep.verbs import load_sdn, ready

SLOW_ROWS, ROUNDS, AIM = 200, 9, 0.005
FLOAT32: tuple[BackendName, ...] = ("torch", "onnxruntime", "openvino")
BF16: BackendName = "openvino-bf16"


def slow(sdn: ShallowDeepNetwork, policy: Confidence, image: Tensor) -> int:
    """The exit of one image [1, 3, 32, 32], as the authors' early exit finds it."""
    net, places = cast(ResNet, sdn.backbone), {cut.name: exit for exit, cut in enumerate(sdn.plan.cuts)}
    said: Said | None = None
    x = F.relu(net.bn1(net.conv1(image)))
    for layer in ("layer1", "layer2", "layer3"):
        for i, block in enumerate(getattr(net, layer)):
            x = block(x)
            exit = places.get(f"{layer}.{i}:out")
            if exit is None:
                continue
            logits, hidden = sdn.classifier(exit)(x, said)
            said = Said.of(logits, hidden)
            softmax = F.softmax(logits, dim=1)
            if policy.asks(sdn.num_exits, sdn.num_exits - 1)[exit] and softmax.max().item() >= policy.at(exit):
                return exit
    F.softmax(net.linear(x.mean((2, 3))), dim=1).max().item()
    return sdn.num_exits - 1


def main() -> None:
    folder, policy_dir, data_dir, out = map(Path, sys.argv[1:])
    sdn, preprocessing = load_sdn(folder)
    policy = from_json(read_json(policy_dir / "policy.json"))
    assert isinstance(policy, Confidence)
    data = read_data(str(data_dir), split="test")
    images = ready(data, preprocessing)
    assert isinstance(images, Tensor)
    chosen, reported = halves(len(images))
    engines = {name: Engine(sdn, policy, backend=name) for name in FLOAT32}
    trace = Engine(sdn, policy, backend=BF16).collect((images[chosen], data.labels_N[chosen]))
    asked = policy.asks(sdn.num_exits, sdn.num_exits - 1)
    engines[BF16] = Engine(sdn, calibrate(trace, max_accuracy_drop=AIM, enabled_E=asked), backend=BF16)
    accuracy = {
        name: float((engine(images[reported]).labels_B == data.labels_N[reported]).double().mean())
        for name, engine in engines.items()
    }
    with torch.no_grad():
        agree = sum(
            slow(sdn, policy, images[i : i + 1]) == int(engines["torch"](images[i : i + 1]).exit_B) for i in range(100)
        )
    per_image: dict[str, list[float]] = {"original": [], **{name: [] for name in engines}}
    for _ in range(ROUNDS):
        start = time.perf_counter()
        with torch.no_grad():
            for i in range(SLOW_ROWS):
                slow(sdn, policy, images[i : i + 1])
        per_image["original"].append((time.perf_counter() - start) / SLOW_ROWS)
        for name, engine in engines.items():
            start = time.perf_counter()
            for i in range(0, 2560, 256):
                engine(images[i : i + 256])
            per_image[name].append((time.perf_counter() - start) / 2560)
    speedups = {}
    for name in engines:
        ratios = [a / b for a, b in zip(per_image["original"], per_image[name], strict=True)]
        speedups[name] = dict(zip(("low", "median", "high"), quartiles(ratios), strict=True))
    result = {
        "device": describe_device(),
        "same_exit_of_100": agree,
        "accuracy": accuracy,
        "ms_per_image": {name: 1e3 * statistics.median(found) for name, found in per_image.items()},
        "speedup": speedups,
    }
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
