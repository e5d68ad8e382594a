"""Batch norms folded into convolutions: equal outputs, and networks that cannot be folded are left alone."""

import pytest
import torch
from torch import Tensor, nn

from ldm.evaluation.folding import folded
from ldm.modules.classifiers.fastnet import FastNet
from ldm.modules.classifiers.googlenet import googlenet
from ldm.modules.classifiers.resnet import resnet20


def trained(network: nn.Module) -> nn.Module:
    """With statistics and gains as a training leaves them."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight, 1, 0.3)
                nn.init.normal_(module.bias, 0, 0.3)
    return network


def norms(network: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm2d) for m in network.modules())


class Reads(nn.Module):
    """A convolution whose output is read twice, or that is called twice."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.twice = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), twice

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(self.conv(y)) if self.twice else self.norm(y) + y


@pytest.mark.parametrize(
    ("network", "left"),
    [
        (resnet20(num_classes=10), 0),
        (googlenet(num_classes=10, stem="small"), 2),  # the auxiliary heads, which evaluation does not run
        (FastNet(num_classes=10, width=0.25), None),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 30 * 30, 2)), 0),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), 1),
        (Reads(twice=False), 1),
        (Reads(twice=True), 1),
    ],
)
def test_folding_changes_nothing_but_the_number_of_layers(network, left):
    x = torch.randn(4, 3, 32, 32)
    network = trained(network).eval()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    result = folded(network, x[:2])
    with torch.no_grad():
        torch.testing.assert_close(result(x), network(x), rtol=1e-4, atol=1e-4)
    assert left is None or norms(result) == left
    assert not result.training and all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_a_network_in_training_mode_is_measured_in_evaluation_mode():
    network, x = trained(resnet20(num_classes=10)).train(), torch.randn(8, 3, 32, 32)
    result = folded(network, x[:2])
    assert network.training
    with torch.no_grad():
        torch.testing.assert_close(result(x), network.eval()(x), rtol=1e-4, atol=1e-4)
