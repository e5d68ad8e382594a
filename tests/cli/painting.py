"""Tiny models of the real classes, saved as official checkpoints, and a way to run the painting scripts on them."""

import importlib
import sys

import numpy as np
import torch
import yaml
from PIL import Image

from ldm.util import instantiate_from_config
from scripts import common

UNET = {
    "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
    "params": {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "attention_resolutions": [2, 1],
        "num_res_blocks": 1,
        "channel_mult": [1, 2],
        "num_heads": 2,
        "use_spatial_transformer": True,
        "transformer_depth": 1,
        "context_dim": 32,
        "use_checkpoint": True,
        "legacy": False,
    },
}
DD = {"double_z": True, "z_channels": 4, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32}
DD |= {"ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
KL = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {"embed_dim": 4, "ddconfig": DD, "lossconfig": {"target": "torch.nn.Identity"}},
}
CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {
    "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
    "params": {"clip_config": CLIP},
}
SD = {
    "linear_start": 0.00085,
    "linear_end": 0.012,
    "timesteps": 1000,
    "first_stage_key": "jpg",
    "cond_stage_key": "txt",
    "image_size": 8,
    "channels": 4,
    "conditioning_key": "crossattn",
    "scale_factor": 0.18215,
    "use_ema": False,
    "unet_config": UNET,
    "first_stage_config": KL,
    "cond_stage_config": TEXT,
}
VQ = {
    "target": "ldm.models.autoencoder.VQModelInterface",
    "params": {
        "embed_dim": 3,
        "n_embed": 16,
        "ddconfig": {**DD, "double_z": False, "z_channels": 3, "ch_mult": [1, 1, 1], "attn_type": "none"},
        "lossconfig": {"target": "ldm.modules.losses.contperceptual.DummyLoss"},
    },
}


def unet(**params):
    return {**UNET, "params": {**UNET["params"], **params}}


def without_text(**params):
    """A U-Net without cross-attention."""
    kept = {k: v for k, v in UNET["params"].items() if "transformer" not in k and k not in ("context_dim", "legacy")}
    return {**UNET, "params": {**kept, **params}}


INPAINT_SD = {**SD, "conditioning_key": "hybrid", "concat_keys": ["mask", "masked_image"]}
INPAINT_SD |= {"unet_config": unet(in_channels=9)}
INPAINT_LDM = {
    "linear_start": 0.0015,
    "linear_end": 0.0205,
    "timesteps": 1000,
    "first_stage_key": "image",
    "cond_stage_key": "masked_image",
    "image_size": 8,
    "channels": 3,
    "concat_mode": True,
    "use_ema": False,
    "unet_config": without_text(in_channels=7, out_channels=3, resblock_updown=True),
    "first_stage_config": VQ,
    "cond_stage_config": "__is_first_stage__",
}


def build(params, seed=0):
    """A model with random weights that do something: layers that start at zero get weights too."""
    torch.manual_seed(seed)
    config = {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}
    model = instantiate_from_config(config).eval()
    for name, p in model.named_parameters():
        if not p.any() and p.ndim > 1:
            torch.nn.init.normal_(p, std=0.05)
        elif name.endswith("decoder.conv_out.weight"):
            p.data.mul_(3)  # pictures with some contrast
    return config, model


def save(folder, params=SD, name="model.ckpt", seed=0, edit=None):
    """(config file, checkpoint file) of a random model; `edit` changes its state dict."""
    config, model = build(params, seed)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    state = state if edit is None else edit(state)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": config}))
    if name.endswith(".safetensors"):
        from safetensors.torch import save_file

        save_file({k: v.contiguous() for k, v in state.items()}, folder / name)
    else:
        torch.save({"state_dict": state, "global_step": 470000}, folder / name)
    return folder / "config.yaml", folder / name


def run(script, *argv, code=0):
    """Runs a script in this process as a user would."""
    module = importlib.import_module(f"scripts.{script}")
    old, sys.argv = sys.argv, [f"{script}.py", *map(str, argv)]
    try:
        assert common.main(module.build_parser(), module.run, common.PAINT_KNOBS) == code
    finally:
        sys.argv = old


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def picture(path, size=(32, 32), mode="RGB", seed=0):
    """A smooth random picture."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    image = small.resize(size, Image.Resampling.BICUBIC).convert(mode)
    image.save(path)
    return path
