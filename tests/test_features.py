"""Features and how rows are dealt: each row once, each view found again only if it is whole and of this network."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import shallowdeep as sd
from nets import CLASSES, ZOO, images, planned
from shallowdeep import features
from shallowdeep.augment import FlipCrop
from shallowdeep.features import (
    Extractor,
    Share,
    Store,
    View,
    cache_key,
    check_passes,
    choose_place,
    count_rows,
    extract_view,
    seeded,
    seeded_batches,
)
from shallowdeep.inputs import num_rows, row_hashes
from shallowdeep.network import ShallowDeepNetwork
from shallowdeep.types import DataError

ROWS = 21


@cache
def made() -> ShallowDeepNetwork:
    torch.manual_seed(1)
    return sd.attach(ZOO["residual"].make(), planned("residual", "paper")).eval()


def rows() -> tuple[Tensor, Tensor]:
    return images(ROWS), torch.arange(ROWS) % CLASSES


def extracted(data: object, store: Store, share: Share, augment: FlipCrop | None = None) -> tuple[View, Tensor]:
    return extract_view(
        made(),
        data,  # type: ignore[arg-type]
        augment,
        0,
        0,
        extractor=Extractor(made(), images(4), "fp32"),
        store=store,
        share=share,
    )


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", [1, 4, 5, 64])
def test_every_row_is_dealt_exactly_once(world: int, batch: int) -> None:
    order = torch.arange(ROWS)
    dealt: list[int] = []
    for rank in range(world):
        share, mine = Share(rank, world), []
        for start in range(0, ROWS, batch):
            mine += order[start : start + batch][share.of_batch(start)].tolist()
        assert mine == list(range(rank, ROWS, world)), "row g goes to process g % world"
        shuffled = torch.randperm(ROWS, generator=seeded(rank))
        places = share.places(shuffled)
        assert [mine[place] for place in places.tolist()] == [g for g in shuffled.tolist() if g % world == rank]
        dealt += mine
    assert sorted(dealt) == order.tolist()


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("stream", [False, True])
def test_shares_of_a_view_make_the_view(world: int, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "EXTRACT_BATCH", 6)
    x, y = rows()
    data = list(zip(x.split(5), y.split(5), strict=True)) if stream else (x, y)
    whole, hashes = extracted(data, Store(None, {}), Share(), FlipCrop())
    assert torch.equal(hashes, row_hashes(x))
    for rank in range(world):
        part, part_hashes = extracted(data, Store(None, {}), Share(rank, world), FlipCrop())
        assert torch.equal(part_hashes, hashes), "every process knows all rows"
        assert torch.equal(part.labels_N, y[rank::world])
        for all_rows, own in zip(whole.features, part.features, strict=True):
            torch.testing.assert_close(own, all_rows[rank::world])


def test_a_view_is_what_the_network_reduces(tmp_path: Path) -> None:
    x, y = rows()
    with torch.no_grad():
        expected, _ = made().reduce(x)
    for store in (Store(None, {}), Store(tmp_path, {})):
        view, _ = extracted([(x[:0], y[:0]), (x, y)], store, Share())
        assert torch.equal(view.labels_N, y)
        for a, b in zip(view.features, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_a_view_is_found_again_only_whole_and_of_the_same_kind(tmp_path: Path) -> None:
    key = {"backbone": "abc", "cuts": ["a"], "seed": 0}
    store = Store(tmp_path, key)
    assert store.find(0) is None
    made_view = extracted(rows(), store, Share())
    assert store.find(0) is None, "not yet marked as complete"
    store.finish(0, *made_view)
    found = store.find(0)
    assert found is not None
    assert torch.equal(found[0].labels_N, made_view[0].labels_N)
    assert torch.equal(found[1], made_view[1])
    assert all(torch.equal(a, b) for a, b in zip(found[0].features, made_view[0].features, strict=True))
    assert Store(tmp_path, key | {"seed": 1}).find(0) is None
    assert Store(None, key).find(0) is None
    last = tmp_path / "view0" / "exit1.bin"
    whole = last.read_bytes()
    last.write_bytes(whole[:-1])
    assert store.find(0) is None
    last.write_bytes(whole)
    assert store.find(0) is not None
    (tmp_path / "view0" / "rows.safetensors").write_bytes(b"half")
    assert store.find(0) is None
    (tmp_path / "view0" / "complete.json").write_text("{")
    assert store.find(0) is None


def test_a_key_knows_what_features_depend_on() -> None:
    data, share = rows(), Share()
    key = cache_key(made(), data, FlipCrop(), 0, share)
    assert key == cache_key(made(), rows(), FlipCrop(), 0, share)
    others = [
        cache_key(made(), (data[0] + 1e-6, data[1]), FlipCrop(), 0, share),
        cache_key(made(), data, FlipCrop(padding=3), 0, share),
        cache_key(made(), data, None, 0, share),
        cache_key(made(), data, FlipCrop(), 1, share),
        cache_key(made(), data, FlipCrop(), 0, Share(1, 2)),
        cache_key(made(), [data], FlipCrop(), 0, share),
    ]
    assert all(other != key for other in others)
    assert others[-1] != cache_key(made(), [data], FlipCrop(), 0, share), "a stream is never recognised"


def test_a_pass_is_seeded_by_epoch_alone() -> None:
    x, y = rows()

    def seen(data: object, epoch: int, shuffle: bool = True) -> Tensor:
        parts = list(seeded_batches(data, 4, 7, epoch, shuffle=shuffle))  # type: ignore[arg-type]
        assert sum(num_rows(inputs) for inputs, _ in parts) == ROWS
        return torch.cat([row_hashes(inputs) for inputs, _ in parts])

    own = DataLoader(TensorDataset(x, y), 4, shuffle=True, generator=torch.Generator())
    bare = DataLoader(TensorDataset(x, y), 4, shuffle=True)
    for data in ((x, y), own, bare):
        torch.manual_seed(1)
        first = seen(data, 0)
        after = torch.rand(1)
        torch.manual_seed(2)
        assert torch.equal(seen(data, 0), first)
        assert not torch.equal(seen(data, 1), first)
        assert torch.equal(first.sort().values, row_hashes(x).sort().values)
        torch.manual_seed(1)
        assert torch.equal(torch.rand(1), after), "the user's generator is not touched"
    assert torch.equal(seen((x, y), 0, shuffle=False), row_hashes(x))


def test_generators_differ_by_every_number() -> None:
    draws = [float(torch.rand(1, generator=seeded(*n))) for n in ((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (-1,))]
    assert len(set(draws)) == len(draws)
    assert draws[4] == float(torch.rand(1, generator=seeded(1, 0)))


def test_where_features_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "_free_bytes", lambda: 1000.0)
    assert choose_place("auto", 500, 10_000) == "memory"
    assert choose_place("auto", 501, 10_000) == "disk"
    assert choose_place("auto", 501, 500) == "off"
    assert choose_place("auto", None, 10_000) == "disk", "nobody knows how long it is"
    assert choose_place("disk", 10**12, 1) == "disk", "asked for is done"


def test_where_the_system_says_nothing_memory_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < features._free_bytes() < 1 << 50
    monkeypatch.setattr(features, "Path", lambda name: Path(name) / "none")
    assert choose_place("auto", 500, 10_000) == "memory"


def test_streams_are_counted_where_they_say_their_length() -> None:
    x, y = rows()
    loader = DataLoader(TensorDataset(x, y), 4)
    assert count_rows((x, y), x[:4]) == ROWS
    assert count_rows(loader, x[:4]) == 4 * len(loader)
    assert count_rows((batch for batch in loader), x[:4]) is None


def test_one_shot_data_serves_one_pass() -> None:
    check_passes(iter([1]), 1)
    check_passes([1], 5)
    with pytest.raises(DataError, match="5 passes over the data are needed, but list_iterator can be read only once"):
        check_passes(iter([1]), 5)


def test_an_augmentation_keeps_rows() -> None:
    with pytest.raises(DataError, match="as many rows as it gets: 21 in, 20 out"):
        extracted(rows(), Store(None, {}), Share(), lambda x, generator: x[1:])  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no rows to train on"):
        extracted([], Store(None, {}), Share())
