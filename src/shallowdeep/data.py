"""Files of labelled rows -> inputs and labels in memory: image folders, .npz, parquet, the CIFAR files, digits.

It refuses to know networks, devices and training, and it trusts no file: among images no link is followed, no
object is ever unpickled, and nothing is unpacked beyond the two limits below.
"""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from shallowdeep.cifar import CIFAR, find_cifar, read_files
from shallowdeep.files import FormatError
from shallowdeep.inputs import Inputs, as_inputs, check_labels, num_rows, take, tensors
from shallowdeep.types import DataError, MissingExtra

# One image, before it is decoded: 150 MB as RGB.
LIMIT_PIXELS = 50_000_000
# One source, once unpacked: ImageNet's 50,000 validation images at 224 x 224 fit.
LIMIT_BYTES = 8 * 2**30

# The parquet types of an encoded image outside Hugging Face's struct<bytes, path>.
ENCODED = ("binary", "large_binary")
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
# Pillow goes by content, and some of its other formats run programs: a .png may be a PostScript file.
FORMATS = ("BMP", "JPEG", "PNG", "WEBP")


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Labelled rows in memory, checked: ``inputs`` with rows first, ``labels_N`` int64 in 0..C-1.

    Raises ``DataError`` when there are no rows, lengths differ, a label is none of ``class_names`` or an input is
    NaN or infinite.

    >>> data = Dataset(inputs=torch.zeros(2, 3), labels_N=torch.tensor([0, 1]), class_names=("cat", "dog"))
    >>> len(data.rows(torch.tensor([1])))
    1
    """

    inputs: Inputs
    labels_N: Tensor
    class_names: tuple[str, ...]
    source: str = "the data"

    def __post_init__(self) -> None:
        rows = num_rows(as_inputs(self.inputs))
        if rows == 0:
            raise DataError(f"No rows in {self.source}.")
        if len(self.class_names) < 2:
            raise DataError(f"A classifier needs two classes or more, {self.source} has {list(self.class_names)}.")
        object.__setattr__(self, "labels_N", check_labels(self.labels_N, rows, len(self.class_names)))
        for tensor in filter(torch.is_floating_point, tensors(self.inputs)):
            bad_N = ~torch.isfinite(tensor).unsqueeze(-1).flatten(1).all(dim=1)
            if bool(bad_N.any()):
                first = int(bad_N.nonzero()[0])
                found = f"{int(bad_N.sum())} of {rows} rows of {self.source}"
                raise DataError(f"{found} hold NaN or infinity, the first is row {first}.")

    def __len__(self) -> int:
        return num_rows(self.inputs)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the names, types, shapes and bytes of all rows, wherever they came from."""
        digest = hashlib.sha256(json.dumps(self.class_names).encode())
        inputs = self.inputs if isinstance(self.inputs, dict) else dict(enumerate(tensors(self.inputs)))
        for name, tensor in (*sorted(inputs.items()), ("labels", self.labels_N)):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def rows(self, index: Tensor) -> Dataset:
        """The rows ``index``: positions, possibly repeated, or a boolean mask."""
        inputs, labels_N = take(self.inputs, index), self.labels_N[index]
        return Dataset(inputs=inputs, labels_N=labels_N, class_names=self.class_names, source=self.source)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What a network wants done to uint8 images of ``size`` (height, width): channel order, then mean and std.

    Mean and std are of pixels in [0, 1], one per channel in the network's own order.

    >>> half = Preprocessing(mean=(0.5,), std=(0.5,), size=(1, 2))
    >>> half.apply(torch.tensor([[[[0, 255]]]], dtype=torch.uint8)).tolist()
    [[[[-1.0, 1.0]]]]
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]
    channel_order: Literal["RGB", "BGR"] = "RGB"

    def __post_init__(self) -> None:
        finite = all(map(math.isfinite, (*self.mean, *self.std)))
        if not self.mean or len(self.mean) != len(self.std) or not finite or min(self.std) <= 0:
            raise DataError(f"Each channel needs a mean and a std above 0, found mean {self.mean}, std {self.std}.")
        _check_size(self.size)
        if self.channel_order not in ("RGB", "BGR"):
            raise DataError(f"channel_order must be 'RGB' or 'BGR', found {self.channel_order!r}.")

    def apply(self, images_BCHW: Tensor) -> Tensor:
        """float32 [B, C, H, W], ``(image / 255 - mean) / std``; floating images are normalised already and pass."""
        if images_BCHW.is_floating_point():
            return images_BCHW
        wanted = (len(self.mean), *self.size)
        if images_BCHW.dtype != torch.uint8 or images_BCHW.ndim != 4 or images_BCHW.shape[1:] != wanted:
            found = f"{images_BCHW.dtype} {list(images_BCHW.shape)}".removeprefix("torch.")
            raise DataError(f"Images must be uint8 [B, {', '.join(map(str, wanted))}], found {found}.")
        images = (images_BCHW.flip(1) if self.channel_order == "BGR" else images_BCHW).to(torch.float32)
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return images.div_(255).sub_(mean).div_(std)

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return asdict(self)

    @classmethod
    def from_json(cls, about: Mapping[str, Any]) -> Preprocessing:
        """What ``to_json`` gave, also after a round through a file. Raises ``FormatError``."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in about.items()}
        try:
            return cls(**values)
        except (TypeError, DataError) as error:
            raise FormatError(f"Not a preprocessing: {error}") from None


def halves(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Positions of a random half of ``rows`` rows and of the other half, each in order."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    return order[: rows // 2].sort().values, order[rows // 2 :].sort().values


def read_data(
    source: str | Path, *, split: str | None = None, size: tuple[int, int] | None = None, limit: int | None = None
) -> Dataset:
    """The labelled rows at ``source``, whose kind follows from what is there.

    A folder of class folders of images, an ``.npz``, parquet files of images, or the authors' CIFAR files.
    ``split`` names one of several parts, ``size`` (height, width) resizes encoded images, and ``limit`` keeps that
    many rows, spread evenly over all (the first ones would be of one class). Raises ``DataError`` for what is no
    data to classify and ``FormatError`` for a damaged file.
    """
    path = Path(source)
    if not path.exists():
        raise DataError(
            f"No file or folder {path}: give a folder of class folders, an .npz, .parquet or a CIFAR folder."
        )
    if limit is not None and limit < 1:
        raise DataError(f"limit must be at least 1 row, found {limit}.")
    if size is not None:
        _check_size(size)
    if path.is_file() and split is not None:
        raise DataError(f"{path} is one file without splits; leave split={split!r} out.")
    parquet = [path] if path.is_file() and path.suffix == ".parquet" else sorted(path.glob("*.parquet"))
    cifar = find_cifar(path)
    if cifar is None and parquet:
        return _read_parquet(parquet, path, split, size, limit)
    if cifar is None and path.is_dir():
        return _read_folder(path, split, size, limit)
    if cifar is None and path.suffix != ".npz":
        raise DataError(f"{path} is no data: give a folder of class folders, .npz, .parquet or a CIFAR folder.")
    if size is not None:
        raise DataError(f"{path} holds arrays, which are not resized; leave size={size} out.")
    data = read_cifar(cifar, split) if cifar is not None else _read_npz(path)
    return data.rows(spread(len(data), limit))


def _check_size(size: tuple[int, int]) -> None:
    if len(size) != 2 or min(size) < 1:
        raise DataError(f"size must be (height, width) in pixels, found {size}.")


def spread(count: int, limit: int | None) -> Tensor:
    """Positions of ``limit`` of ``count`` rows, evenly spread; all where there are no more, or no limit.

    >>> spread(10, 3).tolist()
    [0, 3, 6]
    """
    kept = count if limit is None else min(limit, count)
    return torch.arange(kept) * count // max(kept, 1)


def _fits(name: object, size_bytes: int) -> None:
    if size_bytes > LIMIT_BYTES:
        raise DataError(f"{name} unpacks to {size_bytes:,} bytes, the limit is {LIMIT_BYTES:,}.")


@contextmanager
def _reading(name: object) -> Iterator[None]:
    """Any decoder's complaint as one sentence: damaged bytes make them raise whatever they meet, even ``KeyError``."""
    try:
        yield
    except (DataError, FormatError):
        raise
    except Exception as error:
        found = " ".join(str(error).split()) or type(error).__name__
        raise FormatError(f"{name} cannot be read, it is damaged or of another kind: {found.rstrip('.')}.") from None


def read_image(file: Path | BytesIO, *, name: str = "", size: tuple[int, int] | None = None) -> Tensor:
    """uint8 [3, H, W], RGB, of one BMP, JPEG, PNG or WebP file; ``size`` (height, width) resizes it, bilinear.

    Transparency is dropped, and of an animation the first picture is taken. Raises ``DataError`` for an image of
    more than ``LIMIT_PIXELS`` or 8 bits a channel and ``FormatError`` for a damaged one; both call it ``name``.
    """
    name = name or str(file)
    with _reading(name):
        try:
            opened = Image.open(file, formats=FORMATS)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise DataError(f"{name} has more than {LIMIT_PIXELS:,} pixels: {error}") from None
        with opened:
            width, height = opened.size
            if width * height > LIMIT_PIXELS:
                raise DataError(f"{name} has {width * height:,} pixels, the limit is {LIMIT_PIXELS:,}.")
            if opened.mode.startswith(("I", "F")):
                raise DataError(f"{name} has more than 8 bits a channel (mode {opened.mode}); convert it to 8 bits.")
            # Straight to RGB, Pillow warns of the transparency that it drops.
            image = (opened.convert("RGBA") if "transparency" in opened.info else opened).convert("RGB")
        if size is not None:
            image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _read_images(images: Iterable[tuple[str, Path | BytesIO]], count: int, size: tuple[int, int] | None) -> Tensor:
    images_NCHW, first = torch.empty(0), ""
    for row, (name, file) in enumerate(images):
        image = read_image(file, name=name, size=size)
        if row == 0:
            _fits(f"{count} images like {name}", count * image.numel())
            images_NCHW, first = torch.empty((count, *image.shape), dtype=torch.uint8), name
        if image.shape != images_NCHW.shape[1:]:
            found, expected = (f"{shape[-2]} x {shape[-1]}" for shape in (image.shape, images_NCHW.shape))
            raise DataError(f"{name} is {found} but {first} is {expected}; pass size=(height, width) to resize all.")
        images_NCHW[row] = image
    return images_NCHW


def _entries(folder: Path) -> list[Path]:
    entries = sorted((entry for entry in folder.iterdir() if not entry.name.startswith(".")), key=lambda e: e.name)
    for entry in entries:
        if entry.is_symlink():
            raise DataError(f"{entry} is a link and may lead out of the data; put the files themselves there.")
    return entries


def _folders(folder: Path) -> dict[str, Path]:
    return {entry.name: entry for entry in _entries(folder) if entry.is_dir()}


def _read_folder(root: Path, split: str | None, size: tuple[int, int] | None, limit: int | None) -> Dataset:
    splits = _folders(root)
    if split is not None and split not in splits:
        raise DataError(f"No split {split!r} in {root}; folders there: {', '.join(splits) or 'none'}.")
    folder = root if split is None else splits[split]
    classes = _folders(folder)
    for other in splits.values() if split else ():
        theirs = _folders(other).keys()
        if theirs & classes.keys() and theirs != classes.keys():
            odd = sorted(theirs ^ classes.keys())
            raise DataError(f"{folder} and {other} would number their classes differently: only one has {odd[:5]}.")
    files: list[tuple[Path, int]] = []
    for label, class_folder in enumerate(classes.values()):
        for entry in _entries(class_folder):
            if entry.is_dir():
                hint = "" if split else f" If {class_folder.name} is a split, pass split=, one of: {', '.join(splits)}."
                raise DataError(f"{class_folder} holds the folder {entry.name!r} where images are expected.{hint}")
            if entry.suffix.lower() in SUFFIXES and entry.is_file():
                files.append((entry, label))
    if not files:
        found = ", ".join(entry.name for entry in _entries(folder)[:5]) or "nothing"
        raise DataError(f"No images: {folder} needs a folder per class with {' '.join(SUFFIXES)} files, found {found}.")
    chosen = [files[row] for row in spread(len(files), limit).tolist()]
    return Dataset(
        inputs=_read_images(((str(file), file) for file, _ in chosen), len(chosen), size),
        labels_N=torch.tensor([label for _, label in chosen]),
        class_names=tuple(classes),
        source=str(root),
    )


def _read_npz(path: Path) -> Dataset:
    with _reading(path):
        with zipfile.ZipFile(path) as archive:
            _fits(path, sum(member.file_size for member in archive.infolist()))
        with np.load(path, allow_pickle=False) as opened:
            arrays: dict[str, Any] = {name: opened[name] for name in opened.files}
    found = ", ".join(arrays) or "nothing"
    names = np.asarray(arrays.pop("class_names", []), dtype=None)
    columns = {name: _tensor(f"{name!r} of {path}", np.asarray(array)) for name, array in arrays.items()}
    if "labels" not in columns:
        raise DataError(f"{path} needs an array 'labels'; found {found}.")
    labels_N = columns.pop("labels")
    single = columns.keys() & {"images", "inputs"}
    if not columns or (single and len(columns) > 1):
        raise DataError(f"{path} needs beside 'labels' one array 'images' or 'inputs', or named others; found {found}.")
    if names.ndim != 1 or (names.size and names.dtype.kind != "U"):
        raise DataError(f"'class_names' of {path} must be a list of text, found {names.dtype} {names.shape}.")
    return Dataset(
        inputs=_channels_first(columns[single.pop()]) if single else columns,
        labels_N=labels_N,
        class_names=tuple(names.tolist()) or _numbered(labels_N, path),
        source=str(path),
    )


def _tensor(name: str, array: npt.NDArray[Any]) -> Tensor:
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise DataError(f"{name} must be numbers of up to 64 bits, found {array.dtype}.")
    # torch knows only the machine's own byte order, and computes with few of the unsigned types.
    kept = array.dtype == np.uint8 or array.dtype.kind == "f"
    return torch.from_numpy(np.ascontiguousarray(array, array.dtype.newbyteorder("=") if kept else np.int64))


def _numbered(labels_N: Tensor, path: Path) -> tuple[str, ...]:
    """Names "0".."C-1": without names only the labels say how many classes there are, so none may be missing."""
    found = torch.unique(labels_N).tolist()
    if found != list(range(len(found))):
        raise DataError(f"Without class names every label 0..C-1 must occur in {path}; found {str(found[:8])[1:-1]}.")
    return tuple(map(str, found))


def as_classes(data: Dataset, names: Sequence[str]) -> Dataset:
    """``data`` with labels that number the classes called ``names``, those of a network, by their names; as it is where
    either has none. Raises ``DataError`` for a class that is not among them.

    >>> some = Dataset(inputs=torch.zeros(2, 3), labels_N=torch.tensor([0, 1]), class_names=("ant", "cat"))
    >>> as_classes(some, ("ant", "bee", "cat")).labels_N.tolist()
    [0, 2]
    """
    own, known = data.class_names, tuple(names)
    nameless = any(group == tuple(map(str, range(len(group)))) for group in (own, known))  # also where there are none
    if nameless or own == known[: len(own)]:
        return data
    if unknown := [name for name in own if name not in known]:
        raise DataError(
            f"{data.source} has the class {unknown[0]!r}, which the network does not know; its classes: "
            f"{', '.join(known[:8])}{', ...' if known[8:] else ''}."
        )
    place_C = torch.tensor([known.index(name) for name in own])
    return replace(data, labels_N=place_C[data.labels_N], class_names=known)


def _channels_first(images: Tensor) -> Tensor:
    is_last = images.dtype == torch.uint8 and images.ndim == 4 and images.shape[-1] in (1, 3)
    return images.permute(0, 3, 1, 2).contiguous() if is_last else images


def _read_parquet(
    files: Sequence[Path], source: Path, split: str | None, size: tuple[int, int] | None, limit: int | None
) -> Dataset:
    try:
        from pyarrow import parquet as pq
        from pyarrow import types as pa_types
    except ImportError as error:
        raise MissingExtra(f"Parquet needs pyarrow ({error}): pip install 'shallowdeep[data]'") from None
    files = _files_of_split(files, source, split)
    labels, names = [], None
    for file in files:
        with _reading(file), pq.ParquetFile(file) as opened:
            schema, about = opened.schema_arrow, opened.metadata
            if not {"image", "label"} <= set(schema.names):
                raise DataError(f"{file} needs columns 'image' and 'label'; found {', '.join(schema.names)}.")
            _fits(file, sum(about.row_group(group).total_byte_size for group in range(about.num_row_groups)))
            image = schema.field("image").type
            if str(image) not in ENCODED and not str(image).startswith("struct<bytes: binary"):
                raise DataError(
                    f"'image' of {file} must be encoded images, binary or struct<bytes, path>; found {image}."
                )
            column = opened.read(["label"]).column("label")
            if column.null_count or not pa_types.is_integer(column.type):
                found = f"{column.type} with {column.null_count} missing"
                raise DataError(f"Every 'label' of {file} must be an integer, found {found}.")
            labels.append(torch.from_numpy(column.to_numpy().astype(np.int64)))
            # Hugging Face writes the class names beside the table.
            beside = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
            names = beside.get("info", {}).get("features", {}).get("label", {}).get("names")
    labels_N = torch.cat(labels)
    chosen = spread(len(labels_N), limit)
    return Dataset(
        class_names=tuple(map(str, names)) if names else _numbered(labels_N, source),
        inputs=_read_images(_blobs(pq, files, set(chosen.tolist())), len(chosen), size),
        labels_N=labels_N[chosen],
        source=str(source),
    )


def _files_of_split(files: Sequence[Path], source: Path, split: str | None) -> list[Path]:
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(file.stem.partition("-")[0].rstrip("0123456789_"), []).append(file)
    if split is None and len(splits) > 1:
        raise DataError(f"{source} holds several splits, pass split=, one of: {', '.join(splits)}.")
    if split is not None and split not in splits:
        raise DataError(f"No split {split!r} in {source}; files there are of: {', '.join(splits)}.")
    return splits[split or next(iter(splits))]


def _blobs(parquet: Any, files: Iterable[Path], chosen: set[int]) -> Iterator[tuple[str, BytesIO]]:
    """The chosen rows' names and encoded images. A ``path`` is never followed: only bytes inside the file count."""
    row = -1
    for file in files:
        with _reading(file), parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches(batch_size=64, columns=["image"]):
                column = batch.column(0)
                for blob in column if str(column.type) in ENCODED else column.field("bytes"):
                    row += 1
                    if row in chosen:
                        yield f"row {row} of {file.name}", BytesIO(blob.as_py())


def read_cifar(folder: str | Path, split: str | None) -> Dataset:
    """CIFAR-10 or CIFAR-100 (fine labels), uint8 [N, 3, 32, 32], from the authors' python files.

    ``folder`` is ``cifar-10-batches-py``, ``cifar-100-python`` or what holds one of them, ``split`` "train" or
    "test". Raises ``FormatError`` for a file other than the authors'. Krizhevsky (2009),
    https://www.cs.toronto.edu/~kriz/cifar.html
    """
    found = find_cifar(Path(folder))
    if found is None:
        raise DataError(f"{folder} is not, and does not hold, one of: {', '.join(CIFAR)}.")
    images, labels, names = read_files(found, split)
    return Dataset(
        inputs=torch.from_numpy(images), labels_N=torch.tensor(labels), class_names=names, source=str(folder)
    )


def digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits, uint8 [N, 1, 8, 8]: their levels 0..16 become 0..255."""
    # An import at the top would cost every reader of every file a second.
    from sklearn.datasets import load_digits

    levels = load_digits()
    return Dataset(
        inputs=torch.from_numpy(np.round(levels.images * (255 / 16)).astype(np.uint8)).unsqueeze(1),
        labels_N=torch.from_numpy(levels.target),
        class_names=tuple(map(str, levels.target_names)),
        source="scikit-learn digits",
    )
