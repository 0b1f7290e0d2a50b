"""What a few epochs teach a network of the study, on held-out rows: by SGD alone, and by its ``fast`` recipe.

python benchmarks/optimisers.py DATA OUT.json [NETWORK EPOCHS]
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from shallowdeep.augment import FlipCrop
from shallowdeep.joint import train_backbone
from shallowdeep.paper.datasets import read_rows, split_rows, study_set
from shallowdeep.paper.recipes import FAST, FAST_WHOLE, fresh_network
from shallowdeep.runs import describe_device


def main(data: Path, out: Path, network: str = "mobilenet", epochs: str = "4") -> None:
    chosen, (images, labels) = study_set("cifar10"), read_rows("cifar10", data, "train")
    kept, held = split_rows(labels)
    result: dict[str, Any] = {"network": network, "epochs": int(epochs), "device": describe_device(), "ways": {}}
    for name, recipe in (("sgd", FAST), ("muon", FAST_WHOLE[network])):
        model, start = fresh_network(network, chosen, seed=0), time.perf_counter()
        train_backbone(
            model,
            (images[kept], labels[kept]),
            num_classes=chosen.num_classes,
            epochs=int(epochs),
            recipe=recipe,
            augment=FlipCrop(padding=chosen.padding),
            fabric=Fabric(accelerator="cpu", devices=1, precision="bf16-mixed"),
        )
        seconds = time.perf_counter() - start
        with torch.inference_mode(), torch.autocast("cpu"):
            said = torch.cat([model.eval()(part).argmax(-1) for part in images[held].split(500)])
        right = (said == labels[held]).double().mean().item()
        result["ways"][name] = {
            "batch_size": recipe.batch_size,
            "muon_lr": recipe.muon_lr,
            "accuracy": right,
            "seconds_per_epoch": seconds / int(epochs),
        }
        out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
