"""Files that are either whole or absent: safetensors, JSON and text, written beside their place and renamed.

It refuses to know what is in them, and nothing here or elsewhere reads a pickle.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

UMASK = os.umask(0)
"""What new files are not, for whom, in this process; it can be read by setting it only."""
os.umask(UMASK)


class FormatError(ValueError):
    """A file is damaged, of another kind, or newer than this version understands."""


class NoFile(FormatError, FileNotFoundError):
    """A file that something else should have made is not there; ``filename`` names it."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"No file {path}.")
        self.filename = str(path)

    def __str__(self) -> str:
        return str(self.args[0])


@contextmanager
def replacing(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """Where to write what shall replace ``paths``: renamed together at the end, or, after an error, not at all."""
    partials = tuple(path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial") for path in paths)
    for path in paths:
        if path.exists() and not path.is_file():
            raise OSError(f"{path} is a folder or a device, not a file that could be replaced.")
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partials
        for partial in partials:
            with partial.open("r+b") as file:
                os.fsync(file.fileno())
        for partial, path in zip(partials, paths, strict=True):
            os.replace(partial, path)
    except OSError as error:
        if error.strerror and error.filename is None:  # a write to an open file: the disk is full, and no file is named
            error.filename = str(paths[0])
        raise
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file beside ``path``, then rename: readers see the old file or the whole new one."""
    try:
        with replacing(path) as (partial,):
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial, dict(metadata))
            partial.chmod(0o666 & ~UMASK)  # which the library leaves to the owner alone
    except SafetensorError as error:  # its way to say that the disk is full
        raise OSError(f"{path} could not be written: {error}.") from None


def write_text(path: Path, text: str) -> None:
    """Write a text file beside ``path``, then rename."""
    with replacing(path) as (partial,):
        partial.write_text(text, encoding="utf-8")


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, memory-mapped. Raises ``FormatError`` when it cannot be read."""
    if not path.is_file():
        raise NoFile(path)
    try:
        with safe_open(path, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, dict(opened.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise FormatError(f"{path} is damaged or not a safetensors file: {error}.") from None


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises ``FormatError``."""
    if not path.is_file():
        raise NoFile(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} is damaged or not JSON: {error}.") from None
