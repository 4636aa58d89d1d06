"""timm's models by name, and the files of their pre-trained weights.

Training only looks at files on this machine. Only `fedpeft prefetch` downloads.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import timm
import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError
from timm.models._hub import _get_safe_alternatives

from fedpeft_dist.backbones.glyph_vit import GLYPH_VIT
from fedpeft_dist.backbones.weight_files import one_line
from fedpeft_dist.config.errors import ConfigError

DEFAULT_FILE = "pytorch_model.bin"


def check_name(name: str) -> None:
    """Checks that a backbone of this name exists.

    Raises:
        ConfigError: timm has no such model, or no such pre-training of the model.
    """
    if name == GLYPH_VIT:
        return
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], [*timm.list_models(), GLYPH_VIT], n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see timm.list_models()"
        raise ConfigError(f"backbone.name: {name!r} is no timm model; {hint}")
    try:
        timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    except RuntimeError as error:
        known = _names_with_weights(name)
        raise ConfigError(
            f"backbone.name: {name!r}: {one_line(error).rstrip('.')}{known and f'; known: {known}'}"
        ) from None


def _names_with_weights(name: str) -> str:
    """The names under which timm has weights of the same architecture, with commas."""
    return ", ".join(timm.list_models(name.partition(".")[0], pretrained=True))


@dataclass(frozen=True)
class PretrainedWeights:
    """The place of a model's weights: a local file, a repository of the Hugging Face hub, or an address."""

    model: str
    """The model's name as the user gave it."""
    source: Mapping[str, Any]
    """timm's pretrained_cfg."""
    cache: str | None = None
    """Folder for downloads; None for the hub's or torch's own."""

    def locate(self, download: bool = False) -> Path:
        """The file on this machine. The network is used only for a download.

        Args:
            download: fetch the file if it is not on this machine.

        Raises:
            ConfigError: timm has no such weights, the file is not on this machine, or the download fails.
        """
        file, repository = self.source.get("file"), self.source.get("hf_hub_id")
        origin = str(file) if file else f"huggingface.co/{repository}" if repository else self._url[0]
        if not origin:
            known = _names_with_weights(self.model)
            raise ConfigError(
                f"backbone.pretrained: timm has no weights for {self.model!r}; give "
                f"{known and f'a name with weights ({known}), '}backbone.checkpoint a local file, or pretrained: false"
            )
        paths = [file or self._url[1]]
        if repository and not file:
            paths = [self._from_hub(try_to_load_from_cache, name) for name in self._hub_files]
        for path in paths:
            if isinstance(path, (str, Path)) and Path(path).is_file():
                return Path(path)
        if not download:
            raise ConfigError(
                f"backbone.pretrained: the weights of {self.model!r} ({origin}) are not on this machine; run "
                "`fedpeft prefetch CONFIG` where there is internet, give backbone.checkpoint a local file, "
                "or pretrained: false"
            )
        try:
            if file:
                raise FileNotFoundError("no such file")
            if repository:
                return self._download_from_hub()
            url, path = self._url
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), progress=False)  # writes beside the path, then renames
            return path
        except Exception as error:  # each layer, from disk to proxy, fails with classes of its own
            raise ConfigError(
                f"backbone.name: the weights of {self.model!r} cannot be downloaded from {origin} "
                f"({one_line(error)}); try again where there is internet, or give backbone.checkpoint a local file"
            ) from error

    @property
    def _url(self) -> tuple[str, Path]:
        """The address, empty if there is none, and the local file of its download."""
        url = self.source.get("url") or ""
        url, name = (url, Path(urlparse(url).path).name) if isinstance(url, str) else url
        return url, Path(self.cache or Path(torch.hub.get_dir(), "checkpoints"), name)

    @property
    def _hub_files(self) -> list[str]:
        """Names that the weights may have in the repository, in timm's order."""
        name = self.source.get("hf_hub_filename") or DEFAULT_FILE
        return [*_get_safe_alternatives(name), name]

    def _from_hub(self, load: Callable[..., Any], name: str) -> Any:
        repository, _, revision = self.source["hf_hub_id"].partition("@")
        return load(repository, name, revision=revision or None, cache_dir=self.cache)

    def _download_from_hub(self) -> Path:
        for name in self._hub_files:
            try:
                return Path(self._from_hub(hf_hub_download, name))
            except EntryNotFoundError as error:
                failure = error
                if isinstance(error, LocalEntryNotFoundError):  # without a connection nothing is known about the names
                    break
        raise failure
