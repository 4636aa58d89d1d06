"""`fedpeft prefetch`: fetches a data set's files where there is internet. Nothing else here downloads data."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from filelock import FileLock

from fedpeft_dist.config import schema
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.data import SOURCES, cifar, pcam
from fedpeft_dist.data.huggingface import download_huggingface
from fedpeft_dist.data.image_store import open_store, store_folder


def prefetch_data(config: schema.DataConfig) -> Path | None:
    """Downloads a data set where that is possible and needed, and builds its store.

    Returns:
        The store's folder; None for a data set that is made and not read.

    Raises:
        ConfigError: a download that failed; files that have to be put there by hand.
    """
    if type(config) not in SOURCES:
        return None
    if isinstance(config, schema.HuggingFaceConfig):
        if not Path(config.path).is_dir():
            download_huggingface(config)
    elif type(config) in _DOWNLOADS:
        _download(config)
    source = SOURCES[type(config)](config)
    open_store(source, config)
    return store_folder(source, config)


def _cifar_files(config: schema.Cifar10Config | schema.Cifar100Config) -> list[str]:
    layout = cifar.LAYOUTS[type(config)]
    return [f"{layout.folder}/{name}" for name in (*layout.train, layout.test, layout.meta)]


def _pcam_files(config: schema.PcamConfig) -> list[str]:
    root = Path(config.root)
    return [
        pcam.pcam_file(root, split, kind).relative_to(root).as_posix() for split in ("train", "test") for kind in "xy"
    ]


def _fetch_cifar10(folder: Path) -> None:
    from torchvision.datasets import CIFAR10

    CIFAR10(folder, download=True)


def _fetch_cifar100(folder: Path) -> None:
    from torchvision.datasets import CIFAR100

    CIFAR100(folder, download=True)


def _fetch_pcam(folder: Path) -> None:
    from torchvision.datasets import PCAM

    for split in ("train", "test"):
        PCAM(folder, split, download=True)


# Which files are wanted below root, and what fetches them into a folder. torchvision checks their digests.
_DOWNLOADS: dict[type, tuple[Callable[..., Sequence[str]], Callable[[Path], None]]] = {
    schema.Cifar10Config: (_cifar_files, _fetch_cifar10),
    schema.Cifar100Config: (_cifar_files, _fetch_cifar100),
    schema.PcamConfig: (_pcam_files, _fetch_pcam),
}


def _download(config: schema.DataConfig) -> None:
    """Fetches into a folder beside, and moves the wanted files into their places when all of them are there."""
    list_files, fetch = _DOWNLOADS[type(config)]
    root, files = Path(config.root), list_files(config)
    incoming, lock = root / f".{config.name}.incoming", root / f".{config.name}.lock"
    if all((root / file).is_file() for file in files):
        return
    created = not root.exists()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            if all((root / file).is_file() for file in files):  # fetched by another process meanwhile
                return
            shutil.rmtree(incoming, ignore_errors=True)  # of a download that was killed
            try:
                incoming.mkdir()
                fetch(incoming)
                for file in files:
                    (root / file).parent.mkdir(exist_ok=True)
                    (incoming / file).replace(root / file)
            finally:
                shutil.rmtree(incoming, ignore_errors=True)
    except Exception as error:  # the disk, the network and torchvision's checks fail by classes of their own
        if created and root.is_dir() and list(root.iterdir()) == [lock]:
            shutil.rmtree(root)
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(
            f"data.name: {config.name!r} cannot be downloaded to data.root: '{root}' ({reason}); try again where there "
            f"is internet, or put {files[0]} and its like there"
        ) from None
