"""timm models as backbones: names, seeds, local checkpoints in three formats, and compute types."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from fedpeft_dist.backbones.timm_backbone import Backbone, build_backbone, classifier_names, freeze
from fedpeft_dist.config import schema
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.methods import METHODS, attach_method
from tests import tiny
from tests.weight_fixtures import with_changed_tensors

CLASSES, SIDE = 5, 32
VIT, VIT_ARGS = tiny.VIT_NAME, tiny.VIT_ARGS | {"patch_size": 16, "depth": 2}
RESNET = "test_resnet"


def build(
    name: str = VIT, num_classes: int = CLASSES, seed: int = 1, image_size: int = SIDE, **values: Any
) -> Backbone:
    if name == VIT:
        values["model_args"] = VIT_ARGS | values.get("model_args", {})
    values.setdefault("pretrained", "checkpoint" in values)
    return build_backbone(schema.BackboneConfig(name=name, **values), num_classes, image_size, seed)


def source_model(name: str = VIT, num_classes: int = 7, side: int = SIDE) -> nn.Module:
    """A model whose every parameter and buffer differs from a fresh model's."""
    arguments = {**VIT_ARGS, "img_size": side} if name == VIT else {}
    return with_changed_tensors(timm.create_model(name, num_classes=num_classes, **arguments).eval())


@torch.no_grad()
def features(model: nn.Module, side: int = SIDE, channels: int = 3) -> torch.Tensor:
    """The classifier's input."""
    images = torch.randn(3, channels, side, side, generator=torch.Generator().manual_seed(2))
    return model.forward_head(model.forward_features(images), pre_logits=True)


def head_of(backbone: Backbone) -> dict[str, torch.Tensor]:
    names = tuple(f"{name}." for name in classifier_names(backbone.model))
    return {key: tensor for key, tensor in backbone.model.state_dict().items() if key.startswith(names)}


def assert_same_tensors(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


# --- names and arguments -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "near"),
    [("vit_bse_patch16_224", "vit_base_patch16_224"), ("resnt50", "resnet50"), ("glyph_vt", "glyph_vit")],
)
def test_suggests_the_nearest_name_for_an_unknown_one(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=rf"backbone\.name: '{name}' is no timm model; did you mean .*\b{near}\b"):
        build(name)


def test_suggests_nothing_for_a_name_that_resembles_none() -> None:
    with pytest.raises(ConfigError, match=r"'qqqqqqqqqq' is no timm model; see timm\.list_models"):
        build("qqqqqqqqqq")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_refuses_an_unknown_pretraining_tag(device: str) -> None:
    config = schema.BackboneConfig(name=f"{VIT}.no_such_tag", pretrained=False)
    with pytest.raises(ConfigError, match="no_such_tag"):
        build_backbone(config, CLASSES, SIDE, 1, device)


def test_names_arguments_that_the_model_does_not_take() -> None:
    with pytest.raises(ConfigError, match=r"vit_tiny_patch16_224 cannot be made with .*depht"):
        build(model_args={"depht": 3})


def test_model_args_reach_the_model() -> None:
    assert len(build(model_args={"depth": 1}).model.blocks) == 1


def test_a_fixed_input_size_follows_the_image_size() -> None:
    assert build(image_size=48).model.patch_embed.grid_size == (3, 3)
    backbone = build(image_size=SIDE)
    assert (backbone.image_size, backbone.channels) == (SIDE, 3)
    assert backbone.mean == backbone.std == (0.5, 0.5, 0.5)
    assert not backbone.model.training
    assert backbone.num_parameters == sum(p.numel() for p in backbone.model.parameters())
    assert features(backbone.model).shape == (3, 32)


@pytest.mark.parametrize(("name", "mean"), [(VIT, 0.5), (RESNET, 0.5), ("resnet10t", (0.485 + 0.456 + 0.406) / 3)])
def test_a_grey_backbone_normalises_one_channel(name: str, mean: float) -> None:
    backbone = build(name, model_args={"in_chans": 1})
    assert backbone.channels == 1
    assert backbone.mean == pytest.approx((mean,))
    assert len(backbone.std) == 1
    with torch.no_grad():
        assert backbone.model(torch.zeros(2, 1, SIDE, SIDE)).shape == (2, CLASSES)


def test_the_meta_device_makes_the_same_shapes_without_memory_or_files() -> None:
    config = schema.BackboneConfig(name=VIT, model_args=VIT_ARGS, checkpoint="/no/such/file.pth")
    shapes = build_backbone(config, CLASSES, SIDE, 1, "meta")
    assert all(parameter.is_meta for parameter in shapes.model.parameters())
    assert shapes.sha256 == ""
    real = build()
    assert shapes.num_parameters == real.num_parameters
    assert [(n, p.shape) for n, p in shapes.model.named_parameters()] == [
        (n, p.shape) for n, p in real.model.named_parameters()
    ]


# --- seeds -------------------------------------------------------------------------------------------------------


def test_the_seed_decides_the_model() -> None:
    first, again, other = build(seed=3), build(seed=3), build(seed=4)
    assert_same_tensors(first.model.state_dict(), again.model.state_dict())
    assert not torch.equal(head_of(first)["head.weight"], head_of(other)["head.weight"])


def test_a_new_head_depends_on_the_seed_alone(tmp_path: Path) -> None:
    save_file(source_model().state_dict(), tmp_path / "source.safetensors")
    checkpoint = str(tmp_path / "source.safetensors")
    first = head_of(build(seed=3, checkpoint=checkpoint))
    torch.rand(5)  # the global generator's state must not matter
    assert_same_tensors(first, head_of(build(seed=3, checkpoint=checkpoint)))
    assert not torch.equal(first["head.weight"], head_of(build(seed=4, checkpoint=checkpoint))["head.weight"])


@pytest.mark.parametrize("name", [VIT, RESNET])
def test_the_digest_covers_all_tensors(tmp_path: Path, name: str) -> None:
    source = source_model(name, num_classes=CLASSES)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    digest = build(name, checkpoint=str(tmp_path / "w.safetensors")).sha256
    assert len(digest) == 64
    assert build(name, seed=2, checkpoint=str(tmp_path / "w.safetensors")).sha256 == digest
    for key, tensor in list(source.state_dict().items())[::4]:
        changed = source.state_dict() | {key: tensor + 1}
        save_file(changed, tmp_path / "other.safetensors")
        assert build(name, checkpoint=str(tmp_path / "other.safetensors")).sha256 != digest, key


def generator_states() -> tuple[bytes, object, str]:
    return torch.random.get_rng_state().numpy().tobytes(), random.getstate(), str(np.random.get_state())


METHOD_CONFIGS = [
    schema.FullConfig(name="full"),
    schema.HeadConfig(name="head"),
    schema.BiasConfig(name="bias"),
    schema.NormConfig(name="norm"),
    schema.PromptConfig(name="prompt"),
    schema.AdapterConfig(name="adapter", bottleneck=4),
    schema.LoraConfig(name="lora", rank=2),
    schema.PartialConfig(name="partial"),
    schema.AdaptformerConfig(name="adaptformer"),
    schema.HoulsbyConfig(name="houlsby"),
    schema.RepadapterConfig(name="repadapter"),
    schema.DiffitConfig(name="diffit"),
    schema.ConvpassConfig(name="convpass"),
    schema.PrefixConfig(name="prefix"),
    schema.SsfConfig(name="ssf"),
    schema.Ia3Config(name="ia3"),
    schema.DoraConfig(name="dora", rank=2),
    schema.VeraConfig(name="vera", rank=4),
    schema.FactTtConfig(name="fact_tt", rank=2),
    schema.FactTkConfig(name="fact_tk", rank=2),
]


@pytest.mark.parametrize("method", METHOD_CONFIGS, ids=lambda config: config.name)
def test_building_does_not_change_the_global_generators(method: schema.MethodConfig) -> None:
    assert {type(config) for config in METHOD_CONFIGS} == set(METHODS)
    before = generator_states()
    backbone = build()
    assert generator_states() == before
    first = attach_method(backbone, method, seed=2).initial_vector()
    assert generator_states() == before
    torch.rand(3)
    again = attach_method(build(), method, seed=2).initial_vector()
    assert torch.equal(first, again)


def test_a_failed_build_does_not_change_the_global_generators() -> None:
    before = generator_states()
    with pytest.raises(ConfigError):
        build("qqqqqqqqqq")
    assert generator_states() == before


# --- checkpoints -------------------------------------------------------------------------------------------------


def save_wrapped(state: dict[str, torch.Tensor], path: Path) -> None:
    """Saves a state as a training script does: in a dictionary with other things, under DDP's prefix."""
    torch.save({"epoch": 3, "state_dict": {f"module.{key}": tensor for key, tensor in state.items()}}, path)


SAVERS: dict[str, tuple[str, Callable[[dict[str, torch.Tensor], Path], None]]] = {
    "safetensors": ("w.safetensors", save_file),
    "pth": ("w.pth", torch.save),
    "wrapped pth": ("w.pth", save_wrapped),
}


@pytest.mark.parametrize("name", [VIT, RESNET])
@pytest.mark.parametrize("saver", SAVERS)
def test_a_checkpoint_gives_its_features_and_a_new_head(tmp_path: Path, name: str, saver: str) -> None:
    source = source_model(name, num_classes=7)
    file_name, save = SAVERS[saver]
    save(source.state_dict(), tmp_path / file_name)
    loaded = build(name, checkpoint=str(tmp_path / file_name))
    assert torch.equal(features(loaded.model), features(source))
    assert not torch.equal(features(build(name).model), features(source))
    assert_same_tensors(head_of(loaded), head_of(build(name)))


@pytest.mark.parametrize("name", [VIT, RESNET])
def test_a_head_of_the_same_shape_is_kept(tmp_path: Path, name: str) -> None:
    source = source_model(name, num_classes=CLASSES)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    loaded = build(name, checkpoint=str(tmp_path / "w.safetensors"))
    assert_same_tensors(loaded.model.state_dict(), source.state_dict())


def test_a_checkpoint_without_a_head_gets_a_new_head(tmp_path: Path) -> None:
    source = source_model(num_classes=0)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    loaded = build(checkpoint=str(tmp_path / "w.safetensors"))
    assert torch.equal(features(loaded.model), features(source))
    assert_same_tensors(head_of(loaded), head_of(build()))


def test_a_checkpoint_of_another_image_size_is_resampled_as_timm_does(tmp_path: Path) -> None:
    source = source_model(side=64)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    loaded = build(checkpoint=str(tmp_path / "w.safetensors"))
    expected = timm.create_model(VIT, num_classes=7, img_size=SIDE, **VIT_ARGS).eval()
    state = timm.models.vision_transformer.checkpoint_filter_fn(source.state_dict(), expected)
    expected.load_state_dict(state)
    assert torch.equal(features(loaded.model), features(expected))


@pytest.mark.parametrize("extra", ["momentum_encoder.weight", "head.projection.weight"])
def test_skips_tensors_outside_the_encoder(tmp_path: Path, extra: str, caplog: pytest.LogCaptureFixture) -> None:
    source = source_model()
    save_file(source.state_dict() | {extra: torch.zeros(2)}, tmp_path / "w.safetensors")
    with caplog.at_level(logging.INFO, logger="fedpeft_dist"):
        loaded = build(checkpoint=str(tmp_path / "w.safetensors"))
    assert torch.equal(features(loaded.model), features(source))
    assert "1 tensors have no place" in caplog.text


class Opaque:
    """A class that a trusting unpickler would run, and a safe one refuses."""


@pytest.mark.parametrize(
    ("file_name", "content", "message"),
    [
        ("missing.pth", None, "no such file"),
        ("weights.ckpt", {}, r"must end in one of \.safetensors, \.pth, .*\.npz"),
        ("short.safetensors", "cut", "cannot be loaded"),
        ("noise.pth", b"noise" * 50, "cannot be loaded"),
        ("noise.npz", b"noise" * 50, "cannot be loaded"),
        ("unsafe.pth", {"a": Opaque()}, "cannot be loaded"),
        ("partial.safetensors", "norm.weight", r"lacks 1 of the model's tensors, 'norm\.weight'"),
        ("shape.pth", {"shape": 1}, "cannot be loaded .*pos_embed"),
    ],
)
def test_names_a_checkpoint_that_does_not_fit(tmp_path: Path, file_name: str, content: Any, message: str) -> None:
    path = tmp_path / file_name
    state = source_model().state_dict()
    if content == "cut":
        save_file(state, path)
        path.write_bytes(path.read_bytes()[:1000])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        save_file({key: tensor for key, tensor in state.items() if key != content}, path)
    elif content == {"shape": 1}:
        torch.save(state | {"pos_embed": torch.zeros(1, 5, 7)}, path)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ConfigError, match=message) as error:
        build(checkpoint=str(path))
    assert str(error.value).startswith(f"backbone.checkpoint: '{path}'")
    assert "\n" not in str(error.value)


def in_jax_format(model: nn.Module) -> dict[str, np.ndarray]:
    """A ViT in the layout of the augreg checkpoints: kernels transposed, attention split by head, names of Flax."""
    heads, width = model.blocks[0].attn.num_heads, model.embed_dim
    state = {key: tensor.numpy() for key, tensor in model.state_dict().items()}

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}

    def linear(name: str) -> dict[str, np.ndarray]:
        return {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}

    tree = {
        "embedding": {
            "kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
            "bias": state["patch_embed.proj.bias"],
        },
        "Transformer/encoder_norm": norm("norm"),
        "head": linear("head"),
    }
    for i in range(len(model.blocks)):
        block, encoder = f"blocks.{i}", f"Transformer/encoderblock_{i}"
        attention = f"{encoder}/MultiHeadDotProductAttention_1"
        tree[f"{encoder}/LayerNorm_0"] = norm(f"{block}.norm1")
        tree[f"{encoder}/LayerNorm_2"] = norm(f"{block}.norm2")
        tree[f"{encoder}/MlpBlock_3/Dense_0"] = linear(f"{block}.mlp.fc1")
        tree[f"{encoder}/MlpBlock_3/Dense_1"] = linear(f"{block}.mlp.fc2")
        weights = np.split(state[f"{block}.attn.qkv.weight"], 3)
        biases = np.split(state[f"{block}.attn.qkv.bias"], 3)
        for name, weight, bias in zip(("query", "key", "value"), weights, biases):
            kernel = weight.T.reshape(width, heads, width // heads)
            tree[f"{attention}/{name}"] = {"kernel": kernel, "bias": bias.reshape(heads, width // heads)}
        out = state[f"{block}.attn.proj.weight"].T.reshape(heads, width // heads, width)
        tree[f"{attention}/out"] = {"kernel": out, "bias": state[f"{block}.attn.proj.bias"]}
    arrays = {f"{place}/{leaf}": array for place, leaves in tree.items() for leaf, array in leaves.items()}
    arrays["cls"] = state["cls_token"]
    arrays["Transformer/posembed_input/pos_embedding"] = state["pos_embed"]
    return arrays


def test_an_augreg_npz_gives_its_features_and_a_new_head(tmp_path: Path) -> None:
    source = source_model(num_classes=7)
    np.savez(tmp_path / "w.npz", **in_jax_format(source))
    loaded = build(checkpoint=str(tmp_path / "w.npz"))
    assert torch.equal(features(loaded.model), features(source))
    assert_same_tensors(head_of(loaded), head_of(build()))


def test_an_npz_with_the_same_classes_keeps_its_head(tmp_path: Path) -> None:
    source = source_model(num_classes=CLASSES)
    np.savez(tmp_path / "w.npz", **in_jax_format(source))
    loaded = build(checkpoint=str(tmp_path / "w.npz"))
    assert_same_tensors(loaded.model.state_dict(), source.state_dict())


def test_an_npz_for_a_grey_backbone_sums_its_colours(tmp_path: Path) -> None:
    source = source_model()
    np.savez(tmp_path / "w.npz", **in_jax_format(source))
    loaded = build(checkpoint=str(tmp_path / "w.npz"), model_args={"in_chans": 1})
    summed = source.patch_embed.proj.weight.sum(dim=1, keepdim=True)
    torch.testing.assert_close(loaded.model.patch_embed.proj.weight, summed)
    assert loaded.channels == 1


def test_names_an_incomplete_npz(tmp_path: Path) -> None:
    arrays = in_jax_format(source_model())
    del arrays["Transformer/encoderblock_1/LayerNorm_2/scale"]
    np.savez(tmp_path / "w.npz", **arrays)
    with pytest.raises(ConfigError, match=r"w\.npz' cannot be loaded .*encoderblock_1/LayerNorm_2/scale"):
        build(checkpoint=str(tmp_path / "w.npz"))


def test_refuses_an_npz_for_a_resnet(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", **in_jax_format(source_model()))
    with pytest.raises(ConfigError, match=r"w\.npz' cannot be loaded"):
        build(RESNET, checkpoint=str(tmp_path / "w.npz"))


def test_the_embedded_backbone_loads_a_checkpoint(tmp_path: Path) -> None:
    source = build("glyph_vit", seed=9)
    save_file(source.model.state_dict(), tmp_path / "w.safetensors")
    loaded = build("glyph_vit", seed=1, num_classes=3, checkpoint=str(tmp_path / "w.safetensors"))
    assert torch.equal(features(loaded.model, channels=1), features(source.model, channels=1))
    assert loaded.channels == 1


# --- freeze ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [VIT, RESNET])
def test_freeze_casts_only_linear_layers_and_convolutions(name: str) -> None:
    model = build(name).model
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    freeze(model, torch.bfloat16, torch.device("cpu"))
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    matrices = {f"{name}.{key}" for name, module in layers for key in module.state_dict()}
    assert matrices
    for key, tensor in model.state_dict().items():
        if key in matrices:
            assert tensor.dtype == torch.bfloat16, key
            assert torch.equal(tensor, before[key].to(torch.bfloat16))
        else:
            assert tensor.dtype == before[key].dtype, key
            assert torch.equal(tensor, before[key])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(torch.zeros(1, 3, SIDE, SIDE)).isfinite().all()


def test_freeze_in_float32_changes_no_value() -> None:
    model = build().model
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    freeze(model, torch.float32, torch.device("cpu"))
    assert_same_tensors(model.state_dict(), before)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_colour_checkpoint_fits_a_grey_model(tmp_path):
    """The first convolution is summed over the colours, so a grey image gives the same result in both models."""
    colour = source_model()
    path = tmp_path / "colour.pth"
    torch.save(colour.state_dict(), path)
    grey = build(checkpoint=str(path), model_args={"in_chans": 1})
    image = torch.rand(2, 1, SIDE, SIDE)
    with torch.no_grad():
        expected = colour.forward_features(image.expand(-1, 3, -1, -1))
        torch.testing.assert_close(grey.model.forward_features(image), expected, rtol=1e-3, atol=1e-3)
