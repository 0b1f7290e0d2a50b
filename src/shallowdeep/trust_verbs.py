"""The work behind the verbs of guarantees, alarms, drift and attacks: files in, a folder of files out.

It refuses to know how choices are typed; that is the command line's. Every function returns what the last line prints.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from shallowdeep.abstention import calibrate_alarm
from shallowdeep.alarming import alarms, fit_alarm
from shallowdeep.files import read_json, write_text
from shallowdeep.policies import from_json
from shallowdeep.runs import plain, write_run
from shallowdeep.types import Trace

TRACE = "trace.safetensors"


def alarms_verb(
    trace_dir: Path,
    policy_dir: Path | None,
    out: Path,
    *,
    against: Path | None = None,
    max_error: float | None = None,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """How well scores find wrong answers, or the rows of another trace: writes ``alarms.json``; and the alarm itself,
    with a threshold where ``max_error`` is given: ``alarm.json``.
    """
    trace = Trace.load(trace_dir / TRACE)
    policy = None if policy_dir is None else from_json(read_json(policy_dir / "policy.json"))
    found = alarms(trace, policy, against=None if against is None else Trace.load(against / TRACE))
    print(found)
    if max_error is None:
        alarm = fit_alarm(trace, policy)
    else:
        alarm = calibrate_alarm(trace, policy, max_error=max_error, confidence=confidence)
        print(alarm.fitted_on.info["note"] if alarm.fitted_on else "")
    facts = dataclasses.asdict(found)
    write_text(out / "alarms.json", json.dumps(plain(facts), indent=1))
    write_text(out / "alarm.json", json.dumps(alarm.to_json()))
    choices = {"trace": trace_dir, "policy": policy_dir, "against": against, "max_error": max_error}
    write_run(out, "alarms", choices | {"confidence": confidence}, facts)
    result = {"verb": "alarms", "out": out, **facts, "threshold": alarm.threshold}
    return dict(plain(result))
