"""Do backends answer as the trace says? Law 3 on CIFAR-10's test images, and a policy calibrated in bf16 for bf16.

Float32: exits that differ from ``simulate`` on a trace of PyTorch's, over all images. Reduced precision: what a trace
says that the same backend collected on one half, about its own answers on the other half.

python benchmarks/precision.py SDN_DIR CIFAR_DIR OUT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shallowdeep.calibration import calibrate
from shallowdeep.collection import collect
from shallowdeep.data import read_data
from shallowdeep.runs import describe_device, plain
from shallowdeep.runtime.backends import BackendName
from shallowdeep.runtime.engine import Engine
from shallowdeep.verbs import load_sdn, ready
from shallowdeep.walking import simulate

AIMED = 0.005
FLOAT32: tuple[BackendName, ...] = ("torch", "torch-compile", "onnxruntime", "openvino")


def main() -> None:
    folder, data_dir, out = map(Path, sys.argv[1:])
    sdn, preprocessing = load_sdn(folder)
    data = read_data(str(data_dir), split="test")
    images, labels_N = ready(data, preprocessing), data.labels_N
    assert isinstance(images, Tensor)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    choosing, reporting = torch.split(order, len(images) // 2)
    trace = collect(sdn, (images, labels_N))
    policy = calibrate(trace.rows(choosing), max_accuracy_drop=AIMED)
    expected = simulate(policy, trace)

    def answered(engine: Engine, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = [engine(part) for part in torch.split(rows, 256)]
        exit_N, label_N, cost_N = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("exit_B", "labels_B", "cost_B")
        )
        return exit_N, label_N, cost_N

    found: dict[str, Any] = {"device": describe_device(), "rows": len(images), "float32": {}}
    for name in FLOAT32:
        exit_N, label_N, _ = answered(Engine(sdn, policy, backend=name), images)
        away = {"exits": exit_N != expected.exit_N, "labels": label_N != expected.labels_N}
        found["float32"][name] = {f"{what}_differ": int(other_N.sum()) for what, other_N in away.items()}
        print(name, found["float32"][name], flush=True)
    name = "openvino-bf16"
    own = Engine(sdn, policy, backend=name).collect((images[choosing], labels_N[choosing]))
    for chosen_on, chosen in (("its own trace", calibrate(own, max_accuracy_drop=AIMED)), ("a float32 trace", policy)):
        engine = Engine(sdn, chosen, backend=name)
        exit_N, label_N, cost_N = answered(engine, images[reporting])
        whole = engine.collect((images[reporting], labels_N[reporting]))
        says = simulate(chosen, whole)
        right = float((label_N == labels_N[reporting]).double().mean())
        right_full = float((whole.logits_ENC[whole.full_exit].argmax(1) == whole.labels_N).double().mean())
        found[f"{name}, thresholds from {chosen_on}"] = {
            "accuracy_full": right_full,
            "drop": right_full - right,
            "mean_cost": float(cost_N.mean()),
            "exits_differ_from_its_trace": int((exit_N != says.exit_N).sum()),
        }
    out.write_text(json.dumps(plain({"aimed_drop": AIMED, **found}), indent=1) + "\n")
    print(json.dumps(plain(found), indent=1))


if __name__ == "__main__":
    main()
