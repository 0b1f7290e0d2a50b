"""Seconds of the CIFAR-10 demo's network under its committed policy; `make report` draws them.

python benchmarks/demo.py SDN_DIR WEIGHTS CIFAR_DIR results/demo-cifar10

SDN_DIR is the folder of ``sdn demo --data cifar10 --weights WEIGHTS``. The last folder's trace and policy say which
test images chose nothing; it gets ``bench.json``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from shallowdeep.data import Preprocessing, read_data
from shallowdeep.demo import public_resnet
from shallowdeep.network import load
from shallowdeep.runs import plain
from shallowdeep.runtime.bench import bench, verdict
from shallowdeep.verbs import policy_for, read_trace, ready


def main() -> None:
    folder, weights, data_dir, results = map(Path, sys.argv[1:])
    sdn = load(folder, public_resnet(weights)).eval()
    trace = read_trace(results)
    policy = policy_for(trace, results)
    assert policy.calibrated_on is not None
    assert trace.hash_N is not None
    unseen_N = ~torch.isin(trace.hash_N, torch.tensor(policy.calibrated_on.hash_N))
    rows = read_data(str(data_dir), split="test").rows(unseen_N.nonzero().flatten())
    inputs = ready(rows, Preprocessing.from_json(sdn.preprocessing))
    found = bench(sdn, policy, (inputs, rows.labels_N), batch_sizes=(1, 64), threads=(1, 2))
    print(verdict(found))
    (results / "bench.json").write_text(json.dumps(plain(found | {"verdict": verdict(found)}), indent=1) + "\n")


if __name__ == "__main__":
    main()
