"""What a run has trained, read back onto the plain backbone that it was trained on."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedpeft_dist.backbones.glyph_vit import ARCHITECTURE, TIMM_NAME
from fedpeft_dist.backbones.names import GLYPH_VIT
from fedpeft_dist.backbones.timm_backbone import Backbone, build_backbone, classifiers_of, model_arguments
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import LoraConfig, RunConfig
from fedpeft_dist.data import count_classes
from fedpeft_dist.data.recipe import ImageRecipe
from fedpeft_dist.lanes.random import derive_seed
from fedpeft_dist.methods import attach_method
from fedpeft_dist.tracking.run_directory import COMPLETE, RunDirectory
from fedpeft_dist.tracking.same_run import check_same

# Where timm is told what to load; an export brings its own weights.
SOURCE_ARGUMENTS = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "checkpoint_path")
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class TrainedRun:
    """What a run has trained, and the plain backbone that it was trained on."""

    config: RunConfig
    trained: Mapping[str, torch.Tensor]
    metadata: Mapping[str, str]
    backbone: Backbone
    frozen: Mapping[str, torch.Tensor]
    """The backbone's tensors before training, buffers included, by timm's names."""
    num_classes: int
    recipe: ImageRecipe
    """How the run has prepared its images."""

    @property
    def architecture(self) -> tuple[str, dict[str, Any]]:
        """The name of a registered timm model, without a tag, and the arguments that make it this one."""
        backbone = self.config.backbone
        arguments = model_arguments(backbone, self.config.data.image_size)
        arguments = {key: value for key, value in arguments.items() if key not in SOURCE_ARGUMENTS}
        if backbone.name == GLYPH_VIT:
            return TIMM_NAME, {**ARCHITECTURE, **arguments}
        return backbone.name.partition(".")[0], arguments

    @property
    def timm_has_weights(self) -> bool:
        """Whether timm itself can make the backbone as it was before training, by name."""
        backbone = self.config.backbone
        told = any(key in backbone.model_args for key in SOURCE_ARGUMENTS)
        return backbone.pretrained and backbone.checkpoint is None and backbone.name != GLYPH_VIT and not told


def load_run(config: RunConfig, directory: RunDirectory) -> TrainedRun:
    """Reads what a run has trained and rebuilds its backbone; the data set's files are not needed.

    Raises:
        ConfigError: the run has not finished, or its parameters are not those of the config's method and backbone.
    """
    file, state = directory.trainable_file, directory.read_state()
    if state is None or state["state"] != COMPLETE:
        # A run that is being made longer has the parameters of its first end still, and newer ones in its checkpoints.
        found = "has not begun" if state is None else f"is {state['state']}"
        raise ConfigError(
            f"{directory.path}: the run {found}, only a complete one can be exported; "
            f"`fedpeft train {directory.config_file}` finishes it"
        )
    trained, metadata = directory.read_trainable()
    num_classes = _count_classes(config, trained, file)
    seed = derive_seed(config.seed, "backbone")
    backbone = build_backbone(config.backbone, num_classes, config.data.image_size, seed)
    check_same(metadata["backbone_sha256"], backbone.sha256, file, "backbone")
    frozen = dict(backbone.model.state_dict())  # the method takes modules apart, but no tensor changes
    try:
        attach_method(backbone, config.method, seed=0).layout.join(trained)
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from None
    recipe = ImageRecipe.from_metadata(metadata) or _likely_recipe(config, backbone, file)
    return TrainedRun(config, trained, metadata, backbone, frozen, num_classes, recipe)


def merge(run: TrainedRun) -> dict[str, torch.Tensor]:
    """The trained model as one state dict with timm's names; LoRA's products are added to the weights, in float64."""
    merged = dict(run.frozen)
    for name, tensor in run.trained.items():
        if name.endswith(LORA_A):
            layer = name.removesuffix(LORA_A)
            assert isinstance(run.config.method, LoraConfig)
            scale = run.config.method.alpha / run.config.method.rank
            product = run.trained[layer + LORA_B].double() @ tensor.double()
            weight = run.frozen[f"{layer}.weight"]
            merged[f"{layer}.weight"] = (weight.double() + scale * product).to(weight.dtype)
        elif not name.endswith(LORA_B):
            assert name in merged
            merged[name] = tensor
    return merged


def _likely_recipe(config: RunConfig, backbone: Backbone, file: Path) -> ImageRecipe:
    """The recipe of a run that has not written its own: right unless its images were of differing sizes."""
    if hasattr(config.data, "stored_size"):
        print(
            f"warning: {file}: does not say how images were prepared, since an older version wrote it; the export says "
            "resized whole, which is wrong if the images' sizes differed: they were cropped then",
            file=sys.stderr,
        )
    recipe = ImageRecipe.of(config.data, backbone.interpolation, backbone.mean, backbone.std, cropped=False)
    return replace(recipe, upright=False)


def _count_classes(config: RunConfig, trained: Mapping[str, torch.Tensor], file: Path) -> int:
    """As many as the trained classifier tells apart; where the backbone names none, as the data has."""
    classifiers = classifiers_of(config.backbone)
    if not classifiers:
        return count_classes(config.data)
    name = f"{classifiers[0]}.weight"
    if name not in trained:
        raise ConfigError(f"{file}: the classifier's {name} is missing")
    return len(trained[name])
