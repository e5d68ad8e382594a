"""The U-Net: names of its tensors, and its sizes as parameters of `UNetModel` and as diffusers' config.json.

diffusers splits it into two classes: UNet2DConditionModel (transformers over a context) and UNet2DModel.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ldm.conversion.rows import Row, under
from ldm.util import UserError, get_obj_from_str

CONDITION, PLAIN = "UNet2DConditionModel", "UNet2DModel"
ENDS = [
    Row("time_embed.0", "time_embedding.linear_1"),
    Row("time_embed.2", "time_embedding.linear_2"),
    Row("label_emb", "class_embedding"),
    Row("label_emb.0.0", "add_embedding.linear_1"),
    Row("label_emb.0.2", "add_embedding.linear_2"),
    Row("input_blocks.0.0", "conv_in"),
    Row("out.0", "conv_norm_out"),
    Row("out.2", "conv_out"),
]
RES_BLOCK = [
    Row("in_layers.0", "norm1"),
    Row("in_layers.2", "conv1"),
    Row("emb_layers.1", "time_emb_proj"),
    Row("out_layers.0", "norm2"),
    Row("out_layers.3", "conv2"),
    Row("skip_connection", "conv_shortcut"),
]
TRANSFORMER = [Row("", "")]  # the names below it are the same
# Parameters of UNetModel that diffusers' classes have no counterpart for, and the values at which none is needed.
ONLY_HERE: dict[str, tuple[Any, ...]] = {
    "dims": (2,),
    "conv_resample": (True,),
    "n_embed": (None,),
    "disable_self_attentions": (None, False),
    "num_attention_blocks": (None,),
    "disable_middle_self_attn": (False,),
    "disable_middle_transformer": (False,),
}


def full_params(config: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a U-Net config `{target, params}`, defaults filled in.

    Raises:
        UserError: the target is no U-Net, or a network that diffusers cannot express.
    """
    from ldm.modules.unet import SpatialUNetModel, UNetModel

    cls = get_obj_from_str(config["target"])
    if not (inspect.isclass(cls) and issubclass(cls, UNetModel)):
        raise UserError(f"unet_config.target {config['target']} is no UNetModel: diffusers has no counterpart")
    defaults = {n: p.default for n, p in inspect.signature(UNetModel).parameters.items()}
    if issubclass(cls, SpatialUNetModel):
        defaults |= {"use_spatial_transformer": True, "legacy": False, "image_size": None}
    p = {**defaults, **(config.get("params") or {})}
    p["spatial"] = bool(p["use_spatial_transformer"]) or p["context_dim"] is not None
    _refuse(p)
    return p


def _refuse(p: Mapping[str, Any]) -> None:
    odd = [f"{name}={p[name]}" for name, fine in ONLY_HERE.items() if p[name] not in fine]
    odd += _odd_attention(p)
    if p["channel_mult"][0] != 1:
        odd.append(f"channel_mult={list(p['channel_mult'])} (the first has to be 1)")
    if p["num_classes"] in ("continuous", "timestep"):
        odd.append(f"num_classes={p['num_classes']}")
    if odd:
        raise UserError(f"diffusers' U-Nets cannot express {odd[0]}; --to safetensors keeps the network as it is")


def _odd_attention(p: Mapping[str, Any]) -> list[str]:
    """Choices about attention that diffusers does not have."""
    heads = p["num_head_channels"]
    if not p["spatial"]:
        fine = p["num_heads_upsample"] in (-1, p["num_heads"])
        return [] if fine else [f"num_heads_upsample={p['num_heads_upsample']}"]
    odd = ["resblock_updown beside transformers"] if p["resblock_updown"] else []
    odd += ["transformers without a context (context_dim)"] if p["context_dim"] is None else []
    if not p["legacy"] and heads != -1:
        odd += [f"{c} channels in heads of {heads}" for c in widths(p) if c % heads]
    return odd


def widths(p: Mapping[str, Any]) -> list[int]:
    """Channels of each level."""
    return [m * p["model_channels"] for m in p["channel_mult"]]


def heads_of(p: Mapping[str, Any], channels: int) -> int:
    """Attention heads of a layer with so many channels."""
    return p["num_heads"] if p["num_head_channels"] == -1 else channels // p["num_head_channels"]


def has_attention(p: Mapping[str, Any]) -> list[bool]:
    """For each level."""
    return [2**i in p["attention_resolutions"] for i in range(len(p["channel_mult"]))]


def _per_level(value: Any, p: Mapping[str, Any]) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value] * len(p["channel_mult"])


# --- names ------------------------------------------------------------------------------------------------------------


def rows(p: Mapping[str, Any]) -> list[Row]:
    """Official names below `model.diffusion_model.` and diffusers' names."""
    out, last = list(ENDS), len(p["channel_mult"]) - 1
    depth, attends, updown = _per_level(p["num_res_blocks"], p), has_attention(p), p["resblock_updown"]
    number = 1  # input_blocks.0 is the first convolution
    for level, channels in enumerate(widths(p)):
        theirs = f"down_blocks.{level}"
        for i in range(depth[level]):
            out += _stage(p, f"input_blocks.{number}", theirs, i, channels, attends[level])
            number += 1
        if level < last:
            place, there = f"input_blocks.{number}.0", f"{theirs}.downsamplers.0"
            out += under(place, there, RES_BLOCK) if updown else [Row(f"{place}.op", f"{there}.conv")]
            number += 1
    out += under("middle_block.0", "mid_block.resnets.0", RES_BLOCK)
    out += under("middle_block.1", "mid_block.attentions.0", _attention(p, widths(p)[-1]))
    out += under("middle_block.2", "mid_block.resnets.1", RES_BLOCK)
    number = 0
    for level in range(last, -1, -1):
        theirs = f"up_blocks.{last - level}"
        for i in range(depth[level] + 1):
            out += _stage(p, f"output_blocks.{number}", theirs, i, widths(p)[level], attends[level])
            if level and i == depth[level]:
                place, there = f"output_blocks.{number}.{1 + attends[level]}", f"{theirs}.upsamplers.0"
                out += under(place, there, RES_BLOCK) if updown else [Row(f"{place}.conv", f"{there}.conv")]
            number += 1
    return out


def _stage(p: Mapping[str, Any], ours: str, theirs: str, index: int, channels: int, attends: bool) -> list[Row]:
    out = under(f"{ours}.0", f"{theirs}.resnets.{index}", RES_BLOCK)
    if attends:
        out += under(f"{ours}.1", f"{theirs}.attentions.{index}", _attention(p, channels))
    return out


def _attention(p: Mapping[str, Any], channels: int) -> list[Row]:
    if p["spatial"]:
        return TRANSFORMER
    heads = 1 if p["use_new_attention_order"] else heads_of(p, channels)
    return [
        Row("norm", "group_norm"),
        Row("qkv", ("to_q", "to_k", "to_v"), kernel=1, heads=heads),
        Row("proj_out", "to_out.0", kernel=1),
    ]


# --- sizes ------------------------------------------------------------------------------------------------------------


def to_config(p: Mapping[str, Any], sample_size: Any, upcast_attention: bool = False) -> dict[str, Any]:
    """config.json of diffusers' class.

    Raises:
        UserError: heads of another width on each level, which UNet2DModel has no parameter for.
    """
    depth = _per_level(p["num_res_blocks"], p)
    config = {
        "_class_name": CONDITION if p["spatial"] else PLAIN,
        "sample_size": sample_size,
        "in_channels": p["in_channels"],
        "out_channels": p["out_channels"],
        "block_out_channels": widths(p),
        "layers_per_block": depth[0] if len(set(depth)) == 1 else depth,
        "dropout": float(p["dropout"]),
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "act_fn": "silu",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "resnet_time_scale_shift": "scale_shift" if p["use_scale_shift_norm"] else "default",
    }
    if isinstance(p["num_classes"], int):
        config["num_class_embeds"] = p["num_classes"]
    return config | (_condition_config(p, upcast_attention) if p["spatial"] else _plain_config(p, depth))


def _condition_config(p: Mapping[str, Any], upcast_attention: bool) -> dict[str, Any]:
    attends, heads = has_attention(p), [heads_of(p, c) for c in widths(p)]
    layers = _per_level(p["transformer_depth"], p)
    config = {
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "cross_attention_dim": _one(p["context_dim"]),
        # these are numbers of heads: the name is an old mistake of diffusers
        "attention_head_dim": heads[0] if len(set(heads)) == 1 else heads,
        "transformer_layers_per_block": layers[0] if len(set(layers)) == 1 else layers,
        "use_linear_projection": bool(p["use_linear_in_transformer"]),
        "upcast_attention": upcast_attention,
    }
    if p["num_classes"] == "sequential":
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": p["adm_in_channels"],
        }
    return config


def _one(value: Any) -> Any:
    """The single value of a list of equal ones."""
    if isinstance(value, (list, tuple)):
        if len(set(value)) != 1:
            raise UserError(f"diffusers' U-Nets cannot express context_dim={list(value)}")
        return value[0]
    return value


def _plain_config(p: Mapping[str, Any], depth: list[int]) -> dict[str, Any]:
    attends = has_attention(p)
    used = sorted({c for c, a in zip(widths(p), attends, strict=True) if a} | {widths(p)[-1]})
    sizes = {c // heads_of(p, c) for c in used}
    one_head = all(heads_of(p, c) == 1 for c in used)
    if len(sizes) > 1 and not one_head:
        raise UserError(
            f"diffusers' UNet2DModel has one head width for all levels, this network has heads of {sorted(sizes)} "
            f"channels ({p['num_heads']} heads each); --to safetensors keeps the network as it is"
        )
    if len(set(depth)) != 1:
        raise UserError(f"diffusers' UNet2DModel cannot express num_res_blocks={depth}; use --to safetensors")
    plain = (
        ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if p["resblock_updown"] else ("DownBlock2D", "UpBlock2D")
    )
    resample = "resnet" if p["resblock_updown"] else "conv"
    return {
        "down_block_types": ["AttnDownBlock2D" if a else plain[0] for a in attends],
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": ["AttnUpBlock2D" if a else plain[1] for a in reversed(attends)],
        "attention_head_dim": None if one_head and len(sizes) > 1 else sizes.pop(),
        "downsample_type": resample,
        "upsample_type": resample,
        "downsample_padding": 1,
        "attn_norm_num_groups": 32,  # else no norm in the middle where time scales and shifts
    }


def from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of `UNetModel` for a config.json of either class.

    Raises:
        UserError: a network that `UNetModel` cannot express.
    """
    channels, blocks = config["block_out_channels"], config["down_block_types"]
    conditional = config["_class_name"] == CONDITION
    known = {"CrossAttnDownBlock2D", "DownBlock2D"} if conditional else {"AttnDownBlock2D", "DownBlock2D"}
    known |= set() if conditional else {"ResnetDownsampleBlock2D"}
    width = channels[0]
    odd = [b for b in blocks if b not in known] + [f"width {c}" for c in channels if c % width]
    if config.get("class_embed_type") or config.get("encoder_hid_dim_type"):
        odd.append(str(config.get("class_embed_type") or config.get("encoder_hid_dim_type")))
    if odd:
        raise UserError(f"unet/config.json: {odd[0]} has no counterpart in the official U-Net")
    p: dict[str, Any] = {
        "image_size": config.get("sample_size") or 32,
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": width,
        "attention_resolutions": [2**i for i, b in enumerate(blocks) if "Attn" in b],
        "num_res_blocks": config.get("layers_per_block", 2),
        "channel_mult": [c // width for c in channels],
    }
    if config.get("resnet_time_scale_shift", "default") == "scale_shift":
        p["use_scale_shift_norm"] = True
    if config.get("num_class_embeds"):
        p["num_classes"] = config["num_class_embeds"]
    return p | (_condition_params(config, channels) if conditional else _plain_params(config))


def _condition_params(config: Mapping[str, Any], channels: list[int]) -> dict[str, Any]:
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
    heads = list(heads) if isinstance(heads, (list, tuple)) else [heads] * len(channels)
    size = {c // h for c, h in zip(channels, heads, strict=True)}
    if len(set(heads)) > 1 and len(size) > 1:
        raise UserError(f"unet/config.json: attention_head_dim {heads} has no counterpart in the official U-Net")
    p: dict[str, Any] = {"num_heads": heads[0]} if len(set(heads)) == 1 else {"num_head_channels": size.pop()}
    p |= {
        "use_spatial_transformer": True,
        "transformer_depth": config.get("transformer_layers_per_block", 1),
        "context_dim": config["cross_attention_dim"],
        "legacy": False,
    }
    if config.get("use_linear_projection"):
        p["use_linear_in_transformer"] = True
    if config.get("addition_embed_type") == "text_time":
        p |= {"num_classes": "sequential", "adm_in_channels": config["projection_class_embeddings_input_dim"]}
    return p


def _plain_params(config: Mapping[str, Any]) -> dict[str, Any]:
    head = config.get("attention_head_dim", 8)
    p: dict[str, Any] = {"num_heads": 1} if head is None else {"num_head_channels": head}
    if config.get("downsample_type", "conv") == "resnet":
        p["resblock_updown"] = True
    return p
