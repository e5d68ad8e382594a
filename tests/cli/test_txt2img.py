"""scripts/txt2img.py: official flags and names, one seed per picture, prompts, precision, extras."""

import io
import json
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.diffusion.official import DDIMSampler, DPMSolverSampler, PLMSSampler
from ldm.painter import Knobs, Painter, to_bytes
from ldm.text2image import load
from ldm.util import SeededNoise
from scripts import common, txt2img
from tests.cli import painting
from tests.cli.painting import names, pixels, run
from tests.cli.tools import ROOT

SMALL = ["--H", 64, "--W", 64, "--steps", 3]
ONE = [*SMALL, "--n_iter", 1, "--n_samples", 1, "--skip_grid"]
FULL = ["--precision", "full"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return painting.save(tmp_path_factory.mktemp("sd"))


@pytest.fixture
def paint(files, tmp_path):
    """Runs txt2img on the tiny model; gives the folder of samples."""

    def go(*argv, code=0, out="out"):
        run("txt2img", "--config", files[0], "--ckpt", files[1], "--outdir", tmp_path / out, *argv, code=code)
        return tmp_path / out / "samples"

    return go


def settings(path):
    return json.loads(Image.open(path).text["ldm"])


# --- flags and names --------------------------------------------------------------------------------------------------

OFFICIAL = {"prompt": common.PROMPT, "steps": 50, "eta": None, "n_iter": 2, "H": 512, "W": 512, "n_samples": 3}
OFFICIAL |= {"scale": 7.5, "seed": 42, "precision": "autocast", "sampler": "ddim"}
LDM = {"steps": 200, "n_iter": 1, "H": 256, "W": 256, "n_samples": 4, "scale": 5.0}


@pytest.mark.smoke
def test_official_flags_and_defaults(monkeypatch):
    monkeypatch.setattr(common, "SD_WEIGHTS", __file__)  # any file: Stable Diffusion is there
    flags = "--prompt --outdir --skip_grid --skip_save --ddim_steps --plms --dpm_solver --laion400m --fixed_code"
    flags += " --ddim_eta --n_iter --H --W --C --f --n_samples --n_rows --scale --from-file --config --ckpt --seed"
    known = txt2img.build_parser().format_help()
    assert [f for f in [*flags.split(), "--precision"] if f not in known] == []
    args = txt2img.build_parser().parse_args([])
    found = txt2img.settings_of(args)
    assert {k: found[k] for k in OFFICIAL} == OFFICIAL and args.outdir == "outputs/txt2img-samples"
    args = txt2img.build_parser().parse_args(["--laion400m", "--plms"])
    assert txt2img.settings_of(args)["sampler"] == "plms" and args.outdir == "outputs/txt2img-samples-laion400m"
    found = txt2img.settings_of(txt2img.build_parser().parse_args(["--ldm", "--scale", "3"]))
    assert {k: found[k] for k in LDM} == {**LDM, "scale": 3.0}


@pytest.mark.smoke
def test_names_go_on_from_the_highest_number(paint):
    samples = paint(*SMALL, "--n_iter", 2, "--n_samples", 2)
    assert names(samples) == [f"0000{i}.png" for i in range(4)] and names(samples.parent) == [
        "grid-0000.png",
        "samples",
    ]
    assert Image.open(samples.parent / "grid-0000.png").size == (2 * 66 + 2, 2 * 66 + 2)
    before = pixels(samples / "00003.png")
    (samples / "00001.png").unlink()
    paint(*SMALL, "--n_iter", 1, "--n_samples", 1, "--seed", 1, "--n_rows", 1)
    assert names(samples) == ["00000.png", "00002.png", "00003.png", "00004.png"]
    assert names(samples.parent)[:2] == ["grid-0000.png", "grid-0001.png"]
    assert (pixels(samples / "00003.png") == before).all()
    paint(*SMALL, "--n_iter", 1, "--n_samples", 1, "--skip_save", "--skip_grid")
    assert len(names(samples)) == 4 and len(names(samples.parent)) == 3


def test_names_of_latent_diffusions_script(paint):
    for _ in range(2):
        paint("--ldm", *SMALL, "--n_samples", 1, "--prompt", "a red/blue fox")
    samples = paint("--ldm", *SMALL, "--n_samples", 1, "--prompt", "a red/blue fox", "--skip_grid")
    assert names(samples) == ["0000.png", "0001.png", "0002.png"]
    assert names(samples.parent) == ["a-red-blue-fox-2.png", "a-red-blue-fox.png", "samples"]


# --- seeds ------------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_a_seed_is_a_picture_whatever_the_batch(paint, capsys):
    many = paint(*SMALL, "--seed", 7, "--n_samples", 4, "--n_iter", 1)
    for i in (0, 3):
        alone = paint(*ONE, "--seed", 7 + i, out=f"alone{i}")
        assert (pixels(alone / "00000.png") == pixels(many / f"0000{i}.png")).all()
    assert (pixels(many / "00000.png") != pixels(many / "00001.png")).any()
    assert [settings(many / f"0000{i}.png")["seed"] for i in range(4)] == [7, 8, 9, 10]
    assert "weights: raw" in capsys.readouterr().out


def test_fixed_code_repeats_the_seeds(paint):
    samples = paint(*SMALL, "--seed", 7, "--n_samples", 2, "--n_iter", 2, "--fixed_code")
    assert [settings(samples / f"0000{i}.png")["seed"] for i in range(4)] == [7, 8, 7, 8]
    assert (pixels(samples / "00000.png") == pixels(samples / "00002.png")).all()


@pytest.mark.smoke
def test_a_picture_says_how_it_was_made_and_is_made_again(paint, files, tmp_path, capsys):
    argv = ["--prompt", "a (red:1.3) fox", "--negative-prompt", "blue", "--sampler", "euler_ancestral", "--scale", 3]
    first = paint(*SMALL, *argv, "--n_samples", 2, "--n_iter", 1, "--seed", 5)
    run("txt2img", "--like", first / "00001.png", "--outdir", tmp_path / "again")
    assert names(tmp_path / "again/samples") == ["00000.png"]
    assert (pixels(tmp_path / "again/samples/00000.png") == pixels(first / "00001.png")).all()
    found = settings(tmp_path / "again/samples/00000.png")
    wanted = {"script": "txt2img", "prompt": "a (red:1.3) fox", "negative_prompt": "blue", "seed": 6, "steps": 3}
    wanted |= {"sampler": "euler_ancestral", "scale": 3.0, "weights": "raw", "H": 64, "ckpt": str(files[1])}
    assert {k: found[k] for k in wanted} == wanted and found["digest"] and found["torch"]
    run("txt2img", "--like", first / "00001.png", "--outdir", tmp_path / "again", "--scale", 9)
    assert (pixels(tmp_path / "again/samples/00001.png") != pixels(first / "00001.png")).any()
    run("img2img", "--like", first / "00001.png", code=2)
    assert "use that script" in capsys.readouterr().err


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("sampler", [DDIMSampler, PLMSSampler, DPMSolverSampler])
def test_official_samplers_give_the_official_numbers(sampler, paint, files):
    flags = {DDIMSampler: [], PLMSSampler: ["--plms"], DPMSolverSampler: ["--dpm_solver"]}[sampler]
    samples = paint(*ONE, *flags, "--steps", 5, "--seed", 3, "--prompt", "a fox", "--scale", 4)
    model = load(files[1], str(files[0]), "").model
    with torch.no_grad():
        c, uc = model.get_learned_conditioning(["a fox"]), model.get_learned_conditioning([""])
        noise = SeededNoise([3])((1, 4, 8, 8))
        z, _ = sampler(model).sample(
            5, 1, (4, 8, 8), c, x_T=noise, verbose=False, unconditional_guidance_scale=4, unconditional_conditioning=uc
        )
        x = to_bytes(model.decode_first_stage(z))
    assert np.abs(pixels(samples / "00000.png") - x[0]).max() <= 1


@pytest.mark.parametrize("steps", [1, 3, 7, 30, 300, 1000])
def test_as_many_steps_as_asked_for(steps, files):
    painter = Painter(load(files[1], str(files[0]), "").model, Knobs(steps=steps))
    calls = []
    painter.model.model.register_forward_hook(lambda *_: calls.append(1))
    painter.model.model.diffusion_model.forward = lambda x, t, context: torch.zeros_like(x)  # only calls count
    painter.paint([(0, "")], (64, 64))
    assert len(calls) == steps


def test_guidance_and_prompts_matter(paint):
    base = pixels(paint(*ONE, "--prompt", "a fox") / "00000.png")
    for i, argv in enumerate(
        (["--prompt", "a dog"], ["--negative-prompt", "grey"], ["--scale", 1], ["--clip-skip", 2])
    ):
        other = pixels(paint(*ONE, "--prompt", "a fox", *argv, out=f"other{i}") / "00000.png")
        assert (other != base).any(), argv


def test_any_size(paint, capsys):
    samples = paint(*ONE, "--H", 70, "--W", 51)
    assert Image.open(samples / "00000.png").size == (51, 70)
    assert "multiples of 16, so 64x80 is painted" in capsys.readouterr().out


def test_previews(paint):
    samples = paint(*ONE, "--steps", 4, "--preview", 2)
    assert Image.open(samples.parent / "preview.png").size == (64, 64)
    assert names(samples.parent) == ["preview.png", "samples"]


# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_prompt_files_of_any_kind(paint, tmp_path, monkeypatch):
    text = tmp_path / "prompts.txt"
    text.write_bytes(b"\xef\xbb\xbfa fox\r\n\r\n  a d\xc3\xb6g \r\n\t\r\na cat\r\n")
    samples = paint(*SMALL, "--from-file", text, "--n_samples", 2, "--n_iter", 1)  # the last chunk is shorter
    assert [settings(samples / f"0000{i}.png")["prompt"] for i in range(3)] == ["a fox", "a dög", "a cat"]
    assert len(names(samples)) == 3
    stdin = SimpleNamespace(buffer=io.BytesIO(b"a cow\nan owl"))
    monkeypatch.setattr(sys, "stdin", stdin)
    samples = paint(*SMALL, "--from-file", "-", "--n_iter", 2, out="stdin")
    assert [settings(samples / f"0000{i}.png")["prompt"] for i in range(4)] == ["a cow", "an owl"] * 2
    assert [settings(samples / f"0000{i}.png")["seed"] for i in range(4)] == [42, 43, 44, 45]


@pytest.mark.parametrize(
    ("content", "word"), [(b"\n \r\n", "no prompt"), (b"\xff\xfe\x00", "not UTF-8"), (None, "cannot be read")]
)
def test_prompt_files_without_prompts(content, word, paint, tmp_path, capsys):
    if content is not None:
        (tmp_path / "p.txt").write_bytes(content)
    paint("--from-file", tmp_path / "p.txt", code=2)
    assert word in capsys.readouterr().err


def test_what_is_cut_of_a_long_prompt_is_said(paint, capsys):
    prompt = " ".join(["fox"] * 75 + ["under", "the", "moon"])
    cut = pixels(paint(*ONE, "--prompt", prompt) / "00000.png")
    out = capsys.readouterr()
    assert out.out.count("cut: under the moon") == 1 and "cut" not in out.err
    whole = pixels(paint(*ONE, "--prompt", prompt, "--long-prompt", out="long") / "00000.png")
    assert "cut: " not in capsys.readouterr().out and (cut != whole).any()


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_precisions(paint):
    base = pixels(paint(*ONE, *FULL) / "00000.png")
    for name in ("autocast", "fp32", "bf16", "fp16"):
        found = pixels(paint(*ONE, "--precision", name, out=name) / "00000.png")
        assert (found == base).all() if name in ("autocast", "fp32") else 0 < np.abs(found - base).mean() < 12, name


def scaled(key, factor):
    def edit(state):
        state[key] = state[key] * factor
        return state

    return edit


def test_overflow_in_half_precision_is_made_again(tmp_path, capsys):
    # products of the attention are beyond 65504, which float16 cannot hold
    edit = scaled("first_stage_model.decoder.conv_in.weight", 3e7)
    config, ckpt = painting.save(tmp_path, edit=edit)
    argv = ["--config", config, "--ckpt", ckpt, *ONE]
    run("txt2img", *argv, *FULL, "--outdir", tmp_path / "full")
    run("txt2img", *argv, "--precision", "fp16", "--outdir", tmp_path / "half")
    assert "once more in fp32" in capsys.readouterr().out
    assert settings(tmp_path / "half/samples/00000.png")["precision"] == "fp32"
    assert np.abs(pixels(tmp_path / "half/samples/00000.png") - pixels(tmp_path / "full/samples/00000.png")).mean() < 12


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_black_or_white_picture_of_a_broken_model(value, tmp_path, capsys):
    edit = scaled("first_stage_model.decoder.conv_out.bias", value)
    config, ckpt = painting.save(tmp_path, edit=edit)
    run("txt2img", "--config", config, "--ckpt", ckpt, *ONE, "--outdir", tmp_path / "o", code=3)
    assert "non-finite values in fp32" in capsys.readouterr().err and not (tmp_path / "o").exists()


# --- extras -----------------------------------------------------------------------------------------------------------


def checker(folder, flags):
    """diffusers' safety checker, tiny, that flags everything or nothing."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**small, "image_size": 32, "patch_size": 16}
    network = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, text_config=small, projection_dim=16))
    network.concept_embeds_weights.data.fill_(-2.0 if flags else 2.0)
    network.special_care_embeds_weights.data.fill_(2.0)
    network.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)


def test_safety_withholds_and_says_so(paint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    paint(*ONE, "--safety", "on", code=2)
    assert "no safety checker" in capsys.readouterr().err
    checker(tmp_path / "models/safety-checker", flags=True)
    paint(*SMALL, "--n_iter", 1, "--n_samples", 1, "--safety", "on")
    assert "1 image withheld (use --safety off)" in capsys.readouterr().out and not (tmp_path / "out").exists()
    checker(tmp_path / "models/safety-checker", flags=False)
    assert names(paint(*ONE, "--safety", "on")) == ["00000.png"]


def test_watermark_needs_its_package(paint, tmp_path, monkeypatch, capsys):
    paint(*ONE, "--watermark", "on", code=2)
    assert "pip install invisible-watermark" in capsys.readouterr().err
    # a stand-in for the package, with its interface
    (tmp_path / "imwatermark.py").write_text(
        "class WatermarkEncoder:\n"
        "    def set_watermark(self, kind, content): assert (kind, len(content)) == ('bytes', 17)\n"
        "    def encode(self, bgr, method): assert method == 'dwtDct'; return bgr // 2\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    plain = pixels(paint(*ONE, "--H", 256, "--W", 256, "--steps", 1) / "00000.png")
    marked = pixels(paint(*ONE, "--H", 256, "--W", 256, "--steps", 1, "--watermark", "on", out="m") / "00000.png")
    assert (marked == plain // 2).all()


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--sampler", "eular"], ["eular", "did you mean euler"]),
        (["--plms", "--sampler", "ddim"], ["--plms", "ddim"]),
        (["--plms", "--ddim_eta", "1"], ["plms", "eta"]),
        (["--dpm_solver", "--plms"], ["choose one"]),
        (["--grid", "karas"], ["karas"]),
        (["--steps", "0"], ["--steps 0"]),
        (["--n_samples", "0"], ["--n_samples 0"]),
        (["--H", "-8"], ["--H -8"]),
        (["--C", "3"], ["--C 3: the model has 4"]),
        (["--f", "4"], ["--f 4: the model has 8"]),
        (["--clip-skip", "9"], ["clip_skip 9"]),
        (["--device", "cuda"], ["cuda", "available: cpu"]),
        (["--device", "mps"], ["mps", "available: cpu"]),
        (["--like", "nothing.png"], ["nothing.png"]),
    ],
)
def test_wrong_flags_are_one_message(argv, words, paint, capsys):
    paint("--n_iter", 1, *argv, code=2)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and all(word in message for word in words), message


def test_lack_of_memory_is_one_message(paint, capsys):
    paint(*ONE, "--H", 16_000_000, "--W", 16_000_000, code=1)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    for word in ("out of memory (peak ", "--n_samples", "--H and --W", "--precision bf16"):
        assert word in message


def start(paint_files, out, *argv):
    command = [sys.executable, "-u", str(ROOT / "scripts/txt2img.py"), "--config", paint_files[0], "--ckpt"]
    command += [paint_files[1], "--outdir", out, *argv]
    # a shell that runs the tests in the background has its children ignore Ctrl-C
    listen = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **listen
    )


@pytest.mark.smoke
def test_finished_pictures_stay_after_an_interrupt(files, tmp_path):
    process = start(files, tmp_path, "--H", 64, "--W", 64, "--n_iter", 1000, "--steps", 20)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("samples/*.png")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "finished pictures stay" in err and "Traceback" not in err
    for path in tmp_path.glob("samples/*"):
        assert Image.open(path).convert("RGB").size == (64, 64) and path.suffix == ".png"


def test_nothing_that_painting_does_not_need_is_imported(files, tmp_path):
    argv = ["txt2img.py", "--config", files[0], "--ckpt", files[1], "--outdir", tmp_path, *ONE]
    code = (
        f"import runpy, sys; sys.argv = {[str(a) for a in argv]!r}\n"
        f"try: runpy.run_path({str(ROOT / 'scripts/txt2img.py')!r}, run_name='__main__')\n"
        "except SystemExit as e: assert e.code == 0, e.code\n"
        "heavy = {'lightning', 'torchmetrics', 'torchvision', 'scipy', 'sklearn', 'transformers', 'diffusers',\n"
        "         'torch._dynamo', 'torch._inductor', 'sympy', 'pandas', 'matplotlib', 'open_clip', 'imwatermark'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert names(tmp_path / "samples") == ["00000.png"]
