"""The files under configs/, and the tables of choices against the schema's unions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from fedpeft_dist.config import schema
from fedpeft_dist.config.load import load_config
from fedpeft_dist.data import DATASETS
from fedpeft_dist.data.partition import PARTITIONS
from fedpeft_dist.federation.server_optimizers import SERVER_OPTIMIZERS
from fedpeft_dist.methods import METHODS

REPOSITORY = Path(__file__).parents[2]
PATHS = [str(path.relative_to(REPOSITORY)) for path in sorted((REPOSITORY / "configs").rglob("*.yaml"))]
PAPER_DATA = ("cifar100", "resisc45", "pcam")

# The clients' learning rates; prompt_shallow and adapter_per_block take those of their like, lora and norm are ours.
RATES = {
    "full": (1e-3, 1e-3, 1e-3),
    "head": (5e-3, 5e-3, 5e-3),
    "bias": (1e-2, 5e-3, 1e-2),
    "adapter": (5e-3, 5e-3, 5e-3),
    "adapter_per_block": (5e-3, 5e-3, 5e-3),
    "prompt": (1e-2, 1e-2, 1e-2),
    "prompt_shallow": (1e-2, 1e-2, 1e-2),
    "lora": (5e-3, 5e-3, 5e-3),
    "norm": (1e-2, 5e-3, 1e-2),
    "scratch": (1e-2, 1e-2, 1e-2),
}


@pytest.mark.parametrize("path", PATHS)
def test_loads(path: str) -> None:
    load_config(REPOSITORY / path)


@pytest.mark.parametrize("path", PATHS)
def test_opens_with_the_command_that_runs_it(path: str) -> None:
    comment = []
    for line in (REPOSITORY / path).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    assert f"fedpeft train {path}" in " ".join(comment)


@pytest.mark.parametrize("path", [path for path in PATHS if path.startswith("configs/paper/")])
def test_paper_file_repeats_nothing(path: str) -> None:
    """No key that the parent has with the same value, but the names that a section needs."""
    own = read_yaml(REPOSITORY / path)
    parent = own.pop("extends", None)
    if parent is not None:
        inherited = flatten(read_chain((REPOSITORY / path).parent / parent))
        repeated = [key for key, value in flatten(own).items() if key in inherited and inherited[key] == value]
        assert not repeated


@pytest.mark.parametrize("data", PAPER_DATA)
def test_paper_folder_has_every_method(data: str) -> None:
    assert {path.stem for path in (REPOSITORY / "configs" / "paper" / data).glob("*.yaml")} == {"base", *RATES}


@pytest.mark.parametrize(("method", "rates"), RATES.items())
def test_paper_learning_rates(method: str, rates: tuple[float, ...]) -> None:
    for data, rate in zip(PAPER_DATA, rates):
        assert paper_config(data, method).client.optimizer.lr == rate


@pytest.mark.parametrize("data", PAPER_DATA)
@pytest.mark.parametrize("method", RATES)
def test_paper_setting(data: str, method: str) -> None:
    config = paper_config(data, method)
    optimizer = config.client.optimizer
    assert config.backbone.name == "vit_base_patch16_224.augreg_in21k"
    assert config.backbone.pretrained == (method != "scratch")
    assert (config.data.name, config.data.image_size, config.data.clients) == (data, 224, 64)
    assert (config.federation.rounds, config.federation.cohort) == (50, 8)
    assert (config.client.epochs, config.client.batch_size) == (10, 64)
    assert (optimizer.name, optimizer.momentum, optimizer.nesterov, optimizer.weight_decay) == ("sgd", 0.9, True, 1e-4)
    assert config.server.optimizer == schema.ServerSgdConfig(name="sgd", lr=1.0)
    assert config.data.partition == schema.DirichletPartition(
        name="dirichlet", alpha=0.5 if data == "pcam" else 0.1, min_samples=10
    )
    assert config.data.augment == ("crop_flip" if data == "cifar100" else "flip")
    assert config.data.max_train == (20_000 if data == "pcam" else None)


def test_paper_methods() -> None:
    methods = {name: paper_config("cifar100", name).method for name in RATES}
    assert methods["scratch"] == methods["full"] == schema.FullConfig(name="full")
    assert methods["adapter"] == schema.AdapterConfig(name="adapter", bottleneck=96, shared=True)
    assert methods["adapter_per_block"] == schema.AdapterConfig(name="adapter", bottleneck=8, shared=False)
    assert methods["prompt"] == schema.PromptConfig(name="prompt", depth="deep", tokens=10, dropout=0.1)
    assert methods["prompt_shallow"] == schema.PromptConfig(name="prompt", depth="shallow", tokens=10, dropout=0.1)
    assert (methods["lora"].rank, methods["lora"].targets) == (8, ("qkv",))


@pytest.mark.parametrize(
    ("table", "union", "elsewhere"),
    [
        (METHODS, schema.MethodConfig, set()),
        (DATASETS, schema.DataConfig, set()),
        # A pool is no split of the samples: make_partition builds it by itself.
        (PARTITIONS, schema.PartitionConfig, {schema.PoolPartition}),
        (SERVER_OPTIMIZERS, schema.ServerOptimizerConfig, set()),
    ],
    ids=["methods", "data sets", "partitions", "server optimizers"],
)
def test_tables_hold_every_choice(table: Mapping[type, Any], union: Any, elsewhere: set[type]) -> None:
    members = set(get_args(get_args(union)[0]))
    assert set(table) == members - elsewhere


def paper_config(data: str, method: str) -> schema.RunConfig:
    return load_config(REPOSITORY / "configs" / "paper" / data / f"{method}.yaml")


def read_yaml(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def read_chain(path: Path) -> dict[str, Any]:
    """The keys of a file and of all its parents, merged; a section with another name replaces its parent's."""
    own = read_yaml(path)
    parent = own.pop("extends", None)
    return own if parent is None else merge(read_chain(path.parent / parent), own)


def merge(parent: Mapping[str, Any], child: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(parent)
    for key, value in child.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if nested and "name" not in value else value
    return merged


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
