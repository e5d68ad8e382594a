"""A classifier of noisy latents, as classifier guidance needs it (Dhariwal & Nichol 2021, section 4)."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.generate import load_run
from ldm.models.base import BaseModel
from ldm.models.diffusion.latent_diffusion import LatentDiffusion
from ldm.models.diffusion.pictures import noising, row
from ldm.modules.unet import EncoderUNetModel, UNetModel
from ldm.util import UserError, log_txt_as_img

NETWORKS: dict[str, type[nn.Module]] = {"class_label": EncoderUNetModel, "segmentation": UNetModel}


class NoisyLatentImageClassifier(BaseModel):
    """Says from a latent x_t and t what the picture shows. The diffusion model makes the latents and the noise.

    Args:
        diffusion_path: run directory or checkpoint of a `LatentDiffusion`, which is frozen.
        num_classes: labels, or classes of a segmentation.
        pool: of `EncoderUNetModel`.
        label_key: class_label (int64 [B], one answer a picture) or segmentation ([B, H, W, num_classes], one answer a
            latent pixel); batch[label_key] has them. The network is the encoder half of the diffusion model's U-Net, or
            all of it.
        diffusion_ckpt_path: another checkpoint of the same run.
        weight_decay: of AdamW.
        log_steps: at so many noise levels the accuracy is logged in validation.

    Raises:
        UserError: the run is of no latent diffusion model, or label_key is another one.
    """

    tolerated_keys = ("diffusion_model.",)  # comes from its own run

    def __init__(
        self,
        diffusion_path: str,
        num_classes: int,
        ckpt_path: str | None = None,
        pool: str = "attention",
        label_key: str = "class_label",
        diffusion_ckpt_path: str | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
        weight_decay: float = 1e-2,
        log_steps: int = 10,
        monitor: str | None = "val/loss",
        **base: Any,
    ) -> None:
        base.setdefault("optimizer_config", {"target": "torch.optim.AdamW", "params": {"weight_decay": weight_decay}})
        super().__init__(monitor=monitor, ckpt_path=ckpt_path, scheduler_config=scheduler_config, **base)
        if label_key not in NETWORKS:
            raise UserError(f"label_key: got {label_key!r}, expected one of {', '.join(NETWORKS)}")
        self.num_classes, self.label_key, self.log_steps = num_classes, label_key, log_steps
        diffusion, info = load_run(diffusion_ckpt_path or diffusion_path)
        if not isinstance(diffusion, LatentDiffusion):
            kind = type(diffusion).__name__
            raise UserError(f"diffusion_path {diffusion_path} is a {kind}, expected LatentDiffusion")
        self.diffusion_model = diffusion
        self.model = self.build_network(info["config"]["model"]["params"]["unet_config"]["params"], pool)
        self.load_ckpt_path()

    def build_network(self, unet: Mapping[str, Any], pool: str) -> nn.Module:
        """The network of the diffusion model's sizes: its latents in, `num_classes` out."""
        network = NETWORKS[self.label_key]
        params = {**copy.deepcopy(dict(unet)), "in_channels": unet["out_channels"], "out_channels": self.num_classes}
        params["pool"] = pool
        known = inspect.signature(network.__init__).parameters
        return network(**{k: v for k, v in params.items() if k in known and k not in ("context_dim", "num_classes")})

    def train(self, mode: bool = True) -> NoisyLatentImageClassifier:
        """The diffusion model stays in eval mode."""
        super().train(mode)
        self.diffusion_model.eval()
        return self

    def forward(self, x_noisy: Tensor, t: Tensor) -> Tensor:
        """x_t [B, C, h, w], t [B] -> logits [B, num_classes] or [B, num_classes, h, w]."""
        return self.model(x_noisy, t)

    def get_conditioning(self, batch: Mapping[str, Any], k: str | None = None) -> Tensor:
        """The right answers: int64 [B], or [B, h, w] of the size of the latents."""
        targets = batch[k or self.label_key]
        if self.label_key != "segmentation":
            return targets
        factor = self.diffusion_model.downsampling
        maps = targets.permute(0, 3, 1, 2).float()
        return F.interpolate(maps, scale_factor=1 / factor, mode="nearest").argmax(dim=1)

    def compute_top_k(self, logits: Tensor, labels: Tensor, k: int) -> Tensor:
        """The share of answers whose label is among the k likeliest."""
        best = logits.topk(min(k, self.num_classes), dim=1).indices
        return (best == labels[:, None]).any(dim=1).float().mean()

    def latents(self, batch: Mapping[str, Any]) -> Tensor:
        """Scaled latents [B, C, h, w] of the batch's pictures."""
        with torch.no_grad():
            return self.diffusion_model.latents_of(batch)

    def step_at(self, z: Tensor, targets: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(cross-entropy, logits) at times t [B]."""
        logits = self(self.diffusion_model.q_sample(z, t), t)
        return F.cross_entropy(logits, targets), logits

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        z, targets = self.latents(batch), self.get_conditioning(batch)
        t = torch.randint(0, self.diffusion_model.num_timesteps, (len(z),), device=z.device)
        loss, logits = self.step_at(z, targets, t)
        logs = {f"acc@{k}": self.compute_top_k(logits.detach(), targets, k) for k in (1, 5)}
        return loss, {"loss": loss, **logs}

    def levels(self) -> list[int]:
        """The `log_steps` times at which validation looks."""
        total = self.diffusion_model.num_timesteps
        return list(range(0, total, max(1, total // self.log_steps)))

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Also the accuracy at each noise level, `val/acc@1_t0500` and so on."""
        super().validation_step(batch, batch_idx)
        z, targets = self.latents(batch), self.get_conditioning(batch)
        for time in self.levels():
            _, logits = self.step_at(z, targets, torch.full((len(z),), time, device=z.device))
            accuracy = {f"val/acc@{k}_t{time:04}": self.compute_top_k(logits, targets, k) for k in (1, 5)}
            self.log_dict(accuracy, batch_size=len(z), sync_dist=True)

    def trained_parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @torch.no_grad()
    def log_images(self, batch: dict[str, Any], n: int = 8, **_: Any) -> dict[str, Tensor]:
        """inputs, noised (the first of them, with more and more noise), and predictions (for class labels)."""
        diffusion = self.diffusion_model
        batch = {k: v[:n] for k, v in batch.items()}
        x, z = diffusion.pictures_of(batch), self.latents(batch)
        rows = [diffusion.decode_first_stage(s[:4]) for s in noising(diffusion.path, z[:4])]
        pictures = {"inputs": x, "noised": row(rows, 4).clamp(-1, 1)}
        if self.label_key == "class_label":
            targets, size = batch[self.label_key].tolist(), (x.shape[3], x.shape[2])
            answers = [self(z, torch.full((len(z),), t, device=z.device)).argmax(1).tolist() for t in self.levels()[:3]]
            texts = [f"{t}: {', '.join(map(str, a))}" for t, *a in zip(targets, *answers, strict=True)]
            pictures["predictions"] = log_txt_as_img(size, texts)
        return pictures
