"""Every official YAML builds as it is, with the official state-dict keys and shapes (on the meta device)."""

import json

import pytest
import torch
from omegaconf import OmegaConf

from ldm import checkpoint
from ldm.families import for_recipe
from ldm.util import ConfigError, instantiate_from_config
from tests.reference import FIXTURES, compare

ROOT = FIXTURES.parents[2]
TREES = json.loads((FIXTURES.parent / "official_configs.json").read_text())


def keys_by_config():
    """{path in official_configs.json: fixture}; those of generative-models name their config without `sgm/`."""
    found = {}
    for path in sorted(FIXTURES.glob("keys_*.json")):
        fx = compare.load(path)
        found[next(p for p in (fx["config"], f"sgm/{fx['config']}") if p in TREES)] = fx
    return found


KEYS = keys_by_config()


def build(path, **params):
    model = TREES[path]["model"]
    with torch.device("meta"):
        return instantiate_from_config({**model, "params": {**model["params"], **params}})


def without_files(node):
    """The tree without weights files that nobody has here; they change no key."""
    if isinstance(node, dict):
        return {k: without_files(v) for k, v in node.items() if k != "ckpt_path"}
    return node


@pytest.mark.parametrize("path", [p for p in TREES if not p.startswith("taming/")])
def test_the_yaml_builds_unmodified(path):
    model = build(path)
    if path in KEYS:
        fx = KEYS[path]
        compare.check_keys(model, fx)
        assert sum(p.numel() for p in model.parameters()) == fx["n_params"]
        dtypes = {k: str(v.dtype).removeprefix("torch.") for k, v in model.state_dict().items()}
        assert {k: v for k, v in dtypes.items() if v != "float32"} == fx["dtypes"]


@pytest.mark.parametrize("path", [p for p in TREES if p.startswith("taming/") and "transformer" not in p])
def test_the_yaml_of_taming_builds(path):
    with torch.device("meta"):
        model = instantiate_from_config(without_files(TREES[path]["model"]))
    assert {"encoder", "decoder", "quantize", "loss"} <= set(dict(model.named_children()))


@pytest.mark.parametrize(
    ("name", "keys"), [("sd_xl_base", "sdxl_base"), ("v2-inference", "sd_2_1"), ("v2-inference-v", "sd_2_1")]
)
def test_files_of_generative_models_fit_latent_diffusion(name, keys):
    """The same models by this project's own YAML; the tables, which the files lack, come from the config."""
    config = OmegaConf.to_container(OmegaConf.load(ROOT / f"configs/stable-diffusion/{name}.yaml"))
    with torch.device("meta"):
        model = instantiate_from_config({k: config["model"][k] for k in ("target", "params")})
        file = {k: torch.empty(shape) for k, shape in compare.load(FIXTURES / f"keys_{keys}.json")["keys"].items()}
    own = model.state_dict()
    checkpoint.load(model, file, assign=True)
    tables = set(own) - set(for_recipe(file, own))
    assert tables and all("." not in k for k in tables)


def test_every_list_of_keys_has_its_yaml():
    assert len(KEYS) == len(list(FIXTURES.glob("keys_*.json"))) > 20


def test_a_misspelt_parameter_is_named():
    with pytest.raises(ConfigError, match="scale_facter.*did you mean scale_factor"):
        build("configs/stable-diffusion/v1-inference.yaml", scale_facter=1.0)
    with pytest.raises(ConfigError, match="denoiser_confg.*did you mean denoiser_config"):
        build("sgm/configs/inference/sd_2_1.yaml", denoiser_confg={})
