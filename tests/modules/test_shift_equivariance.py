"""What the course says of convolutions: the feature map moves with the picture, by the strides; a ViT's does not."""

import pytest
import torch

from ldm.modules.classifiers.resnet import resnet20
from ldm.modules.classifiers.vit import vit_ti_16

SHIFT, BORDER = 4, 12  # pixels; what padding can reach is left out


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def shifted(x, pixels):
    return torch.roll(x, (pixels, pixels), (2, 3))


@pytest.mark.parametrize(("layers", "stride"), [(1, 1), (2, 2)])
def test_maps_of_a_cnn_move_with_the_picture(layers, stride):
    net = resnet20(width=0.5).eval()
    x = torch.randn(2, 3, 64, 64)

    def features(x):
        x = net.relu(net.bn1(net.conv1(x)))
        for stage in list(net.stages())[:layers]:
            x = stage(x)
        return x

    with torch.no_grad():
        here, there = features(x), features(shifted(x, SHIFT))
        odd = features(shifted(x, 1))
    edge = BORDER * 2 // stride
    inner = slice(edge, -edge)
    moved = shifted(here, SHIFT // stride)
    torch.testing.assert_close(there[..., inner, inner], moved[..., inner, inner], rtol=1e-4, atol=1e-5)
    if stride == 2:  # a shift by less than the stride has no counterpart in the map
        best = min(float((odd - shifted(here, k))[..., inner, inner].abs().max()) for k in (0, 1))
        assert best > 0.1
    assert float((there - here)[..., inner, inner].abs().max()) > 0.1


def test_patches_of_a_vit_move_but_positions_do_not():
    net = vit_ti_16(num_classes=5, stem="small", image_size=32, width=0.34, depth=1).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        patches, moved = net.conv_proj(x), net.conv_proj(shifted(x, 4))
        torch.testing.assert_close(moved, shifted(patches, 1), rtol=1e-5, atol=1e-6)
        encoded, other = (net.encoder(net.tokens(v))[:, 1:].unflatten(1, (8, 8)) for v in (x, shifted(x, 4)))
    assert float((torch.roll(encoded, (1, 1), (1, 2)) - other).abs().max()) > 0.01
