"""The only file that knows old names: dotted targets of the official code and trainer keys of Lightning 1."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

# official dotted path -> where the code lives now
TARGETS: dict[str, str] = {
    "main.DataModuleFromConfig": "ldm.data.datamodule.DataModuleFromConfig",
    "main.ImageLogger": "ldm.callbacks.ImageLogger",
    "main.SetupCallback": "ldm.callbacks.RunDirectory",
    "main.CUDACallback": "ldm.callbacks.Throughput",
    "main.LearningRateMonitor": "lightning.pytorch.callbacks.LearningRateMonitor",
    "pytorch_lightning.callbacks.ModelCheckpoint": "lightning.pytorch.callbacks.ModelCheckpoint",
    "pytorch_lightning.callbacks.LearningRateMonitor": "lightning.pytorch.callbacks.LearningRateMonitor",
    "pytorch_lightning.loggers.TensorBoardLogger": "lightning.pytorch.loggers.TensorBoardLogger",
    "pytorch_lightning.loggers.TestTubeLogger": "lightning.pytorch.loggers.TensorBoardLogger",
    "pytorch_lightning.loggers.WandbLogger": "lightning.pytorch.loggers.WandbLogger",
    "pytorch_lightning.loggers.CSVLogger": "lightning.pytorch.loggers.CSVLogger",
    "pytorch_lightning.strategies.DDPStrategy": "lightning.pytorch.strategies.DDPStrategy",
    # autoencoders
    "ldm.modules.diffusionmodules.model.Encoder": "ldm.modules.autoencoder.Encoder",
    "ldm.modules.diffusionmodules.model.Decoder": "ldm.modules.autoencoder.Decoder",
    "ldm.modules.diffusionmodules.model.Model": "ldm.modules.autoencoder.Model",
    "ldm.modules.diffusionmodules.model.ResnetBlock": "ldm.modules.autoencoder.ResnetBlock",
    "ldm.modules.diffusionmodules.model.AttnBlock": "ldm.modules.autoencoder.AttnBlock",
    "ldm.modules.diffusionmodules.model.Upsample": "ldm.modules.autoencoder.Upsample",
    "ldm.modules.diffusionmodules.model.Downsample": "ldm.modules.autoencoder.Downsample",
    "ldm.modules.diffusionmodules.model.Normalize": "ldm.modules.autoencoder.Normalize",
    "ldm.modules.diffusionmodules.model.get_timestep_embedding": "ldm.modules.autoencoder.get_timestep_embedding",
    "ldm.modules.diffusionmodules.model.LinAttnBlock": "ldm.modules.autoencoder.LinAttnBlock",
    "ldm.modules.diffusionmodules.model.make_attn": "ldm.modules.autoencoder.make_attn",
    "ldm.modules.diffusionmodules.model.Upsampler": "ldm.modules.rescale.Upsampler",
    "ldm.modules.diffusionmodules.model.Resize": "ldm.modules.rescale.Resize",
    "ldm.modules.diffusionmodules.model.LatentRescaler": "ldm.modules.rescale.LatentRescaler",
    "ldm.modules.diffusionmodules.model.MergedRescaleEncoder": "ldm.modules.rescale.MergedRescaleEncoder",
    "ldm.modules.diffusionmodules.model.MergedRescaleDecoder": "ldm.modules.rescale.MergedRescaleDecoder",
    "ldm.modules.diffusionmodules.model.FirstStagePostProcessor": "ldm.modules.rescale.FirstStagePostProcessor",
    "ldm.modules.diffusionmodules.model.SimpleDecoder": "ldm.modules.rescale.SimpleDecoder",
    "ldm.modules.diffusionmodules.model.UpsampleDecoder": "ldm.modules.rescale.UpsampleDecoder",
    "taming.modules.diffusionmodules.model.Encoder": "ldm.modules.autoencoder.Encoder",
    "taming.modules.diffusionmodules.model.Decoder": "ldm.modules.autoencoder.Decoder",
    "taming.modules.diffusionmodules.model.Model": "ldm.modules.autoencoder.Model",
    "taming.modules.diffusionmodules.model.ResnetBlock": "ldm.modules.autoencoder.ResnetBlock",
    "taming.modules.diffusionmodules.model.AttnBlock": "ldm.modules.autoencoder.AttnBlock",
    "taming.modules.diffusionmodules.model.Upsample": "ldm.modules.autoencoder.Upsample",
    "taming.modules.diffusionmodules.model.Downsample": "ldm.modules.autoencoder.Downsample",
    "taming.modules.diffusionmodules.model.Normalize": "ldm.modules.autoencoder.Normalize",
    "taming.modules.diffusionmodules.model.get_timestep_embedding": "ldm.modules.autoencoder.get_timestep_embedding",
    "sgm.modules.diffusionmodules.model.Encoder": "ldm.modules.autoencoder.Encoder",
    "sgm.modules.diffusionmodules.model.Decoder": "ldm.modules.autoencoder.Decoder",
    "sgm.modules.diffusionmodules.model.Model": "ldm.modules.autoencoder.Model",
    "sgm.modules.diffusionmodules.model.ResnetBlock": "ldm.modules.autoencoder.ResnetBlock",
    "sgm.modules.diffusionmodules.model.AttnBlock": "ldm.modules.autoencoder.AttnBlock",
    "sgm.modules.diffusionmodules.model.Upsample": "ldm.modules.autoencoder.Upsample",
    "sgm.modules.diffusionmodules.model.Downsample": "ldm.modules.autoencoder.Downsample",
    "sgm.modules.diffusionmodules.model.Normalize": "ldm.modules.autoencoder.Normalize",
    "sgm.modules.diffusionmodules.model.get_timestep_embedding": "ldm.modules.autoencoder.get_timestep_embedding",
    "sgm.modules.diffusionmodules.model.LinAttnBlock": "ldm.modules.autoencoder.LinAttnBlock",
    "sgm.modules.diffusionmodules.model.make_attn": "ldm.modules.autoencoder.make_attn",
    "ldm.modules.distributions.distributions.DiagonalGaussianDistribution": "ldm.modules.distributions.DiagonalGaussianDistribution",
    "ldm.modules.distributions.distributions.DiracDistribution": "ldm.modules.distributions.DiracDistribution",
    "ldm.modules.distributions.distributions.normal_kl": "ldm.modules.distributions.normal_kl",
    "sgm.modules.distributions.distributions.DiagonalGaussianDistribution": "ldm.modules.distributions.DiagonalGaussianDistribution",
    "ldm.modules.losses.contperceptual.LPIPSWithDiscriminator": "ldm.modules.losses.LPIPSWithDiscriminator",
    "ldm.modules.losses.contperceptual.DummyLoss": "ldm.modules.losses.DummyLoss",
    "ldm.modules.losses.contperceptual.adopt_weight": "ldm.modules.losses.adopt_weight",
    "ldm.modules.losses.contperceptual.hinge_d_loss": "ldm.modules.losses.hinge_d_loss",
    "ldm.modules.losses.contperceptual.vanilla_d_loss": "ldm.modules.losses.vanilla_d_loss",
    "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator": "ldm.modules.losses.VQLPIPSWithDiscriminator",
    "ldm.modules.losses.vqperceptual.hinge_d_loss_with_exemplar_weights": "ldm.modules.losses.hinge_d_loss_with_exemplar_weights",
    "ldm.modules.losses.vqperceptual.measure_perplexity": "ldm.modules.losses.measure_perplexity",
    "ldm.modules.losses.vqperceptual.adopt_weight": "ldm.modules.losses.adopt_weight",
    "ldm.modules.losses.vqperceptual.hinge_d_loss": "ldm.modules.losses.hinge_d_loss",
    "ldm.modules.losses.vqperceptual.vanilla_d_loss": "ldm.modules.losses.vanilla_d_loss",
    "ldm.modules.losses.vqperceptual.l1": "ldm.modules.losses.l1",
    "ldm.modules.losses.vqperceptual.l2": "ldm.modules.losses.l2",
    "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator": "ldm.modules.losses.VQLPIPSWithDiscriminator",
    "taming.modules.losses.vqperceptual.DummyLoss": "ldm.modules.losses.DummyLoss",
    "taming.modules.losses.vqperceptual.adopt_weight": "ldm.modules.losses.adopt_weight",
    "taming.modules.losses.vqperceptual.hinge_d_loss": "ldm.modules.losses.hinge_d_loss",
    "taming.modules.losses.vqperceptual.vanilla_d_loss": "ldm.modules.losses.vanilla_d_loss",
    "taming.modules.losses.DummyLoss": "ldm.modules.losses.DummyLoss",
    "taming.modules.losses.lpips.LPIPS": "ldm.modules.lpips.LPIPS",
    "taming.modules.losses.segmentation.BCELossWithQuant": "ldm.modules.losses.BCELossWithQuant",
    "taming.modules.discriminator.model.NLayerDiscriminator": "ldm.modules.discriminator.NLayerDiscriminator",
    "taming.modules.discriminator.model.weights_init": "ldm.modules.discriminator.weights_init",
    "taming.modules.util.ActNorm": "ldm.modules.discriminator.ActNorm",
    "taming.modules.vqvae.quantize.VectorQuantizer2": "ldm.modules.quantize.VectorQuantizer2",
    "taming.models.vqgan.VQModel": "ldm.models.autoencoder.VQModel",
    "sgm.models.autoencoder.AutoencoderKL": "ldm.models.autoencoder.AutoencoderKL",
    "sgm.models.autoencoder.IdentityFirstStage": "ldm.models.autoencoder.IdentityFirstStage",
}

LEGACY_PACKAGES = ("main", "taming", "sgm", "pytorch_lightning", "training", "torch_utils", "cutlit")


def is_legacy_module(path: str) -> bool:
    """True for a dotted path that starts with a package of the official code bases."""
    return path.partition(".")[0] in LEGACY_PACKAGES


# --- trainer keys -----------------------------------------------------------------------------------------------------

_STRATEGIES = {"ddp", "ddp2", "ddp_spawn", "ddp_cpu", "dp", "horovod", "deepspeed", "fsdp"}
_RENAMED = {
    "tpu_cores": "devices",
    "checkpoint_callback": "enable_checkpointing",
    "weights_summary": "enable_model_summary",
    "flush_logs_every_n_steps": "log_every_n_steps",
    "replace_sampler_ddp": "use_distributed_sampler",
    "track_grad_norm": None,
    "progress_bar_refresh_rate": "enable_progress_bar",
    "distributed_backend": "strategy",
    "terminate_on_nan": None,  # the NaN guard is always on
    "auto_select_gpus": None,
    "auto_lr_find": None,
    "auto_scale_batch_size": None,
    "amp_backend": None,
    "amp_level": None,
    "move_metrics_to_cpu": None,
    "prepare_data_per_node": None,
    "process_position": None,
    "stochastic_weight_avg": None,
    "log_gpu_memory": None,
    "sync_batchnorm_": "sync_batchnorm",
    "truncated_bptt_steps": None,
    "weights_save_path": "default_root_dir",
    "reload_dataloaders_every_epoch": "reload_dataloaders_every_n_epochs",
    "multiple_trainloader_mode": None,
    "num_processes": "devices",
    "val_check_interval_": "val_check_interval",
    "ipus": None,
    "resume_from_checkpoint": None,  # main.py reads it
}
_PRECISION = {"16": "16-mixed", "32": "32-true", "64": "64-true", "bf16": "bf16-mixed"}
TRAINER_KEYS = {*_RENAMED, "gpus"}


def translate_trainer(trainer: MutableMapping[str, Any]) -> list[str]:
    """Turns Lightning 1 trainer keys into today's, in place; returns one line per change."""
    changes: list[str] = []
    _translate_devices(trainer, changes)
    for old in [k for k in trainer if k in _RENAMED]:
        value, new = trainer.pop(old), _RENAMED[old]
        if new is None:
            changes.append(f"{old}: {value} -> dropped (Lightning 2 has no such key)")
            continue
        if new.startswith("enable_"):
            value = bool(value) and str(value).lower() not in ("0", "none", "false")
        trainer.setdefault(new, value)
        changes.append(f"{old} -> {new}: {value}")
    precision = str(trainer.get("precision", ""))
    if precision in _PRECISION:
        trainer["precision"] = _PRECISION[precision]
        if precision != "32":
            changes.append(f"precision: {precision} -> {_PRECISION[precision]}")
    return changes


def _translate_devices(trainer: MutableMapping[str, Any], changes: list[str]) -> None:
    if trainer.get("accelerator") in _STRATEGIES:
        old = trainer.pop("accelerator")
        strategy = "ddp" if old in ("ddp2", "ddp_cpu", "dp", "horovod") else old
        trainer.setdefault("strategy", strategy)
        changes.append(f"accelerator: {old} -> strategy: {strategy}")
    if "gpus" not in trainer:
        return
    gpus = trainer.pop("gpus")
    devices = parse_devices(gpus)
    if devices in (0, [], None):
        trainer.setdefault("accelerator", "cpu")
        trainer.setdefault("devices", 1)
        changes.append(f"gpus: {gpus!r} -> accelerator: cpu")
        return
    # "auto" rather than "gpu": the official files name a GPU even where the reader's machine has none
    import torch

    if torch.cuda.is_available() or torch.backends.mps.is_available():
        trainer.setdefault("accelerator", "gpu")
        trainer.setdefault("devices", devices)
        changes.append(f"gpus: {gpus!r} -> accelerator: gpu, devices: {devices}")
    else:
        trainer.setdefault("accelerator", "cpu")
        trainer.setdefault("devices", 1)
        changes.append(f"gpus: {gpus!r} -> accelerator: cpu (no GPU on this machine)")


def parse_devices(value: Any) -> int | list[int] | None:
    """`"0,"` -> [0], `"0,1"` -> [0, 1], `2` or `"2"` -> 2 devices, `-1` -> all, None -> None."""
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, str):
        if "," in value:
            return [int(v) for v in value.split(",") if v.strip()]
        return int(value) if value.strip() else None
    return [int(v) for v in value]


def translate_logger(logger: MutableMapping[str, Any]) -> list[str]:
    """TestTube is gone: its configs get TensorBoard."""
    changes: list[str] = []
    target = str(logger.get("target", ""))
    if "testtube" in target.lower() or target.endswith("TestTubeLogger"):
        logger["target"] = "lightning.pytorch.loggers.TensorBoardLogger"
        params = logger.get("params") or {}
        for key in ("debug", "create_git_tag", "log_graph"):
            params.pop(key, None)
        changes.append(f"logger {target} -> TensorBoardLogger")
    return changes
