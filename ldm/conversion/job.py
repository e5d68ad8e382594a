"""scripts/convert.py without its command line: reads a checkpoint or a diffusers folder, writes the other."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf
from torch import Tensor

from ldm import checkpoint, families
from ldm.config import load_yaml
from ldm.conversion import folder as folders
from ldm.conversion.layout import Layout, is_first_stage, layout_of
from ldm.conversion.recipe import BESIDE, Recipe, check, prefixes, recipe_of
from ldm.conversion.rows import to_official, to_theirs
from ldm.families import CONDITIONERS, STAGE
from ldm.util import UserError

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("diffusers", "official", "safetensors")
KEPT = ("global_step", "epoch", "pytorch-lightning_version", "class_names")  # of a .ckpt, as metadata


@dataclass
class Source:
    """What is converted, under official names.

    Attributes:
        state: tensors.
        config: `{"model": ...}`.
        metadata: strings that go into .safetensors files.
        said: lines for the user.
    """

    state: dict[str, Tensor]
    config: dict[str, Any]
    metadata: dict[str, str] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)


def convert(
    ckpt: str | Path,
    to: str,
    out: str | Path,
    *,
    config: str | Path | None = None,
    half: bool = False,
    weights: str | None = None,
) -> list[str]:
    """Converts one model; returns what to tell the user.

    Args:
        ckpt: checkpoint file, run directory, or diffusers folder.
        to: diffusers (a folder), official (one file, .ckpt or .safetensors by its name) or safetensors.
        out: what to write; must not exist.
        config: YAML of the model; None = the one in the file, beside it, or of its family.
        half: weights in float16.
        weights: ema or raw; None = ema where there are averaged weights.

    Raises:
        UserError: whatever the user can put right.
    """
    ckpt, out = Path(ckpt), Path(out)
    if to not in TARGETS:
        raise UserError(f"--to {to}: expected one of {', '.join(TARGETS)}")
    _check_out(out, to)
    source = read_folder(ckpt, config) if folders.is_folder(ckpt) else read_file(ckpt, config, weights)
    if weights is not None and folders.is_folder(ckpt) and weights == "ema":
        raise UserError(f"--weights ema: {ckpt} holds one set of weights only")
    if half:
        source.state = {k: _halved(k, v) for k, v in source.state.items()}
        source.said.append("weights: float16")
    if to == "diffusers":
        write_folder(source, out)
    else:
        write_file(source, out)
    return source.said


def _check_out(out: Path, to: str) -> None:
    if out.exists() and not (to == "diffusers" and out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out {out} exists already: nothing is overwritten")
    suffixes = {"safetensors": (".safetensors",), "official": (".ckpt", ".safetensors")}.get(to)
    if suffixes and out.suffix not in suffixes:
        raise UserError(f"--out {out}: expected a file name that ends in {' or '.join(suffixes)}")


def _halved(name: str, t: Tensor) -> Tensor:
    """float16 weights; the schedule's tables and counters stay as they are."""
    if not t.is_floating_point() or name.startswith(BESIDE):
        return t
    small = t.half()
    if bool((small.isinf() & t.isfinite()).any()):
        raise UserError(f"--half: {name} holds values beyond what float16 can (65504); leave --half out")
    return small


# --- reading ----------------------------------------------------------------------------------------------------------


def read_file(path: Path, config: str | Path | None, weights: str | None) -> Source:
    """A checkpoint in the official layout, or one of this project's runs."""
    run, file = checkpoint.find_run(path) if path.is_dir() else (path.parent, path)
    content = checkpoint.read(file)
    state = checkpoint.state_dict_of(content, file)
    metadata = _metadata(file, content)
    chosen, where = _find_config(run, file, content, metadata, state, config)
    state, which = choose_weights(state, weights)
    metadata |= {"weights": which, "family": families.detect(state).name}
    return Source(
        state, chosen, metadata, [f"{file}: {families.detect(state).title}, config {where}, weights: {which}"]
    )


def _metadata(file: Path, content: Mapping[str, Any]) -> dict[str, str]:
    found = {k: str(content[k]) for k in KEPT if isinstance(content.get(k), (int, str, float))}
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, framework="pt") as f:
            found |= f.metadata() or {}
    return {**found, "format": "pt"}


def _find_config(
    run: Path,
    file: Path,
    content: Mapping[str, Any],
    metadata: Mapping[str, str],
    state: Mapping[str, Tensor],
    given: str | Path | None,
) -> tuple[dict[str, Any], str]:
    """The config and where it is from: given, in the file, beside it, or by the family of the tensors."""
    if given is not None:
        return _plain(load_yaml(given)), str(given)
    for inside in (content.get("config"), metadata.get("config")):
        if isinstance(inside, str):
            return _plain(OmegaConf.create(inside)), "in the file"
    beside = [file.with_suffix(".yaml"), run / "config.yaml", *sorted((run / "configs").glob("*-project.yaml"))]
    for path in beside:
        if path.is_file():
            return _plain(load_yaml(path)), str(path)
    family = families.detect(state)
    for path in family.configs:
        if (ROOT / path).is_file():
            note = f" ({family.note})" if family.note else ""
            return _plain(load_yaml(ROOT / path)), path + note
    raise UserError(f"{file} is a file of {family.title}, whose config is not here: give it by --config")


def _plain(config: Any) -> dict[str, Any]:
    return OmegaConf.to_container(config, resolve=True)


def choose_weights(state: Mapping[str, Tensor], weights: str | None) -> tuple[dict[str, Tensor], str]:
    """The tensors with one set of weights, and its name, ema or raw.

    Averaged weights stand in `model_ema` under the names of the weights without dots.

    Raises:
        UserError: averaged weights were asked for and there are none.
    """
    averages = {k: v for k, v in state.items() if k.startswith("model_ema.")}
    held = {k: v for k, v in state.items() if k not in averages}
    names = {"model_ema." + k.removeprefix("model.").replace(".", ""): k for k in held if k.startswith("model.")}
    names = names or {"model_ema." + k.replace(".", ""): k for k in held}
    found = {names[k]: v for k, v in averages.items() if k in names}
    if weights == "ema" and not found:
        raise UserError("--weights ema: this checkpoint holds one set of weights only; leave --weights out or use raw")
    if found and weights != "raw":
        return {**held, **{k: v.to(held[k].dtype) for k, v in found.items()}}, "ema"
    return held, "raw"


def read_folder(path: Path, config: str | Path | None) -> Source:
    """A diffusers folder, under official names."""
    own = path / folders.OWN
    if config is not None:
        chosen, where = _plain(load_yaml(config)), str(config)
    elif (own / "config.yaml").is_file():
        chosen, where = _plain(load_yaml(own / "config.yaml")), str(own / "config.yaml")
    else:
        chosen, where = folders.official_config(path), "made from its config.json files"
    recipe = recipe_of(chosen)
    extra = _extra(own)
    places = _places(recipe, extra)
    layout = layout_of(recipe, places, 1.0)
    state: dict[str, Tensor] = {}
    for part in layout.parts:
        kind = part.index[1] if part.index else ""
        tensors, left = to_official(folders.component(path / part.folder, kind), part.rows, part.prefix)
        left = {k for k in left if not k.endswith("position_ids")}
        if left:
            raise UserError(f"{path / part.folder}: {len(left)} tensors do not fit the config, first {sorted(left)[0]}")
        state |= tensors
    dtype = next(iter(state.values())).dtype
    said = [f"{path}: config {where}"]
    if extra is None:
        made = _missing_tensors(recipe, layout, places, dtype)
        state |= made
        if any(k.startswith(CONDITIONERS) and ".resblocks." in k for k in made):
            said.append("parts of the text tower that the model does not read are not in the folder: filled with zeros")
    state |= extra or {}
    if is_first_stage(recipe):
        twice = {CONDITIONERS[0] + k.removeprefix(STAGE): v for k, v in state.items() if k.startswith(STAGE)}
        state = {**twice, **state}
    check(recipe, state, str(path))
    metadata = {"format": "pt", "family": families.detect(state).name, **_json(own / "metadata.json")}
    return Source(state, chosen, metadata, said)


def _extra(own: Path) -> dict[str, Tensor] | None:
    """The tensors beside the folder's components; None for a folder that this project did not write."""
    if (own / "extra.safetensors").is_file():
        return checkpoint.read_state(own / "extra.safetensors")
    return {} if (own / "config.yaml").is_file() else None


def _json(path: Path) -> dict[str, str]:
    return folders.read_json(path) if path.is_file() else {}


def _places(recipe: Recipe, extra: Mapping[str, Tensor] | None) -> dict[str, str]:
    """Prefixes of the file to write: those of the file that the folder was made from, else the released files'."""
    if extra:
        return prefixes(recipe, extra)
    engine = recipe.params["conditioning_key"] == "crossattn-adm"
    return prefixes(recipe, dict.fromkeys([CONDITIONERS[engine]]))


def _missing_tensors(
    recipe: Recipe, layout: Layout, places: Mapping[str, str], dtype: torch.dtype
) -> dict[str, Tensor]:
    if recipe.kind == "first_stage":
        return {}
    made = folders.tables(recipe.params, places.get("conditioner", "").startswith(CONDITIONERS[1]))
    texts = {part.prefix: part for part in layout.parts}
    for encoder, embedder, prefix in _embedders(recipe, layout, places):
        if prefix in texts:
            filled = folders.unused_tensors(encoder, embedder, prefix)
            made |= {k: v.to(dtype) if v.is_floating_point() else v for k, v in filled.items()}
    return made


def _embedders(recipe: Recipe, layout: Layout, places: Mapping[str, str]) -> Iterator[tuple[Any, Any, str]]:
    """Text encoders with their `{target, params}` and prefix."""
    from ldm.conversion.text import encoder_of

    if not layout.tokenizers:
        return
    config, prefix = recipe.conditioner, places["conditioner"]
    entries = (config.get("params") or {}).get("emb_models")
    if entries is None:
        yield encoder_of(config), config, prefix
        return
    for i, e in enumerate(entries):
        entry = {"target": e["target"], "params": e.get("params")}
        encoder = encoder_of(entry, len(entries) > 1) if "Frozen" in e["target"] else None
        if encoder is not None:
            yield encoder, entry, f"{prefix}embedders.{i}."


# --- writing ----------------------------------------------------------------------------------------------------------


def write_file(source: Source, out: Path) -> None:
    """One file under official names, and its config beside it."""
    text = yaml.safe_dump(source.config, sort_keys=False)
    with _writing(out):
        if out.suffix == ".safetensors":
            _save(source.state, out, {**source.metadata, "config": text})
        else:
            kept = {k: int(v) if v.isdigit() else v for k, v in source.metadata.items() if k in KEPT}
            checkpoint.save_atomic({"state_dict": source.state, **kept, "config": text}, out)
        out.with_suffix(".yaml").write_text(text, encoding="utf-8")
    source.said.append(f"{len(source.state)} tensors in {out}, config in {out.with_suffix('.yaml')}")


def write_folder(source: Source, out: Path) -> None:
    """A diffusers folder; what has no place in it goes to official/."""
    recipe = recipe_of(source.config)
    check(recipe, source.state, "the checkpoint")
    places = prefixes(recipe, source.state)
    scale = float(source.state.get("scale_factor", recipe.params["scale_factor"]))
    layout = layout_of(recipe, places, scale)
    rest = dict(source.state)
    with _writing(out):
        place = out.with_name(out.name + ".part")
        shutil.rmtree(place, ignore_errors=True)
        for part in layout.parts:
            mapped, left = to_theirs(source.state, part.rows, part.prefix)
            rest = {k: v for k, v in rest.items() if not k.startswith(part.prefix) or k in left}
            _write_part(place / part.folder, part, mapped)
        if is_first_stage(recipe):
            rest = {k: v for k, v in rest.items() if not _is_copy(k, v, source.state)}
        for name, encoder in layout.tokenizers.items():
            (place / name).mkdir(parents=True)
            source.said += filter(None, [encoder.tokenizer(place / name)])
        if layout.scheduler:
            _dump(layout.scheduler, place / "scheduler" / "scheduler_config.json")
        if layout.index():
            _dump(layout.index(), place / "model_index.json")
        _dump(source.metadata, place / folders.OWN / "metadata.json")
        text = yaml.safe_dump(source.config, sort_keys=False)
        (place / folders.OWN / "config.yaml").write_text(text, encoding="utf-8")
        if rest:
            _save(rest, place / folders.OWN / "extra.safetensors", {"format": "pt"})
        if out.is_dir():
            out.rmdir()
        os.replace(place, out)
    source.said += filter(None, [layout.note, f"{layout.pipeline or layout.parts[0].index[1]} in {out}"])


def _is_copy(name: str, tensor: Tensor, state: Mapping[str, Tensor]) -> bool:
    """Whether a conditioner's tensor is the first stage's of the same name."""
    other = state.get(STAGE + name.removeprefix(CONDITIONERS[0]))
    return name.startswith(CONDITIONERS[0]) and other is not None and torch.equal(tensor, other)


def _write_part(folder: Path, part: Any, tensors: Mapping[str, Tensor]) -> None:
    dtypes = {t.dtype for t in tensors.values() if t.is_floating_point()}
    config = dict(part.config)
    if "architectures" in config and len(dtypes) == 1:
        config["torch_dtype"] = str(dtypes.pop()).removeprefix("torch.")
    elif part.index:
        config["_diffusers_version"] = "0.30.0"
    _dump(config, folder / "config.json")
    _save(tensors, folder / part.file, {"format": "pt"})


def _dump(content: Mapping[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _save(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """A .safetensors file; tensors that share memory are written once each."""
    from safetensors.torch import save_file

    seen: set[int] = set()
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        shared = tensor.data_ptr() in seen or tensor.untyped_storage().nbytes() != tensor.nbytes
        seen.add(tensor.data_ptr())
        whole[name] = tensor.clone() if shared else tensor
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    save_file(whole, temporary, metadata)
    temporary.chmod(0o666 & ~_umask())  # safetensors writes files that only their owner may read
    os.replace(temporary, path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Turns a full disk into one line, and leaves nothing half-written behind."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as e:
        raise UserError(f"{out} could not be written: {e.strerror or e}") from e
    except Exception as e:
        if type(e).__name__ != "SafetensorError":
            raise
        raise UserError(f"{out} could not be written: {e}") from e
    finally:
        shutil.rmtree(out.with_name(out.name + ".part"), ignore_errors=True)
        with contextlib.suppress(OSError):
            out.with_name(f".{out.name}.part").unlink()
