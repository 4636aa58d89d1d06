"""Tensor names of Hugging Face's ViT, DeiT, DINOv2 and CLIP, translated to timm's names."""

import re
from collections.abc import Mapping

import torch

State = dict[str, torch.Tensor]

MARKS = ("embeddings.patch_embeddings.projection.weight", "embeddings.patch_embedding.weight")
UNUSED = ("pooler.", "embeddings.position_ids")

# Applied in this order. timm's own filter then translates the rest of DINOv2's names.
RENAMES = (
    (r"^encoder\.layers?\.", "blocks."),
    (r"^embeddings\.patch_embeddings?\.(projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.(cls_token|class_embedding)$", "cls_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.position_embeddings?(\.weight)?$", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^(post_layernorm|layernorm)\.", "norm."),
    (r"\.(attention\.attention\.(?=query|key|value)|self_attn\.(?=[qkv]_proj))", ".attn."),
    (r"\.(attention\.output\.dense|self_attn\.out_proj)\.", ".attn.proj."),
    (r"\.(layernorm_before|layer_norm1)\.", ".norm1."),
    (r"\.(layernorm_after|layer_norm2)\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
)
PROJECTION = re.compile(r"(.*\.attn\.)(query|key|value|[qkv]_proj)\.(weight|bias)")


def are_hugging_faces(names: Mapping[str, object]) -> bool:
    """Whether the names, without a prefix such as `vit.`, are Hugging Face's."""
    return any(mark in names for mark in MARKS)


def to_timm(state: Mapping[str, torch.Tensor]) -> State:
    """The tensors under timm's names, with queries, keys and values in one tensor."""
    renamed: State = {}
    parts: dict[str, State] = {}
    for name, tensor in state.items():
        if name.startswith(UNUSED):
            continue
        for old, new in RENAMES:
            name = re.sub(old, new, name)
        if found := PROJECTION.fullmatch(name):
            parts.setdefault(f"{found[1]}qkv.{found[3]}", {})[found[2][0]] = tensor
        else:
            renamed[name] = tensor
    for name in ("cls_token", "pos_embed"):  # CLIP's tensors have no batch axis
        if name in renamed:
            renamed[name] = renamed[name].reshape(1, -1, renamed[name].shape[-1])
    return renamed | {name: torch.cat([part[x] for x in "qkv"]) for name, part in parts.items() if len(part) == 3}
