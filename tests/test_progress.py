"""Progress is shown on a terminal, and nowhere else; either way the items come through."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from shallowdeep.progress import steps, waiting


def slowly() -> Iterator[int]:
    for i in range(3):
        time.sleep(0.06)
        yield i


def test_silent_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(steps(iter(range(3)), "collect")) == [0, 1, 2]
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize("total", [None, 3])
def test_a_bar_on_a_terminal(
    total: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert list(steps(slowly(), "collect", total)) == [0, 1, 2]
    captured = capsys.readouterr()
    assert captured.out == "", "the last line of stdout is the result's"
    assert "collect" in captured.err
    assert "/s" in captured.err


def test_errors_come_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise KeyError("broken")

    for force in ("", "1"):
        monkeypatch.setenv("FORCE_COLOR", force)
        with pytest.raises(KeyError, match="broken"):
            list(steps(broken(), "x"))


def test_the_last_line_belongs_to_the_outermost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    for _ in steps(slowly(), "outer"):
        assert list(steps(slowly(), "inner")) == [0, 1, 2]
        with waiting("inner, too"):
            pass
    said = capsys.readouterr().err
    assert "outer" in said
    assert "inner" not in said
    next(steps(slowly(), "left early"))  # whoever leaves early makes room, too
    assert list(steps(slowly(), "afterwards")) == [0, 1, 2]
    assert "afterwards" in capsys.readouterr().err


def test_waiting_is_shown_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with waiting("export"):
        pass
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(KeyError), waiting("export"):
        raise KeyError("through")
    said = capsys.readouterr()
    assert said.out == ""
    assert "export" in said.err
