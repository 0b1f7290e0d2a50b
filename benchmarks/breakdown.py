"""Where the time of early exits goes: one thing more at a time, from the whole network to the engine, in one run.

Every stage is compiled as the engine compiles and works at full depth: the network in one piece; with its ICs; with the
policy's questions; with the branches that let rows leave, which here all go on; called through ``Engine``. Then rows
that all leave at the first exit asked, against the network cut there in one piece, which asks nothing. What a stage
adds is the median of the differences of paired blocks.

python benchmarks/breakdown.py SDN_DIR BENCH.json CIFAR_DIR OUT.json

SDN_DIR may be the work folder of a run of the study, as for study.py; the exits asked are those of BENCH.json.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shallowdeep.costs import exits_of
from shallowdeep.data import halves, read_data
from shallowdeep.files import read_json
from shallowdeep.policies import Confidence, Fixed
from shallowdeep.runs import describe_device
from shallowdeep.runtime.engine import Engine
from shallowdeep.runtime.on_onnxruntime import OnOnnxRuntime
from shallowdeep.steps import Joined, Step, chain, make_steps
from shallowdeep.timing import quartiles
from shallowdeep.verbs import load_sdn, ready
from study import study_sdn

BLOCKS, ROWS_A_BLOCK, SHOWN = 60, 64, ("logits", "softmax", "stop")
Call = Callable[[Tensor], object]


class Asked(Joined):
    """Steps in one piece that also give the answers to every question: nobody leaves."""

    def __init__(self, steps: Sequence[Step]) -> None:
        super().__init__(steps)
        names = [(name.split(".")[0], step.place) for step in steps for name in step.gives]
        self.gives = tuple(f"{name}.{place}" for name, place in names if name in SHOWN)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        rows = dict(zip(self.takes, tensors, strict=True))
        found = [
            (name, x) for step, _, out in chain(self._steps, rows) for name, x in zip(step.gives, out, strict=True)
        ]
        return tuple(x for name, x in found if name.split(".")[0] in SHOWN)


def main() -> None:
    folder, measured, data_dir, out = map(Path, sys.argv[1:])
    data = read_data(str(data_dir), split="test")
    if (folder / "sdn").exists():
        sdn, images = study_sdn(folder), data.inputs
    else:
        sdn, preprocessing = load_sdn(folder)
        images = ready(data, preprocessing)
    assert isinstance(images, Tensor)
    exits = read_json(measured)["exits_asked"]
    asked = tuple(name in exits for name in exits_of(sdn, None).exit_names)
    images, example = images[halves(len(images))[1]], images[:2]
    nobody, everybody = (Confidence(threshold=threshold, enabled_E=asked) for threshold in (math.inf, 0.0))
    steps = make_steps(sdn, nobody, example)
    pieces = {
        "network": Joined(make_steps(sdn, Fixed(exit=sdn.num_exits - 1), example)),
        "ICs": Joined(steps),
        "questions": Asked(steps),
        "cut": Joined(steps[:1]),
    }
    found = []
    for threads in (1, 2):
        backend = OnOnnxRuntime(threads)
        ways: dict[str, Call] = {name: bare(backend, piece, example) for name, piece in pieces.items()}
        engine = Engine(sdn, nobody, backend="onnxruntime", threads=threads)
        ways["branches"] = skipping(backend, steps, example)
        ways["engine"] = engine
        ways["leaves"] = Engine(sdn, everybody, backend="onnxruntime", threads=threads)
        for size in (1, 64):
            found.append({"threads": threads, "batch_size": size} | summed_up(in_turn(ways, images, size)))
            print(json.dumps(found[-1]))
    facts = {"device": describe_device(), "exits_asked": exits, "blocks": BLOCKS, "milliseconds_a_batch": found}
    out.write_text(json.dumps(facts, indent=1) + "\n")


def bare(backend: OnOnnxRuntime, piece: Joined, example: Tensor) -> Call:
    with torch.no_grad():
        run = backend.compile(piece, [example])
    return lambda batch: run([backend.enter(batch)])


def skipping(backend: OnOnnxRuntime, steps: Sequence[Step], example: Tensor) -> Call:
    with torch.no_grad():
        examples = [given for _, given, _ in chain(steps, {steps[0].takes[0]: example})]
        skip = backend.skipping(steps, examples, {})
    assert skip is not None
    return lambda batch: skip({steps[0].takes[0]: backend.enter(batch)})


def in_turn(ways: dict[str, Call], images: Tensor, size: int) -> dict[str, list[float]]:
    """Milliseconds a batch of every way in every block."""
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for block in range(BLOCKS):
        start = block * ROWS_A_BLOCK % (len(images) - ROWS_A_BLOCK + 1)
        batches = torch.split(images[start : start + ROWS_A_BLOCK], size)
        shuffled = list(ways.items())
        order.shuffle(shuffled)
        for name, call in shuffled:
            call(batches[0])  # wakes the caches
            begun = time.perf_counter()
            for batch in batches:
                call(batch)
            times[name].append(1e3 * (time.perf_counter() - begun) / len(batches))
    return times


def summed_up(times: dict[str, list[float]]) -> dict[str, Any]:
    """The whole network and the cut one, and what each thing adds to the one before it."""
    pairs = [("network", "ICs"), ("ICs", "questions"), ("questions", "branches"), ("branches", "engine")]
    added = {after: spread(differences(times, before, after)) for before, after in pairs}
    leaving = spread(differences(times, "cut", "leaves"))
    return {"network": spread(times["network"]), "adds": added, "cut": spread(times["cut"]), "leaving_adds": leaving}


def differences(times: dict[str, list[float]], before: str, after: str) -> list[float]:
    """What ``after`` takes longer than ``before``, block by block."""
    return [b - a for a, b in zip(times[before], times[after], strict=True)]


def spread(values: Sequence[float]) -> dict[str, float]:
    return dict(zip(("low", "median", "high"), quartiles(values), strict=True))


if __name__ == "__main__":
    main()
