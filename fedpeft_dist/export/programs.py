"""The formats that hold the whole model as one program, so that neither this package nor timm is needed to run it.

Both come from one trace by torch.export, with an open batch size. Each is read back after writing, and must compute
what the model computes.

Shapes: B batch, K classes, C channels, H x W pixels.
"""

import io
import json
import logging
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from fedpeft_dist.config.errors import ConfigError, MachineFaultError, one_line
from fedpeft_dist.export.formats import HERE, Format, transform_line
from fedpeft_dist.export.plain_model import plain_model
from fedpeft_dist.export.trained_run import TrainedRun

IMAGES, SCORES, PREPROCESSING = "images", "scores", "preprocessing.json"
TOLERANCE = 1e-4
"""The largest difference of a score that rounding explains, relative to the largest score."""
EXTERNAL = 1 << 30
"""Bytes of weights from which an ONNX file keeps them in a file beside it. No ONNX file can have 2 GiB."""


class ProgramFormat(Format):
    """A program in one file, which takes normalised images [B, C, H, W] and returns scores [B, K]."""

    name: str
    file: str
    title: str

    def fill(self, run: TrainedRun, folder: Path) -> tuple[str, list[str]]:
        model = plain_model(run)
        shape = (run.backbone.channels, run.recipe.size, run.recipe.size)
        trial = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad(), _quietly():
            try:
                program = self.convert(_trace(model, trial[:2]))
            except Exception as error:  # what a program cannot hold fails in many ways
                kind = type(model).__name__
                raise ConfigError(
                    f"--format {self.name}: {run.config.method.name!r} on {kind} is no program that PyTorch can "
                    f"export ({one_line(error, 300)}); give --format safetensors, or fedpeft_dist.load_model"
                ) from error
            self.save(program, folder / self.file, json.dumps(run.recipe.metadata()))
            expected = model(trial)
        compute = self.load(folder / self.file)
        for images, scores in ((trial, expected), (trial[:1], expected[:1])):
            self._check(compute(images), scores)
        return self.title, [*self.example(), transform_line(run)]

    def _check(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        difference = float((found - expected).abs().max())
        if not difference <= TOLERANCE * float(expected.abs().max()):
            raise MachineFaultError(
                f"--format {self.name}: the written program computes something else than the model, the scores differ "
                f"by {difference:.2g}; nothing is left behind"
            )

    @abstractmethod
    def convert(self, program: ExportedProgram) -> Any:
        """The program in the format's own terms."""

    @abstractmethod
    def save(self, converted: Any, path: Path, preprocessing: str) -> None:
        """Writes the program, with the steps from a picture to an image as JSON."""

    @abstractmethod
    def load(self, path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
        """The written program."""

    @abstractmethod
    def example(self) -> list[str]:
        """Lines of Python that load the program."""


class TorchFormat(ProgramFormat):
    """A program of torch.export."""

    name, file, title = "torch", "model.pt2", "The whole trained model as a program of torch.export:"

    def convert(self, program: ExportedProgram) -> ExportedProgram:
        return program

    def save(self, converted: ExportedProgram, path: Path, preprocessing: str) -> None:
        content = io.BytesIO()  # PyTorch tells of a full disk in an exception of its own
        torch.export.save(converted, content, extra_files={PREPROCESSING: preprocessing})
        path.write_bytes(content.getbuffer())

    def load(self, path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
        module = torch.export.load(path).module()
        return lambda images: module(images).detach()

    def example(self) -> list[str]:
        return ["import torch", f"model = {_loaded(HERE)}"]

    def expression(self, run: TrainedRun, folder: str) -> str:
        return _loaded(folder)


class OnnxFormat(ProgramFormat):
    """An ONNX file."""

    name, file, title = "onnx", "model.onnx", "The whole trained model for ONNX's runtimes:"
    libraries = ("onnx", "onnxscript", "onnxruntime")

    def convert(self, program: ExportedProgram) -> "torch.onnx.ONNXProgram":
        names: dict[str, Any] = {"input_names": [IMAGES], "output_names": [SCORES]}
        return torch.onnx.export(program, dynamo=True, verbose=False, **names)

    def save(self, converted: "torch.onnx.ONNXProgram", path: Path, preprocessing: str) -> None:
        converted.model.metadata_props[PREPROCESSING] = preprocessing
        size = sum(tensor.numel() * tensor.element_size() for tensor in converted.exported_program.state_dict.values())
        converted.save(path, external_data=size >= EXTERNAL)

    def load(self, path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run(None, {IMAGES: images.numpy()})[0])

    def example(self) -> list[str]:
        return [
            "import onnxruntime",
            f"session = {_session(HERE)}",
            f"scores = session.run(None, {{'{IMAGES}': images.numpy()}})[0]",
        ]

    def expression(self, run: TrainedRun, folder: str) -> str:
        return _session(folder)


def _trace(model: torch.nn.Module, images: torch.Tensor) -> ExportedProgram:
    """The model as a program with an open batch size."""
    program = torch.export.export(model, (images,), dynamic_shapes=({0: Dim("batch")},), strict=False)
    for node in program.graph.nodes:  # the lines of this machine's files
        node.meta.pop("stack_trace", None)
    return program


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the exporters' own messages: an error tells what matters."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _loaded(folder: str) -> str:
    return f"torch.export.load({folder + '/' + TorchFormat.file!r}).module()"


def _session(folder: str) -> str:
    return f"onnxruntime.InferenceSession({folder + '/' + OnnxFormat.file!r})"
