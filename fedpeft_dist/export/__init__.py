"""Hands a finished run's parameters to other programs: a whole timm model, a peft adapter, or the tensors alone.

An export is a folder with weights, what rebuilds the model around them, and a README.md that says how. FORMATS maps the
formats' names to what writes them:

    timm         the backbone with the trained parameters in their places; plain timm loads it
    peft         a LoRA run's matrices and head as an adapter of Hugging Face peft, over the plain timm model
    safetensors  the trained parameters by name, with what they are in the file's metadata; any method

Everything is float32. A run that computed in less rounds otherwise, so that its accuracy may differ by a sample or two.
"""

from __future__ import annotations

from pathlib import Path

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.export.folder import check_output, write_folder
from fedpeft_dist.export.formats import Format, PeftFormat, SafetensorsFormat, TimmFormat
from fedpeft_dist.export.trained_run import load_run
from fedpeft_dist.tracking.run_directory import RunDirectory

FORMATS: dict[str, Format] = {"timm": TimmFormat(), "peft": PeftFormat(), "safetensors": SafetensorsFormat()}


def export_run(config: RunConfig, directory: RunDirectory, name: str, output: Path | None = None) -> tuple[Path, str]:
    """Writes a run's export into a folder, which appears whole or not at all; an older export there is replaced.

    Args:
        name: of the format.
        output: the folder; None takes `export/<name>` in the run's directory.

    Returns:
        The folder, and the Python expression that loads it.

    Raises:
        ConfigError: an unknown format, or one that the method does not go into; a run that has not finished, or whose
            parameters or backbone cannot be read; a folder that cannot be written, or that holds other things.
    """
    if name not in FORMATS:
        raise ConfigError(f"--format: {name!r} is none of {', '.join(FORMATS)}")
    method = config.method
    fitting = [known for known in FORMATS if FORMATS[known].fits(method)]
    if name not in fitting:
        raise ConfigError(
            f"--format {name}: does not fit method {method.name!r}, {FORMATS[name].limits}; "
            f"give --format {' or '.join(fitting)}"
        )
    output = output or directory.path / "export" / name
    check_output(output)
    run = load_run(config, directory)
    write_folder(output, lambda folder: FORMATS[name].write(run, folder))
    return output, FORMATS[name].expression(run, str(output))
