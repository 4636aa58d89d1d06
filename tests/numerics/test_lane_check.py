"""The lane check at the start of a run, on models that are broken on purpose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from fedpeft_dist import methods
from fedpeft_dist.backbones.timm_backbone import freeze
from fedpeft_dist.config.errors import ConfigError, MachineFaultError
from fedpeft_dist.config.load import config_digest, parse_config
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.federation.opening import open_run
from fedpeft_dist.methods import build_lane_model
from fedpeft_dist.methods.lane_model import LaneModel, LaneModule
from fedpeft_dist.runtime.interrupts import StopRequest
from fedpeft_dist.training.lane_check import check_lanes, verify_lanes
from tests.tiny import tiny_vit

from .cases import CLASSES, CPU, make_images, make_runtime, make_store

TINY = tiny_vit(depth=2)
DATA = {"name": "synthetic", "image_size": 16, "classes": CLASSES, "clients": 8}
RELPOS = {"name": "test_vit_relpos", "pretrained": False}


def make_config(method: str = "head", backbone: dict | None = None, **more: dict) -> RunConfig:
    tree = {
        "backbone": backbone or TINY,
        "method": {"name": method},
        "data": DATA,
        "output": {"name": "run"},
        **more,
    }
    return parse_config(tree, "test")


def build(config: RunConfig) -> LaneModel:
    model = build_lane_model(config, CLASSES)
    freeze(model.backbone.model, torch.float32, CPU)
    return model


def hook(layer: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[LaneModel], None]:
    def break_model(model: LaneModel) -> None:
        module = model.backbone.model.get_submodule(layer)
        module.register_forward_hook(lambda _, __, output: change(output))

    return break_model


def exchange_lanes(model: LaneModel) -> None:
    """The first trained layer takes its parameters from the other lane."""
    layer = next(module for module in model.backbone.model.modules() if isinstance(module, LaneModule))
    bind = layer.bind
    layer.bind = lambda views: bind({name: view.flip(0) for name, view in views.items()})


def keep_the_first_answer(model: LaneModel) -> None:
    """The patch embedding's bias is added as it was at the first call."""
    layer = model.backbone.model.patch_embed.proj
    kept = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        kept.append(layer.bias.detach()[:1])
        return layer.layer(x) + kept[0].view(1, -1, 1, 1)

    layer.forward = forward


BROKEN = {
    "a mean over all rows": ("head", hook("blocks.0", lambda x: x - 0.5 * x.mean(0)), "mixes lanes"),
    "rows in another order": ("bias", hook("blocks.1.norm1", lambda x: x.roll(1, 0)), "mixes lanes"),
    "another lane's parameters": ("lora", exchange_lanes, "mixes lanes"),
    "a millionth of a neighbour": ("head", hook("norm", lambda x: x + 1e-6 * x.sum(0)), "is not exact"),
    "rounding by place": (
        "head",
        hook("norm", lambda x: x * (1 + 2e-7 * torch.arange(len(x)).view(-1, 1, 1))),
        "exact",
    ),
    "a bias that is kept": ("bias", keep_the_first_answer, "plain PyTorch: patch_embed.proj.bias differs"),
    "a layer doubled": ("norm", hook("blocks.0.norm1", lambda x: 2 * x), "plain PyTorch"),
    "scores that are no numbers": ("norm", hook("blocks.0.norm1", lambda x: x * float("nan")), "plain PyTorch"),
    "full, a block scaled": ("full", hook("blocks.0", lambda x: 1.1 * x), "plain PyTorch"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_refuses_a_model_broken_on_purpose(case):
    method, break_model, message = BROKEN[case]
    config = make_config(method)
    check_lanes(build(config), config, make_runtime())
    model = build(config)
    break_model(model)
    with pytest.raises(ConfigError, match=message):
        check_lanes(model, config, make_runtime())


def test_sees_a_leak_between_samples_under_sample_privacy():
    privacy = {"name": "sample", "noise_multiplier": 1.0}
    config = make_config("head", privacy=privacy, data={**DATA, "partition": {"name": "iid"}})
    check_lanes(build(config), config, make_runtime())
    model = build(config)
    hook("blocks.0", lambda x: x - 0.5 * x.mean(0))(model)
    with pytest.raises(ConfigError, match="mixes lanes"):
        check_lanes(model, config, make_runtime())


def test_a_wrong_gradient_of_plain_pytorch_for_one_row_refuses_no_private_run():
    """LeViT's convolutions have one on the CPU. A run computes several rows at a time."""
    backbone = {"name": "levit_128s", "pretrained": False}
    data = {**DATA, "image_size": 32, "partition": {"name": "iid"}}
    config = make_config("full", backbone, privacy={"name": "sample", "noise_multiplier": 1.0}, data=data)
    check_lanes(build(config), config, make_runtime())


def test_one_lane_has_no_neighbour_to_be_checked_against():
    config = make_config("lora", runtime={"lanes": 1})
    model = build(config)
    exchange_lanes(model)
    check_lanes(model, config, make_runtime())


def test_keyed_dropout_on_a_table_of_all_samples_would_leak(monkeypatch: pytest.MonkeyPatch):
    """If the table's layers were unknown, one client's masks would decide another client's features."""
    config = make_config("head", RELPOS)
    check_lanes(build(config), config, make_runtime())
    monkeypatch.setattr(methods, "check_backbone", lambda backbone, name: frozenset())
    with pytest.raises(ConfigError, match=r"mixes lanes|cannot run with several lanes"):
        check_lanes(build(config), config, make_runtime())


@pytest.mark.parametrize(
    ("method", "name", "message"),
    [
        ("bias", "test_vit_relpos", "blocks.0.attn.rel_pos.mlp.fc1.bias works on a table that all samples share"),
        ("bias", "swinv2_cr_tiny_ns_224", "meta_mlp.fc1.bias works on a table that all samples share"),
        ("bias", "xcit_nano_12_p16_224", "pos_embed.token_projection.bias works on a table that all samples share"),
    ],
)
def test_refuses_to_train_a_table_that_all_samples_share(method, name, message):
    with pytest.raises(ConfigError, match=message):
        build_lane_model(make_config(method, {"name": name, "pretrained": False}), CLASSES, "meta")


def test_refuses_a_tensor_that_the_scores_do_not_depend_on(monkeypatch: pytest.MonkeyPatch):
    """A cache that the evaluation before has filled, as timm's attention biases had one."""
    monkeypatch.setattr("fedpeft_dist.methods.lane_model.stop_caching", lambda model: None)
    backbone = {"name": "levit_128s", "pretrained": False}
    with pytest.raises(ConfigError, match=r"do not depend on .*attention_biases"):
        build_lane_model(make_config("full", backbone), CLASSES, "meta")


def test_refuses_a_model_that_gives_no_score_for_each_class():
    config = make_config("head", {"name": "test_vit", "pretrained": False, "model_args": {"global_pool": ""}})
    with pytest.raises(ConfigError, match=r"backbone.name: test_vit gives no score for each class"):
        build_lane_model(config, CLASSES, "meta")


def test_refuses_a_model_that_compares_samples_with_each_other():
    """timm's CSATv2 attends over the batch in its spatial attention."""
    config = make_config("head", {"name": "csatv2", "pretrained": False}, data={**DATA, "image_size": 64})
    with pytest.raises(ConfigError, match="compares the samples of a batch with each other"):
        build_lane_model(config, CLASSES, "meta")


@pytest.mark.parametrize("case", ["a mean over all rows", "a millionth of a neighbour"])
def test_a_refused_run_leaves_no_file(case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    method, break_model, message = BROKEN[case]
    config = make_config(method, output={"root": str(tmp_path / "runs"), "name": "run"})

    def broken(*arguments: object, **keywords: object) -> LaneModel:
        model = build_lane_model(*arguments, **keywords)
        break_model(model)
        return model

    monkeypatch.setattr("fedpeft_dist.federation.setup.build_lane_model", broken)
    with pytest.raises(ConfigError, match=message), open_run(config, make_runtime(), StopRequest()):
        pass
    assert not (tmp_path / "runs").exists()


def test_the_scores_take_part_in_the_comparison():
    """A shift of all scores changes no gradient."""
    config = make_config("head")
    model = build(config)
    model.backbone.model.head.register_forward_hook(lambda _, __, scores: scores + 1)
    with pytest.raises(ConfigError, match="the score"):
        check_lanes(model, config, make_runtime())


def test_every_kind_of_frozen_layer_that_keeps_attention_biases_is_told():
    """timm's attentions with such a cache, found by what they have; their flag makes them look their biases up."""
    config = make_config("head", {"name": "levit_128s", "pretrained": False})
    model = build_lane_model(config, CLASSES).backbone.model
    attentions = [module for module in model.modules() if hasattr(module, "attention_bias_cache")]
    assert attentions
    assert all(module.training for module in attentions)
    assert not any(module.training for module in model.modules() if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d))


def verify(model: LaneModel, rows: int = 3, samples: int = 4) -> None:
    verify_lanes(rows, samples, model, make_store(make_images()), make_runtime())


def in_the_third_lane(x: torch.Tensor) -> torch.Tensor:
    """A rounding that the start-up check of two lanes never meets."""
    place = torch.zeros(len(x), 1, 1)
    place[8:12] = 2e-7
    return x * (1 + place)


VERIFIED = {
    "a millionth of a neighbour": ("head", hook("norm", lambda x: x + 1e-6 * x.sum(0))),
    "rounding by place": ("bias", hook("blocks.0", in_the_third_lane)),
    "another lane's parameters": ("lora", exchange_lanes),
}


@pytest.mark.parametrize("method", ["full", "head", "bias", "norm", "lora", "adapter", "prompt"])
def test_the_verification_passes_where_lanes_are_exact(method):
    verify(build(make_config(method)))
    verify(build(make_config(method)), rows=1)
    verify(build(make_config(method)), rows=5, samples=1)


@pytest.mark.parametrize("case", VERIFIED)
def test_the_verification_sees_what_depends_on_place_or_neighbours(case):
    method, break_model = VERIFIED[case]
    model = build(make_config(method))
    break_model(model)
    with pytest.raises(MachineFaultError, match=r"runtime.verify: a client's result in row \d"):
        verify(model)


def test_the_verification_sees_more_than_the_check_of_two_lanes():
    config = make_config("bias")
    model = build(config)
    hook("blocks.0", in_the_third_lane)(model)
    check_lanes(model, config, make_runtime())
    with pytest.raises(MachineFaultError):
        verify(model)


def test_a_run_that_is_verified_stops_before_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    output = {"root": str(tmp_path / "runs"), "name": "run"}
    data = {**DATA, "partition": {"name": "iid"}}
    config = make_config("bias", output=output, data=data, runtime={"verify": True, "lanes": 3})
    with open_run(config, make_runtime(), StopRequest()) as opened:
        assert opened.simulation.config.runtime.lanes == 3
    seen: list[tuple[int, int]] = []

    def fail(rows: int, samples: int, *others: object) -> None:
        seen.append((rows, samples))
        raise MachineFaultError("runtime.verify: a client's result differs")

    monkeypatch.setattr("fedpeft_dist.federation.opening.verify_lanes", fail)
    with pytest.raises(MachineFaultError), open_run(config, make_runtime(), StopRequest()):
        pass
    assert seen == [(3, opened.simulation.setup.batch_size)]
    assert not (tmp_path / "runs" / "run" / "state.json").exists()
    unverified = make_config("bias", output=output, data=data, runtime={"lanes": 3})
    assert config_digest(unverified) == config_digest(config)
