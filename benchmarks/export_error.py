"""Does every export compute what the run's own model computes? Prints the largest difference of a score, by method and
format.

    python benchmarks/export_error.py

The backbone is glyph_vit, or a smaller ViT with --tiny. The parameters are the initial ones with noise, so that each
of them matters. `load_model` is measured here. All exports are loaded in one fresh process, in which this package
cannot be imported.

Shapes: B batch, K classes, C channels, H x W pixels.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import torch

from fedpeft_dist.config.load import parse_config
from fedpeft_dist.data.recipe import ImageRecipe
from fedpeft_dist.export import FORMATS
from fedpeft_dist.export.plain_model import plain_model
from fedpeft_dist.export.trained_run import TrainedRun
from fedpeft_dist.lanes.parameters import LaneParameters
from fedpeft_dist.methods import METHODS, build_lane_model

CLASSES, IMAGES = 10, 5
NOISE = 0.05
PROGRAMS = [name for name in FORMATS if name != "safetensors"]
"""The formats that hold a model, and not the tensors alone."""
SECTIONS = {get_args(section.model_fields["name"].annotation)[0]: section for section in METHODS}
TINY = {
    "backbone.name": "vit_tiny_patch16_224",
    "backbone.model_args": {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
    "data.image_size": 16,
}
LOADER = """
import json, sys
sys.modules["fedpeft_dist"] = None
import onnxruntime, timm, torch
from peft import PeftModel

images, scores = torch.load("images.pt"), {}
for place, expression in json.load(open("expressions.json")).items():
    model = eval(expression)
    with torch.no_grad():
        if isinstance(model, onnxruntime.InferenceSession):
            compute = lambda batch: torch.from_numpy(model.run(None, {"images": batch.numpy()})[0])
        else:
            compute = model
        scores[place] = torch.cat([compute(batch) for batch in (images, images[:1])])
torch.save(scores, "scores.pt")
"""


def measure(exports: Mapping[str, Iterable[str]], tiny: bool = False) -> dict[str, dict[str, float]]:
    """The largest difference of a score, by method and then by format, with `load_model` among the formats.

    Args:
        exports: the formats of each method; those that do not fit the method are left out.
    """
    errors: dict[str, dict[str, float]] = {}
    expected, expressions = {}, {}
    with tempfile.TemporaryDirectory() as place:
        for method, names in exports.items():
            run = trained_run(method, tiny)
            images = random_images(run)
            expected[method] = in_two_batches(lambda x, run=run: run.model.logits(x.unsqueeze(0)).squeeze(0), images)
            found = in_two_batches(plain_model(run), images)
            errors[method] = {"load_model": largest_difference(found, expected[method])}
            for name in names:
                if FORMATS[name].fits(run.method):
                    folder = Path(place, method, name)
                    folder.mkdir(parents=True)
                    FORMATS[name].write(run, folder)
                    expressions[f"{method}/{name}"] = FORMATS[name].expression(run, f"{method}/{name}")
        torch.save(images, Path(place, "images.pt"))
        Path(place, "expressions.json").write_text(json.dumps(expressions))
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-c", LOADER], cwd=place, env=environment, check=True, timeout=1800)
        for export, scores in torch.load(Path(place, "scores.pt")).items():
            method, name = export.split("/")
            errors[method][name] = largest_difference(scores, expected[method])
    return errors


def trained_run(method: str, tiny: bool) -> TrainedRun:
    """A run that has ended with noise on its initial parameters, which its model is bound to."""
    tree: dict[str, Any] = {"method": {"name": method}, "backbone": {"name": "glyph_vit"}}
    tree["data"] = {"name": "synthetic", "image_size": 32}
    for key, value in (TINY if tiny else {}).items():
        section, _, name = key.partition(".")
        tree[section] |= {name: value, **({"pretrained": False} if section == "backbone" else {})}
    config = parse_config(tree, "benchmark")
    model = build_lane_model(config, CLASSES)
    vector = model.initial_vector()
    vector += NOISE * torch.randn(vector.shape, generator=torch.Generator().manual_seed(1))
    parameters = LaneParameters(model.layout, num_lanes=1, with_grad=False)
    parameters.load(0, model.layout.pad(vector))
    model.bind(parameters)
    backbone, frozen = model.backbone, dict(model.backbone.plain.state_dict())
    recipe = ImageRecipe.of(config.data, backbone.interpolation, backbone.mean, backbone.std, cropped=False)
    return TrainedRun(config, model.layout.split(vector), {}, model, frozen, CLASSES, recipe)


def random_images(run: TrainedRun) -> torch.Tensor:
    """[B, C, H, W]."""
    shape = (IMAGES, run.backbone.channels, run.recipe.size, run.recipe.size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def in_two_batches(compute: Any, images: torch.Tensor) -> torch.Tensor:
    """Scores [B + 1, K] of all images at once, and of the first one alone."""
    return torch.cat([compute(images), compute(images[:1])])


def largest_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of two tensors of scores; infinite if either has no finite spread."""
    difference = float((found - expected).abs().max())
    return difference if float(expected.std()) > 0.01 else float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--methods", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--tiny", action="store_true", help="a ViT of one block in place of glyph_vit")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    errors = measure(dict.fromkeys(arguments.methods, PROGRAMS), arguments.tiny)
    rows = [
        f"{json.dumps(method)}: {json.dumps({k: float(f'{v:.1e}') for k, v in own.items()})}"
        for method, own in errors.items()
    ]
    print("{" + ",\n ".join(rows) + "}")


if __name__ == "__main__":
    main()
