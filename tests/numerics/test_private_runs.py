"""Whole private runs in one process: what they say and leave, how they end, and what a resume may change."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpeft_dist.checkpoint import Noise, load_newest_checkpoint
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.load import load_config, parse_config, with_values
from fedpeft_dist.config.schema import CosineSchedule, RunConfig
from fedpeft_dist.data.datasets import Dataset, ImageSet
from fedpeft_dist.federation import run as rounds
from fedpeft_dist.federation.run import run
from fedpeft_dist.federation.setup import Setup
from fedpeft_dist.federation.simulation import build_simulation
from fedpeft_dist.lanes.random import derive_seed, fold_in
from fedpeft_dist.privacy import noise_seed
from fedpeft_dist.privacy.mechanisms import keyed_normal
from fedpeft_dist.privacy.noise_seed import derive_noise_seed
from fedpeft_dist.runtime.interrupts import StopRequest
from fedpeft_dist.tracking.run_directory import COMPLETE, INTERRUPTED, RunDirectory, read_metrics
from fedpeft_dist.training.trainer import _NOISE, RoundStart
from tests.tiny import tiny_vit

from .cases import (
    METHODS,
    ROUND,
    SEED,
    VIT,
    client_config,
    make_images,
    make_lane_model,
    make_model,
    make_runtime,
    make_tasks,
    make_trainer,
    start_vector,
    train_lanes,
)

SAMPLE = {"name": "sample", "epsilon": 6.0, "dp_delta": 0.01}
USER = {"name": "user", "noise_multiplier": 1.5, "dp_delta": 0.01, "clip_norm": 0.5}


def make_config(folder: Path, privacy: dict[str, Any], name: str = "run", **federation: Any) -> RunConfig:
    participation = {"name": "poisson" if privacy["name"] == "user" else "uniform"}
    tree = {
        "backbone": tiny_vit(),
        "method": {"name": "head"},
        "data": {
            "name": "digits",
            "image_size": 16,
            "max_train": 120,
            "clients": 6,
            "partition": {"name": "dirichlet", "alpha": 0.5, "min_samples": 4},
        },
        "federation": {"rounds": 3, "cohort": 3, "participation": participation, **federation},
        "client": {"epochs": 1, "batch_size": 8},
        "privacy": privacy,
        "runtime": {"device": "cpu", "precision": "fp32"},
        "output": {"root": str(folder), "name": name},
    }
    return parse_config(tree, "test")


def directory_of(config: RunConfig) -> RunDirectory:
    return RunDirectory(Path(config.output.root) / config.output.name)


def summary_of(config: RunConfig) -> dict[str, Any]:
    return json.loads(directory_of(config).summary_file.read_text())


def stop_after(round_number: int, monkeypatch: pytest.MonkeyPatch) -> StopRequest:
    stop, run_round = StopRequest(), rounds.run_round

    def counting(state, *arguments):
        stop.received = stop.received or state.round + 1 == round_number
        return run_round(state, *arguments)

    monkeypatch.setattr(rounds, "run_round", counting)
    return stop


@pytest.mark.parametrize("privacy", [SAMPLE, USER, {"name": "paper_noise"}, {"name": "none"}])
def test_log_and_summary_say_what_is_guaranteed(privacy, tmp_path, capsys):
    config = make_config(tmp_path, privacy)
    assert run(config, runtime=make_runtime()) == COMPLETE
    said, summary = capsys.readouterr().out, summary_of(config)["privacy"]
    if privacy["name"] == "none":
        assert "privacy" not in said
        assert summary is None
        return
    assert "privacy: " in said
    assert summary["name"] == privacy["name"]
    assert summary["outside"][:3] == ["train_loss", "rejected", "accuracy"]
    assert ("cohort" in summary["outside"]) == (privacy["name"] == "user")
    if privacy["name"] == "paper_noise":
        assert "no guarantee" in said
        assert (summary["epsilon"], summary["dp_delta"], summary["guarantee"]) == (None, None, "none")
        assert summary["noise_std"] == pytest.approx(3.378, abs=5e-4)
    else:
        assert "privacy: train_loss, rejected, accuracy, " in said
        assert "keep it secret" in said
        assert summary["epsilon"] <= privacy.get("epsilon", math.inf)
        assert summary["dp_delta"] == 0.01
        spent = [row["epsilon"] for row in read_metrics(directory_of(config).metrics_file)]
        assert sorted(spent) == spent
        assert spent[-1] == summary["epsilon"]


@pytest.mark.parametrize("privacy", [SAMPLE, {**SAMPLE, "slots": 5}, {**USER, "adaptive": {"count_noise": 2.0}}])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(privacy, tmp_path, monkeypatch):
    whole, stopped = (make_config(tmp_path, privacy, name) for name in ("whole", "stopped"))
    run(whole, runtime=make_runtime())
    with monkeypatch.context() as patch:
        assert run(stopped, stop_after(2, patch), runtime=make_runtime()) == INTERRUPTED
    assert run(stopped, runtime=make_runtime()) == COMPLETE
    ours, theirs = summary_of(stopped), summary_of(whole)
    assert ours["weights_sha256"] == theirs["weights_sha256"]
    assert ours["privacy"] == theirs["privacy"]
    if privacy["name"] == "sample":
        stored = load_config(directory_of(stopped).config_file)
        assert stored.privacy.slots == privacy.get("slots", 3 * 8)


def noise_of(config: RunConfig) -> torch.Tensor:
    checkpoint, _ = load_newest_checkpoint(directory_of(config).checkpoints)
    return checkpoint.noise.multipliers


@pytest.mark.parametrize("privacy", [SAMPLE, {**USER, "noise_multiplier": None, "epsilon": 6.0}])
def test_more_rounds_keep_the_noise_and_need_a_larger_epsilon(privacy, tmp_path):
    config = make_config(tmp_path, privacy)
    run(config, runtime=make_runtime())
    before, spent = noise_of(config), summary_of(config)["privacy"]["epsilon"]
    longer = with_values(config, "federation", rounds=8)
    files = {path: path.read_bytes() for path in Path(tmp_path).rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"privacy\.epsilon: 6 is less than the .* that federation\.rounds: 8"):
        run(longer, runtime=make_runtime())
    changed = [path for path, content in files.items() if path.read_bytes() != content]
    assert all(path.name in ("state.json", "owner.json") for path in changed), changed
    raised = with_values(longer, "privacy", epsilon=60.0)
    assert run(raised, runtime=make_runtime()) == COMPLETE
    after = noise_of(raised)
    assert torch.equal(after[before > 0], before[before > 0])
    assert spent < summary_of(raised)["privacy"]["epsilon"] <= 60.0


def test_another_epsilon_alone_is_another_run(tmp_path):
    config = make_config(tmp_path, SAMPLE)
    run(config, runtime=make_runtime())
    with pytest.raises(ConfigError, match=r"holds a run of another config: privacy\.epsilon \(6\.0 there, 9\.0 here\)"):
        run(with_values(config, "privacy", epsilon=9.0), runtime=make_runtime())


@pytest.mark.parametrize("name", ["sample", "user"])
def test_a_run_stops_when_its_budget_is_spent(name, tmp_path, capsys):
    privacy = {**USER, "name": name}
    config = make_config(tmp_path, privacy, rounds=6)
    run(make_config(tmp_path, privacy, "whole", rounds=6), runtime=make_runtime())
    spent = summary_of(make_config(tmp_path, privacy, "whole"))["privacy"]["epsilon"]
    budget = 0.8 * spent
    config = with_values(config, "privacy", stop_at_epsilon=budget)
    assert run(config, runtime=make_runtime()) == COMPLETE
    summary = summary_of(config)
    assert 1 <= summary["rounds"] < 6
    assert 0 < summary["privacy"]["epsilon"] <= budget
    assert len(read_metrics(directory_of(config).metrics_file)) == summary["rounds"]
    state = directory_of(config).read_state()
    assert (state["state"], state["next_round"], state["stopped_at_epsilon"]) == (COMPLETE, summary["rounds"], budget)

    files = {path: path.read_bytes() for path in directory_of(config).path.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert run(config, runtime=make_runtime()) == COMPLETE
    assert "already complete" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in files} == files

    smaller = with_values(config, "privacy", stop_at_epsilon=0.9 * summary["privacy"]["epsilon"])
    with pytest.raises(ConfigError, match=r"privacy\.stop_at_epsilon: .* is less than the .* rounds have spent"):
        run(smaller, runtime=make_runtime())
    assert summary_of(config) == summary

    larger = with_values(config, "privacy", stop_at_epsilon=2 * spent)
    assert run(larger, runtime=make_runtime()) == COMPLETE
    assert summary_of(larger)["rounds"] == 6
    whole = summary_of(make_config(tmp_path, privacy, "whole"))
    assert summary_of(larger)["weights_sha256"] == whole["weights_sha256"]


def test_the_papers_noise_is_added_to_every_gradient():
    """One step of plain SGD, with and without: the difference is the rate times the noise."""
    model, images = make_model(*VIT), make_images()
    client = client_config({"name": "sgd", "lr": 0.5, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}, 4)
    deltas, (task,) = [], make_tasks((4,), (1,))
    for deviation in (0.0, 3.378):
        lane_model = make_lane_model(model, METHODS["bias"], dtype=torch.float64)
        trainer = make_trainer(lane_model, images, client, 2, torch.float64, gradient_noise=deviation)
        (update,) = train_lanes(trainer, [task], start_vector(lane_model, torch.float64)).values()
        deltas.append(update.delta)
    key = derive_seed(derive_seed(SEED, "client", ROUND, 0), "step", 0)
    noise = keyed_normal(fold_in(torch.tensor([key]), _NOISE), lane_model.layout.width)[0]
    expected = -0.5 * 3.378 * lane_model.layout.unpad(noise)
    torch.testing.assert_close(deltas[1] - deltas[0], expected, rtol=0, atol=1e-12)


def test_no_privacy_and_the_papers_noise_train_differently(tmp_path):
    digests = set()
    for privacy in ({"name": "none"}, {"name": "paper_noise"}, SAMPLE):
        config = make_config(tmp_path, privacy, privacy["name"])
        run(config, runtime=make_runtime())
        digests.add(summary_of(config)["weights_sha256"])
    assert len(digests) == 3


def test_a_private_round_in_which_nobody_takes_part_is_noise(tmp_path, capsys):
    """Poisson draws of one client in six: some cohorts are empty, and no round is skipped."""
    config = make_config(tmp_path, USER, rounds=8, cohort=1)
    run(config, runtime=make_runtime())
    rows = read_metrics(directory_of(config).metrics_file)
    assert any(row["cohort"] == 0 for row in rows)
    assert "its step is noise alone" in capsys.readouterr().out


def test_secure_noise_says_that_the_run_cannot_be_repeated(tmp_path, capsys):
    digests = set()
    for name in ("one", "two"):
        config = make_config(tmp_path, {**SAMPLE, "secure_noise": True}, name, rounds=1)
        run(config, runtime=make_runtime())
        digests.add(summary_of(config)["weights_sha256"])
    assert len(digests) == 2
    assert "cannot be repeated" in capsys.readouterr().out


def noise_seed_of(config: RunConfig) -> int:
    run(config, runtime=make_runtime(config.runtime.precision))
    checkpoint, _ = load_newest_checkpoint(directory_of(config).checkpoints)
    return checkpoint.noise.seed


def test_only_runs_with_the_same_releases_share_their_noise(tmp_path):
    """The difference of two releases with the same noise would have none."""
    config = make_config(tmp_path, SAMPLE, "base", rounds=1)
    longer = with_values(config, "client", schedule=CosineSchedule(name="cosine"))
    same = {
        "again": config,
        "said": with_values(with_values(config, "runtime", lanes=3), "privacy", slots=24),
        "evaluated seldom": with_values(config, "federation", evaluate_every=2),
    }
    other = {
        "one lane": with_values(config, "runtime", lanes=1),
        "few slots": with_values(config, "privacy", slots=4),
        "cosine": longer,
        "longer cosine": with_values(longer, "federation", rounds=2),
        "bf16": with_values(config, "runtime", precision="bf16"),
        "epsilon": with_values(config, "privacy", epsilon=20.0),
        "batch": with_values(config, "client", batch_size=7),
        "seed": config.model_copy(update={"seed": 2}),
        "data": with_values(config, "data", max_train=119),
        "clip": with_values(config, "privacy", clip_norm=0.9),
    }
    seeds = {name: noise_seed_of(with_values(changed, "output", name=name)) for name, changed in (same | other).items()}
    assert len({seeds[name] for name in same}) == 1
    assert len(set(seeds.values())) == 1 + len(other)


def test_no_image_may_change_without_another_noise_seed(tmp_path, monkeypatch):
    """Nor the libraries; what a run knows its data by looks at some images only."""
    images = torch.zeros(700, 1, 4, 4, dtype=torch.uint8)
    labels = torch.arange(700) % 10

    def make_dataset(images: torch.Tensor) -> Dataset:
        train = ImageSet(images, labels[100:], rows=torch.arange(100, 700))
        return Dataset(train, ImageSet(images, labels), tuple("0123456789"))

    def seed_of(dataset: Dataset) -> int:
        digests, noise = (dataset.fingerprint(), "backbone", ""), torch.ones(4, dtype=torch.float64)
        return derive_noise_seed(make_config(tmp_path, SAMPLE), digests, dataset.train, noise, make_runtime())

    seen, unseen, unused = (images.clone() for _ in range(3))
    seen[100], unseen[101], unused[1] = 9, 9, 9
    base = make_dataset(images)
    assert make_dataset(seen).fingerprint() != base.fingerprint() == make_dataset(unseen).fingerprint()
    assert seed_of(make_dataset(unused)) == seed_of(base)
    seeds = {seed_of(base), seed_of(make_dataset(seen)), seed_of(make_dataset(unseen))}
    monkeypatch.setattr(noise_seed, "library_versions", lambda: {"torch": "9.9"})
    assert len(seeds | {seed_of(base)}) == 4


def test_runs_of_one_seed_have_cohorts_of_their_own_where_these_are_secret(tmp_path):
    """If two runs drew the same cohorts, the accounting of the second would be wrong: it assumes a fresh draw."""
    configs = [make_config(tmp_path, {**USER, "clip_norm": norm}, str(norm), rounds=12) for norm in (0.5, 0.4)]
    cohorts = [
        [simulation.participation.plan(number).steps for number in range(12)]
        for simulation in (build_simulation(config, make_runtime()) for config in configs)
    ]
    assert cohorts[0] != cohorts[1]


@pytest.mark.parametrize("slots", ["auto", 9, 500])
def test_slots_and_draws_are_bounded_by_the_largest_client(slots, tmp_path):
    """A batch size above every client draws everything in each step, as one of the largest client's size does."""
    config = make_config(tmp_path, {"name": "sample", "noise_multiplier": 1.0, "dp_delta": 0.01, "slots": slots})
    largest = int(Setup(config, make_runtime()).partition.sizes().max())
    noise = Noise(torch.ones(6, dtype=torch.float64), seed=5)
    simulations = [
        build_simulation(with_values(config, "client", batch_size=batch), make_runtime(), noise)
        for batch in (1024, largest)
    ]
    updates = [
        list(one.trainer.train(one.setup.tasks(range(6)), RoundStart(0, one.setup.initial_vector)))
        for one in simulations
    ]
    for ours, theirs in zip(*updates, strict=True):
        assert ours.num_samples == theirs.num_samples == simulations[0].setup.partition.size(ours.client)
        assert torch.equal(ours.delta, theirs.delta)
    for simulation in simulations:
        most = simulation.config.runtime.lanes * largest
        assert simulation.trainer.rule.rows.num_lanes == (most if slots == "auto" else min(slots, most))


def test_a_run_may_end_where_it_was_interrupted(tmp_path, monkeypatch):
    """Its budget is cut to what it has spent; the accuracy is that of its last round all the same."""
    config = make_config(tmp_path, {**USER, "name": "sample"}, rounds=4, evaluate_every=0)
    with monkeypatch.context() as patch:
        assert run(config, stop_after(2, patch), runtime=make_runtime()) == INTERRUPTED
    whole = make_config(tmp_path, {**USER, "name": "sample"}, "whole", rounds=2)
    run(whole, runtime=make_runtime())
    spent = summary_of(whole)["privacy"]["epsilon"]
    assert run(with_values(config, "privacy", stop_at_epsilon=spent), runtime=make_runtime()) == COMPLETE
    summary = summary_of(config)
    assert (summary["rounds"], summary["final_accuracy"]) == (2, summary_of(whole)["final_accuracy"])
    assert summary["weights_sha256"] == summary_of(whole)["weights_sha256"]
    assert summary["privacy"]["epsilon"] == spent


def test_a_run_that_cannot_be_accounted_for_leaves_no_file(tmp_path):
    config = make_config(tmp_path, {**USER, "name": "sample", "dp_delta": 1e-300})
    with pytest.raises(ConfigError, match=r"privacy\.dp_delta"):
        run(config, runtime=make_runtime())
    assert not directory_of(config).path.exists()


def test_a_clipping_norm_that_moves_is_told(tmp_path):
    config = make_config(tmp_path, {**USER, "adaptive": {"lr": 0.5}}, rounds=3)
    run(config, runtime=make_runtime())
    told = [row["clip_norm"] for row in read_metrics(directory_of(config).metrics_file)]
    assert told[0] == 0.5
    assert len({*told, summary_of(config)["privacy"]["clip_norm"]}) == 4


def test_a_longer_run_keeps_its_noise_seed(tmp_path):
    config = make_config(tmp_path, {**SAMPLE, "epsilon": None, "noise_multiplier": 1.0}, rounds=1)
    before = noise_seed_of(config)
    assert noise_seed_of(with_values(config, "federation", rounds=2)) == before


def test_secure_cohorts_do_not_follow_from_the_seed(tmp_path):
    cohorts = []
    for name in ("one", "two"):
        config = make_config(tmp_path, {**USER, "secure_noise": True}, name, rounds=12)
        run(config, runtime=make_runtime())
        cohorts.append([row["cohort"] for row in read_metrics(directory_of(config).metrics_file)])
    assert cohorts[0] != cohorts[1]


def test_secure_runs_go_on_with_their_own_cohorts(tmp_path, monkeypatch):
    config = make_config(tmp_path, {**USER, "secure_noise": True}, rounds=4)
    with monkeypatch.context() as patch:
        assert run(config, stop_after(2, patch), runtime=make_runtime()) == INTERRUPTED
    before, _ = load_newest_checkpoint(directory_of(config).checkpoints)
    assert run(config, runtime=make_runtime()) == COMPLETE
    after, _ = load_newest_checkpoint(directory_of(config).checkpoints)
    assert after.noise.seed == before.noise.seed is not None


def test_auto_precision_of_a_private_run_is_never_fp16(tmp_path, monkeypatch):
    """fp16 scales losses by what overflowed before, which privacy must not depend on."""
    config = with_values(make_config(tmp_path, SAMPLE, rounds=1), "runtime", precision="auto")
    monkeypatch.setattr(rounds.process, "start", lambda _: nullcontext(make_runtime("fp16")))
    assert run(config) == COMPLETE
    assert load_config(directory_of(config).config_file).runtime.precision == "fp32"
