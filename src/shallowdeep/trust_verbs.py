"""The work behind the verbs of guarantees, alarms, drift and attacks: files in, a folder of files out.

It refuses to know how choices are typed; that is the command line's. Every function returns what the last line prints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from shallowdeep.attack_study import StudyChoices, attack_study, write_study
from shallowdeep.attacks import Attack, Pixels
from shallowdeep.data import Dataset
from shallowdeep.runs import plain, write_run
from shallowdeep.types import DataError
from shallowdeep.verbs import DataChoice, halves, load_sdn, ready

# ---------------------------------------------------------------- attacks


def attack_verb(
    sdn_dir: Path,
    data: DataChoice,
    out: Path,
    *,
    attack: Attack,
    rows: int,
    max_accuracy_drop: float,
    training: DataChoice | None,
    seed: int,
) -> dict[str, Any]:
    """What a slowdown attack does and what defences make of it: writes ``attack.json`` and ``table.txt``.

    One fixed half of the rows chooses thresholds, ``rows`` rows of the other half are attacked.
    """
    sdn, preprocessing = load_sdn(sdn_dir)
    own, others = data.read(), None if training is None else training.read()

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
        seed=seed,
    )
    found = attack_study(
        sdn,
        out,
        choices,
        calibration=pair(own.rows(half)),
        reported=pair(own.rows(spread(other, rows))),
        training=None if others is None else pair(others),
    )
    print(write_study(out, found))
    about = {"sdn": sdn_dir, "data": data.__dict__, "data_fingerprint": own.fingerprint, "rows": rows}
    about |= {"training": training and training.__dict__, "choices": plain(choices.__dict__)}
    write_run(out, "attack", about, found)
    brief = {kind: found["undefended"]["found"][kind] for kind in ("clean", "slowdown")}
    return dict(plain({"verb": "attack", "out": out, **brief}))


def spread(positions_N: torch.Tensor, rows: int) -> torch.Tensor:
    """``rows`` of ``positions_N``, evenly spread; all where there are no more.

    >>> spread(torch.arange(10), 3).tolist()
    [0, 4, 9]
    """
    if rows >= len(positions_N):
        return positions_N
    return positions_N[torch.linspace(0, len(positions_N) - 1, rows).long()]
