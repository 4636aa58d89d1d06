"""Ranks on two machines whose names nobody can resolve: two network namespaces with a cable between them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from fedpeft_dist.runtime.meeting import interface_towards
from tests.multiprocess.exactness_worker import METHODS, make_config
from tests.warm_process import run_fedpeft

HOSTS = ("fedpeft-a", "fedpeft-b")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def _two_machines() -> Iterator[None]:
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2")
    try:
        ip("netns", "add", HOSTS[0])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here ({error.stderr.decode().strip()})")
    try:
        ip("netns", "add", HOSTS[1])
        ip("link", "add", "cable0", "netns", HOSTS[0], "type", "veth", "peer", "name", "cable1", "netns", HOSTS[1])
        for number, host in enumerate(HOSTS):
            ip("-n", host, "addr", "add", f"10.77.0.{number + 1}/24", "dev", f"cable{number}")
            for interface in ("lo", f"cable{number}"):
                ip("-n", host, "link", "set", interface, "up")
        yield
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "del", host], capture_output=True)


def test_two_machines_find_each_other_without_names(_two_machines: None, tmp_path: Path) -> None:  # noqa: PT019
    for name in ("alone", "both"):
        tree = make_config(METHODS["bias"], tmp_path, name)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    train = [sys.executable, "-m", "fedpeft_dist", "train"]
    usual = {**os.environ, "OMP_NUM_THREADS": "1"}
    group = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "10.77.0.1"}
    processes = [
        subprocess.Popen(
            ["ip", "netns", "exec", host, *train, str(tmp_path / "both.yaml")],
            env={**usual, **group, "RANK": str(rank), "MASTER_PORT": "29411"},
        )
        for rank, host in enumerate(HOSTS)
    ]
    try:
        assert run_fedpeft(tmp_path, "train", "alone.yaml").returncode == 0
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    alone, both = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("alone", "both"))
    assert both["world_size"] == 2
    assert both["weights_sha256"] == alone["weights_sha256"]


def test_the_interface_towards_an_address() -> None:
    assert interface_towards("127.0.0.1") in ("lo", "lo0", None)
    assert interface_towards("no.such.host.invalid") is None
