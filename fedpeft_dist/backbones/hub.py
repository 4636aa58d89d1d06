"""timm's own pre-trained weights: where they lie on this machine, and how they get there.

Training only ever looks at files that are there already. Only `fedpeft prefetch` downloads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError

from fedpeft_dist.backbones.errors import one_line
from fedpeft_dist.backbones.names import names_with_weights
from fedpeft_dist.config.errors import ConfigError

DEFAULT_FILE = "pytorch_model.bin"
# What timm takes in place of a pickle of these names, where a repository has it.
SAFE_NAMES = {DEFAULT_FILE: "model.safetensors", "open_clip_pytorch_model.bin": "open_clip_model.safetensors"}


@dataclass(frozen=True)
class PretrainedWeights:
    """Where timm gets a model's weights from: a local file, a repository of the Hugging Face hub, or an address."""

    model: str
    """The model's name as the user gave it."""
    source: Mapping[str, Any]
    """timm's pretrained_cfg."""
    cache: str | None = None
    """The folder to keep files in, in place of the hub's or torch's own."""

    def find(self) -> Path | None:
        """The file on this machine, or None; looks at the disk only."""
        if self.source.get("file"):
            path = Path(self.source["file"])
            return path if path.is_file() else None
        if self._repository:
            for name in self._hub_files():
                path = try_to_load_from_cache(self._repository, name, cache_dir=self.cache, revision=self._revision)
                if isinstance(path, str):
                    return Path(path)
            return None
        path = self._url_file()
        return path if path is not None and path.is_file() else None

    def require(self) -> Path:
        """The file on this machine; nothing is downloaded.

        Raises:
            ConfigError: there are no such weights, or they are not here.
        """
        self.check_exist()
        found = self.find()
        if found is None:
            raise ConfigError(
                f"backbone.pretrained: the weights of {self.model!r} ({self.origin}) are not on this machine; run "
                "`fedpeft prefetch CONFIG` where there is internet, give backbone.checkpoint a local file, "
                "or pretrained: false"
            )
        return found

    def download(self) -> Path:
        """The file on this machine, fetched now where it is not there.

        Raises:
            ConfigError: there are no such weights, or they cannot be fetched.
        """
        self.check_exist()
        found = self.find()
        if found is not None:
            return found
        try:
            if self.source.get("file"):
                raise FileNotFoundError("no such file")
            return self._download_from_hub() if self._repository else self._download_from_url()
        except Exception as error:  # every layer from the disk to the proxy fails by classes of its own
            raise ConfigError(
                f"backbone.name: the weights of {self.model!r} cannot be downloaded from {self.origin} "
                f"({one_line(error)}); try again where there is internet, or give backbone.checkpoint a local file"
            ) from error

    def check_exist(self) -> None:
        """
        Raises:
            ConfigError: timm has no weights for this model.
        """
        if self.origin:
            return
        known = names_with_weights(self.model)
        choices = f"give a name with weights ({', '.join(known)}), " if known else "give "
        raise ConfigError(
            f"backbone.pretrained: timm has no weights for {self.model!r}; {choices}backbone.checkpoint a local file, "
            "or pretrained: false"
        )

    @property
    def origin(self) -> str:
        """For people; empty where there is none."""
        if self.source.get("file"):
            return str(self.source["file"])
        return f"huggingface.co/{self.source['hf_hub_id']}" if self._repository else self._url[0]

    @property
    def _repository(self) -> str:
        """On the hub; empty where there is none."""
        return (self.source.get("hf_hub_id") or "").partition("@")[0]

    @property
    def _revision(self) -> str | None:
        return (self.source.get("hf_hub_id") or "").partition("@")[2] or None

    @property
    def _url(self) -> tuple[str, str]:
        """Address and file name; both empty where there is none."""
        url = self.source.get("url") or ""
        return (url, Path(urlparse(url).path).name) if isinstance(url, str) else tuple(url)

    def _hub_files(self) -> Iterator[str]:
        """Names that the weights may have in the repository, in timm's order."""
        name = self.source.get("hf_hub_filename") or DEFAULT_FILE
        if name.endswith(".bin"):
            yield SAFE_NAMES.get(name, name.removesuffix(".bin") + ".safetensors")
        yield name

    def _url_file(self) -> Path | None:
        folder = Path(self.cache) if self.cache else Path(torch.hub.get_dir()) / "checkpoints"
        return folder / self._url[1] if self._url[1] else None

    def _download_from_hub(self) -> Path:
        *safer, last = self._hub_files()
        for name in safer:
            try:
                return self._download_file(name)
            except LocalEntryNotFoundError:  # no connection, which says nothing about the repository
                raise
            except EntryNotFoundError:
                continue
        return self._download_file(last)

    def _download_file(self, name: str) -> Path:
        return Path(hf_hub_download(self._repository, name, revision=self._revision, cache_dir=self.cache))

    def _download_from_url(self) -> Path:
        path = self._url_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(self._url[0], str(path), progress=False)  # beside its place, then renamed
        return path
