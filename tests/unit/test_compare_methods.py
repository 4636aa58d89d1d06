"""launch/compare_methods.py: a method's rate is chosen on held-out samples, and missing runs are named."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import yaml

SCRIPT = Path(__file__).parents[2] / "launch" / "compare_methods.py"
ACCURACIES = {
    "bias": {0.01: (0.80, 0.82, 0.81), 0.1: (0.99, 0.99, 0.99)},
    "lora": {0.01: (0.60, 0.63, 0.60), 0.1: (0.90, 0.90, 0.90)},
}
HELD_OUT = {("bias", 0.01): 0.9, ("bias", 0.1): 0.7, ("lora", 0.01): 0.5, ("lora", 0.1): 0.4}


@pytest.fixture
def runs(tmp_path) -> Path:
    for data in ("digits", "glyphs100"):
        for method, rates in ACCURACIES.items():
            for rate, accuracies in rates.items():
                for seed, accuracy in zip((1, 42, 3407), accuracies):
                    write_run(tmp_path / data / "methods", method, rate, seed, accuracy)
    return tmp_path


def write_run(folder: Path, method: str, rate: float, seed: int, accuracy: float) -> None:
    run = folder / f"{method}-lr{rate}-seed{seed}"
    run.mkdir(parents=True)
    config = {"seed": seed, "method": {"name": method}, "client": {"optimizer": {"lr": rate}}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    summary = {"trainable_parameters": 256 if method == "bias" else 512, "final_accuracy": accuracy}
    (run / "summary.json").write_text(json.dumps(summary))
    last = json.dumps({"round": 1, "client_accuracy_mean": HELD_OUT[method, rate]})
    (run / "metrics.jsonl").write_text(last + "\n")


@pytest.fixture
def compare(runs, monkeypatch):
    """The script on these runs, in this process."""
    monkeypatch.setattr(sys, "argv", ["compare_methods.py", str(runs)])
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return lambda: runpy.run_path(str(SCRIPT), run_name="__main__")


def test_the_rate_is_the_best_on_held_out_samples(runs, compare, capsys):
    compare()
    printed = capsys.readouterr().out
    assert "| bias | 0.01 | 256 | 1.0 | 0.8100 ± 0.0100 |  |  |" in printed
    assert "| lora | 0.01 | 512 | 2.0 | 0.6100 ± 0.0173 | -20.0 ± 2.5 | below |" in printed
    assert "| bias | lora |  |" in printed
    assert (runs / "digits" / "methods" / "accuracy_of_methods.png").exists()


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        ("summary.json", r"lora-lr0\.01-seed42 is not complete"),
        ("config.yaml", r"has the seeds \[1, 3407\] at rate 0\.01"),
    ],
)
def test_a_missing_run_is_named(runs, compare, missing, told):
    (runs / "digits" / "methods" / "lora-lr0.01-seed42" / missing).unlink()
    with pytest.raises(SystemExit, match=f"error: .*{told}"):
        compare()


def test_a_missing_rate_is_named(runs, compare):
    for run in (runs / "digits" / "methods").glob("lora-lr0.1-*"):
        (run / "config.yaml").unlink()
    with pytest.raises(SystemExit, match=r"error: .* has no runs of lora at rate 0\.1"):
        compare()
