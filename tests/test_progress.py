"""Progress is shown on a terminal, and nowhere else; either way the items come through."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from shallowdeep.progress import steps


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
