"""Generative adversarial networks: one recipe, whose loss, penalty and augmentation are chosen by name.

Goodfellow et al. 2014; the formulas, with their papers, are in ldm/modules/gan_losses.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.adversarial import AdversarialModel, Losses, not_finite
from ldm.models.base import Config
from ldm.models.diffusion.classes import ClassLabels
from ldm.models.framework import rank_zero_info, rank_zero_warn
from ldm.models.game import Game, film_strip
from ldm.modules import ada
from ldm.modules import gan_losses as formulas
from ldm.util import SeededNoise, UserError, class_of, instantiate_from_config, suggest

FEW_IMAGES = 50


class GAN(ClassLabels, AdversarialModel):
    """A generator z, c -> image against a discriminator image, c -> logit.

    Logged: `g_loss`, `d_loss`, `penalty`; `d_real`, `d_fake` (mean logits); and over intervals `accuracy` of the
    discriminator, gradient norms `g_norm`, `d_norm`, and `diversity` of the pictures as a share of the data's.

    Args:
        generator_config, discriminator_config: `{target, params}`; c_dim is set where the model has classes. Without a
            discriminator the model draws and cannot be trained.
        loss: a name in `gan_losses.LOSSES`.
        penalty: a name in `gan_losses.PENALTIES`, or None.
        penalty_weight: of the penalty: lambda of gp, gamma of r1 and r2.
        penalty_interval: updates of the discriminator per penalty, which then counts so much more (StyleGAN2, 4.3 and
            appendix B: lazy regularisation).
        clip_weights: limit of the discriminator's weights after each update (WGAN); None for none.
        augment: ada or diffaugment: what the discriminator sees instead of bare images; None for nothing.
        augment_params: of ada: pipe (a row of `ada.PRESETS`) and the arguments of `AdaptiveAugment`; of diffaugment:
            policy.
        class_weight: of the auxiliary classifier's cross-entropy, where the discriminator has one. As in AC-GAN (Odena
            et al. 2017, equation 3) the discriminator learns it on real and on generated pictures, and the generator
            is to be classified right.
        reconstruction_weight: of the L1 distance of a generated picture to the real one whose class it was told, as in
            pix2pix (Isola et al. 2017, equations 3 and 4); for classes of one picture each. 0 leaves it out.
        cond_stage_key: key of the classes in the batch; None for an unconditional model.
        num_classes: number of classes; `auto` in YAML.
        use_ema, ema_decay: average the generator's weights; the decay warms up over the first updates.
        ema_rampup: share of the training so far that the average's half-life may be at most (StyleGAN2-ADA: 0.05);
            None for the warm-up of `LitEma`.
        image_key: key of the images in the batch.
        watch: updates of the discriminator per line of the score.
        patience: updates for which a game must be lost before a warning.
    """

    loss_names = ("g_loss", "d_loss")
    training_only = ("discriminator.", "augment.", "path_length.")  # tensors that nobody draws with

    @property
    def tolerated_keys(self) -> tuple[str, ...]:
        """What a file may lack, or have in vain: statistics of training, and a discriminator that nobody asks."""
        return self.training_only if self.discriminator is None else self.training_only[1:]

    def __init__(
        self,
        generator_config: Config,
        discriminator_config: Config | None = None,
        loss: str = "softplus",
        penalty: str | None = None,
        penalty_weight: float = 1.0,
        penalty_interval: int = 1,
        clip_weights: float | None = None,
        augment: str | None = None,
        augment_params: Config | None = None,
        class_weight: float = 1.0,
        reconstruction_weight: float = 0.0,
        cond_stage_key: str | None = None,
        num_classes: int | None = None,
        use_ema: bool = True,
        ema_decay: float = 0.999,
        ema_rampup: float | None = None,
        image_key: str = "image",
        watch: int = 100,
        patience: int = 500,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        self.image_key, self.first_stage_key = image_key, image_key
        self.cond_stage_key, self.cond_dropout, self.num_classes = cond_stage_key, 0.0, None
        self.formula = _row("loss", loss, formulas.LOSSES)
        self.penalty = None if penalty is None else _row("penalty", penalty, formulas.PENALTIES)
        self.penalty_weight, self.penalty_interval, self.class_weight = penalty_weight, penalty_interval, class_weight
        self.clip_weights = clip_weights
        if cond_stage_key is not None and num_classes is None:
            raise ValueError("cond_stage_key needs num_classes: a number, or auto for that of the data")
        if cond_stage_key is None and reconstruction_weight:
            raise ValueError(
                f"reconstruction_weight: got {reconstruction_weight}, expected 0: without classes (cond_stage_key) the "
                "generator cannot know which picture is meant"
            )
        self.reconstruction_weight = reconstruction_weight
        classes = num_classes if cond_stage_key is not None else None
        self.generator = self._network("generator_config", generator_config, classes)
        self.discriminator = None
        if discriminator_config is not None:
            self.discriminator = self._network("discriminator_config", discriminator_config, classes)
        self.augment = build_augment(augment, augment_params or {})
        self.game, self._norm = Game(watch, patience), None
        if use_ema:
            self.init_ema(self.generator, decay=ema_decay, rampup=ema_rampup)
        self.load_ckpt_path()

    def _network(self, key: str, config: Config, classes: int | None) -> nn.Module:
        class_of(config, f"model.params.{key}")
        params = config.get("params") or {}
        size = params.get("img_resolution")
        if isinstance(size, (list, tuple)):
            raise ValueError(
                f"img_resolution: got {list(size)}, expected one number, since these networks make squares. With "
                f"data.params.size={min(size)} pictures are cropped to their middle"
            )
        params = {"c_dim": 0, **self.class_config(params, classes, "c_dim")}
        return instantiate_from_config({**config, "params": params})

    def networks(self) -> list[nn.Module]:
        return [n for n in (self.generator, self.discriminator) if n is not None]

    def generator_parameters(self) -> list[nn.Parameter]:
        return list(self.generator.parameters())

    def discriminator_parameters(self) -> list[nn.Parameter]:
        if self.discriminator is None:
            raise UserError("without model.params.discriminator_config this model draws, but cannot be trained")
        return list(self.discriminator.parameters())

    # --- the two players ----------------------------------------------------------------------------------------------

    def encode_classes(self, labels: Tensor) -> Tensor:
        """Class numbers [B] -> what the networks take as c."""
        return labels

    def inputs(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Real images [B, C, H, W] in [-1, 1], and class numbers [B] or None.

        Raises:
            UserError: images of another size than the generator's.
        """
        x, g = self.get_input(batch, self.image_key), self.generator
        if x.shape[1:] != (g.img_channels, g.img_resolution, g.img_resolution):
            raise UserError(
                f"the data has images of {x.shape[1]} x {x.shape[2]} x {x.shape[3]} (channels, height, width), the "
                f"networks expect {g.img_channels} x {g.img_resolution} x {g.img_resolution}: set data.params.size and "
                "data.params.channels; pictures that are not square are cropped to their middle"
            )
        return x, None if self.cond_stage_key is None else self.value_of(batch, self.cond_stage_key)

    def fake(self, n: int, labels: Tensor | None) -> Tensor:
        """n generated images, one for each label where there are any."""
        return self.generator(torch.randn(n, self.generator.z_dim, device=self.device), self._c(labels))

    def _c(self, labels: Tensor | None) -> Tensor | None:
        return None if labels is None else self.encode_classes(labels)

    def judge(self, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits of (augmented) images, and the cross-entropy of the auxiliary classifier, 0 without one."""
        images = images if self.augment is None else self.augment(images)
        if getattr(self.discriminator, "conditioning", None) != "auxiliary":
            return self.discriminator(images, self._c(labels)), images.new_zeros(())
        logits, classes = self.discriminator.with_classes(images)
        return logits, F.cross_entropy(classes, labels)

    def generator_loss(self, batch: dict[str, Any]) -> Losses:
        x, labels = self.inputs(batch)
        real = None
        if self.formula.relativistic:
            with torch.no_grad():
                real, _ = self.judge(x, labels)
        generated = self.fake(len(x), labels)
        fake, wrong_class = self.judge(generated, labels)
        loss, logs = self.formula.generator(fake, real) + self.class_weight * wrong_class, {}
        if self.reconstruction_weight:
            logs["reconstruction"] = F.l1_loss(generated.float(), x)
            loss = loss + self.reconstruction_weight * logs["reconstruction"]
        return loss, {"g_loss": loss, **logs}

    def discriminator_loss(self, batch: dict[str, Any]) -> Losses:
        x, labels = self.inputs(batch)
        with torch.no_grad():
            generated = self.fake(len(x), labels)
        real, wrong_real = self.judge(x, labels)
        fake, wrong_fake = self.judge(generated, labels)
        loss = self.formula.discriminator(real, fake) + self.class_weight * (wrong_real + wrong_fake)
        logs = {"d_loss": loss, "d_real": real.mean(), "d_fake": fake.mean()}
        if self.training:
            if self.penalty is not None and self.disc_updates % self.penalty_interval == 0:
                logs["penalty"] = self.penalty(lambda images: self.judge(images, labels)[0], x, generated)
                loss = loss + self.penalty_weight * self.penalty_interval * logs["penalty"]
            if isinstance(self.augment, ada.AdaptiveAugment):
                self.augment.observe(real)
            self._watch(x, generated, labels, real.detach(), fake.detach())
        return loss, logs

    def after_discriminator(self) -> None:
        if self.clip_weights is not None:
            formulas.clip_weights(self.discriminator_parameters(), self.clip_weights)

    # --- watching -----------------------------------------------------------------------------------------------------

    def _watch(self, x: Tensor, generated: Tensor, labels: Tensor | None, real: Tensor, fake: Tensor) -> None:
        score = {
            "diversity_real": formulas.diversity(x, labels),
            "diversity_fake": formulas.diversity(generated, labels),
        }
        if self.formula.boundary is not None:
            score["accuracy"] = formulas.accuracy(real, fake, self.formula.boundary)
        elif self.formula.relativistic:
            score["accuracy"] = (real > fake).float().mean()
        if isinstance(self.augment, ada.AdaptiveAugment):
            score |= {"ada_p": self.augment.pipe.p, "ada_r": self.augment.r}
        self.game.add(**score)
        means = self.game.score(self.updates)
        if means is not None:
            self.log_dict({f"train/{name}": value for name, value in means.items()}, batch_size=len(x))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        first = self.optimizers(use_pl_optimizer=False)[0]
        name = "generator" if optimizer is first else "discriminator"
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self.log(f"train/{name[0]}_norm", norm, batch_size=1)
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:  # a scaler leaves such a step out by itself
            self.check_gradient()
            self._norm = (name, norm, self.updates)
            if norm.device.type == "cpu":
                self.check_gradient()  # before the step: the weights stay as they were
        super().on_before_optimizer_step(optimizer)

    def check_gradient(self) -> None:
        """Raises UserError if the last gradient was not finite; on a GPU one step late, so that nothing waits."""
        if self._norm is not None:
            (name, norm, step), self._norm = self._norm, None
            if not bool(norm.isfinite()):
                raise not_finite(f"the {name}'s gradient", f"step {step}")

    def check_finite(self) -> None:
        super().check_finite()
        self.check_gradient()

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.discriminator is None:
            raise UserError(
                "this model has no discriminator, so it cannot be trained: model.params.discriminator_config"
            )
        data = getattr(self.trainer.train_dataloader, "dataset", None)
        if hasattr(data, "__len__") and len(data) < FEW_IMAGES:
            rank_zero_warn(
                f"{len(data)} training images: below {FEW_IMAGES} a GAN repeats them. Add images, or set "
                "model.params.augment=diffaugment"
            )

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            strip = film_strip(Path(self.trainer.default_root_dir) / "images" / "train")
            if strip is not None:
                rank_zero_info(f"the run as a film strip: {strip}")

    @torch.no_grad()
    def log_images(self, batch: dict[str, Any], n: int = 8, **_: Any) -> dict[str, Tensor]:
        """inputs, and samples of the same seeds each time; classes in turn."""
        x, _ = self.inputs(batch)
        with self.ema_scope():
            return {"inputs": x[:n], "samples": self.sample(self.condition(range(n)), seeds=range(n)).clamp(-1, 1)}

    # --- drawing ------------------------------------------------------------------------------------------------------

    def condition(
        self,
        seeds: Sequence[int],
        *,
        classes: Sequence[int] | None = None,
        prompts: Sequence[str] | None = None,
        negative_prompt: str | None = None,
    ) -> Tensor | None:
        """Class numbers [len(seeds)], None for an unconditional model; classes default to seed mod their number."""
        if self.cond_stage_key is None:
            return super().condition(seeds, classes=classes, prompts=prompts, negative_prompt=negative_prompt)
        return self.class_labels(seeds, classes, prompts or negative_prompt, self.device)

    def latents(self, cond: Tensor | None, noise: SeededNoise) -> Tensor:
        """What pictures are drawn from, and what lies between two of them is a picture too: z [B, z_dim]."""
        return noise((len(noise.seeds), self.generator.z_dim), device=self.device)

    def draw(self, latents: Tensor, cond: Tensor | None) -> Tensor:
        """Latents -> images [B, C, H, W] in [-1, 1]."""
        return self.generator(latents, self._c(cond)).float().clamp(-1, 1)

    @torch.no_grad()
    def sample(self, cond: Tensor | None = None, *, seeds: Sequence[int]) -> Tensor:
        """[len(seeds), C, H, W] in [-1, 1]; a picture depends on its seed and class only."""
        return self.draw(self.latents(cond, SeededNoise(seeds)), cond)

    @torch.no_grad()
    def interpolate(self, cond: Tensor | None = None, *, seeds: Sequence[int], frames: int = 24) -> Iterator[Tensor]:
        """Frames [C, H, W] in [-1, 1] of a closed walk through the pictures of `seeds`, `frames` from each to the next.

        Between two z the walk keeps their length, since a shorter z is no sample of the prior.
        """
        z = self.latents(cond, SeededNoise(seeds))
        for i in range(len(seeds)):
            j = (i + 1) % len(seeds)
            for step in range(frames):
                share = step / frames
                length = z[i].norm().lerp(z[j].norm(), share)
                between = F.normalize(z[i].lerp(z[j], share), dim=0) * length
                yield self.draw(between[None], None if cond is None else cond[i : i + 1])[0]


def _row(name: str, value: str, table: Mapping[str, Any]) -> Any:
    if value not in table:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(table)}{suggest(value, table)}")
    return table[value]


def build_augment(kind: str | None, params: Config) -> nn.Module | None:
    """See `augment` and `augment_params` of `GAN`.

    Raises:
        ValueError: an unknown kind or pipe.
    """
    if kind is None:
        return None
    builders = {"ada": _ada, "diffaugment": _diffaugment}
    return _row("augment", kind, builders)(params)


def _diffaugment(params: Config) -> nn.Module:
    return instantiate_from_config({"target": "ldm.modules.ada.DiffAugment", "params": params})


def _ada(params: Config) -> nn.Module:
    rest = {k: v for k, v in params.items() if k != "pipe"}
    pipe = ada.AugmentPipe(**_row("augment_params.pipe", params.get("pipe", "bgc"), ada.PRESETS))
    return instantiate_from_config({"target": "ldm.modules.ada.AdaptiveAugment", "params": rest}, pipe=pipe)
