"""Classifiers nobody here wrote, built small, and what happens when they become shallow-deep networks.

``python tests/architectures.py`` runs them all and writes ``docs/architectures.md``; ``test_architectures.py`` runs the
same rows. Nothing is downloaded: every network has random weights.
"""

from __future__ import annotations

import pkgutil
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import shallowdeep as sd
from shallowdeep.inputs import Inputs, call, logits_of, num_rows, take
from shallowdeep.policies import Confidence
from shallowdeep.types import CutPoint, Plan, Trace
from torchvision_shim import define_operators

PAGE = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"
CLASSES = 5
ROWS = 16
LEAST_CUTS = 3
VOCABULARY = 60


@dataclass(frozen=True, kw_only=True)
class Row:
    """One architecture: how it is built, and why it does not count, where it does not (a part of what is said)."""

    name: str
    library: str
    family: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    layers: tuple[str, ...] = ()
    """Cut points that must be offered, whatever else is."""
    fails: str = ""
    """What a row that does not count says (a part of it), and in ``why`` the trait of the network behind it."""
    why: str = ""


def found(name: str) -> Any:
    """What ``module:attribute`` names, imported on first use: both libraries take seconds."""
    define_operators()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what third parties deprecate while they are imported
        return pkgutil.resolve_name(name)


def images(side: int) -> Callable[[int], Inputs]:
    return lambda rows: torch.randn(rows, 3, side, side, generator=torch.Generator().manual_seed(1))


def pixels(side: int) -> Callable[[int], Inputs]:
    return lambda rows: {"pixel_values": images(side)(rows)}  # type: ignore[dict-item]


def text(rows: int) -> Inputs:
    """Token ids with real padding: rows of 5 to 12 tokens, the rest masked."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (rows, 12), generator=generator)
    mask = (torch.arange(12) < torch.randint(5, 13, (rows, 1), generator=generator)).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def of_timm(family: str, model: str, side: int = 64, fails: str = "", why: str = "", **choices: Any) -> Row:
    def make() -> nn.Module:
        return found("timm:create_model")(model, num_classes=CLASSES, **choices)

    return Row(name=model, library="timm", family=family, make=make, inputs=images(side), fails=fails, why=why)


def of_class(
    family: str, kind: str, side: int = 64, *, label: str = "", fails: str = "", why: str = "", **choices: Any
) -> Row:
    """A class of ``timm.models.<family>``, where the named variants do not take other sizes."""

    def make() -> nn.Module:
        parts = {k: found(v) if isinstance(v, str) and v.startswith("timm.") else v for k, v in choices.items()}
        return found(f"timm.models.{family}:{kind}")(num_classes=CLASSES, **parts)

    name = label or kind
    return Row(name=name, library="timm", family=family, make=make, inputs=images(side), fails=fails, why=why)


def of_transformers(
    name: str,
    side: int = 0,
    *,
    head: str = "",
    layers: tuple[str, ...] = (),
    fails: str = "",
    why: str = "",
    **choices: Any,
) -> Row:
    """``side``: of images; 0 for text."""
    head = head or (f"{name}ForImageClassification" if side else f"{name}ForSequenceClassification")

    def make() -> nn.Module:
        return found(f"transformers:{head}")(found(f"transformers:{name}Config")(num_labels=CLASSES, **choices))

    inputs = pixels(side) if side else text
    return Row(
        name=head, library="transformers", family=name, make=make, inputs=inputs, layers=layers, fails=fails, why=why
    )


WORDS = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 20,
}
PATCHES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}


MIXER = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_blocks": 4}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
STAGES = (8, 16, 24, 32)
DEPTHS = (1, 1, 2, 1)


def every(pattern: str, start: int = 0) -> tuple[str, ...]:
    """The ends of all four layers but the last, behind which too little is left."""
    return tuple(pattern.format(i) for i in range(start, start + 3))


ROWS_OF_TRANSFORMERS: tuple[Row, ...] = (
    of_transformers("ViT", 32, **PATCHES),
    of_transformers("DeiT", 32, **PATCHES),
    of_transformers("Beit", 32, layers=every("beit.layers.{}"), **PATCHES, vocab_size=10),
    of_transformers("Dinov2", 32, layers=every("dinov2.encoder.layer.{}"), **PATCHES),
    of_transformers(
        "Swin", 32, image_size=32, patch_size=2, embed_dim=16, depths=[1, 2, 1], num_heads=[1, 2, 2], window_size=4
    ),
    of_transformers("ConvNext", 64, hidden_sizes=STAGES, depths=DEPTHS),
    of_transformers("ResNet", 64, embedding_size=8, hidden_sizes=[32, 64, 96, 128], depths=DEPTHS),
    of_transformers("RegNet", 64, embedding_size=8, hidden_sizes=[16, 24, 32, 40], depths=DEPTHS, groups_width=8),
    of_transformers("MobileNetV2", 64, image_size=64, depth_multiplier=0.25),
    of_transformers(
        "Pvt", 64, image_size=64, num_attention_heads=[1, 1, 2, 2], hidden_sizes=STAGES, depths=[1, 1, 1, 1]
    ),
    of_transformers("Bert", layers=every("bert.encoder.layer.{}"), **WORDS),
    of_transformers(
        "DistilBert", vocab_size=VOCABULARY, dim=32, n_layers=4, n_heads=2, hidden_dim=64, max_position_embeddings=20
    ),
    of_transformers("Roberta", layers=every("roberta.encoder.layer.{}"), **WORDS),
    of_transformers(
        "Albert", embedding_size=16, layers=every("albert.encoder.albert_layer_groups.0#{}", start=1), **WORDS
    ),
    of_transformers("Electra", embedding_size=16, **WORDS),
    of_transformers("MPNet", **WORDS),
    of_transformers("DebertaV2", relative_attention=True, pos_att_type="c2p|p2c", **WORDS),
    of_transformers("FNet", **{k: v for k, v in WORDS.items() if k != "num_attention_heads"}),
    of_transformers("GPT2", vocab_size=VOCABULARY, n_positions=20, n_embd=32, n_layer=4, n_head=2, **SPECIAL),
    of_transformers("Llama", layers=every("model.layers.{}"), pad_token_id=0, **WORDS),
    of_transformers(
        "XLNet",
        vocab_size=VOCABULARY,
        d_model=32,
        n_layer=4,
        n_head=2,
        d_inner=64,
        fails="No cut point",
        why="its tensors are [tokens, batch, width]: no place has the rows first",
    ),
    of_transformers(
        "Funnel",
        vocab_size=VOCABULARY,
        d_model=32,
        n_head=2,
        d_head=16,
        d_inner=64,
        block_sizes=[1, 1, 1],
        num_decoder_layers=1,
    ),
)
ROWS_OF_TIMM: tuple[Row, ...] = (
    of_timm("resnet", "resnet18", layers=[1, 1, 2, 1], channels=(32, 64, 96, 128)),
    of_timm("resnetv2", "resnetv2_50", layers=[1, 1, 2, 1], channels=(64, 128, 256, 512)),
    of_class("vgg", "VGG", side=32, cfg=[8, 16, "M", 32, "M", 32, 32, "M"]),
    of_timm("densenet", "densenet121", growth_rate=8, block_config=(2, 2, 2, 2)),
    of_timm("efficientnet", "mobilenetv2_035"),
    of_timm("mobilenetv3", "mobilenetv3_small_050"),
    of_timm("convnext", "convnext_atto", depths=DEPTHS, dims=STAGES),
    of_timm("mambaout", "mambaout_femto", depths=DEPTHS, dims=STAGES),
    of_timm("inception_next", "inception_next_atto", depths=DEPTHS, dims=(16, 32, 48, 64)),
    of_timm("vision_transformer", "vit_tiny_patch16_224", side=32, **VIT),
    of_timm("deit", "deit_tiny_distilled_patch16_224", side=32, **VIT),
    of_timm("beit", "beit_base_patch16_224", side=32, **VIT),
    of_timm("eva", "eva02_tiny_patch14_224", side=32, **VIT),
    of_timm("cait", "cait_xxs24_224", side=32, **VIT),
    of_timm(
        "convit",
        "convit_tiny",
        side=32,
        img_size=32,
        patch_size=8,
        embed_dim=12,
        depth=4,
        num_heads=4,
        local_up_to_layer=2,
    ),
    of_timm(
        "pit",
        "pit_ti_224",
        img_size=64,
        patch_size=8,
        stride=4,
        base_dims=(16, 16, 16),
        depth=(1, 2, 1),
        heads=(1, 2, 2),
    ),
    of_timm(
        "swin_transformer_v2",
        "swinv2_tiny_window8_256",
        img_size=64,
        window_size=4,
        embed_dim=16,
        depths=(1, 2, 1),
        num_heads=(1, 2, 2),
    ),
    of_timm(
        "twins",
        "twins_svt_small",
        img_size=64,
        embed_dims=(16, 32, 48, 64),
        depths=(1, 1, 1, 1),
        num_heads=(1, 2, 2, 2),
        wss=(4, 4, 2, 2),
    ),
    of_timm("visformer", "visformer_tiny", img_size=64, init_channels=8, embed_dim=32, depth=(1, 2, 1), num_heads=2),
    of_timm("maxxvit", "coatnet_pico_rw_224", img_size=64, embed_dim=(32, 32, 64, 64), depths=DEPTHS, stem_width=8),
    of_timm("fastvit", "fastvit_t8", layers=(1, 1, 1, 1)),
    of_class(
        "nest",
        "Nest",
        side=32,
        img_size=32,
        patch_size=2,
        embed_dims=(16, 32, 48),
        num_heads=(1, 2, 2),
        depths=(1, 1, 2),
    ),
    of_class("mlp_mixer", "MlpMixer", side=32, **MIXER),
    of_class(
        "mlp_mixer",
        "MlpMixer",
        label="gMLP",
        side=32,
        mlp_ratio=4,
        block_layer="timm.models.mlp_mixer:SpatialGatingBlock",
        mlp_layer="timm.layers:GatedMlp",
        **MIXER,
    ),
    of_class("metaformer", "MetaFormer", depths=DEPTHS, dims=STAGES),
    of_class("convmixer", "ConvMixer", side=32, dim=32, depth=4, kernel_size=5, patch_size=4),
    of_timm("dla", "dla46_c"),
    of_timm("tresnet", "tresnet_m", layers=[1, 1, 2, 1]),
    of_timm("byobnet", "repvgg_a0"),
    of_timm("cspnet", "darknet17"),
    of_timm(
        "hrnet",
        "hrnet_w18_small",
        fails="only 1 cut points",
        why="resolutions run side by side from the second stage to the head",
    ),
    of_class(
        "volo",
        "VOLO",
        img_size=64,
        layers=(1, 1, 1, 1),
        embed_dims=(16, 32, 32, 32),
        num_heads=(2, 2, 2, 2),
        stem_hidden_dim=8,
    ),
    of_class(
        "crossvit",
        "CrossVit",
        side=48,
        img_size=48,
        img_scale=(1.0, 2 / 3),
        patch_size=(8, 8),
        embed_dim=(16, 32),
        depth=((1, 1, 1), (1, 1, 1)),
        num_heads=(2, 2),
        mlp_ratio=(2, 2, 4),
        fails="only 1 cut points",
        why="two resolutions run side by side through every block",
    ),
    of_class(
        "tnt",
        "TNT",
        side=32,
        img_size=32,
        depth=4,
        embed_dim=32,
        inner_dim=16,
        num_heads_inner=4,
        num_heads_outer=2,
        fails="only 0 cut points",
        why="pixel and patch tokens run side by side through every block",
    ),
)
ALL = ROWS_OF_TRANSFORMERS + ROWS_OF_TIMM


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was seen of one row; ``reason`` is empty when it counts."""

    row: Row
    plan: Plan | None = None
    left_E: tuple[int, ...] = ()
    reason: str = ""
    seconds: float = 0.0


def between(plan: Plan) -> tuple[CutPoint, ...]:
    return tuple(c for c in plan.candidates if 0.1 <= c.macs_before / plan.total_macs <= 0.9)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    everything = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach().clone() for name, tensor in everything}


def scramble(model: nn.Module) -> None:
    """Other weights, as a checkpoint brings them: fresh networks have blocks that do nothing (a scale of 0 or 1e-6)."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and tensor.ndim <= 1 + name.endswith("gamma"):
                if "running_mean" in name or "bias" in name:
                    tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)
                else:
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)


def midway(trace: Trace) -> Confidence:
    """Thresholds in the middle of wide gaps between rows: at every exit some leave, and not by rounding."""
    confidence_EN = trace.logits_ENC.double().softmax(2).amax(2)
    here = torch.ones(trace.num_samples, dtype=torch.bool)
    thresholds = []
    for exit in range(trace.num_exits - 1):
        ranked = confidence_EN[exit, here].sort(descending=True).values
        share = max(1, len(ranked) // (trace.num_exits - exit))
        leaving = 1 + int((ranked[:-1] - ranked[1:])[: 2 * share - 1].argmax())
        thresholds.append(float(ranked[leaving - 1 : leaving + 1].mean()))
        here &= confidence_EN[exit] < thresholds[-1]
    return Confidence(threshold=tuple(thresholds))


def study(row: Row) -> Result:
    """Everything a row must do to count; what it does wrong is raised as an AssertionError."""
    started = time.perf_counter()
    torch.manual_seed(0)
    model, inputs = row.make().eval(), row.inputs(ROWS)
    try:
        plan = sd.plan(model, take(inputs, slice(2)))
    except (ValueError, TypeError) as error:
        return Result(row=row, reason=f"{type(error).__name__}: {error}", seconds=time.perf_counter() - started)
    missing = [name for name in row.layers if not any(name in (c.name, *c.aliases) for c in plan.candidates)]
    assert not missing, f"no cut point {missing}; there are {[c.name for c in plan.candidates]}"
    scramble(model)
    left_E = check(model, plan, inputs)
    few = f"only {len(between(plan))} cut points between 10 and 90 % of macs"
    reason = few if len(between(plan)) < LEAST_CUTS else ""
    return Result(row=row, plan=plan, left_E=left_E, reason=reason, seconds=time.perf_counter() - started)


def check(model: nn.Module, plan: Plan, inputs: Inputs) -> tuple[int, ...]:
    """Laws 1, 2 and 3 for one network; how many rows leave at each exit."""
    labels = torch.arange(num_rows(inputs)) % CLASSES
    sdn = sd.attach(model, plan).eval()
    with torch.no_grad():
        alone, together = logits_of(call(model, inputs)), sdn(inputs)
    assert torch.equal(alone, together[-1]), "law 1: the last exit is not the backbone's answer, bit for bit"
    before, ics = state_of(model), state_of(sdn.classifiers)
    sd.train_exits(sdn, (inputs, labels), epochs=2, precision="fp32")
    after = state_of(model)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert not moved, f"law 2: training the ICs changed {moved}"
    still = [name for name, value in sdn.classifiers.named_parameters() if torch.equal(value, ics[name])]
    assert len(still) < len(ics), "the ICs did not learn"
    trace = sd.collect(sdn, (inputs, labels))
    policy = midway(trace)
    engine = sd.Engine(sdn, policy, backend="torch")
    expected, answer = sd.simulate(policy, trace), engine(inputs)
    assert torch.equal(expected.exit_N, answer.exit_B), f"law 3: exits {expected.exit_N} and {answer.exit_B}"
    difference = float((expected.logits_NC - answer.logits_BC).abs().max())
    scale = float(expected.logits_NC.abs().max())
    assert difference <= 1e-4 * max(scale, 1.0), f"law 3: logits differ by {difference} of {scale}"
    for rows in (slice(0, 1), slice(1, 6)):
        part = engine(take(inputs, rows))
        assert torch.equal(part.exit_B, answer.exit_B[rows]), f"{rows}: other exits in a smaller batch"
        assert torch.allclose(part.logits_BC, answer.logits_BC[rows], atol=1e-4 * max(scale, 1.0), rtol=0)
    left_E = tuple(torch.bincount(answer.exit_B, minlength=sdn.num_exits).tolist())
    assert all(left_E), f"law 7: rows left at the exits {left_E}"
    return left_E


def page(results: Sequence[Result]) -> str:
    """The whole of ``docs/architectures.md``."""
    counting = [result for result in results if not result.reason]
    families = {(result.row.library, result.row.family) for result in counting}
    timm, transformers = (sum(library == name for library, _ in families) for name in ("timm", "transformers"))
    lines = [
        "# Architectures",
        "",
        "Classifiers nobody here wrote, built small with random weights, planned, attached, trained and run. Made by",
        "`python tests/architectures.py`; `tests/test_architectures.py` runs the same rows.",
        "",
        f"**{len(counting)} of {len(results)} rows count**: {timm} families of timm {version('timm')},",
        f"{transformers} of transformers {version('transformers')}; "
        f"{sum(result.seconds for result in results):.0f} s in all with one thread and torch {torch.__version__}.",
        "",
        f"A row counts when at least {LEAST_CUTS} cut points lie between 10 and 90 % of its macs; when the last exit",
        "is the untouched backbone's answer bit for bit (law 1); when training the ICs changes no parameter and no",
        "buffer of the backbone (law 2); and when rows leave at every exit of the engine, at the exits and with the",
        f"logits that `simulate` reads from the trace (law 3), in a batch of {ROWS}, in one of 5 and alone. The plan",
        "is made with fresh weights and the rest is done with others, because fresh networks hold blocks that do",
        "nothing, where a wrong place looks right. Text has real padding under an attention mask.",
        "",
        "| model | family | cut points (10-90 %) | features | rows leaving at each exit | s |",
        "|---|---|---:|---|---|---:|",
    ]
    for result in counting:
        assert result.plan is not None
        row, plan = result.row, result.plan
        last = ["map, channels last" if c.layout == "map" and c.channel_dim == -1 else c.layout for c in plan.cuts]
        lines.append(
            f"| {row.name} | {row.library}: {row.family} | {len(plan.candidates)} ({len(between(plan))}) | "
            f"{'; '.join(dict.fromkeys(last))} | {' '.join(map(str, result.left_E))} | {result.seconds:.1f} |"
        )
    lines += [
        "",
        "## What does not count, and why",
        "",
        "| model | family | what is found | why |",
        "|---|---|---|---|",
    ]
    for result in results:
        if result.reason:
            row = result.row
            lines.append(f"| {row.name} | {row.library}: {row.family} | {result.reason.rstrip('.')} | {row.why} |")
    lines += [
        "",
        "What few cut points they have obey the same laws: fewer exits or a clear error, never a wrong answer.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    seen: list[Result] = []
    for each_row in ALL:
        seen.append(study(each_row))
        print(f"{seen[-1].seconds:6.1f} s  {each_row.name}  {seen[-1].reason}", flush=True)
    PAGE.write_text(page(seen))
