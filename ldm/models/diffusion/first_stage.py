"""The two stages around a latent diffusion model that it does not train itself: pictures to latents and back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.models.autoencoder import VQModel, VQModelInterface
from ldm.models.base import BaseModel
from ldm.models.first_stage import first_stage_of_run
from ldm.models.framework import rank_zero_info
from ldm.modules.distributions import DiagonalGaussianDistribution
from ldm.util import UserError, instantiate_from_config

MEASURED_IMAGES = 1000  # at least so many decide the latent scale
LATENTS = "latents"  # where a batch keeps what the first stage made of its pictures


class FirstStage(BaseModel):
    """A recipe with a frozen `first_stage_model` whose latents are multiplied by `scale_factor`.

    Subclasses call `init_first_stage`.
    """

    first_stage_key: str
    first_stage_model: nn.Module
    scale_factor: Tensor | float
    channels: int  # of the latents
    cache_latents: str | None = None  # folder where the latents of the data are kept
    chunk: int | None = None  # pictures that the first stage takes at a time; None = the whole batch
    missing_weights: str | None = None  # a file that the config names and that is not there

    def init_first_stage(self, config: Mapping[str, Any] | str, scale_factor: float | str, scale_by_std: bool) -> None:
        """Builds the first stage and freezes it.

        Args:
            config: `{target, params}`, or the path of a run directory or checkpoint of this project.
            scale_factor: a number, or "auto": 1 / standard deviation of the latents of at least 1,000 training images,
                measured before the first step.
            scale_by_std: the official rule instead: of the first batch.
        """
        if scale_by_std and scale_factor != 1.0:
            raise UserError(f"scale_by_std measures the scale: leave scale_factor at 1, got {scale_factor}")
        if isinstance(scale_factor, str) and scale_factor != "auto":
            raise UserError(f"scale_factor: got {scale_factor!r}, expected a number or auto")
        self.scale_by_std, self.scale_from_data = scale_by_std, scale_factor == "auto"
        if self.scale_by_std or self.scale_from_data:
            self.register_buffer("scale_factor", torch.tensor(1.0))  # 1 = not measured yet
        else:
            self.scale_factor = scale_factor
        self.filled_stages: set[str] = set()  # those of the two stages whose weights are not random
        model = first_stage_of_run(config) if isinstance(config, str) else self.instantiate_first_stage(config)
        self.first_stage_model = model.eval().requires_grad_(False)
        if isinstance(config, str) or "ckpt_path" in (config.get("params") or {}):
            self.filled_stages.add("first_stage_model")
        self.register_load_state_dict_post_hook(_weights_came)

    def instantiate_first_stage(self, config: Mapping[str, Any]) -> nn.Module:
        """Builds `config`; a weights file that is not there is only an error once latents are asked for.

        The checkpoint of a latent diffusion model holds its first stage, and official YAMLs name files that a reader
        of such a checkpoint does not have.
        """
        params = dict(config.get("params") or {})
        path = params.get("ckpt_path")
        if path is not None and not Path(path).is_file():
            self.missing_weights = path
            params["ckpt_path"] = None
        return instantiate_from_config({**config, "params": params})

    # --- pictures and latents -----------------------------------------------------------------------------------------

    def encode_first_stage(self, x: Tensor) -> DiagonalGaussianDistribution | Tensor:
        """Pictures [B, C, H, W] -> what the first stage makes of them: a posterior, or latents before quantisation."""
        return self.posterior(x)

    def posterior(self, x: Tensor) -> DiagonalGaussianDistribution | Tensor:
        """`encode_first_stage` of latent diffusion; other recipes may mean something else by that name."""
        if self.missing_weights is not None:
            raise UserError(
                f"first_stage_config.params.ckpt_path: {self.missing_weights} does not exist, so the first stage has "
                "no weights; put them there, or set first_stage=logs/<run> of one that you trained"
            )
        stage = self.first_stage_model
        with torch.no_grad():
            x = x.to(dtype_of(stage, x.dtype))
            return stage.encode_to_prequant(x) if isinstance(stage, VQModel) else stage.encode(x)

    def get_first_stage_encoding(self, encoder_posterior: DiagonalGaussianDistribution | Tensor) -> Tensor:
        """A sample of the posterior (or the latents as they are) times `scale_factor`, float32."""
        if isinstance(encoder_posterior, DiagonalGaussianDistribution):
            encoder_posterior = encoder_posterior.sample()
        return self.scale_factor * encoder_posterior.float()

    def differentiable_decode_first_stage(
        self, z: Tensor, predict_cids: bool = False, force_not_quantize: bool = False
    ) -> Tensor:
        """`decode_first_stage` with gradients."""
        stage = self.first_stage_model
        if predict_cids:  # z holds logits of codes, [B, codes, h, w], or the codes themselves
            codes = z.argmax(dim=1) if z.ndim == 4 else z
            entries = stage.quantize.get_codebook_entry(codes.reshape(-1))
            z = entries.reshape(*codes.shape, -1).permute(0, 3, 1, 2)
        z = (z / self.scale_factor).to(dtype_of(stage, z.dtype))
        as_it_is = predict_cids or force_not_quantize
        if isinstance(stage, VQModelInterface):
            return stage.decode(z, force_not_quantize=as_it_is).float()
        if isinstance(stage, VQModel) and not as_it_is:
            z = stage.quantize(z)[0]
        return stage.decode(z).float()

    @torch.no_grad()
    def decode_first_stage(self, z: Tensor, predict_cids: bool = False, force_not_quantize: bool = False) -> Tensor:
        """Latents [B, C, h, w] -> pictures [B, 3, H, W].

        predict_cids: z holds codes or their logits. force_not_quantize: a VQ model decodes z without its codebook.
        """
        return self.differentiable_decode_first_stage(z, predict_cids, force_not_quantize)

    @property
    def downsampling(self) -> int:
        """Pictures are so many times as high and wide as latents."""
        encoder = getattr(self.first_stage_model, "encoder", None)
        return getattr(encoder, "patch_size", 1) * 2 ** (getattr(encoder, "num_resolutions", 1) - 1)

    def pictures_of(self, batch: Mapping[str, Any]) -> Tensor:
        """The pictures of a batch, [B, C, H, W]."""
        return BaseModel.get_input(self, batch, self.first_stage_key)

    def latents_of(self, batch: Mapping[str, Any]) -> Tensor:
        """A batch's scaled latents [B, c, h, w], float32: its pictures encoded, or from `cache_latents`."""
        if LATENTS not in batch:
            return self.get_first_stage_encoding(self.posterior(self.pictures_of(batch)))
        return self.get_first_stage_encoding(self._cached(batch))

    def _cached(self, batch: Mapping[str, Any]) -> DiagonalGaussianDistribution | Tensor:
        """What `posterior` gave for the batch's pictures."""
        z = batch[LATENTS].contiguous(memory_format=torch.channels_last)  # as the first stage gives them
        return DiagonalGaussianDistribution(z) if z.shape[1] == 2 * self.channels else z

    # --- latents on disk ----------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        super().on_fit_start()
        data = self.trainer.datamodule
        self.check_first_picture(getattr(data, "datasets", {}).get("train"))
        if self.cache_latents is None:
            return
        self.check_cacheable()
        if not hasattr(data, "cache_latents"):
            raise UserError("cache_latents needs the data of main.DataModuleFromConfig")
        data.cache_latents(self.cache_latents, self._moments, self._digest())

    @torch.no_grad()
    def check_first_picture(self, dataset: Any) -> None:
        """Encodes one training picture, so that a first stage that does not fit is met before the first step.

        Raises:
            UserError: it takes other pictures, or makes other latents than the network is for.
        """
        sample = dataset[0] if hasattr(dataset, "__getitem__") else None
        if not isinstance(sample, Mapping) or self.first_stage_key not in sample:
            return  # a stream, or latents from disk
        x = self.pictures_of({self.first_stage_key: torch.as_tensor(sample[self.first_stage_key])[None]})
        encoder = getattr(self.first_stage_model, "encoder", None)
        if hasattr(encoder, "conv_in"):
            takes = encoder.conv_in.in_channels // getattr(encoder, "patch_size", 1) ** 2
            if takes != x.shape[1]:
                raise UserError(
                    f"the first stage takes pictures with {takes} channels, the data has {x.shape[1]}: set "
                    f"data.params.channels={takes}, or take another first stage"
                )
        out = self.posterior(x.to(self.first_stage_place))
        z = out.mean if isinstance(out, DiagonalGaussianDistribution) else out
        self.check_latents(z.shape[1:], fixed_size=getattr(dataset, "size", None) is not None)

    def check_latents(self, shape: Sequence[int], fixed_size: bool = False) -> None:
        """Raises UserError where latents (c, h, w) are not what the network is for; fixed_size: all have that size."""
        if len(shape) != 3 or shape[0] != self.channels:
            raise UserError(
                f"the first stage makes latents {list(shape)}, expected [{self.channels}, h, w]: "
                "set model.params.channels (and the network's in_channels and out_channels) to match"
            )

    def check_cacheable(self) -> None:
        """Raises UserError where pictures are needed for more than their latents."""

    def _moments(self, pictures: Tensor) -> Tensor:
        """[B, H, W, C] in [-1, 1] -> mean and log-variance of the posterior stacked, or latents; unscaled, float32."""
        x = BaseModel.get_input(self, {"image": pictures.to(self.first_stage_place)}, "image")
        out = self.posterior(x)
        return (out.parameters if isinstance(out, DiagonalGaussianDistribution) else out).float()

    @property
    def first_stage_place(self) -> torch.device:
        """Where the first stage is."""
        return next((p.device for p in self.first_stage_model.parameters()), self.device)

    def _digest(self) -> str:
        """Changes with the first stage's weights."""
        sha = hashlib.sha256()
        for name, value in self.first_stage_model.state_dict().items():
            sha.update(name.encode())
            sha.update(value.detach().cpu().float().numpy().tobytes())
        return sha.hexdigest()

    # --- the scale of the latents -------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.scale_from_data and self.trainer.global_step == 0 and float(self.scale_factor) == 1.0:
            # neither the order of the data nor the noise of the run depends on whether the scale was measured
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                batches = (self.transfer_batch_to_device(b, self.device, 0) for b in self.trainer.train_dataloader)
                self.measure_scale(batches, -(-MEASURED_IMAGES // self.trainer.world_size))

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """The official rule: 1 / standard deviation of the first batch's latents, unless a checkpoint brought one."""
        first = self.scale_by_std and self.current_epoch == 0 and self.global_step == 0 and batch_idx == 0
        if first and float(self.scale_factor) == 1.0:
            self.measure_scale([batch], 1)

    @torch.no_grad()
    def measure_scale(self, batches: Any, images: int) -> None:
        """Sets `scale_factor` from at least so many images of each process (or all that there are).

        The official rule takes a sample of each posterior; otherwise its variance is counted, and nothing is drawn.
        """
        moments = torch.zeros(4, dtype=torch.float64)  # images, numbers, their sum, the sum of their squares
        for batch in batches:
            for out in self._posteriors(batch):
                z, variance = out, 0.0
                if isinstance(out, DiagonalGaussianDistribution):
                    z, variance = (out.sample(), 0.0) if self.scale_by_std else (out.mean, out.var.cpu().double())
                z = z.cpu().double()
                squares = (z**2 + variance).sum()
                moments += torch.stack([z.new_tensor(len(z)), z.new_tensor(z.numel()), z.sum(), squares])
            if moments[0] >= images:
                break
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            moments = moments.to(self.scale_factor.device)
            torch.distributed.all_reduce(moments)
        seen, n, total, squares = moments.tolist()
        scale = ((squares - total**2 / n) / (n - 1)) ** -0.5
        self.scale_factor.fill_(scale)
        rank_zero_info(
            f"scale_factor {scale:.5f} = 1 / standard deviation of the latents of {seen:.0f} training images"
        )
        for logger in self.loggers:
            logger.log_metrics({"scale_factor": scale}, step=0)

    def _posteriors(self, batch: Mapping[str, Any]) -> Iterator[DiagonalGaussianDistribution | Tensor]:
        """What the first stage makes of a batch, in the parts that fit into memory."""
        if LATENTS in batch:
            yield self._cached(batch)
            return
        x = self.pictures_of(batch)
        for part in x.split(self.chunk or len(x)):
            yield self.posterior(part)


def dtype_of(module: nn.Module, default: torch.dtype) -> torch.dtype:
    """The dtype of a module's weights."""
    return next((p.dtype for p in module.parameters()), default)


def _weights_came(module: FirstStage, incompatible: Any) -> None:
    for name in ("first_stage_model", "cond_stage_model"):
        if not any(k.startswith(f"{name}.") for k in incompatible.missing_keys):
            module.filled_stages.add(name)
            if name == "first_stage_model":
                module.missing_weights = None
