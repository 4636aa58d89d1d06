"""Reads files of weights without running code: safetensors, PyTorch's pickles, and indices of several such files.

A pickle that holds more than tensors and plain values is refused. Some other objects are harmless: the parsed arguments
of a training script, numpy's scalars, paths. A stand-in replaces them, so that not even their classes run.
"""

import json
import pickle
import re
import warnings
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import _TYPES, load_file

from fedpeft_dist.config import errors
from fedpeft_dist.config.errors import ConfigError

one_line = partial(errors.one_line, most=300)
"""The text of an error on one line, cut after 300 characters; the name of its class if it has no text."""

INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pth.tar", ".pt", ".bin", ".npz", *INDEX_SUFFIXES)

GIT_LFS = b"version https://git-lfs.github.com/spec/"
WEB_PAGE = re.compile(rb"\s*(<!--.*?-->\s*)?<(!doctype|html|head|\?xml)", re.IGNORECASE | re.DOTALL)
MOST_GLOBALS = 5  # an error names at most so many

PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
HARMLESS = {
    "argparse": ("Namespace",),
    "types": ("SimpleNamespace",),
    "numpy": ("dtype", "ndarray"),
    "numpy.core.multiarray": ("scalar", "_reconstruct"),
    "numpy._core.multiarray": ("scalar", "_reconstruct"),
    "numpy.dtypes": tuple(name for name in dir(np.dtypes) if name.endswith("DType")),
    "pathlib": PATHS,
    "pathlib._local": PATHS,  # since Python 3.13
    "datetime": ("datetime", "date", "time", "timedelta", "timezone"),
}


class UnfitWeightsError(ValueError):
    """Weights that cannot be used. The message goes on after the file's name: "lacks ...", "cannot be loaded ..."."""


class _StandIn:
    """Replaces a harmless object, and does nothing."""

    def __new__(cls, *_: object) -> "_StandIn":
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


def check_checkpoint(path: Path) -> Path:
    """Checks the path of a checkpoint, and returns the path.

    Raises:
        ConfigError: the file does not exist, its kind is unknown, or it is one of several files.
    """
    if not path.name.lower().endswith(WEIGHT_SUFFIXES):
        raise ConfigError(f"backbone.checkpoint: '{path}' must end in one of {', '.join(WEIGHT_SUFFIXES)}")
    if not path.is_file():
        raise ConfigError(f"backbone.checkpoint: '{path}': no such file")
    if re.search(r"-\d{5}-of-(?!00001)\d{5}\.", path.name):  # such as model-00001-of-00003.safetensors
        raise ConfigError(f"backbone.checkpoint: '{path}' is one of several files; give their .index.json")
    return path


def read_weights(path: Path, mapped: bool = False) -> Mapping[str, Any]:
    """The unchanged content of a file, on the CPU.

    Args:
        mapped: leave the tensors in the file until they are used; for safetensors, and files of a recent torch.save.

    Raises:
        UnfitWeightsError: the file holds no weights, or more than weights.
        Exception: the file is damaged. The class depends on the library that reads the file.
    """
    name = path.name.lower()
    check_content(path)
    if name.endswith(INDEX_SUFFIXES):
        return _read_index(path, mapped)
    if name.endswith(".safetensors"):
        return _map_file(path) if mapped else load_file(path)
    stand_ins: list[Any] = [(_StandIn, f"{module}.{name}") for module, names in HARMLESS.items() for name in names]
    with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):
        warnings.simplefilter("ignore")  # the error below says what matters
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and is_zipfile(path))
        except (pickle.UnpicklingError, RuntimeError) as error:
            raise UnfitWeightsError(f"cannot be loaded ({_explain(path, error)})") from error
    if not isinstance(stored, Mapping):
        raise UnfitWeightsError(f"cannot be loaded (it holds a {type(stored).__name__}, not tensors by name)")
    return stored


def check_content(path: Path) -> None:
    """Checks that a file is not what a failed download leaves instead of weights.

    Raises:
        UnfitWeightsError: the file is empty, a Git LFS pointer or a web page.
    """
    with path.open("rb") as file:
        start = file.read(1024)
    if not start:
        raise UnfitWeightsError("cannot be loaded (it is empty); fetch the file again")
    if start.startswith(GIT_LFS):
        raise UnfitWeightsError("cannot be loaded (it is a Git LFS pointer, not weights); run `git lfs pull` beside it")
    if WEB_PAGE.match(start):
        raise UnfitWeightsError("cannot be loaded (it is a web page, not weights); fetch the file itself")


def _map_file(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, as views of the mapped file, with an attribute `is_mapped`.

    A tensor at an odd place is copied.
    """
    with safe_open(path, framework="pt") as checked:  # it knows how a file may be damaged
        names = set(checked.keys())
    content = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
    start = 8 + int.from_bytes(content[:8].numpy().tobytes(), "little")
    header = json.loads(content[8:start].numpy().tobytes())
    tensors = {}
    for name in names:
        dtype, (begin, end) = _TYPES[header[name]["dtype"]], header[name]["data_offsets"]
        raw = content[start + begin : start + end]
        is_aligned = (start + begin) % dtype.itemsize == 0
        tensors[name] = (raw if is_aligned else raw.clone()).view(dtype).view(header[name]["shape"])
        tensors[name].is_mapped = is_aligned
    return tensors


def _read_index(path: Path, mapped: bool) -> dict[str, torch.Tensor]:
    """The tensors of all files that an index lists."""
    index = json.loads(path.read_text(encoding="utf-8"))
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places:
        raise UnfitWeightsError("cannot be loaded (it has no 'weight_map' from tensors to files)")
    state: dict[str, torch.Tensor] = {}
    for name in sorted({str(place) for place in places.values()}):
        part = path.parent / name
        if part.name != name or not part.is_file() or part.name.lower().endswith(INDEX_SUFFIXES):
            raise UnfitWeightsError(f"cannot be loaded (it names {name!r}, which is no file beside it)")
        try:
            state |= read_weights(part, mapped)
        except UnfitWeightsError as error:
            raise UnfitWeightsError(f"cannot be loaded ({name!r} {error})") from error
    for name, place in places.items():
        if name not in state:
            raise UnfitWeightsError(f"cannot be loaded ({name!r} is not in {place!r}, where it should be)")
    return state


def _explain(path: Path, error: Exception) -> str:
    """Why PyTorch cannot read a file. PyTorch's advice to read it unsafely is left out."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    if "TorchScript" in text:
        return "it is a TorchScript archive; save the model's state_dict() in its place"
    names = re.findall(r"GLOBAL ([\w.]+)", text)
    with suppress(Exception):  # a damaged file fails in many ways, and one that is too old lists no names
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) or names
    if names:
        more = f" and {len(names) - MOST_GLOBALS} more" if len(names) > MOST_GLOBALS else ""
        listed = ", ".join(sorted(names)[:MOST_GLOBALS])
        return f"beside weights it holds {listed}{more}, which could run code; save the model's state_dict() alone"
    if not isinstance(error, pickle.UnpicklingError):
        return one_line(text or error, 200)
    reason = text.rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0].partition(" Please")[0]
    return f"it is damaged, or no file of torch.save: {reason[:200]}; save its tensors anew with torch.save"
