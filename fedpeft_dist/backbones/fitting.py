"""How a file's tensors fit a model: which are missing or left over, and which config key would help."""

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from fedpeft_dist.backbones.weight_files import UnfitWeightsError

State = Mapping[str, torch.Tensor]
Filter = Callable[..., State]

# Beginnings of the names of tensors outside the encoder: classifiers, and parts of a pre-training or another task.
OTHER_PARTS = re.compile(
    r"head|classifier|decoder|criterion|loss|metric|project|predict|prototype|momentum"
    r"|^(mask_token|mask_embed|queue|teacher|student|ema|model_ema|target|online|encoder_k|logit_|text|token_embed|neck|"
    r"pooler|pre_logits)"
    r"|^(fc|proj)$"
)
# Prefixes that timm skips in the file, or leaves fresh in the model, for models that it loads loosely.
LOOSE_LEFTOVERS, LOOSE_FRESH = ("attn_pool.",), ("head.norm.",)
BLOCK = re.compile(r"(?:(?:layers|stages)\.(\d+)\.)?blocks\.(\d+)\.")
OTHER_MODEL = "another backbone.name, other backbone.model_args, or a file of the encoder alone"
# Counters, and constants that follow from a model's sizes. timm's own filters skip them.
CONSTANTS = (".num_batches_tracked", "relative_position_index", "relative_coords_table", "attn_mask")


class Option(NamedTuple):
    """An argument of a model that adds or removes tensors whose names match a pattern, and others along with them."""

    names: str
    argument: str
    present: str | None
    """Value of the argument that adds the tensors; None if no value does."""
    absent: str | None
    """Value of the argument that removes the tensors; None if no value does."""
    along: str = r"^$"


OPTIONS = (
    Option(r"\.ls[12]\.gamma$", "init_values", "1.0e-5", None),
    Option(r"\.gamma_[12]$", "init_values", "1.0e-5", None),
    Option(r"^stages\..*\.gamma$", "ls_init_value", "1.0e-6", None),
    Option(r"\.[qk]_norm\.", "qk_norm", "true", "false"),
    Option(r"^attn_pool\.", "global_pool", "map", "token"),
    Option(r"^fc_norm\.", "fc_norm", None, "false", along=r"^norm\."),
    Option(r"^fc_norm\.", "global_pool", "avg", "token", along=r"^norm\."),
    Option(r"^norm_pre\.", "pre_norm", "true", "false", along=r"^patch_embed\.proj\.bias$"),
    Option(r"\.attn\.norm\.", "scale_attn_norm", "true", "false"),
    Option(r"\.mlp\.norm\.", "scale_mlp_norm", "true", "false"),
    Option(r"\.(qkv\.bias|q_bias)$", "qkv_bias", "true", "false"),
    Option(r"^cls_token$", "class_token", "true", None),
)
# Tensors that no argument adds to a plain ViT, and the advice for each.
NAMES = (
    (r"\.gamma_1$", "a backbone.name of DeiT III (deit3_...)"),
    (r"^dist_token$", "a backbone.name of distilled DeiT (deit_..._distilled_...)"),
)


@dataclass(frozen=True)
class Target:
    """The model to fill."""

    model: nn.Module
    heads: tuple[str, ...]
    """Prefixes of the classifiers' names. Classifiers may be missing."""
    filter: Filter | None
    """timm's function from a file's layout to the model's."""
    strict: bool
    """Whether timm loads this model strictly."""


@dataclass(frozen=True)
class Fit:
    """How a file's tensors fit a model. Classifiers do not matter.

    Missing tensors are the model's that the file lacks, leftover ones are the file's that the model lacks.
    """

    state: State
    model: nn.Module
    missing: Sequence[str]
    leftover: Sequence[str] = ()
    misshapen: Sequence[str] = ()

    def check(self) -> None:
        """
        Raises:
            UnfitWeightsError: a tensor of the model would stay random, or a tensor of the file would be left out.
        """
        kinds = (("lacks {} of the model's tensors", self.missing), ("has {} more than the model", self.leftover))
        told = [f"{text.format(len(names))}, {names[0]!r} among them" for text, names in kinds if names]
        if told:
            raise UnfitWeightsError(f"{', and '.join(told)}; give {self.advice()}")
        if self.misshapen:
            name = self.misshapen[0]
            theirs, own = (" x ".join(map(str, side[name].shape)) for side in (self.state, self.model.state_dict()))
            raise UnfitWeightsError(
                f"cannot be loaded ({name!r} is {theirs} in the file and {own} in the model); give {OTHER_MODEL}"
            )

    def advice(self) -> str:
        """The config key that would make the model fit the file, if one explains every difference."""
        known = {key for kind in type(self.model).__mro__ for key in inspect.signature(kind.__init__).parameters}
        if isinstance(self.model, VisionTransformer) and not self.missing:
            for pattern, name in NAMES:
                if any(re.search(pattern, left) for left in self.leftover):
                    return name
        arguments, present, absent = self._depth()
        if "reg_token" in present:
            arguments["reg_tokens"] = str(self.state["reg_token"].shape[1])
            present.remove("reg_token")
        for option in OPTIONS:
            for names, value in ((present, option.present), (absent, option.absent)):
                found = any(re.search(option.names, name) for name in names)
                if found and value is not None and option.argument in known:
                    arguments[option.argument] = value
                    explained = re.compile(f"{option.names}|{option.along}")
                    present, absent = ([n for n in side if not explained.search(n)] for side in (present, absent))
        resized = arguments.keys() & {"reg_tokens", "class_token"}
        misshapen = [name for name in self.misshapen if name != "pos_embed" or not resized]
        if present or absent or misshapen or not arguments or not arguments.keys() <= known:
            return OTHER_MODEL
        shown = ", ".join(f"{key}: {value}" for key, value in arguments.items())
        return f"backbone.model_args: {{{shown}}}, or another backbone.name"

    def _depth(self) -> tuple[dict[str, str], list[str], list[str]]:
        """The argument for the file's depth if it differs, and the leftover and missing names that remain."""
        theirs, mine = _count_blocks(self.state), _count_blocks(self.model.state_dict())
        if theirs == mine or theirs.keys() != mine.keys() or not theirs:
            return {}, list(self.leftover), list(self.missing)

        def is_shared(name: str) -> bool:
            found = BLOCK.match(name)
            return found is None or int(found[2]) < min(theirs[found[1] or ""], mine[found[1] or ""])

        depths = [str(theirs[stage]) for stage in sorted(theirs)]
        arguments = {"depth": depths[0]} if list(theirs) == [""] else {"depths": f"[{', '.join(depths)}]"}
        return arguments, list(filter(is_shared, self.leftover)), list(filter(is_shared, self.missing))


def compare(state: State, target: Target) -> Fit:
    """How a file's tensors, in timm's layout, fit a model."""
    own = target.model.state_dict()
    stems = [f"{name}.weight" for name in layers_in(target.model.pretrained_cfg, "first_conv")]
    needed = [name for name, tensor in own.items() if tensor.is_floating_point() and not name.startswith(target.heads)]
    fresh, spare = ((), ()) if target.strict else (LOOSE_FRESH, LOOSE_LEFTOVERS)

    def is_spare(name: str) -> bool:
        return name.startswith(target.heads + spare) or name.endswith(CONSTANTS) or not is_encoder(name)

    def shape(tensor: torch.Tensor, name: str) -> tuple[int, ...]:
        # The input channels of a first convolution may differ.
        return tensor.shape[:1] + tensor.shape[2:] if name in stems else tensor.shape

    return Fit(
        state,
        target.model,
        missing=[name for name in needed if name not in state and not name.startswith(fresh)],
        leftover=[name for name in state if name not in own and not is_spare(name)],
        misshapen=[name for name in needed if name in state and shape(state[name], name) != shape(own[name], name)],
    )


def layers_in(pretrained_cfg: Mapping[str, Any], key: Literal["classifier", "first_conv"]) -> tuple[str, ...]:
    """Names of the classifier layers, or of the layers that take the image, from timm's config of a model."""
    names = pretrained_cfg.get(key)
    return (names,) if isinstance(names, str) else tuple(names or ())


def is_encoder(name: str) -> bool:
    """Whether a tensor's name may belong to an encoder."""
    return OTHER_PARTS.search(name.partition(".")[0]) is None


def _count_blocks(names: Iterable[str]) -> Counter[str]:
    """Number of blocks of each stage. A network without stages has one stage with an empty name."""
    return Counter(stage for stage, _ in {(found[1] or "", found[2]) for found in map(BLOCK.match, names) if found})
