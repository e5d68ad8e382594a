"""Exporting networks of every kind of layer: any number of images, and nothing left where it fails."""

import pytest
import torch

from ldm import exporting
from ldm.data.pixels import Fit
from ldm.models.classifier import Classifier
from ldm.recognition import Reader
from ldm.util import UserError

# the others were exported by hand; they are made of the same layers and take ten seconds each and more
NETWORKS = {
    "alexnet.alexnet": {"stem": "small", "width": 0.05},
    "nin.nin": {"stem": "small", "width": 0.05},
    "vgg.vgg11": {"stem": "small", "width": 0.05},
    "vit.vit_ti_16": {"stem": "small", "width": 0.34, "depth": 1},
    "fastnet.fastnet": {"width": 0.05},
}


def reader(name, size=32, **options):
    torch.manual_seed(0)
    model = Classifier({"target": f"ldm.modules.classifiers.{name}", "params": NETWORKS[name]}, 3, **options)
    model.eval().requires_grad_(False)
    matrices = [p for p in model.model.parameters() if p.ndim == 2]
    if matrices:  # last layers of zeros or small numbers would make all answers equal
        torch.nn.init.normal_(matrices[-1])
        matrices[-1] /= model(torch.rand(8, 3, size, size) * 2 - 1).std(0).mean()
    return Reader(model, Fit((size, size), 3), ["a", "b", "c"], "x")


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_exported_for_any_number_of_images(name, tmp_path):
    import onnxruntime

    torch.set_num_threads(1)
    r = reader(name, normalize="imagenet")
    assert exporting.export(r, tmp_path / "model.onnx") < exporting.TOLERANCE
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    x = torch.rand(5, 3, 32, 32) * 2 - 1
    (got,) = session.run(None, {"images": x.numpy()})
    expected = r.probabilities(x)
    torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-3, atol=1e-4)
    assert (expected - expected[:1]).abs().max() > 1e-4  # it does look at the images


def test_a_file_that_onnxruntime_refuses_is_not_kept(tmp_path, monkeypatch):
    fixed = exporting.write

    def for_two_images(net, path, shape, notes):
        monkeypatch.setattr(torch.export, "Dim", lambda name, min: 2)  # what a network that asks for len(x) gives
        fixed(net, path, shape, notes)

    monkeypatch.setattr(exporting, "write", for_two_images)
    (tmp_path / "model.onnx").write_bytes(b"older")
    with pytest.raises(UserError, match="onnxruntime cannot run the FastNet .*no file was written"):
        exporting.export(reader("fastnet.fastnet"), tmp_path / "model.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_bytes() == b"older"


def test_what_torch_cannot_export_is_said(tmp_path):
    r = reader("fastnet.fastnet")
    r.model.model.forward = lambda x: r.model.model.fc(x.amax((2, 3)).numpy())
    with pytest.raises(UserError, match="torch cannot export the FastNet"):
        exporting.export(r, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
