"""Architectures nobody here wrote become shallow-deep networks that obey the laws; those that do not say why."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from architectures import ALL, PAGE, Row, study

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks as small as these only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("row", ALL, ids=lambda row: f"{row.library}-{row.name}")
def test_row(row: Row) -> None:
    result = study(row)
    assert row.fails in result.reason
    assert bool(row.fails) == bool(result.reason), result.reason


def test_enough_rows_count() -> None:
    counting = [row for row in ALL if not row.fails]
    assert len(counting) >= 40
    assert len({row.family for row in counting if row.library == "timm"}) >= 25
    assert len({row.family for row in counting if row.library == "transformers"}) >= 12
    assert len({(row.library, row.name) for row in ALL}) == len(ALL)


def test_the_page_tells_the_same() -> None:
    counts, _, rest = PAGE.read_text().partition("## What does not count")
    for row in ALL:
        assert f"| {row.name} | {row.library}: {row.family} |" in (rest if row.fails else counts)
        assert row.fails in rest
