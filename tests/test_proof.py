"""The proof draws what it says, counts what it sees, goes on where it stopped, and would see a broken bound."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import oracle
from shallowdeep import cli, proof
from shallowdeep.calibration import calibrate, evaluate
from shallowdeep.proof import best_costs, prove, simulated, summary, verdict
from shallowdeep.types import Trace


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Two draws a block, one size, in this process."""
    monkeypatch.setattr(proof, "BLOCK", 2)
    monkeypatch.setattr(proof, "SIZES", (400,))
    monkeypatch.setattr(proof, "SIMULATED", ())
    monkeypatch.setattr(proof, "ProcessPoolExecutor", InThisProcess)
    oracle.bed(1000, exits=4).save(tmp_path / "trace.safetensors")
    return tmp_path


class InThisProcess(ThreadPoolExecutor):
    """Patches do not reach other processes."""

    def __init__(self, *_: object) -> None:
        super().__init__(1)


def test_draws_are_counted_and_resumed(small: Path) -> None:
    out = small / "out"
    none = prove(small / "trace.safetensors", out, draws=4, minutes=0)
    assert none["populations"]["trace"]["cells"] == []
    found = prove(small / "trace.safetensors", out, draws=2)
    kept = (out / "draws" / "trace-00000.json").stat().st_mtime_ns
    found = prove(small / "trace.safetensors", out, draws=4)
    assert (out / "draws" / "trace-00000.json").stat().st_mtime_ns == kept
    cells = found["populations"]["trace"]["cells"]
    assert [cell["draws"] for cell in cells] == [4] * 6
    assert json.loads((out / "proof.json").read_text())["populations"]["trace"]["cells"] == cells
    one = json.loads((out / "draws" / "trace-00002.json").read_text())[4]
    population = dataclasses.replace(Trace.load(small / "trace.safetensors"), hash_N=None)
    index = torch.from_numpy(np.random.default_rng([2, 400]).integers(1000, size=400))
    policy = calibrate(population.rows(index), max_accuracy_drop=one["bound"], confidence=1 - one["delta"])
    assert evaluate(policy, population).drop == pytest.approx(one["drop"])
    assert evaluate(policy, population).mean_cost == pytest.approx(one["cost"])


def test_draws_from_another_trace_are_not_gone_on_with(small: Path) -> None:
    prove(small / "trace.safetensors", small / "out", draws=2, minutes=0)
    oracle.bed(1000, exits=4, seed=1).save(small / "other.safetensors")
    with pytest.raises(ValueError, match="holds draws from another trace; give another folder"):
        prove(small / "other.safetensors", small / "out", draws=2, minutes=0)


def test_a_bound_broken_too_often_is_said() -> None:
    population = simulated("helpful", 500)
    broken = [
        {"rows": 5000, "bound": 0.01, "delta": 0.05, "certified": True, "drop": 0.02 * (i < 25), "cost": 0.9}
        for i in range(200)
    ]
    found = summary(population, broken)
    assert found["cells"][0]["violations"] == 0.125
    assert not found["cells"][0]["holds"]
    said = verdict({"populations": {"trace": found}})
    assert "Broken too often: [('trace', '5000', '1.0%', '0.05')]" in said
    assert "Dearer than allowed: [('trace', '5000', '1.0%', '0.05')]" in said
    good = summary(population, [one | {"drop": 0.0, "cost": 0.1} for one in broken])
    assert "Every rate of violation is within delta. Every cost is within" in verdict({"populations": {"trace": good}})


def test_the_best_is_better_than_any_certificate() -> None:
    population = simulated("helpful", 2000)
    best = best_costs(population)
    assert best[0.005] > best[0.01] > best[0.02] > 0.25
    policy = calibrate(population, max_accuracy_drop=0.02, confidence=0.9)
    assert evaluate(policy, population).mean_cost > best[0.02]


def test_harmful_exits_are_sure_and_wrong() -> None:
    population = simulated("harmful", 3000)
    said_EN = population.logits_ENC.argmax(2)
    sure_EN = population.logits_ENC.softmax(2).amax(2)
    wrong_EN = said_EN != population.labels_N
    assert (wrong_EN[:3] & (sure_EN[:3] > 0.99)).double().mean(1).min() > 0.05
    assert wrong_EN[3].double().mean() < 0.1


def test_the_verb_says_what_it_found(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["prove-guarantee", str(small), "--out", str(small / "out"), "--draws", "2"])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["verb"] == "prove-guarantee"
    assert last["broken"] == 0
    assert (small / "out" / "run.json").is_file()
