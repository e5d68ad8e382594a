"""The only file that knows old names: dotted targets of the official code and trainer keys of Lightning 1."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any


def _rows(old: str, new: str, names: str) -> dict[str, str]:
    """One row a name: `old.Name` -> `new.Name` (`Old=New` where the class has another name here)."""
    pairs = (name.partition("=") for name in names.split())
    return {f"{old}.{name}": f"{new}.{other or name}" for name, _, other in pairs}


def _both(old: str, new: str, names: str) -> dict[str, str]:
    """The Train and the Validation class of each data set."""
    return _rows(old, new, " ".join(f"{n}{split}" for n in names.split() for split in ("Train", "Validation")))


def _stylegan(module: str, names: str) -> dict[str, str]:
    """`training.networks` is the name that the ADA release used."""
    new = f"ldm.modules.{module}"
    return {**_rows("training.networks_stylegan2", new, names), **_rows("training.networks", new, names)}


def _sgm(module: str, names: str) -> dict[str, str]:
    return _rows(f"sgm.modules.diffusionmodules.{module}", "ldm.diffusion.sgm", names)


# official dotted path -> where the code lives now
TARGETS: dict[str, str] = {
    "main.DataModuleFromConfig": "ldm.data.datamodule.DataModuleFromConfig",
    "main.ImageLogger": "ldm.callbacks.ImageLogger",
    "main.SetupCallback": "ldm.callbacks.RunDirectory",
    "main.CUDACallback": "ldm.callbacks.Throughput",
    "main.LearningRateMonitor": "lightning.pytorch.callbacks.LearningRateMonitor",
    "pytorch_lightning.loggers.TestTubeLogger": "lightning.pytorch.loggers.TensorBoardLogger",
    **_rows("pytorch_lightning.loggers", "lightning.pytorch.loggers", "TensorBoardLogger WandbLogger CSVLogger"),
    **_rows(
        "pytorch_lightning.callbacks",
        "lightning.pytorch.callbacks",
        "ModelCheckpoint LearningRateMonitor EarlyStopping",
    ),
    **_rows("pytorch_lightning.strategies", "lightning.pytorch.strategies", "DDPStrategy"),
    # U-Net
    **_rows("ldm.modules.diffusionmodules.openaimodel", "ldm.modules.unet", "UNetModel EncoderUNetModel"),
    **_rows("ldm.modules.diffusionmodules.openaimodel", "ldm.modules.unet_blocks", "TimestepEmbedSequential"),
    **_rows("ldm.modules.diffusionmodules.openaimodel", "ldm.modules.layers", "ResBlock Upsample Downsample"),
    **_rows(
        "ldm.modules.diffusionmodules.openaimodel",
        "ldm.modules.attention",
        "AttentionBlock QKVAttention QKVAttentionLegacy AttentionPool2d",
    ),
    **_rows(
        "ldm.modules.diffusionmodules.util",
        "ldm.modules.layers",
        "timestep_embedding conv_nd avg_pool_nd zero_module normalization GroupNorm32",
    ),
    **_rows("ldm.modules.diffusionmodules.util", "ldm.modules.official", "checkpoint scale_module"),
    **_rows("ldm.modules.diffusionmodules.util", "torch.nn", "SiLU linear=Linear"),
    "ldm.modules.diffusionmodules.util.mean_flat": "ldm.util.mean_flat",
    "ldm.modules.attention.SpatialSelfAttention": "ldm.modules.autoencoder.AttnBlock",
    **_rows("ldm.modules.diffusionmodules.util", "ldm.modules.conditioners", "HybridConditioner"),
    **_rows("ldm.modules.diffusionmodules.util", "ldm.diffusion.schedule", "make_beta_schedule"),
    **_rows("sgm.modules.diffusionmodules.openaimodel", "ldm.modules.unet", "UNetModel=SpatialUNetModel"),
    **_rows("sgm.modules.diffusionmodules.openaimodel", "ldm.modules.layers", "Timestep"),
    **_rows("sgm.modules.diffusionmodules.util", "ldm.modules.layers", "timestep_embedding"),
    **_rows("sgm.modules.diffusionmodules.util", "ldm.diffusion.schedule", "make_beta_schedule"),
    **_rows(
        "sgm.modules.attention",
        "ldm.modules.attention",
        "CrossAttention MemoryEfficientCrossAttention=CrossAttention FeedForward GEGLU",
    ),
    "sgm.modules.ema.LitEma": "ldm.modules.ema.LitEma",
    **_rows("sgm.lr_scheduler", "ldm.lr_scheduler", "LambdaLinearScheduler LambdaWarmUpCosineScheduler"),
    # samplers
    "ldm.models.diffusion.ddim.DDIMSampler": "ldm.diffusion.official.DDIMSampler",
    "ldm.models.diffusion.plms.PLMSSampler": "ldm.diffusion.official.PLMSSampler",
    "ldm.models.diffusion.dpm_solver.DPMSolverSampler": "ldm.diffusion.official.DPMSolverSampler",
    "ldm.models.diffusion.dpm_solver.sampler.DPMSolverSampler": "ldm.diffusion.official.DPMSolverSampler",
    **_rows("ldm.models.diffusion.dpm_solver.dpm_solver", "ldm.diffusion.dpm_solver", "DPM_Solver"),
    **_rows(
        "ldm.models.diffusion.dpm_solver.dpm_solver",
        "ldm.diffusion.dpm_schedule",
        "NoiseScheduleVP model_wrapper interpolate_fn expand_dims",
    ),
    **_rows(
        "ldm.modules.diffusionmodules.util",
        "ldm.diffusion.official",
        "make_ddim_timesteps make_ddim_sampling_parameters betas_for_alpha_bar extract_into_tensor noise_like",
    ),
    **_sgm("sampling", "BaseDiffusionSampler EDMSampler AncestralSampler EulerEDMSampler HeunEDMSampler"),
    **_sgm("sampling", "EulerAncestralSampler DPMPP2SAncestralSampler DPMPP2MSampler LinearMultistepSampler"),
    **_sgm("discretizer", "Discretization EDMDiscretization LegacyDDPMDiscretization"),
    **_sgm("denoiser", "Denoiser DiscreteDenoiser"),
    **_sgm("denoiser_scaling", "EDMScaling EpsScaling VScaling VScalingWithEDMcNoise"),
    **_sgm("denoiser_weighting", "UnitWeighting EDMWeighting VWeighting EpsWeighting"),
    **_sgm("loss_weighting", "UnitWeighting EDMWeighting VWeighting EpsWeighting"),
    **_sgm("sigma_sampling", "EDMSampling DiscreteSampling ZeroSampler"),
    **_sgm("guiders", "VanillaCFG IdentityGuider"),
    **_sgm("loss", "StandardDiffusionLoss"),
    **_sgm("wrappers", "OpenAIWrapper IdentityWrapper"),
    # autoencoders and their losses
    **_rows(
        "ldm.modules.diffusionmodules.model",
        "ldm.modules.autoencoder",
        "Encoder Decoder Model ResnetBlock AttnBlock LinAttnBlock make_attn Upsample Downsample Normalize "
        "get_timestep_embedding",
    ),
    **_rows(
        "ldm.modules.diffusionmodules.model",
        "ldm.modules.rescale",
        "LatentRescaler MergedRescaleEncoder MergedRescaleDecoder Upsampler Resize SimpleDecoder UpsampleDecoder "
        "FirstStagePostProcessor",
    ),
    **_rows("sgm.modules.diffusionmodules.model", "ldm.modules.autoencoder", "Encoder Decoder Model"),
    **_rows("taming.modules.diffusionmodules.model", "ldm.modules.autoencoder", "Encoder Decoder Model"),
    **_rows(
        "ldm.modules.distributions.distributions",
        "ldm.modules.distributions",
        "DiagonalGaussianDistribution DiracDistribution normal_kl",
    ),
    **_rows("sgm.modules.distributions.distributions", "ldm.modules.distributions", "DiagonalGaussianDistribution"),
    **_rows(
        "ldm.modules.losses.contperceptual",
        "ldm.modules.losses",
        "LPIPSWithDiscriminator DummyLoss adopt_weight hinge_d_loss vanilla_d_loss",
    ),
    **_rows(
        "ldm.modules.losses.vqperceptual",
        "ldm.modules.losses",
        "VQLPIPSWithDiscriminator adopt_weight hinge_d_loss vanilla_d_loss hinge_d_loss_with_exemplar_weights "
        "measure_perplexity l1 l2",
    ),
    **_rows(
        "taming.modules.losses.vqperceptual",
        "ldm.modules.losses",
        "VQLPIPSWithDiscriminator DummyLoss adopt_weight hinge_d_loss vanilla_d_loss",
    ),
    **_rows("taming.modules.losses", "ldm.modules.losses", "DummyLoss"),
    **_rows("taming.modules.losses.lpips", "ldm.modules.lpips", "LPIPS"),
    **_rows("taming.modules.losses.segmentation", "ldm.modules.losses", "BCELossWithQuant"),
    **_rows("taming.modules.discriminator.model", "ldm.modules.discriminator", "NLayerDiscriminator weights_init"),
    **_rows("taming.modules.util", "ldm.modules.discriminator", "ActNorm"),
    **_rows(
        "taming.modules.vqvae.quantize",
        "ldm.modules.quantize",
        "VectorQuantizer2 VectorQuantizer=VectorQuantizer2 GumbelQuantize",
    ),
    **_rows("taming.models.vqgan", "ldm.models.autoencoder", "VQModel"),
    **_rows("taming.models.vqgan", "ldm.models.vqgan", "GumbelVQ VQNoDiscModel VQSegmentationModel"),
    **_rows("taming.models.cond_transformer", "ldm.models.net2net", "Net2NetTransformer"),
    **_rows("taming.models.dummy_cond_stage", "ldm.modules.cond_stages", "DummyCondStage"),
    **_rows("taming.modules.misc.coord", "ldm.modules.cond_stages", "CoordStage"),
    **_rows("taming.modules.util", "ldm.modules.cond_stages", "SOSProvider Labelator"),
    **_rows("taming.lr_scheduler", "ldm.lr_scheduler", "LambdaWarmUpCosineScheduler"),
    **_rows("taming.modules.transformer.permuter", "ldm.modules.cond_stages", "Identity"),
    **_rows("taming.modules.transformer.mingpt", "ldm.modules.gpt", "GPT Block CausalSelfAttention"),
    **_rows(
        "sgm.models.autoencoder",
        "ldm.models.autoencoder",
        "AutoencoderKL IdentityFirstStage AutoencoderKLInferenceWrapper=AutoencoderKL",
    ),
    "sgm.models.diffusion.DiffusionEngine": "ldm.models.diffusion.engine.DiffusionEngine",
    # StyleGAN2
    **_stylegan("stylegan2", "Generator SynthesisNetwork SynthesisBlock MappingNetwork Discriminator"),
    **_stylegan("stylegan2_discriminator", "DiscriminatorBlock DiscriminatorEpilogue"),
    **_stylegan("stylegan2_layers", "FullyConnectedLayer Conv2dLayer SynthesisLayer ToRGBLayer MinibatchStdLayer"),
    **_stylegan("stylegan2_ops", "modulated_conv2d normalize_2nd_moment"),
    "training.augment.AugmentPipe": "ldm.modules.ada.AugmentPipe",
    **_rows(
        "torch_utils.ops.upfirdn2d",
        "ldm.modules.stylegan2_ops",
        "upfirdn2d setup_filter filter2d upsample2d downsample2d",
    ),
    "torch_utils.ops.bias_act.bias_act": "ldm.modules.stylegan2_ops.bias_act",
    "torch_utils.ops.conv2d_resample.conv2d_resample": "ldm.modules.stylegan2_ops.conv2d_resample",
    # data; the classes of `filelist` were named in official YAMLs but never released
    "main.WrappedDataset": "ldm.data.sampler.Streamed",
    **_both("ldm.data.faceshq", "ldm.data.filelist", "CelebAHQ FFHQ"),
    **_both("taming.data.faceshq", "ldm.data.filelist", "CelebAHQ FFHQ FacesHQ"),
    **_both("ldm.data.openimages", "ldm.data.filelist", "FullOpenImages OpenImagesBBox"),
    **_both("ldm.data.openimages", "ldm.data.imagenet", "SuperresOpenImagesAdvanced"),
    **_both("ldm.data.landscapes", "ldm.data.filelist", "RFW"),
    **_both("ldm.data.previews.pytorch_dataset", "ldm.data.filelist", "Previews"),
    **_both("taming.data.imagenet", "ldm.data.imagenet", "ImageNet"),
    **_both("taming.data.coco", "ldm.data.filelist", "CocoImagesAndCaptions"),
    **_rows("taming.data.annotated_objects_open_images", "ldm.data.annotated", "AnnotatedObjectsOpenImages"),
    **_rows("sgm.data.mnist", "ldm.data.vision", "MNISTLoader"),
    **_rows("taming.data.custom", "ldm.data.filelist", "CustomTrain CustomTest"),
    **_rows(
        "ldm.modules.image_degradation",
        "ldm.data.degradation",
        "degradation_fn_bsr=bsrgan degradation_fn_bsr_light=bsrgan_light",
    ),
    **_rows(
        "ldm.modules.image_degradation.bsrgan",
        "ldm.data.degradation",
        "degradation_bsrgan=bsrgan degradation_bsrgan_variant=bsrgan",
    ),
    **_rows(
        "ldm.modules.image_degradation.bsrgan_light", "ldm.data.degradation", "degradation_bsrgan_variant=bsrgan_light"
    ),
    # conditioners
    **_rows("ldm.modules.encoders.modules", "ldm.modules.conditioners", "ClassEmbedder SpatialRescaler"),
    **_rows(
        "ldm.modules.encoders.modules",
        "ldm.modules.text_embedders",
        "TransformerEmbedder BERTTokenizer BERTEmbedder FrozenCLIPEmbedder FrozenCLIPTextEmbedder "
        "FrozenClipImageEmbedder FrozenOpenCLIPEmbedder",
    ),
    "sgm.modules.GeneralConditioner": "ldm.modules.conditioners.GeneralConditioner",
    **_rows(
        "sgm.modules.encoders.modules",
        "ldm.modules.conditioners",
        "GeneralConditioner ConcatTimestepEmbedderND SpatialRescaler ClassEmbedder=LabelEmbedder",
    ),
    **_rows(
        "sgm.modules.encoders.modules",
        "ldm.modules.text_embedders",
        "FrozenCLIPEmbedder FrozenOpenCLIPEmbedder FrozenOpenCLIPEmbedder2",
    ),
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
