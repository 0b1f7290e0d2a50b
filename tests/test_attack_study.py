"""The whole study on a small network; what was made is not made again; the verb as a user types it."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest

import test_cli
from shallowdeep import attack_study as module
from shallowdeep.attack_study import StudyChoices, attack_study, write_study
from shallowdeep.attacks import Attack
from shallowdeep.cli import main
from shallowdeep.network import fingerprint
from victim import PIXELS, pictures, victim

CHOICES = StudyChoices(
    attack=Attack(eps=0.06, steps=4, step_size=0.03),
    hardening=Attack(eps=0.06, steps=1, step_size=0.06),
    pixels=PIXELS,
    universal_steps=4,
    max_accuracy_drop=0.02,
    second_look="mirror",
)


def study(out: Path, choices: StudyChoices = CHOICES) -> dict[str, object]:
    rows = pictures(120, seed=2)
    known, others = pictures(300, seed=3), pictures(40, seed=4)
    *parts, found = attack_study(victim(), out, choices, calibration=known, reported=rows, training=others)
    assert [len(part) for part in parts] == [5, 6], "what is known is told before the next part begins"
    return found


def test_a_study_measures_every_defence_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PART", 50)
    before = fingerprint(victim())
    found = study(tmp_path)
    assert fingerprint(victim()) == before
    undefended = found["undefended"]["found"]  # type: ignore[index]
    assert undefended["slowdown"]["mean_cost"] > undefended["noise"]["mean_cost"] > 0
    limits = found["limits"]
    assert isinstance(limits, list)
    for line in limits:
        assert line["greatest_cost"] <= line["value"] + 1e-9 or line["limit"].startswith("window")
        assert line["greatest_window"] is None or line["greatest_window"] <= line["value"] + 1e-9
    assert {line["rows"] for line in limits} == {"clean", "slowdown"}
    assert "hardened, thresholds chosen anew" in found
    twice = found["second look"]
    kinds = twice["undefended"]["found"]  # type: ignore[index]
    assert list(kinds) == ["clean", "noise", "universal", "slowdown", "slowdown, full exit too"]
    assert kinds["slowdown"]["mean_cost"] >= kinds["clean"]["mean_cost"]
    assert len(kinds["clean"]["share_E"]) == victim().num_exits + 1
    assert {line["rows"] for line in twice["limits"]} == {"clean", "slowdown, full exit too"}  # type: ignore[index]
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(files) == 3 * 3 + 2, "120 rows in parts of 50, thrice; the universal one; hardened exits"
    lost = next(path for path in files if path.name == "slowdown-50.safetensors")
    lost.unlink()
    again = study(tmp_path)
    assert {name: again[name] for name in again if name != "processor_seconds"} == {
        name: found[name] for name in found if name != "processor_seconds"
    }
    assert {path for path in files if path.stat().st_mtime_ns != files[path]} == {lost}
    text = write_study(tmp_path, copy.deepcopy(again))
    assert json.loads((tmp_path / "attack.json").read_text())["limits"] == limits
    assert (tmp_path / "table.txt").read_text() == text + "\n"


def test_the_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(test_cli.__file__).parent))
    draw = np.random.default_rng(0)
    for name in ("photos.npz", "others.npz"):
        labels = np.arange(160) % 3
        images = draw.integers(0, 120, (160, 12, 12, 3), dtype=np.uint8)
        images[np.arange(160), :, :, labels] += 80
        np.savez(name, images=images, labels=labels, class_names=np.array(["red", "green", "blue"]))
    main(["plan", "test_cli:tiny", "photos.npz", "--at", "0.3", "0.6"])
    main(["train", "others.npz", "--epochs", "2"])
    capsys.readouterr()
    words = ["--attacked", "20", "--steps", "2", "--max-accuracy-drop", "0.3", "--second-look", "mirror"]
    main(["attack", "slowdown", "photos.npz", *words])
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert last["verb"] == "attack"
    assert 0 < last["clean"]["mean_cost"] < 1.2
    run = json.loads(Path("runs/attack/run.json").read_text())
    assert run["choices"]["rows"] == 20
    assert "slowdown, full exit too" in Path("runs/attack/table.txt").read_text()
    with pytest.raises(SystemExit):
        main(["attack", "slowdown", "photos.npz", "--eps", "-1"])
    assert "eps >= 0" in capsys.readouterr().err
