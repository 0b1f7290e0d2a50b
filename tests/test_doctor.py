"""The check-up: what works is found to work, what lies is caught, what is absent comes with what to type."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from shallowdeep import doctor
from shallowdeep.cli import main
from shallowdeep.doctor import Check, Diagnosis, Library, check, libraries, tiny_network
from shallowdeep.runtime.engine import Engine
from shallowdeep.runtime.on_torch import OnTorch

CPU = torch.device("cpu")


def test_what_works_is_found_to_work(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor"])
    said = capsys.readouterr().out
    found = json.loads(said.splitlines()[-1])
    assert found["verb"] == "doctor"
    assert found["failed"] == []
    states = {one["backend"]: one["state"] for one in found["checks"]}
    assert states["torch"] == "works"
    assert states["torch-compile"] == "not tried"
    assert set(states.values()) <= {"works", "absent", "not tried"}
    assert found["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert max(map(len, said.splitlines()[:-1])) <= 80


def test_rows_leave_at_both_exits_or_nothing_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[int]] = []
    simulate = doctor.simulate

    def watched(*words: Any) -> Any:
        outcome = simulate(*words)
        seen.append(set(outcome.exit_N.tolist()))
        return outcome

    monkeypatch.setattr(doctor, "simulate", watched)
    assert check("torch", CPU).state == "works"
    assert seen == [{0, 1}]


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        (lambda answer: dataclasses.replace(answer, exit_B=answer.exit_B.flip(0)), "rows leave elsewhere"),
        (lambda answer: dataclasses.replace(answer, logits_BC=answer.logits_BC + 1e-3), "logits are off by 1.0e-03"),
        (lambda answer: dataclasses.replace(answer, logits_BC=answer.logits_BC * torch.nan), "logits are off by nan"),
    ],
)
def test_an_engine_that_lies_is_caught(monkeypatch: pytest.MonkeyPatch, lie: Any, words: str) -> None:
    answers = Engine.__call__
    monkeypatch.setattr(Engine, "__call__", lambda self, images: lie(answers(self, images)))
    found = check("torch", CPU)
    assert found.state == "fails"
    assert words in found.says


def test_a_backend_that_breaks_is_a_failure_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnTorch, "compile", lambda self, step, example: lambda arrays: 1 / 0)
    found = check("torch", CPU)
    assert found.state == "fails"
    assert "division by zero" in found.says


def test_a_failed_check_is_exit_status_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "check", lambda backend, device: Check(backend=backend, state="fails", says="broken"))
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--compile"])
    assert stop.value.code == 1
    said = capsys.readouterr().out
    assert json.loads(said.splitlines()[-1])["failed"][-1] == "torch-compile"
    assert "torch-compile: broken" in said


def test_what_is_absent_comes_with_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert "apt-get install g++" in check("torch-compile", CPU).says
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    found = check("onnxruntime", CPU)
    assert found.state == "absent"
    assert "pip install 'shallowdeep[export]'" in found.says


@pytest.mark.parametrize(
    ("extra", "installed", "failed"),
    [("", None, ["x"]), ("", "1.0", ["x"]), ("", "2.1", []), ("zoo", None, []), ("zoo", "1.0", ["x"])],
)
def test_versions_that_do_not_fit_fail(extra: str, installed: str | None, failed: list[str]) -> None:
    wanted = Library(extra=extra, name="x", wanted=">=2", installed=installed)
    found = Diagnosis(machine={}, libraries=(wanted,), checks=())
    assert list(found.failed) == failed
    assert ("pip install 'shallowdeep[zoo]'" in str(found)) == (extra == "zoo")
    later = dataclasses.replace(wanted, installed="3.0.0rc1+cpu")
    assert later.fits, "a newer candidate is not refused"


def test_requirements_are_those_of_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "torch>=2",
        'timm>=1; extra == "zoo"',
        'ruff; extra == "dev"',
        'shallowdeep[zoo]; extra == "dev"',
        "none-x",
    ]
    monkeypatch.setattr(doctor, "requires", lambda of: lines)
    found: Mapping[str, Library] = {one.name: one for one in libraries()}
    assert set(found) == {"torch", "timm", "none-x"}
    assert (found["timm"].extra, found["timm"].wanted, found["none-x"].installed) == ("zoo", ">=1", None)


def test_the_callers_randomness_stays() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = tiny_network(CPU)[1]
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one, tiny_network(CPU)[1]), "the same network everywhere"
