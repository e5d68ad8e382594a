"""NVIDIA's StyleGAN2 files (.pkl), read without running anything in them.

Such a file holds networks as Python source and state: it calls `torch_utils.persistence._reconstruct_persistent_obj`
with {type, version, module_src, class_name, state}, and NVIDIA's loader executes module_src. Here that call only notes
the class name, the constructor's arguments and the tensors; the source is dropped unread. All that a pickle may name is
in `_allowed`; anything else is refused by name before it is imported.
"""

from __future__ import annotations

import collections
import inspect
import io
import math
import pickle
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from ldm.modules.stylegan2 import Discriminator, Generator, MappingNetwork, SynthesisNetwork
from ldm.util import UserError

CLASSES: dict[str, type[nn.Module]] = {
    "Generator": Generator,
    "Discriminator": Discriminator,
    "MappingNetwork": MappingNetwork,
    "SynthesisNetwork": SynthesisNetwork,
}
PLAIN = (int, float, bool, str, type(None))
_SCALARS = {"f8": "d", "f4": "f", "i8": "q", "i4": "i", "b1": "?"}  # numpy's codes -> struct's


@dataclass(frozen=True)
class PickledNetwork:
    """What a pickle says about one network.

    Attributes:
        class_name: as pickled, e.g. "Generator".
        args, kwargs: of its constructor.
        state: parameters and buffers by dotted name.
        attributes: plain values of every submodule, by dotted name ("" for the network).
    """

    class_name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: dict[str, Tensor]
    attributes: dict[str, dict[str, Any]] = field(repr=False)


def read(path: str | Path) -> dict[str, Any]:
    """The content of a file: networks ("G", "D", "G_ema") as `PickledNetwork`, plain values as they are.

    Raises:
        UserError: no such file, no pickle of this kind, or one that names anything but tensors and plain data.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist or is no file; expected a StyleGAN2 .pkl")
    with path.open("rb") as f:
        try:
            content = _Unpickler(f).load()
            content = content if isinstance(content, dict) else {"network": content}
            return {str(name): _network(value, str(name)) for name, value in content.items()}
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, OverflowError) as error:
            raise UserError(f"{path} is not a complete StyleGAN2 pickle: {error}") from error
        except (TypeError, ValueError, RuntimeError, UnicodeDecodeError, struct.error, MemoryError) as error:
            raise UserError(f"{path} is not a complete StyleGAN2 pickle: {error}") from error


def build(network: PickledNetwork) -> nn.Module:
    """This project's network with the pickled arguments and tensors, in evaluation mode.

    Raises:
        UserError: another kind of network, arguments that it does not take, tensors that it does not have.
    """
    name = network.class_name
    if any(key.startswith("synthesis.input.") for key in network.state):
        raise UserError("the file holds a StyleGAN3 network; only StyleGAN2 (cfg=stylegan2) can be read")
    if name not in CLASSES:
        raise UserError(f"the file holds a network {name!r}; expected one of {', '.join(CLASSES)}")
    try:
        module = CLASSES[name](*network.args, **_arguments(network))
    except (TypeError, ValueError) as error:
        raise UserError(f"the constructor of the pickled {name} does not fit: {error}") from error
    try:
        module.load_state_dict(network.state)
    except RuntimeError as error:
        raise UserError(f"the tensors of the pickled {name} do not fit its arguments: {error}") from error
    return module.eval()


def load(path: str | Path, name: str = "G_ema") -> nn.Module:
    """`build` of one network of a file.

    Raises:
        UserError: see `read` and `build`; no network of that name.
    """
    content = read(path)
    networks = {key: value for key, value in content.items() if isinstance(value, PickledNetwork)}
    if name not in networks:
        raise UserError(f"{path}: no network {name!r}, expected one of {', '.join(networks) or 'none'}")
    return build(networks[name])


def as_checkpoint(path: str | Path) -> dict[str, Any]:
    """A file as this project's checkpoints are: `config` (YAML of `ldm.models.stylegan2.StyleGAN2`) and `state_dict`.

    Raises:
        UserError: see `read` and `build`; no generator.
    """
    content = read(path)
    found = {key: value for key, value in content.items() if isinstance(value, PickledNetwork)}
    pickled = next((found[key] for key in ("G_ema", "G", "network") if key in found), None)
    if pickled is None or pickled.class_name != "Generator":
        raise UserError(f"{path}: no generator, expected a network G_ema; found {', '.join(found) or 'none'}")
    generator = build(pickled)
    names = list(inspect.signature(Generator).parameters)
    params = {**dict(zip(names, pickled.args, strict=False)), **_arguments(pickled)}
    model: dict[str, Any] = {"generator_config": {"target": "ldm.modules.stylegan2.Generator", "params": params}}
    model["use_ema"] = False
    if generator.c_dim:
        model |= {"cond_stage_key": "class_label", "num_classes": generator.c_dim}
    state = {f"generator.{key}": value for key, value in generator.state_dict().items()}
    if "D" in found:
        state |= {f"discriminator.{key}": value for key, value in found["D"].state.items()}
    config = {"model": {"target": "ldm.models.stylegan2.StyleGAN2", "params": model}}
    return {"config": OmegaConf.to_yaml(OmegaConf.create(config)), "state_dict": state}


def _arguments(network: PickledNetwork) -> dict[str, Any]:
    """Keyword arguments; where the two code bases (ADA, StyleGAN3) have different defaults, what the blocks had."""
    kwargs = {key: value for key, value in network.kwargs.items() if key != "synthesis_kwargs"}
    kwargs |= network.kwargs.get("synthesis_kwargs", {})  # ADA passes these in a dict of their own
    if network.class_name == "MappingNetwork":
        return kwargs
    blocks = {key: values for key, values in network.attributes.items() if "use_fp16" in values}
    if "num_fp16_res" not in kwargs and blocks:
        kwargs["num_fp16_res"] = sum(bool(values["use_fp16"]) for values in blocks.values())
    clamps = [network.attributes.get(f"{key}.conv1", {}) for key in blocks]
    if "conv_clamp" not in kwargs and clamps and "conv_clamp" in clamps[0]:
        kwargs["conv_clamp"] = clamps[0]["conv_clamp"]
    return kwargs


# --- from the pickle's records to networks ----------------------------------------------------------------------------


class _Persistent:
    """One call of the reconstruction function: its class name and state, the source dropped."""

    def __init__(self, meta: Any) -> None:
        if not isinstance(meta, dict) or meta.get("type") != "class":
            raise UserError("got a persistent object without type 'class', expected a network's record")
        state = meta.get("state")
        if not isinstance(state, dict):
            raise UserError(f"the record of {meta.get('class_name')!r} holds no state")
        self.class_name, self.state = str(meta.get("class_name")), state


def _network(value: Any, where: str) -> Any:
    if isinstance(value, _Persistent) and "_modules" not in value.state and "_parameters" not in value.state:
        raise UserError(f"{where}: {value.class_name!r} is no network")
    if not isinstance(value, _Persistent):
        return value
    modules = dict(_walk(value, "", set()))
    state = {}
    for prefix, module in modules.items():
        skipped = module.state.get("_non_persistent_buffers_set") or ()
        for kind in ("_parameters", "_buffers"):
            for name, tensor in module.state.get(kind, {}).items():
                if tensor is None or name in skipped:
                    continue
                if not isinstance(tensor, Tensor):
                    raise UserError(f"{where}.{prefix}: {name} is {type(tensor).__name__}, expected a tensor")
                state[f"{prefix}.{name}" if prefix else str(name)] = tensor.detach()
    attributes = {
        prefix: {k: v for k, v in module.state.items() if not str(k).startswith("_") and isinstance(v, PLAIN)}
        for prefix, module in modules.items()
    }
    args, kwargs = value.state.get("_init_args", ()), value.state.get("_init_kwargs", {})
    return PickledNetwork(value.class_name, tuple(args), _plain_dict(kwargs), state, attributes)


def _walk(module: _Persistent, prefix: str, above: set[int]) -> Iterator[tuple[str, _Persistent]]:
    if id(module) in above:
        raise UserError(f"module {prefix!r} contains itself")
    yield prefix, module
    for name, child in (module.state.get("_modules") or {}).items():
        if child is None:
            continue
        if not isinstance(child, _Persistent):
            raise UserError(f"submodule {name!r} is {type(child).__name__}, expected a network's record")
        yield from _walk(child, f"{prefix}.{name}" if prefix else str(name), above | {id(module)})


def _plain_dict(values: Mapping[str, Any]) -> dict[str, Any]:
    return {str(k): _plain_dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}


# --- the unpickler ----------------------------------------------------------------------------------------------------


class _Unpickler(pickle.Unpickler):
    """Knows the names in `_allowed` and no others."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self._table = _allowed()

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in self._table:
            return self._table[full]
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        raise UserError(f"refused: it would use {full}, and only tensors and plain data are read from a .pkl")

    def persistent_load(self, pid: Any) -> Any:
        raise UserError("refused: it refers to data outside of the pickle")


def _allowed() -> dict[str, Callable[..., Any]]:
    """Dotted name -> what stands in for it; made anew for each file, since a pickle can set attributes on these."""

    class EasyDict(dict):
        """Stands in for dnnlib's dictionary with attributes."""

    class Dtype:
        """A numpy data type, by its code."""

        def __init__(self, code: str, *_: Any) -> None:
            self.code = str(code)

        def __setstate__(self, state: Any) -> None:
            if state[1] not in ("<", "|", "="):
                raise UserError(f"got numbers of byte order {state[1]!r}, expected little-endian ones")

    def scalar(dtype: Dtype, raw: bytes) -> Any:
        if not isinstance(dtype, Dtype) or dtype.code not in _SCALARS:
            raise UserError(f"refused: a numpy value of type {getattr(dtype, 'code', dtype)!r}")
        return struct.unpack("<" + _SCALARS[dtype.code], raw)[0]

    def encode(text: str, encoding: str = "latin1") -> bytes:
        if encoding not in ("latin1", "latin-1"):
            raise UserError(f"refused: the codec {encoding!r}")
        return text.encode("latin1")

    table: dict[str, Callable[..., Any]] = {
        "torch_utils.persistence._reconstruct_persistent_obj": lambda meta: _Persistent(meta),
        "dnnlib.util.EasyDict": EasyDict,
        "dnnlib.EasyDict": EasyDict,
        "collections.OrderedDict": collections.OrderedDict,
        "torch._utils._rebuild_tensor_v2": lambda *args: _rebuild_tensor(*args[:4]),
        "torch._utils._rebuild_parameter": lambda data, *_: data,
        "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
        "torch.storage._load_from_bytes": lambda raw: _flat_tensor(raw),
        "torch.Size": torch.Size,
        "torch.device": torch.device,
        "_codecs.encode": encode,
        "numpy.dtype": Dtype,
    }
    table |= {f"{module}.set": set for module in ("builtins", "__builtin__")}
    table |= {f"numpy.{core}.multiarray.scalar": scalar for core in ("core", "_core")}
    return table


def _flat_tensor(raw: bytes) -> Tensor:
    """The bytes of a pickled storage -> a tensor of one dimension on the CPU."""
    try:
        storage = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"refused: the data of a tensor is not plain numbers ({str(error).splitlines()[0]})") from None
    if not isinstance(storage, torch.TypedStorage):
        raise UserError(f"refused: the data of a tensor is {type(storage).__name__}, expected plain numbers")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # it is what such files hold
        return torch.empty(0, dtype=storage.dtype).set_(storage.untyped())


def _rebuild_tensor(flat: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """A view of `flat`; never outside of it."""
    if not isinstance(flat, Tensor):
        raise UserError(f"refused: a tensor made of {type(flat).__name__}")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if min([offset, *size, *stride]) < 0 or (math.prod(size) > 0 and last >= flat.numel()):
        raise UserError(f"a tensor of shape {list(size)} lies outside of its {flat.numel()} numbers: damaged file")
    return flat.as_strided(size, stride, offset)
