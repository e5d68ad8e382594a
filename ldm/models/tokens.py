"""What the autoregressive recipes share: a frozen first stage that makes tokens, a transformer, sampling, pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.autoencoder import VQModelInterface
from ldm.models.base import BaseModel, Config
from ldm.models.first_stage import first_stage_of_run
from ldm.modules.decoding import check_filters, generate
from ldm.modules.gpt import Transformer
from ldm.util import SeededNoise, UserError, accepted_params, class_of, instantiate_from_config

ADAMW = {"target": "torch.optim.AdamW", "params": {"betas": (0.9, 0.95), "weight_decay": 0.01}}
Condition = dict[str, Any]


class TokenModel(BaseModel):
    """A transformer over the tokens of a frozen first stage.

    A condition is {"prefix": int64 [B, T], "uncond": the same without the condition, or None, "primed": image tokens
    [B, P] that are given (-1: to be drawn), or absent}.

    Args:
        first_stage_config: `{target, params}` of a VQ model or of `ldm.modules.codebooks.PixelCodes`, or the path of a
            run or checkpoint of this project.
        first_stage_key: batch key of the images.
        cache_codes: keep the tokens of each picture in memory; for data without augmentation.
        use_ema: average the transformer's weights.
        ema_decay: of the average.
    """

    tolerated_keys = ("first_stage_model.loss.", "cond_stage_model.loss.")
    transformer: Transformer

    def __init__(
        self,
        first_stage_config: Config | str,
        *,
        first_stage_key: str = "image",
        cache_codes: bool = False,
        use_ema: bool = False,
        ema_decay: float = 0.9999,
        **base: Any,
    ) -> None:
        super().__init__(**{"optimizer_config": ADAMW, **base})
        self._averaged = ema_decay if use_ema else None
        self.first_stage_key, self.cache_codes = first_stage_key, cache_codes
        of_run = isinstance(first_stage_config, str)
        stage = first_stage_of_run(first_stage_config) if of_run else instantiate_from_config(first_stage_config)
        self.first_stage_model = stage.eval().requires_grad_(False)
        self._codes: dict[tuple[bytes, int], Tensor] = {}
        self._check_first_stage()

    def _check_first_stage(self) -> None:
        stage = self.first_stage_model
        if isinstance(stage, VQModelInterface):
            raise UserError(
                "first_stage_config: VQModelInterface encodes to the vectors before the codebook; expected "
                "ldm.models.autoencoder.VQModel, which takes the same params and checkpoint"
            )
        if not hasattr(stage, "decode_code") or not hasattr(stage, "n_embed"):
            raise UserError(
                f"first_stage_config: {type(stage).__name__} makes no tokens; expected a VQ model "
                "(ldm.models.autoencoder.VQModel, ldm.models.vqgan.GumbelVQ) or ldm.modules.codebooks.PixelCodes"
            )

    def _finish(self) -> None:
        """The end of every constructor: the average needs the transformer, the checkpoint all weights."""
        if self._averaged is not None:
            self.init_ema(self.transformer, decay=self._averaged)
        self.load_ckpt_path()

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of an image in tokens."""
        stage = self.first_stage_model
        h, w = stage.grid if hasattr(stage, "grid") else stage.decoder.z_shape[2:]
        return int(h), int(w)

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the pictures."""
        return tuple(self.decode_tokens(torch.zeros(1, 1, dtype=torch.int64, device=self.device)).shape[1:])

    @property
    def sampling_steps(self) -> int:
        """Tokens of a picture, for a progress bar."""
        h, w = self.grid
        return h * w

    def build_transformer(self, config: Config, **given: Any) -> Transformer:
        """`config` with the sizes that follow from the first stage and the condition.

        Raises:
            UserError: the config names another size.
        """
        params = dict(config.get("params") or {})
        for name, value in given.items():
            own = params.get(name, value)
            if (list(own) if isinstance(own, Sequence) else own) != (list(value) if name == "grid" else value):
                raise UserError(
                    f"transformer_config.params.{name}: got {own}, expected {value}, which follows from the first "
                    "stage and the text; leave it out to have it set"
                )
        return instantiate_from_config({"target": "ldm.modules.gpt.Transformer", **config}, **given)

    def networks(self) -> list[nn.Module]:
        return [self.transformer]

    def train(self, mode: bool = True) -> TokenModel:
        super().train(mode)
        self.first_stage_model.eval()
        return self

    def check_sequence(self, condition: int, image: int) -> None:
        """Raises UserError for more tokens than the transformer has places for; the last one is never read."""
        n, room = condition + image - 1, self.transformer.block_size
        if n > room:
            raise UserError(
                f"sequence: got {n} tokens ({condition} of the condition, {image} of the image but for the last), "
                f"expected at most {room} (transformer_config.params.block_size): set it to {n} or more, or make "
                "condition or image smaller"
            )

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["token_grid"] = list(self.grid)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises UserError for a transformer of another grid: its weights fit any, and it would draw noise."""
        super().on_load_checkpoint(checkpoint)
        h, w = self.grid
        saved = [int(n) for n in checkpoint.get("token_grid") or (h, w)]  # official files do not say
        if saved != [h, w]:
            raise UserError(
                f"first_stage_config: got a first stage of {h}x{w} tokens a picture, expected "
                f"{saved[0]}x{saved[1]}, which the transformer of the checkpoint was trained on: give the first stage "
                "that it was trained with"
            )

    # --- optimiser ----------------------------------------------------------------------------------------------------

    def trained_parameters(self) -> list[nn.Parameter]:
        return list(self.transformer.parameters())

    def build_optimizer(self, params: Any) -> torch.optim.Optimizer:
        """Weight decay only for the matrices of linear layers: none for biases, norms and embeddings. timm's Muon
        orthogonalises those of the blocks; tables of tokens and places, and the last layer, are AdamW's."""
        params = list(params)
        cls = class_of(self.optimizer_config, "model.params.optimizer_config")
        muon = "fallback_lr_scale" in (accepted_params(cls) or {})
        part = self.transformer.blocks if muon else self
        decayed = {id(m.weight) for m in part.modules() if isinstance(m, nn.Linear)}
        groups = [
            {"params": [p for p in params if id(p) in decayed]},
            {"params": [p for p in params if id(p) not in decayed], "weight_decay": 0.0},
        ]
        if muon:
            groups[1]["use_fallback"] = True
        return super().build_optimizer(groups)

    # --- tokens -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_images(self, x: Tensor, shrink: int = 1) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] -> tokens int64 [B, h w / shrink^2] in raster order.

        Args:
            x: images.
            shrink: factor by which the images are made smaller first.

        Raises:
            UserError: the images give another grid than the transformer was built for.
        """
        h, w = self.grid
        size = f"{x.shape[2]}x{x.shape[3]}"
        if shrink > 1:
            x = F.avg_pool2d(x, shrink)
        quant, _, (_, _, codes) = self.first_stage_model.encode(x)
        got = quant.shape[2] * shrink, quant.shape[3] * shrink
        if got != (h, w):
            raise UserError(
                f"images of {size} pixels give {got[0]}x{got[1]} tokens, but the model was built for {h}x{w} "
                "(ddconfig.resolution of the first stage): set data.params.size"
            )
        return codes.reshape(len(x), -1)

    def image_tokens(self, batch: dict[str, Any], shrink: int = 1) -> Tensor:
        """The batch's tokens [B, h w / shrink^2], from memory where `cache_codes` is on."""
        if not self.cache_codes:
            return self.encode_images(self.get_input(batch, self.first_stage_key), shrink)
        # by content, so that other pictures of one name (or of none) are no danger
        keys = [(_digest(x), shrink) for x in batch[self.first_stage_key].cpu()]
        if not all(k in self._codes for k in keys):
            tokens = self.encode_images(self.get_input(batch, self.first_stage_key), shrink)
            self._codes.update(zip(keys, tokens.cpu(), strict=True))
        return torch.stack([self._codes[k] for k in keys]).to(self.device)

    @torch.no_grad()
    def decode_tokens(self, tokens: Tensor) -> Tensor:
        """Tokens [B, n] with n at most h w (the rest becomes token 0) -> images [B, C, H, W] in [-1, 1]."""
        h, w = self.grid
        tokens = F.pad(tokens, (0, h * w - tokens.shape[1]))
        return self.first_stage_model.decode_code(tokens.view(-1, h, w)).clamp(-1, 1)

    def prime(self, cond: Condition, images: Tensor, keep: float = 0.5) -> Condition:
        """A condition whose pictures begin with the upper part of `images` [B or 1, C, H, W] in [-1, 1].

        Args:
            cond: from `condition`.
            images: pictures to complete.
            keep: share of the rows to keep.

        Raises:
            UserError: keep outside (0, 1), or another number of pictures.
        """
        if not 0 < keep < 1:
            raise UserError(f"keep: got {keep}, expected a share of the rows between 0 and 1")
        n = len(cond["prefix"])
        if len(images) not in (1, n):
            raise UserError(f"got {len(images)} pictures to complete for {n} seeds, expected one, or one each")
        rows = max(1, round(keep * self.grid[0]))
        tokens = self.encode_images(images.to(self.device))[:, : rows * self.grid[1]]
        return {**cond, "primed": tokens.expand(n, -1)}

    # --- sampling -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def draw_tokens(
        self,
        cond: Condition,
        seeds: Sequence[int],
        *,
        first: int = 0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        scale: float = 1.0,
        image_start: int | None = None,
        u: Tensor | None = None,
        callback: Callable[..., Any] | None = None,
    ) -> Tensor:
        """Image tokens [len(seeds), h w]; see `ldm.modules.decoding.generate`. `u` are other random numbers.

        `callback(n, tokens [len(seeds), n])` is called after each token.

        Raises:
            UserError: filters that make no sense, guidance for a model that cannot do without its condition, or a
                sequence over the position table.
        """
        h, w = self.grid
        n_codes = self.first_stage_model.n_embed
        try:
            check_filters(n_codes, temperature, top_k, top_p)
        except ValueError as e:
            raise UserError(str(e)) from e
        self.check_sequence(cond["prefix"].shape[1], h * w)
        if scale != 1.0 and cond.get("uncond") is None:
            raise UserError("scale: the model was trained without cond_dropout, so that guidance has nothing to go by")
        if len(cond["prefix"]) != len(seeds):
            raise UserError(f"got conditions for {len(cond['prefix'])} pictures, expected {len(seeds)} (one per seed)")
        return generate(
            self.transformer,
            cond["prefix"].to(self.device),
            h * w,
            u=SeededNoise(seeds).rand((len(seeds), h * w), device=self.device) if u is None else u,
            uncond=None if cond.get("uncond") is None else cond["uncond"].to(self.device),
            scale=scale,
            primed=cond.get("primed"),
            first=first,
            last=first + n_codes,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            image_start=image_start,
            callback=callback,
        )


def _digest(x: Tensor) -> bytes:
    return hashlib.blake2b(x.contiguous().numpy().tobytes(), digest_size=16).digest()
