"""Full fine-tuning: every parameter is trained and sent. Without pre-training it is the paper's "scratch"."""

from fedpeft_dist.backbones.timm_backbone import Backbone
from fedpeft_dist.methods.lane_model import VmapLaneModel
from fedpeft_dist.methods.method import InPlaceMethod


class Full(InPlaceMethod):
    def build(self, backbone: Backbone) -> VmapLaneModel:
        return VmapLaneModel(backbone)
