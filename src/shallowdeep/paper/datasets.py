"""The study's data sets: where they come from, whether they are here and whole, and their rows as bytes.

It refuses to know networks. Images stay uint8 [N, 3, side, side] in memory; a network's first step normalises them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from shallowdeep.data import read_data, read_image
from shallowdeep.files import FormatError
from shallowdeep.progress import steps
from shallowdeep.types import DataError


@dataclass(frozen=True, kw_only=True)
class StudySet:
    """One data set of the study: its official archive, and what its images are normalised by (pixels in [0, 1])."""

    name: str
    folder: str
    address: str
    md5: str
    num_classes: int
    side: int
    padding: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


DATASETS = {
    found.name: found
    for found in (
        StudySet(
            name="cifar10",
            folder="cifar-10-batches-py",
            address="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
            md5="c58f30108f718f92721af3b95e74349a",
            num_classes=10,
            side=32,
            padding=4,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
        ),
        StudySet(
            name="cifar100",
            folder="cifar-100-python",
            address="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
            md5="eb9058c3a382ffc7106e4002c42a8d85",
            num_classes=100,
            side=32,
            padding=4,
            mean=(0.507, 0.487, 0.441),
            std=(0.267, 0.256, 0.276),
        ),
        StudySet(
            name="tinyimagenet",
            folder="tiny-imagenet-200",
            address="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
            md5="90528d7ca1a48142e341f4ef8d21d0de",
            num_classes=200,
            side=64,
            padding=8,
            mean=(0.4802, 0.4481, 0.3975),
            std=(0.2302, 0.2265, 0.2262),
        ),
    )
}
HELD_OUT = 5000
TINY_COUNTS = {"ids": 200, "train": 100_000, "val": 10_000}
"""Classes and images of the official tiny-imagenet-200."""


def study_set(name: str) -> StudySet:
    """The data set called ``name``. Raises ``ValueError`` for a name the study does not have."""
    if name not in DATASETS:
        raise ValueError(f"No data set {name!r} in the study. Data sets: {', '.join(DATASETS)}.")
    return DATASETS[name]


def read_rows(name: str, data_dir: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 3, side, side] and labels [N] of the split "train" or "test" under ``data_dir``.

    Raises ``DataError`` when the data set is not there and ``FormatError`` when a file is not the official one.
    """
    chosen = study_set(name)
    folder = data_dir / chosen.folder
    if not folder.is_dir():
        raise DataError(f"No {chosen.folder} in {data_dir}; fetch it: sdn paper data {data_dir} --download")
    if name == "tinyimagenet":
        return read_tiny(folder, split)
    data = read_data(folder, split=split)
    assert isinstance(data.inputs, Tensor)
    return data.inputs, data.labels_N


def class_names(name: str, data_dir: Path) -> tuple[str, ...]:
    """The classes' names in the order of their labels; Tiny ImageNet's are the first of its words."""
    folder = data_dir / study_set(name).folder
    if name != "tinyimagenet":
        return read_data(folder, split="test").class_names
    lists = tiny_lists(folder)
    return tuple(lists.words.get(wnid, wnid).split(",")[0] for wnid in lists.wnids)


def read_tiny(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 3, 64, 64] and labels [N] of the official tiny-imagenet-200 folder; "test" is its val part.

    Labels number the wnids in order. Raises ``FormatError`` for lists that are not the official ones, and ``DataError``
    when ids, folders and annotations do not agree.
    """
    lists = tiny_lists(folder)
    if split == "train":
        parts = [sorted((folder / "train" / wnid / "images").glob("*.JPEG")) for wnid in lists.wnids]
        each = TINY_COUNTS["train"] // len(parts)
        for wnid, part in zip(lists.wnids, parts, strict=True):
            if len(part) != each:
                raise DataError(f"{folder / 'train' / wnid} has {len(part)} images, expected {each}.")
        files = [(path, label) for label, part in enumerate(parts) for path in part]
    else:
        label_of = {wnid: label for label, wnid in enumerate(lists.wnids)}
        files = [(folder / "val" / "images" / name, label_of[wnid]) for name, wnid in lists.val.items()]
    images = torch.empty(len(files), 3, 64, 64, dtype=torch.uint8)
    for row, (path, _) in enumerate(steps(files, f"read {split} images", len(files))):
        image = read_image(path)
        if image.shape != images.shape[1:]:
            raise DataError(f"{path} is {image.shape[2]} x {image.shape[1]}, expected 64 x 64.")
        images[row] = image
    return images, torch.tensor([label for _, label in files])


class TinyLists(NamedTuple):
    """What the lists of Tiny ImageNet say: its ids in the order of the labels, the id of each val image, words."""

    wnids: list[str]
    val: dict[str, str]
    words: dict[str, str]


def tiny_lists(folder: Path) -> TinyLists:
    """The lists in the official tiny-imagenet-200 folder. Raises ``FormatError`` naming the file that is not whole."""
    ids, annotations = folder / "wnids.txt", folder / "val" / "val_annotations.txt"
    wnids = sorted({wnid for (wnid,) in _fields(ids, 1)})
    val = {Path(name).name: wnid for name, wnid in _fields(annotations, 2)}
    for path, found, count in ((ids, len(wnids), TINY_COUNTS["ids"]), (annotations, len(val), TINY_COUNTS["val"])):
        if found != count:
            raise FormatError(f"{path} lists {found:,} of {count:,}.")
    if unknown := set(val.values()) - set(wnids):
        raise FormatError(f"{annotations} names {min(unknown)!r}, which wnids.txt does not.")
    words = dict(_fields(folder / "words.txt", 2))
    if not words:
        raise FormatError(f"{folder / 'words.txt'} lists no words.")
    return TinyLists(wnids, val, words)


def _fields(path: Path, count: int) -> Iterator[list[str]]:
    """The first ``count`` columns of every line that is not empty."""
    if not path.is_file():
        raise FormatError(f"No file {path}: the folder is not the official tiny-imagenet-200, or not complete.")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise FormatError(f"{path} is damaged: it is not text.") from None
    for number, line in enumerate(lines, 1):
        fields = line.split("\t")[:count]
        if line.strip() and len(fields) < count:
            raise FormatError(f"{path} is damaged: line {number} has no {count} columns.")
        if line.strip():
            yield fields


def split_rows(labels_N: Tensor, held_out: int = HELD_OUT, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Positions to train on and positions held out, the latter equally many of every class, drawn by ``seed``."""
    classes = int(labels_N.max()) + 1
    order = torch.randperm(len(labels_N), generator=torch.Generator().manual_seed(seed))
    by_class = order[labels_N[order].sort(stable=True).indices]
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), labels_N.bincount().cumsum(0)[:-1]])
    held = torch.cat([by_class[start : start + held_out // classes] for start in starts.tolist()])
    kept = torch.ones(len(labels_N), dtype=torch.bool).index_fill(0, held, False)
    return kept.nonzero().flatten(), held.sort().values
