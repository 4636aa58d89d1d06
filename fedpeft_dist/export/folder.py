"""An export's folder. It appears whole or not at all, and replaces nothing but an older export."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.runtime.files import give_usual_mode

README = "README.md"
SIGNATURE = "Written by `fedpeft export`."
"""A line of every export's README, by which an older export is recognised."""
FILES = {
    README,
    "adapter_config.json",
    "adapter_model.safetensors",
    "base",
    "config.json",
    "model.safetensors",
    "trainable.safetensors",
}


def check_output(output: Path) -> None:
    """
    Raises:
        ConfigError: the place cannot be written, or holds something else than an export.
    """
    output = output.absolute()
    try:
        if output.is_dir() and not _is_export(output):
            raise ConfigError(f"--output {output}: holds other things than an export, which stay; give a new folder")
    except OSError as error:
        raise ConfigError(f"--output {output}: cannot be read ({error})") from None
    existing = next(path for path in output.parents if path.exists())  # the new folder is first made beside its place
    if output.exists() and not output.is_dir():
        existing = output
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        reason = "is not writable" if existing.is_dir() else "is a file"
        raise ConfigError(f"--output {output}: no folder can be written there, '{existing}' {reason}")


def write_folder(output: Path, fill: Callable[[Path], None]) -> None:
    """Fills a temporary folder beside the place, flushes it to disk and moves it there.

    Raises:
        ConfigError: the folder cannot be written; an older export stays.
    """
    output = output.resolve()
    new, old = (output.with_name(f".{output.name[:40]}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    try:
        new.mkdir(parents=True)
        fill(new)
        for path in new.rglob("*"):
            if path.is_file():
                give_usual_mode(path)
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        if output.exists():
            os.rename(output, old)
        try:
            os.rename(new, output)
        except OSError:
            if old.exists():
                os.rename(old, output)
            raise
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"--output {output}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if output.exists():
            shutil.rmtree(old, ignore_errors=True)


def _is_export(folder: Path) -> bool:
    """Whether the folder is empty or holds an export and nothing else."""
    names = {path.name for path in folder.iterdir()}
    if not names:
        return True
    readme = folder / README
    return names <= FILES and readme.is_file() and SIGNATURE in readme.read_text(encoding="utf-8", errors="replace")
