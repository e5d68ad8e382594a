"""Runs of transformers over tokens, as a user trains and asks them: sample.py, txt2img.py, caption.py."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.generate import load_run, read_settings
from tests.cli.tools import QUICK, only_run, run_main
from tests.docs.test_commands import run_script

YAML = """
model:
  learning_rate: 3.0e-3
  target: ldm.models.{recipe}
  params:
    first_stage_config:
      target: ldm.modules.codebooks.PixelCodes
      params: {{size: 4, channels: 1, levels: 4}}
    transformer_config: {{params: {{n_layer: 2, n_head: 2, n_embd: 32}}}}
    {more}
data:
  target: main.DataModuleFromConfig
  params:
    batch_size: 4
    size: 4
    channels: 1
    train: {{target: ldm.data.image.ImageFolder, params: {{root: {root}}}}}
lightning:
  trainer: {{max_steps: 500}}
"""
WORDS = ["left", "right", "top", "bottom"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Four pictures, a bright half each, and what they show."""
    root = tmp_path_factory.mktemp("halves")
    x = np.zeros((4, 4, 4), np.uint8)
    x[0, :, :2], x[1, :, 2:], x[2, :2], x[3, 2:] = 255, 255, 255, 255
    for array, word in zip(x, WORDS, strict=True):
        Image.fromarray(array).save(root / f"{word}.png")
        (root / f"{word}.txt").write_text(f"bright {word}")
    return root


@pytest.fixture(scope="module")
def runs(pictures, tmp_path_factory):
    logs, found = tmp_path_factory.mktemp("logs"), {}
    text = "text_vocab: 270\n    text_length: 6"
    for name, recipe, more in (
        ("dalle", "autoregressive.DALLE", text),
        ("cogview", "cogview.CogView", text),
        ("gpt", "autoregressive.ImageGPT", "num_classes: auto"),
    ):
        yaml = logs / f"{name}.yaml"
        yaml.write_text(YAML.format(recipe=recipe, more=more, root=pictures))
        argv = ["-t", "-b", yaml, "-l", logs / name, *QUICK, "data.params.batch_size=4"]
        argv.append("lightning.callbacks.image_logger.params.disabled=true")
        assert run_main(*argv, "--no-test") == 0
        found[name] = only_run(logs / name)
    return found


def pixels(path):
    return np.asarray(Image.open(path).convert("L")).astype(int)


@pytest.mark.parametrize("name", ["dalle", "cogview"])
def test_the_prompt_decides(name, runs, pictures, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(f"bright {w}" for w in WORDS))
    argv = ["-r", runs[name], "--from-file", tmp_path / "prompts.txt", "--n_iter", 1, "--outdir", tmp_path / "out"]
    assert run_script("txt2img.py", [*argv, "--preview", 4]) == 0
    drawn = sorted((tmp_path / "out/samples").glob("*.png"))
    right = [np.abs(pixels(f) - pixels(pictures / f"{w}.png")).max() < 90 for f, w in zip(drawn, WORDS, strict=True)]
    assert sum(right) >= 3
    assert (tmp_path / "out/preview.png").is_file() and list((tmp_path / "out").glob("grid-*.png"))
    settings = read_settings(drawn[2])
    assert settings["prompt"] == "bright top" and settings["run"] == str(runs[name]) and "sampler" not in settings
    assert run_script("txt2img.py", ["--like", drawn[2], "--outdir", tmp_path / "again"]) == 0
    assert (pixels(next((tmp_path / "again/samples").glob("*.png"))) == pixels(drawn[2])).all()


def test_the_picture_grows(runs, tmp_path, monkeypatch):
    """After each four of the sixteen tokens preview.png holds as many rows as there are."""
    from scripts import common

    seen, write = [], common.write_preview
    monkeypatch.setattr(
        common, "write_preview", lambda outdir, x: (write(outdir, x), seen.append(pixels(outdir / "preview.png")))
    )
    argv = ["-r", runs["gpt"], "-n", 1, "--class", 0, "--outdir", tmp_path, "--preview", 4]
    assert run_script("sample.py", argv) == 0
    whole = pixels(tmp_path / "00000.png")
    assert len(seen) == 4
    for rows, picture in enumerate(seen, 1):
        assert (picture[:rows] == whole[:rows]).all() and (picture[rows:] == 0).all()


def test_a_picture_is_gone_on_with(runs, pictures, tmp_path):
    argv = ["-r", runs["gpt"], "-n", 3, "--prime", pictures / "top.png", "--outdir", tmp_path]
    assert run_script("sample.py", argv) == 0
    for file in tmp_path.glob("0000?.png"):
        assert (pixels(file)[:2] == 255).all()
    assert json.loads(json.dumps(read_settings(tmp_path / "00000.png")))["prime"] == str(pictures / "top.png")


def test_captions(runs, pictures, capsys):
    files = [pictures / f"{w}.png" for w in WORDS]
    assert run_script("caption.py", ["-r", runs["cogview"], *files]) == 0
    said = capsys.readouterr().out.splitlines()
    assert sum(line == f"{f}: bright {w}" for line, f, w in zip(said, files, WORDS, strict=True)) >= 3


def test_faults(runs, pictures, tmp_path, capfd):
    def fails(script, *argv):
        assert run_script(script, [*argv]) == 2
        error = capfd.readouterr().err
        assert "Traceback" not in error
        return error

    out = ["--outdir", tmp_path]
    assert "does not caption" in fails("caption.py", "-r", runs["dalle"], pictures / "top.png")
    assert "cannot be read" in fails("caption.py", "-r", runs["cogview"], tmp_path / "none.png")
    assert "draws without prompts" in fails("txt2img.py", "-r", runs["gpt"], "--prompt", "top", *out)
    assert "takes no class" in fails("sample.py", "-r", runs["dalle"], "--class", 0, "-n", 1, *out)
    assert "top_k: got 99, expected 1 to 4" in fails("sample.py", "-r", runs["gpt"], "-n", 1, "--set", "top_k=99", *out)
    error = fails("sample.py", "-r", runs["dalle"], "-n", 1, "--prompt", "top", "--set", "rerank=2", *out)
    assert "rerank: got none in" in error and "CogView needs none" in error
    error = fails("sample.py", "-r", runs["cogview"], "-n", 1, "--prompt", "top", "--set", "upscale=true", *out)
    assert "trained without upscale_share" in error


def test_a_position_table_that_is_too_small(pictures, tmp_path, capfd):
    transformer = "{target: ldm.modules.gpt.GPT, params: {vocab_size: 4, block_size: 10, n_head: 2, n_embd: 8}}"
    text = YAML.format(
        recipe="net2net.Net2NetTransformer", more="cond_stage_config: __is_unconditional__", root=pictures
    )
    text = text.replace("{params: {n_layer: 2, n_head: 2, n_embd: 32}}", transformer)
    (tmp_path / "a.yaml").write_text(text)
    assert run_main("-t", "-b", tmp_path / "a.yaml", "-l", tmp_path / "logs", *QUICK, "--no-test") == 2
    error = capfd.readouterr().err
    assert "Traceback" not in error and error.count("error: ") == 1
    assert "got 16 tokens (1 of the condition, 16 of the image" in error
    assert "at most 10 (transformer_config.params.block_size): set it to 16" in error


def test_the_vocabulary_is_in_the_checkpoint(runs):
    model, _ = load_run(runs["dalle"])
    assert model.text.decode(model.text.encode("bright left")) == "bright left" and model.text.learned
    assert torch.equal(model.text_rows(["bright left"]), load_run(runs["dalle"])[0].text_rows(["Bright LEFT"]))
