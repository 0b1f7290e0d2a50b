"""Whether answers still look as they did when the policy was calibrated, and whether exits still pay: a monitor.

It refuses to know networks: it sees answers, some of them beside the full network's, some labels, and it says what to
do. Its memory does not grow. Sources: arXiv 2110.06177 (harmful shifts), 2203.03532 (changes), 2010.09686 (betting).
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from shallowdeep.audits import Audit, Estimate, Tally
from shallowdeep.files import FormatError, read_json, write_text
from shallowdeep.reference import Reference, Seen
from shallowdeep.sequential import Bets
from shallowdeep.types import DataError, table

Action = Literal["keep", "recalibrate", "switch exits off"]
FORMAT = 1
RECENT = 1000
"""Rows after which a row counts only 1/e in what is shown as recent; no test looks at that."""


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """One mean that is watched: where the reference places it, where it was recently, and the evidence of drift."""

    name: str
    low: float
    high: float
    recent: float
    evidence: float


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What to do and why, with all that was watched over ``rows`` rows.

    ``evidence`` of drift is now; an alarm came if it ever reached ``evidence_needed``. ``drop_guess`` is the drop of
    accuracy if disagreements with the full network do as much harm as among the reference rows.
    """

    action: Action
    why: str
    rows: int
    statistics: tuple[Statistic, ...]
    evidence: float
    evidence_needed: float
    disagreement: Estimate
    drop: Estimate
    drop_guess: float

    def __str__(self) -> str:
        lines = [("watched", "reference", "recently", "evidence")]
        for one in self.statistics:
            cells = f"{one.low:.4f} to {one.high:.4f}", f"{one.recent:.4f}", f"{one.evidence:.3g}"
            lines.append((one.name, *cells))
        needed = f"alarm at {self.evidence_needed:.3g}"
        guess = f", a drop of {self.drop_guess:.2%} if as harmful as before" if self.disagreement.rows else ""
        return "\n".join(
            [
                table(lines),
                f"evidence of drift after {self.rows:,} rows: {self.evidence:.3g} ({needed})",
                f"disagreement with the full network: {self.disagreement}{guess}",
                f"drop of accuracy by labels: {self.drop}",
                f"{self.action}: {self.why}",
            ]
        )


class Monitor:
    """Watches a stream of answers: ``see`` batches, ``audit`` some rows at full depth, give ``labels`` when they come.

    ``verdict`` may be asked after every row: with probability >= 1 - ``reference.alpha``, over the reference rows and
    the whole stream, it says "keep" for ever while rows come, independently, from where the reference rows came from,
    and early exits lose no more there than is tolerated.
    An alarm stays until ``reset``. "recalibrate": a share of exits, the cost, confidence or confusion has left the
    reference's limits. "switch exits off": audits show that early exits lose, or contradict the full network, more than
    is tolerated. Several threads may call; neither memory nor file grows. ``docs/monitor.md`` has an example.
    """

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self._lock = threading.RLock()
        self.reset()

    def reset(self) -> None:
        """Forget the stream and its alarms; the chance of a false alarm is counted anew from here."""
        known = self.reference
        limit_J = np.array([*known.high_K, *(1 - low for low in known.low_K)])
        with self._lock:
            self._drift = Bets.against(limit_J, alpha=known.alpha / 4)
            self._disagreement = Tally.fresh((0.0, 1.0), known.max_disagreement, alpha=known.alpha / 8)
            self._drop = Tally.fresh((-1.0, 0.0, 1.0), known.max_accuracy_drop, alpha=known.alpha / 4)
            self._recent_K, self._weight = np.zeros(len(known.low_K)), 0.0

    def see(self, seen: Seen) -> None:
        """A batch of answers given, in the order of the stream. Raises ``ValueError`` for those of another policy."""
        x_BK = self.reference.columns(seen)
        age_B = np.exp(-np.arange(len(x_BK))[::-1] / RECENT)
        fade = float(np.exp(-len(x_BK) / RECENT))
        with self._lock:
            self._drift = self._drift.after(np.concatenate([x_BK, 1 - x_BK], 1))
            self._recent_K = fade * self._recent_K + age_B @ x_BK
            self._weight = fade * self._weight + float(age_B.sum())

    def audit(self, audit: Audit) -> None:
        """Rows that the full network answered, too: chosen at random, whatever they are and were answered."""
        differs_S = (audit.answered_S != audit.full_S).long()
        with self._lock:
            self._disagreement = self._disagreement.after(differs_S)

    def labels(self, audit: Audit, labels_S: Tensor) -> None:
        """True labels of audited rows, whenever they come, once each; which ones come must not depend on the answers.

        Raises ``DataError`` when labels and rows do not match.
        """
        if labels_S.shape != audit.full_S.shape or labels_S.is_floating_point():
            found = f"{labels_S.dtype} {list(labels_S.shape)}"
            raise DataError(f"{len(audit.full_S)} rows were audited and need as many whole numbers, found {found}.")
        truth_S = labels_S.to(audit.full_S.device)
        lost_S = (audit.full_S == truth_S).long() - (audit.answered_S == truth_S).long()
        with self._lock:
            self._drop = self._drop.after(lost_S + 1)

    @property
    def exits_on(self) -> bool:
        """False once audits say that exits should be switched off."""
        return not (self._drop.alarmed or self._disagreement.alarmed)

    @property
    def drift(self) -> tuple[int, str] | None:
        """By which row (from 1) drift was shown, and in which of ``reference.names_K``; None so far."""
        bets, names_K = self._drift, self.reference.names_K
        if bets.alarm_row is None or bets.culprit is None:
            return None
        return bets.alarm_row, names_K[bets.culprit % len(names_K)]

    def verdict(self) -> Verdict:
        """What to do now, and why."""
        with self._lock:
            known, drift, (action, why) = self.reference, self._drift, self._action()
            disagreement, drop = self._disagreement.estimate(), self._drop.estimate()
            recent_K = self._recent_K / self._weight if self._weight else np.full(len(self._recent_K), np.nan)
        low_K, high_K = known.limits_K2.T
        evidence_K = drift.wealth_JG.mean(1).reshape(2, -1).max(0)
        columns = (x_K.tolist() for x_K in (low_K, high_K, known.in_units(recent_K), evidence_K))
        return Verdict(
            action=action,
            why=why,
            rows=drift.rows,
            statistics=tuple(
                Statistic(name=name, low=low, high=high, recent=recent, evidence=evidence)
                for name, low, high, recent, evidence in zip(known.names_K, *columns, strict=True)
            ),
            evidence=float(drift.wealth_JG.mean()),
            evidence_needed=1 / drift.alpha,
            disagreement=disagreement,
            drop=drop,
            drop_guess=disagreement.mean * known.harm_ratio,
        )

    def _action(self) -> tuple[Action, str]:
        known, drift = self.reference, self._drift
        if self._drop.alarmed:
            return "switch exits off", f"labels show that early exits lose more than {known.max_accuracy_drop:.2%}."
        if self._disagreement.alarmed:
            return "switch exits off", f"over {known.max_disagreement:.2%} of answers contradict the full network."
        if drift.culprit is None:
            return "keep", "nothing has left the limits that the reference allows."
        k = drift.culprit % len(known.low_K)
        side, (low, high) = "above" if drift.culprit == k else "below", known.limits_K2[k]
        allowed = f"{side} {low:.4g} to {high:.4g}, where {known.rows:,} reference rows place it"
        return "recalibrate", f"by row {drift.alarm_row:,}, {known.names_K[k]} was {allowed}."

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write reference and state as one JSON file of some kilobytes: a service that is started again goes on."""
        with self._lock:
            state = {
                "drift": self._drift.to_json(),
                "disagreement": {"count_V": self._disagreement.count_V.tolist(), **self._disagreement.bets.to_json()},
                "drop": {"count_V": self._drop.count_V.tolist(), **self._drop.bets.to_json()},
                "recent_K": self._recent_K.tolist(),
                "weight": self._weight,
            }
        about = {"format": FORMAT, "reference": dataclasses.asdict(self.reference), "state": state}
        write_text(Path(path), json.dumps(about) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Monitor:
        """The monitor that ``save`` wrote. Raises ``FormatError``."""
        about = read_json(Path(path))
        try:
            if about["format"] > FORMAT:
                raise FormatError(f"has monitor format {about['format']}; this version reads up to {FORMAT}.")
            facts: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in about["reference"].items()}
            monitor = cls(Reference(**facts))
            monitor._go_on(about["state"])
        except FormatError as error:
            raise FormatError(f"{path} {error}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{path} is damaged or not a monitor: {error!r}.") from None
        return monitor

    def _go_on(self, state: Mapping[str, Any]) -> None:
        def tally(fresh: Tally, facts: Mapping[str, Any]) -> Tally:
            count_V = np.array(facts["count_V"], dtype=np.float64)
            return dataclasses.replace(fresh, count_V=count_V, bets=fresh.bets.going_on(facts))

        self._drift = self._drift.going_on(state["drift"])
        self._disagreement = tally(self._disagreement, state["disagreement"])
        self._drop = tally(self._drop, state["drop"])
        self._recent_K, self._weight = np.array(state["recent_K"]), float(state["weight"])
