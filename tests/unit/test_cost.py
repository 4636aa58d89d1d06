"""What methods send, against the figures that the paper's setting must give (ViT-B/16, float32, MiB = 2^20)."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from fedpeft_dist.config.load import load_config
from fedpeft_dist.federation.ahead import Cost, compute_cost
from fedpeft_dist.lanes.wire import MIB

PAPER = Path(__file__).parents[2] / "configs" / "paper"
COHORT, ROUNDS = 8, 50

# Trained parameters, by method and data set.
PARAMETERS = {
    "full": {"cifar100": 85_875_556, "resisc45": 85_833_261, "pcam": 85_800_194},
    "head": {"cifar100": 76_900, "resisc45": 34_605, "pcam": 1_538},
    "bias": {"cifar100": 179_812, "resisc45": 137_517, "pcam": 104_450},
    "adapter": {"cifar100": 225_220, "resisc45": 182_925, "pcam": 149_858},
    "adapter_per_block": {"cifar100": 233_668, "resisc45": 191_373, "pcam": 158_306},
    "prompt": {"cifar100": 169_060, "resisc45": 126_765, "pcam": 93_698},
    "prompt_shallow": {"cifar100": 84_580, "resisc45": 42_285, "pcam": 9_218},
    "lora": {"cifar100": 371_812, "resisc45": 329_517, "pcam": 296_450},
    "norm": {"cifar100": 115_300, "resisc45": 73_005, "pcam": 39_938},
    "ssf": {"cifar100": 282_724, "resisc45": 240_429, "pcam": 207_362},
    "ia3": {"cifar100": 132_196, "resisc45": 89_901, "pcam": 56_834},
    "dora": {"cifar100": 399_460, "resisc45": 357_165, "pcam": 324_098},
    "vera": {"cifar100": 172_132, "resisc45": 129_837, "pcam": 96_770},
    "fact_tt": {"cifar100": 138_340, "resisc45": 96_045, "pcam": 62_978},
    "fact_tk": {"cifar100": 163_428, "resisc45": 121_133, "pcam": 88_066},
}
# As printed: MiB one way on CIFAR-100, of a client and of a cohort of 8.
PRINTED_MIB = {
    "full": ("327.59", "2620.7"),
    "head": ("0.293", "2.35"),
    "bias": ("0.686", "5.49"),
    "adapter": ("0.859", "6.87"),
    "adapter_per_block": ("0.891", "7.13"),
    "prompt": ("0.645", "5.16"),
    "prompt_shallow": ("0.323", "2.58"),
    "lora": ("1.418", "11.35"),
    "norm": ("0.440", "3.52"),
}

WIDTH, DEPTH = 768, 12
"""Of ViT-B/16."""
ADDED = {
    "adaptformer": DEPTH * (2 * WIDTH * 64 + 64 + WIDTH),
    "houlsby": 2 * DEPTH * (2 * WIDTH * 64 + 64 + WIDTH),
    "repadapter": 2 * DEPTH * (WIDTH * 8 + WIDTH * 8 // 2),
    "diffit": WIDTH * (15 * DEPTH + 3),
    "convpass": 2 * DEPTH * (2 * WIDTH * 8 + 9 * 8**2 + 2 * 8 + WIDTH),
    "prefix": 2 * DEPTH * 10 * WIDTH,
}
FORMULAS = {
    "ssf": 2 * WIDTH * (11 * DEPTH + 2),
    "ia3": 6 * WIDTH * DEPTH,
    "dora": DEPTH * (8 * (WIDTH + 3 * WIDTH) + 3 * WIDTH),
    "vera": DEPTH * (9 * WIDTH + 4 * 256),
    "fact_tt": 2 * WIDTH * 16 + 12 * DEPTH * 16**2,
    "fact_tk": 2 * WIDTH * 32 + 12 * DEPTH * 32 + 32**3,
}
"""Trained parameters beside the head, as each method's docstring gives them; ADDED likewise."""


@pytest.mark.parametrize("method", FORMULAS)
@pytest.mark.parametrize("data", ["cifar100", "resisc45", "pcam"])
def test_the_formulas_of_the_docstrings_hold(method: str, data: str) -> None:
    assert PARAMETERS[method][data] == FORMULAS[method] + PARAMETERS["head"][data]


@pytest.mark.parametrize(
    ("override", "parameters"),
    [
        ("method.targets=[q,v]", DEPTH * 2 * 8 * 2 * WIDTH),
        ("method.targets=[q,k,v]", DEPTH * 3 * 8 * 2 * WIDTH),
        ("method.targets=[qkv,proj,fc1,fc2]", DEPTH * 8 * 16 * WIDTH),
        ("method.rslora=true", DEPTH * 8 * 4 * WIDTH),
        ("method.ranks={qkv: 3}", DEPTH * 3 * 4 * WIDTH),
        ("method.blocks=2", 2 * 8 * 4 * WIDTH),
    ],
)
def test_loras_options_cost_what_its_formula_says(override: str, parameters: int) -> None:
    cost = compute_cost(load_config(PAPER / "cifar100" / "lora.yaml", [override]))
    assert cost.trainable_parameters == parameters + PARAMETERS["head"]["cifar100"]


@cache
def cost_of(data: str, name: str) -> Cost:
    return compute_cost(load_config(PAPER / data / f"{name}.yaml"))


@pytest.mark.parametrize(
    ("method", "data", "parameters"),
    [(method, data, count) for method, row in PARAMETERS.items() for data, count in row.items()],
)
def test_every_figure_of_the_paper(method: str, data: str, parameters: int) -> None:
    cost = cost_of(data, method)
    full = PARAMETERS["full"][data]
    assert cost.trainable_parameters == parameters
    assert cost.backbone_parameters == full
    assert cost.uplink_bytes_per_client == 4 * parameters
    assert cost.uplink_bytes_per_round == 4 * parameters * COHORT
    assert cost.uplink_bytes_total == 4 * parameters * COHORT * ROUNDS
    assert cost.share_of_full == parameters / full
    if data == "cifar100" and method in PRINTED_MIB:
        sizes = cost.uplink_bytes_per_client, cost.uplink_bytes_per_round
        for size, printed in zip(sizes, PRINTED_MIB[method]):
            decimals = len(printed.partition(".")[2])
            assert f"{size / MIB:.{decimals}f}" == printed


@pytest.mark.parametrize("method", ADDED)
def test_every_formula(method: str) -> None:
    assert cost_of("pcam", method).trainable_parameters == ADDED[method] + PARAMETERS["head"]["pcam"]


@pytest.mark.parametrize("data", ["cifar100", "resisc45", "pcam"])
def test_from_scratch_costs_what_full_does(data: str) -> None:
    assert cost_of(data, "scratch") == cost_of(data, "full")


def test_bytes_follow_cohort_and_rounds() -> None:
    cost = compute_cost(load_config(PAPER / "cifar100" / "head.yaml", ["federation.cohort=64", "federation.rounds=3"]))
    assert cost.uplink_bytes_per_client == 4 * 76_900
    assert cost.uplink_bytes_per_round == 64 * 4 * 76_900
    assert cost.uplink_bytes_total == 3 * cost.uplink_bytes_per_round


def test_needs_neither_weights_nor_data(tmp_path: Path) -> None:
    """A checkpoint and a data folder that do not exist are not looked for."""
    overrides = [f"backbone.checkpoint={tmp_path}/none.safetensors", f"data.root={tmp_path}/none"]
    cost = compute_cost(load_config(PAPER / "cifar100" / "bias.yaml", overrides))
    assert cost.trainable_parameters == PARAMETERS["bias"]["cifar100"]
