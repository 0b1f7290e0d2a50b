"""The tables of docs/engine.md say what the files in results/bench say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shallowdeep.files import read_json

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "results" / "bench"
NUMBER = re.compile(r"-?\d*\.\d+|-?\d+")


def rows_after(heading: str) -> Iterator[list[str]]:
    """The cells of the first table of docs/engine.md whose head begins with ``heading``."""
    lines = iter((ROOT / "docs" / "engine.md").read_text().splitlines())
    next(line for line in lines if line.startswith(heading))
    next(lines)
    for line in lines:
        if not line.startswith("|"):
            return
        yield [cell.strip() for cell in line.strip("|").split("|")]


def says(cell: str, *values: float) -> bool:
    """Whether ``cell`` holds ``values`` in this order, each rounded to the digits that stand there."""
    found = NUMBER.findall(cell.replace("*", ""))
    digits = [len(number.partition(".")[2]) for number in found]
    return len(found) == len(values) and all(
        abs(float(number) - value) <= 0.5001 * 10.0**-places
        for number, places, value in zip(found, digits, values, strict=True)
    )


def best(file: str, batch: int, threads: int) -> dict[str, Any]:
    measured = read_json(BENCH / file)["measured"]
    return max((m for m in measured if (m["batch_size"], m["threads"]) == (batch, threads)), key=lambda m: m["speedup"])


def test_the_table_of_speed() -> None:
    rows = list(rows_after("| network | batch | threads | whole network"))
    assert len(rows) == 12
    for network, batch, threads, whole, early, speedup, efficiency in rows:
        file = "vgg16.json" if network == "VGG16" else f"resnet56-batch-{batch}.json"
        found = best(file, int(batch), int(threads))
        assert whole.split()[-1] == found["best_full_backend"]
        assert early.split()[-1] == found["backend"]
        assert says(whole, found["best_full_ms"]), whole
        assert says(early, found["early_exit_ms"]), early
        assert says(speedup, found["speedup"], *found["speedup_quartiles"]), speedup
        assert says(efficiency, found["efficiency"]), efficiency


def test_the_table_of_second_looks() -> None:
    rows = list(rows_after("| `results/bench/` | batch | threads"))
    assert len(rows) >= 10
    for file, batch, threads, speedup, points in rows:
        found = best(file.strip("`"), int(batch), int(threads))
        assert says(speedup, found["speedup"], *found["speedup_quartiles"]), speedup
        assert says(points, 100 * (found["accuracy_early_exit"] - found["accuracy_full"])), points


@pytest.mark.parametrize(
    ("network", "heading", "count"),
    [
        ("resnet56", "| batch | the network, ms | its two ICs", 2),
        ("vgg16", "| batch, threads | the network, ms | its six ICs", 4),
    ],
)
def test_the_tables_of_where_the_time_goes(network: str, heading: str, count: int) -> None:
    measured = {
        (one["batch_size"], one["threads"]): one
        for one in read_json(BENCH / f"breakdown-{network}.json")["milliseconds_a_batch"]
    }
    rows = list(rows_after(heading))
    assert len(rows) == count
    for sizes, *cells in rows:
        batch, threads = map(int, (sizes if "," in sizes else f"{sizes}, 1").split(","))
        found = measured[batch, threads]
        adds = [found["adds"][stage] for stage in ("ICs", "questions", "branches", "engine")]
        parts = [found["network"], *adds, found["cut"], found["leaving_adds"]]
        for cell, part in zip(cells, parts, strict=False):  # one table leaves the last two to the text
            assert says(cell, part["median"], part["low"], part["high"]), cell
