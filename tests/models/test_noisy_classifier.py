"""NoisyLatentImageClassifier: a frozen diffusion run makes its latents, its U-Net gives the network's sizes."""

import pytest
import torch
import yaml

from ldm import checkpoint
from ldm.modules.unet import EncoderUNetModel, UNetModel
from ldm.util import UserError, instantiate_from_config
from tests.models.test_latent_diffusion import CLASS, KL, batch_of, fit, unet
from tests.reference import filler

LATENT = "ldm.models.diffusion.ddpm.LatentDiffusion"
TARGET = "ldm.models.diffusion.classifier.NoisyLatentImageClassifier"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory of a class-conditional model with cross-attention."""
    params = {"first_stage_config": KL, "cond_stage_config": CLASS, "cond_stage_key": "class_label"}
    params |= {"conditioning_key": "crossattn", "unet_config": unet(), "timesteps": 20, "image_size": 8, "channels": 4}
    config = {"target": LATENT, "params": {**params, "scale_factor": 0.5}}
    folder = tmp_path_factory.mktemp("diffusion")
    model = filler.fill(instantiate_from_config(config), 0)
    content = {"state_dict": model.state_dict(), "config": yaml.safe_dump({"model": config})}
    checkpoint.save_atomic(content, folder / "checkpoints/last.ckpt")
    return folder


def build(run, **params):
    params = {"diffusion_path": str(run), "num_classes": 3, "pool": "adaptive", **params}
    return instantiate_from_config({"target": TARGET, "params": params})


def test_it_learns_from_noisy_latents_and_says_how_much_noise_it_stands(run, tmp_path):
    model = build(run, num_classes=10, log_steps=4)
    assert (
        isinstance(model.model, EncoderUNetModel) and model.model.in_channels == 4 and model.levels() == [0, 5, 10, 15]
    )
    frozen = {k: v.clone() for k, v in model.diffusion_model.state_dict().items()}
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    trainer = fit(model, tmp_path, steps=2)
    assert all(torch.equal(v, frozen[k]) for k, v in model.diffusion_model.state_dict().items())
    assert any(not torch.equal(v, before[k]) for k, v in model.model.state_dict().items())
    wanted = {"train/loss", "val/loss", "val/acc@1", "val/acc@5", *(f"val/acc@1_t{t:04}" for t in (0, 5, 10, 15))}
    assert wanted <= set(trainer.callback_metrics)
    assert trainer.optimizers[0].param_groups[0]["weight_decay"] == 1e-2
    assert not model.train().diffusion_model.training


def test_numbers(run):
    model = filler.fill(build(run, num_classes=4), 1).eval()
    batch, t = batch_of(4), torch.tensor([0, 7, 13, 19])
    torch.manual_seed(0)
    z = model.latents(batch)
    noisy = model.diffusion_model.q_sample(z, t)
    torch.manual_seed(0)
    again = model.latents(batch)
    loss, logits = model.step_at(again, batch["class_label"], t)
    torch.testing.assert_close(logits, model.model(noisy, t))
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, batch["class_label"]))
    answers = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 3.0, 2.0]])
    assert [float(model.compute_top_k(answers, torch.tensor([1, 3]), k)) for k in (1, 2, 5)] == [0.0, 1.0, 1.0]
    pictures = model.log_images(batch, n=2)
    assert set(pictures) == {"inputs", "noised", "predictions"} and len(pictures["predictions"]) == 2


def test_segmentations_are_read_at_the_size_of_the_latents(run):
    model = filler.fill(build(run, label_key="segmentation"), 1)
    assert isinstance(model.model, UNetModel)
    labels = torch.arange(256).reshape(1, 16, 16).remainder(3).expand(4, -1, -1)
    batch = {**batch_of(4), "segmentation": torch.nn.functional.one_hot(labels, 3).float()}
    assert torch.equal(model.get_conditioning(batch), labels[:, ::2, ::2])
    loss, logs = model.loss(batch)
    assert loss.isfinite() and set(logs) == {"loss", "acc@1", "acc@5"}
    assert model(torch.zeros(2, 4, 8, 8), torch.zeros(2)).shape == (2, 3, 8, 8)


def test_its_own_checkpoint_may_lack_the_diffusion_model(run, tmp_path):
    model = filler.fill(build(run), 2)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("diffusion_model.")}
    checkpoint.save_atomic({"state_dict": state}, tmp_path / "classifier.ckpt")
    again = build(run, ckpt_path=str(tmp_path / "classifier.ckpt"))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.model.state_dict(prefix="model.").items())


def test_what_it_cannot_use(run, tmp_path):
    with pytest.raises(UserError, match="label_key: got 'text'"):
        build(run, label_key="text")
    config = {"target": KL["target"], "params": KL["params"]}
    content = {"state_dict": instantiate_from_config(config).state_dict(), "config": yaml.safe_dump({"model": config})}
    checkpoint.save_atomic(content, tmp_path / "checkpoints/last.ckpt")
    with pytest.raises(UserError, match="is a AutoencoderKL, expected LatentDiffusion"):
        build(tmp_path)
