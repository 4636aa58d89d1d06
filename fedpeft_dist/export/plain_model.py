"""A trained run as an ordinary PyTorch module: images in, scores out, no lanes.

The module is built anew, so that none of the kernels that a run may choose for speed is in it.

Shapes: B batch, K classes, C channels, H x W pixels.
"""

from pathlib import Path

from torch import nn

from fedpeft_dist.config.load import load_config
from fedpeft_dist.export.trained_run import TrainedRun, load_run
from fedpeft_dist.lanes.parameters import LaneParameters
from fedpeft_dist.methods.lane_model import LaneModule
from fedpeft_dist.methods.structure import copy_model
from fedpeft_dist.tracking.run_directory import RunDirectory


def load_model(path: str | Path) -> nn.Module:
    """`fedpeft_dist.load_model`."""
    directory = RunDirectory.existing(Path(path))
    run = load_run(load_config(directory.config_file), directory)
    model = plain_model(run)
    model.transform = run.recipe.transform()
    return model


def plain_model(run: TrainedRun) -> nn.Module:
    """Takes normalised images [B, C, H, W] and returns scores [B, K]; in eval mode."""
    if run.method.merge is None:
        return _with_modules(run)
    model = copy_model(run.backbone.plain)  # it shares the run's tensors, which stay as they are
    merged = run.method.merge(run.frozen, run.trained)
    model.load_state_dict({name: tensor.clone() for name, tensor in merged.items()}, assign=True)
    return model


def _with_modules(run: TrainedRun) -> nn.Module:
    """The backbone with the method's modules, which hold the tensors of one lane as parameters."""
    layout = run.model.layout
    parameters = LaneParameters(layout, num_lanes=1, with_grad=False)
    parameters.load(0, layout.pad(layout.join(run.trained)))
    run.model.bind(parameters)
    model = copy_model(run.backbone.model)
    for module in list(model.modules()):
        if isinstance(module, LaneModule):
            module.register()
    return model
