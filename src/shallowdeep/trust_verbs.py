"""The work behind the verbs of guarantees, alarms, drift and attacks: files in, a folder of files out.

It refuses to know how choices are typed; that is the command line's. Every function returns what the last line prints.
"""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import torch

from shallowdeep.audits import Audit
from shallowdeep.files import FormatError, read_json
from shallowdeep.monitor import Monitor
from shallowdeep.policies import from_json
from shallowdeep.reference import Reference, SeenRows, refer, seen_in
from shallowdeep.runs import plain, write_run
from shallowdeep.types import Trace
from shallowdeep.walking import simulate

Result = dict[str, Any]


# ---------------------------------------------------------------- drift


def watch_verb(
    policy_dir: Path,
    trace_dir: Path,
    live_dir: Path,
    out: Path,
    *,
    after: Path | None = None,
    alpha: float = 0.05,
    max_accuracy_drop: float = 0.01,
    max_disagreement: float | None = None,
    slack: float = 0.0,
) -> Result:
    """Whether the answers in ``live_dir`` still look like the reference's: writes ``monitor.json``, for the next call.

    A live trace holds full answers and labels, too: all its rows are audited.
    """
    policy = from_json(read_json(policy_dir / "policy.json"))
    choices: Result = {"policy": policy_dir, "trace": trace_dir, "live": live_dir, "after": after}
    if after is not None:
        monitor = Monitor.load(after / "monitor.json")
    else:
        tolerated = {"alpha": alpha, "max_accuracy_drop": max_accuracy_drop, "slack": slack}
        choices |= {**tolerated, "max_disagreement": max_disagreement}
        trace = Trace.load(trace_dir / "trace.safetensors")
        monitor = Monitor(refer(policy, trace, max_disagreement=max_disagreement, **tolerated))
    if (live_dir / "predictions.csv").is_file():
        monitor.see(read_predictions(live_dir / "predictions.csv", monitor.reference))
    else:
        live = Trace.load(live_dir / "trace.safetensors")
        asked = policy.asks(live.num_exits, live.full_exit)
        monitor.reference.check(asked, live.confusion_reference is not None)
        outcome, full_N = simulate(policy, live), live.logits_ENC[live.full_exit].argmax(1)
        audit = Audit(row_S=torch.arange(live.num_samples), answered_S=outcome.labels_N, full_S=full_N)
        monitor.see(seen_in(outcome))
        monitor.audit(audit)
        monitor.labels(audit, live.labels_N)
    verdict = monitor.verdict()
    print(verdict)
    monitor.save(out / "monitor.json")
    result = dataclasses.asdict(verdict)
    write_run(out, "watch", choices, result)
    return dict(plain({"verb": "watch", "out": out, **result}))


def read_predictions(path: Path, reference: Reference) -> SeenRows:
    """The answers in a file of ``sdn predict``. Raises ``FormatError``."""
    place = {name: exit for exit, name in enumerate(reference.exit_names)}
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    try:
        return SeenRows(
            exit_B=torch.tensor([place[line["exit"]] for line in lines], dtype=torch.int64),
            confidence_B=torch.tensor([float(line["confidence"]) for line in lines], dtype=torch.float64),
            confusion_B=torch.tensor([float(line["confusion"]) for line in lines], dtype=torch.float64),
            valid_B=torch.tensor([line["valid"] == "1" for line in lines], dtype=torch.bool),
        )
    except (KeyError, TypeError, ValueError) as error:
        known = ", ".join(place)
        raise FormatError(f"{path} is no file of `sdn predict` with the exits {known}: {error!r}.") from None
