"""A run's state: the last whole one, or none; never another run's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import full_disk
from shallowdeep.checkpoints import Checkpoint, OutOfTime, seconds_of, time_limit
from shallowdeep.files import FormatError

STATE = {"weights": {"a": torch.ones(3)}, "epoch": 2, "losses": [[0.5, 0.25]]}


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "new", {"seed": 0, "cuts": ["a"]})
    assert checkpoint.load() is None
    for epoch in (1, 2):
        checkpoint.save(STATE | {"epoch": epoch})
    found = Checkpoint(tmp_path / "new", {"cuts": ["a"], "seed": 0}).load()
    assert found is not None
    assert (found["epoch"], found["losses"]) == (2, [[0.5, 0.25]])
    assert torch.equal(found["weights"]["a"], torch.ones(3))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["checkpoint.pt"]


def test_a_full_disk_is_said_and_the_earlier_state_stays(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, {})
    checkpoint.save(STATE)
    with full_disk(), pytest.raises(OSError, match=r"checkpoint\.pt could not be written: File too large\.$"):
        checkpoint.save(STATE | {"weights": {"a": torch.zeros(10**5)}})
    found = checkpoint.load()
    assert found is not None
    assert torch.equal(found["weights"]["a"], torch.ones(3))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_without_a_folder_nothing_is_kept() -> None:
    checkpoint = Checkpoint(None, {})
    checkpoint.save(STATE)
    assert checkpoint.load() is None


def test_a_failing_write_leaves_the_old_state(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, {})
    checkpoint.save(STATE)
    with pytest.raises(Exception, match="pickle"):
        checkpoint.save({"epoch": 3, "hook": lambda: None})
    found = checkpoint.load()
    assert found is not None
    assert found["epoch"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_another_run_and_damage_are_refused(tmp_path: Path) -> None:
    Checkpoint(tmp_path, {"seed": 0, "epochs": 5}).save(STATE)
    with pytest.raises(
        FormatError, match=r"checkpoint\.pt belongs to another run: epochs was 5, now 6, seed was 0, now 1"
    ):
        Checkpoint(tmp_path, {"seed": 1, "epochs": 6}).load()
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"nonsense"):
        path.write_bytes(damaged)
        with pytest.raises(FormatError, match=r"checkpoint\.pt is damaged .*; delete it to start again"):
            Checkpoint(tmp_path, {"seed": 0, "epochs": 5}).load()


def test_nothing_that_runs_code_is_read(tmp_path: Path) -> None:
    torch.save({"choices": "{}", "state": {"path": Path("x")}}, tmp_path / "checkpoint.pt")
    with pytest.raises(FormatError, match="UnpicklingError"):
        Checkpoint(tmp_path, {}).load()


def test_time_runs_out_only_after_a_whole_epoch_is_saved(tmp_path: Path) -> None:
    with time_limit(1000):
        Checkpoint(tmp_path, {}).save({"epoch": 1})
    checkpoint = Checkpoint(tmp_path, {})
    with time_limit(1000):
        checkpoint.saved -= 1100  # a long epoch: another one would end too late
        with pytest.raises(OutOfTime, match="run it again"):
            checkpoint.save({"epoch": 2})
    assert checkpoint.load() == {"epoch": 2}
    checkpoint.save({"epoch": 3})  # outside there is no limit
    assert checkpoint.load() == {"epoch": 3}


def test_seconds_add_up_over_slices(tmp_path: Path) -> None:
    assert seconds_of(tmp_path) == 0
    for slice in (1, 2):
        checkpoint = Checkpoint(tmp_path, {})
        checkpoint.load()
        checkpoint.saved -= 10
        checkpoint.save({"epoch": slice})
    assert seconds_of(tmp_path) == pytest.approx(20, abs=2)
