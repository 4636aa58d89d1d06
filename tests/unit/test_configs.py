"""The files under configs/, and the tables of choices against the schema's unions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from fedpeft_dist.algorithms import ALGORITHMS
from fedpeft_dist.algorithms.server_optimizers import SERVER_OPTIMIZERS
from fedpeft_dist.config import schema
from fedpeft_dist.config.load import load_config
from fedpeft_dist.data import DATASETS
from fedpeft_dist.data.partition import SPLITS
from fedpeft_dist.methods import METHODS
from fedpeft_dist.sweeps.expansion import load_sweep

REPOSITORY = Path(__file__).parents[2]
ALL_PATHS = [str(path.relative_to(REPOSITORY)) for path in sorted((REPOSITORY / "configs").rglob("*.yaml"))]
SWEEPS = [path for path in ALL_PATHS if path.startswith("configs/sweeps/")]
PATHS = [path for path in ALL_PATHS if path not in SWEEPS]
PAPER_DATA = ("cifar100", "resisc45", "pcam")

# The clients' learning rates; prompt_shallow and adapter_per_block take those of their like. lora, norm and the methods
# after scratch are ours.
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
    "partial": (1e-3, 1e-3, 1e-3),
    "adaptformer": (5e-3, 5e-3, 5e-3),
    "houlsby": (5e-3, 5e-3, 5e-3),
    "repadapter": (5e-3, 5e-3, 5e-3),
    "diffit": (1e-2, 5e-3, 1e-2),
    "convpass": (5e-3, 5e-3, 5e-3),
    "prefix": (1e-2, 1e-2, 1e-2),
    "ssf": (1e-2, 5e-3, 1e-2),
    "ia3": (1e-2, 5e-3, 1e-2),
    "dora": (5e-3, 5e-3, 5e-3),
    "vera": (1e-2, 5e-3, 1e-2),
    "fact_tt": (5e-3, 5e-3, 5e-3),
    "fact_tk": (5e-3, 5e-3, 5e-3),
}

RATES_UNDER_NOISE = {"full": 5e-4, "head": 1e-3, "bias": 5e-3, "adapter": 1e-3, "prompt": 5e-3}


@pytest.mark.parametrize("path", PATHS)
def test_every_config_loads(path: str) -> None:
    load_config(REPOSITORY / path)


@pytest.mark.parametrize("path", ALL_PATHS)
def test_opens_with_the_command_that_runs_it(path: str) -> None:
    comment = []
    for line in (REPOSITORY / path).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    command = "sweep run" if path in SWEEPS else "train"
    assert f"fedpeft {command} {path}" in " ".join(comment)


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


EXPERIMENT_CELLS = {
    "communication": (5 + 4) * 3,
    "stability": 5 * 2 * 4 * 3,
    "scale": 5 * 3 * 3,
    "pretraining": 5 * 2 * 3,
    "privacy": (5 * 2 + 5) * 3,
    "dropout": 4 * 4 * 3,
    "methods": len(METHODS) * 3 * 3,
}


@pytest.mark.parametrize("path", SWEEPS)
def test_a_sweep_has_the_number_of_cells_in_its_comment(path: str) -> None:
    """Its comment tells the number, which for the paper's data sets is the paper's; every cell's config is valid."""
    cells = load_sweep(REPOSITORY / path)
    text = (REPOSITORY / path).read_text(encoding="utf-8")
    assert f"= {len(cells)} cells." in text
    if "offline" not in path:
        assert len(cells) == EXPERIMENT_CELLS[Path(path).stem]
    assert len({cell.config.output.name for cell in cells}) == len(cells)


def test_every_experiment_has_a_sweep_for_each_data_set() -> None:
    found = {(Path(path).parent.name, Path(path).stem) for path in SWEEPS}
    paper = {(data, name) for data in PAPER_DATA for name in EXPERIMENT_CELLS} - {("resisc45", "scale")}
    further = ("rates", "private_rates", "slower")
    offline = {(data, name) for data in ("digits", "glyphs100") for name in (*EXPERIMENT_CELLS, *further)}
    assert found == paper | offline


@pytest.mark.parametrize("data", PAPER_DATA)
def test_sweeps_take_the_methods_rates_from_the_presets(data: str) -> None:
    for cell in load_sweep(REPOSITORY / "configs" / "sweeps" / data / "communication.yaml"):
        method = cell.name.partition("-")[0]
        assert cell.config.client.optimizer.lr == RATES[method][PAPER_DATA.index(data)]
        assert cell.config.seed in (1, 42, 3407)


def test_the_communication_sweep_varies_the_cohort_of_full_and_head() -> None:
    cells = load_sweep(REPOSITORY / "configs" / "sweeps" / "cifar100" / "communication.yaml")
    found = {(cell.config.method.name, cell.config.federation.cohort) for cell in cells}
    expected = {("full", m) for m in (8, 4, 2, 1)} | {("head", 8), ("head", 64)}
    assert found == expected | {(method, 8) for method in ("bias", "adapter", "prompt")}


def test_the_scale_sweeps_subsample_and_top_up() -> None:
    for data, sizes in (("cifar100", {1000, 5000, 10_000}), ("pcam", {1000, 1500, 2000})):
        cells = load_sweep(REPOSITORY / "configs" / "sweeps" / data / "scale.yaml")
        assert {cell.config.data.max_train for cell in cells} == sizes
        assert all(cell.config.data.partition.top_up for cell in cells)
        assert {cell.config.data.partition.min_samples for cell in cells} == {1}
        assert {cell.config.data.partition.alpha for cell in cells} == {0.5 if data == "pcam" else 0.1}


@pytest.mark.parametrize("data", [*PAPER_DATA, "offline/digits", "offline/glyphs100"])
def test_the_methods_sweeps_give_every_method_the_same_rates_and_seeds(data: str) -> None:
    cells = load_sweep(REPOSITORY / "configs" / "sweeps" / data / "methods.yaml")
    tried = [(type(c.config.method), c.config.client.optimizer.lr, c.config.seed) for c in cells]
    rates = {rate for _, rate, _ in tried}
    assert set(tried) == {(kind, rate, seed) for kind in METHODS for rate in rates for seed in (1, 42, 3407)}
    assert len(rates) == (4 if data.startswith("offline") else 3)
    assert all(c.config.data.validation and c.config.federation.evaluate_clients for c in cells)
    assert {c.config.federation.evaluate_on for c in cells} == {"test"}


@pytest.mark.parametrize("data", PAPER_DATA)
def test_the_privacy_sweeps_are_the_papers(data: str) -> None:
    """Epsilon 5 at delta 1e-3 with clipping at 1, at the rates under noise; without privacy at the usual ones."""
    for cell in load_sweep(REPOSITORY / "configs" / "sweeps" / data / "privacy.yaml"):
        method, privacy = cell.name.partition("-")[0], cell.config.privacy
        assert (cell.config.data.clients, cell.config.federation.cohort) == (64, 8)
        rate = cell.config.client.optimizer.lr
        if privacy.name == "none":
            assert rate == RATES[method][PAPER_DATA.index(data)]
        else:
            assert rate == RATES_UNDER_NOISE[method]
            assert (privacy.epsilon, privacy.dp_delta, privacy.clip_norm) == (5.0, 1e-3, 1.0)


@pytest.mark.parametrize(("data", "epsilons"), [("digits", {2.0, 5.0, 20.0}), ("glyphs100", {5.0, 20.0})])
def test_the_offline_privacy_sweeps_compare_methods_alike(data: str, epsilons: set[float]) -> None:
    """A method has one rate for each mechanism, and every method is tried at each epsilon."""
    cells = load_sweep(REPOSITORY / "configs" / "sweeps" / "offline" / data / "privacy.yaml")
    methods = {"full", "head", "bias", "adapter", "prompt"}
    for name, expected in (("sample", epsilons), ("paper_noise", {5.0}), ("none", {None})):
        found = [cell.config for cell in cells if cell.config.privacy.name == name]
        assert {config.method.name for config in found} == methods
        assert len({(config.method.name, config.client.optimizer.lr) for config in found}) == 5
        tried = {(config.method.name, getattr(config.privacy, "epsilon", None)) for config in found}
        assert tried == {(method, epsilon) for method in methods for epsilon in expected}
    assert {getattr(cell.config.privacy, "dp_delta", 1e-3) for cell in cells} == {1e-3}
    assert {getattr(cell.config.privacy, "clip_norm", 1.0) for cell in cells} == {1.0}


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
        (ALGORITHMS, schema.AlgorithmConfig, set()),
        (DATASETS, schema.DataConfig, set()),
        # A pool is no split of the samples: make_partition builds it by itself.
        (SPLITS, schema.PartitionConfig, {schema.PoolPartition}),
        (SERVER_OPTIMIZERS, schema.ServerOptimizerConfig, set()),
    ],
    ids=["methods", "algorithms", "data sets", "partitions", "server optimizers"],
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
