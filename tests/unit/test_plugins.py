"""A new method and a new data set need a class, a line in a dict and a config section, and nothing else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import pytest
import timm
import torch
from safetensors.torch import load_file

from fedpeft_dist.backbones.timm_backbone import Backbone
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.load import result_keys
from fedpeft_dist.config.schema import DataSection, RunConfig
from fedpeft_dist.config.schema.types import MethodSection
from fedpeft_dist.data import DATASETS, count_classes, load_dataset, prefetch_data
from fedpeft_dist.data.datasets import Contents, Dataset, ImageSet, Part
from fedpeft_dist.data.partition import make_partition
from fedpeft_dist.data.recipe import ImageRecipe
from fedpeft_dist.data.source import DataSource, FileSource
from fedpeft_dist.export import export_run
from fedpeft_dist.export.formats import TimmFormat
from fedpeft_dist.export.trained_run import TrainedRun
from fedpeft_dist.federation.ahead import compute_cost
from fedpeft_dist.lanes.ops import lane_affine
from fedpeft_dist.lanes.parameters import LaneParameters
from fedpeft_dist.methods import METHODS, build_lane_model
from fedpeft_dist.methods.lane_model import FoldedLaneModel, LaneModule
from fedpeft_dist.methods.method import Method, Tensors
from tests.data_fixtures import data_config, run_tree

CLASSES, WIDTH = 10, 32


class ScaleConfig(MethodSection):
    name: Literal["scale"]


class LaneScale(LaneModule):
    """The frozen classifier with each lane's own scale on its input."""

    def __init__(self, name: str, linear: torch.nn.Linear):
        super().__init__()
        device = linear.weight.device
        self.declare("scale", f"{name}.scale", torch.ones(linear.in_features, device=device))
        self.zeros, self.linear = torch.zeros(1, linear.in_features, device=device), linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(lane_affine(x, self.scale, self.zeros.expand_as(self.scale)))


class Scale(Method):
    """A made-up method that merges."""

    def build(self, backbone: Backbone) -> FoldedLaneModel:
        backbone.model.set_submodule("head", LaneScale("head", backbone.model.get_submodule("head")))
        return FoldedLaneModel(backbone)

    def merge(self, backbone: Tensors, trained: Tensors) -> dict[str, torch.Tensor]:
        return {**backbone, "head.weight": backbone["head.weight"] * trained["head.scale"]}


class LastingScale(Scale):
    """A made-up method that does not merge."""

    merge = None


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    tree = run_tree(tmp_path, name="digits", image_size=16)
    return RunConfig.model_validate(tree).model_copy(update={"method": ScaleConfig(name="scale")})


def train_a_step(config: RunConfig) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """The parameters of the first of two lanes after one step; its images and their scores."""
    model = build_lane_model(config, CLASSES)
    parameters = LaneParameters(model.layout, num_lanes=2)
    for lane in range(2):
        parameters.load(lane, model.layout.pad(model.initial_vector()))
    model.bind(parameters)
    images = torch.randn(2, 5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    before = model.logits(images).detach()
    gradients = torch.autograd.grad(model.logits(images).square().sum(), list(parameters.views.values()))
    with torch.no_grad():
        for view, gradient in zip(parameters.views.values(), gradients):
            view -= 0.1 * gradient
        after = model.logits(images)
    assert not torch.allclose(before, after)
    return {name: view[0].detach().clone() for name, view in parameters.views.items()}, images[0], after[0]


def test_a_new_method_is_trained_priced_and_exported_as_one_timm_model(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, ScaleConfig, Scale)
    assert compute_cost(config).trainable_parameters == WIDTH
    trained, images, scores = train_a_step(config)
    model = build_lane_model(config, CLASSES)
    backbone = model.backbone
    recipe = ImageRecipe.of(config.data, backbone.interpolation, backbone.mean, backbone.std, cropped=False)
    run = TrainedRun(config, trained, {}, model, dict(backbone.plain.state_dict()), CLASSES, recipe)
    TimmFormat().write(run, tmp_path)
    reloaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(reloaded(images), scores, rtol=1e-5, atol=1e-5)
    assert load_file(tmp_path / "model.safetensors").keys() == reloaded.state_dict().keys()


def test_a_new_method_that_does_not_merge_is_refused_for_timm_in_one_line(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(METHODS, ScaleConfig, LastingScale)
    train_a_step(config)
    for name in ("timm", "peft"):
        with pytest.raises(ConfigError) as caught:
            export_run(config, SimpleNamespace(path=tmp_path), name)
        message = str(caught.value)
        assert message.startswith(f"--format {name}: does not fit method 'scale', ")
        assert message.endswith("give --format safetensors or torch or onnx")
        assert "\n" not in message


@pytest.mark.parametrize("kind", METHODS.values(), ids=[kind.__name__ for kind in METHODS.values()])
def test_a_method_says_itself_whether_it_merges(kind: type[Method]) -> None:
    peft = {"Lora", "Ia3", "Dora", "Vera"}
    merges = {"Full", "Head", "Bias", "Norm", "Partial", "Ssf", "Fact", "Repadapter", "Diffit"} | peft
    assert (kind.merge is not None) == (kind.__name__ in merges)
    assert (kind.to_peft is not None) == (kind.__name__ in peft | {"Norm"})


class DotsConfig(DataSection):
    root_is_identity: ClassVar[bool] = True
    natural_clients: ClassVar[bool] = True
    name: Literal["dots"]


def read_dots(config: DataSection) -> tuple[torch.Tensor, torch.Tensor]:
    """Four grey images of 2 x 2 pixels, from a file of one number."""
    images = torch.full((4, 1, 2, 2), int((Path(config.root) / "dots.txt").read_text()), dtype=torch.uint8)
    return images, torch.tensor([0, 1, 2, 0])


class Dots(DataSource):
    """A made-up data set that is loaded without a store."""

    def num_classes(self) -> int:
        return 3

    def load(self, seed: int) -> Dataset:
        images, labels = read_dots(self.config)
        split = ImageSet(images, labels, groups=torch.tensor([5, 5, 7, 7]))
        return Dataset(split, split, ("a", "b", "c"))


class StoredDots(FileSource):
    """A made-up data set of files, with a download."""

    def num_classes(self) -> int:
        return 3

    def download(self) -> None:
        (Path(self.config.root) / "dots.txt").write_text("9")

    def identity(self) -> Any:
        return (Path(self.config.root) / "dots.txt").read_text()

    def read(self) -> Contents:
        images, labels = (tensor.numpy() for tensor in read_dots(self.config))
        part = Part(images.shape, labels, lambda: iter([images]))
        return Contents(("a", "b", "c"), part, part)


def dots_config(root: Path) -> DotsConfig:
    shared = data_config(name="digits", root=str(root), clients=None, partition={"name": "natural"}).model_dump()
    known = {key: value for key, value in shared.items() if key in DotsConfig.model_fields}
    return DotsConfig.model_validate({**known, "partition": shared["partition"], "name": "dots"})


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # the union does not hold the class
def test_a_new_data_set_is_counted_priced_loaded_and_split(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DATASETS, DotsConfig, Dots)
    (tmp_path / "dots.txt").write_text("7")
    dots = dots_config(tmp_path)
    assert count_classes(dots) == 3
    head = RunConfig.model_validate(run_tree(tmp_path, name="digits")).model_copy(update={"data": dots})
    assert compute_cost(head).trainable_parameters > 3 * WIDTH
    dataset = load_dataset(dots.model_copy(update={"max_train": 3}), 1)
    assert dataset.train.images.unique().tolist() == [7]
    assert len(dataset.train) == 3
    assert make_partition(dots, load_dataset(dots, 1).train, 1).sizes().tolist() == [2, 2]
    assert prefetch_data(dots) is None
    assert "data.root" in result_keys(config.model_copy(update={"data": dots}))
    assert "data.root" not in result_keys(config)


def test_a_new_data_set_of_files_is_fetched_and_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS, DotsConfig, StoredDots)
    dots = dots_config(tmp_path)
    store = prefetch_data(dots)
    assert store is not None
    assert (store / "train_images.npy").is_file()
    assert load_dataset(dots, 1).train.images.unique().tolist() == [9]
