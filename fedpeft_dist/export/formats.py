"""The formats of an export: which methods fit each one, which files it writes, and the Python that loads them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file

from fedpeft_dist.backbones.timm_backbone import classifier_names
from fedpeft_dist.export.folder import README, SIGNATURE
from fedpeft_dist.export.trained_run import TrainedRun
from fedpeft_dist.methods.method import Method

HERE = "PATH/TO/THIS/FOLDER"


class Format(Protocol):
    limits: str
    """The reason why a method may not fit, after "does not fit method 'prompt', "."""

    def fits(self, method: Method) -> bool: ...

    def write(self, run: TrainedRun, folder: Path) -> None:
        """Fills an empty folder."""

    def expression(self, run: TrainedRun, folder: str) -> str:
        """Python that loads the folder's contents."""


class TimmFormat:
    """The whole trained model, for timm's `local-dir:` source."""

    limits = "whose modules timm does not have"

    def fits(self, method: Method) -> bool:
        return method.merge is not None

    def write(self, run: TrainedRun, folder: Path) -> None:
        write_model(run, run.method.merge(run.frozen, run.trained), folder)
        lines = [
            "import timm",
            f"model = {self.expression(run, HERE)}",
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
        ]
        _write_readme(run, folder, "The whole trained model, for timm:", lines)

    def expression(self, run: TrainedRun, folder: str) -> str:
        return f"{_timm_model(folder)}.eval()"


class PeftFormat:
    """The method's tensors and the classifier. If timm cannot make the backbone by name, it lies in `base`."""

    limits = "which Hugging Face peft does not know"

    def fits(self, method: Method) -> bool:
        return method.to_peft is not None

    def write(self, run: TrainedRun, folder: Path) -> None:
        keys, tensors = run.method.to_peft(run.backbone.model, run.trained)
        adapter = {
            **keys,
            "task_type": None,
            "base_model_name_or_path": None,  # peft would ask the hub for a name; README.md tells the base
            "inference_mode": True,
            "modules_to_save": [name for name in classifier_names(run.backbone.model) if f"{name}.weight" in tensors],
        }
        tensors = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
        _write_tensors(folder / "adapter_model.safetensors", tensors, run.recipe.metadata())
        _write_json(folder / "adapter_config.json", adapter)
        if not run.timm_has_weights:
            (folder / "base").mkdir()
            write_model(run, run.frozen, folder / "base")
        lines = [
            "import timm",
            "from peft import PeftModel",
            f"model = {self.expression(run, HERE)}",
            _transform_line(run),
        ]
        title = f"An adapter ({keys['peft_type']}) with the trained classifier, for Hugging Face peft:"
        _write_readme(run, folder, title, lines)

    def expression(self, run: TrainedRun, folder: str) -> str:
        base = _timm_model(f"{folder}/base")
        if run.timm_has_weights:
            arguments = {"num_classes": run.num_classes, **run.architecture[1]}
            given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
            base = f"timm.create_model({run.config.backbone.name!r}, pretrained=True, {given})"
        return f"PeftModel.from_pretrained({base}, {folder!r}).eval()"


class SafetensorsFormat:
    """The trained parameters by name. The file's metadata describes them in strings, some of which hold JSON."""

    limits = ""

    def fits(self, method: Method) -> bool:
        return True

    def write(self, run: TrainedRun, folder: Path) -> None:
        config = run.config
        metadata = {
            **run.metadata,
            "backbone": config.backbone.model_dump_json(),
            "method": config.method.model_dump_json(),
            "data": config.data.name,
            "classes": json.dumps(run.num_classes),
            **run.recipe.metadata(),
        }
        _write_tensors(folder / "trainable.safetensors", run.trained, metadata)
        lines = [
            "import timm",
            "from safetensors import safe_open",
            f'with safe_open("{HERE}/trainable.safetensors", framework="pt") as file:',
            "    metadata = file.metadata()  # backbone, method, classes, image_size, crop_mode, mean, std, ...",
            "    tensors = {name: file.get_tensor(name) for name in file.keys()}",
            _transform_line(run),
        ]
        _write_readme(run, folder, "The trained parameters by name:", lines)

    def expression(self, run: TrainedRun, folder: str) -> str:
        return f"safetensors.torch.load_file({folder + '/trainable.safetensors'!r})"


def _timm_model(folder: str) -> str:
    return f"timm.create_model({'local-dir:' + folder!r}, pretrained=True)"


def write_model(run: TrainedRun, state: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Writes a timm model with these tensors: model.safetensors, and the config.json from which timm rebuilds it."""
    name, arguments = run.architecture
    own = run.backbone.model.pretrained_cfg
    source = {
        **run.recipe.timm_arguments(),
        "fixed_input_size": bool(own.get("fixed_input_size")),
        "num_classes": run.num_classes,
        "pool_size": None,
        "first_conv": own.get("first_conv"),
        "classifier": own.get("classifier"),
        "license": own.get("license"),
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


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    # Copies, because safetensors refuses tensors that share memory, such as tied ones.
    copies = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    save_file(copies, path, metadata={"format": "pt", **(metadata or {})})


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _transform_line(run: TrainedRun) -> str:
    """Python that prepares a picture as the run did."""
    arguments = ", ".join(f"{name}={value!r}" for name, value in run.recipe.timm_arguments().items())
    return f"transform = timm.data.create_transform({arguments})"


def _write_readme(run: TrainedRun, folder: Path, title: str, lines: Sequence[str]) -> None:
    config = run.config
    text = [
        f"# {config.method.name} on {config.backbone.name}: {run.num_classes} classes of {config.data.name}",
        "",
        title,
        "",
        *(f"    {line}" for line in lines),
        "",
        run.recipe.describe(),
        "",
        f"{SIGNATURE} The trained parameters' sha256: {run.metadata.get('weights_sha256', 'unknown')}.",
    ]
    (folder / README).write_text("\n".join(text) + "\n", encoding="utf-8")
