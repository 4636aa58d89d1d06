"""Archives of numpy arrays (.npz) in the layout of JAX. Some timm models read them with code of their own."""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fedpeft_dist.backbones.errors import UnfitWeightsError, one_line
from fedpeft_dist.backbones.fitting import OTHER_MODEL
from fedpeft_dist.backbones.weight_files import check_content

SUFFIX = ".npz"
CLASSIFIERS = ("head/", "pre_logits/")
POOLING = "MAPHead_0/"  # timm skips it for models that it loads loosely
STACKED = "/encoderblock/"  # one array for all blocks


def load_archive(model: nn.Module, path: Path, strict: bool) -> None:
    """Lets a model read an archive, and checks that it reads every array of the encoder.

    Raises:
        UnfitWeightsError: the model reads no archives, the archive lacks an array, or the model leaves one unread.
    """
    check_content(path)
    if not hasattr(model, "load_pretrained"):
        raise UnfitWeightsError(f"cannot be loaded ({type(model).__name__} of timm reads no {SUFFIX} files)")
    with np.load(path) as archive:
        names = archive.files
    with _noting_reads() as read:
        try:
            model.load_pretrained(str(path))
        except KeyError as error:
            raise UnfitWeightsError(
                f"cannot be loaded ({one_line(error)}); give {_suggest(names, str(error))}"
            ) from error
    root = os.path.commonpath(sorted(read))
    root = f"{root}/" if root else ""  # the archive may hold other towers
    spare = CLASSIFIERS if strict else (*CLASSIFIERS, POOLING)
    for name in sorted(set(names) - read.keys()):
        if name.startswith(root) and not name.removeprefix(root).startswith(spare):
            raise UnfitWeightsError(f"has more than the model, {name!r} among it; give {_suggest(names, name)}")
    for name, length in read.items():
        if STACKED in name and length != len(model.blocks):
            raise UnfitWeightsError(
                f"has {length} blocks, as in {name!r}, and the model {len(model.blocks)}; "
                f"give backbone.model_args: {{depth: {length}}}, or another backbone.name"
            )


def _suggest(names: Iterable[str], name: str) -> str:
    """The config key that would help, given the archive's names and the name that is left over or missing."""
    if "/encoderblock_" in name:
        blocks = {found[1] for found in map(re.compile(r".*/encoderblock_(\d+)/").match, names) if found}
        argument = f"depth: {len(blocks)}"
    elif POOLING in name:
        argument = f"global_pool: {'map' if name in names else 'token'}"
    elif "/encoder_norm/" in name:
        argument = "fc_norm: false"
    else:
        return OTHER_MODEL
    return f"backbone.model_args: {{{argument}}}, or another backbone.name"


@contextmanager
def _noting_reads() -> Iterator[dict[str, int]]:
    """Collects the name of each array that is read from an archive, and the length of its first axis."""
    read: dict[str, int] = {}
    archive_type = np.lib.npyio.NpzFile
    plain = archive_type.__getitem__

    def note(archive: Any, name: str) -> Any:
        array = plain(archive, name)
        read[name] = len(array) if array.ndim else 1
        return array

    archive_type.__getitem__ = note
    try:
        yield read
    finally:
        archive_type.__getitem__ = plain
