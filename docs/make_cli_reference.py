"""Write ``docs/cli_reference.md`` from the command line itself: ``python docs/make_cli_reference.py``."""

import sys
from pathlib import Path

from shallowdeep.cli import app


def reference() -> str:
    """The page: every verb, its options, choices and defaults."""
    page = app.generate_docs("markdown")
    verbs = page[page.index("\n**") + 1 :]  # behind title and table of contents, which the page has its own of
    note = "Made by `python docs/make_cli_reference.py` from the code; [cli](cli.md) says how verbs join."
    return f"# CLI reference\n\n{note}\n\n{verbs.rstrip()}\n"


if __name__ == "__main__":
    page = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("cli_reference.md")
    page.write_text(reference(), encoding="utf-8")
