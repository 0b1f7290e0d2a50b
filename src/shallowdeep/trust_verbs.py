"""The work behind the verbs of guarantees, alarms, drift and attacks: files in, a folder of files out.

It refuses to know how choices are typed; that is the command line's. Every function returns what the last line prints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shallowdeep.proof import prove
from shallowdeep.runs import plain, write_run


def prove_verb(trace: Path, out: Path, *, draws: int, processes: int, minutes: float) -> dict[str, Any]:
    """How often certificates from draws of a trace are wrong: writes ``proof.json``; resumes by itself."""
    file = trace / "trace.safetensors" if trace.is_dir() else trace
    found = prove(file, out, draws=draws, processes=processes, minutes=minutes)
    print(found["verdict"])
    choices = {"trace": trace, "draws": draws, "processes": processes, "minutes": minutes}
    write_run(out, "prove-guarantee", choices, found)
    broken = sum(not cell["holds"] for one in found["populations"].values() for cell in one["cells"])
    last = found["verdict"].rpartition("\n")[2]
    return dict(plain({"verb": "prove-guarantee", "out": out, "broken": broken, "verdict": last}))
