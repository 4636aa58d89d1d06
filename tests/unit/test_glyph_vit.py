"""The embedded backbone: its packaged weights, its construction, and the recipe that makes it."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedpeft_dist.backbones.glyph_vit import PRETRAINED_CFG, WEIGHTS_FILE, build_glyph_vit
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.data.glyphs import ALPHABETS
from fedpeft_dist.pretrain import letter_drawings, pretrain, sample_letters, schedule

DOCUMENT = Path(__file__).parents[2] / "docs" / "glyph_vit.md"
TINY = {"steps": 3, "batch_size": 4, "held_out_images": 8}


def quiet(_: str) -> None:
    """Ignores a line of the report."""


def test_packaged_weights_match_the_document() -> None:
    content = WEIGHTS_FILE.read_bytes()
    assert len(content) <= 6 * 2**20
    documented = re.findall(r"\b[0-9a-f]{64}\b", DOCUMENT.read_text(encoding="utf-8"))
    assert set(documented) == {hashlib.sha256(content).hexdigest()}


def test_pretrained_loads_every_packaged_tensor_and_nothing_else() -> None:
    packaged = load_file(WEIGHTS_FILE)
    model = build_glyph_vit(10, pretrained=True)
    state = model.state_dict()
    assert set(state) - set(packaged) == {"head.weight", "head.bias"}
    for name, tensor in packaged.items():
        assert tensor.dtype == torch.float32
        assert torch.isfinite(tensor).all()
        assert torch.equal(state[name], tensor)


@pytest.mark.parametrize("num_classes", [0, 10, 45])
def test_output_has_a_column_per_class(num_classes: int) -> None:
    model = build_glyph_vit(num_classes, pretrained=True).eval()
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, num_classes or 128)
    assert model.pretrained_cfg["num_classes"] == num_classes


def test_configuration_is_that_of_a_timm_model() -> None:
    model = build_glyph_vit(10, pretrained=False)
    assert model.pretrained_cfg["input_size"] == (1, 32, 32)
    assert model.pretrained_cfg["mean"] == model.pretrained_cfg["std"] == (0.5,)
    assert model.get_submodule(model.pretrained_cfg["classifier"]) is model.get_classifier()
    assert model.get_submodule(model.pretrained_cfg["first_conv"]).in_channels == 1
    assert "num_classes" not in PRETRAINED_CFG  # a model's own copy was changed, not the module's


def test_meta_device_takes_no_weights() -> None:
    model = build_glyph_vit(10, pretrained=False, device="meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    real = build_glyph_vit(10, pretrained=False)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    with pytest.raises(ValueError, match="meta device"):
        build_glyph_vit(10, pretrained=True, device="meta")


def test_model_args_reach_timm_and_must_fit_the_weights() -> None:
    assert len(build_glyph_vit(10, pretrained=False, depth=2).blocks) == 2
    for model_args, wrong in ({"depth": 5}, "blocks.5"), ({"embed_dim": 64}, "blocks.0"):
        with pytest.raises(ValueError, match=rf"do not fit this model: {wrong}"):
            build_glyph_vit(10, pretrained=True, **model_args)


def test_features_of_the_packaged_weights_separate_letters() -> None:
    """A nearest-mean classifier on the features, without any training, is far above chance (1/45)."""
    model = build_glyph_vit(0, pretrained=True).eval()
    letters = letter_drawings()
    generator = torch.Generator().manual_seed(123)
    with torch.inference_mode():
        images, labels = sample_letters(letters, 1024, generator)
        features = torch.nn.functional.normalize(model(images), dim=-1)
        means = torch.stack([features[:768][labels[:768] == k].mean(0) for k in range(45)])
        accuracy = ((features[768:] @ means.T).argmax(-1) == labels[768:]).float().mean()
    assert accuracy > 0.5


def test_pretraining_repeats_and_restores_the_process(tmp_path: Path) -> None:
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    first = pretrain(tmp_path / "a" / "first.safetensors", report=quiet, **TINY)
    again = pretrain(tmp_path / "again.safetensors", report=quiet, **TINY)
    other = pretrain(tmp_path / "other.safetensors", report=quiet, seed=1, **TINY)
    assert first["sha256"] == again["sha256"] != other["sha256"]
    assert first["held_out_accuracy"] == again["held_out_accuracy"]
    content = (tmp_path / "again.safetensors").read_bytes()
    assert first["sha256"] == hashlib.sha256(content).hexdigest()
    assert first["bytes"] == len(content) == WEIGHTS_FILE.stat().st_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "again.safetensors", "other.safetensors"]
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)


def test_pretraining_refuses_empty_sizes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size: 0"):
        pretrain(tmp_path / "w.safetensors", batch_size=0)
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_written_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output in (tmp_path, tmp_path / "file" / "weights.safetensors"):
        with pytest.raises(ConfigError, match=r"--output.*cannot be written"):
            pretrain(output)


def test_samples_are_letters_in_the_models_range() -> None:
    drawings, classes = letter_drawings()
    assert drawings.shape[0] == len(classes) == len(ALPHABETS["latin"])
    images, labels = sample_letters((drawings, classes), 512, torch.Generator().manual_seed(0))
    assert images.shape == (512, 1, 32, 32)
    assert images.min() == -1
    assert images.max() <= 1
    assert labels.unique().numel() == 45


def test_schedule_warms_up_and_ends_near_zero() -> None:
    values = [schedule(step, 100, 10) for step in range(100)]
    assert values[0] == pytest.approx(0.1)
    assert max(values) == pytest.approx(1.0)
    assert values[9] == pytest.approx(1.0)
    assert values[10:] == sorted(values[10:], reverse=True)
    assert 0 < values[-1] < 0.01
