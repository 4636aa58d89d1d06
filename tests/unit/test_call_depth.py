"""A newcomer finds the backward pass in four calls from the `train` command."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest
import torch
import yaml

import fedpeft_dist
from fedpeft_dist.cli import app
from tests.tiny import tiny_tree

PACKAGE = str(Path(fedpeft_dist.__file__).parent)
PRIVACIES = {"plain": {"name": "none"}, "private": {"name": "sample", "noise_multiplier": 1.0}}


@pytest.mark.parametrize("privacy", PRIVACIES)
def test_four_calls_lead_from_the_train_command_to_backward(
    privacy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacks: set[tuple[str, ...]] = set()
    backward = torch.Tensor.backward

    def watched(*arguments: object, **options: object) -> None:
        frames = [frame.name for frame in traceback.extract_stack() if frame.filename.startswith(PACKAGE)]
        if "run_round" in frames:  # the check of the lanes goes backward before the first round
            stacks.add(tuple(frames))
        backward(*arguments, **options)

    monkeypatch.setattr(torch.Tensor, "backward", watched)
    path = tmp_path / "config.yaml"
    output = {"root": str(tmp_path), "name": "run"}
    path.write_text(yaml.safe_dump(tiny_tree(privacy=PRIVACIES[privacy], output=output)))
    app(["train", str(path)], standalone_mode=False)
    assert stacks == {("train", "run", "run_round", "train", "_local_step")}
