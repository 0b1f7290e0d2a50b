"""A watched engine answers as the engine does, audits a random share, obeys, and its verb reads what verbs wrote."""

from __future__ import annotations

import csv
import dataclasses
import json
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import oracle
import shallowdeep as sd
from shallowdeep.cli import main
from shallowdeep.files import write_text
from shallowdeep.monitor import Monitor
from shallowdeep.policies import Confidence, Fixed
from shallowdeep.reference import refer
from shallowdeep.runtime.engine import Engine
from shallowdeep.spelling import to_json
from shallowdeep.types import Trace
from shallowdeep.walking import simulate
from shallowdeep.watched import Watched
from test_backends import middle, rows, same, tiny

CALM = torch.zeros(2000, dtype=torch.int64)


def watched(share: float = 0.5, **tolerated: float) -> Watched:
    sdn = tiny()
    policy = Confidence(threshold=middle(sdn, rows(200)))
    known = refer(policy, sd.collect(sdn, (rows(2000), CALM)), **tolerated)  # type: ignore[arg-type]
    return Watched(Engine(sdn, policy, backend="torch"), Monitor(known), share=share, seed=0)


def test_the_full_network_runs_with_the_engines_threads() -> None:
    sdn = tiny()
    policy = Confidence(threshold=middle(sdn, rows(200)))
    known = refer(policy, sd.collect(sdn, (rows(200), CALM[:200])))
    engine = Engine(sdn, policy, backend="onnxruntime", threads=torch.get_num_threads() + 1)
    assert Watched(engine, Monitor(known))._full.threads == engine.threads == torch.get_num_threads() + 1


def test_the_engines_answers_and_a_random_share_audited() -> None:
    one, inputs = watched(), rows(300)
    answer, audit = one.audited(inputs)
    same(answer, one.engine(inputs))
    assert 100 < len(audit.row_S) < 200
    assert torch.equal(audit.answered_S, answer.labels_B[audit.row_S])
    assert torch.equal(audit.full_S, tiny()(inputs)[-1].argmax(1)[audit.row_S])
    assert not torch.equal(one.audited(inputs)[1].row_S, audit.row_S), "drawn anew"
    verdict = one.monitor.verdict()
    assert verdict.rows == 600
    assert verdict.disagreement.rows > len(audit.row_S)
    one.monitor.labels(audit, audit.full_S)
    assert one.monitor.verdict().drop.rows == len(audit.row_S)
    assert verdict.action == "keep"


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (1.0, 20)])
def test_nobody_or_everybody(share: float, expected: int) -> None:
    one = watched(share)
    assert len(one.audited(rows(20))[1].row_S) == expected
    assert len(one(rows(0)).labels_B) == 0


def test_when_exits_are_off_the_full_network_answers_until_reset() -> None:
    one, inputs = watched(1.0, max_disagreement=0.001), rows(300)
    early = one(inputs)
    assert int((early.exit_B < 2).sum()) > 0
    assert one.monitor.verdict().action == "switch exits off"
    off, audit = one.audited(inputs)
    assert torch.equal(off.exit_B, torch.full((300,), 2))
    assert torch.equal(off.labels_B, tiny()(inputs)[-1].argmax(1))
    assert len(audit.row_S) == 0
    assert one.monitor.verdict().rows == 300, "the full network's answers are not the policy's"
    one.monitor.reset()
    same(one(inputs), early)


def test_drift_of_real_answers_is_found() -> None:
    one = watched(0.1)
    for _ in range(20):
        one(rows(100) / 4)
    assert one.monitor.verdict().action == "recalibrate"
    assert one.monitor.exits_on


def test_a_reference_of_something_else_is_refused() -> None:
    one, sdn = watched(), tiny()
    with pytest.raises(ValueError, match="exits asked"):
        Watched(Engine(sdn, Fixed(exit=0), backend="torch"), one.monitor)
    raw = dataclasses.replace(sd.collect(sdn, (rows(50), CALM[:50])), confusion_reference=None)
    with pytest.raises(ValueError, match="standardised in these answers and raw in the reference"):
        Watched(one.engine, Monitor(refer(one.engine.policy, raw)))
    with pytest.raises(ValueError, match="from 0 to 1; found 2"):
        Watched(one.engine, one.monitor, share=2)


def test_an_engine_that_looks_twice() -> None:
    torch.manual_seed(3)
    layers = [nn.Conv2d(2, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 6, 3, padding=1), nn.Tanh(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(150, 5)).eval()
    inputs = 3 * torch.randn(600, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    sdn = sd.attach(model, sd.plan(model, inputs[:2], at=(0.5,))).eval()
    trace = sd.collect(sdn, (inputs, CALM[:600]), second_look="mirror")
    bars_E = trace.logits_ENC.softmax(-1).amax(-1).double().median(1).values.tolist()
    policy = Confidence(threshold=tuple(bars_E[:-1]))
    one = Watched(
        Engine(sdn, policy, second_look="mirror", backend="torch"), Monitor(refer(policy, trace)), share=1.0, seed=0
    )
    answer, audit = one.audited(inputs)
    assert set(answer.exit_B.tolist()) == {0, 1, 2}
    with torch.no_grad():
        assert torch.equal(audit.full_S, model(inputs).argmax(1)), "an audit asks the network as it was given"
    verdict = one.monitor.verdict()
    assert [statistic.name for statistic in verdict.statistics][2] == "share of full+mirror"
    assert (verdict.action, verdict.rows) == ("keep", 600)
    plain = Confidence(threshold=bars_E[0])
    with pytest.raises(ValueError, match="exits asked"):
        Watched(Engine(sdn, plain, backend="torch"), one.monitor)


def test_several_threads() -> None:
    one = watched()
    threads = [threading.Thread(target=lambda: [one(rows(10)) for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert one.monitor.verdict().rows == 800


# ---------------------------------------------------------------- the verb


POLICY = Confidence(threshold=0.8)


def folders(root: Path, live: Trace) -> None:
    write_text(root / "runs/calibrate/policy.json", json.dumps(to_json(POLICY)))
    oracle.bed(3000, exits=3, seed=1).save(root / "runs/collect/trace.safetensors")
    live.save(root / "runs/live/trace.safetensors")
    outcome = simulate(POLICY, live)
    (root / "runs/predict").mkdir()
    with (root / "runs/predict/predictions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "label", "class", "exit", "confidence", "confusion", "cost", "valid"])
        columns = outcome.labels_N, outcome.exit_N, outcome.confidence_N, outcome.confusion_N, outcome.cost_N
        for n, (label, exit, sure, odd, cost) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
            writer.writerow([n, label, "", live.exit_names[exit], f"{sure:.6f}", f"{odd:.6f}", f"{cost:.6f}", 1])


def watch(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    main(["watch", *words])
    return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))


def test_the_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    folders(tmp_path, oracle.bed(400, exits=3, seed=2))
    calm = watch(capsys)
    assert (calm["action"], calm["rows"]) == ("keep", 400)
    assert calm["disagreement"]["rows"] == 0  # type: ignore[index]
    audited = watch(capsys, "--live", "runs/live", "--after", "runs/watch")
    assert (audited["action"], audited["rows"]) == ("keep", 800)
    assert audited["disagreement"]["rows"] == audited["drop"]["rows"] == 400  # type: ignore[index]
    live = oracle.bed(400, exits=3, seed=2)
    right = [
        float((said == live.labels_N).double().mean())
        for said in (live.logits_ENC[-1].argmax(1), simulate(POLICY, live).labels_N)
    ]
    assert audited["drop"]["mean"] == pytest.approx(right[0] - right[1])  # type: ignore[index]
    assert right[0] != right[1]
    oracle.bed(2000, exits=3, seed=3, sharp=0.7).save(tmp_path / "runs/new/trace.safetensors")
    drifted = watch(capsys, "--live", "runs/new", "--after", "runs/watch")
    assert drifted["action"] == "recalibrate"
    assert json.loads((tmp_path / "runs/watch/run.json").read_text())["verb"] == "watch"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--live", "nowhere"), "No file nowhere/trace.safetensors"),
        (("--after", "nowhere"), "No file nowhere/monitor.json"),
        (("--alpha", "0"), "between 0 and 1"),
        (("--live", "runs/odd"), "is no file of `sdn predict` with the exits exit0, exit1, full"),
        (("--live", "runs/scaled"), "standardised in these answers and raw in the reference"),
    ],
)
def test_bad_input_is_one_sentence(
    words: tuple[str, ...],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    live = oracle.bed(50, exits=3, seed=2)
    folders(tmp_path, live)
    write_text(tmp_path / "runs/odd/predictions.csv", "exit,confidence,confusion,valid\nnowhere,1,0,1\n")
    scaled = dataclasses.replace(live, confusion_reference=sd.fit_confusion(None, live))
    scaled.save(tmp_path / "runs/scaled/trace.safetensors")
    with pytest.raises(SystemExit):
        main(["watch", *words])
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "runs/watch").exists()
