"""scripts/sample.py on models/ldm/<name>/{config.yaml, model.ckpt} whose YAML is the official one, made small.

The YAMLs are those of official_configs.json; the four that are not in it are written down here by what they say.
"""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from ldm import checkpoint
from ldm.util import instantiate_from_config
from tests.modules.test_tokenizer import VOCAB
from tests.reference import compare, filler

TREES = json.loads((Path(compare.__file__).parent / "official_configs.json").read_text())
CIN, CELEBA = "configs/latent-diffusion/cin256-v2.yaml", "models/ldm/celeba256/config.yaml"
TEXT, SEMANTIC = "models/ldm/text2img256/config.yaml", "models/ldm/semantic_synthesis512/config.yaml"
VQ_F4 = TREES[CELEBA]["model"]["params"]["first_stage_config"]
# what makes a model small, wherever it stands; the widths that meet each other stay equal
SMALL = {"model_channels": 32, "ch": 32, "num_res_blocks": 1, "context_dim": 32, "embed_dim": 32, "n_layer": 1}
SIZE = 8  # of the latents


def changed(path, **params):
    """The official tree of another model with other parameters."""
    tree = copy.deepcopy(TREES[path])
    tree["model"]["params"] |= params
    return tree


def network(path, **params):
    config = TREES[path]["model"]["params"]["unet_config"]
    return {**config, "params": {**config["params"], **params}}


def trees():
    no_file = {**VQ_F4, "params": {**VQ_F4["params"], "ckpt_path": "./models/first_stage_models/vq-f4/model.ckpt"}}
    bsr = {"model_channels": 160, "in_channels": 6, "attention_resolutions": [16, 8], "channel_mult": [1, 2, 2, 4]}
    plain = {"first_stage_config": no_file, "concat_mode": True}
    inpainting = {"in_channels": 7, "num_head_channels": -1, "num_heads": 8, "resblock_updown": True}
    tokens = {"n_embed": 512, "n_layer": 16, "vocab_size": 8192, "max_seq_len": 92, "use_tokenizer": False}
    encoders = "ldm.modules.encoders.modules."
    return {
        "cin256-v2": TREES[CIN],
        "celeba256": TREES[CELEBA],
        "text2img256": TREES[TEXT],
        "semantic_synthesis512": TREES[SEMANTIC],
        "semantic_synthesis256": changed(SEMANTIC, image_size=64),
        "bsr_sr": changed(
            CELEBA, cond_stage_key="LR_image", cond_stage_config={"target": "torch.nn.Identity"},
            unet_config=network(CELEBA, **bsr), **plain,
        ),
        "inpainting_big": changed(
            CELEBA, cond_stage_key="masked_image", cond_stage_config="__is_first_stage__",
            unet_config=network(CELEBA, **inpainting), **plain,
        ),
        "layout2img-openimages256": changed(
            TEXT, cond_stage_key="coordinates_bbox", first_stage_config=no_file,
            cond_stage_config={"target": encoders + "BERTEmbedder", "params": tokens},
        ),
    }  # fmt: skip


def small(node, inside=""):
    """The tree with SMALL numbers. `n_embed` counts codes of a first stage, but is the width of a BERT."""
    if isinstance(node, list):
        return [small(v, inside) for v in node]
    if not isinstance(node, dict):
        return node
    inside = str(node.get("target", inside))
    out = {k: small(v, inside) for k, v in node.items()}
    out |= {k: v for k, v in SMALL.items() if k in out}
    if "Autoencoder" in inside or "autoencoder" in inside:
        out |= {k: v for k, v in (("n_embed", 16), ("embed_dim", 3)) if k in out}
    elif "BERT" in inside and "n_embed" in out:
        out["n_embed"] = 32
    if out.get("num_heads", -1) > 1:
        out["num_heads"] = 2
    return out


def write(folder, tree, ema):
    """The two files of a release; gives the folder."""
    tree = small(tree)
    tree["model"]["params"] |= {"image_size": SIZE, "use_ema": ema}
    built = filler.fill(instantiate_from_config(tree["model"]), 0)
    if ema:
        built.restart_ema()
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    checkpoint.save_atomic({"state_dict": built.state_dict(), "global_step": 5}, folder / "model.ckpt")
    return folder


def conditions(folder):
    """Folders of two conditions each; the second is another one."""
    rng = np.random.default_rng(0)
    side = 4 * SIZE
    for name in ("low", "labels", "pairs", "layouts"):
        (folder / name).mkdir()
    for i in range(2):
        picture = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        picture.resize((SIZE, SIZE)).save(folder / f"low/{i}.png")
        picture.save(folder / f"pairs/{i}.png")
        mask = np.zeros((side, side), np.uint8)
        mask[8 : 16 + 8 * i] = 255
        Image.fromarray(mask).save(folder / f"pairs/{i}_mask.png")
        Image.fromarray(rng.integers(0, 182, (side, side), dtype=np.uint8)).save(folder / f"labels/{i}.png")
        layout = [{"category": 3 + i, "box": [0.1, 0.2, 0.5, 0.5]}, {"category": 7, "box": [0, 0, 1, 0.25 + 0.5 * i]}]
        (folder / f"layouts/{i}.json").write_text(json.dumps(layout))


ASKED = {
    "cin256-v2": ["--class", 207, "--scale", 3],
    "celeba256": [],
    "text2img256": ["--prompt", "a photo of cats", "--scale", 2],
    "semantic_synthesis512": ["--cond-from", "labels"],
    "semantic_synthesis256": ["--cond-from", "labels"],
    "bsr_sr": ["--cond-from", "low"],
    "inpainting_big": ["--cond-from", "pairs"],
    "layout2img-openimages256": ["--cond-from", "layouts"],
}


@pytest.fixture
def sample(tmp_path, monkeypatch):
    from scripts import common
    from scripts import sample as script

    monkeypatch.chdir(tmp_path)
    vocabulary = tmp_path / "models/bert-base-uncased/vocab.txt"
    vocabulary.parent.mkdir(parents=True)
    vocabulary.write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    conditions(tmp_path)

    def run(*argv, code=0):
        monkeypatch.setattr("sys.argv", ["sample.py", *map(str, argv), "--steps", "2", "--eta", "0"])
        assert common.main(script.build_parser(), script.draw) == code

    return run


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.parametrize("name", ASKED)
def test_a_release_is_sampled_where_the_readme_puts_it(name, sample, tmp_path, capsys):
    ema = name in ("celeba256", "bsr_sr", "layout2img-openimages256")
    folder = write(tmp_path / "models/ldm" / name, trees()[name], ema)
    sample("-r", f"models/ldm/{name}", "-n", 2, *ASKED[name])
    assert f"weights: {'ema' if ema else 'raw'}" in capsys.readouterr().out
    first, second = (pixels(f"outputs/samples/0000{i}.png") for i in range(2))
    assert first.shape == second.shape == (4 * SIZE, 4 * SIZE, 3)
    assert (first != second).any()
    if ASKED[name]:  # the condition decides: the same seed with another one
        flag, value = ASKED[name][:2]
        other = {"--class": 5, "--prompt": "paint", "--cond-from": f"{value}2"}[flag]
        if flag == "--cond-from":
            (tmp_path / other).mkdir()
            for path in (tmp_path / str(value)).glob("1*"):
                path.rename(tmp_path / other / path.name.replace("1", "0", 1))
        sample("-r", folder / "model.ckpt", "-n", 1, flag, other, *ASKED[name][2:], "--outdir", "other")
        assert (pixels("other/00000.png") != first).any()


def test_layouts_as_tokens(sample, tmp_path):
    """Category, upper left and lower right corner on a grid of 90 x 90; 8191 fills up; the crop is all."""
    from ldm import conditions as found

    built = instantiate_from_config(small(trees()["layout2img-openimages256"])["model"])
    count, get = found.samples_of(built, {}, "layouts")
    tokens = get(0)["coordinates_bbox"].tolist()
    assert count == 2 and len(tokens) == 92
    assert tokens[:3] == [3, 18 * 90 + 9, 62 * 90 + 53] and tokens[3:7] == [7, 0, 22 * 90 + 89, 8191]
    assert set(tokens[6:90]) == {8191} and tokens[90:] == [0, 8099]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("[{]", "is no layout"),
        ('{"category": 1}', "is no layout"),
        ("[]", "has 0 objects, expected 1 to 30"),
        ('[{"category": 9000, "box": [0, 0, 1, 1]}]', "expected 0..8191"),
        ('[{"category": 1, "box": [0.5, 0, 0.7, 1]}]', "a box within 0..1"),
    ],
)
def test_a_wrong_layout_is_one_message(layout, message, sample, tmp_path, capsys):
    write(tmp_path / "models/ldm/layout", trees()["layout2img-openimages256"], ema=False)
    (tmp_path / "layouts/0.json").write_text(layout)
    sample("-r", "models/ldm/layout", "-n", 1, "--cond-from", "layouts", code=2)
    assert message in capsys.readouterr().err
    sample("-r", "models/ldm/layout", "-n", 1, "--cond-from", "low", code=2)
    assert "expected a folder with layouts (.json)" in capsys.readouterr().err
