"""Loading for the painting scripts: where files are looked for, which weights and config, memory, what does not fit."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from ldm import checkpoint, text2image
from ldm.generate import digest
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.ema import LitEma
from ldm.util import UserError
from scripts import common
from tests.cli import painting
from tests.cli.painting import build, pixels, run, save
from tests.cli.tools import ROOT

V1 = "configs/stable-diffusion/v1-inference.yaml"
WEIGHTS = "models/ldm/stable-diffusion-v1/model.ckpt"
SD2 = {  # names and shapes by which a Stable Diffusion 2 file is known
    "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
    "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
    "first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3),
    "first_stage_model.post_quant_conv.weight": (4, 4, 1, 1),
    "cond_stage_model.model.transformer.resblocks.0.ln_1.weight": (1024,),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return save(tmp_path_factory.mktemp("sd"))


def load(config, ckpt, **options):
    return text2image.load(Path(ckpt), str(config), "", **options)


def same(model, state):
    own = model.state_dict()
    assert own.keys() == state.keys()
    return all(torch.equal(own[k], state[k]) for k in own)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_weights_are_found_at_the_official_place(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as e:
        text2image.find_weights(None, WEIGHTS)
    for words in (f"no weights at {WEIGHTS}", "mkdir -p models/ldm/stable-diffusion-v1", "ln -s", "--ckpt"):
        assert words in str(e.value)
    (tmp_path / WEIGHTS).parent.mkdir(parents=True)
    other = Path(WEIGHTS).with_suffix(".safetensors")
    other.touch()
    assert text2image.find_weights(None, WEIGHTS) == other
    Path(WEIGHTS).symlink_to(files[1])
    assert text2image.find_weights(None, WEIGHTS) == Path(WEIGHTS)
    assert text2image.find_weights(str(files[1].parent), WEIGHTS) == files[1]  # a run directory
    with pytest.raises(UserError, match="nowhere.ckpt does not exist"):
        text2image.find_weights("nowhere.ckpt", WEIGHTS)


@pytest.mark.smoke
def test_the_official_place_from_any_folder(files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "SHIPPED", "models/ldm/nowhere")  # or it would draw with that
    run("txt2img", "--n_iter", 1, code=2)
    assert f"error: no weights at {WEIGHTS}" in capsys.readouterr().err
    (tmp_path / WEIGHTS).parent.mkdir(parents=True)
    Path(WEIGHTS).symlink_to(files[1])
    run("txt2img", "--config", files[0], "--H", 64, "--W", 64, "--steps", 1, "--n_iter", 1, "--n_samples", 1)
    assert (tmp_path / "outputs/txt2img-samples/samples/00000.png").is_file()


def test_the_config_of_a_run_of_ones_own(tmp_path):
    config, model = build(painting.SD)
    run_dir = tmp_path / "logs/run"
    (run_dir / "checkpoints").mkdir(parents=True)
    content = {"state_dict": model.state_dict(), "config": yaml.safe_dump({"model": config})}
    torch.save(content, run_dir / "checkpoints/last.ckpt")
    file = text2image.find_weights(str(run_dir), WEIGHTS)
    loaded = text2image.load(file, None, V1)
    assert loaded.config == "in the file" and same(loaded.model, model.state_dict())
    del content["config"]
    torch.save(content, file)
    (run_dir / "configs").mkdir()
    (run_dir / "configs/2024-project.yaml").write_text(yaml.safe_dump({"model": config}))
    assert text2image.load(file, None, V1).config.endswith("2024-project.yaml")


def test_the_digest_of_a_large_file_sees_every_part_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.generate.LARGE", 2**20)
    path = tmp_path / "x"
    data = bytearray(2**24)
    found = set()
    for place in (None, 0, 2**23, 2**24 - 1):
        if place is not None:
            data[place] = 1
        path.write_bytes(data)
        found.add(digest(path))
    path.write_bytes(data + b"\0")
    assert len(found | {digest(path)}) == 5 and all(len(d) == 16 for d in found)


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_ckpt_and_safetensors_are_the_same(files, tmp_path):
    state = checkpoint.read_state(files[1])
    for name in ("model.ckpt", "model.safetensors"):
        config, ckpt = save(tmp_path / name, name=name)
        loaded = load(config, ckpt)
        assert same(loaded.model, state) and loaded.weights == "raw" and not loaded.model.training
        assert not any(p.requires_grad or p.is_meta for p in loaded.model.parameters())
        unet = loaded.model.model.diffusion_model
        assert unet.input_blocks[0][0].weight.is_contiguous(memory_format=torch.channels_last)
        # a matrix that needs no conversion is the file itself
        matrix = loaded.model.model.diffusion_model.time_embed[0].weight
        assert matrix.untyped_storage().nbytes() >= matrix.nbytes


def with_averages(state, keep_raw=True):
    """As training writes it: raw weights, and averages (here: doubled) under names without dots."""
    _, model = build(painting.SD)
    ema = LitEma(model.model)
    averages = {f"model_ema.{k}": 2 * v.clone() if v.is_floating_point() else v for k, v in ema.state_dict().items()}
    raw = {k: v for k, v in state.items() if keep_raw or not k.startswith("model.")}
    return {**raw, **averages}


@pytest.mark.smoke
def test_ema_and_raw(files, tmp_path):
    raw = checkpoint.read_state(files[1])
    doubled = {k: 2 * v if k.startswith("model.") else v for k, v in raw.items()}
    config, full = save(tmp_path / "full", edit=with_averages)
    assert load(config, full).weights == "ema"
    assert same(load(config, full, weights="ema").model, doubled)
    assert same(load(config, full, weights="raw").model, raw) and load(config, full, weights="raw").weights == "raw"
    config, only = save(tmp_path / "only", edit=lambda s: with_averages(s, keep_raw=False))
    assert same(load(config, only).model, doubled)
    with pytest.raises(UserError, match="one set of weights only"):
        load(files[0], files[1], weights="ema")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_in_half_precision_run_in_full_on_the_cpu(dtype, files, tmp_path):
    def halved(state):
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}

    config, half = save(tmp_path, edit=halved)
    model = load(config, half).model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    full = load(*files).model
    torch.testing.assert_close(model.alphas_cumprod, full.alphas_cumprod, rtol=0, atol=0)
    torch.testing.assert_close(model.state_dict(), full.state_dict(), rtol=1e-2, atol=1e-2)
    argv = ["--H", 64, "--W", 64, "--steps", 2, "--n_iter", 1, "--n_samples", 1, "--outdir"]
    run("txt2img", "--config", config, "--ckpt", half, *argv, tmp_path / "o")
    assert pixels(tmp_path / "o/samples/00000.png").std() > 1


def test_buffers_that_no_file_holds_are_right():
    config, model = build(painting.SD)
    with checkpoint.NoWeights():
        empty = LatentDiffusion(**config["params"])
    assert all(p.is_meta for p in empty.model.parameters())
    for (name, a), (other, b) in zip(empty.named_buffers(), model.named_buffers(), strict=True):
        assert name == other and torch.equal(a, b), name


MEASURE = """
import sys
from pathlib import Path
from ldm import text2image
import ldm.models.diffusion.latent_diffusion, ldm.modules.unet, ldm.modules.text_embedders
config, ckpt, precision = sys.argv[1:]
def status(key): return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key)) * 1024
Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
before = status("VmRSS")
model = text2image.load(Path(ckpt), config, "", precision=precision).model
for p in model.parameters(): p.sum()  # reads all of them
print(status("VmHWM") - before, sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_loading_takes_the_memory_of_the_weights(name, tmp_path):
    """Also where each tensor is converted on the way: neither the file nor a second model is held beside it."""
    unet = painting.unet(model_channels=320, num_heads=8)
    config, ckpt = save(tmp_path, {**painting.SD, "unet_config": unet}, name)
    for precision in ("fp32", "bf16"):
        command = [sys.executable, "-c", MEASURE, str(config), str(ckpt), precision]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
        assert done.returncode == 0, done.stderr
        peak, weights = map(int, done.stdout.split())
        assert weights > 2e8 / (1 + (precision == "bf16"))
        assert peak < 1.15 * weights + text2image.checkpoint.READ_AHEAD, (precision, peak / weights)


# --- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        ("cond_stage_model.", "no text encoder"),
        ("first_stage_model.", "no first stage (VAE)"),
        ("model.diffusion_model.", "no U-Net"),
    ],
)
def test_a_missing_part_is_named(prefix, words, tmp_path):
    config, ckpt = save(tmp_path, edit=lambda s: {k: v for k, v in s.items() if not k.startswith(prefix)})
    with pytest.raises(UserError) as e:
        load(config, ckpt)
    assert words in str(e.value) and f"tensors named {prefix}..." in str(e.value)


def test_missing_and_unexpected_tensors_are_counted(tmp_path):
    def edit(state):
        del state["model.diffusion_model.out.2.weight"]
        return {**state, "model.diffusion_model.strange": torch.zeros(1)}

    config, ckpt = save(tmp_path, edit=edit)
    with pytest.raises(UserError, match=r"1 missing \(first: model.diffusion_model.out.2.weight\); 1 unexpected"):
        load(config, ckpt)


@pytest.mark.smoke
def test_a_file_of_another_family_names_its_config(tmp_path, capsys):
    save_file({k: torch.zeros(shape) for k, shape in SD2.items()}, tmp_path / "sd2.safetensors")
    for argv in ([], ["--config", V1]):
        run("txt2img", "--ckpt", tmp_path / "sd2.safetensors", *argv, code=2)
        message = capsys.readouterr().err
        assert "SD 2 file, the config is SD 1: use configs/stable-diffusion/v2-inference" in message


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
def test_a_truncated_file_is_one_message(name, tmp_path, capsys):
    config, ckpt = save(tmp_path, name=name)
    ckpt.write_bytes(ckpt.read_bytes()[: ckpt.stat().st_size * 2 // 3])
    run("txt2img", "--config", config, "--ckpt", ckpt, code=2)
    message = capsys.readouterr().err.strip().splitlines()
    assert len(message) == 1 and str(ckpt) in message[0] and "truncated" in message[0]


def test_a_config_of_no_latent_diffusion_model(files, capsys):
    config = str(ROOT / "configs/diffusion/ddpm_digits.yaml")
    run("txt2img", "--config", config, "--ckpt", files[1], code=2)
    assert "not of a latent diffusion model" in capsys.readouterr().err
    run("txt2img", "--config", "nothing.yaml", "--ckpt", files[1], code=2)
    assert "nothing.yaml does not exist" in capsys.readouterr().err


# --- the shipped configs ----------------------------------------------------------------------------------------------

COUNTS = {  # millions of parameters: U-Net, first stage, conditioner (COMPATIBILITY: 859.52, 872.30 + 581.99, 387.25)
    V1: (859.52, 83.65, 123.06),
    "configs/latent-diffusion/txt2img-1p4B-eval.yaml": (872.30, 83.65, 581.99),
    "models/ldm/inpainting_big/config.yaml": (387.25, 53.22, 53.22),
}


@pytest.mark.parametrize("path", COUNTS)
def test_shipped_configs_have_the_official_sizes(path):
    config = yaml.safe_load((ROOT / path).read_text())["model"]
    model = text2image._skeleton(config, path)
    parts = (model.model, model.first_stage_model, model.cond_stage_model)
    assert tuple(round(sum(p.numel() for p in part.parameters()) / 1e6, 2) for part in parts) == COUNTS[path]
