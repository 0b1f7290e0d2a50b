"""The python files of CIFAR-10 and CIFAR-100 -> arrays: the one room where a pickle is opened.

It refuses to know data sets and to parse a file that is not, to the last bit, the authors'.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shallowdeep.files import FormatError
from shallowdeep.types import DataError

# The authors' files and their md5, https://www.cs.toronto.edu/~kriz/cifar.html
CIFAR = {
    "cifar-10-batches-py": {
        "train": {
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        },
        "test": {"test_batch": "40351d587109b95175f43aff81a1287e"},
        "names": {"batches.meta": "5ff9c542aee3614f3951f8cda6e48888"},
    },
    "cifar-100-python": {
        "train": {"train": "16019d7e3df5f24257cddd939b257f8d"},
        "test": {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
        "names": {"meta": "7973b15100ade9c7d40fb424638fde48"},
    },
}


def find_cifar(path: Path) -> Path | None:
    """The CIFAR folder that ``path`` is or holds, if any. Raises ``DataError`` when it holds both."""
    if path.name in CIFAR and path.is_dir():
        return path
    inside = [path / name for name in CIFAR if (path / name).is_dir()]
    if len(inside) > 1:
        raise DataError(f"{path} holds {' and '.join(CIFAR)}; give one of them.")
    return inside[0] if inside else None


def read_files(folder: Path, split: str | None) -> tuple[npt.NDArray[np.uint8], list[int], tuple[str, ...]]:
    """Images [N, 3, 32, 32], labels (CIFAR-100's fine ones) and class names of the ``split`` "train" or "test"."""
    if split not in ("train", "test"):
        raise DataError(f"{folder} has the splits train and test, found split={split!r}.")
    files = CIFAR[folder.name]
    fine = b"fine_" if folder.name == "cifar-100-python" else b""
    parts = [_read_official(folder / name, md5) for name, md5 in files[split].items()]
    (about,) = [_read_official(folder / name, md5) for name, md5 in files["names"].items()]
    images = np.concatenate([np.asarray(part[b"data"]) for part in parts]).reshape(-1, 3, 32, 32)
    labels = [label for part in parts for label in part[fine + b"labels"]]
    return images, labels, tuple(name.decode() for name in about[fine + b"label_names"])


def _read_official(path: Path, md5: str) -> Any:
    if not path.is_file():
        raise FormatError(f"No file {path}.")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if found != md5:
            raise FormatError(f"{path} is not the authors' file: its md5 is {found}, theirs {md5}.")
        file.seek(0)
        return restricted_loads(file.read())


class _Dtype:
    def __init__(self, name: str | bytes, _align: object, _copy: object) -> None:
        self.name = name

    def __setstate__(self, _state: object) -> None:
        pass


class _Array(npt.NDArray[np.uint8]):
    def __new__(cls, _kind: object, _shape: object, _code: object) -> _Array:
        return super().__new__(cls, 0, np.uint8)

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, fortran, data = state
        if dtype.name not in ("u1", b"u1") or fortran:
            raise FormatError(f"The pickle holds an array of {dtype.name!r}; only plain uint8 arrays are read.")
        rows = np.frombuffer(data, np.uint8).reshape(shape)
        self.resize(rows.shape, refcheck=False)
        self[...] = rows


# In Python: the compiled one lets six damaged bytes ask for gigabytes of memory.
class _Unpickler(pickle._Unpickler):
    # Not numpy's own: its dtype believes whatever state a pickle gives it, and a forged one crashes the process.
    stand_ins: Mapping[str, Any] = {
        "numpy.core.multiarray._reconstruct": _Array,
        "numpy._core.multiarray._reconstruct": _Array,
        "numpy.ndarray": "the kind of array to make, always the same",
        "numpy.dtype": _Dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self.stand_ins:
            raise FormatError(f"The pickle asks for {module}.{name}; only uint8 arrays and plain values are read.")
        return self.stand_ins[f"{module}.{name}"]


def restricted_loads(data: bytes) -> Any:
    """The plain values and uint8 arrays of a pickle, Python 2's text as bytes. Raises ``FormatError`` for all else."""
    try:
        return _Unpickler(BytesIO(data), encoding="bytes").load()
    except FormatError:
        raise
    # Damaged bytes are a program too, and fail as whatever that program runs into.
    except Exception as error:
        found = " ".join(str(error).split()) or type(error).__name__
        raise FormatError(f"The pickle is damaged: {found.rstrip('.')}.") from None
