import dataclasses
import doctest
import io
import json
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import shallowdeep.data
from shallowdeep.data import (
    Dataset,
    Preprocessing,
    as_classes,
    digits,
    read_data,
    read_image,
)
from shallowdeep.files import FormatError
from shallowdeep.types import DataError, MissingExtra


def pixels(seed: int, height: int = 4, width: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Class ``cat`` with rows 0..2, ``dog`` with rows 3..5; row i holds ``pixels(i)``."""
    for i in range(6):
        path = tmp_path / "pets" / ("cat" if i < 3 else "dog") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(pixels(i)))
    return tmp_path / "pets"


def save(path: Path, **arrays: object) -> Path:
    np.savez(path, **arrays)
    return path


def stacked(*rows: int) -> torch.Tensor:
    return torch.stack([torch.from_numpy(pixels(i)).permute(2, 0, 1) for i in rows])


# --- data set -------------------------------------------------------------------------------------------------------


def dataset(inputs: object = None, labels: object = (0, 1, 1), names: tuple[str, ...] = ("a", "b")) -> Dataset:
    inputs = torch.zeros(3, 2) if inputs is None else inputs
    return Dataset(inputs=inputs, labels_N=torch.tensor(labels), class_names=names)


def test_rows_follow_positions_and_masks_in_every_tensor():
    data = dataset({"ids": torch.arange(3), "mask": torch.arange(6).view(3, 2)}, [0, 1, 0])
    twice = data.rows(torch.tensor([2, 2, 1]))
    assert len(twice) == 3
    assert twice.inputs["ids"].tolist() == [2, 2, 1]
    assert twice.inputs["mask"].tolist() == [[4, 5], [4, 5], [2, 3]]
    assert twice.labels_N.tolist() == [0, 0, 1]
    assert data.rows(torch.tensor([False, True, False])).labels_N.tolist() == [1]


def test_nan_and_infinity_are_counted_and_placed():
    inputs = torch.zeros(5, 2, 2)
    inputs[3, 1, 0], inputs[4, 0, 0] = float("nan"), float("-inf")
    with pytest.raises(DataError, match="2 of 5 rows of the data hold NaN or infinity, the first is row 3"):
        dataset({"ids": torch.zeros(5, dtype=torch.int64), "images": inputs}, [0, 1, 0, 1, 0])
    with pytest.raises(DataError, match="1 of 3 rows of the data hold NaN or infinity, the first is row 0"):
        dataset(torch.tensor([float("inf"), 1, 2]))


@pytest.mark.parametrize(
    ("inputs", "labels", "names", "message"),
    [
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), ("a", "b"), "No rows in the data"),
        (torch.zeros(3, 2), [0, 1], ("a", "b"), "Labels must be 3 class indices"),
        (torch.zeros(3, 2), [0, 1, 2], ("a", "b"), r"must lie in 0..1 for 2 classes, found 0..2"),
        (torch.zeros(3, 2), [0, -1, 1], ("a", "b"), r"found -1..1"),
        (torch.zeros(3, 2), [0.0, 1.0, 1.0], ("a", "b"), "torch.float32: a regression target"),
        (torch.zeros(3, 2), [0, 0, 0], ("a",), r"two classes or more, the data has \['a'\]"),
        ({"x": torch.zeros(3), "y": torch.zeros(2)}, [0, 1, 1], ("a", "b"), "same number of rows"),
    ],
)
def test_what_is_no_data_to_classify_is_refused(inputs, labels, names, message):
    with pytest.raises(DataError, match=message):
        Dataset(inputs=inputs, labels_N=torch.as_tensor(labels), class_names=names)


def test_the_fingerprint_is_of_the_contents_alone():
    base = dataset(torch.arange(6.0).view(3, 2))
    assert len(base.fingerprint) == 64
    assert base.fingerprint == dataclasses.replace(base, source="elsewhere").fingerprint
    assert base.fingerprint == dataset(torch.arange(6.0).view(2, 3).T.contiguous().T.reshape(3, 2)).fingerprint
    assert base.fingerprint == base.rows(torch.arange(3)).fingerprint
    one = {"a": torch.zeros(3), "b": torch.ones(3)}
    assert dataset(one).fingerprint == dataset(dict(reversed(one.items()))).fingerprint
    others = [
        dataset(torch.arange(6.0).view(3, 2, 1)),
        dataset(torch.arange(6.0).view(3, 2).double()),
        dataset(torch.arange(6.0).view(3, 2), [1, 1, 1]),
        dataset(torch.arange(6.0).view(3, 2), names=("a", "c")),
        dataset(torch.tensor([[0.0, 1], [2, 3], [4, 6]])),
        dataset(one),
        dataset({"a": torch.ones(3), "b": torch.zeros(3)}),
        dataset({"a": torch.zeros(3), "c": torch.ones(3)}),
    ]
    assert len({data.fingerprint for data in (base, *others)}) == 1 + len(others)


# --- image folders --------------------------------------------------------------------------------------------------


def test_a_folder_of_class_folders(folder):
    (folder / "dog" / "notes.txt").write_text("not an image")
    (folder / ".hidden").mkdir()
    data = read_data(folder)
    assert torch.equal(data.inputs, stacked(*range(6)))
    assert data.inputs.dtype == torch.uint8
    assert data.labels_N.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.class_names == ("cat", "dog")
    assert data.source == str(folder)


def test_the_same_rows_have_one_fingerprint_in_every_kind_of_file(folder, tmp_path):
    images, labels, names = np.stack([pixels(i) for i in range(6)]), [0, 0, 0, 1, 1, 1], ["cat", "dog"]
    array = read_data(save(tmp_path / "x.npz", images=images, labels=labels, class_names=names))
    write_parquet(tmp_path / "x.parquet", list(range(6)), names=names, label=labels)
    table = read_data(tmp_path / "x.parquet")
    assert read_data(folder).fingerprint == array.fingerprint == table.fingerprint


def test_limit_spreads_over_the_classes(folder):
    data = read_data(folder, limit=2)
    assert torch.equal(data.inputs, stacked(0, 3))
    assert data.labels_N.tolist() == [0, 1]
    assert len(read_data(folder, limit=100)) == 6
    with pytest.raises(DataError, match="limit must be at least 1 row, found 0"):
        read_data(folder, limit=0)


def test_splits(folder, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    folder.rename(root / "train")
    (root / "test" / "cat").mkdir(parents=True)
    (root / "test" / "cat" / "x.png").write_bytes(encoded(pixels(9)))
    with pytest.raises(DataError, match=r"number their classes differently: only one has \['dog'\]"):
        read_data(root, split="test")
    (root / "test" / "dog").mkdir()
    assert torch.equal(read_data(root, split="test").inputs, stacked(9))
    assert len(read_data(root, split="train")) == 6
    with pytest.raises(DataError, match="If test is a split, pass split=, one of: test, train"):
        read_data(root)
    for split in ("valid", "../pets", "", "/"):
        with pytest.raises(DataError, match=r"No split .* folders there: test, train") as raised:
            read_data(root, split=split)
        assert repr(split) in str(raised.value)


@pytest.mark.parametrize("kind", ["BMP", "JPEG", "PNG", "WEBP"])
def test_every_kind_of_image_is_read(tmp_path, kind):
    (tmp_path / f"x.{kind.lower()}").write_bytes(encoded(np.full((3, 5, 3), (255, 0, 0), np.uint8), kind))
    image = read_image(tmp_path / f"x.{kind.lower()}")
    assert image.shape == (3, 3, 5)
    assert image.float().mean((1, 2)).sub(torch.tensor([255.0, 0, 0])).abs().max() < 4


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    image = Image.new("RGB", (2, 2), "white").convert(mode)
    if mode == "P":
        image.save(tmp_path / "x.png", transparency=bytes([9, 200, 3]))
    else:
        image.save(tmp_path / ("x.jpg" if mode == "CMYK" else "x.png"))
    (file,) = tmp_path.iterdir()
    assert read_image(file).flatten().tolist() == [255] * 12


def test_sizes_differ_or_are_made_equal(folder):
    (folder / "dog" / "5.png").write_bytes(encoded(pixels(5, 7, 9)))
    with pytest.raises(DataError, match=r"5\.png is 7 x 9 but .*0\.png is 4 x 6; pass size=\(height, width\)"):
        read_data(folder)
    data = read_data(folder, size=(8, 5))
    assert data.inputs.shape == (6, 3, 8, 5)
    expected = Image.fromarray(pixels(0)).resize((5, 8), Image.Resampling.BILINEAR)
    assert torch.equal(data.inputs[0].permute(1, 2, 0), torch.from_numpy(np.array(expected)))
    for size in ((0, 4), (4, 4, 4)):
        with pytest.raises(DataError, match=r"size must be \(height, width\)"):
            read_data(folder, size=size)


def test_links_are_refused(folder, tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(encoded(pixels(1)))
    link = folder / "cat" / "9.png"
    link.symlink_to(secret)
    with pytest.raises(DataError, match=r"9\.png is a link and may lead out of the data"):
        read_data(folder)
    link.unlink()
    (folder / "owl").symlink_to(folder / "cat", target_is_directory=True)
    with pytest.raises(DataError, match="owl is a link"):
        read_data(folder)
    (folder / "owl").unlink()
    assert len(read_data(folder)) == 6


def test_a_pipe_is_not_waited_for(folder):
    os.mkfifo(folder / "cat" / "9.png")
    assert len(read_data(folder)) == 6


def test_folders_without_images(tmp_path):
    with pytest.raises(DataError, match=r"No file or folder .*nowhere"):
        read_data(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"No images: .* found nothing"):
        read_data(tmp_path)
    (tmp_path / "x.png").write_bytes(encoded(pixels(0)))
    with pytest.raises(DataError, match=r"No images: .* found x\.png"):
        read_data(tmp_path)
    with pytest.raises(DataError, match=r"x\.png is no data"):
        read_data(tmp_path / "x.png")
    (tmp_path / "one").mkdir()
    (tmp_path / "x.png").rename(tmp_path / "one" / "x.png")
    with pytest.raises(DataError, match=r"two classes or more, .* has \['one'\]"):
        read_data(tmp_path)


@pytest.mark.parametrize("pillows", [10**9, 700, 70])
def test_bombs_are_refused_before_decoding(folder, monkeypatch, pillows):
    (folder / "dog" / "9.png").write_bytes(encoded(np.zeros((40, 30, 3), np.uint8)))
    monkeypatch.setattr(shallowdeep.data, "LIMIT_PIXELS", 1199)
    # Pillow itself keeps quiet, warns (an error in this test run) or raises.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows)
    with pytest.raises(DataError, match=r"9\.png has .*1,?199"):
        read_data(folder, size=(4, 6))
    monkeypatch.setattr(shallowdeep.data, "LIMIT_PIXELS", 1200)
    if pillows == 10**9:
        assert len(read_data(folder, size=(4, 6))) == 7


def test_memory_is_bounded(folder, monkeypatch):
    monkeypatch.setattr(shallowdeep.data, "LIMIT_BYTES", 6 * 3 * 4 * 6 - 1)
    with pytest.raises(DataError, match=r"6 images like .*0\.png unpacks to 432 bytes, the limit is 431"):
        read_data(folder)
    assert len(read_data(folder, limit=5)) == 5


def test_sixteen_bits_and_other_formats_are_refused(tmp_path):
    Image.fromarray(np.full((2, 2), 40000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png has more than 8 bits a channel \(mode I;16\)"):
        read_image(tmp_path / "deep.png")
    for kind in ("EPS", "GIF"):
        (tmp_path / "other.png").write_bytes(encoded(pixels(0), kind))
        with pytest.raises(FormatError, match=r"other\.png cannot be read"):
            read_image(tmp_path / "other.png")


WHOLE = {kind: encoded(pixels(3, 20, 30), kind) for kind in ("BMP", "JPEG", "PNG", "WEBP")}


@settings(deadline=None)
@given(st.sampled_from(sorted(WHOLE)), st.data())
def test_damaged_images_are_read_or_one_sentence(kind, data):
    whole = bytearray(WHOLE[kind])
    for position in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=3)):
        whole[position] = data.draw(st.integers(0, 255))
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        assert read_image(io.BytesIO(cut), name="photo").dtype == torch.uint8
    except (FormatError, DataError) as error:
        assert str(error).startswith("photo ")  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize("kind", sorted(WHOLE))
def test_a_truncated_image_is_named(folder, kind):
    (folder / "dog" / "4.png").write_bytes(WHOLE[kind][: len(WHOLE[kind]) // 2])
    with pytest.raises(FormatError, match=r"dog.4\.png cannot be read, it is damaged"):
        read_data(folder, size=(4, 6))


# --- npz ------------------------------------------------------------------------------------------------------------


def test_npz_of_images_puts_channels_first(tmp_path):
    images = np.stack([pixels(i) for i in range(4)])
    colour = read_data(save(tmp_path / "c.npz", images=images, labels=[0, 1, 1, 0], class_names=["x", "y"]))
    assert torch.equal(colour.inputs, stacked(*range(4)))
    assert colour.class_names == ("x", "y")
    grey = read_data(save(tmp_path / "g.npz", inputs=images[..., :1], labels=np.array([0, 1, 1, 0], np.uint8)))
    assert torch.equal(grey.inputs, stacked(*range(4))[:, :1])
    assert grey.class_names == ("0", "1")
    assert grey.labels_N.dtype == torch.int64


@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (4, 5, 6, 2), (4, 5, 3)])
def test_other_arrays_keep_their_axes(tmp_path, shape):
    array = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    data = read_data(save(tmp_path / "x.npz", images=array, labels=[0, 1, 1, 0]))
    assert torch.equal(data.inputs, torch.from_numpy(array))
    floating = np.zeros((4, 5, 6, 3), np.float32)
    assert read_data(save(tmp_path / "f.npz", images=floating, labels=[0, 1, 1, 0])).inputs.shape == (4, 5, 6, 3)


def test_npz_of_tokens_is_a_dict(tmp_path):
    ids = np.arange(6, dtype=">i4").reshape(3, 2)
    data = read_data(save(tmp_path / "t.npz", input_ids=ids, attention_mask=ids > 0, labels=[0, 1, 0]), limit=2)
    assert list(data.inputs) == ["input_ids", "attention_mask"]
    assert data.inputs["input_ids"].tolist() == [[0, 1], [2, 3]]
    assert data.inputs["attention_mask"].dtype == torch.int64


def test_npz_floats_keep_their_type(tmp_path):
    for dtype in ("<f2", ">f4", "<f8"):
        array = np.array([[1.5], [2.5]], dtype)
        data = read_data(save(tmp_path / "f.npz", inputs=array, labels=[0, 1]))
        assert data.inputs.tolist() == [[1.5], [2.5]]
        assert data.inputs.element_size() == array.itemsize


ROWS = {"images": np.zeros((3, 2)), "labels": np.array([0, 1, 1])}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": ROWS["images"]}, "needs an array 'labels'; found images"),
        ({"labels": ROWS["labels"]}, "needs beside 'labels' one array 'images' or 'inputs'.*found labels"),
        (
            ROWS | {"inputs": ROWS["images"]},
            "one array 'images' or 'inputs', or named others; found images, labels, inputs",
        ),
        (ROWS | {"ids": ROWS["labels"]}, "found images, labels, ids"),
        (ROWS | {"labels": [0, 1]}, r"Labels must be 3 class indices, found torch.int64 \(2,\)"),
        (ROWS | {"labels": [0.0, 1.0, 1.0]}, "Labels are torch.float64: a regression target"),
        (ROWS | {"labels": [[1, 0], [0, 1], [0, 1]]}, "multi-label or one-hot"),
        (ROWS | {"labels": [0, 2, 4]}, "every label 0..C-1 must occur in .*; found 0, 2, 4"),
        (ROWS | {"labels": [-1, 0, 1]}, "found -1, 0, 1"),
        (ROWS | {"labels": [0, 1, 2], "class_names": ["a", "b"]}, r"must lie in 0..1 for 2 classes, found 0..2"),
        (ROWS | {"class_names": [1, 2]}, r"'class_names' of .* must be a list of text, found int64 \(2,\)"),
        (ROWS | {"images": ["a", "b", "c"]}, "'images' of .* must be numbers of up to 64 bits, found <U1"),
        (ROWS | {"images": np.zeros((3, 2), complex)}, "found complex128"),
        pytest.param(
            ROWS | {"images": np.zeros((3, 2), np.longdouble)},
            "numbers of up to 64 bits, found float",
            marks=pytest.mark.skipif(np.dtype(np.longdouble).itemsize == 8, reason="no longer floats here"),
        ),
        ({"images": np.zeros((0, 2)), "labels": np.zeros(0, int)}, "No rows in"),
        (
            ROWS | {"images": np.array([[1.0], [np.nan], [np.inf]])},
            r"2 of 3 rows of .*x\.npz hold NaN or infinity, the first is row 1",
        ),
    ],
)
def test_npz_that_is_no_data(tmp_path, arrays, message):
    with pytest.raises(DataError, match=message):
        read_data(save(tmp_path / "x.npz", **arrays))


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_npz_objects_are_not_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path / "x.npz", images=np.array([Bomb(), Bomb()]), labels=[0, 1])
    with pytest.raises(FormatError, match=r"x\.npz cannot be read.*Object arrays cannot be loaded"):
        read_data(path)
    assert not (tmp_path / "exploded").exists()


def test_npz_bombs_are_refused_before_unpacking(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, images=np.zeros((2, 10**6), np.uint8), labels=[0, 1])
    assert path.stat().st_size < 10**4
    monkeypatch.setattr(shallowdeep.data, "LIMIT_BYTES", 10**6)
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("unpacked"))
    with pytest.raises(DataError, match=r"x\.npz unpacks to 2,000,\d+ bytes, the limit is 1,000,000"):
        read_data(path)


@settings(deadline=None)
@given(st.data())
def test_damaged_npz_is_read_or_one_sentence(tmp_path_factory, data):
    file = io.BytesIO()
    np.savez_compressed(file, images=np.arange(12, dtype=np.uint8).reshape(3, 4), labels=[0, 1, 1])
    whole = bytearray(file.getvalue())
    for position in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=3)):
        whole[position] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        assert len(read_data(path))
    except (FormatError, DataError) as error:
        assert "\n" not in str(error)  # noqa: PT017


def test_npz_of_other_bytes(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("labels.npy", b"no array")
    with pytest.raises((DataError, FormatError), match=r"x\.npz"):
        read_data(tmp_path / "x.npz")


@pytest.mark.parametrize(("option", "value"), [("split", "train"), ("size", (2, 2))])
def test_options_without_meaning_are_refused(tmp_path, option, value):
    path = save(tmp_path / "x.npz", **ROWS)
    with pytest.raises(DataError, match=f"leave {option}=.* out"):
        read_data(path, **{option: value})


# --- parquet --------------------------------------------------------------------------------------------------------


def write_parquet(path: Path, rows: list[int], struct: bool = True, names: list[str] | None = None, **columns) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    blobs = [encoded(pixels(i)) for i in rows]
    images = [{"bytes": blob, "path": "/etc/hostname"} for blob in blobs] if struct else blobs
    table = pa.table({"image": images, "label": [i % 2 for i in rows]} | columns)
    if names is not None:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=2)


@pytest.mark.parametrize("struct", [True, False])
def test_parquet_of_images(tmp_path, struct):
    write_parquet(tmp_path / "x.parquet", [0, 1, 2, 3, 4], struct)
    data = read_data(tmp_path / "x.parquet")
    assert torch.equal(data.inputs, stacked(0, 1, 2, 3, 4))
    assert data.labels_N.tolist() == [0, 1, 0, 1, 0]
    assert data.class_names == ("0", "1")
    assert torch.equal(read_data(tmp_path / "x.parquet", limit=2).inputs, stacked(0, 2))
    assert read_data(tmp_path / "x.parquet", size=(2, 3)).inputs.shape == (5, 3, 2, 3)


def test_parquet_shards_and_splits(tmp_path):
    write_parquet(tmp_path / "train-00000-of-00002.parquet", [0, 1, 2], names=["cat", "dog", "owl"])
    write_parquet(tmp_path / "train-00001-of-00002.parquet", [3, 4], names=["cat", "dog", "owl"])
    train = read_data(tmp_path)
    assert torch.equal(train.inputs, stacked(0, 1, 2, 3, 4))
    assert train.class_names == ("cat", "dog", "owl")
    write_parquet(tmp_path / "test-00000-of-00001.parquet", [7, 8])
    assert torch.equal(read_data(tmp_path, split="test").inputs, stacked(7, 8))
    assert torch.equal(read_data(tmp_path, split="train").inputs, train.inputs)
    with pytest.raises(DataError, match="holds several splits, pass split=, one of: test, train"):
        read_data(tmp_path)
    with pytest.raises(DataError, match=r"No split 'valid' in .*; files there are of: test, train"):
        read_data(tmp_path, split="valid")
    with pytest.raises(DataError, match="one file without splits; leave split='test' out"):
        read_data(tmp_path / "test-00000-of-00001.parquet", split="test")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": ["cat", "dog"]}, "Every 'label' of .* must be an integer, found string with 0 missing"),
        ({"label": [0, None]}, "found int64 with 1 missing"),
        ({"image": [1, 2]}, "must be encoded images, binary or struct<bytes, path>; found int64"),
        ({"image": [{"path": "/etc/hostname"}] * 2}, "found struct<path: string>"),
        ({"label": [3, 4]}, "every label 0..C-1 must occur in .*; found 3, 4"),
    ],
)
def test_parquet_that_is_no_data(tmp_path, columns, message):
    write_parquet(tmp_path / "x.parquet", [0, 1], **columns)
    with pytest.raises(DataError, match=message):
        read_data(tmp_path / "x.parquet")


def test_parquet_without_the_columns_or_rows_or_bytes(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"img": [b"x"], "label": [0]}), path)
    with pytest.raises(DataError, match="needs columns 'image' and 'label'; found img, label"):
        read_data(path)
    pq.write_table(pa.table({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}), path)
    with pytest.raises(DataError, match="No rows in"):
        read_data(path)
    blobs = [{"bytes": encoded(pixels(0)), "path": None}, {"bytes": None, "path": "/etc/hostname"}]
    pq.write_table(pa.table({"image": blobs, "label": [0, 1]}), path)
    with pytest.raises(FormatError, match=r"row 1 of x\.parquet cannot be read"):
        read_data(path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", bytes(100)):
        path.write_bytes(damaged)
        with pytest.raises(FormatError, match=r"x\.parquet cannot be read"):
            read_data(path)


def test_parquet_bombs_are_refused(tmp_path, monkeypatch):
    write_parquet(tmp_path / "x.parquet", [0, 1])
    monkeypatch.setattr(shallowdeep.data, "LIMIT_BYTES", 100)
    with pytest.raises(DataError, match=r"x\.parquet unpacks to .* the limit is 100"):
        read_data(tmp_path / "x.parquet")


def test_a_missing_pyarrow_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r"pip install 'shallowdeep\[data\]'"):
        read_data(tmp_path / "x.parquet")


# --- digits and preprocessing ---------------------------------------------------------------------------------------


def test_digits():
    data = digits()
    assert data.inputs.shape == (1797, 1, 8, 8)
    assert data.inputs.dtype == torch.uint8
    assert data.inputs.unique().tolist() == [round(level * 15.9375) for level in range(17)]
    assert data.class_names == tuple("0123456789")
    assert data.labels_N[:10].tolist() == list(range(10))


IMAGENET = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), size=(4, 6))


def test_preprocessing_is_the_formula():
    images = stacked(0, 1)
    found = IMAGENET.apply(images)
    mean, std = np.array(IMAGENET.mean)[:, None, None], np.array(IMAGENET.std)[:, None, None]
    expected = (images.numpy().astype(np.float64) / 255 - mean) / std
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    assert found.dtype == torch.float32
    assert torch.equal(images, stacked(0, 1))
    swapped = dataclasses.replace(IMAGENET, channel_order="BGR").apply(images)
    assert torch.equal(swapped, IMAGENET.apply(images[:, [2, 1, 0]]))
    assert torch.equal(IMAGENET.apply(found), found)


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (torch.zeros(2, 3, 4, 7, dtype=torch.uint8), r"uint8 \[2, 3, 4, 7\]"),
        (torch.zeros(2, 1, 4, 6, dtype=torch.uint8), r"uint8 \[2, 1, 4, 6\]"),
        (torch.zeros(3, 4, 6, dtype=torch.uint8), r"uint8 \[3, 4, 6\]"),
        (torch.zeros(2, 3, 4, 6, dtype=torch.int64), r"int64 \[2, 3, 4, 6\]"),
    ],
)
def test_preprocessing_refuses_other_images(images, found):
    with pytest.raises(DataError, match=r"Images must be uint8 \[B, 3, 4, 6\], found " + found):
        IMAGENET.apply(images)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(-2, 2), st.floats(0.01, 9)), min_size=1, max_size=4), st.sampled_from(["RGB", "BGR"])
)
def test_preprocessing_survives_json(channels, order):
    mean, std = (tuple(values) for values in zip(*channels, strict=True))
    made = Preprocessing(mean=mean, std=std, size=(3, 5), channel_order=order)
    assert Preprocessing.from_json(json.loads(json.dumps(made.to_json()))) == made


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"std": (1.0, 0.0, 1.0)}, r"found mean .*, std \(1.0, 0.0, 1.0\)"),
        ({"std": (1.0,)}, r"std \(1.0,\)"),
        ({"mean": (), "std": ()}, r"found mean \(\)"),
        ({"mean": (float("nan"), 0.0, 0.0)}, "nan"),
        ({"size": (0, 3)}, r"found \(0, 3\)"),
        ({"channel_order": "GBR"}, "must be 'RGB' or 'BGR', found 'GBR'"),
    ],
)
def test_preprocessing_refuses_nonsense(changes, message):
    with pytest.raises(DataError, match=message):
        dataclasses.replace(IMAGENET, **changes)
    with pytest.raises(FormatError, match=message):
        Preprocessing.from_json(IMAGENET.to_json() | changes)
    with pytest.raises(FormatError, match="zoom"):
        Preprocessing.from_json(IMAGENET.to_json() | {"zoom": 2})
    with pytest.raises(FormatError, match="'size'"):
        Preprocessing.from_json({"mean": [0], "std": [1]})


def test_the_examples_in_docstrings_and_docs_run(tmp_path, monkeypatch):
    page = Path(__file__).parents[1] / "docs" / "data.md"
    monkeypatch.chdir(tmp_path)
    for result in (doctest.testmod(shallowdeep.data), doctest.testfile(str(page), module_relative=False)):
        assert result.attempted >= 4
        assert not result.failed


def test_labels_follow_the_names_that_a_network_knows() -> None:
    some = Dataset(inputs=torch.zeros(3, 2), labels_N=torch.tensor([0, 1, 1]), class_names=("ant", "cat"))
    assert as_classes(some, ("ant", "bee", "cat")).labels_N.tolist() == [0, 2, 2]
    assert as_classes(some, ("cat", "ant")).labels_N.tolist() == [1, 0, 0]
    for names in ((), ("0", "1"), ("ant", "cat", "class 2")):
        assert as_classes(some, names) is some
    with pytest.raises(DataError, match=r"has the class 'cat', which the network does not know; its classes: ant, bee"):
        as_classes(some, ("ant", "bee"))
