"""Early exits against the fastest whole network on this machine, in seconds, on real rows.

It refuses to choose: it measures what it is given, all contenders in turn in one run, and says what came out.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from shallowdeep.costs import exits_of
from shallowdeep.cuts import distinct_rows, find_cuts
from shallowdeep.graph import told
from shallowdeep.inputs import (
    Inputs,
    as_inputs,
    check_labels,
    each,
    in_order,
    num_rows,
    signature_of,
    take,
    tensors,
)
from shallowdeep.network import ShallowDeepNetwork
from shallowdeep.policies import Confidence, Fixed, Policy
from shallowdeep.progress import steps as shown
from shallowdeep.runs import describe_device
from shallowdeep.runtime.backends import Array, Backend, BackendName, reduced, usual
from shallowdeep.runtime.engine import Engine
from shallowdeep.runtime.programs import make_backend
from shallowdeep.spelling import rule_to_json
from shallowdeep.steps import Joined, make_steps, named
from shallowdeep.taps import check_audible
from shallowdeep.timing import percentiles, quartiles, threads_of_torch
from shallowdeep.types import DataError, Plan
from shallowdeep.views import Look, SecondLook, second_look_of

PARTS = ("full", "every", "twice")
"""The whole network alone, with all ICs asked, and with a second look behind them."""
LEAST_EARLY = 0.2
"""Under this share of early answers there is no efficiency to speak of."""
LEAST_GAIN = 1.02
"""Under this speedup early exits are not said to pay, unless three blocks in four are faster."""
NEAR = 0.01
"""How much less accurate the network cut at an exit may be to be spoken of as a rival."""
ROWS_A_BLOCK = 32
"""Least rows that a contender answers before it is the next one's turn."""
Call = Callable[[Inputs], object]
Facts = dict[str, Any]


class Way(NamedTuple):
    """One way of answering rows: ``what`` is "early", one of ``PARTS``, "cut EXIT" or the name of a rival."""

    backend: BackendName
    what: str


class Times(NamedTuple):
    """Milliseconds: of the first call, of every later call, and of every block of rows."""

    first: float
    calls: list[float]
    blocks: list[float]


def bench(
    sdn: ShallowDeepNetwork,
    policy: Policy,
    rows: tuple[Inputs, Tensor],
    *,
    backends: Sequence[BackendName] = (),
    batch_sizes: Sequence[int] = (1, 8, 64, 256),
    threads: Sequence[int] = (1, 2),
    blocks: int = 12,
    rivals: Mapping[str, nn.Module] | None = None,
    second_look: Look = None,
    seed: int = 0,
) -> Facts:
    """Milliseconds of the whole network, of early exits, of the network cut at each exit asked and of ``rivals`` (other
    networks for the same inputs, on the same device), on every backend, batch size and number of threads. Returns
    JSON-able facts.

    Without ``backends`` they are "torch", "onnxruntime" and "openvino", those that are installed, on a GPU "torch" and
    "torch-compile". ``rows`` are real inputs with labels [N]; noise leaves where nothing real does. They are on the
    device before the clock runs. Every block gives the same rows to all in shuffled order; ratios are of blocks: their
    median and quartiles. The whole network and the cuts, with the ICs passed on the way, are compiled in one piece and
    do nothing else. With a ``second_look`` a row that looks twice is measured against the whole way and one pass more,
    and looking at every row twice, without ICs, is a rival. Raises ``ValueError`` for too few rows and choices that
    make no sense, ``DataError`` for rows, labels or rivals that do not fit the SDN.
    """
    look = second_look_of(second_look)
    exits = exits_of(sdn, look)
    inputs, labels_N = _checked(sdn, *rows)
    backends = _backends(backends, inputs)
    _check_choices(num_rows(inputs), batch_sizes, threads, blocks)
    pieces = _pieces(sdn, policy, take(inputs, slice(0, 2)), rivals or {}, look)
    first, accuracy = backends[0], dict[Way, float]()
    answers: dict[BackendName, dict[str, Tensor]] = {}
    found: list[Facts] = []
    for count in threads:
        with threads_of_torch(count):
            engines, ways = _ways(sdn, policy, inputs, pieces, backends, max(batch_sizes), count, look)
            answers = answers or {name: _answers(engine, inputs) for name, engine in engines.items()}
            accuracy = accuracy or _accuracies(ways, first, inputs, labels_N)
            for size in batch_sizes:
                order = random.Random(f"{seed} {count} {size}")
                used_N, times = _in_turn(ways, inputs, size, blocks, order)
                for name, said in answers.items():
                    summed = _summed_up(said, labels_N, exits.full_exit)
                    figures = _facts(name, count, size, times, said["exit"][used_N], exits.full_exit)
                    found.append({"accuracy_full": accuracy[Way(name, "full")], **summed, **figures})
    return {
        "device": describe_device(),
        "rows": num_rows(inputs),
        "blocks": blocks,
        "exits_asked": [name for name, on in zip(exits.exit_names, exits.rule(policy).asked, strict=True) if on],
        "policy": rule_to_json(policy),
        "accuracy_full": accuracy[Way(first, "full")],
        "accuracy_others": {way.what: share for way, share in accuracy.items() if way.what not in PARTS},
        **_summed_up(answers[first], labels_N, exits.full_exit),
        "measured": found,
    }


def _checked(sdn: ShallowDeepNetwork, inputs: object, labels: object) -> tuple[Inputs, Tensor]:
    """The rows on the network's device, and their labels."""
    planned, device = sdn.plan.inputs, next(sdn.parameters()).device
    found = in_order(as_inputs(inputs), planned.names)
    if not signature_of(found).like(planned):
        raise DataError(f"{sdn.plan.model} takes {planned}, found {signature_of(found)}.")
    labels_N = check_labels(labels, num_rows(found), sdn.plan.num_classes).cpu()
    return each(found, lambda tensor: tensor.to(device)), labels_N


def _backends(names: Sequence[BackendName], inputs: Inputs) -> Sequence[BackendName]:
    possible = [name for name in get_args(BackendName) if name != "auto"]  # which is one of the others
    for name in names:
        if name not in possible:
            raise ValueError(f"No backend {name!r} to measure. Possible: {', '.join(map(repr, possible))}.")
    return names or usual(tensors(inputs)[0].device)


def _check_choices(rows: int, batch_sizes: Sequence[int], threads: Sequence[int], blocks: int) -> None:
    for what, numbers in (("batch_sizes", batch_sizes), ("threads", threads)):
        if not numbers or min(numbers) < 1:
            raise ValueError(f"{what} are one number or more, each at least 1, found {tuple(numbers)}.")
    needed = max(map(_block, batch_sizes))
    if rows < needed or blocks < 2:
        raise ValueError(
            f"Blocks of batches of {max(batch_sizes)} need {needed} rows, and quartiles two blocks; "
            f"found {rows} rows and {blocks} blocks."
        )


def _pieces(
    sdn: ShallowDeepNetwork, policy: Policy, example: Inputs, rivals: Mapping[str, nn.Module], look: SecondLook | None
) -> dict[str, Joined]:
    """What is compiled in one piece, by its name."""
    full, asked = sdn.num_exits - 1, exits_of(sdn, look).rule(policy).asked
    pieces = {"full": Joined(make_steps(sdn, Fixed(exit=full), example))}
    twice = "" if look is None else f"{look.name} every row"
    for name, model in rivals.items():
        if name in ("early", *PARTS, twice) or name.startswith("cut "):
            raise ValueError(f"{name!r} is what bench calls one of its own ways: give the rival another name.")
        pieces[name] = _whole(name, model, example, sdn.plan.num_classes)
    if look is not None:
        pieces[twice] = Joined(make_steps(sdn, Fixed(exit=full + 1), example, look))
    steps = make_steps(sdn, Confidence(threshold=math.inf, enabled_E=asked), example, look)
    for place, step in enumerate(steps):
        what = f"cut {step.exit}" if step.exit < full else PARTS[step.exit - full + 1]
        pieces[what] = Joined(steps[: place + 1])
    return pieces


def _whole(name: str, model: nn.Module, example: Inputs, num_classes: int) -> Joined:
    """The rival ``model`` in one piece: a network without exits needs no cut points."""
    if not isinstance(model, nn.Module):
        raise DataError(f"The rival {name!r} must be an nn.Module, found {type(model).__name__}.")
    check_audible(model)
    try:
        found = find_cuts(model, distinct_rows(example))
    except (RuntimeError, TypeError, IndexError) as error:
        raise DataError(f"The rival {name!r} does not take {signature_of(example)}: {told(error)}.") from error
    if found.num_classes != num_classes:
        raise DataError(f"The rival {name!r} answers {found.num_classes} classes, the SDN {num_classes}.")
    uncut = Plan(
        model=type(model).__name__,
        inputs=signature_of(example),
        num_classes=num_classes,
        total_macs=max(found.total_macs, 1),
        total_params=0,
        cuts=(),
        classifiers=(),
        candidates=(),
    )
    return Joined(make_steps(ShallowDeepNetwork(model, uncut, ()), Fixed(exit=0), example))


def _ways(
    sdn: ShallowDeepNetwork,
    policy: Policy,
    inputs: Inputs,
    pieces: Mapping[str, Joined],
    backends: Sequence[BackendName],
    largest: int,
    threads: int,
    look: SecondLook | None,
) -> tuple[dict[BackendName, Engine], dict[Way, Call]]:
    """Early exits on every backend, and these and all others as functions of a batch."""
    ways: dict[Way, Call] = {}
    engines: dict[BackendName, Engine] = {}
    for name in shown(backends, f"make, threads {threads}", len(backends)):
        backend = make_backend(name, next(sdn.parameters()).device, threads)
        for what, piece in pieces.items():
            ways[Way(name, what)] = _bare(backend, piece, inputs)
        early = Engine(sdn, policy, second_look=look, backend=name, threads=threads)
        if sum(exits_of(sdn, look).rule(policy).asked) > 1:
            sizes = [2**power for power in range(largest.bit_length()) if 2**power <= largest]
            early.measure(take(inputs, slice(0, largest)), sizes=sizes, rounds=3)
        engines[name], ways[Way(name, "early")] = early, _waited(early, backend)
    return engines, ways


def _waited(engine: Engine, backend: Backend) -> Call:
    """``engine`` as a function of a batch that ends when the device has."""

    def call(batch: Inputs) -> None:
        engine(batch)
        backend.wait()

    return call


def _bare(backend: Backend, piece: Joined, inputs: Inputs) -> Call:
    """``piece`` as a function of a batch, to what it gives last: its logits."""
    example = named(signature_of(inputs).names, take(inputs, slice(0, 2)))
    places = [[*example].index(name) for name in piece.takes]
    with torch.no_grad():
        run = backend.compile(piece, [example[name] for name in piece.takes])

    def call(batch: Inputs) -> Array:
        leaves = tensors(batch)
        found = run([backend.enter(leaves[place]) for place in places])
        backend.wait()
        return found[-1]

    return call


def _in_turn(
    ways: Mapping[Way, Call], inputs: Inputs, size: int, blocks: int, order: random.Random
) -> tuple[Tensor, dict[Way, Times]]:
    """The rows used, and every way's times with batches of ``size``."""
    rows = _block(size)
    times = {way: Times(_ms(call, take(inputs, slice(0, size))), [], []) for way, call in ways.items()}
    used: list[int] = []
    for block in shown(range(blocks), f"batches of {size}", blocks):
        start = block * rows % (num_rows(inputs) - rows + 1)
        used += range(start, start + rows)
        batches = [take(inputs, slice(i, i + size)) for i in range(start, start + rows, size)]
        shuffled = list(ways.items())
        order.shuffle(shuffled)
        for way, call in shuffled:
            _ms(call, batches[0])  # wakes the caches
            spent = [_ms(call, batch) for batch in batches]
            times[way].calls.extend(spent)
            times[way].blocks.append(sum(spent) / len(batches))
    return torch.tensor(used), times


def _block(size: int) -> int:
    """Rows of a block of batches of ``size``."""
    return max(size, ROWS_A_BLOCK - ROWS_A_BLOCK % size)


def _ms(call: Call, batch: Inputs) -> float:
    start = time.perf_counter()
    call(batch)
    return 1e3 * (time.perf_counter() - start)


def _facts(name: BackendName, threads: int, size: int, times: Mapping[Way, Times], exit_N: Tensor, full: int) -> Facts:
    """The figures of one backend, batch size and number of threads; milliseconds are of a batch."""
    peers = [way for way in times if way.what == "full" and reduced(way.backend) == reduced(name)]
    best = min(peers, key=lambda way: statistics.median(times[way].blocks))
    early, whole = times[Way(name, "early")], times[best]
    ratios = [a / b for a, b in zip(whole.blocks, early.blocks, strict=True)]
    others = {way.what: statistics.median(found.blocks) for way, found in times.items() if way.backend == name}
    early_ms, best_ms = others.pop("early"), statistics.median(whole.blocks)
    cut_ms = {int(what[4:]): ms for what, ms in others.items() if what.startswith("cut ")}
    cut_ms |= {full + again: others[what] for again, what in enumerate(PARTS[1:]) if what in others}
    exits, counts = torch.unique(exit_N, return_counts=True)
    ideal_ms = sum(cut_ms[exit] * n for exit, n in zip(exits.tolist(), counts.tolist(), strict=True)) / len(exit_N)
    share_early = float((exit_N < full).double().mean())
    low, speedup, high = quartiles(ratios)
    return {
        "backend": name,
        "batch_size": size,
        "threads": threads,
        "full_ms": others["full"],
        "best_full_backend": best.backend,
        "best_full_ms": best_ms,
        "early_exit_ms": early_ms,
        "early_exit_ms_percentiles": percentiles(early.calls),
        "full_ms_percentiles": percentiles(times[Way(name, "full")].calls),
        "rows_per_second": 1e3 * size / early_ms,
        "warm_up_ms": early.first,
        "speedup": speedup,
        "speedup_quartiles": [low, high],
        "ideal_speedup": best_ms / ideal_ms,
        "efficiency": speedup * ideal_ms / best_ms if share_early >= LEAST_EARLY else None,
        "share_early": share_early,
        "other_ms": others,
    }


def _named(other: str) -> str:
    return f"the network cut at exit {other[4:]}" if other.startswith("cut ") else other


def _answers(engine: Engine, inputs: Inputs) -> dict[str, Tensor]:
    starts = range(0, num_rows(inputs), 256)
    found = [engine(take(inputs, slice(i, i + 256))) for i in shown(starts, "answer rows", len(starts))]
    parts = [(answer.exit_B.cpu(), answer.labels_B.cpu(), answer.cost_B.cpu()) for answer in found]
    return dict(zip(("exit", "label", "cost"), map(torch.cat, zip(*parts, strict=True)), strict=True))


def _summed_up(said: Mapping[str, Tensor], labels_N: Tensor, full: int) -> Facts:
    """What a backend's answers to all rows say."""
    right, cost = (said["label"] == labels_N).double().mean(), said["cost"].mean()
    return {
        "accuracy_early_exit": float(right),
        "mean_cost": float(cost),
        "ideal_speedup_macs": float(1 / cost),
        "share_early": float((said["exit"] < full).double().mean()),
        "share_twice": float((said["exit"] > full).double().mean()),
    }


def _accuracies(ways: Mapping[Way, Call], first: BackendName, inputs: Inputs, labels_N: Tensor) -> dict[Way, float]:
    """Of the whole network on every backend, of what else there is on the ``first``; early exits know their own."""
    found = {}
    for way, call in ways.items():
        if way.what == "early" or (way.what != "full" and way.backend != first):
            continue
        parts = [torch.as_tensor(call(take(inputs, slice(i, i + 256)))) for i in range(0, num_rows(inputs), 256)]
        found[way] = float((torch.cat(parts).argmax(1).cpu() == labels_N).double().mean())
    return found


def verdict(found: Facts) -> str:
    """What the figures say, in words: a line per batch size and number of threads."""
    lines = []
    keys = sorted({(one["batch_size"], one["threads"]) for one in found["measured"]})
    for size, threads in keys:
        here = [one for one in found["measured"] if (one["batch_size"], one["threads"]) == (size, threads)]
        best = max(here, key=lambda one: one["speedup"])
        low, high = best["speedup_quartiles"]
        drop = 100 * (best["accuracy_full"] - best["accuracy_early_exit"])
        line = (
            f"batch {size}, {threads} threads: {best['speedup']:.2f}x ({low:.2f} to {high:.2f}) at {drop:.2f} points, "
        )
        line += f"{best['backend']} against the whole network on {best['best_full_backend']}"
        if best["share_early"] == best["share_twice"] == 0:
            line += ": the policy always runs the whole network, which alone would do"
        elif best["speedup"] < LEAST_GAIN and low < 1:
            line += ": early exits do not pay here, run the whole network"
        for other, accuracy in found["accuracy_others"].items():
            ms = min(one["other_ms"][other] for one in here)
            far = other.startswith("cut ") and accuracy < best["accuracy_early_exit"] - NEAR
            if ms < best["early_exit_ms"] and not far:
                line += f"; where {accuracy:.1%} is enough, {_named(other)} is faster"
        lines.append(line + ".")
    return "\n".join(lines)
