"""The study's data sets from their authors: what is here, what is missing, and fetching it, resumably and checked.

It refuses to know what is in them. Archives are unpacked into a folder of their own, which takes its final name when
it is whole; nothing an archive says can lead out of it.
"""

from __future__ import annotations

import hashlib
import http.client
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from shallowdeep.cifar import read_files
from shallowdeep.files import FormatError
from shallowdeep.paper.datasets import DATASETS, TINY_COUNTS, StudySet, study_set, tiny_lists
from shallowdeep.progress import steps
from shallowdeep.types import DataError

JPEG = b"\xff\xd8\xff"
"""The first bytes of every JPEG."""
PIECE_BYTES = 1 << 20
UNPACKED_BYTES = 2 << 30


@dataclass(frozen=True, kw_only=True)
class Found:
    """One data set of the study in a folder: ``state`` is "whole", "missing", or what is wrong with it."""

    name: str
    folder: str
    state: str
    address: str
    md5: str


def look(data_dir: Path, names: Sequence[str] = tuple(DATASETS)) -> list[Found]:
    """What is there of the data sets ``names``: CIFAR by its sums, Tiny ImageNet by its lists and how images begin.

    Raises ``DataError`` where ``data_dir`` is a file.
    """
    _check_folder(data_dir)
    chosen = [study_set(name) for name in names]
    return [
        Found(name=one.name, folder=one.folder, state=_state(one, data_dir), address=one.address, md5=one.md5)
        for one in chosen
    ]


def require(data_dir: Path, names: Iterable[str]) -> None:
    """Raise ``DataError`` that names those of the data sets ``names`` that are not whole in ``data_dir``."""
    lacking = [f"{one.folder}: {one.state.rstrip('.')}" for one in look(data_dir, list(names)) if one.state != "whole"]
    if lacking:
        raise DataError(
            f"Not whole in {data_dir}: {'; '.join(lacking)}. Fetch it: sdn paper data {data_dir} --download"
        )


def _state(chosen: StudySet, data_dir: Path) -> str:
    folder = data_dir / chosen.folder
    if not folder.is_dir():
        return "missing"
    if chosen.name == "tinyimagenet":
        return "; ".join(_tiny_faults(folder)) or "whole"
    try:
        for split in ("train", "test"):
            read_files(folder, split)
    except (DataError, FormatError) as error:
        return str(error)
    return "whole"


def _tiny_faults(folder: Path) -> Iterator[str]:
    """What is wrong with a tiny-imagenet-200 folder, as far as can be told without decoding its images."""
    try:
        tiny_lists(folder)
    except FormatError as error:
        yield str(error).rstrip(".")
    for part in ("train", "val"):
        images, count = sorted((folder / part).rglob("*.JPEG")), TINY_COUNTS[part]
        if len(images) != count:
            yield f"{part} has {len(images):,} of {count:,} images"
        odd = [path for path in steps(images, f"look at {part} images", len(images)) if not _is_jpeg(path)]
        if odd:
            yield f"{odd[0].relative_to(folder)} is not a JPEG" + (
                f" (nor are {len(odd) - 1:,} more)" if odd[1:] else ""
            )


def _is_jpeg(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(JPEG)) == JPEG


def fetch(name: str, data_dir: Path, *, address: str | None = None, md5: str | None = None) -> Path:
    """Download and unpack the data set ``name`` into ``data_dir`` unless it is there; returns its folder.

    An interrupted download goes on where it was; an archive that lies in ``data_dir`` already is taken, and never
    deleted. ``address`` and ``md5`` replace the official ones (a mirror). Raises ``DataError`` when the address does
    not answer, a file cannot be written, the sum is another, or the archive leads out of its folder.
    """
    chosen = study_set(name)
    target = data_dir / chosen.folder
    _check_folder(data_dir)
    if target.is_dir():
        state = _state(chosen, data_dir)
        if state != "whole":
            raise DataError(f"{target} is damaged ({state}); move it away and run this again.")
        return target
    address, md5 = address or chosen.address, md5 or chosen.md5
    data_dir.mkdir(parents=True, exist_ok=True)
    archive = data_dir / address.rsplit("/", 1)[-1]
    by_hand = archive.is_file()
    if not by_hand:
        _download(address, archive)
    found = _md5(archive)
    if found != md5:
        if not by_hand:
            archive.unlink()
        then = "move it away and run this again" if by_hand else f"it came from {address} and was deleted"
        raise DataError(f"{archive} has the md5 {found}, expected {md5}; {then}.")
    with tempfile.TemporaryDirectory(dir=data_dir, prefix=".unpack-") as room:
        _unpack(archive, Path(room))
        if not (Path(room) / chosen.folder).is_dir():
            raise DataError(f"{archive} holds no folder {chosen.folder}.")
        (Path(room) / chosen.folder).rename(target)
    return target


def _check_folder(data_dir: Path) -> None:
    if data_dir.is_file():
        raise DataError(f"{data_dir} is a file, not a folder for data sets.")


def _download(address: str, archive: Path) -> None:
    """Fetch into ``archive.partial``, from where an earlier try stopped, and rename when the length is whole."""
    partial = archive.with_name(archive.name + ".partial")
    have = partial.stat().st_size if partial.is_file() else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with _talking(address), urllib.request.urlopen(request, timeout=30) as answer:
            _receive(answer, partial, have, address)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:  # 416: nothing left to send, the last try ended just before the rename
            raise DataError(f"{address} answers {error.code} {error.reason}; fetch it yourself to {archive}.") from None
    partial.rename(archive)


def _receive(answer: http.client.HTTPResponse, partial: Path, have: int, address: str) -> None:
    """Write what comes; ``have`` bytes are in ``partial`` and stay there if the server heeds that."""
    resumed = answer.status == 206
    said = answer.headers.get("Content-Length") or ""
    left = int(said) if said.isdigit() else None
    pieces = None if left is None else -(-left // PIECE_BYTES)
    try:
        with partial.open("ab" if resumed else "wb") as file:
            for piece in steps(_pieces(answer, address), f"fetch {partial.stem} (MiB)", pieces):
                file.write(piece)
    except OSError as error:
        raise DataError(f"{partial} cannot be written: {(error.strerror or str(error)).lower()}.") from None
    size, total = partial.stat().st_size, None if left is None else left + (have if resumed else 0)
    if total is not None and size != total:
        raise DataError(f"{address} stopped after {size:,} of {total:,} bytes; run it again to go on.")


@contextmanager
def _talking(address: str) -> Iterator[None]:
    """A server that is not there, hangs up or talks nonsense, as one sentence."""
    try:
        yield
    except urllib.error.HTTPError:
        raise
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or repr(error)
        raise DataError(
            f"{address} cannot be fetched ({reason}); run it again to go on, or put the file into the folder yourself."
        ) from None


def _pieces(answer: BinaryIO, address: str) -> Iterator[bytes]:
    with _talking(address):
        while piece := answer.read(PIECE_BYTES):
            yield piece


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _unpack(archive: Path, room: Path) -> None:
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as opened:
                _check_size(archive, sum(member.file_size for member in opened.infolist()))
                for member in steps(opened.infolist(), f"unpack {archive.name}"):
                    place = PurePosixPath(member.filename)
                    if place.is_absolute() or ".." in place.parts or "\\" in member.filename:
                        raise DataError(f"{archive} names {member.filename!r}, which leads out of its folder.")
                    opened.extract(member, room)
        else:
            with tarfile.open(archive) as opened_tar:
                members = opened_tar.getmembers()
                _check_size(archive, sum(member.size for member in members))
                opened_tar.extractall(room, members, filter="data")
    except (tarfile.FilterError, tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise FormatError(f"{archive} cannot be unpacked: {error}.") from None
    except OSError as error:
        raise DataError(f"{archive} cannot be unpacked: {(error.strerror or str(error)).lower()}.") from None


def _check_size(archive: Path, size_bytes: int) -> None:
    free = shutil.disk_usage(archive.parent).free
    if size_bytes > UNPACKED_BYTES or size_bytes > free:
        raise DataError(f"{archive} unpacks to {size_bytes:,} bytes; the limit is {min(UNPACKED_BYTES, free):,}.")
