"""Reading, checking and writing checkpoints: .ckpt, .pt, .pth and .safetensors.

Nothing is ever unpickled freely: tensors and plain containers are read by `torch.load(weights_only=True)`; classes that
old Lightning files name (callbacks, loggers) become inert stand-ins; anything else is refused by name.
"""

from __future__ import annotations

import codecs
import collections
import contextlib
import ctypes
import errno
import os
import pickletools
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm.util import UserError

# Globals that checkpoints of the field hold beside tensors; they become `_Inert`, which runs nothing.
INERT = re.compile(
    r"^(pytorch_lightning|lightning|lightning_fabric|omegaconf|numpy|main|argparse|typing|pathlib|ldm)\."
)
# plain containers, under the names that Python 2 and 3 pickles use
_PLAIN = (dict, list, set, int, float, str, bytes, complex)
_CONTAINERS: dict[str, Any] = {f"{m}.{c.__name__}": c for m in ("builtins", "__builtin__") for c in _PLAIN}
_CONTAINERS |= {
    "__builtin__.long": int,
    "collections.defaultdict": lambda *args: collections.OrderedDict(),
    "_codecs.encode": codecs.encode,  # how protocol 2 stores the bytes of numpy scalars
}
_PREFIXES = ("module.", "_orig_mod.")
ROOT = Path(__file__).resolve().parents[1]  # the project's folder


class _Inert:
    """Stands in for a pickled object of a class that must not be imported."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __hash__(self) -> int:
        return id(self)

    def append(self, item: Any) -> None:
        """Pickled list subclasses fill themselves by this."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Pickled dict subclasses fill themselves by this."""


def read(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint file, tensors memory-mapped on the CPU.

    Raises:
        UserError: missing, empty or truncated file; a git-LFS pointer, a web page or a YAML file; a pickle that would
            run code.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"checkpoint {path} {what}; expected a .ckpt, .pt, .pth or .safetensors file")
    _refuse_lookalikes(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix == ".pkl":
        from ldm import stylegan_pickle

        return stylegan_pickle.as_checkpoint(path)
    return _read_torch(path)


def _refuse_lookalikes(path: Path) -> None:
    with path.open("rb") as f:
        head = f.read(512)
    text = head.lstrip().lower()
    if not head:
        raise UserError(f"checkpoint {path} is empty (0 bytes): download or copy it again")
    if text.startswith(b"version https://git-lfs"):
        raise UserError(
            f"checkpoint {path} is a git-LFS pointer, not the weights: run `git lfs pull` in its repository"
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(f"checkpoint {path} is a web page, not weights: the download needs a login or the link is dead")
    if path.suffix != ".safetensors" and not head.startswith((b"PK", b"\x80")) and _is_text(head):
        raise UserError(
            f"checkpoint {path} is a text file (YAML?), not weights: give the config with -b, the weights here"
        )


def _is_text(head: bytes) -> bool:
    return all(b >= 32 or b in (9, 10, 13) for b in head)


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as f:
            return {"state_dict": {k: f.get_tensor(k) for k in f.keys()}}  # noqa: SIM118  (not a dict)
    except SafetensorError as e:
        raise UserError(f"checkpoint {path} is damaged or truncated ({e}): download or copy it again") from e


def _read_torch(path: Path) -> dict[str, Any]:
    with path.open("rb") as f:
        mapped = f.read(2) == b"PK"
    try:
        names = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) if mapped else _pickled_names(path)
        allowed = [(_stand_in(name, path), name) for name in sorted(names)]
        allowed += [(c, name) for c in _PLAIN for name in (c.__name__, f"builtins.{c.__name__}")]
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except UserError:
        raise
    except Exception as e:  # torch raises RuntimeError, UnpicklingError, EOFError, ... by the place of the damage
        raise UserError(f"checkpoint {path} cannot be read ({_reason(e)}): damaged, truncated or no checkpoint") from e
    return content if isinstance(content, dict) else {"state_dict": content}


def _pickled_names(path: Path) -> set[str]:
    """Classes and functions named by an old-style (not zip) torch file, found without running it."""
    names: set[str] = set()
    with path.open("rb") as f:
        strings: list[str] = []
        for _ in range(5):  # magic number, protocol, system info, the object, storage keys
            for op, arg, _pos in pickletools.genops(f):
                if op.name == "GLOBAL":
                    names.add(str(arg).replace(" ", "."))
                elif op.name == "STACK_GLOBAL":
                    names.add(".".join(strings[-2:]))
                elif isinstance(arg, str):
                    strings.append(arg)
            if f.peek(1)[:1] != b"\x80":
                break
    return {n for n in names if not n.startswith(("torch.", "collections.OrderedDict")) or n.startswith("torch.hub")}


def _stand_in(name: str, path: Path) -> Any:
    if name in _CONTAINERS:
        return _CONTAINERS[name]
    if INERT.match(name):
        return type(name.rpartition(".")[2], (_Inert,), {})
    raise UserError(
        f"checkpoint {path} was refused: loading it would call {name}. Only tensors are read; "
        "convert it to .safetensors where you trust it"
    )


def _reason(e: BaseException) -> str:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()] or [type(e).__name__]
    told = [line for line in lines if line.startswith("WeightsUnpickler error")]
    return (told or lines)[0][:200]


# --- state dicts ------------------------------------------------------------------------------------------------------


def state_dict_of(content: Mapping[str, Any], source: str | Path = "checkpoint") -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, without the prefixes that DDP and torch.compile add."""
    state = content
    for key in ("state_dict", "model", "module"):
        if isinstance(content.get(key), Mapping):
            state = content[key]
            break
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    if not tensors:
        raise UserError(
            f"{source} holds no weights: expected a state_dict, got the keys {sorted(map(str, content))[:5]}"
        )
    for prefix in _PREFIXES:
        if all(k.startswith(prefix) for k in tensors):
            tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
    return {k.replace("._orig_mod.", "."): v for k, v in tensors.items()}


def read_state(path: str | Path) -> dict[str, Tensor]:
    """`state_dict_of(read(path))`."""
    return state_dict_of(read(path), path)


def choose_weights(
    state: Mapping[str, Tensor], weights: str | None = None, own: Sequence[str] | None = None
) -> tuple[dict[str, Tensor], str]:
    """The tensors with one set of weights in them, and which set that is, ema or raw.

    Averaged weights stand under `model_ema.` and the names of the weights without dots. They need no twin: a file may
    hold nothing else.

    Args:
        weights: ema or raw; None = ema where there are averaged weights.
        own: names of the model's tensors; None = those of the file.

    Raises:
        UserError: averaged weights were asked for and there are none.
    """
    averages = {k: v for k, v in state.items() if k.startswith("model_ema.")}
    held = {k: v for k, v in state.items() if k not in averages}
    names = [k for k in own or held if k.startswith("model.")] or list(own or held)
    dotless = {"model_ema." + k.removeprefix("model.").replace(".", ""): k for k in names}
    found = {dotless[k]: v for k, v in averages.items() if k in dotless}
    if weights == "ema" and not found:
        raise UserError("--weights ema: this checkpoint holds one set of weights only; leave --weights out or use raw")
    return (held, "raw") if weights == "raw" or not found else ({**held, **found}, "ema")


def fit(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str | Path = "checkpoint",
    allow: Sequence[str] = (),
    partial: bool = False,
) -> tuple[dict[str, Tensor], str]:
    """(the tensors of `state` that `module` takes, "loaded N of M tensors"); the arguments are those of `load`.

    Raises:
        UserError: missing, unexpected or misshapen keys, with counts and the first five names of each.
    """
    own = module.state_dict()
    if hasattr(module, "rename_state"):  # a recipe knows other projects' names of its tensors
        state = module.rename_state(state, own)
    tolerated = tuple(allow) + tuple(getattr(module, "tolerated_keys", ()))
    problems = {
        "missing": [k for k in own if k not in state],
        "unexpected": [k for k in state if k not in own],
        "of another shape": [
            f"{k} {tuple(state[k].shape)} (model: {tuple(own[k].shape)})"
            for k in own
            if k in state and state[k].shape != own[k].shape
        ],
    }
    serious = {
        what: [k for k in keys if not k.startswith(tolerated)] if tolerated else keys for what, keys in problems.items()
    }
    usable = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    report = f"loaded {len(usable)} of {len(own)} tensors"
    if any(serious.values()) and (not partial or not usable):
        from ldm import families

        if hint := families.mismatch(state, own):
            raise UserError(f"{source}: {hint}")
        lines = [f"{len(v)} {what} (first: {', '.join(v[:5])})" for what, v in serious.items() if v]
        raise UserError(
            f"{source} does not fit {type(module).__name__}: {report}; {'; '.join(lines)}. "
            "Is it the checkpoint of this config? --allow-partial takes what fits"
        )
    left = {what: len(v) for what, v in problems.items() if v}
    return usable, report + (f" ({', '.join(f'{n} {what}' for what, n in left.items())})" if left else "")


def load(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str | Path = "checkpoint",
    allow: Sequence[str] = (),
    partial: bool = False,
    assign: bool = False,
) -> str:
    """Strict loading with named exceptions; returns "loaded N of M tensors".

    Args:
        module: filled in place.
        state: tensors by state-dict name.
        allow: prefixes of keys that may be missing, unexpected or of another shape.
        partial: takes what fits and says so instead of raising.
        assign: the module takes the (memory-mapped) tensors themselves instead of copying them.

    Raises:
        UserError: see `fit`.
    """
    usable, report = fit(module, state, source=source, allow=allow, partial=partial)
    named = collections.OrderedDict(usable)
    named._metadata = module.state_dict()._metadata  # the names are today's; torchvision's MNASNet insists on a version
    module.load_state_dict(named, strict=False, assign=assign)
    return report


# --- large models -----------------------------------------------------------------------------------------------------

READ_AHEAD = 2**27  # bytes of a mapped file that may be resident beside the tensors made from them


class NoWeights(TorchFunctionMode):
    """Modules built inside it have parameters without memory (on the meta device); buffers are real.

    Layers make their parameters by `torch.empty` and then initialise them in place. `adopt` fills them.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if func is torch.empty:
            return func(*args, **{**kwargs, "device": "meta"})
        subject = args[0] if args else kwargs.get("tensor")
        if name.endswith("_") and not name.endswith("__") and getattr(subject, "is_meta", False):
            return subject  # torch would import its compiler to find out what normal_ does to no memory
        return func(*args, **kwargs)


def adopt(
    module: nn.Module, usable: dict[str, Tensor], path: str | Path, convert: Callable[[str, Tensor], Tensor]
) -> None:
    """The module takes the tensors themselves, each after `convert(name, tensor)`, without a second copy in memory.

    Args:
        usable: what `fit` returned.
        path: the memory-mapped file that they are from.

    Raises:
        UserError: a parameter of a module built under `NoWeights` is still without memory.
    """
    read = 0
    for name, old in usable.items():
        usable[name] = new = convert(name, old)
        if new.data_ptr() != old.data_ptr():
            read += old.nbytes
        if read > READ_AHEAD:
            forget_pages(path)
            read = 0
    module.load_state_dict(usable, strict=False, assign=True)
    forget_pages(path)
    empty = [name for name, p in module.named_parameters() if p.is_meta]
    if empty:
        raise UserError(f"{path}: no weights for {len(empty)} parameters (first: {', '.join(empty[:5])})")


def forget_pages(path: str | Path) -> None:
    """Hands back the pages that were read of a memory-mapped file, which count as this process's memory (Linux only).

    They are read again where they are needed. Only for mappings that nobody has written to.
    """
    with contextlib.suppress(OSError, AttributeError):
        mapped = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
        madvise, dont_need, mine = ctypes.CDLL(None).madvise, 4, os.path.realpath(path)
        for address, *_, name in (row for row in mapped if len(row) == 6):
            if name == mine:
                start, end = (int(a, 16) for a in address.split("-"))
                madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), dont_need)


# --- run directories --------------------------------------------------------------------------------------------------


def in_project(path: str | Path) -> Path:
    """`path` from here, or from the project's folder where it is only there (models/, configs/)."""
    return Path(path) if Path(path).exists() or not (ROOT / path).exists() else ROOT / path


def find_run(path: str | Path) -> tuple[Path, Path]:
    """(run directory, checkpoint file) of a run directory or of a checkpoint inside one.

    Raises:
        UserError: neither exists.
    """
    path = in_project(path)
    if path.is_file():
        return path.parent.parent if path.parent.name == "checkpoints" else path.parent, path
    if not path.is_dir():
        raise UserError(f"{path} does not exist: expected a run directory (logs/<run>) or a checkpoint file")
    for candidate in ("checkpoints/last.ckpt", "last.ckpt", "model.ckpt", "model.safetensors"):
        if (path / candidate).is_file():
            return path, path / candidate
    found = sorted((path / "checkpoints").glob("*.ckpt"), key=lambda p: p.stat().st_mtime)
    if found:
        return path, found[-1]
    raise UserError(f"{path} holds no checkpoint: expected {path}/checkpoints/last.ckpt or {path}/model.ckpt")


def in_order_of_steps(path: str | Path) -> list[Path]:
    """The checkpoints of a run directory, one for each step that there is one of.

    Raises:
        UserError: no run directory, or one without a checkpoint.
    """
    run, _ = find_run(path)
    found: dict[int, Path] = {}
    for file in sorted((run / "checkpoints").glob("*.ckpt")):
        found.setdefault(int(read(file).get("global_step") or 0), file)
    return [found[step] for step in sorted(found)]


def minutes_of(content: Mapping[str, Any]) -> float | None:
    """Minutes of training that a checkpoint is the result of, over all resumptions; None where it does not say."""
    callbacks = content.get("callbacks")
    state = callbacks.get("Throughput") if isinstance(callbacks, Mapping) else None
    return float(state["seconds"]) / 60 if isinstance(state, Mapping) and "seconds" in state else None


def find_best(path: str | Path) -> Path:
    """The best checkpoint of a run directory by what it monitored; without one, what `find_run` finds."""
    run, file = find_run(path)
    if Path(path).is_dir():
        callbacks = read(file).get("callbacks")
        for state in callbacks.values() if isinstance(callbacks, Mapping) else ():
            named = state.get("best_model_path") if isinstance(state, Mapping) else None
            best = run / "checkpoints" / Path(named or "").name  # the run may have been moved since
            if named and state.get("monitor") and best.is_file():
                return best
    return file


# --- writing ----------------------------------------------------------------------------------------------------------


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_atomic(content: Any, path: str | Path) -> None:
    """`torch.save` to a neighbour file that then takes the name, so that `path` is always whole.

    Raises:
        OSError: the disk is full or cannot be written; the file that was there before is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as f:
            torch.save(content, f)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # temporary files are private, checkpoints are as other new files
        os.replace(temporary, path)
    except BaseException as e:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(e, RuntimeError):  # torch wraps a failed write of the zip container
            raise OSError(errno.ENOSPC, f"could not write: {_reason(e)}", str(path)) from e
        raise
