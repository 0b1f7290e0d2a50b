import hashlib
import os
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import shallowdeep.cifar
from shallowdeep.cifar import CIFAR, restricted_loads
from shallowdeep.data import read_cifar, read_data
from shallowdeep.files import FormatError
from shallowdeep.types import DataError


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def miniature(root: Path, monkeypatch: pytest.MonkeyPatch, kind: str = "cifar-10-batches-py") -> np.ndarray:
    """A CIFAR folder of two images a file whose md5 the reader expects; returns all training images."""
    folder, fine = root / kind, b"fine_" if kind == "cifar-100-python" else b""
    folder.mkdir(parents=True)
    rng, images = np.random.default_rng(0), []
    for split, files in CIFAR[kind].items():
        for name in files:
            data = rng.integers(0, 256, (2, 3072), dtype=np.uint8)
            if split == "train":
                images.append(data)
            rows = {b"data": data, fine + b"labels": [2, 0], b"coarse_labels": [9, 9]}
            content = {fine + b"label_names": [b"cat", b"dog", b"owl"]} if split == "names" else rows
            blob = pickle.dumps(content, protocol=3)
            (folder / name).write_bytes(blob)
            monkeypatch.setitem(files, name, hashlib.md5(blob).hexdigest())
    return np.concatenate(images)


@pytest.mark.parametrize("kind", sorted(CIFAR))
def test_a_miniature_cifar_is_read_from_its_folder_or_parent(tmp_path, monkeypatch, kind):
    images = miniature(tmp_path, monkeypatch, kind)
    data = read_data(tmp_path / kind, split="train")
    assert torch.equal(data.inputs, torch.from_numpy(images).view(-1, 3, 32, 32))
    assert data.labels_N.tolist() == [2, 0] * (len(images) // 2)
    assert data.class_names == ("cat", "dog", "owl")
    assert len(read_data(tmp_path, split="test")) == 2
    assert read_cifar(tmp_path, "test").fingerprint == read_data(tmp_path, split="test").fingerprint
    assert len(read_data(tmp_path, split="test", limit=1)) == 1


def test_cifar_splits_and_folders_are_named(tmp_path, monkeypatch):
    miniature(tmp_path, monkeypatch)
    for split in (None, "valid", "names"):
        with pytest.raises(DataError, match=f"has the splits train and test, found split={split!r}"):
            read_data(tmp_path, split=split)
    with pytest.raises(DataError, match=r"leave size=\(8, 8\) out"):
        read_data(tmp_path, split="test", size=(8, 8))
    with pytest.raises(DataError, match="is not, and does not hold, one of: cifar-10-batches-py, cifar-100-python"):
        read_cifar(tmp_path / "elsewhere", "test")
    miniature(tmp_path, monkeypatch, "cifar-100-python")
    with pytest.raises(DataError, match="holds cifar-10-batches-py and cifar-100-python; give one of them"):
        read_data(tmp_path, split="test")


def test_a_changed_cifar_file_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    miniature(tmp_path, monkeypatch)
    monkeypatch.setattr(shallowdeep.cifar, "restricted_loads", lambda _: pytest.fail("parsed"))
    path = tmp_path / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(FormatError, match=r"test_batch is not the authors' file: its md5 is [0-9a-f]{32}, theirs"):
        read_cifar(tmp_path, "test")
    path.unlink()
    with pytest.raises(FormatError, match=r"No file .*test_batch"):
        read_cifar(tmp_path, "test")


PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_malicious_pickle_is_refused(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FormatError, match=r"asks for (posix|nt)\.system; only uint8 arrays and plain values are read"):
        restricted_loads(pickle.dumps({1: Bomb()}, protocol))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "asked",
    [
        b"cbuiltins\neval\n.",
        b"cnumpy\nload\n.",
        b"cnumpy\nndarray.tofile\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x0bdtype.__new\x93.",
    ],
)
def test_only_the_four_names_of_an_array_are_found(asked):
    with pytest.raises(FormatError, match="The pickle asks for"):
        restricted_loads(asked)


def test_arrays_of_python_2_and_3_are_read():
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    for protocol in (3, 4):
        assert np.array_equal(restricted_loads(pickle.dumps(array, protocol)), array)
    # What Python 2's cPickle writes at protocol 2, as in the authors' files.
    python2 = (
        b"\x80\x02}U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02K\x03\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x06\x00\x01\x02\x03\x04\x05tbs."
    )
    assert np.array_equal(restricted_loads(python2)[b"data"], array)


@pytest.mark.parametrize(("dtype", "found"), [(">i2", "i2"), ("f8", "f8"), (object, "O8")])
def test_other_arrays_in_a_pickle_are_refused(dtype, found):
    with pytest.raises(FormatError, match=f"an array of '{found}'; only plain uint8 arrays are read"):
        restricted_loads(pickle.dumps(np.zeros(3, dtype), 3))
    with pytest.raises(FormatError, match="only plain uint8 arrays are read"):
        restricted_loads(pickle.dumps(np.asfortranarray(np.zeros((2, 3), np.uint8)), 3))


def test_a_pickle_asks_for_no_more_memory_than_it_fills():
    tracemalloc.start()
    # A list remembered under the number 2^20: six bytes for which pickle.Unpickler allocates 16 MB.
    assert restricted_loads(b"\x80\x02]r\x00\x00\x10\x00.") == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


@settings(deadline=None)
@given(st.data())
def test_a_damaged_pickle_is_read_or_one_sentence(data):
    whole = bytearray(pickle.dumps({b"labels": [1, 2], b"data": np.arange(4, dtype=np.uint8)}, 3))
    for position in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=2)):
        whole[position] = data.draw(st.integers(0, 127))
    try:
        restricted_loads(bytes(whole[: data.draw(st.integers(0, len(whole)))]))
    except FormatError as error:
        assert "\n" not in str(error)  # noqa: PT017


def test_the_real_cifar_10_is_read(cifar10):
    test = read_data(cifar10.parent, split="test")
    assert test.inputs.shape == (10000, 3, 32, 32)
    assert test.class_names[0] == "airplane"
    assert test.class_names[9] == "truck"
    assert test.labels_N.bincount().tolist() == [1000] * 10
    assert test.labels_N[:5].tolist() == [3, 8, 8, 0, 6]
    # The first test image's first red pixels, and the mean and std that everyone normalises CIFAR-10 with.
    assert test.inputs[0, 0, 0, :4].tolist() == [158, 159, 165, 166]
    train = read_cifar(cifar10, "train")
    assert len(train) == 50000
    scaled = train.inputs[::10].float() / 255
    assert scaled.mean((0, 2, 3)).tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=5e-3)
    assert scaled.std((0, 2, 3)).tolist() == pytest.approx([0.2470, 0.2435, 0.2616], abs=5e-3)
