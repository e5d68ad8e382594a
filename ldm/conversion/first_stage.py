"""First stages (AutoencoderKL and VQModel): names of their tensors, and their sizes in both forms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.conversion.rows import Row, under
from ldm.util import UserError

KL, VQ = "AutoencoderKL", "VQModel"
DEFAULTS: dict[str, Any] = {
    "ch_mult": (1, 2, 4, 8),
    "double_z": True,
    "attn_type": "vanilla",
    "resamp_with_conv": True,
    "use_linear_attn": False,
    "tanh_out": False,
    "give_pre_end": False,
}
# what diffusers' classes cannot be told to be
ONLY_HERE = {"resamp_with_conv": True, "use_linear_attn": False, "tanh_out": False, "give_pre_end": False}
ATTENTION_TYPES = ("vanilla", "vanilla-xformers", "none")
RES_BLOCK = [Row("", ""), Row("nin_shortcut", "conv_shortcut")]
ATTENTION = [
    Row("norm", "group_norm"),
    Row("q", "to_q", kernel=2),
    Row("k", "to_k", kernel=2),
    Row("v", "to_v", kernel=2),
    Row("proj_out", "to_out.0", kernel=2),
]
ENDS = ("conv_in", "conv_out")
# names of diffusers before 0.13, which many folders on the hub still hold
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def full_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """`ddconfig` with its defaults, and embed_dim, n_embed of the whole.

    Raises:
        UserError: a network that diffusers cannot express.
    """
    p = {**DEFAULTS, **params["ddconfig"], "embed_dim": params["embed_dim"], "n_embed": params.get("n_embed")}
    odd = [f"{k}={p[k]}" for k, fine in ONLY_HERE.items() if p[k] != fine]
    odd += [f"attn_type={p['attn_type']}"] if p["attn_type"] not in ATTENTION_TYPES else []
    if p["n_embed"] is None and p["embed_dim"] != p["z_channels"]:
        odd.append(f"embed_dim={p['embed_dim']} with z_channels={p['z_channels']}")
    if params.get("remap"):
        odd.append("remap")
    if odd:
        raise UserError(f"diffusers' autoencoders cannot express {odd[0]}; --to safetensors keeps the network as it is")
    return p


def has_attention(p: Mapping[str, Any]) -> list[bool]:
    """For each level."""
    sizes = [p["resolution"] // 2**i for i in range(len(p["ch_mult"]))]
    return [p["attn_type"] != "none" and size in p["attn_resolutions"] for size in sizes]


def rows(p: Mapping[str, Any]) -> list[Row]:
    """Official names and diffusers' names."""
    last, attends = len(p["ch_mult"]) - 1, has_attention(p)
    out = [Row("quant_conv", "quant_conv"), Row("post_quant_conv", "post_quant_conv"), Row("quantize", "quantize")]
    for half in ("encoder", "decoder"):
        out += [Row(f"{half}.{end}", f"{half}.{end}") for end in ENDS]
        out += [Row(f"{half}.norm_out", f"{half}.conv_norm_out")]
        for i in (1, 2):
            out += under(f"{half}.mid.block_{i}", f"{half}.mid_block.resnets.{i - 1}", RES_BLOCK)
        out += under(f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0", ATTENTION)
    for level, attention in enumerate(attends):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{last - level}"
        out += _level(f"encoder.down.{level}", down, p["num_res_blocks"], attention)
        out += _level(f"decoder.up.{level}", up, p["num_res_blocks"] + 1, attention)
        if level < last:
            out.append(Row(f"encoder.down.{level}.downsample.conv", f"{down}.downsamplers.0.conv"))
        if level > 0:
            out.append(Row(f"decoder.up.{level}.upsample.conv", f"{up}.upsamplers.0.conv"))
    return out


def _level(ours: str, theirs: str, count: int, attention: bool) -> list[Row]:
    out: list[Row] = []
    for i in range(count):
        out += under(f"{ours}.block.{i}", f"{theirs}.resnets.{i}", RES_BLOCK)
        out += under(f"{ours}.attn.{i}", f"{theirs}.attentions.{i}", ATTENTION) if attention else []
    return out


def to_config(p: Mapping[str, Any], scale: float, sample_size: int, force_upcast: bool = False) -> dict[str, Any]:
    """config.json; `scale` is what latents are multiplied by, `sample_size` that of pictures."""
    attends = has_attention(p)
    config = {
        "_class_name": KL if p["n_embed"] is None else VQ,
        "in_channels": p["in_channels"],
        "out_channels": p["out_ch"],
        "down_block_types": ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attends],
        "up_block_types": ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attends)],
        "block_out_channels": [m * p["ch"] for m in p["ch_mult"]],
        "layers_per_block": p["num_res_blocks"],
        "act_fn": "silu",
        "norm_num_groups": 32,
        "latent_channels": p["z_channels"],
        "mid_block_add_attention": p["attn_type"] != "none",
        "sample_size": sample_size,
        "scaling_factor": scale,
        "force_upcast": force_upcast,
    }
    if p["n_embed"] is not None:
        config |= {"num_vq_embeddings": p["n_embed"], "vq_embed_dim": p["embed_dim"]}
    return config


def from_config(config: Mapping[str, Any], where: str = "vae") -> dict[str, Any]:
    """Parameters of `AutoencoderKL` or `VQModelInterface` for a config.json.

    Raises:
        UserError: a network that they cannot express.
    """
    channels, quantised = config["block_out_channels"], config["_class_name"] == VQ
    odd = [b for b in config["down_block_types"] if b not in ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")]
    odd += [f"width {c}" for c in channels if c % channels[0]]
    plain = {"use_quant_conv": True, "use_post_quant_conv": True, "shift_factor": None, "latents_mean": None}
    odd += [k for k, fine in plain.items() if (config.get(k, fine) or None) != (fine or None)]
    if config.get("norm_type", "group") != "group":
        odd.append("norm_type")
    if odd:
        raise UserError(f"{where}/config.json: {odd[0]} has no counterpart in the official autoencoders")
    resolution = config.get("sample_size") or 256
    resolution = resolution if isinstance(resolution, int) else resolution[0]
    attends = [2**i for i, b in enumerate(config["down_block_types"]) if b.startswith("Attn")]
    ddconfig = {
        "double_z": not quantised,
        "z_channels": config["latent_channels"],
        "resolution": resolution,
        "in_channels": config["in_channels"],
        "out_ch": config["out_channels"],
        "ch": channels[0],
        "ch_mult": [c // channels[0] for c in channels],
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [resolution // f for f in attends],
        "dropout": 0.0,
    }
    if not config.get("mid_block_add_attention", True):
        ddconfig["attn_type"] = "none"
    params = {"embed_dim": config.get("vq_embed_dim") or config["latent_channels"], "ddconfig": ddconfig}
    if quantised:
        params["n_embed"] = config["num_vq_embeddings"]
    return {**params, "lossconfig": {"target": "torch.nn.Identity"}}


def modern_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors of a diffusers autoencoder under today's names."""
    out = {}
    for name, tensor in state.items():
        for old, new in OLD_NAMES.items():
            name = name.replace(old, new)
        out[name] = tensor
    return out
