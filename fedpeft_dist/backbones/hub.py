"""Finds timm's pre-trained weights on this machine, and downloads them.

Training only looks at files on this machine. Only `fedpeft prefetch` downloads.
"""

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
# The safetensors files that timm prefers to pickles of these names.
SAFE_NAMES = {DEFAULT_FILE: "model.safetensors", "open_clip_pytorch_model.bin": "open_clip_model.safetensors"}


@dataclass(frozen=True)
class PretrainedWeights:
    """The place of a model's weights: a local file, a repository of the Hugging Face hub, or an address."""

    model: str
    """The model's name as the user gave it."""
    source: Mapping[str, Any]
    """timm's pretrained_cfg."""
    cache: str | None = None
    """Folder for downloads; None for the hub's or torch's own."""

    def find(self) -> Path | None:
        """The file on this machine, or None. Never uses the network."""
        repository, revision = self._repository
        if self.source.get("file"):
            paths = [self.source["file"]]
        elif repository:
            options = {"cache_dir": self.cache, "revision": revision}
            paths = [try_to_load_from_cache(repository, name, **options) for name in self._hub_files()]
        else:
            paths = [self._url_file()]
        return next((Path(path) for path in paths if isinstance(path, (str, Path)) and Path(path).is_file()), None)

    def require(self) -> Path:
        """The file on this machine.

        Raises:
            ConfigError: timm has no such weights, or the file is not on this machine.
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
        """The file on this machine, after a download if necessary.

        Raises:
            ConfigError: timm has no such weights, or the download fails.
        """
        self.check_exist()
        found = self.find()
        if found is not None:
            return found
        try:
            if self.source.get("file"):
                raise FileNotFoundError("no such file")
            return self._download_from_hub() if self._repository[0] else self._download_from_url()
        except Exception as error:  # each layer, from disk to proxy, fails with classes of its own
            raise ConfigError(
                f"backbone.name: the weights of {self.model!r} cannot be downloaded from {self.origin} "
                f"({one_line(error)}); try again where there is internet, or give backbone.checkpoint a local file"
            ) from error

    def check_exist(self) -> None:
        """Checks that timm has weights for the model.

        Raises:
            ConfigError: timm has none.
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
        """The place, for messages; empty if timm has no weights."""
        if self.source.get("file"):
            return str(self.source["file"])
        return f"huggingface.co/{self.source['hf_hub_id']}" if self._repository[0] else self._url[0]

    @property
    def _repository(self) -> tuple[str, str | None]:
        """Name and revision of the hub's repository; an empty name if there is none."""
        name, _, revision = (self.source.get("hf_hub_id") or "").partition("@")
        return name, revision or None

    @property
    def _url(self) -> tuple[str, str]:
        """Address and file name; both empty if there is no address."""
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
            except LocalEntryNotFoundError:  # without a connection nothing is known about the repository
                raise
            except EntryNotFoundError:
                continue
        return self._download_file(last)

    def _download_file(self, name: str) -> Path:
        repository, revision = self._repository
        return Path(hf_hub_download(repository, name, revision=revision, cache_dir=self.cache))

    def _download_from_url(self) -> Path:
        path = self._url_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(self._url[0], str(path), progress=False)  # writes beside the path, then renames
        return path
