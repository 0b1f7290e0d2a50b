"""Early exits of one of the study's networks against the fastest whole network, in seconds.

The policy comes from the 5,000 images that were held out before the network was trained, the figures from test images.
The default aim was set after VGG16 had lost .66 points on those at an aim of .5.

python benchmarks/study.py RUN_DIR CIFAR_DIR OUT.json [AIMED_DROP]

RUN_DIR is the work folder of an "ic-only" run, such as runs/paper/cifar10-vgg16-ic-only-fast of
``sdn paper run DATA --datasets cifar10 --networks vgg16 --regimes cnn ic-only``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from shallowdeep.calibration import calibrate
from shallowdeep.data import read_data
from shallowdeep.network import ShallowDeepNetwork, load
from shallowdeep.paper.datasets import study_set
from shallowdeep.paper.recipes import fresh_network
from shallowdeep.paper.study import load_network
from shallowdeep.runs import plain
from shallowdeep.runtime.bench import bench, verdict
from shallowdeep.types import Trace
from shallowdeep.walking import simulate

ROWS = 2000


def main() -> None:
    run, data_dir, out = map(Path, sys.argv[1:4])
    aimed = float(sys.argv[4]) if len(sys.argv) > 4 else 0.003
    sdn = study_sdn(run)
    held_out, test = (Trace.load(run / f"{name}.safetensors") for name in ("held_out", "test"))
    policy = calibrate(held_out, max_accuracy_drop=aimed)
    outcome, full = simulate(policy, test), test.logits_ENC[test.full_exit].argmax(1)
    right, right_full = (outcome.labels_N == test.labels_N).double(), (full == test.labels_N).double()
    facts = {
        "run": run.name,
        "aimed_drop": aimed,
        "all_test_images": {
            "accuracy_full": float(right_full.mean()),
            "accuracy_early_exit": float(right.mean()),
            "drop": float((right_full - right).mean()),
            "mean_cost": float(outcome.cost_N.mean()),
        },
    }
    data = read_data(str(data_dir), split="test", limit=ROWS)
    found = bench(sdn, policy, (data.inputs, data.labels_N), batch_sizes=(1, 64), threads=(1, 2))
    print(verdict(found))
    out.write_text(json.dumps(plain({**facts, **found, "verdict": verdict(found)}), indent=1) + "\n")


def study_sdn(run: Path) -> ShallowDeepNetwork:
    """The SDN of the study's run whose work folder is ``run``."""
    dataset, network = run.name.split("-ic-only")[0].split("-", 1)
    model = fresh_network(network, study_set(dataset), 0)
    load_network(model, run, run.name)
    return load(run / "sdn", model).eval()


if __name__ == "__main__":
    main()
