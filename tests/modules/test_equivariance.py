"""scripts/shift.py and its measure, against networks whose answer is known."""

import pytest
import torch
from torch import nn

from ldm.modules.classifiers.equivariance import maps_by_stride, shift_errors
from ldm.modules.classifiers.vit import vit_ti_16
from ldm.util import UserError
from tests.docs.test_commands import run_script


def test_a_map_moves_by_whole_strides_only():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2, padding=1))
    errors = shift_errors(net, torch.rand(2, 1, 16, 16), largest=4)
    assert set(errors) == {1, 2} and max(errors[1]) < 1e-5
    assert max(errors[2][::2]) < 1e-5 and min(errors[2][1::2]) > 0.1


def test_the_last_map_of_each_stride_is_taken():
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1), nn.MaxPool2d(2), nn.ReLU())
    x = torch.rand(1, 1, 8, 8)
    maps = maps_by_stride(net, x)
    assert list(maps) == [1, 2] and torch.equal(maps[2], net(x)) and maps[1].shape == (1, 5, 8, 8)


def test_tokens_are_no_maps():
    with pytest.raises(UserError, match="VisionTransformer has no feature maps of several strides"):
        maps_by_stride(
            vit_ti_16(num_classes=5, stem="small", image_size=32, width=0.34, depth=1), torch.rand(1, 3, 32, 32)
        )


def test_the_script(tmp_path, capsys):
    argv = ["-r", "models/classifier/digits", "-n", 2, "--largest", 2, "--out", tmp_path / "s.png"]
    assert run_script("shift.py", argv) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("stride")]
    values = {int(r[1]): [float(v) for v in r[2:]] for r in rows}
    assert max(values[1]) < 0.01 and values[2][2] < 0.01 < 0.3 < values[2][1] and (tmp_path / "s.png").is_file()
    assert run_script("shift.py", [*argv, "-n", 0]) == 2
    assert run_script("shift.py", ["-r", "models/gan/openmoji"]) == 2
