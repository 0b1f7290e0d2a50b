"""The committed run of the CIFAR-10 demo, its policy chosen anew and measured: everything but training and trace.

python benchmarks/demo.py SDN_DIR WEIGHTS CIFAR_DIR results/demo-cifar10

SDN_DIR is the folder of ``sdn demo --data cifar10 --weights WEIGHTS``, the last one holds its trace. Judged over 20
splits as by the demo; the first split's policy is written and measured on the rows that did not choose it
(``bench.json``, which `make report` draws).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from shallowdeep.data import Preprocessing, halves, read_data
from shallowdeep.demo import CIFAR_DROP, judged, public_resnet, summary
from shallowdeep.engine_verbs import time_engine
from shallowdeep.files import read_json
from shallowdeep.network import load
from shallowdeep.runs import describe_device, plain
from shallowdeep.runtime.bench import bench, verdict
from shallowdeep.runtime.engine import Engine
from shallowdeep.spelling import to_json
from shallowdeep.verbs import read_trace, ready


def main() -> None:
    folder, weights, data_dir, results = map(Path, sys.argv[1:])
    sdn = load(folder, public_resnet(weights)).eval()
    trace = read_trace(results)
    found, policy = judged(trace, CIFAR_DROP)
    rows = read_data(str(data_dir), split="test").rows(halves(trace.num_samples)[1])
    inputs = ready(rows, Preprocessing.from_json(sdn.preprocessing))
    timed = time_engine(Engine(sdn, policy), inputs, 64, rounds=5, limit=1024)
    run = read_json(results / "run.json")
    run["results"] |= {**found, **timed}
    run["device"] = describe_device()
    measured = bench(sdn, policy, (inputs, rows.labels_N), batch_sizes=(1, 64), threads=(1, 2))
    print(verdict(measured))
    texts = {
        "policy.json": json.dumps(to_json(policy), indent=1),
        "bench.json": json.dumps(plain(measured | {"verdict": verdict(measured)}), indent=1),
        "run.json": json.dumps(plain(run), indent=1),
        "table.txt": summary(trace, run["results"]),
    }
    for name, text in texts.items():
        (results / name).write_text(text + "\n")


if __name__ == "__main__":
    main()
