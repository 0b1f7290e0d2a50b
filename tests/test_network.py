"""A backbone with exits as one ordinary module, and the files that hold what was added."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shallowdeep as sd
from nets import CLASSES, ZOO, Residual, images, planned
from shallowdeep.files import FormatError, read_tensors, write_tensors
from shallowdeep.inputs import call, each, logits_of, tensors
from shallowdeep.network import ShallowDeepNetwork, fingerprint, weights_hash
from shallowdeep.policies import Confidence
from shallowdeep.types import BackboneMismatch, ConfusionReference, CutError, DataError


def made(name: str = "residual", seed: int = 1) -> ShallowDeepNetwork:
    torch.manual_seed(seed)
    return sd.attach(ZOO[name].make(), planned(name)).eval()


def dressed(name: str = "residual") -> ShallowDeepNetwork:
    """With everything that travels with it."""
    sdn = made(name)
    sdn.class_names = ("ant", "bee", "cow", "dog", "eel")
    sdn.preprocessing = {"size": [8, 8], "mean": [0.5], "channel_order": "RGB"}
    sdn.trained_hashes = torch.tensor([-(2**62), 3, 5])
    exits = sdn.num_exits
    sdn.set_confusion_reference(
        ConfusionReference(mean_EE=torch.rand(exits, exits), covariance_EEE=torch.rand(exits, exits, exits))
    )
    return sdn


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------- a module like others


@pytest.mark.parametrize("name", ZOO)
def test_forward_answers_at_every_exit(name: str) -> None:
    sdn, inputs = made(name), ZOO[name].batch(3)
    with torch.no_grad():
        answers = sdn(inputs)
        assert answers.shape == (sdn.num_exits, 3, CLASSES)
        assert torch.equal(answers[-1], logits_of(call(sdn.backbone, inputs)))
        reduced, full = sdn.reduce(inputs)
        torch.testing.assert_close(torch.stack([*sdn.classify(reduced), full]), answers)
        last = sdn(each(inputs, lambda tensor: tensor[2:]))
        torch.testing.assert_close(last, answers[:, 2:], msg="rows are independent at every exit")


def test_the_last_exit_is_the_backbone_in_training_too() -> None:
    sdn = made("dropout_norm").train()
    twin = copy.deepcopy(sdn.backbone)
    torch.manual_seed(4)
    answers = sdn(images(6))
    torch.manual_seed(4)
    expected = twin(images(6))
    assert answers[-1].shape == expected.shape
    assert equal(dict(sdn.backbone.named_buffers()), dict(twin.named_buffers())), "statistics move as they always do"


def test_a_copy_is_a_network_of_its_own() -> None:
    sdn = dressed()
    twin = copy.deepcopy(sdn)
    assert torch.equal(twin(images(3)), sdn(images(3)))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert not torch.allclose(twin(images(3)), sdn(images(3)))
    assert torch.equal(sdn(images(3)), dressed()(images(3)))
    assert twin.class_names == sdn.class_names


def test_state_dict_goes_and_comes_back() -> None:
    a, b = dressed(), made(seed=2)
    with torch.no_grad():
        b.backbone.stem.weight.add_(1)  # type: ignore[union-attr,operator]
        assert not torch.equal(a(images(3)), b(images(3)))
        assert b.load_state_dict(a.state_dict()) == ([], [])
        assert torch.equal(a(images(3)), b(images(3)))
    names = list(a.state_dict())
    assert [n.removeprefix("backbone.") for n in names if n.startswith("backbone.")] == list(
        ZOO["residual"].make().state_dict()
    )
    assert b.confusion_reference is not None


def test_casts_reach_everything() -> None:
    sdn = made().double()
    answers = sdn(images(3, torch.float64))
    assert answers.dtype == torch.float64
    torch.testing.assert_close(answers.float(), made()(images(3)), rtol=1e-4, atol=1e-4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low, alone = made()(images(3)), made().backbone(images(3))
    assert low.dtype == alone.dtype == torch.bfloat16
    assert torch.equal(low[-1], alone)
    torch.testing.assert_close(low.float(), made()(images(3)).detach(), rtol=0.1, atol=0.1)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own, on first use
@pytest.mark.parametrize("name", ["residual", "masked_tokens"])
def test_compiled_answers_as_eager(name: str) -> None:
    sdn, batches = made(name), [ZOO[name].batch(rows) for rows in (3, 2)]
    compiled = torch.compile(sdn)
    with torch.no_grad():
        for inputs in batches:
            assert torch.equal(compiled(inputs), sdn(inputs))
        sdn.classifiers[0].load_state_dict({k: v + 1 for k, v in sdn.classifiers[0].state_dict().items()})
        assert torch.equal(compiled(batches[0]), sdn(batches[0]))


@pytest.mark.parametrize("name", ["residual", "dense_skip", "functional", "masked_tokens", "control_flow"])
def test_gradients_flow_through_all_exits(name: str) -> None:
    """In-place steps after a tap must not spoil what the exit's gradient needs."""
    sdn, inputs = made(name), ZOO[name].batch(3)
    torch.manual_seed(0)
    weights_EBC = torch.randn(sdn.num_exits, 3, CLASSES)
    (sdn(inputs) * weights_EBC).sum().backward()
    found = {n: p.grad.clone() for n, p in sdn.named_parameters() if p.grad is not None}
    assert found.keys() >= {n for n, _ in sdn.backbone.named_parameters(prefix="backbone")}
    torch.testing.assert_close(found, finite(sdn, inputs, weights_EBC, found), rtol=0.02, atol=0.02)


def finite(sdn: ShallowDeepNetwork, inputs: Any, weights_EBC: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Exit by exit, each from a pass of its own: their gradients add up to that of all together."""
    total = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
    for exit in range(sdn.num_exits):
        sdn.zero_grad()
        (sdn(inputs)[exit] * weights_EBC[exit]).sum().backward()
        for name, parameter in sdn.named_parameters():
            if parameter.grad is not None:
                total[name] += parameter.grad
    return total


def test_exits_do_not_pull_at_the_exits_before() -> None:
    sdn = made()
    assert any(spec.fed for spec in sdn.plan.classifiers)
    sdn(images(3))[1].sum().backward()
    pulls = [
        any(p.grad is not None and bool(p.grad.any()) for p in classifier.parameters())
        for classifier in sdn.classifiers
    ]
    assert pulls == [False, True, *[False] * (len(pulls) - 2)], "what is fed is detached"


def test_silent_rows_answer_without_the_exit_before() -> None:
    sdn = made()
    reduced, _ = sdn.reduce(images(4))
    silent = torch.tensor([True, False, True, False])
    with torch.no_grad():
        told = sdn.classify(reduced)
        mixed = sdn.classify(reduced, [silent] * len(reduced))
        alone = sdn.classifier(1).classify(reduced[1])[0]
    torch.testing.assert_close(mixed[1][silent], alone[silent])
    torch.testing.assert_close(mixed[1][~silent], told[1][~silent])
    assert not torch.allclose(told[1], alone)


def test_printed_shares() -> None:
    lines = str(made()).split("\n")
    assert lines[0] == f"Shallow-deep network of Residual, {made().num_exits} exits"
    own = sum(spec.params for spec in planned("residual").classifiers)
    total = sum(p.numel() for p in ZOO["residual"].make().parameters())
    assert lines[-1].split()[-2:] == [f"{own:,}", f"{own / total:.2%}"]


# ---------------------------------------------------------------- attach


def test_attach_shares_and_changes_nothing() -> None:
    model = ZOO["residual"].make().train()
    before = copy.deepcopy(model.state_dict())
    sdn = sd.attach(model, planned("residual"), num_classes=CLASSES)
    assert sdn.backbone is model
    assert sd.detach(sdn) is model
    assert equal(before, model.state_dict())
    assert all(module.training for module in model.modules())
    double = sd.attach(
        ZOO["residual"].make().double(), sd.plan(ZOO["residual"].make().double(), images(2, torch.float64))
    )
    assert {p.dtype for p in double.parameters()} == {torch.float64}


class Grey(Residual):
    """The same names for images with one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)


class Wide(Residual):
    """The same names, more classes."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, CLASSES + 1)


class Coarse(Residual):
    """The same names, smaller maps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, stride=2)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Grey(), r"another network: Grey does not take a tensor of rows \(\(3, 8, 8\),\)"),
        (Wide(), rf"{CLASSES} classes, Wide gives .* and {CLASSES + 1}\."),
        (Coarse(), r"expects .*\(8, 8, 8\).*Coarse gives \[\(8, 4, 4\)"),
        (nn.Linear(3, 3), "No module 'blocks"),
    ],
    ids=["one channel", "more classes", "smaller maps", "no such module"],
)
def test_a_plan_of_another_network_is_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(CutError, match=message):
        sd.attach(model.train(), planned("residual"))
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    "use",
    [
        lambda net, rows: sd.train_exits(net, rows),
        lambda net, rows: sd.train_jointly(net, rows),
        lambda net, rows: sd.collect(net, rows),
        lambda net, rows: sd.Engine(net, Confidence(threshold=0.5)),
    ],
)
def test_a_network_without_exits_is_refused(use: Callable[[nn.Module, object], object]) -> None:
    with pytest.raises(TypeError, match=r"^Linear has no internal classifiers: give what attach\("):
        use(nn.Linear(4, 3), (torch.zeros(8, 4), torch.zeros(8, dtype=torch.long)))


def test_another_number_of_classes_is_refused() -> None:
    with pytest.raises(DataError, match=f"num_classes=7, but Residual answers {CLASSES}"):
        sd.attach(ZOO["residual"].make(), planned("residual"), num_classes=7)


# ---------------------------------------------------------------- save and load


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "sdn"
    sd.save(dressed(), folder)
    return folder


def test_everything_that_was_added_comes_back(saved: Path) -> None:
    assert sorted(p.name for p in saved.iterdir()) == ["sdn.json", "sdn.safetensors"]
    model, sdn = ZOO["residual"].make(), dressed()
    back = sd.load(saved, model).eval()
    assert back.backbone is model
    assert back.plan == sdn.plan
    assert (back.class_names, back.preprocessing) == (sdn.class_names, sdn.preprocessing)
    assert torch.equal(back.trained_hashes, sdn.trained_hashes)
    assert back.confusion_reference is not None
    assert torch.equal(back.confusion_reference.covariance_EEE, sdn.confusion_covariance_EEE.double())
    assert torch.equal(back(images(3)), sdn(images(3)))
    tensors_saved, _ = read_tensors(saved / "sdn.safetensors")
    assert not any("stem" in name for name in tensors_saved), "the delta alone"


def test_unfitted_confusion_comes_back_unfitted(tmp_path: Path) -> None:
    sd.save(made(), tmp_path)
    assert sd.load(tmp_path, ZOO["residual"].make()).confusion_reference is None


def test_a_users_own_classifiers_come_back_with_their_factory(tmp_path: Path) -> None:
    def factory(shape: tuple[int, ...], classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))

    model = ZOO["residual"].make()
    sdn = sd.attach(model, sd.plan(model, images(2), at=(0.5,), classifier=factory)).eval()
    sd.save(sdn, tmp_path)
    assert torch.equal(sd.load(tmp_path, model, classifier=factory).eval()(images(2)), sdn(images(2)))
    with pytest.raises(DataError, match="give the factory again"):
        sd.load(tmp_path, model)


def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "sdn"))


def changed(folder: Path, **values: Any) -> Path:
    about = json.loads((folder / "sdn.json").read_text())
    about = {name: value for name, value in (about | values).items() if value is not None}
    (folder / "sdn.json").write_text(json.dumps(about))
    return folder


def refused(folder: Path, error: type[Exception], message: str) -> None:
    """``load`` fails with that message and leaves the model as it was."""
    model = ZOO["residual"].make().train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        sd.load(folder, model)
    assert equal(before, model.state_dict())
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_another_backbone_is_refused(saved: Path) -> None:
    model = ZOO["residual"].make()
    with torch.no_grad():
        model.blocks[2].conv1.weight[3, 2, 1, 0] += 1e-6
    with pytest.raises(BackboneMismatch, match="made for a Residual with other weights than this Residual"):
        sd.load(saved, model)
    with pytest.raises(BackboneMismatch, match="than this Linear"):
        sd.load(saved, nn.Linear(2, 2))


def test_a_newer_format_is_refused(saved: Path, tmp_path: Path) -> None:
    refused(changed(copied(saved, tmp_path), format=2), FormatError, "SDN format 2; this version reads up to 1")


@pytest.mark.parametrize("name", ["format", "fingerprint", "weights", "plan", "class_names", "preprocessing"])
def test_an_incomplete_description_is_refused(saved: Path, tmp_path: Path, name: str) -> None:
    refused(changed(copied(saved, tmp_path), **{name: None}), FormatError, r"sdn\.json does not describe an SDN")


def test_a_damaged_plan_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path)
    plan = json.loads((folder / "sdn.json").read_text())["plan"]
    refused(changed(folder, plan={**plan, "cuts": [{"name": "x"}]}), FormatError, "Not a plan")
    refused(changed(folder, plan={**plan, "depth": 3}), FormatError, "Not a plan.*depth")


def test_damaged_and_missing_files_are_refused(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path)
    weights = folder / "sdn.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-5])
    refused(folder, FormatError, r"sdn\.safetensors is damaged")
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(folder, FormatError, "not of one save")
    weights.unlink()
    refused(folder, FormatError, r"No file .*sdn\.safetensors")
    (folder / "sdn.json").write_text("{")
    refused(folder, FormatError, r"sdn\.json is damaged")
    (folder / "sdn.json").unlink()
    refused(folder, FormatError, r"No file .*sdn\.json")
    refused(tmp_path / "nowhere", FormatError, "No file .*nowhere")


@pytest.mark.parametrize("change", ["weights", "confusion", "hashes"])
def test_files_of_two_saves_are_refused(saved: Path, tmp_path: Path, change: str) -> None:
    folder, newer = copied(saved, tmp_path), dressed()
    if change == "weights":
        next(newer.classifiers.parameters()).data.add_(1)
    elif change == "confusion":
        newer.confusion_mean_EE.add_(1)
    else:
        newer.trained_hashes = torch.tensor([1])
    sd.save(newer, tmp_path / "newer")
    shutil.copy(tmp_path / "newer" / "sdn.safetensors", folder)
    refused(folder, FormatError, "sdn.json and sdn.safetensors are not of one save")


def test_another_networks_tensors_are_refused(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path)
    write_tensors(folder / "sdn.safetensors", {"classifiers.0.x": torch.zeros(1)}, {})
    refused(folder, FormatError, "not of one save")


def test_a_fingerprint_sees_every_bit() -> None:
    model = ZOO["residual"].make()
    prints = [fingerprint(model)]
    with torch.no_grad():
        model.stem.bias[0] = -model.stem.bias[0]
        prints.append(fingerprint(model))
        model.blocks[0].bn1.running_mean += 1e-3
        prints.append(fingerprint(model))
    prints.append(fingerprint(model.double()))
    prints.append(fingerprint(nn.Sequential(model)))
    assert len(set(prints)) == 5
    assert fingerprint(ZOO["residual"].make().train()) == prints[0]
    assert fingerprint(ZOO["residual"].make().to(memory_format=torch.channels_last)) == prints[0]


def test_inputs_are_left_alone() -> None:
    for name in ("residual", "batch_length", "masked_tokens"):
        inputs = ZOO[name].batch(3)
        made(name)(inputs)
        assert all(torch.equal(a, b) for a, b in zip(tensors(inputs), tensors(ZOO[name].batch(3)), strict=True))


def test_what_cannot_be_written_leaves_the_old_one(saved: Path, tmp_path: Path) -> None:
    folder, sdn = copied(saved, tmp_path), dressed()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    sdn.preprocessing = {"mean": torch.zeros(3)}
    next(sdn.classifiers.parameters()).data.add_(1)
    with pytest.raises(TypeError, match="not JSON serializable"):
        sd.save(sdn, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_fingerprint_is_of_tensors() -> None:
    class Noted(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"calls": 3}

        def set_extra_state(self, state: dict[str, int]) -> None: ...

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), Noted(6, 6), nn.Linear(6, 3))
    assert fingerprint(net) != fingerprint(nn.Sequential(nn.Linear(6, 6), Noted(6, 6), nn.Linear(6, 3)))
    sdn = sd.attach(net, sd.plan(net, torch.rand(4, 6), at=(0.4,)))
    sd.train_exits(sdn, (torch.randn(20, 6), torch.arange(20) % 3), epochs=1)


def test_weights_of_backbone_and_ics_have_a_hash_of_their_own() -> None:
    sdn, hashes = dressed(), []
    for part in (sdn.confusion_mean_EE, next(sdn.classifiers.parameters()).data, next(sdn.backbone.parameters()).data):
        hashes.append(weights_hash(sdn))
        part.add_(1)
    hashes.append(weights_hash(sdn))
    assert hashes[0] == hashes[1], "moments of confusion are no weights"
    assert len(set(hashes)) == 3
