"""Image classification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from ldm.models.base import BaseModel
from ldm.models.pretrained import HALF, IMAGENET, load_weights, pixel_statistics
from ldm.modules.classifiers.common import BufferEma
from ldm.util import UserError, image_grid, instantiate_from_config, log_txt_as_img

Config = dict[str, Any]
TILE = 128  # pixels of one picture in the image log, so that its label can be read
GREEN, RED = (-1.0, 0.3, -1.0), (1.0, -1.0, -1.0)


class Classifier(BaseModel):
    """A network that maps images [B, C, H, W] in [-1, 1] to one of `num_classes` labels.

    Logs train/loss and train/acc (of the batch), and over whole epochs val/loss (cross-entropy without smoothing),
    val/acc1, val/acc5 (with more than five classes), the same for the test set and, with EMA, as `..._ema`.

    Args:
        network_config: `{target, params}` of a network: `ldm.modules.classifiers.*`, or any torchvision or timm model.
            It is given `num_classes` unless its params set it.
        num_classes: number of labels; `auto` in YAML takes it from the data.
        first_stage_key: batch key of the images [B, H, W, C].
        label_key: batch key of the labels, int64 [B].
        label_smoothing: share of the target spread evenly over all classes (Szegedy et al. 2015, section 7).
        class_weights: weight of each class in the loss, or None.
        aux_weight: weight of the loss of each auxiliary head.
        weights: `torchvision://IMAGENET1K_V1`, `timm://name` or a file, loaded strictly.
        allow_head: with `weights` of another number of classes: the last layer starts afresh.
        normalize: "imagenet" (mean and deviation per channel), "none" ([-1, 1] as it comes), or None: what `weights`
            were trained with.
        use_ema: keep an exponential moving average of weights and batch-norm statistics.
        ema_decay: its decay after the warm-up.

    Raises:
        ValueError: `class_weights` of another length, unknown `normalize`.
        UserError: `weights` that cannot be read or do not fit.
    """

    def __init__(
        self,
        network_config: Config,
        num_classes: int,
        *,
        first_stage_key: str = "image",
        label_key: str = "class_label",
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | None = None,
        aux_weight: float = 0.3,
        weights: str | None = None,
        allow_head: bool = False,
        normalize: str | None = None,
        use_ema: bool = False,
        ema_decay: float = 0.9999,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        self.num_classes, self.first_stage_key, self.label_key = num_classes, first_stage_key, label_key
        self.label_smoothing, self.aux_weight = label_smoothing, aux_weight
        given = {} if "num_classes" in (network_config.get("params") or {}) else {"num_classes": num_classes}
        self.model = instantiate_from_config(network_config, **given)
        network = network_config["target"].rpartition(".")[2]
        self._set_normalization(normalize, weights, network)
        if class_weights is not None and len(class_weights) != num_classes:
            raise ValueError(f"got {len(class_weights)} class_weights, expected {num_classes}")
        value = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", value, persistent=False)
        if weights is not None:
            report = load_weights(self.model, weights, network, num_classes, allow_head)
            rank_zero_info(f"{weights}: {report}")
        if use_ema:
            self.init_ema(self.model, ema_decay)
        self.scores = nn.ModuleDict(
            {split + suffix: self._new_scores() for split in ("val", "test") for suffix in ("", "_ema")[: 1 + use_ema]}
        )
        self.load_ckpt_path()

    def _set_normalization(self, normalize: str | None, weights: str | None, network: str) -> None:
        if normalize not in (None, "none", "imagenet"):
            raise ValueError(f"got normalize={normalize!r}, expected imagenet or none")
        mean, std = pixel_statistics(weights if normalize is None else None, network)
        if normalize == "imagenet":
            mean, std = IMAGENET
        # ((x + 1) / 2 - mean) / std as one multiplication and one sum, left out where it changes nothing
        self.normalized = (tuple(mean), tuple(std)) != HALF
        m, s = (torch.tensor(v).view(1, -1, 1, 1) for v in (mean, std))
        self.register_buffer("pixel_scale", 0.5 / s, persistent=False)
        self.register_buffer("pixel_shift", (0.5 - m) / s, persistent=False)

    def _new_scores(self) -> nn.ModuleDict:
        ks = (1, 5) if self.num_classes > 5 else (1,)
        options: Config = {"num_classes": self.num_classes, "average": "micro", "validate_args": False}
        return nn.ModuleDict({f"acc{k}": MulticlassAccuracy(top_k=k, **options) for k in ks})

    def init_ema(self, module: nn.Module, decay: float = 0.9999) -> None:
        self.model_ema = BufferEma(module, decay=decay)
        self._ema_source = [module]

    # --- batch --------------------------------------------------------------------------------------------------------

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Looks at the batch while it is in main memory, where reading a label makes no GPU wait."""
        if isinstance(batch, dict):
            self.check_batch(batch)
        return batch

    def check_batch(self, batch: dict[str, Any]) -> None:
        """Raises UserError for labels that are missing or out of range, and for images too small for the network."""
        labels, x = batch.get(self.label_key), batch.get(self.first_stage_key)
        if labels is None:
            raise UserError(
                f"the batch has no key {self.label_key!r}; the data set gives {sorted(batch)} (model.params.label_key)"
            )
        wrong = ((labels < 0) | (labels >= self.num_classes)).nonzero()
        if len(wrong):
            at = int(wrong[0, 0])
            raise UserError(
                f"label out of range: image {at} of the batch{self._origin(batch, at)} has class {int(labels[at])}, "
                f"expected 0 to {self.num_classes - 1} (model.params.num_classes: {self.num_classes})"
            )
        if isinstance(x, Tensor) and hasattr(self.model, "check"):
            try:
                self.model.check(self.get_input(batch, self.first_stage_key).shape)
            except ValueError as e:
                raise UserError(f"{e}; see data.params.size and model.params.network_config.params") from e

    @staticmethod
    def _origin(batch: dict[str, Any], at: int) -> str:
        for key in ("relpath", "file_path_", "path"):
            if key in batch:
                return f" ({batch[key][at]})"
        return ""

    # --- loss and metrics ---------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Any:
        """[B, C, H, W] in [-1, 1] -> logits [B, num_classes] (in training mode with auxiliary logits, if any)."""
        return self.model(x * self.pixel_scale + self.pixel_shift if self.normalized else x)

    def _logits(self, batch: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
        """(logits, auxiliary logits). Networks of torchvision and of this project give tuples in training mode."""
        out = self(self.get_input(batch, self.first_stage_key))
        if isinstance(out, Tensor):
            return out, []
        logits, *rest = out
        rest = rest[0] if len(rest) == 1 and isinstance(rest[0], tuple) else rest
        return logits, [a for a in rest if a is not None]

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy (smoothed, with auxiliary heads, only in training mode) and the accuracy of the batch."""
        loss, logits = self._loss(batch)
        with torch.no_grad():
            accuracy = (logits.argmax(1) == batch[self.label_key]).float().mean()
        return loss, {"loss": loss, "acc": accuracy}

    def _loss(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        logits, aux = self._logits(batch)
        labels = batch[self.label_key]
        smoothing = self.label_smoothing if self.training else 0.0
        loss = F.cross_entropy(logits, labels, self.class_weights, label_smoothing=smoothing)
        for a in aux:
            loss = loss + self.aux_weight * F.cross_entropy(a, labels, self.class_weights, label_smoothing=smoothing)
        return loss, logits

    def _evaluate(self, batch: dict[str, Any], split: str) -> None:
        self._score(batch, split, "")
        if self.use_ema:
            with self.ema_scope():
                self._score(batch, split, "_ema")

    def _score(self, batch: dict[str, Any], split: str, suffix: str) -> None:
        loss, logits = self._loss(batch)
        scores = self.scores[split + suffix]
        for score in scores.values():
            score.update(logits, batch[self.label_key])
        size = self._size(batch)
        self.log(f"{split}/loss{suffix}", loss, batch_size=size, sync_dist=True)
        self.log_dict({f"{split}/{k}{suffix}": s for k, s in scores.items()}, batch_size=size)

    # --- optimiser ----------------------------------------------------------------------------------------------------

    def build_optimizer(self, params: Any) -> torch.optim.Optimizer:
        """Weight decay only for matrices and convolutions: none for biases, norms, and position embeddings."""
        spared = {id(p) for name, p in self.named_parameters() if p.ndim < 2 or name.endswith(("token", "embedding"))}
        params = list(params)
        groups = [
            {"params": [p for p in params if id(p) not in spared]},
            {"params": [p for p in params if id(p) in spared], "weight_decay": 0.0},
        ]
        return super().build_optimizer([g for g in groups if g["params"]])

    def build_scheduler(self, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """As in BaseModel; a parameter `auto` (`max_decay_steps`, `total_steps`, `T_max`) is the length of the run."""
        written = self.scheduler_config
        if written and "auto" in (params := dict(written.get("params") or {})).values():
            steps = self.trainer.estimated_stepping_batches
            if steps == float("inf"):
                raise UserError("the schedule needs an end: set lightning.trainer.max_steps or max_epochs")
            filled = {k: int(steps) if v == "auto" else v for k, v in params.items()}
            self.scheduler_config = {**written, "params": filled}
        try:
            return super().build_scheduler(optimizer)
        finally:
            self.scheduler_config = written

    # --- pictures -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def log_images(self, batch: dict[str, Any], n: int = 8) -> dict[str, Tensor]:
        """`inputs`: images with what was predicted, mistakes first, the most confident ones at the head; `filters`:
        the weights of the first convolution."""
        x = self.get_input(batch, self.first_stage_key)
        with self.ema_scope():
            logits, _ = self._logits(batch)
        sure, predicted = logits.float().softmax(1).max(1)
        wrong = predicted != batch[self.label_key]
        order = (wrong.float() * 2 + torch.where(wrong, sure, -sure)).argsort(descending=True)[:n]
        captions = []
        for i in order.tolist():
            text = f"{self.name_of(predicted[i])} {float(sure[i]):.0%}"
            captions.append(text + (f", is {self.name_of(batch[self.label_key][i])}" if wrong[i] else ""))
        pictures = {"inputs": labelled(x[order], captions, wrong[order].tolist())}
        first = next((m for m in self.model.modules() if isinstance(m, nn.Conv2d)), None)
        if first is not None:
            pictures["filters"] = filter_picture(first.weight)
        return pictures

    def name_of(self, label: Tensor | int) -> str:
        """The class's name, or its number."""
        return self.class_names[int(label)] if self.class_names else str(int(label))


def labelled(x: Tensor, captions: Sequence[str], wrong: Sequence[bool]) -> Tensor:
    """Images [B, 1|3, H, W] -> [B, 3, H', W'] enlarged, in a green or red frame, each over its caption."""
    factor = max(1, TILE // max(x.shape[2:]))
    x = x.float().cpu().clamp(-1, 1).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x[:, :3]
    frames = torch.tensor([RED if w else GREEN for w in wrong])[:, :, None, None]
    framed = frames.expand(-1, -1, x.shape[2] + 6, x.shape[3] + 6).clone()
    framed[:, :, 3:-3, 3:-3] = x
    return torch.cat([framed, log_txt_as_img((framed.shape[3], 30), captions)], 2)


def filter_picture(weight: Tensor) -> Tensor:
    """Weights of a first convolution [O, C, k, k] -> one picture [1, 1|3, H, W], each filter scaled to [-1, 1]."""
    w = weight.detach().float().cpu()
    w = w if w.shape[1] in (1, 3) else w.mean(1, keepdim=True)
    w = w / w.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-12)
    factor = max(1, 24 // w.shape[2])
    w = w.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return image_grid(w, nrow=max(1, round(len(w) ** 0.5)))[None]
