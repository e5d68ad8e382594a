"""StyleGAN2 as a recipe: style mixing, path-length regularisation, truncation, and drawing from z to w to image.

Karras et al. 2019, 2020 ("Analyzing and improving the image quality of StyleGAN") and 2020 ("Training GANs with limited
data"); the networks are in ldm/modules/stylegan2.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.models.adversarial import Losses
from ldm.models.base import Config
from ldm.models.gan import GAN
from ldm.modules.gan_losses import PathLength
from ldm.modules.stylegan2_layers import NOISE_MODES
from ldm.modules.stylegan2_mapping import mix_styles, style_mixing
from ldm.util import SeededNoise, UserError


class StyleGAN2(GAN):
    """GAN with the generator of StyleGAN2.

    Both regularisers are lazy (StyleGAN2, appendix B): every few updates, with a weight so much larger, in the same
    step of the optimiser as the loss, so that its learning rate and betas stay as they are.

    Args:
        generator_config, discriminator_config: of `ldm.modules.stylegan2`; num_fp16_res there is mixed precision.
        mixing_prob: share of images with the styles of two latents.
        path_length_weight: of path-length regularisation; 0 leaves it out.
        path_length_interval: updates of the generator per regularisation.
        path_length_shrink: part of the batch that it takes.
        penalty, penalty_weight, penalty_interval: R1 with gamma every 16 updates.
        ema_decay: 0.5 ** (batch size / images of half-life).
        **gan: further arguments of `GAN`.
    """

    def __init__(
        self,
        generator_config: Config,
        discriminator_config: Config | None = None,
        mixing_prob: float = 0.9,
        path_length_weight: float = 2.0,
        path_length_interval: int = 4,
        path_length_shrink: int = 2,
        penalty: str | None = "r1",
        penalty_weight: float = 10.0,
        penalty_interval: int = 16,
        ema_decay: float = 0.998,
        **gan: Any,
    ) -> None:
        weights = {name: gan.pop(name) for name in ("ckpt_path", "ignore_keys") if name in gan}
        lazy = {"penalty": penalty, "penalty_weight": penalty_weight, "penalty_interval": penalty_interval}
        super().__init__(generator_config, discriminator_config, ema_decay=ema_decay, **lazy, **gan)
        self.mixing_prob, self.path_length_weight = mixing_prob, path_length_weight
        self.path_length_interval, self.path_length_shrink = path_length_interval, path_length_shrink
        self.path_length = PathLength()
        self._ckpt_path, self._ignore_keys = weights.get("ckpt_path"), tuple(weights.get("ignore_keys", ()))
        self.load_ckpt_path()

    # --- training -----------------------------------------------------------------------------------------------------

    def encode_classes(self, labels: Tensor) -> Tensor:
        return F.one_hot(labels, self.generator.c_dim).float()

    def _z(self, n: int) -> Tensor:
        return torch.randn(n, self.generator.z_dim, device=self.device)

    def styles(self, n: int, labels: Tensor | None) -> Tensor:
        """ws [n, num_ws, w_dim] as training sees them: the running mean of w follows, and styles mix."""
        mapping, c = self.generator.mapping, self._c(labels)
        ws = mapping(self._z(n), c, update_emas=self.training)
        if self.training and self.mixing_prob > 0:
            ws = style_mixing(ws, mapping(self._z(n), c), self.mixing_prob)
        return ws

    def fake(self, n: int, labels: Tensor | None) -> Tensor:
        return self.generator.synthesis(self.styles(n, labels))

    def generator_loss(self, batch: dict[str, Any]) -> Losses:
        loss, logs = super().generator_loss(batch)
        due = self.path_length_weight > 0 and self.updates % self.path_length_interval == 0
        if not (self.training and due):
            return loss, logs
        x, labels = self.inputs(batch)
        n = max(1, len(x) // self.path_length_shrink)
        ws = self.styles(n, None if labels is None else labels[:n])
        penalty = self.path_length(self.generator.synthesis(ws), ws)
        logs |= {"path_length_penalty": penalty, "path_length": self.path_length.mean}
        return loss + self.path_length_weight * self.path_length_interval * penalty, logs

    # --- drawing ------------------------------------------------------------------------------------------------------

    def map(self, z: Tensor, cond: Tensor | None, truncation: float = 1.0, cutoff: int | None = None) -> Tensor:
        """z [B, z_dim], class numbers [B] -> ws [B, num_ws, w_dim]."""
        return self.generator.mapping(z, self._c(cond), truncation_psi=truncation, truncation_cutoff=cutoff)

    def synthesize(self, ws: Tensor, noise_mode: str = "const", randn: SeededNoise | None = None) -> Tensor:
        """ws [B, num_ws, w_dim] -> images [B, C, H, W] in [-1, 1].

        In float32 whatever the blocks train in, so that a seed gives the same picture on GPU and CPU.
        """
        images = self.generator.synthesis(ws, noise_mode=noise_mode, force_fp32=True, randn=randn)
        return images.clamp(-1, 1)

    @torch.no_grad()
    def sample(
        self,
        cond: Tensor | None = None,
        *,
        seeds: Sequence[int],
        truncation: float = 1.0,
        truncation_cutoff: int | None = None,
        noise_mode: str = "const",
        style_mix: int | None = None,
        mix_layer: int | None = None,
    ) -> Tensor:
        """[len(seeds), C, H, W] in [-1, 1]; a picture depends on its seed, class and knobs only.

        Args:
            cond: class numbers [len(seeds)].
            truncation: psi: 1 for none, 0 for the mean picture of all.
            truncation_cutoff: number of leading layers that are truncated; None for all.
            noise_mode: const (the same noise in all pictures), random (that of the seed) or none.
            style_mix: a seed whose styles the layers from `mix_layer` on take (StyleGAN, figure 3).
            mix_layer: 1 to the number of layers - 1; None for half of them.

        Raises:
            UserError: an unknown noise mode, a layer that is not there.
        """
        noise = SeededNoise(seeds)
        ws = self.latents(cond, noise, truncation, truncation_cutoff)
        if style_mix is not None:
            other = SeededNoise([style_mix] * len(seeds))
            ws = mix_styles(ws, self.latents(cond, other, truncation, truncation_cutoff), self._layer(mix_layer))
        elif mix_layer is not None:
            raise UserError(f"mix_layer {mix_layer}: which styles? give style_mix, a seed, too")
        return self.synthesize(ws, _mode(noise_mode), noise)

    def _layer(self, layer: int | None) -> int:
        n = self.generator.num_ws
        if layer is not None and not 1 <= layer < n:
            raise UserError(f"mix_layer {layer}: expected 1 to {n - 1}, since the generator has {n} layers")
        return n // 2 if layer is None else layer

    def latents(
        self, cond: Tensor | None, noise: SeededNoise, truncation: float = 1.0, cutoff: int | None = None
    ) -> Tensor:
        """ws [B, num_ws, w_dim] of seeds."""
        return self.map(super().latents(cond, noise), cond, truncation, cutoff)

    @torch.no_grad()
    def interpolate(
        self,
        cond: Tensor | None = None,
        *,
        seeds: Sequence[int],
        frames: int = 24,
        truncation: float = 1.0,
        truncation_cutoff: int | None = None,
        noise_mode: str = "const",
    ) -> Iterator[Tensor]:
        """Frames [C, H, W] in [-1, 1] of a closed walk along straight lines in W, `frames` from a seed to the next."""
        ws = self.latents(cond, SeededNoise(seeds), truncation, truncation_cutoff)
        for i in range(len(seeds)):
            for step in range(frames):
                between = ws[i : i + 1].lerp(ws[(i + 1) % len(seeds)][None], step / frames)
                yield self.synthesize(between, _mode(noise_mode), SeededNoise(seeds[i : i + 1]))[0]

    # --- weights ------------------------------------------------------------------------------------------------------

    def rename_state(self, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A bare official generator (mapping.*, synthesis.*) becomes this model's; without an average it is one."""
        state = {f"generator.{k}" if k.startswith(("mapping.", "synthesis.")) else k: v for k, v in state.items()}
        averages = [k for k in own if k.startswith("model_ema.")]
        if averages and not any(k.startswith("model_ema.") for k in state):
            names = {f"model_ema.{k.removeprefix('generator.').replace('.', '')}": k for k in state}
            state |= {k: state[names[k]] if k in names else own[k] for k in averages}
        return state


def _mode(name: str) -> str:
    if name not in NOISE_MODES:
        raise UserError(f"noise_mode {name!r}: expected one of {', '.join(NOISE_MODES)}")
    return name
