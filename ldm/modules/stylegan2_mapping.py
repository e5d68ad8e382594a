"""StyleGAN's mapping network, truncation and style mixing (Karras et al. 2019, sections 2, 3.1 and appendix B)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.modules.stylegan2_layers import FullyConnectedLayer
from ldm.modules.stylegan2_ops import normalize_2nd_moment


class MappingNetwork(nn.Module):
    """z, c -> ws: an MLP from the latent z and the condition c to the intermediate latent w, one w per layer.

    Args:
        z_dim: size of z; 0 for no z (the discriminator maps conditions only).
        c_dim: size of the condition; 0 for none.
        w_dim: size of w.
        num_ws: copies of w; None for the bare w.
        num_layers: of the MLP.
        embed_features: size of the embedded condition; None for w_dim.
        layer_features: size of the hidden layers; None for w_dim.
        activation: name in `stylegan2_ops.ACTIVATIONS`.
        lr_multiplier: of the MLP's learning rate; the embedding learns at full rate.
        w_avg_beta: decay of the running mean of w; None keeps no mean.

    Raises:
        ValueError: neither z nor c, or no layers.
    """

    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        num_ws: int | None,
        num_layers: int = 8,
        embed_features: int | None = None,
        layer_features: int | None = None,
        activation: str = "lrelu",
        lr_multiplier: float = 0.01,
        w_avg_beta: float | None = 0.998,
    ) -> None:
        super().__init__()
        if z_dim < 1 and c_dim < 1:
            raise ValueError(f"got z_dim {z_dim} and c_dim {c_dim}, expected at least one above 0")
        if num_layers < 1:
            raise ValueError(f"num_layers: got {num_layers}, expected at least 1")
        self.z_dim, self.c_dim, self.w_dim, self.num_ws = z_dim, c_dim, w_dim, num_ws
        self.num_layers, self.w_avg_beta = num_layers, w_avg_beta
        embed_features = (embed_features or w_dim) if c_dim > 0 else 0
        sizes = [z_dim + embed_features, *[layer_features or w_dim] * (num_layers - 1), w_dim]
        if c_dim > 0:
            self.embed = FullyConnectedLayer(c_dim, embed_features)
        for i in range(num_layers):
            layer = FullyConnectedLayer(sizes[i], sizes[i + 1], activation=activation, lr_multiplier=lr_multiplier)
            setattr(self, f"fc{i}", layer)
        if num_ws is not None and w_avg_beta is not None:
            self.register_buffer("w_avg", torch.zeros(w_dim))

    def _inputs(self, z: Tensor | None, c: Tensor | None) -> Tensor:
        parts = []
        for name, value, size in (("z", z, self.z_dim), ("c", c, self.c_dim)):
            if size == 0:
                continue
            if value is None or value.ndim != 2 or value.shape[1] != size:
                got = None if value is None else list(value.shape)
                raise ValueError(f"{name}: got {got}, expected [B, {size}]")
            value = value.to(torch.float32)
            parts.append(normalize_2nd_moment(value if name == "z" else self.embed(value)))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def forward(
        self,
        z: Tensor | None,
        c: Tensor | None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        update_emas: bool = False,
    ) -> Tensor:
        """[B, z_dim], [B, c_dim] -> [B, num_ws, w_dim], or [B, w_dim] where num_ws is None.

        Args:
            z, c: ignored (None will do) where their size is 0; c is one-hot or any other vector.
            truncation_psi: 1 for none; towards 0, w is drawn to its mean: less variety, fewer odd images.
            truncation_cutoff: number of leading ws that are truncated; None for all.
            update_emas: let the running mean of w follow this batch.

        Raises:
            ValueError: z or c of another shape; truncation of a network that keeps no mean.
        """
        x = self._inputs(z, c)
        for i in range(self.num_layers):
            x = getattr(self, f"fc{i}")(x)
        has_mean = hasattr(self, "w_avg")
        if update_emas and has_mean:
            mean = x.detach().mean(0).to(self.w_avg)  # x is half under autocast
            self.w_avg.copy_(mean.lerp(self.w_avg, self.w_avg_beta))
        if truncation_psi != 1 and not has_mean:
            raise ValueError(f"truncation_psi: got {truncation_psi}, expected 1 for a mapping without w_avg")
        if self.num_ws is None:
            return x
        x = x.unsqueeze(1).repeat(1, self.num_ws, 1)
        if truncation_psi == 1:
            return x
        cutoff = self.num_ws if truncation_cutoff is None else truncation_cutoff
        return torch.cat([self.w_avg.lerp(x[:, :cutoff], truncation_psi), x[:, cutoff:]], 1)

    def extra_repr(self) -> str:
        return f"z_dim={self.z_dim}, c_dim={self.c_dim}, w_dim={self.w_dim}, num_ws={self.num_ws}"


def mix_styles(coarse: Tensor, fine: Tensor, cutoff: int | Tensor) -> Tensor:
    """The first `cutoff` ws of `coarse`, the rest of `fine` (StyleGAN, figure 3).

    Args:
        coarse, fine: [B, num_ws, w_dim].
        cutoff: one number, or [B].

    Raises:
        ValueError: shapes that differ.
    """
    if coarse.shape != fine.shape:
        raise ValueError(f"mix_styles: got {list(coarse.shape)} and {list(fine.shape)}, expected equal shapes")
    layer = torch.arange(coarse.shape[1], device=coarse.device)
    if isinstance(cutoff, Tensor):
        cutoff = cutoff.to(coarse.device).view(-1, 1)
    return torch.where((layer < cutoff).view(-1, coarse.shape[1], 1), coarse, fine)


def style_mixing(ws: Tensor, other: Tensor, prob: float = 0.9, generator: torch.Generator | None = None) -> Tensor:
    """Mixing regularisation: a share `prob` of the images take their later ws, from a random one on, from `other`.

    Args:
        ws, other: [B, num_ws, w_dim].
        generator: on the device of ws; None for the global one.
    """
    b, n = ws.shape[:2]
    cutoff = torch.randint(1, max(n, 2), (b,), device=ws.device, generator=generator)
    keep = torch.rand(b, device=ws.device, generator=generator) >= prob
    return mix_styles(ws, other, torch.where(keep, n, cutoff))
