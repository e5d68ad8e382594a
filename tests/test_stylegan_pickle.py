"""Files in NVIDIA's format, made here: read to the same tensors, with nothing in them run."""

import collections
import io
import pickle
import struct
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from ldm import stylegan_pickle
from ldm.modules.stylegan2 import Discriminator, Generator
from ldm.util import UserError

SIZE = dict(img_resolution=16, img_channels=3, channel_base=128, channel_max=16)
G_KWARGS = dict(z_dim=8, c_dim=2, w_dim=8, **SIZE, num_fp16_res=1, mapping_kwargs={"num_layers": 2})
SOURCE = "raise SystemExit('the source in the file was run')\n"


@pytest.fixture
def nvidia(monkeypatch):
    """Stand-ins for the packages that wrote such files, so that pickle can name what it finds in them."""
    persistence, util = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")

    def _reconstruct_persistent_obj(meta):
        exec(meta["module_src"])

    class EasyDict(dict):
        def __getattr__(self, name):
            try:
                return self[name]
            except KeyError:
                raise AttributeError(name) from None

    for module, thing in ((persistence, _reconstruct_persistent_obj), (util, EasyDict)):
        thing.__module__, thing.__qualname__ = module.__name__, thing.__name__
        setattr(module, thing.__name__, thing)
        monkeypatch.setitem(sys.modules, module.__name__.partition(".")[0], types.ModuleType("package"))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return types.SimpleNamespace(reconstruct=_reconstruct_persistent_obj, EasyDict=EasyDict)


class Persistent:
    """What the decorator of those packages makes of a module when it is pickled."""

    def __init__(self, nvidia, module, name=None, args=(), kwargs=None, **state):
        fields = dict(vars(module))
        children = {k: None if v is None else Persistent(nvidia, v) for k, v in fields["_modules"].items()}
        fields["_modules"] = collections.OrderedDict(children)
        fields |= {"_init_args": args, "_init_kwargs": nvidia.EasyDict(kwargs or {}), **state}
        if "weight_gain" in fields:
            fields["weight_gain"] = np.float64(fields["weight_gain"])  # they compute with numpy
        meta = dict(type="class", version=6, module_src=SOURCE, class_name=name or type(module).__name__, state=fields)
        self.record = (nvidia.reconstruct, (nvidia.EasyDict(meta),))

    def __reduce__(self):
        return self.record


class Calls:
    """Pickled as a call of `fn`."""

    def __init__(self, fn, *args):
        self.record = (fn, args)

    def __reduce__(self):
        return self.record


def save(path, content, protocol=4):
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def write_generator(nvidia, folder):
    """A file with G_ema and D; its path and the generator."""
    torch.manual_seed(0)
    G, D = Generator(**G_KWARGS), Discriminator(2, **SIZE)
    content = {"G_ema": Persistent(nvidia, G, kwargs=G_KWARGS), "D": Persistent(nvidia, D, args=(2,), kwargs=SIZE)}
    return save(folder / "network.pkl", content), G.eval()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_networks_come_back(nvidia, tmp_path, protocol):
    torch.manual_seed(0)
    G = Generator(**G_KWARGS)
    D = Discriminator(2, **SIZE)
    content = nvidia.EasyDict(
        G=None,
        D=Persistent(nvidia, D, args=(2,), kwargs=SIZE),
        G_ema=Persistent(nvidia, G, kwargs=G_KWARGS),
        training_set_kwargs=nvidia.EasyDict(class_name="training.dataset.ImageFolderDataset", path="/data/ffhq.zip"),
    )
    path = save(tmp_path / "network-snapshot-000000.pkl", content, protocol)
    read = stylegan_pickle.read(path)
    assert read["training_set_kwargs"]["path"] == "/data/ffhq.zip" and read["G"] is None
    assert read["G_ema"].class_name == "Generator" and read["G_ema"].kwargs == G_KWARGS
    assert read["D"].args == (2,) and read["D"].kwargs == SIZE
    assert isinstance(read["G_ema"].attributes["synthesis.b4.torgb"]["weight_gain"], float)
    for name, want in (("G_ema", G), ("D", D)):
        got = stylegan_pickle.load(path, name)
        assert not got.training
        for key, value in want.state_dict().items():
            assert torch.equal(got.state_dict()[key], value), key
    assert "torch_utils" not in str(type(read["G_ema"]))


def test_defaults_that_differ_between_the_code_bases_come_from_the_blocks(nvidia, tmp_path):
    """ADA's networks had no clamp and no low precision by default, and took synthesis_kwargs in a dict."""
    options = dict(z_dim=8, c_dim=0, w_dim=8, img_resolution=16, img_channels=3)
    synthesis = dict(channel_base=128, channel_max=16)
    G = Generator(**options, **synthesis, num_fp16_res=0, conv_clamp=None)
    content = {"G_ema": Persistent(nvidia, G, kwargs={**options, "synthesis_kwargs": synthesis})}
    got = stylegan_pickle.load(save(tmp_path / "ada.pkl", content))
    assert got.synthesis.b16.conv1.conv_clamp is None and not got.synthesis.b16.use_fp16
    D = Discriminator(0, **SIZE, num_fp16_res=2, conv_clamp=7)
    got = stylegan_pickle.load(save(tmp_path / "d.pkl", {"D": Persistent(nvidia, D, kwargs={"c_dim": 0, **SIZE})}), "D")
    assert got.b16.conv0.conv_clamp == 7 and got.b8.use_fp16


def test_shared_storages_and_views(nvidia, tmp_path):
    m = nn.Module()
    base = torch.arange(12.0)
    m.register_buffer("rows", base.view(3, 4)[1:])
    m.register_buffer("columns", base.view(3, 4).t())
    m.register_buffer("hidden", base, persistent=False)
    m.weight = nn.Parameter(torch.ones(2, dtype=torch.float16))
    m.kind = torch.float16
    read = stylegan_pickle.read(save(tmp_path / "m.pkl", {"m": Persistent(nvidia, m)}))["m"]
    assert set(read.state) == {"rows", "columns", "weight"}
    assert torch.equal(read.state["rows"], m.rows) and torch.equal(read.state["columns"], m.columns)
    assert read.state["weight"].dtype == torch.float16 and not read.state["weight"].requires_grad


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Calls(eval, "print('run')"), "builtins.eval"),
        (lambda: Calls(exec, "raise SystemExit"), "builtins.exec"),
        (lambda: Calls(getattr, "a", "upper"), "builtins.getattr"),
        (lambda: Calls(__import__("os").system, "exit 1"), "posix.system"),
        (lambda: Calls(__import__("subprocess").Popen, ["false"]), "subprocess.Popen"),
        (lambda: Calls(torch.load, "x"), "torch.serialization.load"),
        (lambda: Calls(__import__("functools").partial, print), "functools.partial"),
        (lambda: nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (lambda: np.arange(3), "numpy"),
    ],
)
@pytest.mark.parametrize("place", ["top", "state", "kwargs"])
def test_anything_else_is_refused_by_name(nvidia, tmp_path, make, name, place):
    bad = make()
    network = Persistent(nvidia, nn.Linear(2, 2), kwargs={"x": bad} if place == "kwargs" else {}, y=bad)
    content = {"G": bad} if place == "top" else {"G": network}
    path = save(tmp_path / "evil.pkl", content)
    with pytest.raises(UserError, match="refused: it would use " + name.replace(".", r"\.")) as error:
        stylegan_pickle.read(path)
    assert str(path) in str(error.value)


def test_dotted_names_reach_nothing(tmp_path):
    for module, name in (("torch.storage", "_load_from_bytes.__globals__"), ("torch", "serialization.load")):
        opcodes = b"\x80\x04" + b"".join(b"\x8c" + struct.pack("B", len(s)) + s.encode() for s in (module, name))
        (tmp_path / "x.pkl").write_bytes(opcodes + b"\x93.")
        with pytest.raises(UserError, match="refused: it would use"):
            stylegan_pickle.read(tmp_path / "x.pkl")


def test_code_in_the_data_of_a_tensor_is_refused(nvidia, tmp_path):
    buffer = io.BytesIO()
    torch.save(Calls(eval, "print('run')"), buffer)
    content = {"G": Calls(torch.storage._load_from_bytes, buffer.getvalue())}
    with pytest.raises(UserError, match="refused: the data of a tensor is not plain numbers"):
        stylegan_pickle.read(save(tmp_path / "x.pkl", content))
    buffer = io.BytesIO()
    torch.save({"a": 1}, buffer)
    with pytest.raises(UserError, match="the data of a tensor is dict"):
        stylegan_pickle.read(save(tmp_path / "x.pkl", {"G": Calls(torch.storage._load_from_bytes, buffer.getvalue())}))


def test_tensors_stay_within_their_data(tmp_path):
    storage = torch.zeros(4).storage()
    for offset, size, stride in ((0, (5,), (1,)), (3, (2,), (1,)), (-1, (1,), (1,)), (0, (2, 2), (3, 2))):
        call = Calls(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, collections.OrderedDict())
        with pytest.raises(UserError, match="lies outside of its 4 numbers"):
            stylegan_pickle.read(save(tmp_path / "x.pkl", {"t": call}))


def test_a_pickle_cannot_change_what_later_files_meet(nvidia, tmp_path):
    """BUILD may set attributes, but only on stand-ins that live as long as one file."""
    name = b"cdnnlib.util\nEasyDict\n"
    evil = b"\x80\x02" + name + b"N}X\x07\x00\x00\x00__len__" + name + b"s\x86b."
    (tmp_path / "x.pkl").write_bytes(evil)
    stand_in = stylegan_pickle.read(tmp_path / "x.pkl")["network"]
    assert stand_in.__len__ is stand_in
    good = stylegan_pickle.read(save(tmp_path / "y.pkl", {"a": nvidia.EasyDict(b=1)}))
    assert good == {"a": {"b": 1}} and len(good["a"]) == 1


def test_faults_of_files(nvidia, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        stylegan_pickle.read(tmp_path / "none.pkl")
    for content in (b"", b"\x80\x04", b"version https://git-lfs.github.com/spec/v1\n", b"<html>", b"\x80\x04]."):
        (tmp_path / "x.pkl").write_bytes(content)
        if content.endswith(b"]."):
            assert stylegan_pickle.read(tmp_path / "x.pkl") == {"network": []}
            continue
        with pytest.raises(UserError, match="is not a complete StyleGAN2 pickle"):
            stylegan_pickle.read(tmp_path / "x.pkl")
    whole = save(tmp_path / "g.pkl", {"G_ema": Persistent(nvidia, Generator(**G_KWARGS), kwargs=G_KWARGS)})
    whole.write_bytes(whole.read_bytes()[:-3000])
    with pytest.raises(UserError, match="is not a complete"):
        stylegan_pickle.read(whole)


def test_faults_of_networks(nvidia, tmp_path):
    G = Generator(**G_KWARGS)

    def fails(match, name="Generator", kwargs=G_KWARGS, key="G_ema", **state):
        path = save(tmp_path / "x.pkl", {"G_ema": Persistent(nvidia, G, name, kwargs=kwargs, **state)})
        with pytest.raises(UserError, match=match):
            stylegan_pickle.load(path, key)

    fails("no network 'G', expected one of G_ema", key="G")
    fails("a network 'Encoder'; expected one of Generator", name="Encoder")
    fails(
        "constructor of the pickled Generator does not fit: .*use_radial_filters",
        kwargs={**G_KWARGS, "use_radial_filters": True},
    )
    fails("tensors of the pickled Generator do not fit", kwargs={**G_KWARGS, "w_dim": 9})
    synthesis = nn.Module()
    synthesis.input = nn.Module()
    synthesis.input.register_buffer("freqs", torch.zeros(1))
    fails("only StyleGAN2", _modules={"synthesis": Persistent(nvidia, synthesis)})
    fails("expected a network's record", _modules={"synthesis": 3})
    fails("expected a tensor", _buffers={"w": 3})
    with pytest.raises(UserError, match="'Thing' is no network"):
        record = {"type": "class", "class_name": "Thing", "state": {}}
        stylegan_pickle.read(save(tmp_path / "x.pkl", {"a": Calls(nvidia.reconstruct, record)}))
    with pytest.raises(UserError, match="without type 'class'"):
        stylegan_pickle.read(save(tmp_path / "x.pkl", {"a": Calls(nvidia.reconstruct, {})}))
    with pytest.raises(UserError, match="'Thing' holds no state"):
        record = {"type": "class", "class_name": "Thing", "state": None}
        stylegan_pickle.read(save(tmp_path / "x.pkl", {"a": Calls(nvidia.reconstruct, record)}))
