"""Seconds of a training step in bf16 on one core, batches of 128 CIFAR images, with and without QuickConvolutions.

python benchmarks/convolutions.py OUT.json
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from shallowdeep.convolutions import QuickConvolutions
from shallowdeep.paper.networks import make_network
from shallowdeep.runs import describe_device
from shallowdeep.timing import quartiles

ROUNDS = 9


def main() -> None:
    torch.set_num_threads(1)
    images = torch.randn(128, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(128) % 10
    result: dict[str, Any] = {"device": describe_device(), "seconds_per_step": {}, "speedup": {}}
    for name in ("vgg16", "mobilenet", "resnet56"):
        model = make_network(name, 10, 32)
        seconds: dict[str, list[float]] = {"plain": [], "quick": []}
        sgd = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(ROUNDS + 1):
            for way, mode in (("plain", nullcontext()), ("quick", QuickConvolutions())):
                start = time.perf_counter()
                with torch.autocast("cpu"), mode:
                    loss = F.cross_entropy(model(images), labels)
                sgd.zero_grad()
                loss.backward()
                sgd.step()
                seconds[way].append(time.perf_counter() - start)
        plain, quick = (seconds[way][1:] for way in ("plain", "quick"))  # the first step warms up
        result["seconds_per_step"][name] = {way: statistics.median(found[1:]) for way, found in seconds.items()}
        ratios = [a / b for a, b in zip(plain, quick, strict=True)]
        quarters = quartiles(ratios)
        result["speedup"][name] = dict(zip(("low", "median", "high"), quarters, strict=True))
    Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
