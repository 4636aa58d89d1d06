"""Imports point down the layers only, and importing anything has no side effect."""

from __future__ import annotations

import configparser
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINT = [sys.executable, "-c", "import sys; from importlinter.cli import lint_imports_command as c; sys.exit(c())"]


def lint(config: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LINT, "--config", str(config), "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_imports_point_down_the_layers_only() -> None:
    result = lint(ROOT / "setup.cfg")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 kept, 0 broken" in result.stdout


def test_the_linter_would_notice_an_import_upwards(tmp_path: Path) -> None:
    """The same contract upside down is broken."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    contract = config["importlinter:contract:layers"]
    contract["layers"] = "\n" + "\n".join(contract["layers"].split("\n")[::-1])
    upside_down = tmp_path / "setup.cfg"
    with open(upside_down, "w") as file:
        config.write(file)
    result = lint(upside_down)
    assert result.returncode == 1
    assert "0 kept, 1 broken" in result.stdout


def test_every_package_stands_in_a_layer() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    contract = config["importlinter:contract:layers"]
    layers = contract["layers"].replace("|", " ").split() + contract["exhaustive_ignores"].split()
    package = ROOT / "fedpeft_dist"
    names = {path.stem for path in package.glob("*.py")} | {path.parent.name for path in package.glob("*/__init__.py")}
    assert names - {"__init__"} == set(layers)
    assert contract.getboolean("exhaustive")


# Runs in a process of its own: this one has imported half of the package already.
PROBE = """
import importlib, json, os, pkgutil, signal, threading
import numpy, torch

def state():
    return {
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "deterministic": [
            torch.are_deterministic_algorithms_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.benchmark,
        ],
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()),
        "precision": [torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32],
        "grad": [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()],
        # Python's own generator is left out: rich draws from it when it is imported.
        "generators": [torch.random.get_rng_state().tolist(), numpy.random.get_state()[1].tolist()],
        "cuda": torch.cuda.is_initialized(),
        "process group": torch.distributed.is_initialized(),
        "environment": {k: v for k, v in os.environ.items() if not k.startswith(("KMP_", "TORCHINDUCTOR_"))},
        "folder": os.getcwd(),
        "files": sorted(os.listdir()),
        "signals": [str(signal.getsignal(s)) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)],
        "live threads": threading.active_count(),
    }

before = state()
import fedpeft_dist
names = [m.name for m in pkgutil.walk_packages(fedpeft_dist.__path__, "fedpeft_dist.")]
for name in names:
    importlib.import_module(name)
after = state()
changed = {key: [str(before[key])[:300], str(after[key])[:300]] for key in before if before[key] != after[key]}
print(json.dumps({"names": names, "changed": changed}))
"""


def test_importing_every_module_has_no_side_effect(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    *printed, last = result.stdout.splitlines()
    assert printed == []
    found = json.loads(last)
    assert found["changed"] == {}
    files = {path for path in (ROOT / "fedpeft_dist").rglob("*.py") if path.name != "__init__.py"}
    modules = {"fedpeft_dist." + ".".join(p.relative_to(ROOT / "fedpeft_dist").with_suffix("").parts) for p in files}
    assert modules <= set(found["names"])


def test_the_command_line_answers_without_importing_torch() -> None:
    """`fedpeft --help` and a mistyped key must not wait for heavy imports."""
    code = "import sys, fedpeft_dist.cli; print(sorted({'torch', 'timm', 'matplotlib', 'sklearn'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout == "[]\n", result.stderr
