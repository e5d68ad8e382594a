"""Sampling and loss classes of Stability's generative-models, by the names and parameters that its YAML files use.

Thin: formulas come from denoiser.py, steps from samplers.py on VEPath (sgm thinks in sigma, alpha = 1). Interfaces
after generative-models (MIT licence). One call = one class of theirs:

    sampler(denoiser, x [B, ...] ~ N(0, 1), cond, uc) with denoiser(x, sigma [B], cond) -> x0
    DiscreteDenoiser(...)(network, x, sigma [B], cond) -> x0 with network(x, time [B], cond)
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.diffusion import samplers
from ldm.diffusion.denoiser import scaling
from ldm.diffusion.schedule import VEPath, expand, make_beta_schedule
from ldm.util import instantiate_from_config

Cond = Mapping[str, Any]

# ------------------------------------------------------------------------------- discretizer: which noise levels


class Discretization:
    """n noise levels, highest first, with a 0 after them unless do_append_zero is False; flip turns the order."""

    def __call__(
        self, n: int, do_append_zero: bool = True, device: str | torch.device = "cpu", flip: bool = False
    ) -> Tensor:
        sigmas = self.get_sigmas(n, device)
        if do_append_zero:
            sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
        return sigmas.flip(0) if flip else sigmas

    def get_sigmas(self, n: int, device: str | torch.device = "cpu") -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define get_sigmas(n, device)")


class EDMDiscretization(Discretization):
    """EDM eq. 5."""

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> None:
        self.sigma_min, self.sigma_max, self.rho = sigma_min, sigma_max, rho

    def get_sigmas(self, n: int, device: str | torch.device = "cpu") -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return torch.linspace(high, low, n, device=device) ** self.rho


class LegacyDDPMDiscretization(Discretization):
    """sigma / alpha of a DDPM schedule at n times from T - 1 down, equally spaced and rounded down."""

    def __init__(self, linear_start: float = 0.00085, linear_end: float = 0.0120, num_timesteps: int = 1000) -> None:
        self.num_timesteps = num_timesteps
        self.alphas_cumprod = np.cumprod(1 - make_beta_schedule("linear", num_timesteps, linear_start, linear_end))

    def get_sigmas(self, n: int, device: str | torch.device = "cpu") -> Tensor:
        if n > self.num_timesteps:
            raise ValueError(f"number of noise levels: got {n}, expected at most {self.num_timesteps}")
        times = np.linspace(self.num_timesteps - 1, 0, n, endpoint=n == self.num_timesteps).astype(int)
        abar = self.alphas_cumprod[times]
        return torch.tensor(((1 - abar) / abar) ** 0.5, dtype=torch.float32, device=device)


# ------------------------------------------------------------ denoiser_scaling, denoiser_weighting / loss_weighting


class EDMScaling:
    """sigma -> (c_skip, c_out, c_in, c_noise), EDM table 1."""

    def __init__(self, sigma_data: float = 0.5) -> None:
        self.sigma_data = sigma_data

    def __call__(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        c_skip, c_out = scaling("edm", torch.ones_like(sigma), sigma, self.sigma_data)
        return c_skip, c_out, (sigma**2 + self.sigma_data**2) ** -0.5, sigma.log() / 4


class EpsScaling:
    """A network that predicts noise from x / sqrt(sigma^2 + 1), which is the x_t of DDPM."""

    def __call__(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return *scaling("eps", torch.ones_like(sigma), sigma), (sigma**2 + 1) ** -0.5, sigma.clone()


class VScaling:
    """As EpsScaling, for a network that predicts v."""

    def __call__(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        alpha = (sigma**2 + 1) ** -0.5  # DDPM's x_t = alpha x, with alpha^2 + (alpha sigma)^2 = 1
        c_skip, c_out = scaling("v", alpha, alpha * sigma)
        return c_skip * alpha, c_out, alpha, sigma.clone()


class VScalingWithEDMcNoise(VScaling):
    """VScaling, told ln(sigma) / 4 as EDM's networks are."""

    def __call__(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return *super().__call__(sigma)[:3], sigma.log() / 4


class UnitWeighting:
    """Loss weights: sigma [B] -> factor [B] for the squared error of x0."""

    def __call__(self, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)


class EDMWeighting:
    def __init__(self, sigma_data: float = 0.5) -> None:
        self.sigma_data = sigma_data

    def __call__(self, sigma: Tensor) -> Tensor:
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2


class VWeighting(EDMWeighting):
    def __init__(self) -> None:
        super().__init__(sigma_data=1.0)


class EpsWeighting:
    def __call__(self, sigma: Tensor) -> Tensor:
        return sigma**-2


# ------------------------------------------------------------------------------------------- wrappers and denoiser


class IdentityWrapper(nn.Module):
    """Passes everything on; the network's keys get the prefix `diffusion_model.`."""

    def __init__(self, diffusion_model: nn.Module, compile_model: bool = False) -> None:
        super().__init__()
        self.diffusion_model = diffusion_model
        if compile_model:
            self.diffusion_model.compile()  # in place: no _orig_mod in the keys

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.diffusion_model(*args, **kwargs)


class OpenAIWrapper(IdentityWrapper):
    """Routes a condition to the U-Net: `concat` to the channels, `crossattn` to the context, `vector` to y."""

    def forward(self, x: Tensor, t: Tensor, c: Cond, **kwargs: Any) -> Tensor:
        x = torch.cat([x, c["concat"]], dim=1) if "concat" in c else x
        return self.diffusion_model(x, timesteps=t, context=c.get("crossattn"), y=c.get("vector"), **kwargs)


class Denoiser(nn.Module):
    """x0 = c_skip x + c_out network(c_in x, c_noise, cond), EDM eq. 7."""

    def __init__(self, scaling_config: Mapping[str, Any]) -> None:
        super().__init__()
        self.scaling = instantiate_from_config(scaling_config)

    def possibly_quantize_sigma(self, sigma: Tensor) -> Tensor:
        return sigma

    def possibly_quantize_c_noise(self, c_noise: Tensor) -> Tensor:
        return c_noise

    def forward(
        self, network: Callable[..., Tensor], input: Tensor, sigma: Tensor, cond: Cond, **additional_model_inputs: Any
    ) -> Tensor:
        """input [B, ...], sigma [B] -> x0 [B, ...]; additional_model_inputs go to the network."""
        sigma = self.possibly_quantize_sigma(sigma)
        c_skip, c_out, c_in, c_noise = self.scaling(sigma)
        c_skip, c_out, c_in = (expand(c, input.ndim) for c in (c_skip, c_out, c_in))
        time = self.possibly_quantize_c_noise(c_noise)
        return network(input * c_in, time, cond, **additional_model_inputs) * c_out + input * c_skip


class DiscreteDenoiser(Denoiser):
    """A Denoiser for a network that knows num_idx noise levels: sigma becomes the nearest, time its index."""

    def __init__(
        self,
        scaling_config: Mapping[str, Any],
        num_idx: int,
        discretization_config: Mapping[str, Any],
        do_append_zero: bool = False,
        quantize_c_noise: bool = True,  # False: the network gets c_noise as it is
        flip: bool = True,  # lowest level first
    ) -> None:
        super().__init__(scaling_config)
        self.discretization = instantiate_from_config(discretization_config)
        self.register_buffer("sigmas", self.discretization(num_idx, do_append_zero=do_append_zero, flip=flip))
        self.quantize_c_noise, self.num_idx = quantize_c_noise, num_idx

    def sigma_to_idx(self, sigma: Tensor) -> Tensor:
        return (sigma - self.sigmas[:, None]).abs().argmin(0).view(sigma.shape)

    def idx_to_sigma(self, idx: Tensor | int) -> Tensor:
        return self.sigmas[idx]

    def possibly_quantize_sigma(self, sigma: Tensor) -> Tensor:
        return self.idx_to_sigma(self.sigma_to_idx(sigma))

    def possibly_quantize_c_noise(self, c_noise: Tensor) -> Tensor:
        return self.sigma_to_idx(c_noise) if self.quantize_c_noise else c_noise


# ------------------------------------------------------------------------------------------- sigma sampling and loss


class EDMSampling:
    """Log-normal noise levels for training (EDM, table 1)."""

    def __init__(self, p_mean: float = -1.2, p_std: float = 1.2) -> None:
        self.p_mean, self.p_std = p_mean, p_std

    def __call__(self, n_samples: int, rand: Tensor | None = None) -> Tensor:
        return (self.p_mean + self.p_std * (torch.randn(n_samples) if rand is None else rand)).exp()


class DiscreteSampling:
    """Uniform over num_idx noise levels."""

    def __init__(
        self,
        discretization_config: Mapping[str, Any],
        num_idx: int,
        do_append_zero: bool = False,
        flip: bool = True,
    ) -> None:
        self.num_idx = num_idx
        discretization = instantiate_from_config(discretization_config)
        self.sigmas = discretization(num_idx, do_append_zero=do_append_zero, flip=flip)

    def idx_to_sigma(self, idx: Tensor | int) -> Tensor:
        return self.sigmas[idx]

    def __call__(self, n_samples: int, rand: Tensor | None = None) -> Tensor:
        """rand: indices [n_samples], drawn if None."""
        return self.idx_to_sigma(torch.randint(0, self.num_idx, (n_samples,)) if rand is None else rand)


class ZeroSampler:
    """Almost no noise, for training without any."""

    def __call__(self, n_samples: int, rand: Tensor | None = None) -> Tensor:
        return torch.full((n_samples,), 1e-5)


class StandardDiffusionLoss(nn.Module):
    """loss [B] of x0 predictions at random noise levels. loss_type: l2, l1 or lpips (then without the weighting)."""

    def __init__(
        self,
        sigma_sampler_config: Mapping[str, Any],
        loss_weighting_config: Mapping[str, Any],
        loss_type: str = "l2",
        offset_noise_level: float = 0.0,  # share of noise that is constant over each channel
        batch2model_keys: str | list[str] | None = None,  # entries of the batch that the network gets by name
    ) -> None:
        super().__init__()
        if loss_type not in ("l2", "l1", "lpips"):
            raise ValueError(f"loss_type: got {loss_type!r}, expected l2, l1 or lpips")
        self.sigma_sampler = instantiate_from_config(sigma_sampler_config)
        self.loss_weighting = instantiate_from_config(loss_weighting_config)
        self.loss_type, self.offset_noise_level = loss_type, offset_noise_level
        if loss_type == "lpips":
            self.lpips = instantiate_from_config({"target": "ldm.modules.lpips.LPIPS"}).eval()
        keys = [batch2model_keys] if isinstance(batch2model_keys, str) else batch2model_keys
        self.batch2model_keys = set(keys or [])

    def forward(
        self, network: nn.Module, denoiser: nn.Module, conditioner: Callable, input: Tensor, batch: Mapping[str, Any]
    ) -> Tensor:
        return self._forward(network, denoiser, conditioner(batch), input, batch)

    def _forward(
        self, network: nn.Module, denoiser: nn.Module, cond: Cond, input: Tensor, batch: Mapping[str, Any]
    ) -> Tensor:
        extra = {key: batch[key] for key in self.batch2model_keys.intersection(batch)}
        sigmas = self.sigma_sampler(len(input)).to(input)
        noise = torch.randn_like(input)
        if self.offset_noise_level > 0:
            offset = torch.randn(input.shape[:2], device=input.device)
            noise = noise + self.offset_noise_level * offset.reshape(*input.shape[:2], *[1] * (input.ndim - 2))
        noised = input + noise * expand(sigmas, input.ndim)
        output = denoiser(network, noised, sigmas, cond, **extra)
        return self.get_loss(output, input, expand(self.loss_weighting(sigmas), input.ndim))

    def get_loss(self, model_output: Tensor, target: Tensor, w: Tensor) -> Tensor:
        if self.loss_type == "lpips":
            return self.lpips(model_output, target).reshape(-1)
        error = model_output - target
        return (w * (error**2 if self.loss_type == "l2" else error.abs())).flatten(1).mean(1)


# ----------------------------------------------------------------------------------------------- guiders and samplers


class IdentityGuider:
    """No guidance."""

    def prepare_inputs(self, x: Tensor, s: Tensor, c: Cond, uc: Cond) -> tuple[Tensor, Tensor, Cond]:
        return x, s, dict(c)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x


class VanillaCFG:
    """Classifier-free guidance; always two samples a sample, unconditional ones first."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def prepare_inputs(self, x: Tensor, s: Tensor, c: Cond, uc: Cond) -> tuple[Tensor, Tensor, Cond]:
        both = {k: torch.cat([uc[k], v]) if k in ("vector", "crossattn", "concat") else v for k, v in c.items()}
        return torch.cat([x, x]), torch.cat([s, s]), both

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        x_u, x_c = x.chunk(2)
        return x_u + self.scale * (x_c - x_u)


class BaseDiffusionSampler:
    """A row of samplers.SAMPLERS with its discretization and guider. Noise: torch.randn_like."""

    name: str

    def __init__(
        self,
        discretization_config: Mapping[str, Any],
        num_steps: int | None = None,
        guider_config: Mapping[str, Any] | None = None,  # None: no guidance
        verbose: bool = False,  # accepted for old files; nothing is printed
        device: str | torch.device = "cpu",  # accepted for old files; everything happens where x is
    ) -> None:
        self.num_steps = num_steps
        self.discretization = instantiate_from_config(discretization_config)
        self.guider = IdentityGuider() if guider_config is None else instantiate_from_config(guider_config)
        self.verbose, self.device = verbose, device
        self.knobs: dict[str, Any] = {}

    def denoise(self, x: Tensor, denoiser: Callable[..., Tensor], sigma: Tensor, cond: Cond, uc: Cond) -> Tensor:
        return self.guider(denoiser(*self.guider.prepare_inputs(x, sigma, cond, uc)), sigma)

    def __call__(
        self,
        denoiser: Callable[..., Tensor],
        x: Tensor,
        cond: Cond,
        uc: Cond | None = None,
        num_steps: int | None = None,
    ) -> Tensor:
        """Unit noise x [B, ...] -> x0 [B, ...]. uc None: cond. num_steps overrides the constructor's."""
        n = self.num_steps if num_steps is None else num_steps
        if n is None:
            raise ValueError("num_steps: got None, expected a number of steps here or in the sampler's params")
        sigmas = self.discretization(n).cpu().double()
        uc = cond if uc is None else uc

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            return self.denoise(x, denoiser, t.to(x).expand(len(x)), cond, uc)

        x = x * (1 + sigmas[0] ** 2).sqrt()
        sampler = samplers.SAMPLERS[self.name]
        return sampler(denoise, x, sigmas, path=VEPath(), randn=torch.randn_like, **self.knobs)


class EDMSampler(BaseDiffusionSampler):
    """EDM Algorithm 2."""

    def __init__(
        self,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        **base: Any,  # of BaseDiffusionSampler
    ) -> None:
        super().__init__(**base)
        self.knobs = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}


class EulerEDMSampler(EDMSampler):
    name = "euler"


class HeunEDMSampler(EDMSampler):
    name = "heun"


class AncestralSampler(BaseDiffusionSampler):
    """Samplers with fresh noise at each step."""

    def __init__(self, eta: float = 1.0, s_noise: float = 1.0, **base: Any) -> None:
        super().__init__(**base)
        self.knobs = {"eta": eta, "s_noise": s_noise}


class EulerAncestralSampler(AncestralSampler):
    name = "euler_ancestral"


class DPMPP2SAncestralSampler(AncestralSampler):
    name = "dpmpp_2s_ancestral"


class DPMPP2MSampler(BaseDiffusionSampler):
    name = "dpmpp_2m"


class LinearMultistepSampler(BaseDiffusionSampler):
    name = "lms"

    def __init__(self, order: int = 4, **base: Any) -> None:
        super().__init__(**base)
        self.knobs = {"order": order}
