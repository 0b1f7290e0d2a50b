"""What the pages and docstrings show is what happens."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shallowdeep.cli import main
from torchvision_shim import define_operators

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
TEXTS = {page.relative_to(DOCS): page.read_text(encoding="utf-8") for page in sorted(DOCS.rglob("*.md"))}
PAGES = [str(page) for page, text in TEXTS.items() if ">>> " in text and page.parent.name != "modules"]
EXTRAS = {"tutorials/timm_model.md": "timm", "tutorials/text_classifier.md": "transformers"}
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


def typed(text: str) -> str:
    """A page with its console lines, ``$ sdn ...``, as examples among its others: they must end well."""
    return re.sub(r"^\$ (sdn .*)$", lambda line: f">>> typed({line[1]!r})\n", text, flags=re.M)


def type_(line: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        main(shlex.split(line)[1:])


@pytest.mark.parametrize("page", PAGES)
def test_examples_of_a_page_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if page in EXTRAS:
        define_operators()
        pytest.importorskip(EXTRAS[page])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").symlink_to(ROOT / "results")
    torch.manual_seed(0)
    examples = doctest.DocTestParser().get_doctest(typed(TEXTS[Path(page)]), {"typed": type_}, page, page, 0)
    result = doctest.DocTestRunner().run(examples)
    assert result.attempted > 0
    assert result.failed == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings_run(name: str) -> None:
    torch.manual_seed(0)
    assert doctest.testmod(importlib.import_module(f"shallowdeep.{name}")).failed == 0


def test_the_cli_reference_is_fresh(tmp_path: Path) -> None:
    # In a process of its own: cyclopts names the program after the one that runs.
    made = tmp_path / "made.md"
    subprocess.run([sys.executable, str(DOCS / "make_cli_reference.py"), str(made)], check=True)
    assert (DOCS / "cli_reference.md").read_text() == made.read_text(), "run: python docs/make_cli_reference.py"


def test_the_pages_of_modules_are_fresh(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(DOCS / "make_modules.py"), str(tmp_path)], check=True)
    made = {page.relative_to(tmp_path): page.read_text() for page in tmp_path.rglob("*.md")}
    there = {page: text for page, text in TEXTS.items() if page.parts[0] in ("modules", "modules.md")}
    assert there == made, "run: python docs/make_modules.py"
