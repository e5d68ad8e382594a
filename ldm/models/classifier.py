"""Image classification."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassConfusionMatrix

from ldm.models import param_groups
from ldm.models.base import DEFAULT_OPTIMIZER, BaseModel
from ldm.models.classifier_faults import check_data, checked_statistics, explained, other_channels
from ldm.models.classifier_pictures import Mistakes, filter_picture, first_filters, heat, labelled
from ldm.models.classifier_report import Report, shares, write_picture
from ldm.models.framework import rank_zero_info
from ldm.models.pretrained import HALF, IMAGENET, load_weights, pixel_statistics
from ldm.modules.classifiers.augment import MIXERS, Augment, views
from ldm.modules.classifiers.common import BufferEma
from ldm.modules.classifiers.explain import attends, attention_rollout, grad_cam
from ldm.optim import HiddenAndRest
from ldm.util import UserError, class_of, instantiate_from_config

Config = dict[str, Any]


class Classifier(BaseModel):
    """A network that maps images [B, C, H, W] in [-1, 1] to one of `num_classes` labels.

    Logs train/loss and train/acc (of the batch), and over whole epochs val/loss (cross-entropy without smoothing),
    val/acc1, val/acc5 (with more than five classes), val/ece (expected calibration error, Guo et al. 2017),
    val/acc1_best (of all epochs), the same for the test set and, with EMA, as `..._ema`. `Report` adds the accuracy
    of each class and the confusion matrix.

    Args:
        network_config: `{target, params}` of a network: `ldm.modules.classifiers.*`, or any torchvision or timm model.
            It is given `num_classes` unless its params set it.
        num_classes: number of labels; `auto` in YAML takes it from the data.
        first_stage_key: batch key of the images [B, H, W, C].
        label_key: batch key of the labels, int64 [B].
        label_smoothing: share of the target spread evenly over all classes (Szegedy et al. 2015, section 7).
        class_weights: weight of each class in the loss, or None.
        aux_weight: weight of the loss of each auxiliary head.
        augment_config: list of `{target: torchvision.transforms.v2.X, params}` for training, in that order; see
            `ldm.modules.classifiers.augment.Augment`.
        distill_config: `{target: ldm.models.distillation.Teacher, params: {run: ...}}`: learn from another run as well.
        weights: `torchvision://IMAGENET1K_V1`, `timm://name`, a file, or a run directory or checkpoint of this project
            (its averaged weights, where it has them), loaded strictly.
        allow_head: with `weights` of another number of classes: the last layer starts afresh.
        train_only: `head`, or prefixes of the network's parameter names; the rest is frozen, batch norms included.
        layer_decay: each layer learns so many times as fast as the one above it.
        normalize: "imagenet" (mean and deviation per channel), "none" ([-1, 1] as it comes), a pair (means, deviations)
            of pixels in [0, 1], or None: what `weights` were trained with.
        test_views: whose logits are averaged in testing: "none" (the image itself), "flip", "flip+shift" (`views`).
        use_ema: keep an exponential moving average of weights and batch-norm statistics.
        ema_decay: its decay after the warm-up.

    Raises:
        ValueError: `class_weights` of another length, unknown `test_views`.
        UserError: `weights` or `train_only` that cannot be read or do not fit, unknown `normalize`.
    """

    main_score = "acc1"

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
        augment_config: Sequence[Config] = (),
        distill_config: Config | None = None,
        weights: str | None = None,
        allow_head: bool = False,
        train_only: str | Sequence[str] | None = None,
        layer_decay: float = 1.0,
        normalize: str | Sequence[Sequence[float]] | None = None,
        test_views: str = "none",
        use_ema: bool = False,
        ema_decay: float = 0.9999,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        if num_classes < 2:
            raise ValueError(
                f"got num_classes={num_classes}, expected 2 or more: a sub-folder with pictures for each class"
            )
        self.num_classes, self.first_stage_key, self.label_key = num_classes, first_stage_key, label_key
        self.label_smoothing, self.aux_weight, self.layer_decay = label_smoothing, aux_weight, layer_decay
        views(torch.zeros(1, 1, 2, 2), test_views)
        self.test_views, self.train_only = test_views, train_only
        given = {} if "num_classes" in (network_config.get("params") or {}) else {"num_classes": num_classes}
        self.model = instantiate_from_config(network_config, **given)
        network = network_config["target"].rpartition(".")[2]
        self._set_normalization(normalize, weights, network)
        self._set_class_weights(class_weights)
        self.augment = build_augment(augment_config, num_classes)
        self.teacher = instantiate_from_config(distill_config) if distill_config else None
        if weights is not None:
            report = load_weights(self.model, weights, network, num_classes, allow_head)
            rank_zero_info(f"{weights}: {report}")
        if train_only is not None:
            param_groups.freeze(self.model, train_only, num_classes)
            param_groups.rest_frozen_parts(self.model)
        if use_ema:
            self.init_ema(self.model, ema_decay)
        splits = [split + suffix for split in ("val", "test") for suffix in ("", "_ema")[: 1 + use_ema]]
        self.scores = nn.ModuleDict({name: self._new_scores() for name in splits})
        self.confusion = nn.ModuleDict({name: self._new_confusion() for name in splits})
        self.report, self.mistakes = Report(self.main_score), Mistakes()
        self.load_ckpt_path()

    def _set_class_weights(self, class_weights: Sequence[float] | None) -> None:
        if class_weights is not None and len(class_weights) != self.num_classes:
            raise ValueError(f"got {len(class_weights)} class_weights, expected {self.num_classes}")
        value = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", value, persistent=False)

    def _set_normalization(
        self, normalize: str | Sequence[Sequence[float]] | None, weights: str | None, network: str
    ) -> None:
        named = {"none": HALF, "imagenet": IMAGENET}
        self.implied = normalize is None
        if normalize is None:
            self._use_statistics(*pixel_statistics(weights, network))
        elif isinstance(normalize, str) and normalize in named:
            self._use_statistics(*named[normalize])
        else:
            self._use_statistics(*checked_statistics(normalize))

    def _use_statistics(self, mean: Sequence[float], std: Sequence[float]) -> None:
        # ((x + 1) / 2 - mean) / std as one multiplication and one sum, left out where it changes nothing
        self.statistics = tuple(mean), tuple(std)
        self.normalized = self.statistics != HALF
        old = getattr(self, "pixel_scale", None)
        m, s = (torch.tensor(v, device=None if old is None else old.device).view(1, -1, 1, 1) for v in self.statistics)
        self.register_buffer("pixel_scale", 0.5 / s, persistent=False)
        self.register_buffer("pixel_shift", (0.5 - m) / s, persistent=False)

    def _new_scores(self) -> nn.ModuleDict:
        ks = (1, 5) if self.num_classes > 5 else (1,)
        options: Config = {"num_classes": self.num_classes, "validate_args": False}
        scores = {f"acc{k}": MulticlassAccuracy(top_k=k, average="micro", **options) for k in ks}
        return nn.ModuleDict({**scores, "ece": MulticlassCalibrationError(n_bins=15, **options)})

    def per_class(self, matrix: Tensor) -> dict[str, Any]:
        """Counts [true, predicted] -> figures of each class for the report."""
        names = [self.name_of(i) for i in range(self.num_classes)]
        return {"per_class": shares(matrix.diagonal(), matrix.sum(1), names)}

    def _new_confusion(self) -> nn.Module:
        return MulticlassConfusionMatrix(self.num_classes, validate_args=False)

    def init_ema(self, module: nn.Module, decay: float = 0.9999) -> None:
        self.model_ema = BufferEma(module, decay=decay)
        self._ema_source = [module]

    def train(self, mode: bool = True) -> Classifier:
        """As for any module; frozen parts stay in evaluation mode."""
        super().train(mode)
        if mode and self.train_only is not None:
            param_groups.rest_frozen_parts(self.model)
        return self

    # --- batch --------------------------------------------------------------------------------------------------------

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Looks at the batch while it is in main memory, where reading a label makes no GPU wait."""
        if isinstance(batch, dict):
            self.check_batch(batch)
        return batch

    def on_train_epoch_start(self) -> None:
        """Has the last epoch validated, whatever `check_val_every_n_epoch` says: a run is known by it."""
        if self.trainer.check_val_every_n_epoch and self.trainer.current_epoch + 1 == self.trainer.max_epochs:
            self.trainer.check_val_every_n_epoch = 1

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Lets a network that fits itself to the images see those of the first batch."""
        if self.global_step == 0 and hasattr(self.model, "fit_to"):
            x = self.get_input(batch, self.first_stage_key)
            self.model.fit_to(self.normalize(self.trainer.strategy.broadcast(x)))

    def check_batch(self, batch: dict[str, Any]) -> None:
        """Raises UserError for labels that are missing or out of range, and for images too small for the network."""
        labels, x = batch.get(self.label_key), batch.get(self.first_stage_key)
        if labels is None:
            raise UserError(
                f"the batch has no key {self.label_key!r}; the data set gives {sorted(batch)} (model.params.label_key)"
            )
        wrong = self._out_of_range(labels).nonzero()
        if len(wrong):
            at = wrong[0].tolist()
            raise UserError(
                f"label out of range: image {at[0]} of the batch{self._origin(batch, at[0])} has class "
                f"{int(labels[tuple(at)])}, expected 0 to {self.num_classes - 1} "
                f"(model.params.num_classes: {self.num_classes})"
            )
        if isinstance(x, Tensor) and hasattr(self.model, "check"):
            try:
                self.model.check(self.get_input(batch, self.first_stage_key).shape)
            except ValueError as e:
                raise UserError(f"{e}; see data.params.size and model.params.network_config.params") from e

    def _out_of_range(self, labels: Tensor) -> Tensor:
        return (labels < 0) | (labels >= self.num_classes)

    @staticmethod
    def _origin(batch: dict[str, Any], at: int) -> str:
        for key in ("relpath", "file_path_", "path"):
            if key in batch:
                return f" ({batch[key][at]})"
        return ""

    # --- loss and metrics ---------------------------------------------------------------------------------------------

    def normalize(self, x: Tensor) -> Tensor:
        """Pixels in [-1, 1] -> on the scale of the published weights, where the network has some.

        Raises:
            UserError: statistics of another number of channels.
        """
        if not self.normalized:
            return x
        if self.pixel_scale.shape[1] not in (1, x.shape[1]):
            raise other_channels(self.pixel_scale.shape[1], x.shape[1])
        return x * self.pixel_scale + self.pixel_shift

    def forward(self, x: Tensor) -> Any:
        """[B, C, H, W] in [-1, 1] -> logits [B, num_classes] (in training mode with auxiliary logits, if any).

        Raises:
            UserError: images of a size, or a batch of one, that the network does not take.
        """
        try:
            return self.model(self.normalize(x))
        except (RuntimeError, ValueError, AssertionError) as e:
            fault = explained(e, x.shape, type(self.model).__name__)
            if fault is None:
                raise
            raise fault from e

    def predict(self, x: Tensor) -> Tensor:
        """[B, C, H, W] in [-1, 1] -> logits [B, num_classes], averaged over `test_views`; in evaluation mode."""
        weighted = [self._split(self(v))[0] * weight for v, weight in views(x, self.test_views)]
        return torch.stack(weighted).sum(0)

    @staticmethod
    def _split(out: Any) -> tuple[Tensor, list[Tensor]]:
        """(logits, auxiliary logits). Networks of torchvision and of this project give tuples in training mode."""
        if isinstance(out, Tensor):
            return out, []
        logits, *rest = out
        rest = rest[0] if len(rest) == 1 and isinstance(rest[0], tuple) else rest
        return logits, [a for a in rest if a is not None]

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy and the accuracy of the batch; in training mode with augmentation, smoothing, auxiliary heads
        and the teacher."""
        x, labels = self.get_input(batch, self.first_stage_key), batch[self.label_key]
        loss, logits = self._training_loss(x, labels) if self.training else self._plain_loss(x, labels)
        with torch.no_grad():
            accuracy = (logits.argmax(1) == labels).float().mean()
        return loss, {"loss": loss, "acc": accuracy}

    def _training_loss(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        target = labels
        if self.augment is not None:
            with torch.no_grad():
                x, target = self.augment(x, labels)
        logits, aux = self._split(self(x))
        loss = self.cross_entropy(logits, target, self.label_smoothing)
        for a in aux:
            loss = loss + self.aux_weight * self.cross_entropy(a, target, self.label_smoothing)
        if self.teacher is not None:
            loss = self.teacher.mix(loss, logits, x)
        return loss, logits

    def _plain_loss(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.predict(x)
        return self.cross_entropy(logits, labels), logits

    def cross_entropy(self, logits: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
        """Logits [B, num_classes], labels [B] or soft labels [B, num_classes] -> scalar."""
        return F.cross_entropy(logits.float(), target, self.class_weights, label_smoothing=smoothing)

    def _evaluate(self, batch: dict[str, Any], split: str) -> None:
        self._score(batch, split, "")
        if self.use_ema:
            with self.ema_scope():
                self._score(batch, split, "_ema")

    def _score(self, batch: dict[str, Any], split: str, suffix: str) -> None:
        labels, scores = batch[self.label_key], self.scores[split + suffix]
        loss, logits = self._plain_loss(self.get_input(batch, self.first_stage_key), labels)
        for score in (*scores.values(), self.confusion[split + suffix]):
            score.update(logits.float(), labels)
        if suffix or not self.use_ema:  # the weights that the run would be used with
            self.keep_mistakes(self.get_input(batch, self.first_stage_key), logits, labels)
        size = self._size(batch)
        self.log(f"{split}/loss{suffix}", loss, batch_size=size, sync_dist=True)
        self.log_dict({f"{split}/{k}{suffix}": s for k, s in scores.items()}, batch_size=size)

    def keep_mistakes(self, x: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Remembers the most confident mistakes of the epoch for a picture."""
        self.mistakes.update(x, logits, labels)

    def on_validation_epoch_start(self) -> None:
        self.mistakes.reset()

    def on_test_epoch_start(self) -> None:
        self.mistakes.reset()

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self._finish("val")

    def on_test_epoch_end(self) -> None:
        self._finish("test")

    def _finish(self, split: str) -> None:
        self.report.finish(self, split)
        if self.trainer.is_global_zero and self.trainer.loggers:
            picture = self.mistakes.picture(self.name_of)
            if picture is not None:
                write_picture(self.trainer, split, "mistakes", picture)
        self.mistakes.reset()

    def setup(self, stage: str) -> None:
        """Looks at the classes of the data before anything is trained or tested."""
        check_data(getattr(self.trainer, "datamodule", None), self.num_classes)

    def on_fit_start(self) -> None:
        self.report.start()

    def on_fit_end(self) -> None:
        self.report.announce()

    def on_save_checkpoint(self, checkpoint: Config) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["report"] = self.report.state_dict()
        checkpoint["pixel_statistics"] = [list(v) for v in self.statistics]

    def on_load_checkpoint(self, checkpoint: Config) -> None:
        super().on_load_checkpoint(checkpoint)
        if "report" in checkpoint:
            self.report.load_state_dict(checkpoint["report"])
        if self.implied and "pixel_statistics" in checkpoint:
            self._use_statistics(*checkpoint["pixel_statistics"])

    # --- optimiser ----------------------------------------------------------------------------------------------------

    def build_optimizer(self, params: Any) -> torch.optim.Optimizer:
        """Weight decay only for matrices and convolutions: none for biases, norms, and position embeddings."""
        cls = class_of(self.optimizer_config or DEFAULT_OPTIMIZER, "model.params.optimizer_config")
        roles = inspect.isclass(cls) and issubclass(cls, HiddenAndRest)
        groups = param_groups.groups(
            self.model, params, self.learning_rate, self.layer_decay, self.num_classes if roles else None
        )
        return super().build_optimizer(groups)

    def build_scheduler(self, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """As in BaseModel; a parameter `auto` (`max_decay_steps`, `total_steps`, `T_max`, `cycle_lengths: [auto]`) is
        the length of the run, `max_lr: auto` the learning rate of each parameter group."""
        written = self.scheduler_config
        if written and "auto" in str(params := dict(written.get("params") or {})):
            steps = self.trainer.estimated_stepping_batches
            if steps == float("inf"):
                raise UserError("the schedule needs an end: set lightning.trainer.max_steps or max_epochs")
            if params.get("max_lr") == "auto":
                params["max_lr"] = [g["lr"] for g in optimizer.param_groups]
            self.scheduler_config = {**written, "params": _filled(params, int(steps))}
        try:
            return super().build_scheduler(optimizer)
        finally:
            self.scheduler_config = written

    # --- pictures -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def log_images(self, batch: dict[str, Any], n: int = 8) -> dict[str, Tensor]:
        """`inputs`: images with what was predicted, mistakes first, the most confident ones at the head; `looks_at`:
        where the network looks in them; `filters`: the weights of the first convolution or whitening."""
        x = self.get_input(batch, self.first_stage_key)
        with self.ema_scope():
            logits = self.predict(x)
            sure, predicted = logits.float().softmax(1).max(1)
            wrong = predicted != batch[self.label_key]
            order = (wrong.float() * 2 + torch.where(wrong, sure, -sure)).argsort(descending=True)[:n]
            maps = self.looks_at(x[order], predicted[order])
        captions = []
        for i in order.tolist():
            text = f"{self.name_of(predicted[i])} {float(sure[i]):.0%}"
            captions.append(text + (f", is {self.name_of(batch[self.label_key][i])}" if wrong[i] else ""))
        pictures = {"inputs": labelled(x[order], captions, wrong[order].tolist())}
        if maps is not None:
            pictures["looks_at"] = heat(x[order], maps)
        if (filters := first_filters(self.model)) is not None:
            pictures["filters"] = filter_picture(filters)
        return pictures

    def looks_at(self, x: Tensor, classes: Tensor) -> Tensor | None:
        """Images [B, C, H, W] and the classes in question [B] -> maps [B, h, w] in [0, 1]: attention rollout for a
        Vision Transformer, else Grad-CAM; None for a network without maps."""
        x = self.normalize(x)
        try:
            if attends(self.model):
                return attention_rollout(self.model, x)
            return grad_cam(self.model, x, classes)
        except ValueError:
            return None

    def name_of(self, label: Tensor | int) -> str:
        """The class's name, or its number."""
        return self.class_names[int(label)] if self.class_names else str(int(label))


def build_augment(configs: Sequence[Config], num_classes: int) -> Augment | None:
    """The transforms of `augment_config`; those that mix labels are told how many there are."""
    built = []
    for config in configs:
        known = {"num_classes": num_classes} if class_of(config, "model.params.augment_config") in MIXERS else {}
        built.append(instantiate_from_config(config, **known))
    return Augment(built) if built else None


def _filled(node: Any, steps: int) -> Any:
    """Every `auto` in a parameter or a list of parameters replaced by `steps`."""
    if isinstance(node, dict):
        return {k: _filled(v, steps) for k, v in node.items()}
    if isinstance(node, list):
        return [_filled(v, steps) for v in node]
    return steps if node == "auto" else node
