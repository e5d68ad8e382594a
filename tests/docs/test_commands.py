"""Every command of README.md and docs/ is run as a user types it, from another folder, shrunk to a few steps.

`logs/<run>` and the other names in RUNS stand for tiny runs of the config named there, the words in STANDS_FOR for
small files of that kind. A page that needs another one adds a row here; an unknown one fails. `make X` is looked up in
the Makefile without running it.
"""

import importlib.util
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm.config import leaves
from tests.cli.tools import QUICK, ROOT, only_run, run_main
from tests.data.scenes import make_scenes
from tests.docs.pages import PAGES, commands

RUNS = {
    "run": "configs/diffusion/ddpm_digits.yaml",
    "classifier_run": "configs/classifier/resnet_digits.yaml",
    "vae_run": "configs/autoencoder/vae_digits.yaml",
    "first_stage_run": "configs/autoencoder/openmoji_kl.yaml",
    "txt2img_run": "configs/latent-diffusion/openmoji_demo.yaml",
    "first_run": "configs/autoencoder/kl_digits.yaml",
    "latent_run": "configs/latent-diffusion/digits_class.yaml",
    "folder_run": "configs/autoencoder/kl_folder.yaml",
    "gan_run": "configs/gan/dcgan_digits.yaml",
    "drawings_run": "configs/gan/stylegan2_openmoji_drawings.yaml",
    "stylegan_run": "configs/gan/stylegan2_digits.yaml",
    "gpt_run": "configs/autoregressive/digits_gpt.yaml",
    "vq_run": "configs/autoregressive/openmoji_vqgan.yaml",
    "digits_vq_run": "configs/autoregressive/digits_vqgan.yaml",
    "digits_vqgpt_run": "configs/autoregressive/digits_vqgpt.yaml",
    "cifar10_vq_run": "configs/autoregressive/cifar10_vqgan.yaml",
    "cifar10_gpt_run": "configs/autoregressive/cifar10_gpt.yaml",
    "dalle_run": "configs/autoregressive/openmoji_dalle.yaml",
    "cogview_run": "configs/autoregressive/openmoji_cogview.yaml",
}
DIFFUSION = {name for name, config in RUNS.items() if "diffusion/" in config}
# the run that another one starts from
FIRST_STAGE = {"latent_run": "first_run", "dalle_run": "vq_run", "cogview_run": "vq_run"}
FIRST_STAGE |= {"cifar10_gpt_run": "cifar10_vq_run", "digits_vqgpt_run": "digits_vq_run"}
# every checkpoint is kept, for its curve
KEEP = ("every_n_train_steps=1", "save_top_k=-1", "filename=at_{step}")
KEPT = {"txt2img_run": [f"lightning.modelcheckpoint.params.{k}" for k in KEEP]}
# what makes a network or an evaluation small: key of a YAML -> value
SMALL = {"model_channels": 32, "num_res_blocks": 1, "iwae_samples": 1, "ch": 32, "batch_size": 4, "channel_max": 16}
SMALL |= {"n_layer": 1, "n_head": 2, "n_embd": 32, "num_head_channels": 16}
# what makes a sampling command short: flag -> the most that is run
SHORT = {"-n": 10, "--n_samples": 10, "--n-samples": 10, "--steps": 3, "--max_steps": 1, "--max_epochs": 1}
SHORT |= {"--H": 32, "--W": 32}
PAINTERS = ("scripts/txt2img.py", "scripts/img2img.py", "scripts/inpaint.py")
SD_PLACE = "models/ldm/stable-diffusion-v1"
QUIET = [*QUICK, "lightning.callbacks.image_logger.params.disabled=true"]
ONE_STEP = ["--max_steps", "1", "--limit_val_batches", "1", "--limit_test_batches", "1"]
OUTPUTS = ("--out", "--outdir", "--json", "-l", "--logdir", "-n", "--name")  # what follows is written, not read
OFFLINE = ("ldm.data.builtin.", "ldm.data.image.ImageFolder")  # data that a test has

FOUND: dict[str, list[str]] = {}
for page in PAGES:
    for number, text in commands(page):
        FOUND.setdefault(text, []).append(f"{page.relative_to(ROOT)}:{number}")


# --- what placeholders stand for --------------------------------------------------------------------------------------


class Things:
    """Runs, pictures and files that commands name, each made when it is first needed."""

    def __init__(self, folder):
        self.folder, self.runs = folder, {}

    def run(self, name):
        assert name in RUNS, f"unknown placeholder <{name}>: tests/docs/test_commands.py knows {', '.join(RUNS)}"
        if name not in self.runs:
            yaml = str(ROOT / RUNS[name])
            argv = ["-t", "-b", yaml, "-l", self.folder / name, "--max_steps", 2, "--no-test", *small([yaml])]
            argv += KEPT.get(name, [])
            text = Path(yaml).read_text(encoding="utf-8")
            if "root: ???" in text or "ldm.data.vision." in text:  # which would download
                argv.append(f"data.params.root={self.pictures()}")
            if name in FIRST_STAGE:
                argv.append(f"first_stage={self.run(FIRST_STAGE[name])}")
            assert run_main(*argv) == 0
            self.runs[name] = only_run(self.folder / name)
        return self.runs[name]

    def copy_run(self, name, place):
        """A copy that a command may write to."""
        return Path(shutil.copytree(self.run(name), place / "logs" / name, dirs_exist_ok=True))

    def pictures(self):
        """A folder with three classes of eight pictures with captions."""
        folder = self.folder / "my_pictures"
        if not folder.exists():
            rng = np.random.default_rng(0)
            for i in range(24):
                path = folder / ("cat", "dog", "ship")[i % 3] / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(path)
                path.with_suffix(".txt").write_text(f"picture {i} of a {path.parent.name}", encoding="utf-8")
        return folder

    def scenes(self):
        """A folder of pictures and masks."""
        folder = self.folder / "my_scenes"
        return folder if folder.exists() else make_scenes(folder)

    def trained(self):
        """A checkpoint file of the diffusion run."""
        return self.run("run") / "checkpoints/last.ckpt"

    def drawn(self):
        """A picture that scripts/sample.py drew."""
        path = self.folder / "drawn/00000.png"
        if not path.exists():
            argv = ["-r", self.run("run"), "-n", 1, "--steps", 2, "--outdir", path.parent]
            assert run_script("sample.py", argv) == 0
        return path

    def drag_mask(self):
        """A mask for a picture of the StyleGAN2 run: all but the right edge may change."""
        path = self.folder / "drag_mask.png"
        mask = np.zeros((32, 32), np.uint8)
        mask[:, :28] = 255
        Image.fromarray(mask).save(path)
        return path

    def official(self):
        """A small file with the names of Stable Diffusion 1, and its YAML beside it."""
        from tests.conversion.models import config, modules, official_state

        path = self.folder / "official/model.ckpt"
        if not path.exists():
            path.parent.mkdir()
            torch.save({"state_dict": official_state("sd1", modules("sd1"))}, path)
            OmegaConf.save(OmegaConf.create(config("sd1")), path.with_suffix(".yaml"))
        return path

    def painted(self):
        """A picture that scripts/txt2img.py painted."""
        folder = self.folder / "painted"
        if not folder.exists():
            argv = ["--ckpt", self.official(), "--outdir", folder, *shorten("scripts/txt2img.py", ["--prompt", "a"])]
            assert run_script("txt2img.py", argv) == 0
        return folder / "samples/00000.png"

    def picture(self):
        """Any picture."""
        path = self.folder / "dog.png"
        noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        return path

    def mask(self):
        """White on the left, as large as `picture`."""
        path = self.folder / "mask.png"
        Image.fromarray(np.repeat(np.uint8([[255] * 16 + [0] * 16]), 32, axis=0)).save(path)
        return path

    def prompts(self):
        """Two prompts."""
        path = self.folder / "prompts.txt"
        path.write_text("a fox\n\na hen\n", encoding="utf-8")
        return path

    def diffusers(self):
        """The same as a diffusers folder."""
        folder = self.folder / "sd-v1"
        if not folder.exists():
            assert run_script("convert.py", ["--ckpt", self.official(), "--to", "diffusers", "--out", folder]) == 0
        return folder


STANDS_FOR = {
    r"PATH|my_pictures": Things.pictures,
    r"my_scenes": Things.scenes,
    r"FILE": Things.trained,
    r"outputs/txt2img-samples/\S+\.png": Things.painted,
    r"sketch\.png|dog\.png": Things.picture,
    r"mask\.png": Things.mask,
    r"drag_mask\.png": Things.drag_mask,
    r"prompts\.txt": Things.prompts,
    r"picture\.png|outputs/\S+\.png": Things.drawn,
    r"(models/ldm/stable-diffusion-v1/)?model\.ckpt": Things.official,
    r"sd-v1": Things.diffusers,
}


@pytest.fixture(scope="session")
def things(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LDM_DATA", str(folder / "data"))  # drawings are drawn once for all commands
        yield Things(folder)


def small(yamls):
    """key.path=value items that shrink the configs and keep them quiet."""
    config = OmegaConf.merge(*map(OmegaConf.load, yamls))
    keys = [k for k, _ in leaves(config) if k.rpartition(".")[2] in SMALL]
    shrunk = {k: SMALL[k.rpartition(".")[2]] for k in keys}
    return [*QUIET, *(f"{k}={v}" for k, v in shrunk.items())]


def substitute(words, things, place):
    """The words of a command with their placeholders filled in."""
    return [_substitute(w, before, things, place) for w, before in zip(words, ["", *words], strict=False)]


def _substitute(word, before, things, place):
    if re.fullmatch(r"configs/.*\.yaml", word):  # A+B: two stages of scripts/compare.py
        for part in word.split("+"):
            assert (ROOT / part).is_file(), f"{part} does not exist"
        return "+".join(str(ROOT / part) for part in word.split("+"))
    word = re.sub(r"(?:logs/)?<(\w+)>", lambda m: str(things.copy_run(m[1], place)), word)
    key, equals, value = word.rpartition("=")
    if before not in OUTPUTS:
        make = next((m for pattern, m in STANDS_FOR.items() if re.fullmatch(pattern, value)), None)
        value = str(make(things)) if make else value
    unknown = re.search(r"<|[a-z]>|\.\.\.", value) or re.fullmatch(r"[A-Z]{2,}", value)
    assert not unknown, f"unknown placeholder {word}: tests/docs/test_commands.py knows {', '.join(STANDS_FOR)}"
    return key + equals + value


# --- running ----------------------------------------------------------------------------------------------------------


def run_script(name, argv):
    """Exit code of scripts/<name>, run in this process as `python scripts/<name>` runs it, if it does not ask for one
    of its own."""
    path = ROOT / "scripts" / name
    if "paint_main" in path.read_text(encoding="utf-8"):
        return subprocess.run([sys.executable, str(path), *map(str, argv)]).returncode
    before = sys.argv, list(sys.path)
    sys.argv = [name, *map(str, argv)]
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as e:
        return e.code or 0
    finally:
        sys.argv, sys.path[:] = before
    return 0


def shorten(script, argv):
    """Numbers of steps and pictures no larger than SHORT says, and small where the command does not give them."""
    short = list(argv)
    for i, flag in enumerate(short[:-1]):
        if flag in SHORT and short[i + 1].isdigit():
            short[i + 1] = str(min(int(short[i + 1]), SHORT[flag]))
    if script in ("scripts/sample.py", "scripts/evaluate.py") and not {"-n", "--like", "--seeds"} & set(short):
        short += ["-n", "8"]
    if script in PAINTERS and "--like" not in short:
        few = {"--steps": 2, "--n_iter": 1, "--n_samples": 1} | ({"--H": 32, "--W": 32} if "txt2img" in script else {})
        short += [str(v) for flag, n in few.items() if flag not in short for v in (flag, n)]
    if script == "scripts/sample.py" and "--steps" not in short and any(DIFFUSION & set(Path(w).parts) for w in short):
        short += ["--steps", "3"]
    if script == "scripts/evaluate.py" and "--set" not in short and any(DIFFUSION & set(Path(w).parts) for w in short):
        short += ["--set", "steps=3"]
    return short


def run_training(argv, things):
    """main.py: one step, a few pictures, no download."""
    yamls = [w for w in argv if w.startswith(str(ROOT / "configs"))]
    tiny = small(yamls) if yamls else [*QUIET]
    train = OmegaConf.select(OmegaConf.merge(*map(OmegaConf.load, yamls)), "data.params.train.target") if yamls else ""
    if train and not train.startswith(OFFLINE) and not any("data.params.root=" in w for w in argv):
        tiny.append(f"data.params.root={things.pictures()}")
    resumed = {"-r", "--resume"} & set(argv)
    steps = ["--max_steps", "3", *ONE_STEP[2:]] if resumed else ONE_STEP
    return run_main(*argv, *steps, *tiny)


def run_demo(argv):
    return run_script("demo.py", [*argv, *small([ROOT / RUNS["run"]]), "lightning.trainer.max_steps=1"])


@pytest.mark.parametrize("command", FOUND, ids=[f"{w[0]}-{c}" for c, w in FOUND.items()])
def test_command(command, things, tmp_path, monkeypatch, capfd):
    words = [w for w in shlex.split(command, comments=True)]
    while re.match(r"[A-Z_]+=", words[0]):
        name, _, value = words.pop(0).partition("=")
        monkeypatch.setenv(name, value)
    if words[0] == "make":
        assert subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True).returncode == 0, command
        return
    if words[1] == "-m":
        assert importlib.util.find_spec(words[2]), f"no module {words[2]}"
        return
    script, words = words[1], substitute(words[2:], things, tmp_path)
    monkeypatch.chdir(tmp_path)
    argv = shorten(script, words)
    if script in PAINTERS:
        shutil.copytree(things.official().parent, tmp_path / SD_PLACE, dirs_exist_ok=True)
    if {"--help", "-h"} & set(argv) or script == "scripts/webui.py":  # that would serve until it is stopped
        code = subprocess.run([sys.executable, str(ROOT / script), "--help"], capture_output=True).returncode
    elif script == "main.py":
        code = run_training(argv, things)
    elif script == "scripts/demo.py":
        code = run_demo(argv)
    elif script == "scripts/compare.py":  # several trainings: tests/cli/test_compare.py runs them
        words = importlib.import_module("scripts.compare").build_parser().parse_args(argv).what
        code = 0 if all(Path(p).is_file() for w in words if "=" not in w for p in w.split("+")) else 1
    else:
        assert re.fullmatch(r"scripts/\w+\.py", script), f"unknown program {script}"
        code = run_script(script.removeprefix("scripts/"), argv)
    assert code == 0, f"{', '.join(FOUND[command])}: {command}\n{capfd.readouterr().err[-2000:]}"


# --- the machinery itself ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "word", ["logs/<another>", "PICTURES", "data.params.root=DIR", "configs/diffusion/no.yaml", "x..."]
)
def test_an_unknown_placeholder_fails(word, things, tmp_path):
    with pytest.raises(AssertionError):
        substitute([word], things, tmp_path)


def test_commands_are_found_in_every_form(tmp_path):
    page = tmp_path / "a.md"
    page.write_text(
        "Text `make demo`\nand `python\nmain.py -h`, not `python`.\n\n    python a.py x\n\n- item\n    make no\n\n"
        "```sh\nWANDB_MODE=offline python b.py \\\n    -t  # why\nls\n```\n"
    )
    assert [c for _, c in sorted(commands(page))] == [
        "make demo",
        "python main.py -h",
        "python a.py x",
        "WANDB_MODE=offline python b.py -t  # why",
    ]
