"""`method.blocks`: which blocks it names, and which tensors each method then trains."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.load import config_digest, parse_config, result_keys
from fedpeft_dist.config.schema import MethodConfig
from fedpeft_dist.methods.blocks import choose_blocks
from tests.numerics.cases import make_lane_model, make_model
from tests.tiny import VIT_ARGS, VIT_NAME

METHODS = ("bias", "norm", "adapter", "lora", "prompt", "partial")
METHODS += ("adaptformer", "houlsby", "repadapter", "diffit", "convpass", "prefix")
METHODS += ("ssf", "ia3", "dora", "vera", "fact_tt")
HEAD = {"head.weight", "head.bias"}
SHARED = {"fact.u", "fact.v"}


def make_vit(**more):
    return make_model(VIT_NAME, VIT_ARGS | {"img_size": 16, "depth": 3} | more)


def trained(method: dict, **more) -> set[str]:
    return set(make_lane_model(make_vit(**more), method).layout.shapes)


@pytest.mark.parametrize(
    ("given", "expected"), [(1, [2]), (3, [0, 1, 2]), ([0], [0]), ([-1, 0], [0, 2]), ([1, -2], [1])], ids=str
)
def test_blocks_are_chosen_as_in_python(given, expected):
    assert choose_blocks(make_vit(), given) == expected


@pytest.mark.parametrize("method", METHODS)
def test_only_the_chosen_blocks_are_trained(method):
    settings = {"shared": False} if method == "adapter" else {}
    names = trained({"name": method, "blocks": [1], **settings})
    assert names > HEAD
    assert all(name.startswith("blocks.1.") for name in names - HEAD - SHARED)


@pytest.mark.parametrize("method", ["bias", "norm", "partial", "ssf"])
def test_the_final_norm_belongs_to_the_last_block(method):
    names = trained({"name": method, "blocks": 1})
    assert ("norm.ssf_shift" if method == "ssf" else "norm.bias") in names
    assert all(name.startswith(("blocks.2.", "norm.")) for name in names - HEAD)


def test_partial_trains_every_tensor_of_the_last_block():
    """Layer scales and the norms of queries and keys, too."""
    arguments = {"init_values": 0.1, "qk_norm": True, "global_pool": "avg"}
    own = {name for name, _ in make_vit(**arguments).named_parameters()}
    last = {name for name in own if name.startswith(("blocks.2.", "fc_norm.", "head."))}
    assert "blocks.2.ls1.gamma" in last
    assert trained({"name": "partial"}, **arguments) == last


def test_one_adapter_for_two_of_three_blocks():
    model = make_lane_model(make_vit(), {"name": "adapter", "blocks": 2})
    adapted = [name for name, _ in model.backbone.model.named_modules() if name.endswith(".mlp.adapter")]
    assert adapted == ["blocks.1.mlp.adapter"], "named_modules names a shared module once"


def test_shallow_tokens_travel_through_the_chosen_blocks():
    model = make_lane_model(make_vit(), {"name": "prompt", "depth": "shallow", "blocks": [0, 1]}).backbone.model
    assert len(model.blocks) == 2
    assert len(model.blocks[0].blocks) == 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("null", [{"blocks": None}, {}], ids=["null", "absent"])
def test_no_blocks_mean_the_whole_model_and_no_key_of_the_result(method, null):
    if method == "partial":
        pytest.skip("it has a default of its own")
    config = parse_config({"method": {"name": method} | null}, "test")
    assert "method.blocks" not in result_keys(config)
    chosen = parse_config({"method": {"name": method, "blocks": 1}}, "test")
    assert result_keys(chosen)["method.blocks"] == 1
    assert config_digest(chosen) != config_digest(config)


def test_the_cache_is_no_key_of_the_result():
    assert config_digest(parse_config({"runtime": {"cache": "none"}}, "test")) == config_digest(
        parse_config({}, "test")
    )


REFUSALS = {
    "more than there are": ({"name": "bias", "blocks": 4}, "method.blocks: 4 is more than the 3 blocks of "),
    "no such index": ({"name": "lora", "blocks": [0, 3]}, "method.blocks: VisionTransformer has no block 3; give "),
    "a gap": ({"name": "prompt", "depth": "shallow", "blocks": [0, 2]}, r"method.blocks: \[0, 2\] skips a block"),
}


@pytest.mark.parametrize(("method", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refuses_blocks_in_one_line(method, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make_lane_model(make_vit(), method)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"prompt"}))
def test_refuses_models_without_a_sequence_of_blocks(method):
    model = make_model("resnet18", {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)})
    with pytest.raises(ConfigError, match=r"method\.blocks: 1 needs a backbone with a sequence of blocks, ResNet has"):
        make_lane_model(model, {"name": method, "blocks": 1}, 32)


def test_partial_names_the_layer_that_it_cannot_train():
    model = make_model("beit_base_patch16_224", {"depth": 2, "embed_dim": 32, "num_heads": 2})
    with pytest.raises(ConfigError, match=r"'partial' does not fit Beit: blocks\.1 is a Block"):
        make_lane_model(model, {"name": "partial"}, 224)


@pytest.mark.parametrize("blocks", [0, -1, [], [1.5], "last", True])
def test_refuses_other_values(blocks):
    with pytest.raises(ValidationError):
        TypeAdapter(MethodConfig).validate_python({"name": "partial", "blocks": blocks})
