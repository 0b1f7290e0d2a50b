"""Reduced features of every cut point, computed once per view of the data and kept for many epochs.

It refuses to know what is trained on them. A view is one pass over the data: the clean one, or one draw of an
augmentation.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from shallowdeep.augment import Augment
from shallowdeep.files import FormatError, read_json, read_tensors, write_tensors, write_text
from shallowdeep.inputs import (
    Batches,
    Inputs,
    as_inputs,
    as_pair,
    batches,
    check_labels,
    each,
    example_of,
    mask_of,
    num_rows,
    placed,
    row_hashes,
    signature_of,
    take,
    tensors,
)
from shallowdeep.network import ShallowDeepNetwork, fingerprint
from shallowdeep.progress import steps
from shallowdeep.segments import Segment, cut_segments
from shallowdeep.types import CutError, DataError

Data: TypeAlias = Batches | tuple[Inputs, Tensor]
Cache: TypeAlias = Literal["auto", "memory", "disk", "off"]
Precision: TypeAlias = Literal["auto", "fp32", "bf16"]
CACHE_BYTES = 6 << 30
EXTRACT_BATCH = 256


@dataclass(frozen=True, eq=False)
class View:
    """Features of one pass: per exit [N, V, D], with the labels [N]."""

    features: list[Tensor]
    labels_N: Tensor


def seeded(*numbers: int) -> torch.Generator:
    """A generator that depends on all ``numbers``, so that (seed, epoch) says everything about an epoch's draws."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state ^ (number + 0x7F4A7C15)) * 0xBF58476D1CE4E5B9 % 2**64
        state ^= state >> 31
    return torch.Generator().manual_seed(state % 2**63)


def with_first(data: Data) -> tuple[Data, Inputs, Tensor]:
    """``data``, whole even where it can be read only once, and inputs and labels of its first batch. Raises
    ``DataError`` where there is none.
    """
    first = next(batches(data, EXTRACT_BATCH), None)
    if first is None or num_rows(first[0]) == 0:
        raise DataError("The data is empty: no rows to train on.")
    return itertools.chain([first], data) if isinstance(data, Iterator) else data, *first


def count_rows(data: Data, first: Inputs) -> int | None:
    """Rows of ``data``; of a stream as many batches like the ``first`` as it has, None where it does not say."""
    pair = as_pair(data)
    if pair is not None:
        return num_rows(pair[0])
    try:
        return len(data) * num_rows(first)  # type: ignore[arg-type]
    except TypeError:
        return None


def data_digest(data: Data) -> str:
    """What tells rows in memory from others, labels included; streams are all alike."""
    pair = as_pair(data)
    if pair is None:
        return "stream"
    return hashlib.sha256(torch.stack([row_hashes(pair[0]), pair[1].cpu().long()]).numpy().tobytes()).hexdigest()


def check_passes(data: object, passes: int) -> None:
    """Raises ``DataError`` when ``data`` is a one-shot iterator and more than one pass over it is needed."""
    if passes > 1 and isinstance(data, Iterator):
        raise DataError(
            f"{passes} passes over the data are needed, but {type(data).__name__} can be read only once; "
            "give a DataLoader, a list of batches or one (inputs, labels) pair."
        )


def seeded_batches(
    data: Data, batch_size: int, seed: int, epoch: int, *, shuffle: bool
) -> Iterator[tuple[Inputs, Tensor]]:
    """One pass over ``data``: a pair is shuffled by (seed, epoch) if asked; a DataLoader's generator is seeded by
    them.
    """
    pair = as_pair(data)
    if pair is not None:
        rows = num_rows(pair[0])
        order = torch.randperm(rows, generator=seeded(seed, epoch)) if shuffle else torch.arange(rows)
        for part in torch.split(order, batch_size):
            yield take(pair[0], part), pair[1][part]
        return
    generator = getattr(data, "generator", None)
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seeded(seed, epoch).initial_seed())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded(seed, epoch).initial_seed())  # a loader without a generator draws from the global one
        yield from batches(data, batch_size)


@dataclass(frozen=True)
class Share:
    """This process's part of the rows: rows are dealt in turn, row ``g`` to process ``g % world`` at place ``g //
    world``.
    """

    rank: int = 0
    world: int = 1

    def of_batch(self, start: int) -> slice:
        """The own rows of a batch whose first row is row ``start`` of the pass."""
        return slice((self.rank - start) % self.world, None, self.world)

    def places(self, rows: Tensor) -> Tensor:
        """Where the own ones of the global ``rows`` stand among this process's rows."""
        return rows[rows % self.world == self.rank] // self.world


class Extractor:
    """Runs the frozen backbone and reduces; in bf16 where one timed batch shows that to be faster.

    Where the backbone can be exported, its segments run in place of its modules: batch normalisation is folded there.
    """

    def __init__(self, sdn: ShallowDeepNetwork, sample: Inputs, precision: Precision) -> None:
        self.sdn = sdn
        self.device = next(sdn.parameters()).device
        self.signature = signature_of(sample)
        self.segments: list[Segment] = []
        if sdn.plan.via == "export":
            example, stops = example_of(self.signature, 2, self.device), range(len(sdn.plan.cuts))
            with suppress(CutError, RuntimeError):  # rows of another shape or type: ``reduce`` says what is wrong
                self.segments = cut_segments(sdn.backbone, sdn.plan, stops, example)[:-1]
        some = next(p for p in sdn.parameters() if p.is_floating_point())
        self.bf16 = precision == "bf16"
        if precision == "auto" and some.dtype == torch.float32:
            self.bf16 = self._seconds(sample, bf16=True) < 0.9 * self._seconds(sample, bf16=False)

    def __call__(self, inputs: Inputs) -> list[Tensor]:
        """Reduced features of every exit. Raises ``DataError`` where they are not finite: every IC would be lost."""
        found = self._reduce(inputs, self.bf16)
        finite_B = torch.stack([reduced.isfinite().flatten(1).all(1) for reduced in found]).all(0)
        if not bool(finite_B.all()):
            raise DataError(f"Features are not finite for {int((~finite_B).sum())} rows of a batch: NaN inputs?")
        return found

    def _reduce(self, inputs: Inputs, bf16: bool) -> list[Tensor]:
        precision = torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext()
        inputs = each(inputs, lambda tensor: placed(tensor, self.device))
        with torch.no_grad(), precision:
            if not self.segments or signature_of(inputs) != self.signature:
                return self.sdn.reduce(inputs)[0]
            reduced: list[Tensor] = []
            carried: tuple[Tensor, ...] = ()
            for exit, (segment, cut) in enumerate(zip(self.segments, self.sdn.plan.cuts, strict=True)):
                carried = segment.run(*carried, *tensors(inputs))
                reduced.append(self.sdn.classifier(exit).reduce(carried[0], mask_of(inputs, cut.mask)))
            return reduced

    def _seconds(self, inputs: Inputs, bf16: bool) -> float:
        sample = take(inputs, slice(0, 64))
        best = math.inf
        for _ in range(3):
            start = time.perf_counter()
            self._reduce(sample, bf16)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            best = min(best, time.perf_counter() - start)
        return best


def extract_view(
    sdn: ShallowDeepNetwork,
    data: Data,
    augment: Augment | None,
    seed: int,
    view: int,
    *,
    extractor: Extractor,
    store: Store,
    share: Share,
) -> tuple[View, Tensor]:
    """This process's share of one view of ``data``, and the hashes of all its rows before augmentation."""
    writer = store.writer(view)
    labels, hashes = [], []
    generator = seeded(seed, view, 1)
    pair = as_pair(data)
    total = -(-num_rows(pair[0]) // EXTRACT_BATCH) if pair is not None else None
    in_order = seeded_batches(data, EXTRACT_BATCH, seed, view, shuffle=False)
    start = 0
    for inputs, batch_labels in steps(in_order, f"features, view {view + 1}", total):
        checked = check_labels(batch_labels, num_rows(inputs), sdn.plan.num_classes).cpu()
        hashes.append(row_hashes(inputs))
        seen = inputs if augment is None else as_inputs(augment(inputs, generator))
        if num_rows(seen) != num_rows(inputs):
            raise DataError(
                f"augment must answer as many rows as it gets: {num_rows(inputs)} in, {num_rows(seen)} out."
            )
        part = share.of_batch(start)
        start += num_rows(inputs)
        if len(checked[part]):
            writer.append(extractor(take(seen, part)))
            labels.append(checked[part])
    if not labels:
        raise DataError("The data is empty: no rows to train on.")
    return View(writer.close(), torch.cat(labels)), torch.cat(hashes)


class Store:
    """Where views live: in memory, or in one file per exit and view under ``folder``, found again only if complete."""

    def __init__(self, folder: Path | None, key: dict[str, Any]) -> None:
        self.folder, self.key = folder, key

    def writer(self, view: int) -> _Writer:
        if self.folder is None:
            return _Writer(None)
        folder = self.folder / f"view{view}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "complete.json").unlink(missing_ok=True)
        for old in folder.glob("exit*.bin"):
            old.unlink()
        return _Writer(folder)

    def finish(self, view: int, made: View, hash_N: Tensor) -> None:
        """Mark a view on disk as complete: from now on ``find`` returns it."""
        if self.folder is None:
            return
        folder = self.folder / f"view{view}"
        about = {**self.key, "shapes": [list(f.shape) for f in made.features], "dtype": str(made.features[0].dtype)}
        write_tensors(folder / "rows.safetensors", {"labels_N": made.labels_N, "hash_N": hash_N}, {})
        write_text(folder / "complete.json", json.dumps(about))

    def find(self, view: int) -> tuple[View, Tensor] | None:
        """The complete view of this very network and data that an earlier run left, or None."""
        if self.folder is None:
            return None
        folder = self.folder / f"view{view}"
        try:
            about = read_json(folder / "complete.json")
            rows, _ = read_tensors(folder / "rows.safetensors")
        except FormatError:
            return None
        key = json.loads(json.dumps(self.key))
        if not isinstance(about, dict) or {name: about.get(name) for name in key} != key:
            return None
        dtype = getattr(torch, str(about["dtype"]).removeprefix("torch."))
        features = []
        for exit, shape in enumerate(about["shapes"]):
            path = folder / f"exit{exit}.bin"
            if not path.is_file() or path.stat().st_size != math.prod(shape) * dtype.itemsize:
                return None
            features.append(_mapped(path, tuple(shape), dtype))
        return View(features, rows["labels_N"]), rows["hash_N"]


class _Writer:
    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.parts: list[list[Tensor]] = []
        self.rows = 0

    def append(self, features: list[Tensor]) -> None:
        features = [f.detach().cpu().contiguous() for f in features]
        self.rows += features[0].shape[0]
        if self.folder is None:
            self.parts.append(features)
            return
        for exit, f in enumerate(features):
            with (self.folder / f"exit{exit}.bin").open("ab") as file:
                file.write(f.view(torch.uint8).numpy().tobytes())
        self.parts = [features]

    def close(self) -> list[Tensor]:
        if self.folder is None:
            exits = range(len(self.parts[0]))
            return [torch.cat([part[exit] for part in self.parts]) for exit in exits]
        return [
            _mapped(self.folder / f"exit{exit}.bin", (self.rows, *f.shape[1:]), f.dtype)
            for exit, f in enumerate(self.parts[0])
        ]


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.from_file(str(path), shared=False, size=math.prod(shape), dtype=dtype).view(shape)


def choose_place(cache: Cache, needed_bytes: int | None, budget_bytes: int) -> Literal["memory", "disk", "off"]:
    """Where features go: memory when they fit the budget and half of the free memory, else disk within the budget; disk
    where nobody knows how many they are (None).
    """
    if cache != "auto":
        return cache
    if needed_bytes is None:
        return "disk"
    if needed_bytes > budget_bytes:
        return "off"
    return "memory" if needed_bytes <= _free_bytes() / 2 else "disk"


def _free_bytes() -> float:
    """Memory that can be had, with what the system only keeps as a cache; infinite where it does not say."""
    try:
        told = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return math.inf
    return 1024 * float(told.split("MemAvailable:")[1].split()[0])


def cache_key(sdn: ShallowDeepNetwork, data: Data, augment: Augment | None, seed: int, share: Share) -> dict[str, Any]:
    """What features depend on. Only a pair in memory can be recognised again; a stream's features are never reused."""
    return {
        "backbone": fingerprint(sdn.backbone),
        "cuts": [cut.name for cut in sdn.plan.cuts],
        "reductions": [[spec.kind, spec.views, spec.features] for spec in sdn.plan.classifiers],
        "data": data_digest(data) if as_pair(data) else secrets.token_hex(16),
        "augment": repr(augment),
        "seed": seed,
        "share": [share.rank, share.world],
    }


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder for features of this run alone; it goes when the run ends."""
    return tempfile.TemporaryDirectory(prefix="shallowdeep-features-")
