"""Joint training: the objective, its weights, resumption, several processes, and what it leaves alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor

import shallowdeep as sd
from nets import CLASSES, ZOO, images
from shallowdeep.files import FormatError
from shallowdeep.joint import JointRecipe, Taus, train_backbone
from shallowdeep.network import ShallowDeepNetwork
from shallowdeep.types import DataError
from test_training import DROPLESS, equal, kill_in_the_middle, planned, rows

GENTLE = JointRecipe(lr=0.02, batch_size=20, weight_decay=1e-4)


def made(name: str = "shared", classifier: str = "paper") -> ShallowDeepNetwork:
    plan, model = planned(name, classifier), ZOO[name].make()
    torch.manual_seed(1)
    return sd.attach(model, plan)


def weights(sdn: ShallowDeepNetwork) -> list[Tensor]:
    """All but the confusion moments, which are unknown (nan) here."""
    return [value.detach().clone() for name, value in sdn.state_dict().items() if "confusion" not in name]


def test_everything_learns_on_a_copy() -> None:
    sdn = made("residual", "strong")
    before = weights(sdn)
    x, y = rows()
    trained = sd.train_jointly(sdn, (x, y), epochs=12, recipe=GENTLE)
    assert equal(before, weights(sdn)), "the original is left alone"
    assert trained.backbone is not sdn.backbone
    with torch.no_grad():
        loss = [[float(F.cross_entropy(a, y)) for a in net.eval()(x)] for net in (sdn, trained)]
    assert all(b < a for a, b in zip(*loss, strict=True))
    assert len(trained.trained_hashes) == 60


def test_in_place_trains_the_users_own_modules() -> None:
    sdn = made()
    backbone = sdn.backbone
    same = sd.train_jointly(sdn, rows(), epochs=1, recipe=GENTLE, in_place=True)
    assert same is sdn
    assert same.backbone is backbone


def test_taus_are_the_papers() -> None:
    costs = (0.15, 0.30, 0.45, 0.60, 0.75, 0.90)
    taus = Taus(costs, 100, 0.01)
    for epoch in range(100):
        expected = [min(c, 0.01 + (epoch + 1) * c / 100) for c in costs]
        assert taus.at(epoch) == pytest.approx(expected)
    full = [next(e for e in range(100) if taus.at(e)[i] == c) + 1 for i, c in enumerate(costs)]
    assert (full[0], full[-1]) == (94, 99), "IC 1 has its full weight from epoch 94 on, IC 6 from 99"


def test_one_step_is_the_weighted_objective() -> None:
    """Against the loss written out by hand and plain SGD."""
    sdn = made()
    x, y = rows(20)
    recipe = JointRecipe(lr=0.1, momentum=0.0, weight_decay=0.0, batch_size=20, milestones=(0.9,))
    trained = sd.train_jointly(sdn, (x, y), epochs=1, recipe=recipe)
    sdn.train()
    answers = sdn(x)
    taus = [min(c, 0.01 + c) for c in sdn.plan.cost_E[:-1]]
    loss = F.cross_entropy(answers[-1], y) + sum(
        t * F.cross_entropy(a, y) for t, a in zip(taus, answers[:-1], strict=True)
    )
    gradients = torch.autograd.grad(loss, list(sdn.parameters()))
    for p, g, after in zip(sdn.parameters(), gradients, trained.parameters(), strict=True):
        torch.testing.assert_close(p - 0.1 * g, after, rtol=1e-4, atol=1e-5)


def test_rescaled_gradients_weigh_every_exit_alike() -> None:
    """At a cut with k exits ahead: own gradient / (k + 1), the rest times k / (k + 1)."""
    sdn = made("shared").double()
    x = images(6, torch.float64).requires_grad_()
    plain, scaled = sdn.answers(x), sdn.answers(x, rescale_gradients=True)
    assert torch.equal(plain, scaled), "only the way back changes"
    exits = sdn.num_exits
    for exit in range(exits):
        (g,) = torch.autograd.grad(plain[exit].sum(), x, retain_graph=True)
        (s,) = torch.autograd.grad(scaled[exit].sum(), x, retain_graph=True)
        # Passing cut i costs (exits - i - 1) / (exits - i); an IC then takes its 1 / (exits - own).
        factor = 1.0
        for i in range(exit):
            factor *= (exits - i - 1) / (exits - i)
        if exit < exits - 1:
            factor /= exits - exit
        torch.testing.assert_close(s, factor * g)
        assert factor == pytest.approx(1 / exits)


def test_distillation_changes_the_answer_and_learns() -> None:
    a = sd.train_jointly(made(), rows(), epochs=2, recipe=GENTLE)
    b = sd.train_jointly(made(), rows(), epochs=2, recipe=JointRecipe(lr=0.02, batch_size=20, distillation=1.0))
    assert not equal(weights(a), weights(b))


def long_run(folder: str) -> list[Tensor]:
    recipe = JointRecipe(lr=0.02, batch_size=20)
    return weights(sd.train_jointly(made("dropout_norm"), rows(), epochs=40, recipe=recipe, checkpoint_dir=folder))


@pytest.mark.slow
def test_killed_run_goes_on_to_equal_weights(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        kill_in_the_middle("joint", tmp_path / "killed")
        saved = torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)["state"]["epoch"]
        assert 0 < saved < 40
        assert equal(long_run(str(tmp_path / "killed")), long_run(str(tmp_path / "whole")))
    finally:
        torch.set_num_threads(threads)


def exits_and_jointly(fabric: Fabric) -> list[Tensor]:
    """ICs on a frozen backbone, then everything; the paper's ICs draw nothing at random. In float64: how many threads
    a process has decides about rounding.
    """
    sdn, (x, labels) = made().double(), rows()
    sd.train_exits(sdn, (x.double(), labels), epochs=3, recipe=DROPLESS, fabric=fabric)
    exits = [p.detach().clone() for p in sdn.classifiers.parameters()]
    return exits + weights(sd.train_jointly(sdn, (x.double(), labels), epochs=3, recipe=GENTLE, fabric=fabric))


def in_two_processes(fabric: Fabric, folder: str) -> None:
    learned = exits_and_jointly(fabric)
    if fabric.global_rank == 0:
        torch.save(learned, Path(folder) / "weights.pt")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    """Joint training without BatchNorm, whose statistics would be each process's own."""
    Fabric(accelerator="cpu", devices=2, strategy="ddp_spawn").launch(in_two_processes, str(tmp_path))
    together = torch.load(tmp_path / "weights.pt", weights_only=True)
    for a, b in zip(together, exits_and_jointly(Fabric(accelerator="cpu", devices=1)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_plain_network_learns_as_an_sdn_without_ics(tmp_path: Path) -> None:
    """Where ICs weigh nothing, the backbone of joint training takes the very same steps."""
    plain, sdn = ZOO["shared"].make().double(), made().double()
    x, y = rows()
    recipe = dataclasses.replace(GENTLE, tau_start=0.0)
    plan = dataclasses.replace(sdn.plan, cuts=tuple(dataclasses.replace(c, macs_before=0) for c in sdn.plan.cuts))
    free = [dataclasses.replace(spec, macs=0) for spec in plan.classifiers]
    sdn.plan = dataclasses.replace(plan, classifiers=tuple(free))
    hashes = train_backbone(plain, (x.double(), y), num_classes=CLASSES, epochs=2, recipe=recipe)
    trained = sd.train_jointly(sdn, (x.double(), y), epochs=2, recipe=recipe)
    assert equal(list(plain.state_dict().values()), list(trained.backbone.state_dict().values()))
    assert not equal(list(plain.state_dict().values()), list(sdn.backbone.state_dict().values()))
    assert torch.equal(hashes, trained.trained_hashes)
    train_backbone(plain, (x.double(), y), num_classes=CLASSES, epochs=1, checkpoint_dir=tmp_path)
    with pytest.raises(FormatError, match="data was "):
        train_backbone(plain, (x.double(), y.flip(0)), num_classes=CLASSES, epochs=1, checkpoint_dir=tmp_path)
    with pytest.raises(DataError, match=r"0\.\.4"):
        train_backbone(plain, (x.double(), y + 40), num_classes=CLASSES, epochs=1)


def test_every_batch_of_a_one_shot_iterator_is_trained_on() -> None:
    x, y = rows()
    stream = zip(x.split(20), y.split(20), strict=True)
    assert len(sd.train_jointly(made(), stream, epochs=1, recipe=GENTLE).trained_hashes) == 60


def test_bad_data_is_refused_before_anything_changes() -> None:
    sdn = made()
    before = weights(sdn)
    with pytest.raises(DataError, match="no rows"):
        sd.train_jointly(sdn, [], epochs=1, in_place=True)
    with pytest.raises(DataError, match="only once"):
        sd.train_jointly(sdn, iter([rows()]), epochs=2, in_place=True)
    with pytest.raises(DataError, match=f"0..{CLASSES - 1}"):
        sd.train_jointly(sdn, (images(4), torch.full((4,), 9)), epochs=1, in_place=True)
    assert equal(before, weights(sdn))
