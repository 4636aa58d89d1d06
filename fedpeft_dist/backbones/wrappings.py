"""Finds the encoder in a file of weights, whatever a pre-training wrapped it in.

A file holds nested dictionaries of tensors: {"model": ...}, {"teacher": ..., "student": ...}. Names in a dictionary
share prefixes: "module.", "backbone.", "base_encoder.". A part is the tensors of one dictionary under one prefix. The
part that fills the model is the encoder.

    MAE            {"model": encoder}; longer files also hold a decoder and a mask token
    MoCo           {"state_dict": {"module.base_encoder.*" or "module.encoder_q.*", the momentum encoder, ...}}
    DINO, iBOT     {"teacher": {"backbone.*", "head.*"}, "student": ...}
    Lightning      {"state_dict": {"model.*"}, ...}
    transformers   {"vit.*"}, {"vision_model.*", "text_model.*"}
"""

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.models import clean_state_dict
from torch import nn

from fedpeft_dist.backbones.fitting import Filter, Fit, State, Target, compare, is_encoder
from fedpeft_dist.backbones.weight_files import UnfitWeightsError, one_line

logger = logging.getLogger(__name__)

# Order of preference if several parts fit: averaged weights first, then dictionaries in timm's order, SECOND last.
PREFERRED = ("state_dict_ema", "model_ema", "ema", "teacher", "state_dict", "model")
SECOND = {"student", "momentum_encoder", "encoder_k", "target_encoder", "target_network", "target"}
# Prefixes of encoders whose classifier is a layer of the pre-training.
WITHOUT_HEAD = ("base_encoder.", "encoder_q.")
DEEPEST_DICT, DEEPEST_PREFIX = 3, 5

# Tensors of Hugging Face's ViT, DeiT, DINOv2 and CLIP, by which their files are recognised.
MARKS = ("embeddings.patch_embeddings.projection.weight", "embeddings.patch_embedding.weight")
UNUSED = ("pooler.", "embeddings.position_ids")

# Applied in this order. timm's own filter then translates the rest of DINOv2's names.
RENAMES = (
    (r"^encoder\.layers?\.", "blocks."),
    (r"^embeddings\.patch_embeddings?\.(projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.(cls_token|class_embedding)$", "cls_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.position_embeddings?(\.weight)?$", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^(post_layernorm|layernorm)\.", "norm."),
    (r"\.(attention\.attention\.(?=query|key|value)|self_attn\.(?=[qkv]_proj))", ".attn."),
    (r"\.(attention\.output\.dense|self_attn\.out_proj)\.", ".attn.proj."),
    (r"\.(layernorm_before|layer_norm1)\.", ".norm1."),
    (r"\.(layernorm_after|layer_norm2)\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
)
PROJECTION = re.compile(r"(.*\.attn\.)(query|key|value|[qkv]_proj)\.(weight|bias)")


@dataclass(frozen=True)
class Part:
    """Tensors of one dictionary under one prefix, in timm's layout if they could be translated."""

    place: str
    """The dictionary and the prefix, for messages."""
    fit: Fit
    error: Exception | None
    """The error of timm's filter, if it failed."""

    @property
    def fits(self) -> bool:
        """Whether the part fills the model. Tensors may be left over."""
        return self.error is None and not self.fit.missing and not self.fit.misshapen

    @property
    def rank(self) -> tuple[bool, int]:
        """Place in the order of preference; smaller is better."""
        words = set(re.split("[./]", self.place))
        order = next((i for i, word in enumerate(PREFERRED) if word in words), len(PREFERRED))
        return bool(words & SECOND), order


def find_encoder(stored: Mapping[str, Any], target: Target) -> State:
    """The tensors for the model, in its layout. They may include a classifier's.

    Raises:
        UnfitWeightsError: no part of the file fits, several parts fit equally well, or a tensor is left over.
    """
    parts = [part for place, state in _dictionaries(stored) for part in _parts(place, state, target)]
    if not parts:
        raise UnfitWeightsError("cannot be loaded (it holds no tensors by name)")
    fitting = [part for part in parts if part.fits]
    if not fitting:
        _refuse(min(parts, key=lambda part: len(part.fit.missing) + len(part.fit.misshapen)), stored, target)
    best = min(fitting, key=lambda part: part.rank)
    equal = [repr(part.place) for part in fitting if part.rank == best.rank]
    if len(equal) > 1:
        raise UnfitWeightsError(f"holds several parts that fit: {', '.join(equal)}; save the tensors of one alone")
    best.fit.check()
    if spare := best.fit.state.keys() - target.model.state_dict().keys():
        logger.info("%d tensors have no place in the model and are left out, %r among them", len(spare), min(spare))
    return best.fit.state


def _dictionaries(stored: Mapping[Any, Any], place: str = "", depth: int = 0) -> Iterator[tuple[str, State]]:
    """Each dictionary's place and tensors, under names without the prefixes of distributed training."""
    state = {name: value for name, value in stored.items() if isinstance(name, str) and torch.is_tensor(value)}
    if state:
        yield place, clean_state_dict(state)
    for name, value in stored.items():
        if isinstance(value, Mapping) and isinstance(name, str) and depth < DEEPEST_DICT:
            yield from _dictionaries(value, f"{place}{name}/", depth + 1)


def _parts(place: str, state: State, target: Target) -> list[Part]:
    """The parts of a dictionary. A part inside another part that fits is left out."""
    ends = ((name, dot.end()) for name in state for dot in list(re.finditer(r"\.", name))[:DEEPEST_PREFIX])
    counts = Counter(name[:end] for name, end in ends)
    enough = len(target.model.state_dict()) / 2
    found: dict[str, Part] = {}
    for prefix in ["", *sorted((p for p in counts if counts[p] >= enough), key=lambda p: p.count("."))]:
        if not any(prefix.startswith(outer) and part.fits for outer, part in found.items()):
            found[prefix] = _part(place, prefix, state, target)
    return list(found.values())


def _part(place: str, prefix: str, state: State, target: Target) -> Part:
    inside = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    beside = [name for name in state if not name.startswith(prefix) and is_encoder(name)]
    if prefix.endswith(WITHOUT_HEAD):
        inside = {name: tensor for name, tensor in inside.items() if not name.startswith(target.heads)}
    if any(mark in inside for mark in MARKS):
        inside = _to_timm(inside)
    error = None
    try:
        inside = _apply_filter(target.filter, dict(inside), target.model) if target.filter else inside
    except Exception as caught:  # filters fail in many ways on the file of another model
        error = caught
    fit = compare(inside, target)
    return Part(place + prefix, replace(fit, leftover=fit.leftover + beside), error)


def _apply_filter(function: Filter, state: State, model: nn.Module) -> State:
    """Calls a filter as timm does: some filters do not take the model."""
    try:
        return function(state, model)
    except TypeError:
        return function(state)


def _to_timm(state: State) -> State:
    """Hugging Face's tensors under timm's names, with queries, keys and values in one tensor."""
    renamed: dict[str, torch.Tensor] = {}
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        if name.startswith(UNUSED):
            continue
        for old, new in RENAMES:
            name = re.sub(old, new, name)
        if found := PROJECTION.fullmatch(name):
            parts.setdefault(f"{found[1]}qkv.{found[3]}", {})[found[2][0]] = tensor
        else:
            renamed[name] = tensor
    for name in ("cls_token", "pos_embed"):  # CLIP's tensors have no batch axis
        if name in renamed:
            renamed[name] = renamed[name].reshape(1, -1, renamed[name].shape[-1])
    return renamed | {name: torch.cat([part[x] for x in "qkv"]) for name, part in parts.items() if len(part) == 3}


def _refuse(part: Part, stored: Mapping[str, Any], target: Target) -> None:
    """Raises the error that says why the best part does not fit."""
    needed = sum(t.is_floating_point() for n, t in target.model.state_dict().items() if not n.startswith(target.heads))
    if len(part.fit.missing) == needed:
        first, names = part.fit.missing[0], [name for _, state in _dictionaries(stored) for name in state]
        prefixes = Counter(name.split(".")[0] + "." for name in names if "." in name)
        shown = ", ".join(f"'{prefix}'" for prefix, _ in prefixes.most_common(6)) or "none"
        raise UnfitWeightsError(
            f"lacks {needed} of the model's tensors, {first!r} among them, under every prefix of its names ({shown}); "
            "give another backbone.name, or a file in timm's layout"
        )
    part.fit.check()
    assert part.error is not None
    raise UnfitWeightsError(f"cannot be loaded ({one_line(part.error)})") from part.error
