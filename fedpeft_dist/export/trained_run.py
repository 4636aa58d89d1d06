"""A finished run: its trained parameters, and the backbone before training."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedpeft_dist.backbones import timm_backbone
from fedpeft_dist.backbones.glyph_vit import ARCHITECTURE, GLYPH_VIT, TIMM_NAME
from fedpeft_dist.backbones.timm_backbone import Backbone, build_backbone, classifiers_of, model_arguments
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.data import count_classes
from fedpeft_dist.data.recipe import ImageRecipe
from fedpeft_dist.lanes.random import derive_seed
from fedpeft_dist.methods import attach_method, make_method
from fedpeft_dist.methods.lane_model import LaneModel
from fedpeft_dist.methods.method import Method
from fedpeft_dist.tracking.run_directory import COMPLETE, RunDirectory
from fedpeft_dist.tracking.same_run import check_same

SOURCE_ARGUMENTS = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "checkpoint_path")
"""The arguments that tell timm which weights to load. An export brings its own weights."""


@dataclass(frozen=True)
class TrainedRun:
    """The trained parameters of a run, and the backbone before training."""

    config: RunConfig
    trained: Mapping[str, torch.Tensor]
    metadata: Mapping[str, str]
    model: LaneModel
    """The backbone with its method. Its own parameters are those before the first round."""
    frozen: Mapping[str, torch.Tensor]
    """The backbone's tensors before training, buffers included, by timm's names."""
    num_classes: int
    recipe: ImageRecipe
    """The way in which the run has prepared its images."""

    @property
    def backbone(self) -> Backbone:
        return self.model.backbone

    @property
    def method(self) -> Method:
        return make_method(self.config.method)

    @property
    def architecture(self) -> tuple[str, dict[str, Any]]:
        """The name of a registered timm model, without a tag, and the arguments that make it this backbone."""
        backbone = self.config.backbone
        arguments = model_arguments(backbone, self.config.data.image_size)
        arguments = {key: value for key, value in arguments.items() if key not in SOURCE_ARGUMENTS}
        if backbone.name == GLYPH_VIT:
            return TIMM_NAME, {**ARCHITECTURE, **arguments}
        return backbone.name.partition(".")[0], arguments

    @property
    def timm_has_weights(self) -> bool:
        """Whether timm itself can make the backbone before training, by name."""
        backbone = self.config.backbone
        return timm_backbone.starts_from_timm(backbone) and backbone.model_args.keys().isdisjoint(SOURCE_ARGUMENTS)


def load_run(config: RunConfig, directory: RunDirectory) -> TrainedRun:
    """Reads a run's trained parameters and rebuilds its backbone. The data set's files are not needed.

    Raises:
        ConfigError: the run has not finished, or its parameters do not fit the config's method and backbone.
    """
    file, state = directory.trainable_file, directory.read_state()
    if state is None or state["state"] != COMPLETE:
        # A run that is being made longer still has the parameters of its first end. Its checkpoints have newer ones.
        found = "has not begun" if state is None else f"is {state['state']}"
        raise ConfigError(
            f"{directory.path}: the run {found}, only a complete one can be exported; "
            f"`fedpeft train {directory.config_file}` finishes it"
        )
    trained, metadata = directory.read_trainable()
    heads = [trained[f"{name}.weight"] for name in classifiers_of(config.backbone) if f"{name}.weight" in trained]
    # A method may train no classifier that has a name.
    num_classes = len(heads[0]) if heads else count_classes(config.data)
    seed = derive_seed(config.seed, "backbone")
    backbone = build_backbone(config.backbone, num_classes, config.data.image_size, seed)
    check_same(metadata["backbone_sha256"], backbone.sha256, file, "backbone")
    frozen = dict(backbone.model.state_dict())  # the method takes modules apart, but changes no tensor
    try:
        model = attach_method(backbone, config.method, derive_seed(config.seed, "method"))
        model.layout.join(trained)
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from None
    recipe = ImageRecipe.from_metadata(metadata) or _likely_recipe(config, backbone, file)
    return TrainedRun(config, trained, metadata, model, frozen, num_classes, recipe)


def _likely_recipe(config: RunConfig, backbone: Backbone, file: Path) -> ImageRecipe:
    """The recipe of a run that has not written its own. It is wrong only if the images' sizes differed."""
    if hasattr(config.data, "stored_size"):
        print(
            f"warning: {file}: does not say how images were prepared, since an older version wrote it; the export says "
            "resized whole, which is wrong if the images' sizes differed: they were cropped then",
            file=sys.stderr,
        )
    recipe = ImageRecipe.of(config.data, backbone.interpolation, backbone.mean, backbone.std, cropped=False)
    return replace(recipe, upright=False)
