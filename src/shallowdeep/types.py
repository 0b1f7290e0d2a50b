"""The project's words as frozen data: what is planned, recorded, decided and answered.

It refuses to know networks, devices and algorithms. Axes, one legend for the whole project, carried in every
array's name: ``E`` exits, ``N`` samples, ``B`` batch, ``C`` classes, ``D`` features. Shares, accuracies and
confidences are fractions in [0, 1]; ``cost`` is a share of one pass through the untouched backbone (1.0).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shallowdeep.files import FormatError, read_tensors, write_tensors

Layout = Literal["map", "tokens", "vector"]
Port = Literal["in", "out", "call"]

TRACE_FORMAT = 1


class CutError(ValueError):
    """A cut point was asked for that the network does not have, or the network has none."""


class BackboneMismatch(ValueError):
    """A saved SDN, an engine or a cache is met with weights other than those it was made from."""


class BackendError(ValueError):
    """A backend computes something else than PyTorch, or cannot run a network."""


class ExportError(ValueError):
    """An artefact cannot be made, or would not answer as the engine does."""


class DataError(ValueError):
    """Inputs or labels are not what a classifier can be trained on or asked."""


class MissingExtra(ImportError):
    """An optional library is absent or broken; the message names the extra to install."""


@dataclass(frozen=True, kw_only=True)
class InputSignature:
    """What the backbone is called with: one tensor, a tuple or a dict; shapes are without the batch axis."""

    kind: Literal["tensor", "tuple", "dict"]
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]

    def like(self, other: InputSignature) -> bool:
        """Whether it differs in the axes' lengths at most."""
        mine, others = ((s.kind, s.names, s.dtypes, [*map(len, s.shapes)]) for s in (self, other))
        return mine == others

    def __str__(self) -> str:
        leaves = [
            f"{dtype} [{', '.join(map(str, ('rows', *shape)))}]"
            for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        ]
        if self.kind == "tensor":
            return leaves[0]
        return f"a {self.kind} of " + ", ".join(f"{n}: {leaf}" for n, leaf in zip(self.names, leaves, strict=True))


@dataclass(frozen=True, kw_only=True)
class CutPoint:
    """A place in the backbone that exactly one computed tensor crosses.

    ``module`` and ``call`` (0-based) name the module call it ends (``port="out"``) or enters (``"in"``), ``leaf``
    the tensor among that call's flattened inputs or outputs. ``port="call"`` is a function inside the module:
    ``function`` is called for the ``leaf``-th time in that module call. ``macs_before`` is per sample. ``channel_dim``
    is the feature axis of the crossing tensor (1 for NCHW maps, -1 for tokens, vectors and channels-last maps);
    ``mask`` is the input that says which tokens are real, if any.
    """

    name: str
    module: str
    call: int
    port: Port
    leaf: int = 0
    function: str = ""
    aliases: tuple[str, ...] = ()
    macs_before: int
    shape: tuple[int, ...]
    channel_dim: int = 1
    side_inputs: tuple[str, ...] = ()
    mask: str = ""

    @property
    def layout(self) -> Layout:
        """``vector`` for [B, D], ``tokens`` for [B, T, D], ``map`` for everything with spatial axes."""
        if len(self.shape) == 1:
            return "vector"
        return "tokens" if len(self.shape) == 2 and self.channel_dim == -1 else "map"


@dataclass(frozen=True, kw_only=True)
class ClassifierSpec:
    """The size of one internal classifier: everything that its weights' shapes follow from, and what it costs.

    ``grid`` is the pooled spatial size (empty for tokens and vectors), ``views`` how many reductions of the tensor
    are mixed, ``features`` their length D, ``hidden`` the width of the hidden layer (0: none), ``rank`` the width
    of a low-rank linear path (0: full), ``fed`` whether it reads the previous exit's log-probabilities, ``fed_hidden``
    the width of the previous hidden layer that it also reads (0: none).
    """

    kind: str
    layout: Layout
    channel_dim: int
    shape: tuple[int, ...]
    num_classes: int
    grid: tuple[int, ...] = ()
    views: int = 1
    features: int
    hidden: int = 0
    rank: int = 0
    fed: bool = False
    fed_hidden: int = 0
    macs: int
    params: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where a backbone is cut and what sits there: data without weights. ``print(plan)`` is a table of its exits.

    ``candidates`` are all cut points found, in order of depth; ``via`` says whether they come from the exported
    graph or, where export failed for ``reason``, from checked module outputs.
    """

    model: str
    inputs: InputSignature
    num_classes: int
    total_macs: int
    total_params: int
    cuts: tuple[CutPoint, ...]
    classifiers: tuple[ClassifierSpec, ...]
    candidates: tuple[CutPoint, ...]
    via: Literal["export", "modules"] = "export"
    reason: str = ""
    factory: Callable[[tuple[int, ...], int], nn.Module] | None = field(default=None, compare=False, repr=False)

    @property
    def exit_names(self) -> tuple[str, ...]:
        """Names of all exits, the backbone's own answer last under the name ``full``."""
        return (*(cut.name for cut in self.cuts), "full")

    @property
    def cost_E(self) -> tuple[float, ...]:
        """Share of the backbone's macs spent when stopping at each exit, all ICs passed included."""
        own = [0]
        for spec in self.classifiers:
            own.append(own[-1] + spec.macs)
        before = [cut.macs_before for cut in self.cuts] + [self.total_macs]
        paid = [*own[1:], own[-1]]
        return tuple((b + p) / self.total_macs for b, p in zip(before, paid, strict=True))

    def __str__(self) -> str:
        rows = [("exit", "shape", "macs before", "cost", "classifier", "IC macs", "IC params")]
        for cut, spec, cost in zip(self.cuts, self.classifiers, self.cost_E[:-1], strict=True):
            rows.append(
                (
                    cut.name,
                    "x".join(map(str, cut.shape)),
                    f"{cut.macs_before:,}",
                    f"{cost:.3f}",
                    spec.kind,
                    f"{spec.macs:,} ({spec.macs / self.total_macs:.2%})",
                    f"{spec.params:,} ({spec.params / max(self.total_params, 1):.2%})",
                )
            )
        rows.append(("full", str(self.num_classes), f"{self.total_macs:,}", f"{self.cost_E[-1]:.3f}", "", "", ""))
        head = f"{self.model}: {self.total_macs:,} macs, {self.total_params:,} parameters, "
        head += f"{len(self.candidates)} cut points found via {self.via}"
        return head + (f" ({self.reason})" if self.reason else "") + "\n" + table(rows)


@dataclass(frozen=True, kw_only=True, eq=False)
class ConfusionReference:
    """How far the exits usually disagree: moments of d[e, i] = L1 distance of exit i's softmax to exit e's.

    Kept per pair, not per sum, so that the score of any subset of exits can be standardised exactly:
    ``mean_EE[e, i]`` and ``covariance_EEE[e, i, j]`` over the reference rows.
    """

    mean_EE: Tensor
    covariance_EEE: Tensor

    def moments(self, stop: int, asked: Tensor) -> tuple[float, float]:
        """Mean and standard deviation of the raw confusion when stopping at ``stop``, over ``asked`` [E] exits."""
        chosen = asked[: stop + 1].nonzero().flatten()
        mean = self.mean_EE[stop, chosen].sum()
        variance = self.covariance_EEE[stop][chosen][:, chosen].sum()
        return float(mean), float(variance.clamp_min(0).sqrt())

    def first(self, exits: int) -> ConfusionReference | None:
        """The moments of the first ``exits`` exits; None where fewer are known, as before a second look was fitted."""
        if exits > len(self.mean_EE):
            return None
        covariance_EEE = self.covariance_EEE[:exits, :exits, :exits]
        return ConfusionReference(mean_EE=self.mean_EE[:exits, :exits], covariance_EEE=covariance_EEE)


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """What every exit said about every sample: tensors on the CPU, the waist between running and thinking.

    ``Trace(logits_ENC=, labels_N=, cost_E=)`` suffices. ``full_exit`` names the backbone's own answer (default: the
    last exit); everything that speaks of the end reads exits up to it. ``own_cost_E`` is each IC's own share of
    the cost and ``feeds_EE[i, j]`` says that exit j's IC reads exit i's answer; without them everything passed is
    paid. ``hash_N`` identifies rows, ``trained_N`` marks rows the ICs trained on. Raises ``DataError``.
    """

    logits_ENC: Tensor
    labels_N: Tensor
    cost_E: Tensor
    full_exit: int = -1
    own_cost_E: Tensor | None = None
    feeds_EE: Tensor | None = None
    hash_N: Tensor | None = None
    trained_N: Tensor | None = None
    confusion_reference: ConfusionReference | None = None
    exit_names: tuple[str, ...] = ()
    info: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "cost_E", torch.as_tensor(self.cost_E, dtype=torch.float64))
        if self.logits_ENC.ndim != 3 or not self.logits_ENC.is_floating_point():
            found = f"{self.logits_ENC.dtype} {tuple(self.logits_ENC.shape)}"
            raise DataError(f"logits_ENC must be floating [exits, samples, classes], found {found}.")
        exits, samples, classes = self.logits_ENC.shape
        if exits == 0 or samples == 0 or classes < 2:
            raise DataError(f"A trace needs an exit, a sample and two classes; found {(exits, samples, classes)}.")
        labels = self.labels_N
        if not isinstance(labels, Tensor):
            raise DataError(f"labels_N must be {samples} integers, found {labels!r}: a trace needs labels.")
        if labels.shape != (samples,) or labels.is_floating_point() or labels.dtype == torch.bool:
            raise DataError(f"labels_N must be {samples} integers, found {labels.dtype} {tuple(labels.shape)}.")
        if int(labels.min()) < 0 or int(labels.max()) >= classes:
            low, high = int(labels.min()), int(labels.max())
            raise DataError(f"Labels must lie in 0..{classes - 1}, found {low}..{high}.")
        if self.cost_E.shape != (exits,) or not bool(torch.isfinite(self.cost_E).all()):
            raise DataError(f"cost_E must be {exits} finite shares, found {self.cost_E.tolist()}.")
        if exits > 1 and bool((self.cost_E.diff() < 0).any()):
            raise DataError(f"Costs must not fall along the exits, found {self.cost_E.tolist()}.")
        full = self.full_exit + exits if self.full_exit < 0 else self.full_exit
        if not 0 <= full < exits:
            raise DataError(f"full_exit {self.full_exit} is not one of {exits} exits.")
        shapes = {"own_cost_E": (exits,), "feeds_EE": (exits, exits), "hash_N": (samples,), "trained_N": (samples,)}
        for name, shape in shapes.items():
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != shape:
                raise DataError(f"{name} must have the shape {shape}, found {tuple(value.shape)}.")
        if self.exit_names and len(self.exit_names) != exits:
            raise DataError(f"{exits} exits need {exits} names, found {self.exit_names}.")
        put(self, "full_exit", full)
        put(self, "labels_N", labels.to(torch.int64))
        if not self.exit_names:
            put(self, "exit_names", tuple("full" if e == full else f"exit{e}" for e in range(exits)))

    @property
    def num_exits(self) -> int:
        """E, the backbone's own answer included."""
        return self.logits_ENC.shape[0]

    @property
    def trained_share(self) -> float:
        """The share of rows that the ICs are known to have trained on."""
        return 0.0 if self.trained_N is None else float(self.trained_N.double().mean())

    @property
    def num_samples(self) -> int:
        """N."""
        return self.logits_ENC.shape[1]

    @property
    def num_classes(self) -> int:
        """C."""
        return self.logits_ENC.shape[2]

    def rows(self, index: Tensor) -> Trace:
        """The same trace of the samples ``index`` (positions, possibly repeated, or a boolean mask)."""

        def pick(rows_N: Tensor | None) -> Tensor | None:
            return None if rows_N is None else rows_N[index]

        return dataclasses.replace(
            self,
            logits_ENC=self.logits_ENC[:, index],
            labels_N=self.labels_N[index],
            hash_N=pick(self.hash_N),
            trained_N=pick(self.trained_N),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file; an existing file is replaced only by a complete one."""
        tensors = {"logits_ENC": self.logits_ENC, "labels_N": self.labels_N, "cost_E": self.cost_E}
        for name in ("own_cost_E", "feeds_EE", "hash_N", "trained_N"):
            value = getattr(self, name)
            if value is not None:
                tensors[name] = value
        if self.confusion_reference is not None:
            tensors["confusion_mean_EE"] = self.confusion_reference.mean_EE
            tensors["confusion_covariance_EEE"] = self.confusion_reference.covariance_EEE
        about = {
            "format": TRACE_FORMAT,
            "full_exit": self.full_exit,
            "exit_names": list(self.exit_names),
            "info": dict(self.info),
        }
        write_tensors(Path(path), tensors, {"shallowdeep_trace": json.dumps(about)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Read what ``save`` wrote, memory-mapped. Raises ``FormatError``."""
        tensors, metadata = read_tensors(Path(path))
        if "shallowdeep_trace" not in metadata:
            raise FormatError(f"{path} holds tensors but is not a trace; make one with `sdn collect`.")
        try:
            return cls._read(tensors, json.loads(metadata["shallowdeep_trace"]))
        except FormatError as error:
            raise FormatError(f"{path} {error}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{path} is damaged: {error}") from None

    @classmethod
    def _read(cls, tensors: dict[str, Tensor], about: Mapping[str, Any]) -> Trace:
        if about["format"] > TRACE_FORMAT:
            raise FormatError(f"has trace format {about['format']}; this version reads up to {TRACE_FORMAT}.")
        missing = [name for name in ("logits_ENC", "labels_N", "cost_E") if name not in tensors]
        if missing:
            raise FormatError(
                f"holds no {', '.join(missing)}: a trace is what exits said of rows whose labels are known."
            )
        mean, covariance = tensors.pop("confusion_mean_EE", None), tensors.pop("confusion_covariance_EEE", None)
        reference = None
        if mean is not None and covariance is not None:
            reference = ConfusionReference(mean_EE=mean, covariance_EEE=covariance)
        return cls(
            logits_ENC=tensors["logits_ENC"],
            labels_N=tensors["labels_N"],
            cost_E=tensors["cost_E"],
            own_cost_E=tensors.get("own_cost_E"),
            feeds_EE=tensors.get("feeds_EE"),
            hash_N=tensors.get("hash_N"),
            trained_N=tensors.get("trained_N"),
            full_exit=about["full_exit"],
            exit_names=tuple(about["exit_names"]),
            info=about["info"],
            confusion_reference=reference,
        )


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What stopping at each exit costs, in macs per sample: ``before_macs_E`` in the backbone, ``own_macs_E`` per
    IC.
    """

    exit_names: tuple[str, ...]
    before_macs_E: tuple[int, ...]
    own_macs_E: tuple[int, ...]
    params_E: tuple[int, ...]
    total_macs: int
    total_params: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """What a policy does with every sample of a trace: where computing stops, what is answered, what it cost.

    ``exit_N`` is where computing stopped, ``labels_N`` and ``logits_NC`` the answer (under the fallback
    ``most_confident`` possibly an earlier exit's), ``confidence_N`` the answer's max-softmax, ``confusion_N`` how
    far the exits asked disagree with it (standardised when the trace carries a reference, else raw), ``alarm_N`` how
    probably it is wrong (None without an alarm).
    """

    exit_N: Tensor
    labels_N: Tensor
    logits_NC: Tensor
    cost_N: Tensor
    confidence_N: Tensor
    confusion_N: Tensor
    alarm_N: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """What an engine returns for a batch; fields as in ``Outcome``, ``valid_B`` False where an answer is not finite,
    ``capped_B`` True where a limit of the call ended the walk before the policy did, ``alarm_B`` None without an alarm.
    """

    labels_B: Tensor
    logits_BC: Tensor
    exit_B: Tensor
    confidence_B: Tensor
    confusion_B: Tensor
    cost_B: Tensor
    valid_B: Tensor
    capped_B: Tensor
    alarm_B: Tensor | None = None


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Aligned plain text: the first row is the head, the first column is left-aligned.

    On a terminal, or where ``COLUMNS`` is set, it is made to fit: cells are wrapped between words, the head's first;
    where that is not enough the columns go on in a second table below.
    """
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    words = [max(len(word) for cell in column for word in cell.split(" ")) for column in columns]
    heads = [max(len(cell) for cell in (*head.split(" "), *body)) for head, *body in columns]
    room = shutil.get_terminal_size((sys.maxsize, 0)).columns
    fits = max(2, sum(end <= room for end in itertools.accumulate(words, lambda end, word: end + 2 + word)))
    if fits < len(columns):
        parts = columns[:fits], [columns[0], *columns[fits:]]
        return "\n\n".join(table(list(zip(*part, strict=True))) for part in parts)
    for least in (heads, words):
        while sum(widths) + 2 * (len(widths) - 1) > room and (
            loose := [i for i, w in enumerate(widths) if w > least[i]]
        ):
            widths[max(loose, key=widths.__getitem__)] -= 1
    head, *body = ["\n".join(_lines(row, widths)) for row in rows]
    rule = "-" * max(len(line) for text in (head, *body) for line in text.split("\n"))
    return "\n".join((head, rule, *body))


def _lines(row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    """One row of a table, wrapped to ``widths``."""
    cells = zip(row, widths, strict=True)
    wrapped = [textwrap.wrap(cell, w, break_on_hyphens=False) if len(cell) > w else [cell] for cell, w in cells]
    for name, *others in itertools.zip_longest(*wrapped, fillvalue=""):
        right = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        yield "  ".join((name.ljust(widths[0]), *right)).rstrip()
