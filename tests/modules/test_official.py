"""Official functions whose signature is not ours, by their official names."""

import torch
from torch import nn

from ldm.util import get_obj_from_str

HOME = "ldm.modules.diffusionmodules.util."


def test_checkpoint_takes_the_official_arguments():
    checkpoint, layer, calls = get_obj_from_str(HOME + "checkpoint"), nn.Linear(3, 3), []

    def function(x, y):
        calls.append(1)
        return layer(x).sin() * y

    grads = []
    for flag in (False, True):
        calls.clear()
        x = torch.ones(2, 3, requires_grad=True)
        checkpoint(function, (x, 2.0), layer.parameters(), flag).sum().backward()
        assert len(calls) == 1 + flag
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_small_functions():
    layer = nn.Linear(2, 2)
    before = layer.weight.clone()
    assert get_obj_from_str(HOME + "scale_module")(layer, 0.5) is layer
    torch.testing.assert_close(layer.weight, 0.5 * before)
    assert get_obj_from_str(HOME + "mean_flat")(torch.ones(2, 3, 4)).tolist() == [1.0, 1.0]
    assert isinstance(get_obj_from_str(HOME + "linear")(2, 3), nn.Linear)
    attention = get_obj_from_str("ldm.modules.attention.SpatialSelfAttention")(32)
    assert set(attention.state_dict()) == {
        f"{n}.{w}" for n in ("norm", "q", "k", "v", "proj_out") for w in ("weight", "bias")
    }
