"""A small model of every timm family. A family is the module of timm.models that defines the model.

Arguments make a model smaller if timm's smallest is large or slow. Images are as small as the model allows with more
than one place in the last feature map.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models import _registry
from torch import nn

from .cases import CLASSES, SEED

# Family: name, arguments, image size.
FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "beit": ("beit_base_patch16_224", {"depth": 2, "embed_dim": 192, "num_heads": 3}, 64),
    "byoanet": ("eca_botnext26ts_256", {}, 64),
    "byobnet": ("test_byobnet", {}, 64),
    "cait": ("cait_xxs24_224", {"depth": 1}, 64),
    "coat": ("coat_tiny", {}, 64),
    "convit": ("convit_tiny", {"depth": 1}, 64),
    "convmixer": ("convmixer_768_32", {}, 64),
    "convnext": ("test_convnext", {}, 64),
    "cpubone": ("cpubone_nano", {}, 64),
    "crossvit": ("crossvit_tiny_240", {}, 240),
    "csatv2": ("csatv2", {}, 64),
    "cspnet": ("cs3darknet_focus_s", {}, 64),
    "cspnext": ("cspnext_tiny", {}, 64),
    "davit": ("davit_tiny", {"depths": (1, 1, 1, 1)}, 64),
    "deepseek_vit": ("deepseek_vit_412m", {"depth": 2, "embed_dim": 192, "num_heads": 3}, 126),
    "deit": ("deit_tiny_patch16_224", {"depth": 1}, 64),
    "densenet": ("densenet121", {}, 64),
    "dla": ("dla46x_c", {}, 64),
    "dpn": ("dpn48b", {}, 64),
    "edgenext": ("edgenext_xx_small", {}, 64),
    "efficientformer": ("efficientformer_l1", {"embed_dims": (32, 64, 96, 128), "depths": (1, 1, 1, 1)}, 224),
    "efficientformer_v2": ("efficientformerv2_s0", {}, 64),
    "efficientnet": ("test_efficientnet", {}, 64),
    "efficientvim": ("efficientvim_m1", {"depths": (1, 1, 1)}, 64),
    "efficientvit_mit": ("efficientvit_b0", {}, 64),
    "efficientvit_msra": ("efficientvit_m0", {}, 64),
    "eva": ("vit_tiny_patch16_dinov3_qkvb", {"depth": 1}, 64),
    "fasternet": ("fasternet_t0", {}, 64),
    "fastvit": ("fastvit_t8", {}, 64),
    "focalnet": ("focalnet_tiny_srf", {}, 64),
    "gcvit": ("gcvit_xxtiny", {}, 64),
    "gemma4_vit": ("gemma4_vit_167m", {"depth": 2, "embed_dim": 192, "num_heads": 3}, 64),
    "ghostnet": ("ghostnet_050", {}, 64),
    "hardcorenas": ("hardcorenas_b", {}, 64),
    "hgnet": ("hgnetv2_b0", {}, 64),
    "hiera": ("hiera_tiny_224", {"stages": (1, 1, 1, 1)}, 64),
    "hieradet_sam2": ("sam2_hiera_tiny", {"stages": (1, 1, 1, 1)}, 64),
    "hrnet": ("hrnet_w18_small", {}, 64),
    "iformer": ("iformer_t", {}, 64),
    "inception_next": ("inception_next_atto", {}, 64),
    "inception_resnet_v2": ("inception_resnet_v2", {}, 96),
    "inception_v3": ("inception_v3", {}, 96),
    "inception_v4": ("inception_v4", {}, 96),
    "lcnetv2": ("lcnetv2_small", {}, 64),
    "levit": ("levit_128s", {}, 64),
    "lowformer": ("lowformer_b0", {}, 64),
    "mambaout": ("test_mambaout", {}, 64),
    "maxxvit": ("test_coatnet", {}, 64),
    "metaformer": ("poolformerv2_s12", {}, 64),
    "mlp_mixer": ("gmlp_ti16_224", {}, 64),
    "mobilenetv3": ("lcnet_035", {}, 64),
    "mobilenetv5": ("mobilenetv5_base", {"channel_multiplier": 0.25}, 64),
    "mobilevit": ("mobilevit_xxs", {}, 64),
    "mvitv2": ("mvitv2_tiny", {}, 64),
    "naflexvit": ("naflexvit_base_patch16_parfac_gap", {"depth": 2, "embed_dim": 192, "num_heads": 3}, 64),
    "nasnet": ("nasnetalarge", {}, 64),
    "nest": ("nest_tiny", {}, 64),
    "nextvit": ("nextvit_small", {}, 64),
    "nfnet": ("test_nfnet", {}, 64),
    "pit": ("pit_ti_224", {}, 64),
    "pnasnet": ("pnasnet5large", {}, 64),
    "pvt_v2": ("pvt_v2_b0", {}, 64),
    "qwen3_vit": ("qwen3_vit_88m", {"depth": 2, "embed_dim": 192, "num_heads": 3}, 64),
    "rdnet": ("rdnet_tiny", {}, 64),
    "regnet": ("regnetx_002", {}, 64),
    "repghost": ("repghostnet_050", {}, 64),
    "repvit": ("repvit_m1", {}, 64),
    "res2net": ("res2next50", {"layers": (1, 1, 1, 1)}, 64),
    "resnest": ("resnest14d", {"base_width": 16}, 64),
    "resnet": ("test_resnet", {}, 64),
    "resnetv2": ("resnetv2_18", {"layers": (1, 1, 1)}, 64),
    "rexnet": ("rexnet_100", {}, 64),
    "selecsls": ("selecsls42", {}, 64),
    "senet": ("legacy_seresnet18", {"layers": (1, 1, 1, 1)}, 64),
    "sequencer": ("sequencer2d_s", {"layers": (1, 1, 1, 1)}, 32),
    "shvit": ("shvit_s1", {}, 64),
    "sknet": ("skresnet18", {"layers": (1, 1, 1, 1)}, 64),
    "starnet": ("starnet_s050", {}, 64),
    "swiftformer": ("swiftformer_xs", {}, 64),
    "swin_transformer": ("swin_tiny_patch4_window7_224", {"depths": (2, 1)}, 64),
    "swin_transformer_v2": ("swinv2_tiny_window8_256", {"depths": (2, 1)}, 64),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", {"depths": (2, 1)}, 64),
    "tiny_vit": ("tiny_vit_5m_224", {"depths": (1, 1, 1, 1)}, 64),
    "tnt": ("tnt_s_legacy_patch16_224", {"depth": 2, "embed_dim": 192}, 64),
    "tresnet": ("tresnet_m", {"layers": (1, 1, 1, 1)}, 64),
    "twins": ("twins_svt_small", {"embed_dims": (32, 64, 96, 128), "depths": (1, 1, 1, 1)}, 64),
    "vgg": ("vgg11", {"mlp_ratio": 0.0625}, 64),
    "visformer": ("visformer_tiny", {"depth": 1}, 64),
    "vision_transformer": ("test_vit", {}, 64),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", {"depth": 1}, 64),
    "vision_transformer_relpos": ("test_vit_relpos", {}, 64),
    "vision_transformer_sam": ("samvit_base_patch16_224", {"depth": 2, "embed_dim": 192, "num_heads": 3}, 64),
    "vitamin": ("vitamin_small_224", {"depth": 1}, 64),
    "volo": ("volo_d1_224", {}, 64),
    "vovnet": ("ese_vovnet19b_slim_dw", {}, 64),
    "xception": ("legacy_xception", {}, 64),
    "xception_aligned": ("xception41p", {}, 64),
    "xcit": ("xcit_nano_12_p8_224", {}, 64),
}


# Families whose cells take longest. Only --slow runs them.
LONG_FAMILIES = frozenset(
    [
        "coat",
        "convmixer",
        "crossvit",
        "davit",
        "focalnet",
        "gcvit",
        "inception_resnet_v2",
        "inception_v3",
        "inception_v4",
        "lcnetv2",
        "lowformer",
        "metaformer",
        "mlp_mixer",
        "mobilenetv5",
        "mobilevit",
        "mvitv2",
        "nasnet",
        "nest",
        "nextvit",
        "pnasnet",
        "rdnet",
        "selecsls",
        "volo",
        "xception",
        "xception_aligned",
        "xcit",
    ]
)


def known_families() -> set[str]:
    """The families of the installed timm."""
    return {_registry._model_to_module[name] for name in timm.list_models()}


def make_family_model(family: str, with_dropout: bool = False) -> nn.Module:
    """A random model in eval mode. No parameter or statistic has its initial value of 0 or 1."""
    name, arguments, image_size = FAMILIES[family]
    if timm.get_pretrained_cfg(name).fixed_input_size:
        arguments = {**arguments, "img_size": image_size}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = timm.create_model(name, num_classes=CLASSES, **arguments).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
            for module in model.modules():
                if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                    module.momentum = 1.0
            model.train()(torch.randn(4, 3, image_size, image_size))  # fills the statistics
    if not with_dropout:
        model.drop_rate = 0.0
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif hasattr(module, "drop_prob"):
                module.drop_prob = 0.0
    return model.eval()
