"""Policies as JSON, ``{"kind": "Patience", ...}``, and back, and in words: one visible table of kinds.

It refuses to know files.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from shallowdeep.certificates import certificate_from_json
from shallowdeep.policies import (
    Accumulated,
    CalibrationRecord,
    Confidence,
    Ensemble,
    Entropy,
    Fixed,
    Margin,
    Oracle,
    Patience,
    PerClass,
    Policy,
    Score,
    Tempered,
)
from shallowdeep.types import table

KINDS: Mapping[str, type[Any]] = {
    kind.__name__: kind
    for kind in (Confidence, Entropy, Margin, PerClass, Score, Accumulated, Patience, Fixed, Oracle, Tempered)
}


def to_json(policy: Policy) -> dict[str, Any]:
    """The policy as JSON-able facts, ``{"kind": "Confidence", ...}``; an infinite threshold is the string "inf".

    >>> to_json(Fixed(exit=2))
    {'kind': 'Fixed', 'exit': 2}
    """
    facts = {name: getattr(policy, name) for name in _fields(type(policy))}
    record = facts.pop("calibrated_on")
    if "policy" in facts:
        facts["policy"] = to_json(facts["policy"])
    if record is not None:
        facts["calibrated_on"] = record_to_json(record)
    return {"kind": type(policy).__name__} | {k: _spelled(v) for k, v in facts.items() if v is not None}


def rule_to_json(policy: Policy) -> dict[str, Any]:
    """The policy's rule alone, without where it comes from: equal for policies that answer alike.

    >>> rule_to_json(Fixed(exit=2, calibrated_on=CalibrationRecord()))
    {'kind': 'Fixed', 'exit': 2}
    """
    return {name: value for name, value in to_json(policy).items() if name != "calibrated_on"}


def from_json(facts: Mapping[str, Any]) -> Policy:
    """The policy that ``to_json`` wrote, exactly. Raises ``ValueError`` on an unknown kind or wrong fields.

    >>> from_json({"kind": "Patience", "patience": 2})
    Patience(enabled_E=None, fallback='last', ensemble=None, patience=2)
    """
    given = dict(facts)
    name = given.pop("kind", None)
    if name not in KINDS:
        raise ValueError(f"No policy of kind {name!r}. Kinds: {', '.join(KINDS)}.")
    fields = _fields(KINDS[name])
    missing = [key for key, f in fields.items() if f.default is dataclasses.MISSING and key not in given]
    if missing or not given.keys() <= fields.keys():
        raise ValueError(f"{name} has the fields {', '.join(fields)}; found {', '.join(given) or 'none'}.")
    if "calibrated_on" in given:
        given["calibrated_on"] = record_from_json(given["calibrated_on"])
    if "ensemble" in given:
        given["ensemble"] = Ensemble(**given["ensemble"])
    if "policy" in given:
        given["policy"] = from_json(given["policy"])
    if "threshold" in given:
        value = given["threshold"]
        given["threshold"] = tuple(map(float, value)) if isinstance(value, list) else float(value)
    policy: Policy = KINDS[name](**given)
    return policy


def in_words(policy: Policy, exit_names: Sequence[str], full_exit: int) -> str:
    """The policy as a person reads it: thresholds of the exits asked, what it was expected to bring, what was proved.

    >>> print(in_words(Confidence(threshold=(0.9, 0.8), enabled_E=(True, False, True)), ("a", "b", "full"), 2))
    Confidence  threshold
    ---------------------
    a              0.9000
    full
    """
    asked = [exit for exit, on in enumerate(policy.asks(len(exit_names), full_exit)) if on]
    bar = to_json(policy).get("threshold", "")
    rows = [(type(policy).__name__, "threshold" if bar else "")]
    for exit in asked:
        one = bar if not isinstance(bar, list) else bar[exit] if exit < len(bar) else ""
        rows.append((exit_names[exit], f"{float(one):.4f}" if one != "" and exit != asked[-1] else ""))
    lines = [table(rows)]
    if policy.ensemble is not None:
        lines.append("Exits passed have a say in the answer.")
    info = policy.calibrated_on.info if policy.calibrated_on is not None else {}
    if "expected_mean_cost" in info:
        drop = f"a drop of {info['expected_drop']:.2%}"
        lines.append(f"Expected of fresh rows: mean cost {info['expected_mean_cost']:.3f}, {drop} ({info['family']}).")
    return "\n".join([*lines, *([str(info["note"])] if "note" in info else [])])


def record_to_json(record: CalibrationRecord) -> dict[str, Any]:
    """The record as JSON-able facts."""
    facts: dict[str, Any] = {"hash_N": list(record.hash_N), "exit_names": list(record.exit_names)}
    facts["info"] = dict(record.info)
    if record.certificate is not None:
        proved = dataclasses.asdict(record.certificate).items()
        facts["certificate"] = {name: _spelled(value) for name, value in proved}
    return facts


def record_from_json(facts: Mapping[str, Any]) -> CalibrationRecord:
    """The record that ``record_to_json`` wrote."""
    proved = facts.get("certificate")
    certificate = None if proved is None else certificate_from_json(proved)
    hash_N, exit_names = tuple(facts["hash_N"]), tuple(facts.get("exit_names", ()))
    return CalibrationRecord(hash_N=hash_N, exit_names=exit_names, info=facts["info"], certificate=certificate)


def _fields(kind: type[Any]) -> dict[str, dataclasses.Field[Any]]:
    return {f.name: f for f in dataclasses.fields(kind)}


def _spelled(value: Any) -> Any:
    """JSON has neither tuples nor infinity."""
    if isinstance(value, Ensemble):
        return {name: _spelled(getattr(value, name)) for name in _fields(Ensemble)}
    if isinstance(value, tuple):
        return [_spelled(entry) for entry in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value
