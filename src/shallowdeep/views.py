"""Second looks: after its own answer the same network is asked again, on another view of the input.

It refuses to know networks: a view makes a batch of inputs out of a batch of inputs, row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from shallowdeep.inputs import Inputs, each, join, num_rows, signature_of, take, tensors
from shallowdeep.policies import CalibrationRecord, Policy
from shallowdeep.types import DataError

View: TypeAlias = Callable[[Inputs], Inputs]
CHECKED_ROWS = 8
"""Rows on which a view is tried before it is used."""


@dataclass(frozen=True, kw_only=True)
class SecondLook:
    """A view and the name that traces, policies and exports know it by."""

    name: str
    view: View

    def joined(self, full_BC: Tensor, again_BC: Tensor) -> Tensor:
        """The answer of both passes: their log-probabilities averaged (float64 inside), in the dtype of the first."""
        both = (torch.log_softmax(logits_BC.double(), 1) for logits_BC in (full_BC, again_BC))
        return (sum(both, torch.zeros((), dtype=torch.float64, device=full_BC.device)) / 2).to(full_BC.dtype)

    def check(self, inputs: Inputs) -> None:
        """Try the view on ``inputs``. Raises ``DataError`` unless it keeps kinds, shapes and dtypes, leaves its
        argument as it is, answers the same twice, and treats every row by itself.
        """
        rows, before = num_rows(inputs), each(inputs, torch.clone)
        seen, back = self.view(inputs), torch.arange(rows - 1, -1, -1)
        if signature_of(seen) != signature_of(inputs) or num_rows(seen) != rows:
            was, now = ([(tuple(leaf.shape), leaf.dtype) for leaf in tensors(some)] for some in (inputs, seen))
            raise DataError(f"The view {self.name!r} must keep kinds, shapes and dtypes: {was} became {now}.")
        parts = [slice(0, rows // 2), slice(rows // 2, rows)] if rows > 1 else [slice(0, rows)]
        trials = {
            "changes its argument": (inputs, before),
            "is not deterministic: a second call answers otherwise": (self.view(inputs), seen),
            "does not treat rows one by one: parts of a batch come out otherwise": (
                join([self.view(take(inputs, part)) for part in parts]),
                seen,
            ),
            "does not treat rows one by one: another order of rows changes them": (
                take(self.view(take(inputs, back)), back),
                seen,
            ),
        }
        for sentence, (found, wanted) in trials.items():
            if not _alike(found, wanted):
                raise DataError(f"The view {self.name!r} {sentence}.")


def mirror(inputs: Inputs) -> Inputs:
    """Images [B, C, H, W] from right to left, all other inputs as they are. Raises ``DataError`` where none is one.

    >>> mirror(torch.arange(3).expand(1, 1, 1, 3)).tolist()
    [[[[2, 1, 0]]]]
    """
    if not any(_is_image(leaf) for leaf in tensors(inputs)):
        shapes = [tuple(leaf.shape) for leaf in tensors(inputs)]
        raise DataError(
            f"The view 'mirror' flips images [B, C, H, W]; found shapes {shapes}. Give a function of yours."
        )
    return each(inputs, lambda leaf: leaf.flip(3) if _is_image(leaf) else leaf)


VIEWS: Mapping[str, View] = {"mirror": mirror}
"""Views by name; only these can be written down and found again."""


Look: TypeAlias = SecondLook | View | str | None
"""What a second look may be given as: a name of ``VIEWS``, or a function of a batch of inputs."""


def second_look_of(view: Look) -> SecondLook | None:
    """The second look called so, or by a function of the user's own, which goes by its module and name.

    >>> second_look_of("mirror").name, second_look_of(mirror).name, second_look_of(None)
    ('mirror', 'mirror', None)
    """
    if view is None or isinstance(view, SecondLook):
        return view
    if isinstance(view, str):
        if view not in VIEWS:
            raise ValueError(f"No view {view!r}. Views: {', '.join(VIEWS)}; or give a function of a batch of inputs.")
        return SecondLook(name=view, view=VIEWS[view])
    if not callable(view):
        raise TypeError(f"A second look is the name of a view or a function of a batch, found {type(view).__name__}.")
    named = {known: name for name, known in VIEWS.items()}
    own = f"{view.__module__}.{getattr(view, '__qualname__', f'<{type(view).__name__}>')}"  # <..>: a name of many
    return SecondLook(name=named.get(view, own), view=view)


def view_of(policy: Policy) -> str | None:
    """The name of the view that ``policy`` was calibrated with."""
    record = policy.calibrated_on
    return None if record is None else record.info.get("second_look")


def check_view(policy: Policy, look: SecondLook | None) -> None:
    """Raise ``ValueError`` where ``policy`` was calibrated with another second look than ``look``, or without."""
    check_record("policy", policy.calibrated_on, None if look is None else look.name)


def check_record(name: str, record: CalibrationRecord | None, has: str | None) -> None:
    """The same of anything with a record, by the view's name; what has none was made by hand and runs with any."""
    needs = None if record is None else record.info.get("second_look")
    if record is None or needs == has:
        return
    way = "leave second_look out, or calibrate on a trace that was collected with it and where looking twice pays"
    if needs is not None:
        way = f"give second_look={needs!r}" if needs in VIEWS else "give the view that its trace was collected with"
    was = "without a second look" if needs is None else f"with the second look {needs!r}"
    runs = "without one" if has is None else f"with {has!r}"
    raise ValueError(f"The {name} was calibrated {was} and shall run {runs}: {way}.")


def _is_image(leaf: Tensor) -> bool:
    return leaf.ndim == 4 and (leaf.shape[3] > 4 or leaf.shape[1] <= 4)  # else channels stand last


def _alike(found: Inputs, wanted: Inputs) -> bool:
    for one, other in zip(tensors(found), tensors(wanted), strict=True):
        try:
            torch.testing.assert_close(one, other, equal_nan=True)
        except AssertionError:
            return False
    return True
