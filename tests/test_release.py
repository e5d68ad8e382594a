import pytest
import torch
from omegaconf import OmegaConf

from ldm import generate
from ldm.release import release
from ldm.util import UserError, instantiate_from_config

STAGE = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {
        "embed_dim": 2,
        "lossconfig": {"target": "ldm.modules.losses.PixelKL"},
        "ddconfig": {
            "double_z": True, "z_channels": 2, "resolution": 16, "in_channels": 3, "out_ch": 3, "patch_size": 2,
            "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [],
        },
    },
}  # fmt: skip
MODEL = {
    "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
    "params": {
        "first_stage_config": STAGE,
        "parameterization": "flow",
        "image_size": 4,
        "channels": 2,
        "scale_factor": "auto",
        "cond_stage_key": "caption",
        "conditioning_key": "crossattn",
        "cond_stage_trainable": True,
        "cond_stage_config": {
            "target": "ldm.modules.words.WordEmbedder",
            "params": {"words": ["red", "cat"], "dim": 16, "depth": 1, "heads": 2, "max_length": 5},
        },
        "unet_config": {
            "target": "ldm.modules.dit.DiT",
            "params": {
                "image_size": 4,
                "in_channels": 2,
                "hidden_size": 16,
                "depth": 1,
                "num_heads": 2,
                "context_dim": 16,
            },
        },
    },
}


def saved(folder):
    """A run with averaged weights that differ from the last ones."""
    torch.manual_seed(0)
    model = instantiate_from_config(MODEL)
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    for _, shadow in model.model_ema.named_buffers():
        if shadow.is_floating_point() and shadow.ndim:
            shadow += 0.05 * torch.randn_like(shadow)
    model.scale_factor.fill_(0.8)
    (folder / "checkpoints").mkdir(parents=True)
    content = {"state_dict": model.state_dict(), "config": OmegaConf.to_yaml({"model": MODEL}), "class_names": None}
    torch.save(content, folder / "checkpoints" / "last.ckpt")
    return model.eval()


@pytest.mark.parametrize("half", [False, True])
def test_the_released_folder_draws_what_the_run_draws(half, tmp_path):
    model = saved(tmp_path / "run")
    lines = release(tmp_path / "run", tmp_path / "out", {"steps": 3}, half)
    assert len(lines) == 4 and all("MB" in line for line in lines)
    loaded, info = generate.load_run(tmp_path / "out")
    assert info["config"]["sampling"] == {"steps": 3}
    assert not hasattr(loaded, "model_ema") and not any(k.startswith("loss.") for k in loaded.state_dict())
    options = {"seeds": [3, 4], "steps": 3, "sampler": "euler", "scale": 2.0}
    with torch.no_grad(), model.ema_scope():
        expected = model.sample(model.condition([3, 4], prompts=["red cat"]), **options)
    got = loaded.sample(loaded.condition([3, 4], prompts=["red cat"]), **options)
    assert (got - expected).abs().max() < (0.02 if half else 1e-5)
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    parameters = sum(p.numel() for n, p in loaded.named_parameters() if not n.startswith("first_stage_model."))
    assert size < parameters * (2 if half else 4) + 20_000


def test_the_first_stage_is_a_model_of_its_own(tmp_path):
    model = saved(tmp_path / "run")
    release(tmp_path / "run", tmp_path / "out", half=False)
    stage, _ = generate.load_run(tmp_path / "out" / "first_stage")
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(stage.encode(x).mean, model.first_stage_model.encode(x).mean)


def test_what_is_no_run_is_told(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        release(tmp_path / "nothing", tmp_path / "out")
