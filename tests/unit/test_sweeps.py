"""Sweep files: their cells, the order of the cells, and the messages of refusals."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedpeft_dist import cli, data
from fedpeft_dist.backbones import timm_backbone
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.load import load_config, with_values
from fedpeft_dist.config.paths import NAME_BYTES
from fedpeft_dist.config.schema import BackboneConfig, DataConfig, RunConfig
from fedpeft_dist.federation import run as rounds
from fedpeft_dist.runtime.interrupts import StopRequest
from fedpeft_dist.sweeps.expansion import Cell, load_sweep, pick_cell
from fedpeft_dist.sweeps.workers import cell_rows, work_through
from fedpeft_dist.tracking.run_directory import COMPLETE, FAILED, RUNNING, RunDirectory
from fedpeft_dist.tracking.run_lock import RunInUseError

BASE = {"data": {"name": "digits", "clients": 4}, "federation": {"rounds": 2, "cohort": 2}, "output": {"root": "runs"}}


def write(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "base.yaml", BASE)
    write(tmp_path / "lora.yaml", {"extends": "base.yaml", "method": {"name": "lora", "rank": 4}})
    return tmp_path


def expand(folder: Path, overrides: tuple[str, ...] = (), **sweep: Any) -> list[Cell]:
    return load_sweep(write(folder / "sweep.yaml", {"base": "base.yaml", **sweep}), overrides)


def test_axes_are_combined_in_order_with_the_seed_fastest(folder: Path) -> None:
    cells = expand(
        folder,
        axes={
            "method": {"lora": {"extends": "lora.yaml"}, "head": {"method": {"name": "head"}}},
            "federation.cohort": [1, 2],
        },
        seeds=[5, 1],
    )
    assert [cell.name for cell in cells] == [
        *("lora-cohort1-seed5", "lora-cohort1-seed1", "lora-cohort2-seed5", "lora-cohort2-seed1"),
        *("head-cohort1-seed5", "head-cohort1-seed1", "head-cohort2-seed5", "head-cohort2-seed1"),
    ]
    assert [cell.index for cell in cells] == list(range(8))
    third = cells[2].config
    assert (third.method.name, third.method.rank, third.federation.cohort, third.seed) == ("lora", 4, 2, 5)
    assert cells[7].config.method.name == "head"


def test_further_cells_come_after_the_axes(folder: Path) -> None:
    cells = expand(
        folder,
        axes={"method": {"head": {"method": {"name": "head"}}}},
        cells={"lora-m1": {"extends": "lora.yaml", "federation.cohort": 1, "client": {"optimizer": {"lr": 0.5}}}},
        seeds=[1, 2],
    )
    assert [cell.name for cell in cells] == ["head-seed1", "head-seed2", "lora-m1-seed1", "lora-m1-seed2"]
    assert cells[2].config.method.rank == 4
    assert cells[2].config.federation.cohort == 1
    assert cells[2].config.client.optimizer.lr == 0.5


def test_a_later_axis_wins_and_set_overrides_the_base(folder: Path) -> None:
    cells = expand(
        folder,
        set={"federation.rounds": 7, "client": {"epochs": 3}},
        axes={
            "first": {"a": {"client.epochs": 4, "client.batch_size": 8}},
            "second": {"b": {"client.epochs": 5}},
        },
    )
    assert len(cells) == 1
    client = cells[0].config.client
    assert (cells[0].config.federation.rounds, client.epochs, client.batch_size) == (7, 5, 8)


def test_a_choices_keys_override_the_file_it_extends(folder: Path) -> None:
    write(
        folder / "other.yaml",
        {"extends": "base.yaml", "client": {"epochs": 9, "batch_size": 9}, "federation": {"rounds": 9}},
    )
    cells = expand(
        folder,
        set={"federation.rounds": 7},
        axes={"first": {"a": {"client.epochs": 4}}, "second": {"b": {"extends": "other.yaml"}}},
    )
    client = cells[0].config.client
    assert (cells[0].config.federation.rounds, client.epochs, client.batch_size) == (7, 4, 9)


def test_two_axes_may_extend_files_that_share_parents(folder: Path) -> None:
    """Only the differences of a file count: the method's file does not bring its data set back."""
    write(folder / "glyphs.yaml", {"extends": "base.yaml", "data": {"name": "glyphs", "clients": 8}})
    cells = expand(
        folder,
        axes={
            "data": {"digits": {}, "glyphs": {"extends": "glyphs.yaml"}},
            "method": {"lora": {"extends": "lora.yaml"}},
        },
    )
    found = [(cell.config.data.name, cell.config.data.clients, cell.config.method.name) for cell in cells]
    assert found == [("digits", 4, "lora"), ("glyphs", 8, "lora")]


def test_dotted_and_nested_keys_of_one_section_are_merged(folder: Path) -> None:
    for choice in (
        {"client.optimizer.lr": 0.5, "client": {"epochs": 3}},
        {"client": {"epochs": 3}, "client.optimizer.lr": 0.5},
        {"client": {"optimizer": {"lr": 0.5}}, "client.epochs": 3},
    ):
        client = expand(folder, cells={"a": choice})[0].config.client
        assert (client.optimizer.lr, client.epochs) == (0.5, 3)


def test_long_names_of_cells_are_cut_with_a_digest(folder: Path) -> None:
    axes = {f"backbone.model_args.{key * 60}": [1, 2] for key in "abcd"}
    cells = expand(folder, axes=axes, seeds=[1, 23])
    assert len(cells) == len({cell.name for cell in cells}) == 32
    assert all(len(cell.name) <= NAME_BYTES and cell.config.output.name == cell.name for cell in cells)
    assert cells[1].name.endswith("-seed23")
    assert [cell.name for cell in expand(folder, axes=axes, seeds=[1, 23])] == [cell.name for cell in cells]
    for cell in (cells[0], cells[-1]):
        cell.directory.lock().release()
        cell.directory.write_state(RUNNING, 0)


def test_paths_in_a_sweep_expand(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("CONFIGS", str(folder))
    (cell,) = expand(folder, base="~/base.yaml", output="$CONFIGS/out", cells={"a": {"extends": "$CONFIGS/lora.yaml"}})
    assert (cell.config.method.rank, cell.directory.path) == (4, folder / "out" / "a-seed1")


def test_without_seeds_the_bases_seed_is_used(folder: Path) -> None:
    write(folder / "base.yaml", {**BASE, "seed": 7})
    assert [cell.name for cell in expand(folder, cells={"a": {}})] == ["a-seed7"]


def test_a_run_of_an_older_sweep_file_is_another_config(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (cell,) = expand(folder, cells={"a": {"client.epochs": 1}}, output="out")
    resolved = with_values(cell.config, "runtime", lanes=2, device="cpu", precision="fp32")
    cell.directory.write_config(resolved)
    cell.directory.write_state(COMPLETE, 2)
    assert cell_rows([cell])[0]["state"] == COMPLETE
    edited = expand(folder, cells={"a": {"client.epochs": 2}, "b": {"data.clients": 9999}}, output="out")
    assert cell_rows(edited)[0]["state"] == "other config"
    outcome = work_through(edited)
    assert (outcome.skipped, outcome.failed) == ([], ["a-seed1", "b-seed1"])


def test_a_signal_in_a_cells_last_round_stops_the_worker(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    begun = []

    def run_and_be_told_to_stop(config: RunConfig, stop: StopRequest) -> str:
        begun.append(config.output.name)
        os.kill(os.getpid(), signal.SIGTERM)
        return COMPLETE

    monkeypatch.setattr(rounds, "run", run_and_be_told_to_stop)
    outcome = work_through(expand(folder, cells={"a": {}, "b": {}}))
    assert begun == ["a-seed1"]
    assert outcome.interrupted


def test_directories_lie_below_the_output_and_overrides_win(folder: Path) -> None:
    axes = {"seedless": {"x": {}}}
    named = expand(folder, axes=axes, output="elsewhere/s")[0]
    assert str(named.directory.path) == "elsewhere/s/x-seed1"
    unnamed = expand(folder, axes=axes)[0]
    assert str(unnamed.directory.path) == f"runs/{folder.name}-sweep/x-seed1"
    moved = expand(folder, ("output.root=/tmp/else", "federation.rounds=9"), axes=axes, output="elsewhere/s")[0]
    assert str(moved.directory.path) == "/tmp/else/x-seed1"
    assert moved.config.federation.rounds == 9


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"axis": {}}, r"sweep\.yaml: axis: unknown key of a sweep; known here: base, output, set, axes, cells, seeds"),
        ({"axes": {}}, r"sweep\.yaml: a sweep without axes and cells has nothing to run"),
        ({"cells": {"a/b": {}}}, r"sweep\.yaml: 'a/b' cannot be part of a directory's name"),
        ({"axes": {"federation.cohort": [1, 1]}}, r"sweep\.yaml: two cells are called 'cohort1-seed1'"),
        ({"axes": {"a": {"x": {}}}, "cells": {"x": {}}}, r"sweep\.yaml: two cells are called 'x-seed1'"),
        (
            {"axes": {"federation.chort": [1]}},
            r"sweep\.yaml, cell chort1-seed1: federation\.chort: unknown key; did you",
        ),
        ({"cells": {"a": {"extends": "none.yaml"}}}, r"none\.yaml: no such config file"),
        ({"cells": {"a": {"extends": 3}}}, r"extends: 3 is not a path"),
        ({"cells": {"a": {}}, "seeds": []}, r"sweep\.yaml: seeds: "),
        ({"cells": {"a": {"federation.cohort": 9}}}, r"cell a-seed1: federation\.cohort: 9 is larger"),
        ({"cells": {"a": {"seed": 2}}}, r"sweep\.yaml: seed: a sweep gives each cell its own"),
        ({"axes": {"seed": [1, 2]}}, r"sweep\.yaml: seed: a sweep gives each cell its own"),
        ({"set": {"output": {"name": "x"}}, "cells": {"a": {}}}, r"output\.name: a sweep gives each cell its own"),
        ({"cells": {"a": {"output.root": "x"}}}, r"output\.root: a sweep gives each cell its own"),
        ({"axes": {"federation.cohort": 3}}, r"axes\.federation\.cohort: 3: should be a list of values, or a mapping"),
        ({"axes": {"federation.cohort": []}, "cells": {"a": {}}}, r"axes\.federation\.cohort: no values"),
        ({"axes": {"a": {True: {}}}}, r"axes\.a: True is no name; on, off, yes and no mean booleans"),
        ({"axes": {"a": {"x": None}}}, r"axes\.a\.x: None: should be a mapping of keys to values"),
        ({"cells": {"a": 3}}, r"cells\.a: 3: should be a mapping of keys to values"),
        ({"cells": {"a": {}}, "seeds": 3}, r"seeds: 3: should be a list"),
        (
            {"axes": {"data.crop_scale": [[0.1, 1]]}},
            r"give it one: data\.crop_scale: \{short-name: \{data.crop_scale: \[0",
        ),
        ({"axes": {"method": ["bias"]}}, r"method: 'bias': should be a mapping of keys to values, such as \{name: "),
        (
            {"cells": {"a": {"federation": 3, "federation.cohort": 1}}},
            r"cell a: federation\.cohort: federation is already",
        ),
        ({"base": 3, "cells": {"a": {}}}, r"sweep\.yaml: base: 3: "),
        ({"base": "$NOWHERE/b.yaml", "cells": {"a": {}}}, r"sweep\.yaml: base: '\$NOWHERE/b\.yaml': the environment"),
        (
            {"output": "~nobody-here/b", "cells": {"a": {}}},
            r"sweep\.yaml: output: '~nobody-here/b': ~nobody-here is no",
        ),
        ({"cells": {"a": {"extends": "$NOWHERE"}}}, r"sweep\.yaml: extends: '\$NOWHERE': the environment"),
        ({"axes": {"a": {20240101: {}}}}, r"axes\.a: 20240101 is no name; .* quote them, and numbers"),
    ],
    ids=str,
)
def test_refuses_invalid_sweeps(folder: Path, sweep: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        expand(folder, **sweep)


@pytest.mark.parametrize("override", ["seed=3", "output.name=x"])
def test_refuses_overrides_of_seed_and_name(folder: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=r"an override: .*: a sweep gives each cell its own"):
        expand(folder, (override,), cells={"a": {}})


def test_a_sweep_needs_a_base(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"base: missing"):
        load_sweep(write(folder / "sweep.yaml", {"cells": {"a": {}}}))
    with pytest.raises(ConfigError, match=r"no such config file; did you mean base\.yaml"):
        load_sweep(folder / "bas.yaml")


def test_a_cell_is_picked_by_its_index(folder: Path) -> None:
    cells = expand(folder, cells={"a": {}, "b": {}})
    assert pick_cell(cells, 1, folder).name == "b-seed1"
    for index in (-1, 2):
        with pytest.raises(ConfigError, match=rf"--index: {index} is no cell of .*; give 0 to 1"):
            pick_cell(cells, index, folder)
    assert pick_cell(cells, 1, folder, "b-seed1").name == "b-seed1"
    with pytest.raises(ConfigError, match=r"has changed: cell 0 is called a-seed1 now, not b-seed1; start again"):
        pick_cell(cells, 0, folder, "b-seed1")


def test_cell_states_are_those_of_the_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    cells = expand(folder, cells={name: {} for name in "abc"}, output="out")
    cells[0].directory.write_state(COMPLETE, 2)
    cells[1].directory.write_state(FAILED, 1)
    assert [row["state"] for row in cell_rows(cells)] == [COMPLETE, FAILED, "waiting"]
    longer = expand(folder, ("federation.rounds=3",), cells={"a": {}}, output="out")
    assert cell_rows(longer)[0]["state"] == "waiting"


def test_list_prints_every_cell(folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(folder / "sweep.yaml", {"base": "base.yaml", "axes": {"federation.cohort": [1, 2]}, "seeds": [1, 2]})
    monkeypatch.setattr("sys.argv", ["fedpeft", "sweep", "list", str(path)])
    cli.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[2].split() == ["2", "waiting", "cohort2-seed1"]
    assert lines[-1] == f"4 cells: 4 waiting; below runs/{folder.name}-sweep"
    monkeypatch.setattr("sys.argv", ["fedpeft", "sweep", "list", str(path), "--json"])
    cli.main()
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == ["cohort1-seed1", "cohort1-seed2", "cohort2-seed1", "cohort2-seed2"]


def test_axes_with_the_same_last_part_get_longer_names(folder: Path) -> None:
    (cell,) = expand(folder, axes={"client.optimizer.lr": [0.1], "server.optimizer.lr": [1.0]})
    assert cell.name == "client.optimizer.lr0.1-server.optimizer.lr1.0-seed1"


def test_states_of_killed_damaged_and_failed_cells(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    cells = expand(folder, cells={"killed": {}, "damaged": {}, "never": {"data.clients": 9999}}, output="out")
    cells[0].directory.write_config(cells[0].config)
    cells[0].directory.write_state(RUNNING, 1)
    cells[1].directory.path.mkdir(parents=True)
    cells[1].directory.state_file.write_text("{bad")
    work_through(cells[1:])
    assert [row["state"] for row in cell_rows(cells)] == ["stopped", "damaged", FAILED]
    assert "data.clients: 9999 is more" in cells[2].directory.read_state()["error"]
    lock = cells[0].directory.lock()
    assert cell_rows(cells)[0]["state"] == RUNNING
    lock.release()


def test_refuses_a_sweep_as_a_config(folder: Path) -> None:
    path = write(folder / "sweep.yaml", {"base": "base.yaml", "cells": {"a": {}}})
    with pytest.raises(ConfigError, match=r"this is a sweep, of many configs; use `fedpeft sweep list`"):
        load_config(path)


def test_prefetch_takes_a_sweep_and_goes_on_after_a_failure(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    asked: list[tuple[str, Any]] = []

    def prefetch_weights(section: BackboneConfig) -> str:
        asked.append(("weights", section.name))
        raise ConfigError("no weights")

    def prefetch_data(section: DataConfig) -> str:
        asked.append(("data", section.name))
        return f"place of {section.name}"

    monkeypatch.setattr(timm_backbone, "prefetch_weights", prefetch_weights)
    monkeypatch.setattr(data, "prefetch_data", prefetch_data)
    axes = {"data.clients": [2, 3], "data": {"digits": {}, "glyphs": {"data": {"name": "glyphs", "clients": 4}}}}
    path = write(folder / "sweep.yaml", {"base": "base.yaml", "axes": axes, "seeds": [1, 2]})
    monkeypatch.setattr("sys.argv", ["fedpeft", "prefetch", str(path)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.err == "error: no weights\n"
    assert captured.out.splitlines() == ["data:    place of digits", "data:    place of glyphs"]
    assert [name for what, name in asked if what == "data"] == ["digits", "glyphs"]


def test_only_one_process_holds_a_runs_lock(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    assert not directory.in_use()
    lock = directory.lock()
    assert directory.in_use()
    with pytest.raises(RunInUseError, match="another process is writing this run"):
        directory.lock()
    lock.release()
    assert not directory.in_use()
    directory.lock().release()
