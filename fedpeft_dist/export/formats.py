"""The formats of an export: which methods fit each one, which files it writes, and the Python that loads them."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file

from fedpeft_dist.backbones.timm_backbone import classifier_names
from fedpeft_dist.export.trained_run import TrainedRun
from fedpeft_dist.methods.method import Method

HERE = "PATH/TO/THIS/FOLDER"
README = "README.md"
SIGNATURE = "Written by `fedpeft export`."
"""A line of every export's README, by which an older export is recognised."""


QUANTIZED = (
    "The run trained on frozen weights that were rounded to 8 bits. This export has the backbone's own weights, which "
    "were not rounded, so its accuracy may differ a little.\n\n"
)


class Format(ABC):
    needs: Literal["merge", "to_peft"] | None = None
    """The attribute of a method that is None if the format does not fit the method; None if the format fits all."""
    limits = ""
    """The reason why a method may not fit, after "does not fit method 'prompt', "."""
    libraries: tuple[str, ...] = ()
    """The libraries that the format needs beside this package's own. The extra of the format's name has them."""

    def fits(self, method: Method) -> bool:
        return self.needs is None or getattr(method, self.needs) is not None

    def write(self, run: TrainedRun, folder: Path) -> None:
        """Fills an empty folder with the format's files and a README.md."""
        title, lines = self.fill(run, folder)
        example = "".join(f"    {line}\n" for line in ("import timm", *lines))
        is_quantized = run.config.runtime.sharding.quantize != "none"
        (folder / README).write_text(
            f"# {run.config.method.name} on {run.config.backbone.name}: {run.num_classes} classes of "
            f"{run.config.data.name}\n\n{title}\n\n{example}\n{run.recipe.describe()}\n\n"
            f"{QUANTIZED if is_quantized else ''}"
            f"{SIGNATURE} The trained parameters' sha256: {run.metadata.get('weights_sha256', 'unknown')}.\n",
            encoding="utf-8",
        )

    @abstractmethod
    def fill(self, run: TrainedRun, folder: Path) -> tuple[str, list[str]]:
        """Writes the format's files, and returns the README's title and lines of Python after `import timm`."""

    @abstractmethod
    def expression(self, run: TrainedRun, folder: str) -> str:
        """Python that loads the folder's contents."""


class TimmFormat(Format):
    """The whole trained model, for timm's `local-dir:` source."""

    needs, limits = "merge", "whose modules timm does not have"

    def fill(self, run: TrainedRun, folder: Path) -> tuple[str, list[str]]:
        write_model(run, run.method.merge(run.frozen, run.trained), folder)
        return "The whole trained model, for timm:", [
            f"model = {self.expression(run, HERE)}",
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
        ]

    def expression(self, run: TrainedRun, folder: str) -> str:
        return f"{_timm_model(folder)}.eval()"


class PeftFormat(Format):
    """The method's tensors and the classifier. If timm cannot make the backbone by name, it lies in `base`."""

    needs, limits = "to_peft", "which Hugging Face peft does not know"

    def fill(self, run: TrainedRun, folder: Path) -> tuple[str, list[str]]:
        keys, tensors = run.method.to_peft(run.backbone.model, run.trained)
        adapter = {
            **keys,
            "task_type": None,
            "base_model_name_or_path": None,  # peft would ask the hub for a name; README.md tells the base
            "inference_mode": True,
            "modules_to_save": [name for name in classifier_names(run.backbone.model) if f"{name}.weight" in tensors],
        }
        own = {name: name if name.startswith("base_model.") else f"base_model.model.{name}" for name in tensors}
        tensors = {own[name]: tensor for name, tensor in tensors.items()}
        _write_tensors(folder / "adapter_model.safetensors", tensors, run.recipe.metadata())
        _write_json(folder / "adapter_config.json", adapter)
        if not run.timm_has_weights:
            (folder / "base").mkdir()
            write_model(run, run.frozen, folder / "base")
        return f"An adapter ({keys['peft_type']}) with the trained classifier, for Hugging Face peft:", [
            "from peft import PeftModel",
            f"model = {self.expression(run, HERE)}",
            transform_line(run),
        ]

    def expression(self, run: TrainedRun, folder: str) -> str:
        base = _timm_model(f"{folder}/base")
        if run.timm_has_weights:
            arguments = {"num_classes": run.num_classes, **run.architecture[1]}
            base = f"timm.create_model({run.config.backbone.name!r}, pretrained=True, {_arguments(arguments)})"
        return f"PeftModel.from_pretrained({base}, {folder!r}).eval()"


class SafetensorsFormat(Format):
    """The trained parameters by name. The file's metadata describes them in strings, some of which hold JSON."""

    def fill(self, run: TrainedRun, folder: Path) -> tuple[str, list[str]]:
        metadata = {
            **run.metadata,
            "backbone": run.config.backbone.model_dump_json(),
            "method": run.config.method.model_dump_json(),
            "data": run.config.data.name,
            "classes": json.dumps(run.num_classes),
            **run.recipe.metadata(),
        }
        _write_tensors(folder / "trainable.safetensors", run.trained, metadata)
        return "The trained parameters by name:", [
            "from safetensors import safe_open",
            f'with safe_open("{HERE}/trainable.safetensors", framework="pt") as file:',
            "    metadata = file.metadata()  # backbone, method, classes, image_size, crop_mode, mean, std, ...",
            "    tensors = {name: file.get_tensor(name) for name in file.keys()}",
            transform_line(run),
        ]

    def expression(self, run: TrainedRun, folder: str) -> str:
        return f"safetensors.torch.load_file({folder + '/trainable.safetensors'!r})"


def write_model(run: TrainedRun, state: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Writes a timm model with these tensors: model.safetensors, and the config.json from which timm rebuilds it."""
    name, arguments = run.architecture
    own = run.backbone.model.pretrained_cfg
    source = {
        **run.recipe.timm_arguments(),
        "fixed_input_size": bool(own.get("fixed_input_size")),
        "num_classes": run.num_classes,
        "pool_size": None,
        **{key: own.get(key) for key in ("first_conv", "classifier", "license")},
    }
    config = {
        "architecture": name,
        "num_classes": run.num_classes,
        "num_features": run.backbone.model.num_features,
        "model_args": arguments,
        "pretrained_cfg": source,
    }
    _write_tensors(folder / "model.safetensors", state)
    _write_json(folder / "config.json", config)


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] = {}) -> None:
    # Copies, because safetensors refuses tensors that share memory, such as tied ones.
    copies = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    save_file(copies, path, metadata={"format": "pt", **metadata})


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _timm_model(folder: str) -> str:
    return f"timm.create_model({'local-dir:' + folder!r}, pretrained=True)"


def transform_line(run: TrainedRun) -> str:
    """Python that prepares a picture as the run did."""
    return f"transform = timm.data.create_transform({_arguments(run.recipe.timm_arguments())})"


def _arguments(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())
