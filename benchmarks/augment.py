"""Images per second of the study's augmentations on one core, CIFAR and Tiny ImageNet shapes, in batches of 128.

python benchmarks/augment.py OUT.json
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from shallowdeep.augment import Augment, Chain, ColorJitter, FlipCrop
from shallowdeep.runs import describe_device
from shallowdeep.timing import quartiles

BATCH, BATCHES, ROUNDS = 128, 40, 25


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    ways: dict[str, tuple[Augment, int]] = {
        "cifar: flip, pad-crop": (FlipCrop(padding=4), 32),
        "tiny: colour jitter, flip, pad-crop": (Chain((ColorJitter(), FlipCrop(padding=8))), 64),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    images = {side: torch.randint(0, 256, (BATCH * BATCHES, 3, side, side), dtype=torch.uint8) for side in (32, 64)}
    # As in training, whose middling activations teach the allocator to keep freed memory instead of asking for it anew.
    torch.empty(16 * 2**20, dtype=torch.uint8)
    for _ in range(ROUNDS):
        for name, (augment, side) in ways.items():
            start = time.perf_counter()
            for batch in torch.split(images[side], BATCH):
                augment(batch, generator)
            rates[name].append(BATCH * BATCHES / (time.perf_counter() - start))
    result = {
        "device": describe_device(),
        "images_per_second": {
            name: dict(zip(("low", "median", "high"), quartiles(found), strict=True)) for name, found in rates.items()
        },
    }
    Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
