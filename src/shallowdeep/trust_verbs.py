"""The work behind the verbs of guarantees, alarms, drift and attacks: files in, a folder of files out.

It refuses to know how choices are typed; that is the command line's. Every function returns what the last line prints.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from shallowdeep.abstention import calibrate_alarm
from shallowdeep.alarming import alarms, fit_alarm
from shallowdeep.attack_study import StudyChoices, attack_study, write_study
from shallowdeep.attacks import Attack, Pixels
from shallowdeep.audits import Audit
from shallowdeep.comparison import Comparison, compare
from shallowdeep.data import Dataset, halves, spread
from shallowdeep.files import FormatError, write_text
from shallowdeep.monitor import Monitor
from shallowdeep.paper.figures import line_figure, save_figure
from shallowdeep.proof import prove
from shallowdeep.reference import Reference, SeenRows, refer, seen_in
from shallowdeep.reliability import temper
from shallowdeep.runs import inside, plain, read_run, write_run
from shallowdeep.tuning import MachineCosts
from shallowdeep.types import DataError, MissingExtra
from shallowdeep.verbs import DataChoice, load_sdn, policy_for, read_policy, read_trace, ready
from shallowdeep.walking import simulate

Result = dict[str, Any]


def attack_verb(
    sdn_dir: Path,
    data: DataChoice,
    out: Path,
    *,
    attack: Attack,
    rows: int,
    max_accuracy_drop: float,
    second_look: str | None,
    training: DataChoice | None,
    seed: int,
    device: str,
) -> dict[str, Any]:
    """What a slowdown attack does and what defences make of it: writes ``attack.json`` and ``table.txt``.

    One fixed half of the rows chooses thresholds, ``rows`` rows of the other half are attacked.
    """
    sdn, preprocessing = load_sdn(sdn_dir, device)
    own = data.read(sdn.class_names)
    others = None if training is None else training.read(sdn.class_names)

    def pair(rows: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = ready(rows, preprocessing)
        if not isinstance(inputs, torch.Tensor):
            raise DataError(f"An attack moves one tensor of images; the rows of {rows.source} are {type(inputs)}.")
        return inputs, rows.labels_N

    half, other = halves(len(own))
    choices = StudyChoices(
        attack=attack,
        pixels=Pixels() if preprocessing is None else Pixels.of(preprocessing),
        max_accuracy_drop=max_accuracy_drop,
        second_look=second_look,
        seed=seed,
    )
    found = dict[str, Any]()
    for found in attack_study(
        sdn,
        out,
        choices,
        calibration=pair(own.rows(half)),
        reported=pair(own.rows(other[spread(len(other), rows)])),
        training=None if others is None else pair(others),
    ):
        text = write_study(out, found)
    print(text)
    about = {"sdn": sdn_dir, "data": data.__dict__, "data_fingerprint": own.fingerprint, "rows": rows, "device": device}
    about |= {"training": training and training.__dict__, "choices": plain(choices.__dict__)}
    write_run(out, "attack", about, found)
    brief = {kind: found["undefended"]["found"][kind] for kind in ("clean", "slowdown")}
    return dict(plain({"verb": "attack", "out": out, **brief}))


def reliability_verb(trace_dir: Path, out: Path) -> Result:
    """ECE, Brier and likelihood of every exit before and after temperatures: writes ``reliability.json``."""
    found = temper(read_trace(trace_dir))
    print(found)
    write_text(out / "reliability.json", json.dumps(plain(dataclasses.asdict(found)), indent=1) + "\n")
    result = {"exits": found.before.exit_names, "temperature": found.temperature_E}
    result |= {"ece_before": found.before.ece_E, "ece_after": found.after.ece_E}
    return write_run(out, "reliability", {"trace": trace_dir}, result)


def compare_verb(
    trace_dir: Path, out: Path, *, max_accuracy_drops: Sequence[float], splits: int, tuned: Path | None = None
) -> Result:
    """Every policy on one accuracy-cost plane: writes ``compare.json`` and, with the extra ``report``, a figure."""
    clock = None if tuned is None else _clock(tuned)
    found = compare(read_trace(trace_dir), max_accuracy_drops=max_accuracy_drops, splits=splits, clock=clock)
    print(found)
    write_text(out / "compare.json", json.dumps(plain(dataclasses.asdict(found)), indent=1) + "\n")
    (out / "compare_ms.svg").unlink(missing_ok=True)  # of an earlier run
    try:
        save_figure(_plane(found, "cost"), out / "compare.svg")
        if clock is not None:
            save_figure(_plane(found, "ms"), out / "compare_ms.svg")
    except MissingExtra as missing:
        print(missing)
    levels: dict[str, Result] = {}
    for one in found.differences:
        levels.setdefault(f"{one.what} at {one.drop:g}", {})[one.name] = one.level
    choices = {"trace": trace_dir, "max_accuracy_drops": max_accuracy_drops, "splits": splits, "tuned": tuned}
    return write_run(out, "compare", choices, {"default": found.default, **levels, "verdict": found.verdict()})


def _plane(found: Comparison, what: Literal["cost", "ms"]) -> Any:
    """The figure: accuracy of every line against what it pays, on rows that did not choose."""
    axis = {"cost": "mean cost (full network = 1)", "ms": "milliseconds per row"}[what]
    rows = [
        {"paid": paid, "accuracy": found.full_accuracy - drop, "what": line.name}
        for line in found.lines
        for paid, drop in zip(getattr(line, f"{what}_A").tolist(), line.drop_A.tolist(), strict=True)
    ]
    return line_figure(rows, "paid:Q", axis, "accuracy:Q", "accuracy", f"{len(found.lines)} lines of policies")


def _clock(tuned: Path) -> MachineCosts:
    """The milliseconds that ``sdn tune`` measured. Raises ``FormatError`` for another folder."""
    facts = read_run(tuned, "tune")["results"]
    try:
        reach_E, own_E = (torch.tensor(facts[name], dtype=torch.float64) for name in ("reach_ms", "own_ms"))
        about = {name: facts[name] for name in ("backend", "batch_size", "full_ms")}
    except KeyError as missing:
        raise FormatError(f"{tuned}/run.json holds no {missing}: it is not a folder of `sdn tune`.") from None
    return MachineCosts(**about, reach_ms_E=reach_E, own_ms_E=own_E)


def watch_verb(
    policy_dir: Path,
    trace_dir: Path,
    live_dir: Path,
    out: Path,
    *,
    after: Path | None,
    alpha: float,
    max_accuracy_drop: float,
    max_disagreement: float | None,
    slack: float,
) -> Result:
    """Whether the answers in ``live_dir`` still look like the reference's: writes ``monitor.json``, for the next call.

    A live trace holds full answers and labels, too: all its rows are audited.
    """
    choices: Result = {"policy": policy_dir, "trace": trace_dir, "live": live_dir, "after": after}
    if after is not None:
        policy = read_policy(policy_dir)
        monitor = Monitor.load(after / "monitor.json")
    else:
        tolerated = {"alpha": alpha, "max_accuracy_drop": max_accuracy_drop, "slack": slack}
        choices |= {**tolerated, "max_disagreement": max_disagreement}
        trace = read_trace(trace_dir)
        policy = policy_for(trace, policy_dir)
        monitor = Monitor(refer(policy, trace, max_disagreement=max_disagreement, **tolerated))
    if (live_dir / "predictions.csv").is_file():
        monitor.see(read_predictions(live_dir / "predictions.csv", monitor.reference))
    else:
        live = read_trace(live_dir)
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
    return write_run(out, "watch", choices, dataclasses.asdict(verdict))


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


def prove_verb(trace: Path, out: Path, *, draws: int, processes: int, minutes: float) -> dict[str, Any]:
    """How often certificates from draws of a trace are wrong: writes ``proof.json``; resumes by itself."""
    found = prove(inside(trace, "trace.safetensors"), out, draws=draws, processes=processes, minutes=minutes)
    print(found["verdict"])
    choices = {"trace": trace, "draws": draws, "processes": processes, "minutes": minutes}
    write_run(out, "prove-guarantee", choices, found)
    broken = sum(not cell["holds"] for one in found["populations"].values() for cell in one["cells"])
    last = found["verdict"].rpartition("\n")[2]
    return dict(plain({"verb": "prove-guarantee", "out": out, "broken": broken, "verdict": last}))


def alarms_verb(
    trace_dir: Path,
    policy_dir: Path | None,
    out: Path,
    *,
    against: Path | None,
    max_error: float | None,
    confidence: float,
) -> dict[str, Any]:
    """How well scores find wrong answers, or the rows of another trace: writes ``alarms.json``; and the alarm itself,
    with a threshold where ``max_error`` is given: ``alarm.json``.
    """
    trace = read_trace(trace_dir)
    policy = policy_for(trace, policy_dir) if policy_dir else None
    others = None if against is None else read_trace(against)
    alarm = (
        fit_alarm(trace, policy)
        if max_error is None
        else calibrate_alarm(trace, policy, max_error=max_error, confidence=confidence)
    )
    found = alarms(trace, policy, against=others)
    print(found)
    if max_error is not None and alarm.fitted_on is not None:
        print(alarm.fitted_on.info["note"])
    facts = dataclasses.asdict(found)
    write_text(out / "alarms.json", json.dumps(plain(facts), indent=1))
    write_text(out / "alarm.json", json.dumps(alarm.to_json()))
    choices = {"trace": trace_dir, "policy": policy_dir, "against": against, "max_error": max_error}
    return write_run(out, "alarms", choices | {"confidence": confidence}, facts | {"threshold": alarm.threshold})
