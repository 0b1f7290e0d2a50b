"""`sdn alarms`, as a user types it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import oracle
from shallowdeep.cli import main
from shallowdeep.policies import Confidence
from shallowdeep.spelling import to_json
from shallowdeep.trajectory import Alarm
from shallowdeep.types import Trace
from shallowdeep.walking import simulate


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    oracle.bed(2000).save(tmp_path / "trace/trace.safetensors")
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy/policy.json").write_text(json.dumps(to_json(Confidence(threshold=0.95))))
    return tmp_path


def test_it_measures_and_leaves_an_alarm_that_works(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [
        "alarms",
        "--trace",
        str(folder / "trace"),
        "--policy",
        str(folder / "policy"),
        "--out",
        str(folder / "out"),
    ]
    main([*args, "--max-error", "0.02"])
    printed = capsys.readouterr().out.splitlines()
    last = json.loads(printed[-1])
    assert last["scores"]["alarm"]["auroc"] > last["scores"]["max-softmax"]["auroc"]
    assert any(line.startswith("near log-odds") for line in printed)
    assert "at most 2.00% of the answers" in printed[-2]
    alarm = Alarm.from_json(json.loads((folder / "out/alarm.json").read_text()))
    assert alarm.threshold == last["threshold"]
    found = simulate(Confidence(threshold=0.95), Trace.load(folder / "trace/trace.safetensors"), alarm).alarm_N
    assert found is not None
    assert 0.5 < float(alarm.keeps(found).double().mean()) < 1
    assert json.loads((folder / "out/run.json").read_text())["verb"] == "alarms"


def test_other_inputs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = oracle.random_trace(100, exits=5, classes=10, seed=0)
    dataclasses.replace(other, logits_ENC=other.logits_ENC.float()).save(folder / "other/trace.safetensors")
    main(["alarms", "--trace", str(folder / "trace"), "--against", str(folder / "other"), "--out", str(folder / "out")])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["positives"], last["samples"], last["threshold"]) == (100, 2100, None)
    assert (folder / "out/alarm.json").is_file()


def test_a_folder_without_a_trace(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["alarms", "--trace", str(folder / "policy"), "--out", str(folder / "out")])
    assert "No file" in capsys.readouterr().err
    assert not (folder / "out").exists()
