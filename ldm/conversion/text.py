"""Text encoders: CLIP, OpenCLIP and LDM's BERT as transformers' and diffusers' classes, and their tokenizers' files."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ldm.conversion.rows import Row, under
from ldm.util import UserError, get_obj_from_str

CLIP_ROWS = [Row("transformer.text_model", "text_model")]  # the names below it are the same
BLOCK = [
    Row("ln_1", "layer_norm1"),
    Row("ln_2", "layer_norm2"),
    Row("attn.in_proj_weight", tuple(f"self_attn.{n}_proj.weight" for n in "qkv")),
    Row("attn.in_proj_bias", tuple(f"self_attn.{n}_proj.bias" for n in "qkv")),
    Row("attn.out_proj", "self_attn.out_proj"),
    Row("mlp.c_fc", "mlp.fc1"),
    Row("mlp.c_proj", "mlp.fc2"),
]
OPEN_CLIP_ENDS = [
    Row("model.token_embedding", "text_model.embeddings.token_embedding"),
    Row("model.positional_embedding", "text_model.embeddings.position_embedding.weight"),
    Row("model.ln_final", "text_model.final_layer_norm"),
]
PROJECTION = Row("model.text_projection", "text_projection.weight", transpose=True)
BERT_ENDS = [
    Row("transformer.token_emb", "model.embed_tokens"),
    Row("transformer.pos_emb.emb", "model.embed_positions"),
    Row("transformer.norm", "model.layer_norm"),
    Row("transformer.to_logits", "to_logits"),
]
BERT_ATTENTION = [
    Row("0", "self_attn_layer_norm"),
    *(Row(f"1.to_{n}", f"self_attn.{n}_proj") for n in ("q", "k", "v", "out")),
]
BERT_FEED_FORWARD = [Row("0", "final_layer_norm"), Row("1.net.0.0", "fc1"), Row("1.net.2", "fc2")]


class Encoder(NamedTuple):
    """One text encoder in diffusers' layout.

    Attributes:
        library, cls: as model_index.json names it.
        rows: names below the embedder, and its own.
        config: config.json.
        tokenizer: writes the tokenizer's files into a folder; returns what the user has to do, or "".
        tokenizer_cls: as model_index.json names it.
        unused: names below the embedder that have no place there and no effect.
    """

    library: str
    cls: str
    rows: list[Row]
    config: dict[str, Any]
    tokenizer: Callable[[Path], str]
    tokenizer_cls: str
    unused: tuple[str, ...] = ()


def class_name(config: Mapping[str, Any]) -> str:
    """The name of the class that `{target: ...}` means here, whatever its official path."""
    return get_obj_from_str(config["target"]).__name__


def encoder_of(config: Mapping[str, Any], two_towers: bool = False) -> Encoder | None:
    """The counterpart of an embedder `{target, params}`, or None where diffusers has none.

    Args:
        config: of FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder(2) or BERTEmbedder.
        two_towers: as part of SDXL, whose pipelines take the last but one layer themselves.

    Raises:
        UserError: a choice of layers that no pipeline makes.
    """
    name, params = class_name(config), full_params(config)
    if name == "FrozenCLIPEmbedder":
        return _clip(params, two_towers)
    if name.startswith("FrozenOpenCLIPEmbedder"):
        return _open_clip(params, two_towers, name)
    return _bert(params) if name == "BERTEmbedder" and params["use_tokenizer"] else None


def full_params(config: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of an embedder `{target, params}`, defaults filled in."""
    parameters = inspect.signature(get_obj_from_str(config["target"])).parameters
    return {**{n: p.default for n, p in parameters.items()}, **(config.get("params") or {})}


def _cannot(what: str) -> UserError:
    return UserError(f"no pipeline of diffusers uses a text encoder with {what}; --to safetensors keeps it as it is")


def _clip(p: Mapping[str, Any], two_towers: bool) -> Encoder:
    from ldm.modules.clip_text import CLIP_TEXT_CONFIGS, CLIPTextModel

    sizes = {n: q.default for n, q in inspect.signature(CLIPTextModel).parameters.items()}
    sizes |= dict(p["clip_config"] or CLIP_TEXT_CONFIGS[p["version"]])
    if sizes["eos_token_id"] == 2:  # older configs, see CLIPTextModel.from_config
        sizes["eos_token_id"] = sizes["vocab_size"] - 1
    depth = sizes["num_hidden_layers"]
    index = p["layer_idx"] + depth + 1 if p["layer_idx"] is not None and p["layer_idx"] < 0 else p["layer_idx"]
    if two_towers and (p["layer"], index) != ("hidden", depth - 1) or not two_towers and p["layer"] != "last":
        raise _cannot(f"layer={p['layer']}, layer_idx={p['layer_idx']}")
    config = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "projection_dim": sizes["hidden_size"],
        **sizes,
        "bos_token_id": sizes["eos_token_id"] - 1,
        "pad_token_id": sizes["eos_token_id"],
        "attention_dropout": 0.0,
    }
    write = _clip_files(p, "<|endoftext|>")
    return Encoder("transformers", "CLIPTextModel", CLIP_ROWS, config, write, "CLIPTokenizer")


def open_clip_sizes(p: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of `OpenCLIPText` for those of a FrozenOpenCLIPEmbedder."""
    from ldm.modules.open_clip_text import text_arch

    sizes = dict(p["clip_config"] or {**text_arch(p["arch"]), "quick": p["version"] == "openai"})
    return {"vocab_size": 49408, "context_length": 77, "quick": False, **sizes}


def _open_clip(p: Mapping[str, Any], two_towers: bool, name: str) -> Encoder:
    sizes = open_clip_sizes(p)
    if two_towers and (p["layer"] != "penultimate" or not p.get("always_return_pooled") or p.get("legacy")):
        raise _cannot(f"layer={p['layer']}, legacy={p.get('legacy')} as one of SDXL's two")
    if not two_towers and (name.endswith("2") or p["layer"] not in ("last", "penultimate")):
        raise _cannot(f"layer={p['layer']} in {name}")
    # SD 2 reads the last but one layer, so its folder simply ends there; SDXL's pipelines choose the layer
    count = sizes["layers"] - (p["layer"] == "penultimate" and not two_towers)
    rows = list(OPEN_CLIP_ENDS) + ([PROJECTION] if two_towers else [])
    for i in range(count):
        rows += under(f"model.transformer.resblocks.{i}", f"text_model.encoder.layers.{i}", BLOCK)
    cls = "CLIPTextModelWithProjection" if two_towers else "CLIPTextModel"
    config = {
        "architectures": [cls],
        "model_type": "clip_text_model",
        "hidden_size": sizes["width"],
        "intermediate_size": 4 * sizes["width"],
        "num_hidden_layers": count,
        "num_attention_heads": sizes["heads"],
        "projection_dim": sizes["embed_dim"],
        "vocab_size": sizes["vocab_size"],
        "max_position_embeddings": sizes["context_length"],
        "hidden_act": "quick_gelu" if sizes["quick"] else "gelu",
        "layer_norm_eps": 1e-5,
        # OpenCLIP's end token is the largest id
        "bos_token_id": sizes["vocab_size"] - 2,
        "eos_token_id": sizes["vocab_size"] - 1,
        "pad_token_id": 0,
        "attention_dropout": 0.0,
    }
    unused = ["model.logit_scale"] + ([] if two_towers else ["model.text_projection"])
    unused += [f"model.transformer.resblocks.{i}." for i in range(count, sizes["layers"])]
    return Encoder("transformers", cls, rows, config, _clip_files(p, "!"), "CLIPTokenizer", tuple(unused))


def _bert(p: Mapping[str, Any]) -> Encoder:
    rows = list(BERT_ENDS)
    for i in range(p["n_layer"]):
        ours, theirs = "transformer.attn_layers.layers", f"model.layers.{i}"
        rows += under(f"{ours}.{2 * i}", theirs, BERT_ATTENTION) + under(
            f"{ours}.{2 * i + 1}", theirs, BERT_FEED_FORWARD
        )
    config = {
        "architectures": ["LDMBertModel"],
        "model_type": "ldmbert",
        "vocab_size": p["vocab_size"],
        "max_position_embeddings": p["max_seq_len"],
        "encoder_layers": p["n_layer"],
        "encoder_ffn_dim": 4 * p["n_embed"],
        "encoder_attention_heads": 8,
        "head_dim": 64,
        "d_model": p["n_embed"],
        "activation_function": "gelu",
        "dropout": 0.0,
        "pad_token_id": 0,
    }
    return Encoder("latent_diffusion", "LDMBertModel", rows, config, _bert_files(p), "BertTokenizer")


# --- from diffusers ---------------------------------------------------------------------------------------------------


def from_config(config: Mapping[str, Any], two_towers: bool = False) -> dict[str, Any]:
    """The embedder `{target, params}` of this project for a text encoder's config.json.

    Raises:
        UserError: no text encoder that it knows.
    """
    cls = (config.get("architectures") or ["?"])[0]
    home = "ldm.modules.text_embedders."
    if cls == "LDMBertModel" or config.get("model_type") == "ldmbert":
        params = {"n_embed": config["d_model"], "n_layer": config["encoder_layers"]}
        return {"target": home + "BERTEmbedder", "params": params | _bert_extras(config)}
    if cls == "CLIPTextModelWithProjection":
        params = {**_arch(config, config["num_hidden_layers"]), "layer": "penultimate"}
        params |= {"always_return_pooled": True, "legacy": False}
        return {"target": home + "FrozenOpenCLIPEmbedder2", "params": params}
    if cls != "CLIPTextModel":
        raise UserError(f"text_encoder/config.json: {cls} has no counterpart here")
    if not two_towers and config.get("hidden_act") == "gelu":  # the layer after the last one is not in the folder
        params = {**_arch(config, config["num_hidden_layers"] + 1), "layer": "penultimate"}
        return {"target": home + "FrozenOpenCLIPEmbedder", "params": params}
    params = {} if _is_vit_l(config) else {"clip_config": _clip_sizes(config)}
    if two_towers:
        params |= {"layer": "hidden", "layer_idx": config["num_hidden_layers"] - 1}
    return {"target": home + "FrozenCLIPEmbedder", "params": params}


def _bert_extras(config: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {"vocab_size": ("vocab_size", 30522), "max_position_embeddings": ("max_seq_len", 77)}
    return {new: config[old] for old, (new, usual) in defaults.items() if config.get(old, usual) != usual}


def _clip_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    from ldm.modules.clip_text import CLIPTextModel

    return {n: config[n] for n in inspect.signature(CLIPTextModel).parameters if n in config}


def _is_vit_l(config: Mapping[str, Any]) -> bool:
    from ldm.modules.clip_text import CLIP_TEXT_CONFIGS

    sizes = CLIP_TEXT_CONFIGS["openai/clip-vit-large-patch14"] | {"vocab_size": 49408, "max_position_embeddings": 77}
    return all(config.get(k, v) == v for k, v in sizes.items()) and config.get("hidden_act") == "quick_gelu"


def _arch(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """`arch` by OpenCLIP's name if there is one of these sizes, else `clip_config`."""
    from ldm.modules.open_clip_text import TEXT_ARCHS

    width, heads = config["hidden_size"], config["num_attention_heads"]
    usual = config.get("vocab_size", 49408) == 49408 and heads * 64 == width and config["hidden_act"] == "gelu"
    for name in ("ViT-H-14", "ViT-bigG-14"):
        if usual and TEXT_ARCHS[name] == {"width": width, "layers": layers}:
            return {"arch": name}
    embed = config.get("projection_dim", width)
    sizes = {"embed_dim": embed, "width": width, "heads": heads, "layers": layers}
    sizes |= {"vocab_size": config["vocab_size"], "context_length": config.get("max_position_embeddings", 77)}
    return {"clip_config": {**sizes, "quick": config["hidden_act"] == "quick_gelu"}}


# --- tokenizers -------------------------------------------------------------------------------------------------------


def _clip_files(p: Mapping[str, Any], pad: str) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        from ldm.modules.tokenizer import CLIPTokenizer

        tokenizer = CLIPTokenizer(p["vocab_path"])
        names = {CLIPTokenizer.START: "<|startoftext|>", CLIPTokenizer.END: "<|endoftext|>"}
        start, end = names.values()
        pairs = sorted(tokenizer.ranks, key=tokenizer.ranks.__getitem__)
        merges = "".join(f"{a} {b}\n" for a, b in pairs)
        special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": pad}
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": p["max_length"], **special}
        _dump(folder / "vocab.json", {names.get(k, k): v for k, v in tokenizer.ids.items()})
        (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
        _dump(folder / "tokenizer_config.json", config | {"do_lower_case": True, "add_prefix_space": False})
        _dump(folder / "special_tokens_map.json", special)
        return ""

    return write


def _bert_files(p: Mapping[str, Any]) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        from ldm.modules.tokenizer import find_bert_file

        config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": p["max_seq_len"]}
        _dump(folder / "tokenizer_config.json", config)
        try:
            vocabulary = find_bert_file(p["vocab_path"])
        except UserError:
            return f"put the vocab.txt of bert-base-uncased into {folder.name}/: it is not on this machine"
        (folder / "vocab.txt").write_bytes(vocabulary.read_bytes())
        return ""

    return write


def _dump(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
