"""Where a backbone can be cut: every place that one computed tensor crosses, its name, its cost, and the plan.

It refuses to know weights of classifiers, data and policies. The source of truth is the exported graph; where
export fails, module outputs are tried one by one (see ``modules_as_cuts``).
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from shallowdeep.classifiers import Factory, size_classifier
from shallowdeep.graph import BackboneGraph, Crossing, Values, evaluating, export_graph, is_identity, operator_name
from shallowdeep.inputs import (
    Inputs,
    as_inputs,
    call,
    each,
    logits_of,
    mask_name,
    num_rows,
    signature_of,
    take,
    tensors,
)
from shallowdeep.taps import Scope, check_audible, counting_functions, listening, tapped
from shallowdeep.types import ClassifierSpec, CutError, CutPoint, DataError, InputSignature, Plan, Port

FRACTIONS = (0.15, 0.30, 0.45, 0.60, 0.75, 0.90)
LEAST_AFTER = 0.02
"""A cut with a smaller share of the macs behind it saves nothing."""
FEWEST = 4
"""Rows of an example that tell whether rows mix."""

# Exporting costs seconds, and a plan is soon followed by engines; the graph goes when the model goes.
_known: WeakKeyDictionary[nn.Module, tuple[InputSignature, Cuts]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Cuts:
    """All cut points of a backbone in order of depth, with the graph and its crossings where export works."""

    points: tuple[CutPoint, ...]
    total_macs: int
    num_classes: int
    graph: BackboneGraph | None
    crossings: tuple[Crossing, ...]
    reason: str = ""


def plan(
    model: nn.Module,
    example: object,
    *,
    at: Sequence[float | str] = FRACTIONS,
    classifier: Literal["strong", "paper"] | Factory = "strong",
) -> Plan:
    """The exits a backbone can have, as data: chosen cut points, shapes, macs and classifiers; print it.

    ``example`` is one batch as the model is called with it: a tensor, a tuple or a dict of tensors, rows first.
    ``at`` are fractions of the backbone's macs (the nearest cut point is taken; two fractions on one cut give one
    exit) or names of cut points. ``classifier`` is ``"strong"``, ``"paper"`` (arXiv 1810.07052, section 4) or a
    function ``(shape, num_classes) -> module`` where the module maps a tensor of that shape to logits. The model is
    not changed. Raises ``CutError`` when there is no such cut point, ``DataError`` for a model that is no classifier.

    >>> import torch, shallowdeep as sd
    >>> net = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)), torch.nn.Linear(8, 3))
    >>> [cut.name for cut in sd.plan(net, torch.zeros(1, 8), at=(0.25, 0.5)).cuts]
    ['0:out', '1:out']
    """
    if not isinstance(model, nn.Module):
        raise DataError(f"plan takes an nn.Module, found {type(model).__name__}.")
    check_audible(model)
    if not all(bool(leaf.isfinite().all()) for leaf in tensors(as_inputs(example))):
        raise DataError("The example has numbers that are not finite; give real rows.")
    inputs = distinct_rows(as_inputs(example))
    found = find_cuts(model, inputs)
    if not found.points:
        raise CutError(
            f"No cut point in {type(model).__name__}: no place before its last layer is crossed by one tensor alone"
            + (f" (export failed: {found.reason})." if found.reason else ".")
            + f" A place has its rows first and at least {LEAST_AFTER:.0%} of the macs behind it; layers of one nn.LSTM"
            " or nn.GRU are computed in one call: make them modules of their own."
        )
    chosen = [_with_mask(cut, inputs) for cut in choose(found, at, type(model).__name__)]
    params = sum(p.numel() for p in model.parameters())
    kind, factory = (classifier, None) if isinstance(classifier, str) else ("custom", classifier)
    specs: list[ClassifierSpec] = []
    for cut in chosen:
        before = specs[-1] if specs else None
        specs.append(size_classifier(kind, cut, found.num_classes, found.total_macs, params, before, factory))
    return Plan(
        model=type(model).__name__,
        inputs=signature_of(inputs),
        num_classes=found.num_classes,
        total_macs=found.total_macs,
        total_params=params,
        cuts=tuple(chosen),
        classifiers=tuple(specs),
        candidates=found.points,
        via="export" if found.graph is not None else "modules",
        reason=found.reason,
        factory=factory,
    )


def _with_mask(cut: CutPoint, inputs: Inputs) -> CutPoint:
    return dataclasses.replace(cut, mask=mask_name(inputs, cut.shape[0])) if cut.layout == "tokens" else cut


def choose(found: Cuts, at: Sequence[float | str], model: str) -> list[CutPoint]:
    """The cut points that ``at`` asks for, in order of depth, each once."""
    if isinstance(at, (str, float, int)) or not at:
        raise CutError(f"`at` must be a sequence of fractions or names of cut points, found {at!r}.")
    picked: set[int] = set()
    for wish in at:
        if isinstance(wish, str):
            picked.add(_by_name(found.points, wish, model))
        elif 0 < wish < 1:
            shares = [abs(point.macs_before / found.total_macs - wish) for point in found.points]
            picked.add(shares.index(min(shares)))
        else:
            raise CutError(f"A fraction of the macs lies between 0 and 1, found {wish!r} in `at`.")
    return [found.points[i] for i in sorted(picked)]


def _by_name(points: Sequence[CutPoint], name: str, model: str) -> int:
    for i, point in enumerate(points):
        if name == point.name or name in point.aliases:
            return i
    names = [point.name for point in points]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    shown = ", ".join(names if len(names) <= 40 else [*names[:40], "..."])
    raise CutError(f"No cut point {name!r} in {model}. Cut points: {shown}. Nearest: {near[0]!r}.")


def find_cuts(model: nn.Module, inputs: Inputs) -> Cuts:
    """Every cut point of ``model`` for inputs like ``inputs``. Raises ``DataError`` when its rows are not
    independent.
    """
    with evaluating(model):
        whole = logits_of(call(model, inputs))
        if whole.shape[0] != num_rows(inputs):
            raise DataError(f"{num_rows(inputs)} rows in, {whole.shape[0]} rows of logits out.")
        part = logits_of(call(model, take(inputs, slice(1, None))))
    if not bool(whole.isfinite().all()):
        raise DataError(
            f"{type(model).__name__} gives logits that are not finite for the example, whose rows noise makes "
            f"different where there are fewer than {FEWEST} different ones: give as many real rows."
        )
    if not same(whole[1:], part):
        raise DataError(
            f"{type(model).__name__} answers a row differently when another row leaves the batch; "
            "early exits need rows that do not depend on each other."
        )
    classes = whole.shape[1]
    signature = signature_of(inputs)
    known = _known.get(model)
    if known is not None and known[0] == signature and _still_answers(known[1], model, inputs, whole):
        return known[1]
    if bool((whole >= 0).all()) and torch.allclose(whole.sum(1), torch.ones(()).to(whole), rtol=0.0, atol=1e-2):
        warnings.warn(
            f"{type(model).__name__} seems to end in a softmax: what it returns is taken for logits, of which the "
            "softmax makes nearly equal confidences. Leave it out, or return its logarithm.",
            stacklevel=3,
        )
    try:
        graph = export_graph(model, inputs)
        points, crossings = _graph_cuts(model, graph, inputs, whole)
    except Exception as error:  # whatever export trips over, modules can still be tried
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]
        points, total = modules_as_cuts(model, inputs)
        if "Constraints violated" in reason:
            reason = "it fixes the number of rows, as len(x) in a forward does where x.shape[0] does not"
        return Cuts(tuple(points), total, classes, None, (), reason)
    cuts = Cuts(tuple(points), graph.total_macs, classes, graph, tuple(crossings))
    _known[model] = (signature, cuts)
    return cuts


def _still_answers(cuts: Cuts, model: nn.Module, inputs: Inputs, logits: Tensor) -> bool:
    """Whether a graph made earlier, which shares the model's weights, still says what the model says."""
    assert cuts.graph is not None
    try:
        with evaluating(model):
            return same(fx.Interpreter(cuts.graph.module).run(*tensors(inputs)), logits)
    except (RuntimeError, TypeError, ValueError):  # the model has moved to another device or precision
        return False


def distinct_rows(inputs: Inputs, rows: int = FEWEST) -> Inputs:
    """``inputs`` repeated to at least ``rows`` rows, made different, so that mixing rows up cannot go unseen."""
    repeats = -(-rows // max(num_rows(inputs), 1))
    if num_rows(inputs) == 0:
        raise DataError("The example batch is empty; give at least one row.")
    generator = torch.Generator().manual_seed(0)

    def spread(tensor: Tensor) -> Tensor:
        tiled = tensor.repeat(repeats, *([1] * (tensor.ndim - 1)))[: max(rows, tensor.shape[0])]
        if tiled.is_floating_point():
            if len(tensor) >= rows and len(torch.unique(tensor, dim=0)) == len(tensor):
                return tensor
            noise = torch.randn(tiled.shape, generator=generator).to(tiled.device, tiled.dtype)
            return tiled + noise * tiled.std().clamp_min(0.1)
        if any(not torch.equal(tensor[0], row) for row in tensor[1:]):
            return tiled
        # Tokens and masks of one kind: the same values in another order stay valid.
        return torch.stack([row.roll(i, dims=-1) if row.ndim else row for i, row in enumerate(tiled)])

    return each(inputs, spread)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two answers agree up to rounding."""
    if a.shape != b.shape:
        return False
    a, b = a.double(), b.double()
    scale = float(a[a.isfinite()].abs().max()) if bool(a.isfinite().any()) else 0.0
    return bool(torch.allclose(a, b, rtol=1e-3, atol=1e-4 * max(scale, 1e-6), equal_nan=True))


# ---------------------------------------------------------------- the exported graph


def _graph_cuts(
    model: nn.Module, graph: BackboneGraph, inputs: Inputs, logits: Tensor
) -> tuple[list[CutPoint], list[Crossing]]:
    by_macs: dict[int, Crossing] = {}
    for crossing in graph.crossings():
        before = crossing.macs_before
        enough = 0 < before <= (1 - LEAST_AFTER) * graph.total_macs
        tensor = crossing.node.meta["val"]
        # Of nodes with equal macs the last is offered, after activation and pooling; a copy adds nothing.
        better = before not in by_macs or not is_identity(crossing.node)
        if enough and better and tensor.is_floating_point() and tensor.ndim >= 2:
            by_macs[before] = crossing
    with torch.no_grad(), evaluating(model):
        values = Values(graph.module, {c.node for c in by_macs.values()})
        if not same(values.run(*tensors(inputs)), logits):
            raise CutError("The exported graph answers otherwise than the network.")
        homes = _homes(model, inputs, values.kept)
    points, crossings = [], []
    for crossing in by_macs.values():
        found = homes.get(crossing.node)
        if found:
            points.append(_point(crossing, found))
            crossings.append(crossing)
    return points, crossings


def _point(crossing: Crossing, homes: list[CutPoint]) -> CutPoint:
    tensor = crossing.node.meta["val"]
    names = [home.name for home in homes]
    bare = [name.removesuffix(":out") for name in names if name.endswith(":out")]
    return dataclasses.replace(
        homes[0],
        aliases=tuple(dict.fromkeys(names + bare))[1:],
        macs_before=crossing.macs_before,
        shape=tuple(int(size) for size in tensor.shape[1:]),
        channel_dim=_channel_dim(crossing.node),
        side_inputs=tuple(side.name for side in crossing.sides),
    )


def _calls_of(node: fx.Node) -> list[tuple[str, int]]:
    """Module calls around a node, outermost first: the exporter writes the second call of ``a.b`` as ``a.b@1``."""
    calls = []
    for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
        _, _, again = key.partition("@")
        if path.startswith("backbone."):
            calls.append((path.removeprefix("backbone."), int(again or 0)))
    return calls


def _homes(model: nn.Module, inputs: Inputs, values: dict[fx.Node, Tensor]) -> dict[fx.Node, list[CutPoint]]:
    """For every crossing the ways to reach it in the user's own network, each seen to carry the same numbers."""
    suggested: dict[tuple[str, Port, int], list[fx.Node]] = {}
    for node in values:
        inside = _calls_of(node)
        users = [set(_calls_of(user)) for user in node.users]
        for path, count in inside:
            if all((path, count) not in calls for calls in users):
                suggested.setdefault((path, "out", count), []).append(node)
        for user in node.users:
            for path, count in _calls_of(user):
                if (path, count) not in inside:
                    suggested.setdefault((path, "in", count), []).append(node)
    heard: dict[tuple[fx.Node, str, str, int], int] = {}
    calls: Counter[str] = Counter()

    def hear(path: str, port: Port, count: int, value: Any) -> None:
        calls[path] = max(calls[path], count + 1)
        for node in suggested.get((path, port, count), []):
            for leaf, tensor in enumerate(pytree.tree_leaves(value)):
                if isinstance(tensor, Tensor) and tensor.shape == values[node].shape and same(tensor, values[node]):
                    heard.setdefault((node, path, port, count), leaf)

    with listening(model, {path for path, _, _ in suggested}, hear):
        call(model, inputs)
    homes: dict[fx.Node, list[CutPoint]] = {}
    for path, port, count in suggested:
        for node in suggested[path, port, count]:
            leaf = heard.get((node, path, port, count))
            if leaf is not None:
                name = f"{path}#{count + 1}:{port}" if calls[path] > 1 else f"{path}:{port}"
                point = CutPoint(
                    name=name,
                    module=path,
                    call=count,
                    port=port,
                    leaf=leaf,
                    macs_before=0,
                    shape=(),
                )
                homes.setdefault(node, []).append(point)
    for found in homes.values():
        found.sort(key=lambda point: point.port != "out")
    lost = {node: value for node, value in values.items() if node not in homes}
    if lost:
        homes.update(_functions(model, inputs, lost))
    return homes


def _functions(model: nn.Module, inputs: Inputs, lost: dict[fx.Node, Tensor]) -> dict[fx.Node, list[CutPoint]]:
    """Crossings between functions of one module: named by the nearest path and the function's count in it."""
    homes: dict[fx.Node, CutPoint] = {}
    local: Counter[tuple[str, str]] = Counter()
    for node in next(iter(lost)).graph.nodes:
        path, count = (_calls_of(node) or [("", 0)])[-1]
        function = operator_name(node).partition(".")[0]
        local[path, function] += 1
        if node in lost:
            name = f"{path}.{function}#{local[path, function]}".removeprefix(".")
            homes[node] = CutPoint(name=name, module=path, call=count, port="call", macs_before=0, shape=())
    found: dict[fx.Node, list[CutPoint]] = {}

    def hear(scope: Scope, name: str, count: int, result: Tensor) -> None:
        for node, home in homes.items():
            if scope == (home.module, home.call) and node not in found and same(result, lost[node]):
                found[node] = [dataclasses.replace(home, function=name, leaf=count)]
                return  # nodes and functions come in one order: equal numbers, as of a fresh block, do not confuse them

    functions = counting_functions({(home.module, home.call) for home in homes.values()}, hear)
    doors = listening(
        model, {home.module for home in homes.values()}, lambda path, port, n, _: functions.pass_door((path, n), port)
    )
    with doors, functions:
        call(model, inputs)
    return found


def _channel_dim(node: fx.Node) -> int:
    """1 where the next layer reads features from axis 1 (convolutions), -1 where it reads the last axis."""
    shape = node.meta["val"].shape
    if len(shape) == 2:
        return -1
    queue: list[tuple[fx.Node, list[int | None]]] = [(node, list(range(len(shape))))]
    seen = {node}
    while queue:
        current, axes = queue.pop(0)
        for user in current.users:
            moved = _follow(user, axes)
            if isinstance(moved, int):
                return 1 if moved == 1 else -1
            if moved is not None and user not in seen:
                seen.add(user)
                queue.append((user, moved))
    return shape_rule(tuple(int(size) for size in shape[1:]))


def _follow(user: fx.Node, axes: list[int | None]) -> list[int | None] | int | None:
    """Where the axes go in ``user``: the answer (an axis read as features), new positions, or None (lost)."""
    name = operator_name(user)
    read = None
    if any(part in name for part in ("conv", "batch_norm", "group_norm", "instance_norm")):
        read = axes[1]
    elif any(part in name for part in ("linear", "layer_norm", "addmm", "matmul", "bmm")):
        read = axes[-1]
    if read is not None:
        return read
    if name.startswith("permute"):
        return [axes[i] for i in user.args[1]]  # type: ignore[union-attr,index]
    if name.startswith("transpose"):
        moved, (_, a, b) = list(axes), user.args
        moved[a], moved[b] = moved[b], moved[a]  # type: ignore[index]
        return moved
    value = user.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    if value.ndim == len(axes):
        return axes
    # A view: leading axes up to the first that changes keep their place, and so does the last.
    return (
        [*axes[:2], *([None] * (value.ndim - 3)), axes[-1]]
        if value.ndim >= 3 and any(part in name for part in ("view", "reshape", "flatten"))
        else None
    )


def shape_rule(shape: tuple[int, ...]) -> int:
    """1 or -1 by the look of it: the odd one out of three axes is the features; tokens come last."""
    if len(shape) == 3 and shape[0] == shape[1] != shape[2]:
        return -1
    return 1 if len(shape) >= 3 else -1


# ---------------------------------------------------------------- module outputs, where export fails


def modules_as_cuts(model: nn.Module, inputs: Inputs) -> tuple[list[CutPoint], int]:
    """Module outputs where dropping rows leaves the other rows' answers unchanged, and the total macs.

    Macs are counted while the network really runs, attention in its plain form because fused kernels hide theirs.
    """
    paths = [path for path, module in model.named_modules() if path]
    rows = num_rows(inputs)
    seen: list[tuple[CutPoint, int]] = []
    followers: list[tuple[int, nn.Module]] = []
    modules = dict(model.named_modules())
    counts: Counter[str] = Counter()

    def hear(path: str, port: str, count: int, value: Any) -> None:
        counts[path] = max(counts[path], count + 1)
        if port == "in":
            followers.append((len(seen), modules[path]))
            return
        for leaf, tensor in enumerate(pytree.tree_leaves(value)):
            usable = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.ndim >= 2
            if usable and tensor.shape[0] == rows:
                shape, macs = tuple(tensor.shape[1:]), counter.get_total_flops() // 2 // rows
                point = CutPoint(
                    name=path, module=path, call=count, port="out", leaf=leaf, macs_before=macs, shape=shape
                )
                seen.append((point, len(seen)))
                break

    counter = FlopCounterMode(display=False)
    with evaluating(model), sdpa_kernel(SDPBackend.MATH), counter, listening(model, paths, hear):
        call(model, inputs)
    total = counter.get_total_flops() // 2 // rows
    points = []
    for macs, alike in itertools.groupby(seen, lambda one: one[0].macs_before):
        if not 0 < macs <= (1 - LEAST_AFTER) * total:
            continue
        # The last of them may be bypassed: the norm that the next block begins with.
        found = (one for one in reversed([*alike]) if _rows_may_leave(model, inputs, one[0]))
        for point, order in itertools.islice(found, 1):
            name = f"{point.module}#{point.call + 1}:out" if counts[point.module] > 1 else f"{point.module}:out"
            alias = name.removesuffix(":out")
            channel_dim = _next_layer(followers, order, point.shape)
            points.append(dataclasses.replace(point, name=name, aliases=(alias,), channel_dim=channel_dim))
    return points, total


def _rows_may_leave(model: nn.Module, inputs: Inputs, point: CutPoint) -> bool:
    keep = torch.tensor([i for i in range(num_rows(inputs)) if i != 1], device=tensors(inputs)[0].device)
    with evaluating(model):
        whole = logits_of(call(model, inputs))
        try:
            with tapped(model, [point], lambda _, tensor: tensor[keep]):
                part = logits_of(call(model, inputs))
        except Exception:  # a join with a tensor that kept all rows, a shape computed earlier: not a cut point
            return False
    return same(whole[keep], part)


def _next_layer(followers: list[tuple[int, nn.Module]], order: int, shape: tuple[int, ...]) -> int:
    convolutional = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)
    for position, module in followers:
        if position > order and len(shape) > 1:
            if isinstance(module, convolutional):
                return 1
            if isinstance(module, (nn.Linear, nn.LayerNorm, nn.MultiheadAttention)):
                return -1
    return shape_rule(shape)
