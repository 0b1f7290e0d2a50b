"""An engine under a monitor: a random share of its rows is answered at full depth, too, and it obeys.

It refuses to know what is tested: the monitor says whether exits are on.
"""

from __future__ import annotations

import threading

import numpy as np
import torch

from shallowdeep.audits import Audit
from shallowdeep.costs import exits_of
from shallowdeep.inputs import as_inputs, take
from shallowdeep.monitor import Monitor
from shallowdeep.policies import Fixed
from shallowdeep.runtime.engine import Engine
from shallowdeep.types import Answer

SHARE = 0.02


class Watched:
    """``watched(inputs)`` answers as ``engine`` does while ``monitor`` sees it; once exits are off, the full network,
    whose ``alarm_B`` is None: the engine's alarm speaks of other exits.

    A random ``share`` of the rows is answered by the full network as well and compared: what audits add to the mean
    cost is about ``share``. ``monitor.reset()`` switches the exits on again. Several threads may call. Raises
    ``ValueError`` when the monitor's reference was made for other exits or another confusion than the engine's.
    """

    def __init__(self, engine: Engine, monitor: Monitor, *, share: float = SHARE, seed: int | None = None) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"share is the part of rows that is audited, from 0 to 1; found {share}.")
        exits = exits_of(engine.sdn, engine.second_look)
        monitor.reference.check(exits.rule(engine.policy).asked, exits.confusion_reference is not None)
        self.engine, self.monitor, self.share = engine, monitor, share
        self._full = Engine(engine.sdn, Fixed(exit=exits.full_exit), backend=engine.backend, threads=engine.threads)
        self._random, self._lock = np.random.default_rng(seed), threading.Lock()

    def __call__(self, inputs: object) -> Answer:
        """The answers to one batch, in its order."""
        return self.audited(inputs)[0]

    def audited(self, inputs: object) -> tuple[Answer, Audit]:
        """The answers, and which of them the full network was asked about: to be kept until ``monitor.labels``.

        Nothing is audited while exits are off.
        """
        if not self.monitor.exits_on:
            answer = self._full(inputs)
            return answer, self._compared(answer, inputs, 0.0)
        answer = self.engine(inputs)
        self.monitor.see(answer)
        audit = self._compared(answer, inputs, self.share)
        self.monitor.audit(audit)
        return answer, audit

    def _compared(self, answer: Answer, inputs: object, share: float) -> Audit:
        with self._lock:
            chosen_B = self._random.random(len(answer.labels_B)) < share
        row_S = torch.from_numpy(chosen_B.nonzero()[0])
        answered_S = answer.labels_B[row_S]
        full_S = self._full(take(as_inputs(inputs), row_S)).labels_B if len(row_S) else answered_S
        return Audit(row_S=row_S, answered_S=answered_S, full_S=full_S)
