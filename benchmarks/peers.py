"""earlyon 0.3.0 beside this library: the same frozen public ResNet-56, the same exits, the same images, one run.

Each trains its own heads on the training images in its own way, and chooses its thresholds in its own way for the same
aim on one half of the test images; the other half is reported. Times of one image are interleaved in blocks, in one
order drawn anew for every block; the plain network in eager PyTorch and in ONNX Runtime stand beside them.

It needs an environment of its own:
  python -m venv peers && peers/bin/pip install -c constraints.txt torch
  peers/bin/pip install -c constraints.txt -e '.[export,openvino]' earlyon==0.3.0
  peers/bin/python benchmarks/peers.py SDN_DIR CIFAR_DIR OUT.json

``SDN_DIR`` is a folder of ``sdn train`` with the plan that ``make bench`` makes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

# torchvision from a registry is built for CUDA: on a CPU build of torch two of its operators must be declared first.
_SHIM = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _SHIM.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from earlyon.core.thresholds import calibrate_thresholds  # noqa: E402
from earlyon.models.custom import custom_ee  # noqa: E402
from earlyon.training.two_stage_trainer import stage2_train_exits  # noqa: E402

from shallowdeep.calibration import calibrate, evaluate  # noqa: E402
from shallowdeep.collection import collect  # noqa: E402
from shallowdeep.data import halves, read_data  # noqa: E402
from shallowdeep.policies import Fixed  # noqa: E402
from shallowdeep.runs import describe_device  # noqa: E402
from shallowdeep.runtime.engine import Engine  # noqa: E402
from shallowdeep.verbs import load_sdn, ready  # noqa: E402

DROP, EPOCHS, BLOCKS, ROWS = 0.005, 5, 40, 20
"""The aim of both; epochs of earlyon's heads (its own trainer, Adam, clean views)."""


def loader(x: Tensor, y: Tensor, *, shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(x, y), batch_size=128, shuffle=shuffle)


def timed(ways: dict[str, Callable[[Tensor], Any]], x: Tensor, rng: np.random.Generator) -> dict[str, list[float]]:
    """Milliseconds an image of every way, block by block."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(BLOCKS):
        images = [x[i : i + 1].contiguous() for i in rng.integers(0, len(x), ROWS)]
        for name in rng.permutation([*ways]):
            ways[name](images[0])
            start = time.perf_counter()
            for image in images:
                ways[name](image)
            found[name].append(1e3 * (time.perf_counter() - start) / ROWS)
    return found


def main() -> None:
    folder, data_dir, out = map(Path, sys.argv[1:])
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sdn, preprocessing = load_sdn(folder)
    sets = {split: read_data(str(data_dir), split=split) for split in ("train", "test")}
    (x_train, y_train), (x, y) = ((ready(rows, preprocessing), rows.labels_N) for rows in sets.values())
    assert isinstance(x_train, Tensor)
    assert isinstance(x, Tensor)
    a, b = halves(len(x))

    trace = collect(sdn, (x, y))
    policy = calibrate(trace.rows(a), max_accuracy_drop=DROP)
    ours = evaluate(policy, trace.rows(b))

    layers = [cut.module for cut in sdn.plan.cuts]
    rival = custom_ee(sdn.backbone, layers, sdn.plan.num_classes, input_shape=(1, *x.shape[1:]))
    stage2_train_exits(rival, loader(x_train, y_train, shuffle=True), epochs=EPOCHS)
    rival.eval()
    calibrate_thresholds(rival, loader(x[a], y[a]), target_accuracy_drop=DROP)
    answers = [rival(x[i : i + 1], mode="inference") for i in b]
    right = [int(one.prediction.argmax()) == int(y[i]) for i, one in zip(b, answers, strict=True)]

    backbone = sdn.backbone.eval()

    def eager(image: Tensor) -> Tensor:
        with torch.inference_mode():
            return backbone(image)  # type: ignore[no-any-return]

    full = Fixed(exit=sdn.num_exits - 1)
    ways: dict[str, Callable[[Tensor], Any]] = {
        "network, eager": eager,
        "network, onnxruntime": Engine(sdn, full, backend="onnxruntime", threads=1),
        "earlyon": lambda image: rival(image, mode="inference"),
        "shallowdeep, torch": Engine(sdn, policy, backend="torch"),
        "shallowdeep, onnxruntime": Engine(sdn, policy, backend="onnxruntime", threads=1),
        "shallowdeep, openvino": Engine(sdn, policy, backend="openvino", threads=1),
    }
    print("timing: other programs should rest now", flush=True)
    ms = timed(ways, x[b], np.random.default_rng(0))
    base = np.array(ms["network, eager"])
    result = {
        "device": describe_device(),
        "versions": {name: version(name) for name in ("torch", "earlyon", "onnxruntime", "openvino")},
        "exits": layers,
        "aim": DROP,
        "accuracy_full": ours.accuracy_full,
        "shallowdeep": {"accuracy": ours.accuracy_early_exit, "drop": ours.drop, "mean_cost": ours.mean_cost},
        "earlyon": {
            "epochs": EPOCHS,
            "accuracy": float(np.mean(right)),
            "drop": ours.accuracy_full - float(np.mean(right)),
            "backbone_flops_fraction": float(np.mean([one.estimated_backbone_flops_fraction for one in answers])),
            "enabled_exits": rival.config.enabled_exits,
            "thresholds": rival.config.confidence_thresholds,
        },
        "ms_per_image": {name: float(np.median(found)) for name, found in ms.items()},
        "times_as_fast_as_eager": {
            name: dict(
                zip(("low", "median", "high"), np.quantile(base / np.array(found), (0.25, 0.5, 0.75)), strict=True)
            )
            for name, found in ms.items()
        },
    }
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
