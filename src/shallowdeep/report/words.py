"""The sentences of the page, computed from the numbers: a summary, and what to conclude from every picture.

It refuses to draw, and says nothing that a number does not say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from shallowdeep.policies import OVERLAP, Confidence, Fixed, Policy
from shallowdeep.report.facts import Facts
from shallowdeep.report.numbers import Row

Part = tuple[str, str]
"""A piece of a sentence and the name under which the page's script keeps it up to date ("" for fixed words)."""


def percent(share: float, digits: int = 1) -> str:
    """A share as people read it.

    >>> percent(0.4812, 0), percent(float("nan"))
    ('48\\u202f%', 'none')
    """
    return f"{100 * share:.{digits}f}\u202f%" if math.isfinite(share) else "none"


def saved(cost: float) -> str:
    """What a mean cost saves or adds."""
    share = round(100 * (1 - cost))
    if share == 0:
        return "neither save nor add compute"
    return f"save {share}\u202f% of the compute" if share > 0 else f"add {-share}\u202f% to the compute"


def points(drop: float, doubt: float) -> str:
    """What a drop of accuracy takes or gives, in points, with half the width of its 95 % interval.

    >>> points(0.012, 0.003), points(0.0, 0.003)
    ('for 1.2 ± 0.3 points of accuracy', 'at the same accuracy (± 0.3 points)')
    """
    value, give = round(100 * drop, 1), f"± {100 * doubt:.1f}"
    if value == 0:
        return f"at the same accuracy ({give} points)"
    return f"{'for' if value > 0 else 'and gain'} {abs(value):.1f} {give} points of accuracy"


def summary(facts: Facts) -> list[Part]:
    """The page in one breath; parts with a name follow the slider."""
    found, how = facts.evaluation, facts.overthinking
    parts = [("Exits ", ""), (saved(found.mean_cost), "saved")]
    if facts.bench is not None:
        best = _best(facts.bench)
        words = f" ({best['speedup']:.1f}x in time, measured with batches of {best['batch_size']})"
        parts.append((words, "time"))
    parts += [(" ", ""), (points(found.drop, facts.doubt), "points")]
    if how.accuracy_E[-1] < 1:
        parts.append((f"; {percent(how.destructive_of_errors, 0)} of the full network's errors were right earlier", ""))
    finding = facts.finding
    if math.isfinite(finding.msp_auroc):
        alarms = f"; confusion finds errors with AUROC {finding.confusion_auroc:.2f}, "
        parts.append((f"{alarms}confidence alone with {finding.msp_auroc:.2f}", ""))
    return [*parts, (".", "")]


def rows_said(facts: Facts) -> str:
    """Which rows the page speaks of, and how honest that is."""
    rows = f"{facts.trace.num_samples:,} rows"
    if (part := facts.trace.trained_share) > OVERLAP:
        return f"{rows}, {percent(part)} of which the ICs were trained on: every figure flatters them."
    if facts.chosen_here and not isinstance(facts.policy, Fixed):
        return f"{rows} that the thresholds have not seen: they were chosen here, on the other half of the trace."
    if facts.seen:
        return f"{rows}, nearly all of which the thresholds were chosen on: the policy's figures flatter it."
    record = facts.policy.calibrated_on
    if record is not None and record.hash_N and facts.trace.hash_N is not None:
        return f"{rows} that the thresholds have not seen."
    return f"{rows}. Whether the thresholds have seen them is not recorded."


def rule(facts: Facts) -> str:
    """The policy in words."""
    policy = facts.policy
    if isinstance(policy, Fixed):
        return f"everything stops at {_called(facts.labels[policy.exit]).lower()}"
    together = ", exits passed have a say in the answer" if policy.ensemble is not None else ""
    if isinstance(policy, Confidence) and isinstance(policy.threshold, float):
        return f"stop where the confidence reaches {percent(policy.threshold, 2)}{together}"
    record = policy.calibrated_on
    family = record.info.get("family") if record is not None else None
    return ", ".join(part for part in (type(policy).__name__.lower(), family) if part) + together


def record_title(policy: Policy) -> str:
    """What the policy's record is: only one that proves something is called a certificate."""
    record = policy.calibrated_on
    return "The certificate" if record is not None and record.certificate is not None else "The policy's record"


def certificate(policy: Policy) -> list[tuple[str, str]]:
    """What the policy's record promises, as names and values; empty without one."""
    if policy.calibrated_on is None:
        return []
    facts = policy.calibrated_on.info.items()
    return [
        (str(name).replace("_", " "), _shown(value)) for name, value in facts if not isinstance(value, Mapping)
    ]  # what the page says in words is not said in JSON, too


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    # What to type for a bound is said to who calibrates, not to who looks at the page.
    return str(value).replace("; give confidence= for a bound", "")


def _best(bench: Mapping[str, Any]) -> Mapping[str, Any]:
    fastest: Mapping[str, Any] = max(bench["measured"], key=lambda one: one["speedup"])
    return fastest


# ---------------------------------------------------------------- what to conclude from each picture


def on_exits(facts: Facts, rows: Sequence[Row]) -> str:
    """Accuracy and cost per exit."""
    full = facts.trace.full_exit
    end = rows[full]
    if full == 0:
        return f"There is one exit, the network itself: {percent(end['accuracy'])}."
    near = next(row for row in rows if row["accuracy"] >= end["accuracy"] - 0.05)
    words = f"{_called(near['exit'])} is the first within five points of the full network's {percent(end['accuracy'])}"
    words += f", at {percent(near['cost'], 0)} of its compute. "
    extra = end["cost"] - 1
    return words + f"A row that passes every internal classifier pays {percent(extra)} more than the plain network."


def on_tradeoff(facts: Facts) -> str:
    """The accuracy-cost curve and the chosen policy."""
    found = facts.evaluation
    words = f"The policy ({rule(facts)}) costs {percent(found.mean_cost, 0)} of the network and is right about "
    words += f"{percent(found.accuracy_early_exit)}; the full network about {percent(found.accuracy_full)}. "
    drop = f"{100 * found.drop:.2f}".replace("-", "−")
    words += f"The drop is {drop} points, give or take {100 * facts.doubt:.2f} (95 %); "
    words += f"{percent(found.harm, 2)} of the rows are right at the end and wrong where they stop. "
    record = facts.policy.calibrated_on
    note = record.info.get("note") if record is not None else None
    return f"{words}Its record says: {_shown(note)}" if note else f"{words}The policy carries no certificate."


def on_flow(facts: Facts, rows: Sequence[Row]) -> str:
    """Where rows leave."""
    most = max(rows, key=lambda row: row["right"] + row["wrong"])
    end = rows[facts.trace.full_exit]
    early = 1 - end["arrive"]
    words = (
        f"{percent(early, 0)} of the rows never reach the full network; most leave at {_called(most['exit']).lower()}. "
    )
    leaving = [row for row in rows if row["accuracy"] is not None]
    worst = min(leaving, key=lambda row: row["accuracy"])
    words += f"The answers given at {_called(worst['exit']).lower()} are the least reliable: "
    return f"{words}{percent(worst['accuracy'])} right."


def on_overthinking(facts: Facts) -> str:
    """Wasteful and destructive, per exit."""
    how = facts.overthinking
    words = f"{percent(how.wasteful, 0)} of the rows are right at some exit before the end: what follows is wasted. "
    words += f"{percent(how.destructive)} are right earlier and wrong at the end; "
    words += f"without what guessing would get right, {percent(how.destructive_corrected)}. "
    return words + f"Stopping always at the first right exit would cost {percent(how.oracle_cost, 0)} of the network."


def on_classes(rows: Sequence[Row], shown: int) -> str:
    """Destructive overthinking per class."""
    worst = max(rows, key=lambda row: row["destructive"])
    kept = f" The {shown} classes with the largest share of {len(rows)} are drawn." if shown < len(rows) else ""
    if worst["destructive"] == 0:
        return f"No class loses answers that an earlier exit had right.{kept}"
    words = f"Thinking on harms “{worst['class']}” most: {percent(worst['destructive'])} of its rows were right "
    words += "earlier, "
    return f"{words}of {percent(worst['errors'])} that the full network gets wrong.{kept}"


def on_confusion(facts: Facts) -> str:
    """Confusion of right and of wrong answers."""
    finding = facts.finding
    if not math.isfinite(finding.confusion_auroc):
        return "All answers are alike, right or wrong: there is nothing to tell apart."
    better = "better" if finding.confusion_auroc > finding.msp_auroc else "less well"
    words = "The further the exits are from the full network's answer, the more likely it is wrong: confusion finds "
    words += f"errors with AUROC {finding.confusion_auroc:.3f}, {better} than the network's own confidence "
    return f"{words}({finding.msp_auroc:.3f})."


def on_risks(rows: Sequence[Row]) -> str:
    """Risk against coverage."""
    curves = list(dict.fromkeys(row["what"] for row in rows))

    def at(what: str, coverage: float) -> float:
        mine = [row for row in rows if row["what"] == what]
        return float(min(mine, key=lambda row: abs(row["coverage"] - coverage))["risk"])

    words = (
        f"Declining the least sure fifth of the rows takes the full network's errors from {percent(at(curves[0], 1))}"
    )
    words += f" to {percent(at(curves[0], 0.8))} by confidence and to {percent(at(curves[1], 0.8))} by confusion; "
    words += f"all answers' under the chosen policy from {percent(at(curves[2], 1))}"
    return f"{words} to {percent(at(curves[2], 0.8))}."


def on_reliability(facts: Facts, rows: Sequence[Row]) -> str:
    """Reliability per exit."""
    worst = max(rows, key=lambda row: row["ece"])
    gap = worst["sure"] - worst["accuracy"]
    words = f"{_called(worst['exit'])} is furthest from honest: it claims {percent(worst['sure'])} and is right about "
    words += f"{percent(worst['accuracy'])} ({'over' if gap > 0 else 'under'}-confident, "
    words += f"calibration error {percent(worst['ece'])}). "
    end = rows[facts.trace.full_exit]
    return f"{words}The full network's calibration error is {percent(end['ece'])}."


def on_milliseconds(rows: Sequence[Row]) -> str:
    """Measured milliseconds against ideal ones."""
    best = max(rows, key=lambda row: row["speedup"])
    words = f"At best {best['speedup']:.2f}x ({best['where']}, {best['backend']}; quartiles {best['low']:.2f} to "
    words += f"{best['high']:.2f}), of {best['ideal_speedup']:.2f}x were deciding and regrouping free. "
    slower = [row["where"] for row in rows if row["high"] < 1]
    return words + (f"With {', '.join(slower)} early exits are slower: run the whole network there." if slower else "")


def _called(exit: str) -> str:
    return "The full network" if exit == "full" else f"Exit {exit}" if exit.isdigit() else exit
