"""Full fine-tuning: every parameter is trained and sent. Without pre-training it is the paper's "scratch"."""

from __future__ import annotations

from fedpeft_dist.backbones.timm_backbone import Backbone
from fedpeft_dist.config.schema import FullConfig
from fedpeft_dist.methods.lane_model import VmapLaneModel


def build_full(backbone: Backbone, config: FullConfig) -> VmapLaneModel:
    return VmapLaneModel(backbone)
