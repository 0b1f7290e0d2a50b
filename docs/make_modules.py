"""Writes ``docs/modules.md``: every module of the library, what it is for, its public names and its page.

python docs/make_modules.py [FILE]
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
SOURCE = DOCS.parent / "src" / "shallowdeep"
HEAD = """# Modules

Made by `python docs/make_modules.py` from the code: what every module is for, in its own words, and its public names.
Modules whose name leads to a page have one of their own; others are spoken of where they are used.
"""


def main(out: Path) -> None:
    folders: dict[str, list[str]] = {}
    for file in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        public = [f"`{name}`" for name in names if not name.startswith("_")]
        folder = ".".join(("shallowdeep", *file.relative_to(SOURCE).parent.parts))
        page = DOCS / f"{file.stem}.md"
        name = f"[`{file.stem}`]({page.name})" if page.is_file() and folder == "shallowdeep" else f"`{file.stem}`"
        what = " ".join((ast.get_docstring(tree) or "").split("\n\n")[0].split())
        if file.stem != "__init__":
            folders.setdefault(folder, []).append(f"| {name} | {what} | {', '.join(public)} |")
    top = "| module | what it is for | names |\n|---|---|---|\n"
    parts = [f"## {folder}\n\n{top}" + "\n".join(lines) + "\n" for folder, lines in folders.items()]
    out.write_text("\n".join([HEAD, *parts]), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS / "modules.md")
