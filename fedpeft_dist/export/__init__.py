"""Hands a finished run's parameters to other programs: a whole model, a peft adapter, or the tensors alone.

An export is a folder with the weights, the files that rebuild a model around them, and a README.md. FORMATS maps each
format's name to its writer:

    timm         the backbone with the trained parameters merged in; plain timm loads it
    peft         an adapter of Hugging Face peft, over the plain timm model
    safetensors  the trained parameters by name, described by the file's metadata; any method
    torch        the whole model as a program of torch.export; any method
    onnx         the whole model for ONNX's runtimes; any method

Which formats a method fits, the method itself says (`methods/method.py`). Everything is float32. A run that computed in
half precision rounds differently, so its accuracy may differ by a sample or two.
"""

import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from safetensors import SafetensorError

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.export.formats import README, SIGNATURE, Format, PeftFormat, SafetensorsFormat, TimmFormat
from fedpeft_dist.export.programs import OnnxFormat, TorchFormat
from fedpeft_dist.export.trained_run import load_run
from fedpeft_dist.methods import make_method
from fedpeft_dist.runtime.files import give_usual_mode
from fedpeft_dist.tracking.run_directory import RunDirectory

FORMATS: dict[str, Format] = {
    "timm": TimmFormat(),
    "peft": PeftFormat(),
    "safetensors": SafetensorsFormat(),
    "torch": TorchFormat(),
    "onnx": OnnxFormat(),
}
WEIGHTS = {"model.safetensors", "adapter_model.safetensors", "trainable.safetensors"}
WEIGHTS |= {"model.pt2", "model.onnx", "model.onnx.data"}
FILES = {README, "adapter_config.json", "base", "config.json"} | WEIGHTS


def export_run(config: RunConfig, directory: RunDirectory, name: str, output: Path | None = None) -> tuple[Path, str]:
    """Writes a run's export into a folder, which appears whole or not at all. An older export there is replaced.

    Args:
        name: the format's name.
        output: the folder; None takes `export/<name>` in the run's directory.

    Returns:
        The folder, and the Python expression that loads it.

    Raises:
        ConfigError: the format is unknown, does not fit the method or lacks a library; the run has not finished, or its
            parameters or backbone cannot be read; the folder cannot be written or holds other things.
        MachineFaultError: a written program computes something else than the model.
    """
    if name not in FORMATS:
        raise ConfigError(f"--format: {name!r} is none of {', '.join(FORMATS)}")
    method = make_method(config.method)
    fitting = [known for known in FORMATS if FORMATS[known].fits(method)]
    if name not in fitting:
        raise ConfigError(
            f"--format {name}: does not fit method {config.method.name!r}, {FORMATS[name].limits}; "
            f"give --format {' or '.join(fitting)}"
        )
    missing = [library for library in FORMATS[name].libraries if find_spec(library) is None]
    if missing:
        raise ConfigError(
            f"--format {name}: needs the libraries {', '.join(missing)}; install them with "
            f"pip install 'fedpeft_dist[{name}]'"
        )
    output = output or directory.path / "export" / name
    _check_output(output)
    run = load_run(config, directory)
    write_folder(output, lambda folder: FORMATS[name].write(run, folder))
    return output, FORMATS[name].expression(run, str(output))


def _check_output(output: Path) -> None:
    """Checks that the place can be written, and holds nothing else than an export."""
    output = output.absolute()
    try:
        names = {path.name for path in output.iterdir()} if output.is_dir() else set()
        readme = (output / README).read_text(encoding="utf-8", errors="replace") if README in names else ""
    except OSError as error:
        raise ConfigError(f"--output {output}: cannot be read ({error})") from None
    if names and not (names <= FILES and SIGNATURE in readme):
        raise ConfigError(f"--output {output}: holds other things than an export, which stay; give a new folder")
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
        for path in filter(Path.is_file, new.rglob("*")):
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
