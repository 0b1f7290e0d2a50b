"""What runs between two questions, as one module of tensors: segments, internal classifiers and the policy's rule.

It refuses to know batches that shrink and backends: a loop that knows names alone can run the steps in order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from shallowdeep.classifiers import InternalClassifier, Said
from shallowdeep.costs import exits_of
from shallowdeep.graph import silence, told
from shallowdeep.inputs import Inputs, inputs_from, signature_of, tensors
from shallowdeep.network import ShallowDeepNetwork
from shallowdeep.policies import Policy
from shallowdeep.segments import Segment, cut_segments
from shallowdeep.trajectory import Alarm
from shallowdeep.types import BackendError, InputSignature
from shallowdeep.views import SecondLook
from shallowdeep.walking import Memory, Rule, needed_exits


@dataclass(frozen=True, eq=False)
class _Part:
    """One exit that runs: the segment before it, the inputs that this reads, the IC (None: the backbone's end), and its
    mask.
    """

    exit: int
    segment: Segment
    reads: tuple[str, ...]
    classifier: InternalClassifier | None
    mask: str


class Step(nn.Module):
    """From one asked exit to the next: tensors in the order of ``takes`` in, those of ``gives`` out, which replace what
    is called the same.

    At the k-th exit asked they are ``stop`` (which rows the policy stops, bool [B]; not at the last), ``logits.k`` and
    ``softmax.k``, ``answer.logits.k`` and ``answer.softmax.k`` where others have a say in the answer, and what later
    steps take: ``crossing``, ``side.NODE``, ``said.log_probs``, ``said.hidden``, ``state.i``. Inputs are
    ``input.NAME``. The batch is the first axis of all but those in ``rowless``.
    """

    def __init__(
        self,
        parts: Sequence[_Part],
        rule: Rule,
        *,
        place: int,
        carried: Sequence[str],
        takes: Sequence[str],
        gives: Sequence[str],
        rowless: frozenset[str],
        look: SecondLook | None,
        inputs: InputSignature,
    ) -> None:
        super().__init__()
        self.exit, self.place, self.rowless = parts[-1].exit, place, rowless
        self.look, self._inputs = look, inputs
        self.takes, self.gives = tuple(takes), tuple(gives)
        self._parts, self.rule, self._carried = parts, rule, carried
        self.pieces = nn.ModuleList(part.segment.run for part in parts)
        self.classifiers = nn.ModuleList(part.classifier for part in parts if part.classifier is not None)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        rows = dict(zip(self.takes, tensors, strict=True))
        carried = tuple(rows[name] for name in self._carried)
        said = Said(rows["said.log_probs"], rows.get("said.hidden")) if "said.log_probs" in rows else None
        if self.look is not None:
            own = inputs_from(self._inputs, [rows[f"input.{name}"] for name in self._inputs.names])
            rows |= named(self._inputs.names, self.look.view(own))
        for part in self._parts:
            carried = part.segment.run(*carried, *(rows.get(name) for name in part.reads))
            logits = carried[0]
            if part.classifier is not None:
                logits, hidden = part.classifier(logits, said, rows.get(part.mask))
                said = Said.of(logits, hidden)
        if self.look is not None:
            logits = self.look.joined(rows[f"logits.{self.place - 1}"], logits)
        before = Memory(*(_listed(rows, kind) for kind in Memory._fields))
        memory, stop_B = self.rule.ask(self.exit, logits, before)
        found = {f"logits.{self.place}": logits, f"softmax.{self.place}": memory.softmax[-1]}
        found |= zip(_names_of(self._parts[-1].segment), carried, strict=True)
        found |= {f"state.{i}": tensor for i, tensor in enumerate(memory.state)}
        if stop_B is not None:
            found["stop"] = stop_B
        if self.rule.recalls(self.exit):
            found |= zip(_answer(self.place), self.rule.answer(self.exit, memory), strict=True)
        if said is not None:
            found["said.log_probs"] = said.log_probs_BC
            if said.hidden_BH is not None:
                found["said.hidden"] = said.hidden_BH
        return tuple(found[name] for name in self.gives)

    def run(self, given: Sequence[Tensor]) -> Sequence[Tensor]:
        """What it gives, in PyTorch."""
        found: Sequence[Tensor] = self(*given)
        return found


def make_steps(
    sdn: ShallowDeepNetwork,
    policy: Policy,
    example: Inputs,
    look: SecondLook | None = None,
    alarm: Alarm | None = None,
) -> list[Step]:
    """The steps of ``sdn`` under ``policy`` for inputs like ``example``, in their order, weights copied.

    ICs that nobody asks run only where they feed one that is asked. A second look, where it is asked, is the last step:
    all segments once more, without ICs. Raises ``CutError`` for a network that cannot be exported.
    """
    full, exits, signature = sdn.num_exits - 1, exits_of(sdn, look), signature_of(example)
    rule = exits.rule(policy, alarm)
    runs = (*needed_ics(rule.asked[: full + 1], exits.feeds_EE), full)
    segments = cut_segments(sdn.backbone, sdn.plan, runs[:-1], example)
    names = tuple(f"input.{name}" for name in signature.names)
    groups = _grouped(sdn, rule, dict(zip(runs, segments, strict=True)), names)
    carried: list[tuple[str, ...]] = [(), *(_names_of(group[-1].segment) for group in groups[:-1])]
    if rule.last > full:
        groups.append([replace(part, exit=rule.last, classifier=None, mask="") for group in groups for part in group])
        carried.append(())
    states = [*remembered(policy, 1, torch.device("cpu"))]
    takes: list[list[str]] = []
    for place, (group, crossing) in enumerate(zip(groups, carried, strict=True)):
        again = group[-1].exit > full
        inputs = [name for name in names if again or any(name in (*part.reads, part.mask) for part in group)]
        fed = group[0].classifier.spec if group[0].classifier is not None and place else None
        said = ["said.log_probs"] if fed is not None and fed.fed else []
        said += ["said.hidden"] if fed is not None and fed.hidden and fed.fed_hidden else []
        memory = states if group[-1].exit != rule.last else []
        memory = [*memory, *(f"{kind}.{k}" for kind in rule.recalls(group[-1].exit) for k in range(place))]
        memory = [*memory, *[f"logits.{place - 1}"] * (again and f"logits.{place - 1}" not in memory)]
        takes.append([*inputs, *crossing, *said, *memory])
    sides = [side for group in groups for part in group for side in part.segment.sides.items()]
    rowless = frozenset(f"side.{name}" for name, rows in sides if not rows)
    steps = []
    for place, group in enumerate(groups):
        last, later = group[-1].exit == rule.last, {name for names in takes[place + 1 :] for name in names}
        gives = [*([] if last else ["stop"]), f"logits.{place}", f"softmax.{place}"]
        gives += _answer(place) if rule.recalls(group[-1].exit) else ()
        made = ("said.log_probs", "said.hidden", *states, *_names_of(group[-1].segment))
        at_once = set(takes[place + 1]) if not last else set()  # said.* is replaced by every step
        gives += [name for name in made if name in (at_once if name.startswith("said.") else later)]
        step = Step(
            group,
            rule,
            place=place,
            carried=carried[place],
            takes=takes[place],
            gives=gives,
            rowless=rowless,
            look=look if group[-1].exit > full else None,
            inputs=signature,
        )
        steps.append(step)
    return steps


def _grouped(
    sdn: ShallowDeepNetwork, rule: Rule, segment_of: Mapping[int, Segment], names: Sequence[str]
) -> list[list[_Part]]:
    """The exits that run, parted behind every one that is asked."""
    full = sdn.num_exits - 1
    groups: list[list[_Part]] = [[]]
    for exit, segment in segment_of.items():
        reads = tuple(name if read else "" for name, read in zip(names, segment.reads, strict=True))
        classifier = copy.deepcopy(sdn.classifier(exit)).eval().requires_grad_(False) if exit < full else None
        mask = f"input.{sdn.plan.cuts[exit].mask}" if exit < full and sdn.plan.cuts[exit].mask else ""
        groups[-1].append(_Part(exit, segment, reads, classifier, mask))
        if rule.asked[exit] and exit < full:
            groups.append([])
    return groups


class Runs(Protocol):
    """A step, or what a backend has made of one."""

    @property
    def takes(self) -> tuple[str, ...]: ...
    @property
    def gives(self) -> tuple[str, ...]: ...
    @property
    def run(self) -> Callable[[Sequence[Any]], Sequence[Any]]: ...


R = TypeVar("R", bound=Runs)


def chain(steps: Iterable[R], rows: dict[str, Any]) -> Iterator[tuple[R, list[Any], Sequence[Any]]]:
    """Every step, what it takes of ``rows`` and what it gives, which ``rows`` holds from then on: nobody leaves."""
    for step in steps:
        given = [rows[name] for name in step.takes]
        found = step.run(given)
        rows.update(zip(step.gives, found, strict=True))
        yield step, given, found


def named(names: Sequence[str], inputs: Inputs) -> dict[str, Tensor]:
    """The inputs as steps call them."""
    return {f"input.{name}": tensor for name, tensor in zip(names, tensors(inputs), strict=True)}


def remembered(policy: Policy, rows: int, device: torch.device) -> dict[str, Tensor]:
    """What ``policy`` remembers of ``rows`` rows before its first question, as steps call it."""
    return {f"state.{i}": tensor for i, tensor in enumerate(policy.init(rows, None, device))}


class Joined(nn.Module):
    """Steps in one piece where nobody leaves, from the inputs to the logits of each: what they cost without questions.

    The steps' policy must remember nothing, as ``Confidence`` does.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        super().__init__()
        self._steps, self.steps, self.rowless = tuple(steps), nn.ModuleList(steps), frozenset[str]()
        self.takes = tuple(dict.fromkeys(name for step in steps for name in step.takes if name.startswith("input.")))
        self.gives = tuple(f"logits.{step.place}" for step in steps)
        self.look = steps[-1].look

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        rows = dict(zip(self.takes, tensors, strict=True))
        for _ in chain(self._steps, rows):
            pass
        return tuple(rows[name] for name in self.gives)


def export_step(step: Step | Joined, example: Sequence[Tensor]) -> torch.export.ExportedProgram:
    """The graph of ``step`` for any batch size; ``example`` are tensors in the order of ``step.takes``, two rows.

    Raises ``BackendError`` for a second look's view or an IC that cannot be part of a graph.
    """
    batch = torch.export.Dim("batch")
    shapes = tuple({} if name in step.rowless else {0: batch} for name in step.takes)
    try:
        with silence(), torch.no_grad():
            return torch.export.export(step, tuple(example), dynamic_shapes=(shapes,))
    except Exception as error:
        only = "only the backend 'torch' runs it, eagerly."
        if step.look is not None:
            raise BackendError(f"The view {step.look.name!r} cannot be part of a graph: {only}") from error
        raise BackendError(
            f"An internal classifier cannot be part of a graph for any number of rows ({told(error)}): {only}"
        ) from error


def needed_ics(asked: tuple[bool, ...], feeds_EE: Tensor) -> tuple[int, ...]:
    """Exits before the full one, which is the last of ``asked``, whose ICs must run."""
    return tuple(exit for exit, on in enumerate(needed_exits(asked[:-1], feeds_EE)) if on)


def _names_of(segment: Segment) -> tuple[str, ...]:
    """Names of what leaves a segment, in its order."""
    return ("crossing", *(f"side.{name}" for name in segment.sides))


def _answer(place: int) -> tuple[str, str]:
    """Names of the answer of rows that end there, where it is not the exit's own."""
    return f"answer.logits.{place}", f"answer.softmax.{place}"


def _listed(rows: Mapping[str, Tensor], kind: str) -> tuple[Tensor, ...]:
    return tuple(tensor for name, tensor in rows.items() if name.startswith(f"{kind}."))
