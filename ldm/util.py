"""Building objects from config, images to and from uint8, and one random generator per image."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent import futures
from typing import Any

import numpy as np

if typing.TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor, nn

# A YAML file from the net must not be able to run `os.system`: only these packages may be named by `target:`.
ALLOWED_PACKAGES = {"ldm", "torch", "torchvision", "lightning", "timm", "transformers", "torchmetrics"}
# Parts of the allowed packages that fetch, compile or unpickle code.
DENIED_MODULES = (
    "torch.hub",
    "torch.serialization",
    "torch.utils.cpp_extension",
    "torch._inductor",
    "torch.package",
    "torch.distributed.run",
    "torch.distributed.elastic",
    "torch.multiprocessing",
    "torch.jit",
)
# Outside ldm a target has to be a class or a function of these model and transform collections.
FUNCTION_MODULES = ("torchvision.models", "torchvision.transforms", "torchvision.ops", "timm.models", "torch.nn")


class UserError(Exception):
    """Something the user can put right. Scripts print it as one message and exit with code 2."""

    exit_code = 2


def message_of(error: BaseException) -> str:
    """Its message; of one that was raised in a process that loads data, without that process's traceback."""
    return str(error).rpartition("ldm.util.UserError: ")[2].strip()


class ConfigError(UserError):
    """A wrong `target:` or parameter; main.py adds the file and the key.

    Attributes:
        target: the dotted path that was being built.
        param: the parameter at fault, or None when it is the target itself.
    """

    def __init__(self, message: str, target: str, param: str | None = None) -> None:
        super().__init__(message)
        self.target, self.param = target, param


def trust(packages: Iterable[str]) -> None:
    """Lets `target:` name further packages (main.py --trust PACKAGE)."""
    ALLOWED_PACKAGES.update(packages)


def suggest(word: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' for the nearest known word, else ''."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""


def get_obj_from_str(path: str) -> Any:
    """The class or function that a dotted path names; old names are looked up in `legacy.TARGETS` first.

    Raises:
        ConfigError: unknown path, or a package outside the allow-list.
    """
    from ldm.legacy import TARGETS, is_legacy_module

    real, head = TARGETS.get(path, path), path.rpartition(".")[0]
    if head in TARGETS:  # a method of a class that has moved
        real = f"{TARGETS[head]}.{path.rpartition('.')[2]}"
    package = real.partition(".")[0]
    if package not in ALLOWED_PACKAGES:
        hint = suggest(path, TARGETS)
        if is_legacy_module(path):
            raise ConfigError(f"unknown target {path}{hint}: no such name in the official code", path)
        raise ConfigError(
            f"target {path} is outside the allowed packages ({', '.join(sorted(ALLOWED_PACKAGES))}){hint}; "
            f"if you wrote or trust it, pass --trust {package}",
            path,
        )
    obj = _import(real, path)
    _check_safe(obj, real, path)
    return obj


def _import(real: str, path: str) -> Any:
    """Imports `package.module.attr` (attr may be `Class.method`)."""
    from ldm.legacy import TARGETS

    parts = real.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:cut])
        try:
            obj: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as e:
            if e.name and module_name.startswith(e.name):
                continue  # the module itself is not there: its last part may be a class
            raise ConfigError(f"target {path} needs the package {e.name}: pip install {e.name}", path) from e
        for i, name in enumerate(parts[cut:]):
            if not hasattr(obj, name) or (i > 0 and not inspect.isclass(obj)):
                known = {f"{module_name}.{n}" for n in vars(obj) if not n.startswith("_")} | set(TARGETS)
                raise ConfigError(f"unknown target {path}: {module_name} has no {name}{suggest(path, known)}", path)
            obj = getattr(obj, name)
        return obj
    raise ConfigError(f"unknown target {path}: no such module{suggest(path, TARGETS)}", path)


def _check_safe(obj: Any, real: str, path: str) -> None:
    home = getattr(obj, "__module__", None) or ""
    root = home.partition(".")[0]
    if inspect.ismodule(obj) or root not in ALLOWED_PACKAGES or any(n.startswith(DENIED_MODULES) for n in (real, home)):
        raise ConfigError(f"target {path} must name a class of an allowed package, got {obj!r}", path)
    if root in ("ldm",) or inspect.isclass(obj) or home.startswith(FUNCTION_MODULES):
        return
    if real == "timm.create_model" or root not in ("torch", "torchvision", "lightning", "timm", "transformers"):
        return
    raise ConfigError(f"target {path} must name a class, got the function {obj!r}", path)


def class_of(config: Any, key: str = "") -> Any:
    """The class or function that `{target: dotted.path, params: {...}}` names.

    Args:
        config: from YAML.
        key: where it stands, for the message.

    Raises:
        ConfigError: not such a mapping, or what `get_obj_from_str` refuses.
    """
    if not isinstance(config, Mapping) or "target" not in config:
        place = f"{key}: " if key else ""
        raise ConfigError(f"{place}expected a mapping with the key target, got {config!r:.200}", "")
    return get_obj_from_str(config["target"])


def instantiate_from_config(config: Mapping[str, Any] | str, **extra: Any) -> Any:
    """Builds `{target: dotted.path, params: {...}}`; `extra` is added to the parameters.

    The official markers `__is_first_stage__` and `__is_unconditional__` give None.

    Raises:
        ConfigError: no target, unknown target, unknown or missing parameter, wrong type, or a ValueError in the
            constructor; of another project's constructor, any error but a lack of memory.
    """
    if isinstance(config, str) and config in ("__is_first_stage__", "__is_unconditional__"):
        return None
    cls = class_of(config)
    unknown = set(config) - {"target", "params", "base_learning_rate", "learning_rate"}
    target = config["target"]
    if unknown:
        key = sorted(map(str, unknown))[0]
        raise ConfigError(f"unknown key {key} beside target{suggest(key, ('target', 'params'))}", target, key)
    params = {**_plain(config.get("params") or {}), **extra}
    check_params(cls, target, params)
    try:
        return cls(**params)
    except ValueError as e:
        raise ConfigError(str(e), target) from e
    except (TypeError, RuntimeError, AssertionError, KeyError) as e:
        if target.startswith("ldm.") or is_out_of_memory(e):
            raise
        raise ConfigError(f"{target} refuses its params {sorted(params)}: {e}", target) from e


def _plain(node: Any) -> Any:
    """omegaconf nodes to dicts and lists, so that nets never meet them."""
    if isinstance(node, Mapping):
        return {str(k): _plain(node[k]) for k in node}
    if isinstance(node, Sequence) and not isinstance(node, (str, bytes)):
        return [_plain(v) for v in node]
    return node


def accepted_params(cls: Any) -> dict[str, inspect.Parameter] | None:
    """Parameters that `cls(...)` takes, following `**kwargs` up the bases; None if anything goes.

    A class that hands its `**kwargs` to another one instead names it in `forwards_kwargs_to`.
    """
    if not inspect.isclass(cls):
        params = inspect.signature(cls).parameters
        return None if _has_kwargs(params) else dict(params)
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        try:
            params = inspect.signature(base.__init__).parameters
        except (TypeError, ValueError):
            return None
        for name, p in list(params.items())[1:]:
            if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
                found.setdefault(name, p)
        if "forwards_kwargs_to" in vars(base):
            return {**(accepted_params(base.forwards_kwargs_to) or {}), **found}
        if not _has_kwargs(params) or base is object:
            return found
    return None


def _has_kwargs(params: Mapping[str, inspect.Parameter]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in params.values())


def check_params(cls: Any, target: str, params: Mapping[str, Any]) -> None:
    """Raises ConfigError for an unknown, missing or wrongly typed parameter of `cls(**params)`."""
    accepted = accepted_params(cls)
    if accepted is None:
        return
    for name, value in params.items():
        if name not in accepted:
            raise ConfigError(
                f"unknown key {name}{suggest(name, accepted)}: {target} takes {', '.join(accepted)}", target, name
            )
        _check_type(cls, target, name, accepted[name], value)
    own = inspect.signature(cls).parameters
    for name, p in own.items():
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and name not in params:
            raise ConfigError(f"missing key {name}: {target} needs it", target, name)


def _check_type(cls: Any, target: str, name: str, parameter: inspect.Parameter, value: Any) -> None:
    """Scalars only: a string where a number belongs is the typing slip that YAML makes easy."""
    hint = parameter.annotation
    if isinstance(hint, str):
        hint = {"int": int, "float": float, "bool": bool, "str": str}.get(hint.removesuffix(" | None"))
        optional = str(parameter.annotation).endswith(" | None")
    else:
        args = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        optional, hint = type(None) in args, next((a for a in args if a in (int, float, bool, str)), None)
        if len(args) - optional > 1:
            return
    if hint is None or (value is None and (optional or parameter.default is None)):
        return
    fits = {int: (int,), float: (int, float), bool: (bool,), str: (str,)}[hint]
    if isinstance(value, fits) and not (isinstance(value, bool) and hint in (int, float)):
        return
    if hint is int and isinstance(value, float) and value.is_integer():
        return
    raise ConfigError(f"{name} must be {hint.__name__}, got {value!r} ({type(value).__name__})", target, name)


# --- images -----------------------------------------------------------------------------------------------------------


def to_uint8(x: Tensor) -> np.ndarray:
    """[B, C, H, W] in [-1, 1] (values outside are clipped) -> uint8 [B, H, W, C].

    Raises:
        ValueError: the tensor holds NaN or infinity, which would turn into black pictures.
    """
    x = x.detach().float().cpu()
    if not bool(x.isfinite().all()):
        raise ValueError("non-finite values in the image tensor")
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def to_pil(x: Tensor) -> list[Image.Image]:
    """[B, 1|3, H, W] in [-1, 1] -> PIL images (mode L or RGB)."""
    from PIL import Image

    return [Image.fromarray(a[..., 0] if a.shape[-1] == 1 else a[..., :3]) for a in to_uint8(x)]


def image_grid(x: Tensor, nrow: int = 4, padding: int = 2) -> Tensor:
    """[B, C, H, W] in [-1, 1] -> one picture [C, H', W'] in [-1, 1], `nrow` images a row, black lines between."""
    from torchvision.utils import make_grid

    return make_grid(x.detach().float().cpu(), nrow=nrow, padding=padding, pad_value=-1.0)


def log_txt_as_img(wh: tuple[int, int], xc: Sequence[str], size: int = 10) -> Tensor:
    """Captions drawn as pictures: [len(xc), 3, H, W] in [-1, 1] for wh = (W, H)."""
    import textwrap

    import torch
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size)
    pictures = []
    for text in xc:
        page = Image.new("RGB", wh, color="white")
        lines = textwrap.wrap(str(text), max(1, int(40 * wh[0] / 256))) or [""]
        ImageDraw.Draw(page).text((0, 0), "\n".join(lines), fill="black", font=font)
        pictures.append(torch.from_numpy(np.asarray(page).copy()).permute(2, 0, 1).float() / 127.5 - 1)
    return torch.stack(pictures)


class SeededNoise:
    """One CPU generator per image, so that a picture depends on its seed and not on its batch.

    Args:
        seeds: one integer per image.

    Calling it with a template tensor `[len(seeds), ...]` or a shape gives standard normal noise of that shape, drawn in
    float32 on the CPU and moved to the template's device and dtype.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        import torch

        self.seeds = [int(s) for s in seeds]
        self.generators = [torch.Generator().manual_seed(s) for s in self.seeds]

    def __call__(self, like: Tensor | Sequence[int], **kwargs: Any) -> Tensor:
        import torch

        return self._draw(torch.randn, like, **kwargs)

    def rand(self, like: Tensor | Sequence[int], **kwargs: Any) -> Tensor:
        """Uniform numbers in [0, 1), drawn in the same way."""
        import torch

        return self._draw(torch.rand, like, **kwargs)

    def _draw(
        self,
        function: Any,
        like: Tensor | Sequence[int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        import torch

        if isinstance(like, torch.Tensor):
            device, dtype, like = device or like.device, dtype or like.dtype, like.shape
        shape = tuple(like)
        if shape[0] != len(self.generators):
            raise ValueError(f"got noise shape {shape}, expected {len(self.generators)} images (one per seed)")
        noise = torch.stack([function(shape[1:], generator=g, device="cpu") for g in self.generators])
        return noise.to(device=device, dtype=dtype or torch.float32)


# --- small names that official code and users' code import ------------------------------------------------------------


def words_of(text: str) -> list[str]:
    """Lower-case words: "Côte d'Ivoire" -> côte, divoire; punctuation separates, apostrophes do not."""
    return re.findall(r"\w+", re.sub("['’]", "", text.replace("_", " ").lower()))


def exists(x: Any) -> bool:
    return x is not None


def default(value: Any, fallback: Any) -> Any:
    """`value`, or `fallback` (called if it is a function) when it is None."""
    if value is not None:
        return value
    return fallback() if inspect.isfunction(fallback) else fallback


def mean_flat(x: Tensor) -> Tensor:
    """[B, ...] -> [B], the mean over all axes but the first."""
    return x.mean(dim=list(range(1, x.ndim)))


def count_params(model: nn.Module) -> int:
    """Number of parameters, trained or not."""
    return sum(p.numel() for p in model.parameters())


def parallel_data_prefetch(
    func: Callable[..., Any],
    data: Any,
    n_proc: int,
    target_data_type: str = "ndarray",
    cpu_intensive: bool = True,
    use_worker_id: bool = False,
) -> Any:
    """func on n_proc parts of `data` at once, and its results in order, joined.

    Args:
        func: (part) or, with use_worker_id, (part, number of the part) -> a list or array.
        data: array, list or another iterable; of a dict, its values.
        n_proc: number of workers: processes if cpu_intensive (func must then be picklable), else threads.
        target_data_type: ndarray (parts and result are arrays, joined along axis 0) or list.

    Raises:
        ValueError: data that is not iterable, or another target_data_type.
    """
    if target_data_type not in ("ndarray", "list"):
        raise ValueError(f"target_data_type: got {target_data_type!r}, expected ndarray or list")
    if not isinstance(data, Iterable):
        raise ValueError(f"data: got {type(data).__name__}, expected something to iterate over")
    if not isinstance(data, np.ndarray):
        data = list(data.values() if isinstance(data, Mapping) else data)
    if target_data_type == "ndarray":
        parts = np.array_split(np.asarray(data), n_proc)
    else:
        step = -(-len(data) // n_proc) or 1
        parts = [data[i : i + step] for i in range(0, len(data), step)]
    columns = (parts, range(len(parts))) if use_worker_id else (parts,)
    workers = futures.ProcessPoolExecutor if cpu_intensive else futures.ThreadPoolExecutor
    with workers(n_proc) as pool:
        results = list(pool.map(func, *columns))
    if target_data_type == "ndarray":
        return np.concatenate([np.asarray(r) for r in results])
    return [item for result in results for item in result]


def ismap(x: Any) -> bool:
    """A [B, C, H, W] tensor that is no picture (more than 3 channels)."""
    return getattr(x, "ndim", 0) == 4 and x.shape[1] > 3


def isimage(x: Any) -> bool:
    """A [B, 1|3, H, W] tensor."""
    return getattr(x, "ndim", 0) == 4 and x.shape[1] in (1, 3)


OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA has a class for it, the CPU's allocator only a text."""
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)
