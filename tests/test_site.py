"""The documentation holds together: every page is in the navigation, every relative link and picture is there."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md"), ROOT / "results" / "README.md"])


def navigation(entry: object) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    else:
        for one in entry.values() if isinstance(entry, dict) else entry:  # type: ignore[attr-defined]
            yield from navigation(one)


def test_every_page_is_in_the_navigation_once() -> None:
    config = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))
    listed = list(navigation(config["project"]["nav"]))
    there = sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))
    assert sorted(listed) == there, "list every page of docs/ in zensical.toml, once"


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target) or page.name == "cli_reference.md":
            continue  # that one is made, with anchors of the site's own making, which the strict build checks
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name} links to {target}"
        assert found.is_relative_to(ROOT)
        if DOCS in page.parents:
            assert found.is_relative_to(DOCS), f"{page.name} links to {target}, which is not part of the site"
        if anchor:
            assert anchor in anchors(found.read_text(encoding="utf-8")), f"{page.name} links to {target}"


def test_every_page_has_one_title() -> None:
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        assert len(re.findall(r"^# ", text, flags=re.M)) == 1, page


def test_no_table_is_cut_in_two() -> None:
    for page in PAGES:
        lines = page.read_text(encoding="utf-8").splitlines()
        for before, row, after in zip(lines, lines[1:], lines[2:], strict=False):
            starts = row.startswith("| ") and not before.startswith("|")
            assert not starts or after.startswith("|--"), f"{page.name}: {row[:60]} belongs to no table"


def test_every_axis_is_in_the_glossary() -> None:
    glossary = (DOCS / "glossary.md").read_text(encoding="utf-8")
    legend = set(re.findall(r"^\| .*", glossary[glossary.index("## Axes") :], flags=re.M))
    known = {letter for line in legend for letter in re.findall(r"`([A-Z])`", line)}
    found: dict[str, str] = {}
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = node.id if isinstance(node, ast.Name) else node.arg if isinstance(node, ast.arg) else ""
            carried = re.fullmatch(r"[a-z]\w*_([A-Z0-9]+)", name)
            found |= dict.fromkeys(carried[1], f"{name} in {path.name}") if carried else {}
    unknown = {letter: name for letter, name in found.items() if letter.isalpha() and letter not in known}
    assert not unknown, "say in docs/glossary.md what these letters count"
    assert known <= found.keys(), "letters that nothing carries"


def test_the_readme_shows_the_committed_table() -> None:
    table = (ROOT / "results" / "demo-cifar10" / "table.txt").read_text(encoding="utf-8").strip()
    assert table in (ROOT / "README.md").read_text(encoding="utf-8")
