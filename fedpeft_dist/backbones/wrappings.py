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
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.models import clean_state_dict
from torch import nn

from fedpeft_dist.backbones.errors import UnfitWeightsError, one_line
from fedpeft_dist.backbones.fitting import Filter, Fit, State, Target, compare, is_encoder
from fedpeft_dist.backbones.huggingface_names import are_hugging_faces, to_timm

logger = logging.getLogger(__name__)

# Order of preference if several parts fit: averaged weights first, then dictionaries in timm's order, SECOND last.
PREFERRED = ("state_dict_ema", "model_ema", "ema", "teacher", "state_dict", "model")
SECOND = {"student", "momentum_encoder", "encoder_k", "target_encoder", "target_network", "target"}
# Prefixes of encoders whose classifier is a layer of the pre-training.
WITHOUT_HEAD = ("base_encoder.", "encoder_q.")
DEEPEST_DICT, DEEPEST_PREFIX = 3, 5


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
        """Whether the part fills the model."""
        return self.error is None and self.fit.is_complete

    @property
    def rank(self) -> tuple[bool, int]:
        """Place in the order of preference; smaller is better."""
        words = set(self.place.replace("/", ".").split("."))
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
    fitting = sorted((part for part in parts if part.fits), key=lambda part: part.rank)
    if not fitting:
        _refuse(min(parts, key=lambda part: len(part.fit.missing) + len(part.fit.misshapen)), stored, target)
    best = fitting[0]
    equal = [part.place for part in fitting if part.rank == best.rank]
    if len(equal) > 1:
        raise UnfitWeightsError(
            f"holds several parts that fit: {', '.join(map(repr, equal))}; save the tensors of one of them alone"
        )
    best.fit.check()
    spare = best.fit.state.keys() - target.model.state_dict().keys()
    if spare:
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
    counts = Counter(prefix for name in state for prefix in _prefixes(name))
    enough = len(target.model.state_dict()) / 2
    found: list[Part] = []
    fitting: list[str] = []
    for prefix in ["", *sorted((p for p in counts if counts[p] >= enough), key=lambda p: p.count("."))]:
        if not prefix.startswith(tuple(fitting)):
            found.append(_part(place, prefix, state, target))
            if found[-1].fits:
                fitting.append(prefix)
    return found


def _prefixes(name: str) -> Iterator[str]:
    words = name.split(".")[:-1]
    for count in range(1, min(len(words), DEEPEST_PREFIX) + 1):
        yield ".".join(words[:count]) + "."


def _part(place: str, prefix: str, state: State, target: Target) -> Part:
    inside = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    beside = [name for name in state if not name.startswith(prefix) and is_encoder(name)]
    if prefix.endswith(WITHOUT_HEAD):
        inside = {name: tensor for name, tensor in inside.items() if not name.startswith(target.heads)}
    if are_hugging_faces(inside):
        inside = to_timm(inside)
    error = None
    adapted: State = inside
    if target.filter is not None:
        try:
            adapted = apply_filter(target.filter, dict(inside), target.model)
        except Exception as caught:  # filters fail in many ways on the file of another model
            error = caught
    fit = compare(adapted, target)
    return Part(place + prefix, replace(fit, leftover=fit.leftover + beside), error)


def apply_filter(function: Filter, state: State, model: nn.Module) -> State:
    """Calls a filter as timm does: some filters do not take the model."""
    try:
        return function(state, model)
    except TypeError:
        return function(state)


def _refuse(part: Part, stored: Mapping[str, Any], target: Target) -> None:
    """Raises the error that says why the best part does not fit."""
    needed = sum(t.is_floating_point() for n, t in target.model.state_dict().items() if not n.startswith(target.heads))
    if len(part.fit.missing) == needed:
        first, prefixes = part.fit.missing[0], Counter()
        for _, state in _dictionaries(stored):
            prefixes.update(name.split(".")[0] + "." for name in state if "." in name)
        shown = ", ".join(f"'{prefix}'" for prefix, _ in prefixes.most_common(6)) or "none"
        raise UnfitWeightsError(
            f"lacks {needed} of the model's tensors, {first!r} among them, under every prefix of its names ({shown}); "
            "give another backbone.name, or a file in timm's layout"
        )
    part.fit.check()
    assert part.error is not None
    raise UnfitWeightsError(f"cannot be loaded ({one_line(part.error)})") from part.error
