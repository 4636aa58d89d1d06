"""Hands a finished run's parameters to other programs: a whole timm model, a peft adapter, or the tensors alone.

An export is a folder with the weights, the files that rebuild a model around them, and a README.md. FORMATS maps each
format's name to its writer:

    timm         the backbone with the trained parameters merged in; plain timm loads it
    peft         an adapter of Hugging Face peft, over the plain timm model
    safetensors  the trained parameters by name, described by the file's metadata; any method

Which formats a method fits, the method itself says (`methods/method.py`). Everything is float32. A run that computed in
half precision rounds differently, so its accuracy may differ by a sample or two.
"""

from pathlib import Path

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.export.folder import check_output, write_folder
from fedpeft_dist.export.formats import Format, PeftFormat, SafetensorsFormat, TimmFormat
from fedpeft_dist.export.trained_run import load_run
from fedpeft_dist.methods import make_method
from fedpeft_dist.tracking.run_directory import RunDirectory

FORMATS: dict[str, Format] = {"timm": TimmFormat(), "peft": PeftFormat(), "safetensors": SafetensorsFormat()}


def export_run(config: RunConfig, directory: RunDirectory, name: str, output: Path | None = None) -> tuple[Path, str]:
    """Writes a run's export into a folder, which appears whole or not at all. An older export there is replaced.

    Args:
        name: the format's name.
        output: the folder; None takes `export/<name>` in the run's directory.

    Returns:
        The folder, and the Python expression that loads it.

    Raises:
        ConfigError: the format is unknown or does not fit the method; the run has not finished, or its parameters or
            backbone cannot be read; the folder cannot be written or holds other things.
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
    output = output or directory.path / "export" / name
    check_output(output)
    run = load_run(config, directory)
    write_folder(output, lambda folder: FORMATS[name].write(run, folder))
    return output, FORMATS[name].expression(run, str(output))
