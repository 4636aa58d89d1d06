"""Every method's exports, loaded in a process that cannot import this package, give what the run itself computes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import export_error
import pytest
import torch

from fedpeft_dist.config.errors import ConfigError, MachineFaultError
from fedpeft_dist.export import FORMATS, export_run, programs
from fedpeft_dist.methods import METHODS
from fedpeft_dist.tracking.run_directory import RunDirectory

MERGING = [name for name, section in export_error.SECTIONS.items() if METHODS[section].merge is not None]


def test_every_methods_exports_compute_the_same_in_a_process_without_this_package() -> None:
    """Methods that merge are all one timm model with other weights, so one of them stands for all as a program."""
    assert MERGING
    files_alone = ["timm", "peft"]
    exports = {n: files_alone if n in MERGING[1:] else export_error.PROGRAMS for n in export_error.SECTIONS}
    errors = export_error.measure(exports, tiny=True)
    assert errors.keys() == export_error.SECTIONS.keys()
    for method, own in errors.items():
        kind = METHODS[export_error.SECTIONS[method]]
        expected = {"load_model"} | {name for name in exports[method] if FORMATS[name].fits(kind)}
        assert own.keys() == expected
        assert max(own.values()) < 2e-5, (method, own)
    assert {"torch", "onnx"} <= errors[MERGING[0]].keys()


def test_a_program_tells_how_images_are_prepared(tmp_path: Path) -> None:
    run = export_error.trained_run("head", tiny=True)
    FORMATS["torch"].write(run, tmp_path)
    files = {programs.PREPROCESSING: ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=files)
    assert json.loads(files[programs.PREPROCESSING]) == run.recipe.metadata()
    assert not any("stack_trace" in node.meta for node in program.graph.nodes)
    assert "create_transform" in (tmp_path / "README.md").read_text()


def test_a_program_that_computes_something_else_is_not_left_behind(tmp_path: Path) -> None:
    class Wrong(programs.TorchFormat):
        def load(self, path: Path):
            compute = super().load(path)
            return lambda images: compute(images) * 1.001

    run = export_error.trained_run("head", tiny=True)
    with pytest.raises(MachineFaultError, match="--format torch: the written program computes something else"):
        Wrong().write(run, tmp_path)


def test_a_missing_library_is_named_with_the_extra_that_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    run = export_error.trained_run("head", tiny=True)
    with pytest.raises(ConfigError) as caught:
        export_run(run.config, RunDirectory(tmp_path), "onnx")
    assert str(caught.value) == (
        "--format onnx: needs the libraries onnxruntime; install them with pip install 'fedpeft_dist[onnx]'"
    )


def test_a_model_that_is_no_program_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = export_error.trained_run("prompt", tiny=True)
    for block in run.backbone.model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: print(float(inputs[0].sum())))  # needs a value
    with pytest.raises(ConfigError) as caught:
        FORMATS["torch"].write(run, tmp_path)
    message = str(caught.value)
    assert message.startswith("--format torch: 'prompt' on VisionTransformer is no program that PyTorch can export (")
    assert message.endswith("give --format safetensors, or fedpeft_dist.load_model")
    assert "\n" not in message
