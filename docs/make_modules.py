"""Writes ``docs/modules.md``, every module of the library and what it is for, and a page in ``docs/modules`` for each
that has none written by hand.

python docs/make_modules.py [FOLDER]
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
SOURCE = DOCS.parent / "src" / "shallowdeep"
PACKAGES = {"paper": "paper.md", "report": "report.md", "runtime": "engine.md"}
NOTE = "Made by `python docs/make_modules.py` from the code"
HEAD = f"# Modules\n\n{NOTE}: what every module is for, in its own words, and its public names.\n"


def main(out: Path) -> None:
    folders: dict[str, list[str]] = {}
    (out / "modules").mkdir(exist_ok=True)
    for file in sorted(SOURCE.rglob("*.py")):
        if file.stem == "__init__":
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        kept = ast.FunctionDef | ast.ClassDef
        public = [node for node in tree.body if isinstance(node, kept) and not node.name.startswith("_")]
        package = file.relative_to(SOURCE).parent.parts
        page = PACKAGES[package[0]] if package else f"{file.stem}.md"
        if not (DOCS / page).is_file():
            page = f"modules/{file.stem}.md"
            (out / page).write_text(written(file.stem, tree, public), encoding="utf-8")
        what = " ".join((ast.get_docstring(tree) or "").split("\n\n")[0].split())
        names = ", ".join(f"`{node.name}`" for node in public)
        folders.setdefault(".".join(("shallowdeep", *package)), []).append(
            f"| [`{file.stem}`]({page}) | {what} | {names} |"
        )
    top = "| module | what it is for | names |\n|---|---|---|\n"
    parts = [f"## {folder}\n\n{top}" + "\n".join(lines) + "\n" for folder, lines in folders.items()]
    (out / "modules.md").write_text("\n".join([HEAD, *parts]), encoding="utf-8")


def written(name: str, tree: ast.Module, public: list[ast.FunctionDef | ast.ClassDef]) -> str:
    """The page of one module: its docstrings, as they are."""
    parts = [f"# {name}\n\n{NOTE}; [every module](../modules.md).\n\n{ast.get_docstring(tree)}\n"]
    for node in public:
        said = (ast.get_docstring(node) or "").replace("\n    ", "\n")
        call = f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef) else ""
        parts.append(f"## {node.name}\n\n```text\n{node.name}{call}\n\n{said}".rstrip() + "\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS)
