"""A run needs PyTorch, timm, NumPy, safetensors, PyYAML and pydantic, what these import, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.tiny import tiny_tree

BLOCKED = (
    *("rich", "typer", "click", "tensorboard", "matplotlib", "sklearn", "scipy", "h5py", "dp_accounting", "submitit"),
    *("datasets", "peft"),
)
RUN = """
import json, sys
from importlib.machinery import ModuleSpec

blocked = set(json.loads(sys.argv[2]))

class Refuse:
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self) if name in blocked else None

    def create_module(self, spec):
        raise ModuleNotFoundError(f"No module named {spec.name!r}", name=spec.name)

    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Refuse())
import fedpeft_dist

print(fedpeft_dist.train(sys.argv[1]))
assert not blocked & set(sys.modules), blocked & set(sys.modules)
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_tree(output={"root": str(tmp_path), "name": "run"})))
    return path


def test_a_run_needs_no_other_packages(config: Path) -> None:
    """Without TensorBoard, the run says so in one line and leaves everything else."""
    command = [sys.executable, "-c", RUN, str(config), json.dumps(BLOCKED)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].endswith("run: without curves for TensorBoard, because tensorboard is missing")
    assert lines[-1] == "complete"
    assert sum("round " in line for line in lines) == 2
    assert len((config.parent / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert (config.parent / "run" / "summary.json").exists()
