"""Small GANs, data for them, and a Trainer."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader, Dataset

from ldm.models.gan import GAN
from ldm.models.stylegan2 import StyleGAN2

ADAM = {"target": "torch.optim.Adam", "params": {"betas": [0.0, 0.99]}}


class Blobs(Dataset):
    """Pictures [size, size, channels]: class 0 is bright at the left, class 1 at the right."""

    def __init__(self, n=64, size=8, channels=1):
        rng = torch.Generator().manual_seed(0)
        self.x = torch.full((n, size, size, channels), -0.8) + 0.1 * torch.randn(n, size, size, channels, generator=rng)
        self.y = torch.arange(n) % 2
        half = size // 2
        self.x[0::2, :, :half] += 1.5
        self.x[1::2, :, half:] += 1.5
        self.x.clamp_(-1, 1)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"image": self.x[i], "class_label": self.y[i]}


def loader(batch_size=8, **kwargs):
    return DataLoader(Blobs(**kwargs), batch_size=batch_size, shuffle=True, drop_last=True)


def trainer(path, **kwargs):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    return pl.Trainer(default_root_dir=path, enable_checkpointing=False, num_sanity_val_steps=0, **{**quiet, **kwargs})


def scaled_trainer(path, precision, device="cpu", **kwargs):
    """One of three steps; 16-mixed has a scaler, which Lightning makes for GPUs only."""
    if precision != "16-mixed":
        return trainer(path, max_steps=3, precision=precision, **kwargs)
    scaler = torch.amp.GradScaler(device, init_scale=4.0)
    return trainer(path, max_steps=3, plugins=MixedPrecision("16-mixed", device, scaler), **kwargs)


def spoil_loss(monkeypatch, model, player):
    """Makes the loss of one player NaN."""
    name = f"{player}_loss"
    loss_of = getattr(model, name)

    def spoilt(batch):
        loss, logs = loss_of(batch)
        return loss * float("nan"), logs

    monkeypatch.setattr(model, name, spoilt)


def small_gan(size=8, conditioning=None, norm="none", lr=2e-3, **params):
    torch.manual_seed(0)
    shape = {"img_resolution": size, "img_channels": 1, "channels": 8}
    d = {**shape, "norm": norm, **({"conditioning": conditioning} if conditioning else {})}
    model = GAN(
        {"target": "ldm.modules.dcgan.DCGANGenerator", "params": {**shape, "z_dim": 8}},
        {"target": "ldm.modules.dcgan.DCGANDiscriminator", "params": d},
        **{"optimizer_config": ADAM, **params},
    )
    model.learning_rate = lr
    return model


def stylegan_config(size=16, channels=1, discriminator=True, **generator):
    shape = {"img_resolution": size, "img_channels": channels, "channel_base": 128, "channel_max": 16}
    own = {**shape, "z_dim": 8, "w_dim": 8, "mapping_kwargs": {"num_layers": 2}, "num_fp16_res": 0, **generator}
    config = {"generator_config": {"target": "ldm.modules.stylegan2.Generator", "params": own}}
    if discriminator:
        other = {"target": "ldm.modules.stylegan2.Discriminator", "params": {**shape, "num_fp16_res": 0}}
        config["discriminator_config"] = other
    return config


def small_stylegan(size=16, channels=1, **params):
    torch.manual_seed(0)
    model = StyleGAN2(**stylegan_config(size, channels), **{"optimizer_config": ADAM, **params})
    model.learning_rate = 2e-3
    return model
