"""What a verb leaves behind: one folder with ``run.json`` (choices, versions, device, seed, data) beside its results.

It refuses to know what the verbs do.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from shallowdeep.files import FormatError, read_json, write_text

LIBRARIES = ("shallowdeep", "torch", "numpy", "lightning-fabric", "safetensors")


def write_run(folder: Path, verb: str, choices: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``folder/run.json``; returns what the verb prints last: its name, the folder, the results."""
    about = {
        "verb": verb,
        "choices": plain(choices),
        "results": plain(results),
        "versions": {"python": platform.python_version(), **versions()},
        "device": describe_device(),
    }
    write_text(folder / "run.json", json.dumps(about, indent=1) + "\n")
    return {"verb": verb, "out": str(folder), **about["results"]}


def read_run(folder: Path, verb: str) -> dict[str, Any]:
    """The content of the ``folder/run.json`` that ``verb`` wrote. Raises ``FormatError``."""
    if not (folder / "run.json").is_file():
        raise FormatError(f"No folder of `sdn {verb}` at {folder}: sdn {verb} writes one (sdn {verb} --help).")
    found = read_json(folder / "run.json")
    wrote = found.get("verb") if isinstance(found, dict) else None
    if wrote != verb:
        whose = f"a folder of `sdn {wrote}`" if wrote else "no folder of this library's"
        raise FormatError(f"{folder} is {whose}: give one of `sdn {verb}`.")
    return dict(found)


def inside(path: Path, name: str) -> Path:
    """``path`` itself if it is a file, else the file ``name`` in that folder."""
    return path if path.is_file() else path / name


def versions() -> dict[str, str]:
    """The libraries on which results depend."""
    return {name: version(name) for name in LIBRARIES}


def describe_device() -> str:
    """The machine in words: processor, cores used, accelerator if any."""
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return f"{torch.cuda.get_device_name()}; {cpu}" if torch.cuda.is_available() else cpu


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it: tensors as lists, paths as text, numbers that are not finite as null."""
    if isinstance(value, torch.Tensor):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
