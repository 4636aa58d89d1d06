"""Paths and names that users give: what they stand for, and what no file system could have."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.load import config_digest, default_run_name, load_config, parse_config
from fedpeft_dist.config.paths import NAME_BYTES, derived_name, expand_path


@pytest.fixture(autouse=True)
def _variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.setenv("BELOW_HOME", "~/x")
    monkeypatch.setenv("NOT_UTF8", "/\udcff")
    monkeypatch.delenv("NOWHERE", raising=False)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("~", "/home/me"),
        ("~/runs", "/home/me/runs"),
        ("$SCRATCH/runs", "/scratch/me/runs"),
        ("${SCRATCH}2/runs", "/scratch/me2/runs"),
        ("~/$SCRATCH", "/home/me//scratch/me"),
        ("$BELOW_HOME/runs", "/home/me/x/runs"),
    ],
)
def test_expands_home_folders_and_variables(path: str, expected: str) -> None:
    assert expand_path(path) == expected


@pytest.mark.parametrize("path", ["runs", "./~x", "a/~/b", "a~", "cost$", "$1", "a//b/", "..", "/", " a ", "é" * 127])
def test_leaves_other_paths_as_they_are(path: str) -> None:
    assert expand_path(path) == path


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "'' is no path; give . for"),
        ("~no-such-user/x", "'~no-such-user/x': ~no-such-user is no user's home folder"),
        ("$NOWHERE/x", "'$NOWHERE/x': the environment variable 'NOWHERE' has no value here; set it"),
        ("a/${NOWHERE}", "variable 'NOWHERE' has no value"),
        ("$EMPTY/x", "variable 'EMPTY' has no value"),
        ("${SCRATCH:-/tmp}", "variable 'SCRATCH:-/tmp' has no value"),
        ("$NOT_UTF8/x", r"'$NOT_UTF8/x': '/\udcff/x' is no UTF-8"),
        ("a\0b", "NUL"),
        ("a/" + "x" * 256, "has 256 bytes; give a name of 255 bytes at most"),
        ("é" * 128, "has 256 bytes"),
    ],
)
def test_refuses_invalid_paths(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        expand_path(path)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 200


PARTICIPATION = "federation.participation"


@pytest.mark.parametrize("key", ["output.root", "availability.path", "dropout.path", "devices.path"])
def test_every_path_key_expands_and_refuses(tmp_path: Path, key: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("")
    section, leaf = key.split(".")
    full = key if section == "output" else f"{PARTICIPATION}.{key}"
    extra = [] if section == "output" else [f"{PARTICIPATION}.{section}.name=trace"]
    config = load_config(file, [*extra, f"{full}=$SCRATCH/x"])
    holder = config.output if section == "output" else getattr(config.federation.participation, section)
    assert getattr(holder, leaf) == "/scratch/me/x"
    with pytest.raises(ConfigError, match=rf"{full}: '\$NOWHERE': the environment variable 'NOWHERE' has no value"):
        load_config(file, [*extra, f"{full}=$NOWHERE"])


def test_extends_expands_and_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PARENTS", str(tmp_path / "parents"))
    (tmp_path / "parents").mkdir()
    (tmp_path / "parents" / "base.yaml").write_text("seed: 7\n")
    child = tmp_path / "child.yaml"
    for parent in ("~/parents/base.yaml", "$PARENTS/base.yaml", "parents/base.yaml"):
        child.write_text(f"extends: {parent}\n")
        assert load_config(child).seed == 7
    for parent in ("$NOWHERE/base.yaml", '"a\\0"', "~no-such-user/base.yaml"):
        child.write_text(f"extends: {parent}\n")
        with pytest.raises(ConfigError, match=r"child\.yaml: extends: '"):
            load_config(child)


def test_plain_paths_keep_the_digest_and_the_name() -> None:
    digest = config_digest(parse_config({"data": {"name": "image_folder", "root": "data/x"}}, "test"))
    assert digest == config_digest(parse_config({"data": {"root": "data/x", "name": "image_folder"}}, "test"))
    config = parse_config({}, "test")
    assert default_run_name("/a/folder (1)/my config.yaml", config).startswith("folder (1)-my config-")


# --- names of runs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a", "a/b", "a/", "2024-01-01", "ünï", "a=1, b", "x" * NAME_BYTES, "-x", "..a", "a%j"]
)
def test_accepts_run_names(name: str) -> None:
    assert parse_config({"output": {"name": name}}, "test").output.name == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "'' is no name for a run's folder"),
        ("  ", "'  ' is no name for a run's folder"),
        (".", "'.' is no folder below output.root"),
        ("./", "'./' is no folder below output.root"),
        ("..", "'..' is no folder below output.root"),
        ("a/../../b", "is no folder below output.root"),
        ("/a", "'/a' is no folder below output.root"),
        ("~/a", "'~/a' is no folder below output.root"),
        ("$NOWHERE", "variable 'NOWHERE' has no value"),
        ("a\nb", r"'a\nb' holds a line break"),
        ("a\x1b[0m", "control character"),
        ("a\0b", "NUL"),
        ("x" * (NAME_BYTES + 1), "has 201 bytes; give a name of 200 bytes at most"),
        ("a/" + "é" * 101, "has 202 bytes"),
    ],
)
def test_refuses_run_names(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"output": {"name": name}}, "test")
    assert str(caught.value).startswith("test: output.name: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("root", ["a\nb", "folder/" * 600])
def test_a_root_that_no_run_fits_below_is_refused(root: str) -> None:
    with pytest.raises(ConfigError, match=r"^test: output: root.*(line break|4[0-9]+ bytes)"):
        parse_config({"output": {"root": root}}, "test")


@pytest.mark.parametrize("text", ["a" * 500, "é" * 250, "a\nb~c$D" + "x" * 300, "\udcff", "short"])
def test_a_derived_name_is_a_valid_one_and_stable(text: str) -> None:
    name = derived_name(text, "-seed1")
    assert name.endswith("-seed1")
    assert parse_config({"output": {"name": name}}, "test").output.name == name
    assert derived_name(text, "-seed1") == name
    assert (name == f"{text}-seed1") == (text == "short")


def test_derived_names_that_differ_at_their_end_stay_different() -> None:
    assert derived_name("a" * 300 + "b") != derived_name("a" * 300 + "c")
    assert derived_name("a" * NAME_BYTES) == "a" * NAME_BYTES


def test_a_config_below_a_folder_of_a_long_name_has_a_run(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 250)
    folder.mkdir()
    (folder / f"{'y' * 240}.yaml").write_text("")
    config = load_config(folder / f"{'y' * 240}.yaml")
    name = default_run_name(folder / f"{'y' * 240}.yaml", config)
    assert len(name) == NAME_BYTES
    assert name.endswith(f"-{config_digest(config)[:8]}")
