"""What a policy was proved to keep, on which rows and for which runtime, and when that stops holding.

It refuses to know how anything is proved: a certificate is data on the policy's record.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Risk = Literal["drop", "harm", "disagreement", "error", "brier"]
"""What is bounded, in the mean over rows. drop: right at the full exit less right where it stops (1, 0 or -1). harm:
right at the full exit and wrong where it stops. disagreement: another label than the full exit's. error: wrong where it
stops. brier: half the squared distance of the softmax to the truth, less the full exit's."""
Claim = Risk | Literal["kept"]
"""What a certificate speaks of: a risk of all answers, or of those that an alarm keeps (kept: the share of wrong ones
among these)."""
Method = Literal["auto", "ltt", "betting", "crc", "split"]
"""How. ltt: Learn then Test by the risk's exact test (betting for brier, which has none); betting: the same by betting;
crc: conformal risk control; split: looked at and not proved; auto: ltt, but betting
where the rows that choose see many gains in a drop, which the exact test counts for nothing."""


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """One statement about one policy: ``sentence`` says it, ``void_for`` says when it does not hold.

    ``bound`` is the most that ``risk`` may be, with probability 1 - ``delta`` (None: in expectation). ``observed`` is
    its mean over ``tested_rows`` of the ``rows``; no other row was tested and none of them chose. ``data_hash``
    identifies them. ``backend``, ``precision``, ``weights`` (a hash of backbone and ICs), ``exit_names``,
    ``asked_E`` and ``view`` (the second look's name, "" for none) are those of the trace, "" where it does not say;
    ``versions`` those that made it.
    """

    method: Literal["ltt", "betting", "crc"]
    test: str
    risk: Claim
    bound: float
    delta: float | None
    observed: float
    rows: int
    tested_rows: int
    data_hash: str
    backend: str
    precision: str
    weights: str
    exit_names: tuple[str, ...]
    asked_E: tuple[bool, ...]
    view: str
    versions: str

    @property
    def sentence(self) -> str:
        """The whole statement, in words."""
        claim = claim_of(self.risk, self.bound)
        if self.delta is None:
            return f"In expectation over the draw of calibration rows {claim}; a single draw may miss it. {_LIMITS}"
        return (
            f"With probability at least {1 - self.delta:g} over the draw of calibration rows {claim}. {_LIMITS} "
            "Several certificates from the same rows hold together only if delta is divided among them."
        )

    def void_for(
        self,
        *,
        backend: str,
        precision: str,
        weights: str,
        exit_names: tuple[str, ...],
        view: str = "",
        capped: bool = False,
    ) -> str | None:
        """Why the certificate does not hold for what runs; None where it does.

        ``capped``: a limit of cost or time may end walks before the policy does.
        """
        if not (self.backend and self.precision and self.weights):
            return "its trace does not say which backend, precision and weights made it; collect it with engine.collect"
        if self.backend != backend:
            return f"it was tested on backend {self.backend!r} and {backend!r} runs; certify a trace of engine.collect"
        if self.precision != precision:
            return f"it was tested in {self.precision} and {precision} runs"
        if self.weights != weights:
            return "it was tested with other weights of the backbone or its ICs; certify a trace of these"
        if self.view != view:
            return f"it was tested with the second look {self.view or 'none'!r} and {view or 'none'!r} runs"
        if self.exit_names != tuple(exit_names):
            return f"it was tested on the exits {', '.join(self.exit_names)} and {', '.join(exit_names)} run"
        if capped:
            return "a hard cap on cost or time ends walks before the certified policy does"
        return None

    def __str__(self) -> str:
        level = "in expectation" if self.delta is None else f"delta {self.delta:g}"
        asked = " ".join(name for name, on in zip(self.exit_names, self.asked_E, strict=True) if on)
        facts = [
            ("certificate", self.data_hash),
            ("risk", f"{self.risk} <= {self.bound:.4g}, {level}"),
            ("method", f"{self.method}: {self.test}"),
            ("observed", f"{self.observed:.4g} on {self.tested_rows} of {self.rows} rows"),
            ("runs on", f"{self.backend or 'unknown'}, {self.precision or 'unknown'}"),
            ("weights", self.weights or "unknown"),
            ("exits", asked + (f" (second look: {self.view})" if self.view else "")),
            ("made by", self.versions),
        ]
        lines = [f"{name.ljust(11)}  {value}" for name, value in facts]
        return "\n".join([*lines, self.sentence])


_LIMITS = "It speaks of fresh rows drawn like these."


def claim_of(risk: Claim, bound: float) -> str:
    """What it means that ``risk`` is at most ``bound``, as the end of a sentence.

    >>> claim_of("drop", 0.0)
    'the policy is at least as accurate as the full network'
    """
    if risk == "drop" and bound <= 0:
        gain = f"{-bound:.4g} of all rows more often right than" if bound else "at least as accurate as"
        return f"the policy is {gain} the full network"
    part = f"{bound:.2%}" if abs(bound) >= 1e-4 else f"{bound:.2g}"
    return {
        "drop": f"the accuracy is at most {part} of all rows below the full network's",
        "harm": f"at most {part} of the rows are right at the full exit and wrong where they stop",
        "disagreement": f"at most {part} of the rows get another label than the full network's",
        "error": f"at most {part} of the rows get a wrong label",
        "kept": f"at most {part} of the answers that the alarm keeps are wrong",
        "brier": f"the Brier score is at most {bound:.4g} above the full network's",
    }[risk]


def certificate_from_json(facts: Mapping[str, Any]) -> Certificate:
    """The certificate whose ``dataclasses.asdict`` is ``facts``. Raises ``ValueError`` on other fields."""
    facts = {"weights": "", **facts}  # one of before weights were named is read, and void
    fields = {field.name for field in dataclasses.fields(Certificate)}
    if facts.keys() != fields:
        raise ValueError(f"A certificate has the fields {', '.join(sorted(fields))}; found {', '.join(sorted(facts))}.")
    lists = {"exit_names": tuple(facts["exit_names"]), "asked_E": tuple(map(bool, facts["asked_E"]))}
    return Certificate(**{**facts, **lists})
