"""What the pages and docstrings show is what happens."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = sorted(page.stem for page in DOCS.glob("*.md") if ">>> " in page.read_text(encoding="utf-8"))
MODULES = (
    "cuts",
    "network",
    "rates",
    "augment",
    "collection",
    "inputs",
    "types",
    "costs",
    "taps",
    "graph",
    "features",
    "spelling",
)


@pytest.mark.parametrize("page", PAGES)
def test_examples_of_a_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    result = doctest.testfile(str(DOCS / f"{page}.md"), module_relative=False)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings_run(name: str) -> None:
    torch.manual_seed(0)
    assert doctest.testmod(importlib.import_module(f"shallowdeep.{name}")).failed == 0
