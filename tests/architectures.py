"""Classifiers nobody here wrote, built small, and what happens when they become shallow-deep networks.

``python tests/architectures.py`` runs them all and writes ``docs/architectures.md``; ``test_architectures.py`` runs the
same rows. Nothing is downloaded: every network has random weights.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision_shim import define_operators

import shallowdeep as sd
from shallowdeep.inputs import Inputs, call, logits_of, num_rows, take
from shallowdeep.policies import Confidence
from shallowdeep.types import CutPoint, Plan, Trace

define_operators()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what third parties deprecate while they are imported
    import timm
    import transformers as hf

CLASSES = 5
ROWS = 12
LEAST_CUTS = 3


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


VOCABULARY = 60


def of_timm(family: str, model: str, side: int = 64, fails: str = "", **choices: Any) -> Row:
    def make() -> nn.Module:
        return timm.create_model(model, num_classes=CLASSES, **choices)

    return Row(name=model, library="timm", family=family, make=make, inputs=images(side), fails=fails)


def of_class(family: str, kind: str, side: int = 64, *, label: str = "", fails: str = "", **choices: Any) -> Row:
    """A class of ``timm.models.<family>``, where the named variants do not take other sizes."""

    def make() -> nn.Module:
        return getattr(getattr(timm.models, family), kind)(num_classes=CLASSES, **choices)

    name = label or kind
    return Row(name=name, library="timm", family=family, make=make, inputs=images(side), fails=fails)


def of_transformers(
    name: str,
    side: int = 0,
    *,
    head: str = "",
    layers: tuple[str, ...] = (),
    fails: str = "",
    **choices: Any,
) -> Row:
    """``side``: of images; 0 for text."""
    head = head or (f"{name}ForImageClassification" if side else f"{name}ForSequenceClassification")

    def make() -> nn.Module:
        config = getattr(hf, f"{name}Config")(num_labels=CLASSES, **choices)
        return getattr(hf, head)(config)

    inputs = pixels(side) if side else text
    return Row(
        name=head, library="transformers", family=name, make=make, inputs=inputs, layers=layers, fails=fails
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


def every(pattern: str, count: int = 4) -> tuple[str, ...]:
    return tuple(pattern.format(i) for i in range(count))


ALL: tuple[Row, ...] = (
    # transformers: images
    of_transformers("ViT", 32, **PATCHES),
    of_transformers("DeiT", 32, **PATCHES),
    of_transformers("Beit", 32, layers=every("beit.layers.{}", 3), **PATCHES, vocab_size=10),
    of_transformers("Dinov2", 32, **PATCHES),
    of_transformers("Dinov2WithRegisters", 32, **PATCHES),
    of_transformers("Data2VecVision", 32, **PATCHES),
    of_transformers("ViTMSN", 32, **PATCHES),
    of_transformers("Swin", 32, image_size=32, patch_size=2, embed_dim=16, depths=[1, 2, 1], num_heads=[1, 2, 2], window_size=4),
    of_transformers("Swinv2", 32, image_size=32, patch_size=2, embed_dim=16, depths=[1, 2, 1], num_heads=[1, 2, 2], window_size=4),
    of_transformers("ConvNext", 64, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1]),
    of_transformers("ConvNextV2", 64, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1]),
    of_transformers("ResNet", 64, embedding_size=8, hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 2, 1]),
    of_transformers("RegNet", 64, embedding_size=8, hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 2, 1], groups_width=8),
    of_transformers("MobileNetV1", 64, image_size=64, depth_multiplier=0.25),
    of_transformers("MobileNetV2", 64, image_size=64, depth_multiplier=0.25),
    of_transformers("MobileViT", 64, image_size=64, hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 24, 32, 40, 64], num_attention_heads=2),
    of_transformers("MobileViTV2", 64, image_size=64, width_multiplier=0.25),
    of_transformers("Levit", 64, image_size=64, hidden_sizes=[16, 24, 32], num_attention_heads=[1, 2, 2], depths=[1, 1, 1], key_dim=[8, 8, 8]),
    of_transformers("Pvt", 64, image_size=64, num_attention_heads=[1, 1, 2, 2], hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]),
    of_transformers("PvtV2", 64, image_size=64, num_attention_heads=[1, 1, 2, 2], hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]),
    of_transformers("PoolFormer", 64, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1]),
    of_transformers("Bit", 64, embedding_size=8, hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 2, 1], num_groups=4),
    of_transformers("Segformer", 64, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2]),
    of_transformers("FocalNet", 64, image_size=64, embed_dim=8, depths=[1, 1, 2, 1]),
    of_transformers("SwiftFormer", 64, image_size=64, embed_dims=[8, 16, 24, 32], depths=[1, 1, 1, 1]),
    of_transformers("HGNetV2", 64),
    of_transformers("EfficientNet", 64, image_size=64, width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=320),
    # transformers: text
    of_transformers("Bert", layers=every("bert.encoder.layer.{}", 3), **WORDS),
    of_transformers("DistilBert", vocab_size=VOCABULARY, dim=32, n_layers=4, n_heads=2, hidden_dim=64, max_position_embeddings=20),
    of_transformers("Roberta", **WORDS),
    of_transformers("Albert", embedding_size=16, **WORDS),
    of_transformers("Electra", embedding_size=16, **WORDS),
    of_transformers("MPNet", **WORDS),
    of_transformers("Deberta", relative_attention=True, pos_att_type="c2p|p2c", **WORDS),
    of_transformers("DebertaV2", relative_attention=True, pos_att_type="c2p|p2c", **WORDS),
    of_transformers("Data2VecText", **WORDS),
    of_transformers("Camembert", **WORDS),
    of_transformers("ConvBert", embedding_size=16, **WORDS),
    of_transformers("SqueezeBert", embedding_size=32, q_groups=2, k_groups=2, v_groups=2, output_groups=2, intermediate_groups=2, post_attention_groups=1, **WORDS),
    of_transformers("RoFormer", embedding_size=16, **WORDS),
    of_transformers("Nystromformer", num_landmarks=4, segment_means_seq_len=12, conv_kernel_size=5, **WORDS),
    of_transformers("FNet", **{k: v for k, v in WORDS.items() if k != "num_attention_heads"}),
    of_transformers("XLNet", vocab_size=VOCABULARY, d_model=32, n_layer=4, n_head=2, d_inner=64),
    of_transformers("Funnel", vocab_size=VOCABULARY, d_model=32, n_head=2, d_head=16, d_inner=64, block_sizes=[1, 2, 1], num_decoder_layers=1),
    of_transformers("GPT2", vocab_size=VOCABULARY, n_positions=20, n_embd=32, n_layer=4, n_head=2, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    of_transformers("Llama", pad_token_id=0, **WORDS),
    of_transformers("ModernBert", pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, **WORDS),
    # timm
    of_timm("resnet", "resnet18", layers=[1, 1, 2, 1], channels=(8, 16, 24, 32)),
    of_timm("resnetv2", "resnetv2_50", layers=[1, 1, 2, 1], channels=(16, 32, 48, 64)),
    of_timm("resnext", "resnext50_32x4d", layers=[1, 1, 2, 1], cardinality=4, base_width=8),
    of_timm("res2net", "res2net50_14w_8s", layers=[1, 1, 1, 1]),
    of_timm("resnest", "resnest14d"),
    of_timm("senet", "legacy_seresnet18"),
    of_timm("sknet", "skresnet18"),
    of_timm("vgg", "vgg11", side=32),
    of_timm("densenet", "densenet121", growth_rate=8, block_config=(2, 2, 2, 2)),
    of_timm("efficientnet", "efficientnet_b0"),
    of_timm("mobilenetv3", "mobilenetv3_small_050"),
    of_timm("mobilenetv2", "mobilenetv2_035"),
    of_timm("convnext", "convnext_atto", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32)),
    of_timm("regnet", "regnetx_002"),
    of_timm("vit", "vit_tiny_patch16_224", side=32, **VIT),
    of_timm("deit", "deit_tiny_distilled_patch16_224", side=32, **VIT),
    of_timm("eva", "eva02_tiny_patch14_224", side=32, **VIT),
    of_timm("beit", "beit_base_patch16_224", side=32, **VIT),
    of_timm("cait", "cait_xxs24_224", side=32, **VIT),
    of_class("volo", "VOLO", img_size=64, side=64, layers=(1, 1, 1, 1), embed_dims=(16, 32, 32, 32), num_heads=(2, 2, 2, 2)),
    of_timm("swin", "swin_tiny_patch4_window7_224", img_size=64, window_size=4, embed_dim=16, depths=(1, 2, 1), num_heads=(1, 2, 2)),
    of_timm("swinv2", "swinv2_tiny_window8_256", img_size=64, window_size=4, embed_dim=16, depths=(1, 2, 1), num_heads=(1, 2, 2)),
    of_class("mlp_mixer", "MlpMixer", side=32, img_size=32, patch_size=8, embed_dim=32, num_blocks=4),
    of_class("mlp_mixer", "MlpMixer", label="gMLP", side=32, img_size=32, patch_size=8, embed_dim=32, num_blocks=4, block_layer=timm.models.mlp_mixer.SpatialGatingBlock, mlp_layer=timm.layers.GatedMlp),
    of_class("mlp_mixer", "MlpMixer", label="ResMLP", side=32, img_size=32, patch_size=8, embed_dim=32, num_blocks=4, block_layer=timm.models.mlp_mixer.ResBlock, norm_layer=timm.models.mlp_mixer.Affine),
    of_class("metaformer", "MetaFormer", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32)),
    of_class("metaformer", "MetaFormer", label="CAFormer", depths=(1, 1, 2, 1), dims=(32, 32, 64, 64), token_mixers=[timm.models.metaformer.SepConv, timm.models.metaformer.SepConv, timm.models.metaformer.Attention, timm.models.metaformer.Attention]),
    of_timm("coatnet", "coatnet_pico_rw_224", img_size=64, embed_dim=(32, 32, 64, 64), depths=(1, 1, 2, 1), stem_width=8),
    of_timm("maxvit", "maxvit_pico_rw_256", img_size=64, embed_dim=(32, 32, 64, 64), depths=(1, 1, 1, 1), stem_width=8),
    of_timm("xcit", "xcit_nano_12_p16_224", side=64, img_size=64, embed_dim=32, depth=4, num_heads=2),
    of_timm("ghostnet", "ghostnet_050"),
    of_timm("hrnet", "hrnet_w18_small"),
    of_timm("inception_v3", "inception_v3", side=96),
    of_timm("inception_v4", "inception_v4", side=96),
    of_timm("inception_next", "inception_next_atto", depths=(1, 1, 2, 1), dims=(16, 32, 48, 64)),
    of_timm("xception", "xception41"),
    of_timm("dpn", "dpn48b"),
    of_timm("dla", "dla46_c"),
    of_timm("rexnet", "rexnet_100", width_mult=0.5),
    of_timm("nfnet", "nf_regnet_b0"),
    of_timm("tresnet", "tresnet_m", layers=[1, 1, 2, 1]),
    of_timm("levit", "levit_128s", img_size=64),
    of_timm("pit", "pit_ti_224", img_size=64, patch_size=8, stride=4, base_dims=(16, 16, 16), depth=(1, 2, 1), heads=(1, 2, 2)),
    of_timm("efficientformer", "efficientformer_l1", side=224),
    of_timm("efficientformer_v2", "efficientformerv2_s0", side=224),
    of_timm("edgenext", "edgenext_xx_small"),
    of_timm("fastvit", "fastvit_t8", layers=(1, 1, 1, 1), embed_dims=(32, 64, 96, 128)),
    of_timm("mobileone", "mobileone_s0"),
    of_timm("repvgg", "repvgg_a0"),
    of_timm("hgnet", "hgnetv2_b0"),
    of_timm("cspnet", "cspresnet50"),
    of_timm("darknet", "darknet17"),
    of_timm("selecsls", "selecsls42"),
    of_timm("twins", "twins_svt_small", img_size=64, embed_dims=(16, 32, 48, 64), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2), wss=(4, 4, 2, 2)),
    of_class("nest", "Nest", img_size=32, side=32, patch_size=2, embed_dims=(16, 32, 48), num_heads=(1, 2, 2), depths=(1, 1, 2)),
    of_timm("crossvit", "crossvit_tiny_240", img_size=240, side=240),
    of_class("convmixer", "ConvMixer", side=32, dim=32, depth=4, kernel_size=5, patch_size=4),
    of_timm("sequencer", "sequencer2d_s", img_size=64, layers=(1, 1, 1, 1), embed_dims=(16, 32, 32, 32), hidden_sizes=(8, 8, 8, 8)),
    of_timm("convit", "convit_tiny", side=32, img_size=32, patch_size=8, embed_dim=12, depth=4, num_heads=4, local_up_to_layer=2),
    of_timm("coat", "coat_lite_tiny", img_size=64, embed_dims=(16, 32, 32, 32), serial_depths=(1, 1, 1, 1)),
    of_class("tnt", "TNT", side=32, img_size=32, depth=4, embed_dim=32, inner_dim=16, num_heads_inner=4, num_heads_outer=2),
    of_timm("visformer", "visformer_tiny", img_size=64, init_channels=8, embed_dim=32, depth=(1, 2, 1), num_heads=2),
    of_timm("mvitv2", "mvitv2_tiny", img_size=64, depths=(1, 1, 1, 1)),
    of_timm("hiera", "hiera_tiny_224", img_size=(64, 64), embed_dim=16, stages=(1, 1, 2, 1), num_heads=1),
    of_timm("davit", "davit_tiny", embed_dims=(8, 16, 24, 32), num_heads=(1, 2, 2, 2), depths=(1, 1, 1, 1)),
    of_class("focalnet", "FocalNet", embed_dim=8, depths=(1, 1, 2, 1)),
    of_class("gcvit", "GlobalContextVit", img_size=64, embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2), window_ratio=(4, 4, 2, 1)),
    of_timm("mambaout", "mambaout_femto", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32)),
    of_class("metaformer", "MetaFormer", label="ConvFormer", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), token_mixers=timm.models.metaformer.SepConv),
    of_timm("mobilevit", "mobilevit_xxs"),
    of_timm("pvt_v2", "pvt_v2_b0", depths=(1, 1, 1, 1), embed_dims=(8, 16, 24, 32), num_heads=(1, 1, 2, 2)),
    of_timm("repvit", "repvit_m1"),
    of_timm("starnet", "starnet_s050"),
    of_timm("swiftformer", "swiftformer_xs", layers=[1, 1, 1, 1], embed_dims=[8, 16, 24, 32]),
    of_timm("tiny_vit", "tiny_vit_5m_224", embed_dims=(16, 16, 32, 32), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_sizes=(4, 4, 4, 2)),
    of_timm("vovnet", "vovnet39a", stage_conv_chs=[8, 8, 8, 8], stage_out_chs=[8, 16, 24, 32], block_per_stage=[1, 1, 1, 1]),
    of_timm("efficientvit_mit", "efficientvit_b0"),
    of_timm("efficientvit_msra", "efficientvit_m0", img_size=64),
    of_timm("fasternet", "fasternet_t0", embed_dim=16, depths=(1, 1, 2, 1)),
    of_timm("ghostnetv3", "repghostnet_050"),
    of_timm("shvit", "shvit_s1"),
    of_timm("rdnet", "rdnet_tiny"),
    of_timm("nasnet", "pnasnet5large", side=96),
    of_timm("lcnet", "lcnet_050"),
    of_timm("byobnet", "gernet_s"),
    of_timm("byoanet", "botnet26t_256", img_size=64, side=64),
    of_timm("pe/vit_relpos", "vit_relpos_small_patch16_224", side=32, **VIT),
    of_timm("hardcorenas", "hardcorenas_a"),
)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was seen of one row; ``reason`` is empty when it counts."""

    row: Row
    plan: Plan | None = None
    left_E: tuple[int, ...] = ()
    reason: str = ""
    seconds: float = 0.0

    @property
    def inside(self) -> tuple[CutPoint, ...]:
        """The cut points between 10 and 90 % of the macs."""
        return between(self.plan) if self.plan is not None else ()


def between(plan: Plan) -> tuple[CutPoint, ...]:
    return tuple(c for c in plan.candidates if 0.1 <= c.macs_before / plan.total_macs <= 0.9)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    everything = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach().clone() for name, tensor in everything}


def scramble(model: nn.Module) -> None:
    """Other weights, as a checkpoint brings them: fresh networks have blocks that do nothing (scales of 1e-6, gammas of 0)."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and tensor.ndim <= 1 + name.endswith("gamma"):
                if "running_mean" in name or "bias" in name:
                    tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)
                else:
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)


def midway(trace: Trace) -> Confidence:
    """Thresholds midway between two rows' confidences, so that at every exit some of the rows that came leave."""
    confidence_EN = trace.logits_ENC.double().softmax(2).amax(2)
    here = torch.ones(trace.num_samples, dtype=torch.bool)
    thresholds = []
    for exit in range(trace.num_exits - 1):
        ranked = confidence_EN[exit, here].sort(descending=True).values
        leaving = max(1, len(ranked) // (trace.num_exits - exit))
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
    expected, answer = sd.simulate(policy, trace), sd.Engine(sdn, policy)(inputs)
    assert torch.equal(expected.exit_N, answer.exit_B), f"law 3: exits {expected.exit_N} and {answer.exit_B}"
    difference = float((expected.logits_NC - answer.logits_BC).abs().max())
    scale = float(expected.logits_NC.abs().max())
    assert difference <= 1e-4 * max(scale, 1.0), f"law 3: logits differ by {difference} of {scale}"
    left_E = tuple(torch.bincount(answer.exit_B, minlength=plan_exits(plan)).tolist())
    assert all(left_E), f"law 7: rows left at the exits {left_E}"
    return left_E


def plan_exits(plan: Plan) -> int:
    return len(plan.cuts) + 1
