"""PatchGAN discriminator (Isola et al. 2017, pix2pix) with the key names of taming-transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class ActNorm(nn.Module):
    """Per-channel scale and shift, set by the first training batch to unit variance and zero mean (Glow, section 3.1).

    Args:
        num_features: channels.
        logdet: return (h, log-determinant [B]) instead of h.
        affine: kept for old configs; the layer is always affine.
        allow_reverse_init: `reverse` on an untouched layer initialises it from its input instead of raising.
    """

    def __init__(
        self, num_features: int, logdet: bool = False, affine: bool = True, allow_reverse_init: bool = False
    ) -> None:
        super().__init__()
        if not affine:
            raise ValueError("ActNorm: got affine False, expected True")
        self.logdet, self.allow_reverse_init = logdet, allow_reverse_init
        self.loc = nn.Parameter(torch.zeros(1, num_features, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, num_features, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))
        self._checked = False  # spares a look at the device in every step

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._checked = False
        super()._load_from_state_dict(*args, **kwargs)

    @torch.no_grad()
    def _initialize_once(self, x: Tensor) -> None:
        if not bool(self.initialized):
            flat = x.transpose(0, 1).flatten(1)  # [C, BHW]
            self.loc.copy_(-flat.mean(1).view_as(self.loc))
            self.scale.copy_(1.0 / (flat.std(1).view_as(self.scale) + 1e-6))
            self.initialized.fill_(1)
        self._checked = True

    def _with_logdet(self, h: Tensor, sign: int) -> Tensor | tuple[Tensor, Tensor]:
        if not self.logdet:
            return h
        pixels = h.shape[2] * h.shape[3]
        return h, sign * pixels * self.scale.abs().log().sum().expand(h.shape[0])

    def forward(self, x: Tensor, reverse: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """[B, C, H, W] (or [B, C]) -> the same shape, and the log-determinant if asked for."""
        if reverse:
            return self.reverse(x)
        flat = x.ndim == 2
        x = x[:, :, None, None] if flat else x
        if self.training and not self._checked:
            self._initialize_once(x)
        out = self._with_logdet(self.scale * (x + self.loc), 1)
        if not flat:
            return out
        return (out[0][:, :, 0, 0], out[1]) if self.logdet else out[:, :, 0, 0]

    def reverse(self, y: Tensor) -> Tensor:
        """The inverse of `forward`.

        Raises:
            ValueError: in training, before the layer saw data.
        """
        if self.training and not self._checked:
            if not self.allow_reverse_init and not bool(self.initialized):
                raise ValueError("ActNorm: got reverse before any forward, expected data to initialise from")
            self._initialize_once(y if y.ndim == 4 else y[:, :, None, None])
        if y.ndim == 2:
            return (y[:, :, None, None] / self.scale - self.loc)[:, :, 0, 0]
        return y / self.scale - self.loc


class NLayerDiscriminator(nn.Module):
    """[B, input_nc, H, W] in [-1, 1] -> one logit per patch, [B, 1, h, w].

    Args:
        input_nc: channels of the images (and of what is stacked under them).
        ndf: width of the first layer.
        n_layers: downsampling layers; the receptive field is 70 pixels for 3.
        use_actnorm: ActNorm instead of batch norm (the convolutions then have biases).
    """

    def __init__(self, input_nc: int = 3, ndf: int = 64, n_layers: int = 3, use_actnorm: bool = False) -> None:
        super().__init__()
        norm = ActNorm if use_actnorm else nn.BatchNorm2d
        layers: list[nn.Module] = [nn.Conv2d(input_nc, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        width = ndf
        for n in range(1, n_layers + 1):
            out = ndf * min(2**n, 8)
            stride = 2 if n < n_layers else 1
            layers.append(nn.Conv2d(width, out, 4, stride=stride, padding=1, bias=use_actnorm))
            layers += [norm(out), nn.LeakyReLU(0.2, inplace=True)]
            width = out
        layers.append(nn.Conv2d(width, 1, 4, stride=1, padding=1))
        self.main = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x)


def weights_init(m: nn.Module) -> None:
    """N(0, 0.02) convolutions and N(1, 0.02) batch norms (Radford et al. 2016, DCGAN); for `module.apply`."""
    if isinstance(m, nn.Conv2d):
        nn.init.normal_(m.weight, 0.0, 0.02)
    elif isinstance(m, nn.BatchNorm2d):
        nn.init.normal_(m.weight, 1.0, 0.02)
        nn.init.zeros_(m.bias)
