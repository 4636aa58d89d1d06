"""Whether a run may go on: under a config of the same result, with the same backbone, data and traces."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.load import parse_config
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.tracking.same_run import check_same, check_same_run


def config_of(**tree: object) -> RunConfig:
    return parse_config(tree, "test")


@pytest.mark.parametrize(
    ("what", "complaint"),
    [
        ("backbone", "trained on a backbone of other weights"),
        ("data", "begun on other data"),
        ("traces", "begun with other traces"),
    ],
)
def test_a_run_goes_on_with_its_own_backbone_data_and_traces(tmp_path: Path, what: str, complaint: str) -> None:
    check_same("a" * 64, "a" * 64, tmp_path, what)
    with pytest.raises(ConfigError, match=rf"{tmp_path} was {complaint} \(sha256 a{{12}} there, b{{12}} here\)"):
        check_same("a" * 64, "b" * 64, tmp_path, what)


def test_the_same_run_may_go_on(tmp_path: Path) -> None:
    check_same_run(config_of(seed=1), config_of(seed=1), tmp_path)


def test_a_run_may_get_longer_but_not_shorter(tmp_path: Path) -> None:
    short, long = config_of(federation={"rounds": 10}), config_of(federation={"rounds": 20})
    check_same_run(short, long, tmp_path)
    with pytest.raises(ConfigError, match=r"federation\.rounds \(20 there, 10 here\)"):
        check_same_run(long, short, tmp_path)


@pytest.mark.parametrize(
    "neutral",
    [
        {"output": {"root": "elsewhere", "name": "x", "checkpoint_every": 5}},
        {"runtime": {"compile": True}},
        {"federation": {"evaluate_every": 7}},
    ],
    ids=str,
)
def test_keys_that_change_no_result_may_differ(tmp_path: Path, neutral: dict) -> None:
    check_same_run(config_of(), config_of(**neutral), tmp_path)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"seed": 2}, [r"seed \(1 there, 2 here\)"]),
        ({"runtime": {"lanes": 3}}, [r"runtime\.lanes \(auto there, 3 here\)"]),
        ({"runtime": {"threads": 2}}, [r"runtime\.threads"]),
        ({"runtime": {"precision": "bf16"}}, [r"runtime\.precision"]),
        ({"runtime": {"evaluate_batch": 8}}, [r"runtime\.evaluate_batch"]),
        ({"method": {"name": "head"}}, [r"method\.name \(bias there, head here\)"]),
        ({"method": {"name": "lora"}}, [r"method\.name", r"method\.rank \(None there, 8 here\)"]),
        ({"backbone": {"model_args": {"depth": 2}}}, [r"backbone\.model_args\.depth \(None there, 2 here\)"]),
        ({"client": {"optimizer": {"lr": 0.5}}, "seed": 9}, [r"client\.optimizer\.lr", r"seed"]),
        ({"federation": {"rounds": 60}, "seed": 9}, [r"seed"]),
    ],
    ids=str,
)
def test_another_run_is_refused_with_the_keys_that_differ(tmp_path: Path, change: dict, names: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        check_same_run(config_of(), config_of(**change), tmp_path)
    assert str(tmp_path) in str(error.value)
    for name in names:
        error.match(name)
    if "federation" in change:
        assert "rounds" not in str(error.value)
