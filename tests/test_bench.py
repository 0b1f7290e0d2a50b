"""The benchmark: fair turns, ratios that follow from the times, and a verdict that says what the figures say."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shallowdeep.policies import Confidence, Fixed
from shallowdeep.runtime import backends as backends_module
from shallowdeep.runtime import bench as bench_module
from shallowdeep.runtime.bench import Times, Way, bench, verdict
from shallowdeep.runtime.on_torch import OnTorch
from shallowdeep.steps import Joined
from test_backends import middle, rows, tiny


def test_on_real_networks() -> None:
    sdn, inputs = tiny(), rows(64)
    labels_N = torch.arange(64) % 4
    before = torch.get_num_threads()
    rival = nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 4))
    rival[1].eval()
    modes = [module.training for module in rival.modules()]
    policy = Confidence(threshold=middle(sdn, inputs))
    found = bench(
        sdn, policy, (inputs, labels_N), backends=("torch",), batch_sizes=(1, 16), threads=(1,), blocks=3,
        rivals={"small": rival},
    )  # fmt: skip
    assert torch.get_num_threads() == before
    with torch.no_grad():
        full_right = (sdn.backbone(inputs).argmax(1) == labels_N).double().mean()
        rival_right = (rival(inputs).argmax(1) == labels_N).double().mean()
        cut_right = (sdn(inputs)[0].argmax(1) == labels_N).double().mean()
    assert found["accuracy_full"] == pytest.approx(float(full_right))
    assert found["accuracy_others"]["small"] == pytest.approx(float(rival_right))
    assert found["accuracy_others"]["cut 0"] == pytest.approx(float(cut_right))
    assert 0 < found["share_early"] < 1
    assert [(one["batch_size"], one["threads"]) for one in found["measured"]] == [(1, 1), (16, 1)]
    for one in found["measured"]:
        assert set(one["other_ms"]) == {"full", "small", "cut 0", "cut 1", "every"}
        assert one["early_exit_ms"] > 0
        assert one["ideal_speedup_macs"] == pytest.approx(1 / found["mean_cost"])
        assert (one["accuracy_full"], one["accuracy_early_exit"]) == (
            found["accuracy_full"], found["accuracy_early_exit"],
        )  # fmt: skip
        assert one["full_ms_percentiles"]["p50"] <= one["full_ms_percentiles"]["p99"]
    assert len(verdict(found).splitlines()) == 2
    assert [module.training for module in rival.modules()] == modes, "a rival is left as it was"
    with pytest.raises(
        ValueError, match="Blocks of batches of 256 need 256 rows, and quartiles two blocks; found 64 rows and"
    ):
        bench(sdn, policy, (inputs, labels_N), backends=("torch",))
    for few, blocks in ((31, 12), (32, 1)):
        with pytest.raises(
            ValueError, match=f"need 32 rows, and quartiles two blocks; found {few} rows and {blocks} b"
        ):
            bench(sdn, policy, (inputs[:few], labels_N[:few]), backends=("torch",), batch_sizes=(1,), blocks=blocks)


def test_the_figures_follow_from_the_times() -> None:
    """Whole networks of 10 and 8 ms; early exits 5 ms; half the rows leave at exit 0 (2 ms), half at the end (9 ms)."""
    times = {
        Way("torch", "full"): Times(50.0, [10.0, 10.0], [10.0, 10.0, 10.0]),
        Way("onnxruntime", "full"): Times(50.0, [8.0, 8.0], [8.0, 8.0, 8.0]),
        Way("openvino-bf16", "full"): Times(50.0, [1.0, 1.0], [1.0, 1.0, 1.0]),
        Way("torch", "early"): Times(70.0, [5.0, 7.0], [5.0, 5.0, 4.0]),
        Way("torch", "cut 0"): Times(0.0, [2.0], [2.0]),
        Way("torch", "every"): Times(0.0, [9.0], [9.0]),
    }
    one = bench_module._facts("torch", 1, 4, times, torch.tensor([0, 2]), 2)
    assert (one["best_full_backend"], one["best_full_ms"], one["full_ms"]) == ("onnxruntime", 8.0, 10.0)
    assert one["speedup"] == pytest.approx(8 / 5)
    assert one["ideal_speedup"] == pytest.approx(8 / 5.5)
    assert one["efficiency"] == pytest.approx(one["speedup"] / one["ideal_speedup"])
    assert one["rows_per_second"] == pytest.approx(800)
    drifting = times | {
        Way("onnxruntime", "full"): Times(50.0, [8.0, 16.0], [4.0, 8.0, 16.0]),
        Way("torch", "early"): Times(70.0, [4.0, 8.0], [2.0, 4.0, 8.0]),
    }
    slower = bench_module._facts("torch", 1, 4, drifting, torch.tensor([0, 2]), 2)
    assert [slower["speedup"], *slower["speedup_quartiles"]] == [2, 2, 2], "the machine slows down for both"
    assert slower["efficiency"] == pytest.approx(2 / slower["ideal_speedup"])
    few = bench_module._facts("torch", 1, 4, times, torch.tensor([0] + [2] * 9), 2)
    assert few["efficiency"] is None, "a tenth of early answers says nothing"


def test_everybody_has_the_same_rows_in_shuffled_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[str, int, int]] = []

    def way(name: str) -> Any:
        return lambda batch: heard.append((name, int(batch[0, 0]), len(batch)))

    inputs = torch.arange(40.0)[:, None]
    ways = {Way("torch", name): way(name) for name in ("full", "early")}
    used_N, times = bench_module._in_turn(ways, inputs, 16, 3, random.Random(0))
    assert used_N.reshape(3, 32)[:, 0].tolist() == [0, 5, 1]
    assert [first for who, first, _ in heard if who == "full"] == [first for who, first, _ in heard if who == "early"]
    turns = [who for who, _, _ in heard[len(ways) :: 3]]
    firsts = {turns[i] for i in range(0, len(turns), len(ways))}
    assert firsts == {"full", "early"}, "nobody is always the first"
    assert all(len(found.blocks) == 3 and len(found.calls) == 6 for found in times.values())


def test_no_call_ends_before_the_device_does(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[int] = []
    measured = bench_module._ms

    def ms(call: Any, batch: Any) -> float:
        before = len(waits)
        spent = measured(call, batch)
        assert len(waits) > before
        return spent

    monkeypatch.setattr(OnTorch, "wait", lambda self: waits.append(1))
    monkeypatch.setattr(bench_module, "_ms", ms)
    data = rows(32), torch.zeros(32, dtype=torch.int64)
    bench(tiny(), Confidence(threshold=0.5), data, backends=("torch",), batch_sizes=(8,), threads=(1,), blocks=2)


def test_what_cannot_be_measured_is_refused_in_words() -> None:
    zeros_N = torch.zeros(32, dtype=torch.int64)

    def refused(said: str, inputs: Tensor | None = None, labels_N: Tensor = zeros_N, **choices: Any) -> None:
        data = rows(32) if inputs is None else inputs, labels_N
        with pytest.raises(ValueError, match=re.escape(said)):
            bench(tiny(), Fixed(exit=2), data, **{"backends": ("torch",), "batch_sizes": (8,), **choices})

    refused("takes float32 [rows, 6], found float64 [rows, 6].", rows(32).double())
    refused("must lie in 0..3 for 4 classes, found 0..31", labels_N=torch.arange(32))
    refused("Labels must be 32 class indices, found torch.int64 (31,)", labels_N=zeros_N[:31])
    for numbers in ((), (0,), (8, 0)):
        for what in ("batch_sizes", "threads"):
            refused(f"{what} are one number or more, each at least 1, found {numbers}", **{what: numbers})
    refused("No backend 'auto' to measure. Possible: 'torch', 'torch-compile', 'onnx", backends=("auto",))
    refused("'small' answers 3 classes, the SDN 4.", rivals={"small": nn.Linear(6, 3)})
    refused("'small' must be an nn.Module, found str.", rivals={"small": "resnet20"})
    refused("'small' does not take float32 [rows, 6]: ", rivals={"small": nn.Linear(5, 4)})
    for name in ("early", "full", "every", "twice", "cut 0", "cut short"):
        refused(f"{name!r} is what bench calls one of its own ways", rivals={name: nn.Linear(6, 4)})


def test_a_rival_needs_no_cut_points() -> None:
    rival = nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.Dropout())
    labels_N = rival.eval()(rows(32)).argmax(1)
    rival.train()
    found = bench(
        tiny(), Fixed(exit=2), (rows(32), labels_N), backends=("torch",), batch_sizes=(8,), threads=(1,), blocks=2,
        rivals={"linear": rival},
    )  # fmt: skip
    assert found["accuracy_others"]["linear"] == 1.0
    assert all(module.training for module in rival.modules())


def test_what_the_verdict_says() -> None:
    slow = {
        "batch_size": 1, "threads": 2, "backend": "torch", "best_full_backend": "onnxruntime", "speedup": 0.9,
        "speedup_quartiles": [0.85, 0.95], "early_exit_ms": 2.0, "other_ms": {"small": 1.0, "cut 0": 0.5, "cut 1": 1.5},
        "accuracy_full": 0.933, "accuracy_early_exit": 0.929, "share_early": 0.5, "share_twice": 0.0,
    }  # fmt: skip
    others = {"small": 0.917, "cut 0": 0.70, "cut 1": 0.926}
    found = {"accuracy_others": others, "measured": [slow]}
    said = verdict(found)
    assert said.startswith(
        "batch 1, 2 threads: 0.90x (0.85 to 0.95) at 0.40 points, torch against the whole network on"
    )
    assert "early exits do not pay here, run the whole network" in said
    assert "where 91.7% is enough, small is faster" in said
    assert "where 92.6% is enough, the network cut at exit 1 is faster" in said
    assert "exit 0" not in said
    paying = {**slow, "speedup": 1.5, "speedup_quartiles": [1.4, 1.6], "early_exit_ms": 0.4}
    assert "do not pay" not in verdict({**found, "measured": [paying]})
    level = {**slow, "speedup": 1.0, "speedup_quartiles": [0.97, 1.03]}
    assert "early exits do not pay here" in verdict({**found, "measured": [level]})
    nobody = {**level, "share_early": 0.0}
    assert "the policy always runs the whole network, which alone would do" in verdict({**found, "measured": [nobody]})
    looks = {**nobody, "share_twice": 0.1}
    assert "always runs" not in verdict({**found, "measured": [looks]}), "it looks twice"
    reduced = {
        **paying,
        "backend": "openvino-bf16",
        "speedup": 2.0,
        "accuracy_full": 0.931,
        "accuracy_early_exit": 0.921,
    }
    assert "2.00x (1.40 to 1.60) at 1.00 points, openvino-bf16" in verdict({**found, "measured": [paying, reduced]})


class Sloppy(OnTorch):
    """Answers the first class whatever it is given."""

    def compile(self, step: Any, example: Any) -> Any:
        run = super().compile(step, example)
        if not isinstance(step, Joined):
            return run
        return lambda arrays: [*run(arrays)[:-1], torch.eye(4)[torch.zeros(len(arrays[0]), dtype=torch.int64)]]


def test_every_backend_is_as_accurate_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(name: str, device: torch.device, threads: int) -> OnTorch:
        return Sloppy(device) if name == "onnxruntime" else OnTorch(device)

    monkeypatch.setattr(bench_module, "make_backend", made)
    labels_N, policy = tiny()(rows(32))[-1].argmax(1), Confidence(threshold=0.5)
    found = bench(
        tiny(),
        policy,
        (rows(32), labels_N),
        backends=("torch", "onnxruntime"),
        batch_sizes=(8,),
        threads=(1,),
        blocks=2,
    )
    assert [one["accuracy_full"] for one in found["measured"]] == [1.0, float((labels_N == 0).double().mean())]


def test_backends_that_are_absent_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert backends_module.usual(cpu) == ("torch", "onnxruntime", "openvino")
    monkeypatch.setattr(backends_module, "find_spec", lambda name: None if name == "openvino" else 1)
    assert backends_module.usual(cpu) == ("torch", "onnxruntime")
    assert bench_module._backends((), rows(1)) == ("torch", "onnxruntime")


def test_a_policy_that_asks_nobody_is_the_whole_network() -> None:
    sdn, inputs = tiny(), rows(32)
    data = inputs, torch.zeros(32, dtype=torch.int64)
    found = bench(sdn, Fixed(exit=2), data, backends=("torch",), batch_sizes=(8,), threads=(1,), blocks=2)
    assert found["share_early"] == 0.0
    assert found["measured"][0]["efficiency"] is None
