"""Write ``docs/cli_reference.md`` from the command line itself: ``python docs/make_cli_reference.py``."""

from pathlib import Path

from shallowdeep.cli import app

PAGE = Path(__file__).with_name("cli_reference.md")


def reference() -> str:
    """The page: every verb, its options, choices and defaults."""
    page = app.generate_docs("markdown", usage_name="sdn")
    verbs = page[page.index("**Commands**") :]
    note = "Made by `python docs/make_cli_reference.py` from the code; [cli](cli.md) says how verbs join."
    return f"# CLI reference\n\n{note}\n\n{verbs.rstrip()}\n"


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
