"""Weights as others publish them: families, layouts, wrappings, and files with extra or missing tensors."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file
from timm.models import _builder, vision_transformer
from torch import nn

from fedpeft_dist.backbones.checkpoints import loading_with
from fedpeft_dist.backbones.timm_backbone import build_backbone
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import BackboneConfig
from tests.weight_fixtures import with_changed_tensors

State = dict[str, torch.Tensor]
CLASSES = 5
VIT = {"depth": 2, "embed_dim": 24, "num_heads": 2}
SWIN = {"embed_dim": 12, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
CONVNEXT = {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}


class Family(NamedTuple):
    name: str
    arguments: dict[str, Any]
    side: int = 32


FAMILIES = {
    "ViT": Family("vit_tiny_patch16_224", VIT),
    "DeiT": Family("deit_tiny_patch16_224", VIT),
    "distilled DeiT": Family("deit_tiny_distilled_patch16_224", VIT),
    "DeiT III": Family("deit3_small_patch16_224", VIT),
    "Swin": Family("swin_tiny_patch4_window7_224", SWIN),
    "ConvNeXt": Family("convnext_atto", CONVNEXT),
    "ResNet": Family("test_resnet", {}),
    "BEiT": Family("beit_base_patch16_224", VIT),
    "EVA": Family("eva02_tiny_patch14_224", VIT, 28),
    "CLIP": Family("vit_base_patch16_clip_224", VIT),
    "FlexiViT": Family("flexivit_small", VIT),
    "DINOv2": Family("vit_small_patch14_dinov2", VIT, 28),
    "DINOv2 with registers": Family("vit_small_patch14_reg4_dinov2", VIT, 28),
    "MAE": Family("vit_base_patch16_224.mae", VIT),
    "NaFlexViT": Family("naflexvit_base_patch16_gap", VIT),
    "SigLIP": Family("vit_base_patch16_siglip_224", VIT),
}


def source(family: Family, **changed: Any) -> nn.Module:
    """timm's model with 7 classes. Every parameter and buffer differs from a fresh model's."""
    sized = timm.models.get_pretrained_cfg(family.name).fixed_input_size
    arguments = ({"img_size": family.side} if sized else {}) | family.arguments | changed
    return with_changed_tensors(timm.create_model(family.name, num_classes=7, **arguments).eval())


@torch.no_grad()
def features(model: nn.Module, side: int) -> torch.Tensor:
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(2))
    return model.forward_head(model.forward_features(images), pre_logits=True)


def load(family: Family, path: Path, **changed: Any) -> nn.Module:
    config = BackboneConfig(name=family.name, checkpoint=str(path), model_args=family.arguments | changed)
    return build_backbone(config, CLASSES, family.side, seed=1).model


def refusal(family: Family, path: Path, **changed: Any) -> str:
    with pytest.raises(ConfigError) as error:
        load(family, path, **changed)
    message = str(error.value)
    assert message.startswith(f"backbone.checkpoint: '{path}' ")
    assert "\n" not in message
    assert "\x1b" not in message
    return message


# --- wrappings ---------------------------------------------------------------------------------------------------


def under(prefix: str, state: State, change: float = 0.0) -> State:
    return {prefix + name: tensor + change if change else tensor for name, tensor in state.items()}


PART = {"weight": torch.zeros(3)}
WRAPPINGS: dict[str, Callable[[State], dict[str, Any]]] = {
    "alone": lambda s: s,
    "model": lambda s: {"model": s, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}, "epoch": 3},
    "state_dict": lambda s: {"state_dict": s},
    "an average beside it": lambda s: {"state_dict": under("", s, 1.0), "state_dict_ema": s},
    "module.": lambda s: {"state_dict": under("module.", s)},
    "backbone.": lambda s: {"state_dict": under("backbone.", s) | under("decode_head.conv.", PART)},
    "DINO": lambda s: {
        "student": under("module.backbone.", s, 1.0) | under("module.head.mlp.0.", PART),
        "teacher": under("backbone.", s) | under("head.mlp.0.", PART),
    },
    "student": lambda s: {"student": under("module.", s)},
    "Lightning": lambda s: {"state_dict": under("model.", s), "hyper_parameters": {"lr": 0.1}},
    "Lightning with a loss": lambda s: {"state_dict": under("net.model.", s) | under("criterion.", PART)},
    "MoCo": lambda s: {
        "state_dict": under("module.encoder_q.", s)
        | under("module.encoder_k.", s, 1.0)
        | {"module.queue": torch.zeros(4, 3)}
    },
    "MoCo v3": lambda s: {
        "state_dict": under("module.base_encoder.", s)
        | under("module.momentum_encoder.", s, 1.0)
        | under("module.predictor.0.", PART)
    },
    "BYOL": lambda s: (
        under("online_encoder.", s) | under("target_encoder.", s, 1.0) | under("online_predictor.0.", PART)
    ),
    "deep": lambda s: {"network": {"params": under("net.trunk.vit.", s)}},
}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_wrapping_of_every_family_gives_timms_features(tmp_path: Path, family: Family) -> None:
    model = source(family)
    expected = features(model, family.side)
    for wrapping, wrap in WRAPPINGS.items():
        torch.save(wrap(model.state_dict()), tmp_path / "w.pth")
        assert torch.equal(features(load(family, tmp_path / "w.pth"), family.side), expected), wrapping


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_refuses_a_missing_and_an_extra_tensor(tmp_path: Path, family: Family) -> None:
    state = source(family).state_dict()
    names = [n for n, tensor in state.items() if tensor.is_floating_point() and not n.startswith(("head", "fc."))]
    for name, prefix in ((names[0], ""), (names[len(names) // 2], "model.backbone."), (names[-1], "")):
        torch.save(under(prefix, {n: t for n, t in state.items() if n != name}), tmp_path / "w.pth")
        assert f"lacks 1 of the model's tensors, {name!r} among them" in refusal(family, tmp_path / "w.pth")
        torch.save(under(prefix, state | {f"{name}_more": state[name]}), tmp_path / "w.pth")
        assert f"has 1 more than the model, '{name}_more' among them" in refusal(family, tmp_path / "w.pth")


def test_names_parts_that_fit_equally_well(tmp_path: Path) -> None:
    family = FAMILIES["ViT"]
    state = source(family).state_dict()
    torch.save(under("left.", state) | under("right.", state, 1.0), tmp_path / "w.pth")
    assert "holds several parts that fit: 'left.', 'right.'" in refusal(family, tmp_path / "w.pth")


def test_names_the_prefixes_of_a_file_without_an_encoder(tmp_path: Path) -> None:
    torch.save({"state_dict": under("audio.", PART) | under("text.", PART)}, tmp_path / "w.pth")
    assert "under every prefix of its names ('audio.', 'text.')" in refusal(FAMILIES["Swin"], tmp_path / "w.pth")


def test_refuses_unknown_tensors_beside_the_encoder(tmp_path: Path) -> None:
    family = FAMILIES["ViT"]
    torch.save(under("backbone.", source(family).state_dict()) | under("adapter.", PART), tmp_path / "w.pth")
    assert "has 1 more than the model, 'adapter.weight'" in refusal(family, tmp_path / "w.pth")


# --- layouts other than timm's -----------------------------------------------------------------------------------


def renamed(state: State, *pairs: tuple[str, str]) -> State:
    out = {}
    for name, tensor in state.items():
        for old, new in pairs:
            name = re.sub(old, new, name)
        out[name] = tensor
    return out


def facebook_swin(state: State) -> dict[str, Any]:
    down = {n: n.replace("layers.1.downsample", "layers.0.downsample").replace("head.fc", "head") for n in state}
    buffers = {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(4), "layers.0.attn_mask": torch.zeros(4)}
    return {"model": {down[n]: tensor for n, tensor in state.items()} | buffers}


def facebook_convnext(state: State) -> dict[str, Any]:
    pairs = (
        (r"^stem\.", "downsample_layers.0."),
        (r"^stages\.(\d)\.downsample", r"downsample_layers.\1"),
        (r"\.blocks\.", "."),
        ("conv_dw", "dwconv"),
        (r"mlp\.fc", "pwconv"),
        (r"^head\.norm", "norm"),
        (r"^head\.fc", "head"),
    )
    return {"model": renamed(state, *pairs)}


def facebook_dinov2(state: State) -> State:
    state = state | {"mask_token": torch.zeros(1, 24)}
    if "reg_token" in state:  # the table includes the class token's position
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.cat([torch.zeros(1, 1, 24), state["pos_embed"]], dim=1)
    return state


def openai_clip(state: State) -> State:
    state = renamed(
        {n: t for n, t in state.items() if not n.startswith("head.")},
        (r"^patch_embed\.proj", "conv1"),
        (r"^pos_embed$", "positional_embedding"),
        (r"^cls_token$", "class_embedding"),
        (r"^blocks\.", "transformer.resblocks."),
        (r"^norm_pre", "ln_pre"),
        (r"^norm\.", "ln_post."),
        (r"\.norm(\d)", r".ln_\1"),
        (r"qkv\.", "in_proj_"),
        (r"attn\.proj", "attn.out_proj"),
        (r"mlp\.fc1", "mlp.c_fc"),
        (r"mlp\.fc2", "mlp.c_proj"),
    )
    state["class_embedding"], state["positional_embedding"] = (
        state["class_embedding"][0, 0],
        state["positional_embedding"][0],
    )
    text = {"transformer.resblocks.0.ln_1.weight": torch.zeros(2), "logit_scale": torch.zeros(())}
    return under("visual.", state) | {"visual.proj": torch.zeros(24, 8)} | text


def open_clip(state: State) -> State:
    return under("visual.trunk.", state) | {"text.token_embedding.weight": torch.zeros(3, 2)}


def i_jepa(state: State) -> dict[str, Any]:
    state = under("module.", state)
    return {
        "encoder": state,
        "target_encoder": under("", state, 1.0),
        "predictor": {"module.norm.weight": torch.ones(2)},
    }


def split_qkv(state: State, names: tuple[str, str, str], out: str) -> State:
    parts = {}
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            place, kind = name.split(".attn.qkv.")
            parts |= {f"{place}.{new}.{kind}": t for new, t in zip(names, tensor.chunk(3))}
        else:
            parts[name.replace(".attn.proj.", f".{out}.")] = tensor
    return parts


def hugging_face_vit(state: State, prefix: str = "vit.") -> State:
    state = {n: t for n, t in state.items() if not n.startswith("head")}
    state = split_qkv(
        state, tuple(f"attention.attention.{n}" for n in ("query", "key", "value")), "attention.output.dense"
    )
    state = renamed(
        state,
        (r"^blocks\.", "encoder.layer."),
        (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
        (r"^pos_embed$", "embeddings.position_embeddings"),
        (r"^(cls_token|mask_token)$", r"embeddings.\1"),
        (r"^dist_token$", "embeddings.distillation_token"),
        (r"^reg_token$", "embeddings.register_tokens"),
        (r"^norm\.", "layernorm."),
    )
    if not prefix.startswith("dino"):
        state = renamed(
            state,
            (r"\.norm1\.", ".layernorm_before."),
            (r"\.norm2\.", ".layernorm_after."),
            (r"\.mlp\.fc1\.", ".intermediate.dense."),
            (r"\.mlp\.fc2\.", ".output.dense."),
        )
    state = renamed(state, (r"\.ls(\d)\.gamma", r".layer_scale\1.lambda1"))
    return under(prefix, state) | {
        "classifier.weight": torch.zeros(9, 24),
        f"{prefix}pooler.dense.bias": torch.zeros(24),
    }


def hugging_face_dinov2(state: State) -> State:
    return hugging_face_vit(state, "dinov2.") | {"dinov2.embeddings.mask_token": torch.zeros(1, 24)}


def hugging_face_clip(state: State) -> State:
    state = {n: t for n, t in state.items() if not n.startswith("head")}
    state = split_qkv(state, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.out_proj")
    state = renamed(
        state,
        (r"^blocks\.", "encoder.layers."),
        (r"^patch_embed\.proj", "embeddings.patch_embedding"),
        (r"^pos_embed$", "embeddings.position_embedding.weight"),
        (r"^cls_token$", "embeddings.class_embedding"),
        (r"^norm_pre", "pre_layrnorm"),
        (r"^norm\.", "post_layernorm."),
        (r"\.norm(\d)\.", r".layer_norm\1."),
    )
    for name in ("embeddings.class_embedding", "embeddings.position_embedding.weight"):
        state[name] = state[name].squeeze()
    state["embeddings.position_ids"] = torch.arange(5)[None]
    text = {
        "text_model.embeddings.token_embedding.weight": torch.zeros(3, 2),
        "visual_projection.weight": torch.zeros(2),
    }
    return under("vision_model.", state) | text


LAYOUTS: dict[str, tuple[str, Callable[[State], dict[str, Any]]]] = {
    "Swin": ("Swin", facebook_swin),
    "ConvNeXt": ("ConvNeXt", facebook_convnext),
    "DeiT III": ("DeiT III", lambda s: {"model": renamed(s, (r"ls(\d)\.gamma", r"gamma_\1"))}),
    "DINOv2": ("DINOv2", facebook_dinov2),
    "DINOv2 with registers": ("DINOv2 with registers", facebook_dinov2),
    "BEiT": ("BEiT", lambda s: {"module": s | {"blocks.0.attn.relative_position_index": torch.zeros(4)}}),
    "EVA": ("EVA", lambda s: {"module": s | {"rope.freqs_cos": torch.zeros(4)}}),
    "OpenAI's CLIP": ("CLIP", openai_clip),
    "OpenCLIP": ("CLIP", open_clip),
    "I-JEPA": ("ViT", i_jepa),
    "an old ViT": ("ViT", lambda s: s | {"pre_logits.fc.weight": torch.zeros(2)}),
    "transformers' ViT": ("ViT", hugging_face_vit),
    "transformers' ViT without a task": ("ViT", lambda s: hugging_face_vit(s, "")),
    "transformers' distilled DeiT": ("distilled DeiT", lambda s: hugging_face_vit(s, "deit.")),
    "transformers' DINOv2": ("DINOv2", hugging_face_dinov2),
    "transformers' CLIP": ("CLIP", hugging_face_clip),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_layouts_give_timms_features(tmp_path: Path, layout: str) -> None:
    key, write = LAYOUTS[layout]
    family = FAMILIES[key]
    model = source(family)
    torch.save(write(dict(model.state_dict())), tmp_path / "w.pth")
    assert torch.equal(features(load(family, tmp_path / "w.pth"), family.side), features(model, family.side))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_refuses_other_layouts_of_a_deeper_model(tmp_path: Path, layout: str) -> None:
    key, write = LAYOUTS[layout]
    family = FAMILIES[key]
    depths = family.arguments.get("depths")
    deeper = {"depth": 3} if depths is None else {"depths": [*depths[:-1], 2]}
    torch.save(write(dict(source(family, **deeper).state_dict())), tmp_path / "w.pth")
    message = refusal(family, tmp_path / "w.pth")
    assert "more than the model" in message
    if key != "Swin":  # the last blocks have other places in the original's names
        assert "depth" in message.partition("give ")[2]


def test_refuses_an_unknown_layout_of_transformers(tmp_path: Path) -> None:
    torch.save(
        {f"swin.encoder.layers.{i}.blocks.0.layernorm_before.weight": torch.ones(2) for i in range(90)},
        tmp_path / "w.pth",
    )
    assert "('swin.'); give another backbone.name, or a file in timm's layout" in refusal(
        FAMILIES["Swin"], tmp_path / "w.pth"
    )


# --- the key that would fit --------------------------------------------------------------------------------------

VIT_FAMILY, SWIN_FAMILY, CONVNEXT_FAMILY = FAMILIES["ViT"], FAMILIES["Swin"], FAMILIES["ConvNeXt"]


@pytest.mark.parametrize(
    ("family", "theirs", "ours", "hint"),
    [
        (VIT_FAMILY, {"depth": 4}, {}, {"depth": 4}),
        (VIT_FAMILY, {}, {"depth": 3}, {"depth": 2}),
        (VIT_FAMILY, {"init_values": 1e-5}, {}, {"init_values": 1e-5}),
        (VIT_FAMILY, {"depth": 3, "init_values": 1e-5}, {}, {"depth": 3, "init_values": 1e-5}),
        (VIT_FAMILY, {"qk_norm": True}, {}, {"qk_norm": True}),
        (VIT_FAMILY, {}, {"qk_norm": True}, {"qk_norm": False}),
        (VIT_FAMILY, {"reg_tokens": 3}, {}, {"reg_tokens": 3}),
        (VIT_FAMILY, {"pre_norm": True}, {}, {"pre_norm": True}),
        (VIT_FAMILY, {"qkv_bias": False}, {}, {"qkv_bias": False}),
        (VIT_FAMILY, {"global_pool": "map"}, {}, {"global_pool": "map"}),
        (VIT_FAMILY, {"global_pool": "avg"}, {}, {"global_pool": "avg"}),
        (VIT_FAMILY, {}, {"global_pool": "map"}, {"global_pool": "token"}),
        (VIT_FAMILY, {}, {"global_pool": "avg"}, {"fc_norm": False}),
        (FAMILIES["distilled DeiT"], {"depth": 1}, {}, {"depth": 1}),
        (FAMILIES["BEiT"], {"depth": 3}, {}, {"depth": 3}),
        (FAMILIES["EVA"], {"depth": 3}, {}, {"depth": 3}),
        (SWIN_FAMILY, {"depths": [2, 3]}, {}, {"depths": [2, 3]}),
        (CONVNEXT_FAMILY, {"depths": [1, 1, 2, 1]}, {}, {"depths": [1, 1, 2, 1]}),
    ],
)
def test_the_suggested_key_makes_the_file_fit(
    tmp_path: Path, family: Family, theirs: dict[str, Any], ours: dict[str, Any], hint: dict[str, Any]
) -> None:
    torch.save(source(family, **theirs).state_dict(), tmp_path / "w.pth")
    message = refusal(family, tmp_path / "w.pth", **ours)
    named = re.search(r"give backbone\.model_args: (\{.*\}), or another backbone\.name", message)
    assert named, message
    assert yaml.safe_load(named[1]) == hint
    load(family, tmp_path / "w.pth", **(ours | hint))


@pytest.mark.parametrize(
    ("theirs", "ours", "words"),
    [
        (
            "DeiT III",
            Family("vit_small_patch16_224", VIT),
            "'blocks.0.ls1.gamma' among them; give another backbone.name",
        ),
        ("distilled DeiT", FAMILIES["DeiT"], "'dist_token' among them; give a backbone.name of distilled DeiT"),
        ("BEiT", Family("vit_base_patch16_224", VIT), "give another backbone.name"),
        ("Swin", Family("swinv2_tiny_window8_256", SWIN), "give another backbone.name"),
        ("ViT", FAMILIES["ResNet"], "give another backbone.name"),
    ],
)
def test_refuses_the_weights_of_another_family(tmp_path: Path, theirs: str, ours: Family, words: str) -> None:
    torch.save(source(FAMILIES[theirs]).state_dict(), tmp_path / "w.pth")
    assert words in refusal(ours, tmp_path / "w.pth")


def test_recognises_the_original_names_of_deit_iii(tmp_path: Path) -> None:
    state = source(VIT_FAMILY).state_dict()
    torch.save({"model": state | {"blocks.0.gamma_1": torch.ones(24)}}, tmp_path / "w.pth")
    assert "give a backbone.name of DeiT III (deit3_...)" in refusal(VIT_FAMILY, tmp_path / "w.pth")


@pytest.mark.parametrize(("theirs", "ours"), [([1, 1, 2, 1], [1, 1, 1, 1]), ([1, 1, 1, 1], [1, 1, 2, 1])])
def test_refuses_a_resnet_of_another_depth(tmp_path: Path, theirs: list[int], ours: list[int]) -> None:
    family = Family("resnet18", {"layers": ours})
    torch.save(source(family, layers=theirs).state_dict(), tmp_path / "w.pth")
    assert "'layer3.1.conv1.weight' among them; give another backbone.name" in refusal(family, tmp_path / "w.pth")


def test_names_both_shapes_of_a_tensor_that_does_not_fit(tmp_path: Path) -> None:
    torch.save(source(VIT_FAMILY, embed_dim=48).state_dict(), tmp_path / "w.pth")
    message = refusal(VIT_FAMILY, tmp_path / "w.pth")
    assert "('cls_token' is 1 x 1 x 48 in the file and 1 x 1 x 24 in the model)" in message


# --- timm's own filter -------------------------------------------------------------------------------------------


def filter_of(name: str) -> Any:
    found: list[Any] = []
    with torch.device("meta"), loading_with(lambda model, filter_fn=None, **_: found.append(filter_fn)):
        timm.create_model(name, pretrained=True)
    return found[0]


def test_uses_the_filter_of_the_models_entry_point() -> None:
    plain = vision_transformer.checkpoint_filter_fn
    assert filter_of("vit_tiny_patch16_224") is plain
    assert filter_of("deit3_small_patch16_224").keywords == {"adapt_layer_scale": True}
    assert filter_of("flexivit_small").keywords == {"interpolation": "bilinear", "antialias": False}
    assert filter_of("regnetx_002").__name__ == "_filter_fn"
    assert filter_of("resnet18") is None


def test_resizes_flexivit_as_its_entry_point_does(tmp_path: Path) -> None:
    family = FAMILIES["FlexiViT"]
    larger = source(family, img_size=64)
    torch.save(larger.state_dict(), tmp_path / "w.pth")
    own_filter = partial(vision_transformer.checkpoint_filter_fn, interpolation="bilinear", antialias=False)
    expected = source(family)
    expected.load_state_dict(own_filter(larger.state_dict(), expected))
    assert torch.equal(load(family, tmp_path / "w.pth").pos_embed, expected.pos_embed)


def test_restores_timms_loader_after_a_failure(tmp_path: Path) -> None:
    before = _builder.load_pretrained
    torch.save(PART, tmp_path / "w.pth")
    refusal(VIT_FAMILY, tmp_path / "w.pth")
    assert _builder.load_pretrained is before


# --- timm's own files --------------------------------------------------------------------------------------------


def pretrained(family: Family, file: Path, classes: int = CLASSES, **changed: Any) -> nn.Module:
    arguments = family.arguments | {"pretrained_cfg_overlay": {"file": str(file)}} | changed
    return build_backbone(BackboneConfig(name=family.name, model_args=arguments), classes, family.side, seed=1).model


@pytest.mark.parametrize("classes", [CLASSES, 1000])
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"depth": 3}, "lacks 12 of the model's tensors, 'blocks.2.norm1.weight' among them"),
        ({"depth": 1}, "has 12 more than the model"),
        ({"init_values": 1e-5}, "lacks 4 of the model's tensors, 'blocks.0.ls1.gamma' among them"),
        ({"qk_norm": True}, "lacks 8 of the model's tensors, 'blocks.0.attn.q_norm.weight' among them"),
        ({"global_pool": "map"}, "lacks 13 of the model's tensors, 'attn_pool.latent' among them"),
        ({"global_pool": "avg"}, "lacks 2 of the model's tensors, 'fc_norm.weight' among them"),
        ({"reg_tokens": 2}, "lacks 1 of the model's tensors, 'reg_token' among them"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_refuses_arguments_that_change_the_tensors_of_pretrained_weights(
    tmp_path: Path, changed: dict[str, Any], words: str, classes: int, suffix: str
) -> None:
    model = timm.create_model(VIT_FAMILY.name, img_size=32, **VIT)
    file = tmp_path / f"w{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(model.state_dict(), file)
    with pytest.raises(ConfigError, match=r"^backbone\.pretrained: the weights of 'vit_tiny_patch16_224' in ") as error:
        pretrained(VIT_FAMILY, file, classes, **changed)
    assert words in str(error.value)
    assert "model_args" in str(error.value)
    loaded = pretrained(VIT_FAMILY, file, classes)
    assert torch.equal(loaded.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)
    assert torch.equal(loaded.head.weight, model.head.weight) == (classes == 1000)


def test_loads_the_files_that_timm_loads_loosely(tmp_path: Path) -> None:
    """FCMAE's files lack the last norm. Models that average skip SigLIP's pooling."""
    family = Family("convnextv2_atto.fcmae", CONVNEXT)
    state = {n: t for n, t in source(family).state_dict().items() if not n.startswith("head.")}
    save_file(state, tmp_path / "fcmae.safetensors")
    assert torch.equal(pretrained(family, tmp_path / "fcmae.safetensors").stem[0].weight, state["stem.0.weight"])
    with pytest.raises(ConfigError, match=r"lacks 2 of the model's tensors, 'head\.norm\.weight'"):
        pretrained(Family("convnextv2_atto", CONVNEXT), tmp_path / "fcmae.safetensors")
    state = source(FAMILIES["SigLIP"]).state_dict()
    save_file(state, tmp_path / "siglip.safetensors")
    average = Family("vit_base_patch16_siglip_gap_224", VIT)
    assert torch.equal(pretrained(average, tmp_path / "siglip.safetensors").pos_embed, state["pos_embed"])
    with pytest.raises(ConfigError, match="has 12 more than the model"):
        pretrained(average, tmp_path / "siglip.safetensors", depth=1)
