"""From YAML files and the command line to one checked config that knows where each value came from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from ldm.util import ConfigError, UserError, suggest

COMMAND_LINE = "the command line"
SECTIONS = {
    "model": {"target", "params", "learning_rate", "base_learning_rate"},
    "data": {"target", "params"},
    "lightning": {"trainer", "logger", "modelcheckpoint", "callbacks", "strategy"},
}
ALIASES = {"trainer": "lightning.trainer", "first_stage": "model.params.first_stage_config"}


def load_yaml(path: str | Path) -> DictConfig:
    """Reads one YAML file.

    Raises:
        UserError: the file is missing, is no YAML, or is no mapping.
    """
    path = Path(path)
    if not path.is_file():
        near = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise UserError(f"config {path} does not exist{suggest(str(path), near)}")
    try:
        config = OmegaConf.load(path)
    except (OmegaConfBaseException, OSError, ValueError) as e:
        raise UserError(f"config {path} cannot be read: {e}") from e
    except Exception as e:
        if type(e).__module__.startswith("yaml"):
            raise UserError(f"config {path} is not valid YAML: {' '.join(str(e).split())}") from e
        raise
    if not isinstance(config, DictConfig):
        raise UserError(
            f"config {path} must be a mapping with the keys {', '.join(SECTIONS)}, got {type(config).__name__}"
        )
    return config


class Merged:
    """The merged config and, for each leaf key, the file (or the command line) it came from."""

    def __init__(self) -> None:
        self.config: DictConfig = OmegaConf.create({})
        self.source: dict[str, str] = {}

    def add(self, part: DictConfig, source: str) -> None:
        """Merges `part` over what is there; another `target` that comes with `params` takes the place of the old ones.

        The parameters of one class mean nothing to another: an AdamW with the momentum of the SGD before it.
        """
        part = _expand_aliases(part)
        for key, node in mappings(part):
            old = OmegaConf.select(self.config, key) if {"target", "params"} <= set(node) else None
            if isinstance(old, DictConfig) and old.get("target", node["target"]) != node["target"]:
                old.pop("params", None)
                self.source = {k: v for k, v in self.source.items() if not k.startswith(f"{key}.params.")}
        self.config = OmegaConf.merge(self.config, part)
        for key, _ in leaves(part):
            self.source[key] = source

    def add_file(self, path: str | Path) -> None:
        self.add(load_yaml(path), str(path))

    def add_dotlist(self, items: Sequence[str]) -> None:
        """`key.path=value` items of the command line."""
        for item in items:
            try:
                self.add(OmegaConf.from_dotlist([item]), COMMAND_LINE)
            except Exception as e:
                raise UserError(f"{item!r} on the command line cannot be read ({e}); expected key.path=value") from e

    def where(self, key: str) -> str:
        """The source of a key, or of the nearest key below or above it."""
        if key in self.source:
            return self.source[key]
        below = [v for k, v in self.source.items() if k.startswith(key + ".")]
        while not below and "." in key:
            key = key.rpartition(".")[0]
            below = [v for k, v in self.source.items() if k == key or k.startswith(key + ".")]
        return below[-1] if below else COMMAND_LINE

    def check(self) -> None:
        """Raises UserError for a section or key that nothing reads."""
        interpolated = OmegaConf.to_yaml(self.config)
        for section, node in self.config.items():
            if section not in SECTIONS:
                if f"${{{section}" in interpolated:
                    continue  # a variable that other values refer to
                raise UserError(f"unknown key {section}{suggest(str(section), SECTIONS)} in {self.where(str(section))}")
            for key in node or {}:
                if key not in SECTIONS[section]:
                    known = [f"{section}.{k}" for k in SECTIONS[section]]
                    full = f"{section}.{key}"
                    raise UserError(f"unknown key {full}{suggest(full, known)} in {self.where(full)}")
        for section in ("model", "data"):
            if section not in self.config or not (self.config[section] or {}).get("target"):
                files = ", ".join(dict.fromkeys(self.source.values())) or "no file"
                raise UserError(f"key {section}.target is missing (read: {files}); see configs/ for complete examples")

    def explain(self, error: ConfigError) -> UserError:
        """The same error with the key and the file at fault."""
        for key, node in mappings(self.config):
            params = node.get("params") or {}
            if node.get("target") != error.target or (
                error.param and error.param not in {*params, *node, *missing(error)}
            ):
                continue
            in_params = error.param in params
            full = ".".join(filter(None, (key, "params" if in_params else "", error.param if in_params else "target")))
            return UserError(f"{full}: {error} [in {self.where(full)}]")
        return UserError(str(error))

    def to_yaml_with_sources(self) -> str:
        """The merged YAML, each leaf followed by a comment that names its source."""
        lines = []
        for key, value in leaves(self.config):
            lines.append(f"{key}: {value!r}  # {self.source.get(key, 'default')}")
        return "\n".join(lines)


def missing(error: ConfigError) -> set[str]:
    """A missing parameter stands in no params: its name must not exclude the node."""
    return {error.param} if error.param and str(error).startswith("missing key") else set()


def _expand_aliases(part: DictConfig) -> DictConfig:
    for short, long in ALIASES.items():
        if short in part and f"${{{short}" not in OmegaConf.to_yaml(part):
            value = part.pop(short)
            expanded = OmegaConf.create({})
            OmegaConf.update(expanded, long, value, force_add=True)
            part = OmegaConf.merge(part, expanded)
    return part


def leaves(config: DictConfig | ListConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, unresolved value) of everything that is not a mapping."""
    for key in config:
        full = f"{prefix}{key}"
        raw = config._get_node(key)
        if isinstance(raw, DictConfig) and not raw._is_none() and not raw._is_interpolation() and len(raw):
            yield from leaves(raw, full + ".")
        else:
            yield full, raw._value() if raw is not None and not isinstance(raw, ListConfig) else _unresolved(raw)


def _unresolved(raw: Any) -> Any:
    return None if raw is None else OmegaConf.to_container(raw, resolve=False)


def mappings(config: Any, prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(dotted key, node) of every mapping, outermost first."""
    if isinstance(config, Mapping):
        yield prefix, config
        items = [(str(k), config._get_node(k) if isinstance(config, DictConfig) else config[k]) for k in config]
    elif isinstance(config, ListConfig):
        items = [(str(i), config._get_node(i)) for i in range(len(config))]
    else:
        return
    for key, value in items:
        if isinstance(value, (Mapping, ListConfig)) and not (OmegaConf.is_config(value) and value._is_none()):
            yield from mappings(value, f"{prefix}.{key}" if prefix else key)


def resolve(merged: Merged, node: DictConfig, key: str) -> dict[str, Any]:
    """A config node as plain dicts and lists, interpolations filled in."""
    try:
        return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as e:
        full = e.full_key or key
        short = next((f" (or {s}=...)" for s, long in ALIASES.items() if long == full), "")
        raise UserError(f"{full} has no value yet: give {full}=...{short} [in {merged.where(full)}]") from e
    except OmegaConfBaseException as e:
        full = e.full_key or key
        raise UserError(f"{full}: {str(e).splitlines()[0]} [in {merged.where(full)}]") from e


def fill_auto(node: Any, lookup: Callable[[str], Any], prefix: str) -> list[str]:
    """Replaces values `auto` of plain config `node` in place by `lookup(name)`; returns one line per value."""
    filled: list[str] = []
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in list(items):
        full = f"{prefix}.{key}"
        if value == "auto" and isinstance(key, str):
            found = lookup(key)
            if found is not None:
                node[key] = found
                shown = f"{len(found)} values" if isinstance(found, list) and len(found) > 20 else found
                filled.append(f"{full}: auto -> {shown} (from the data)")
        else:
            filled += fill_auto(value, lookup, full)
    return filled
