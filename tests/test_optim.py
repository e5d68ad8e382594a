"""HiddenAndRest: each part moves its own parameters, schedulers and checkpoints see one optimiser."""

import pytest
import torch
from torch import nn

from ldm.models.param_groups import by_role, freeze, groups, layer_numbers, rest_frozen_parts
from ldm.modules.classifiers.resnet import resnet20
from ldm.modules.classifiers.vit import vit_ti_16
from ldm.optim import HiddenAndRest
from ldm.util import ConfigError, UserError, instantiate_from_config

MUON = {"target": "timm.optim.Muon", "params": {"weight_decay": 0.1}}
ADAM = {"target": "torch.optim.AdamW", "params": {"weight_decay": 0.0}}
SGD = {"target": "torch.optim.SGD", "params": {"lr": 0.5}}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def small_vit(**params):
    return vit_ti_16(num_classes=5, stem="small", image_size=8, width=0.34, depth=3, **params)


def step(net, optimizer, seed=0):
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), torch.tensor([0, 1, 2, 3]))
        loss.backward()
        return loss

    return optimizer.step(closure)


def directions(matrix):
    """Effective number of singular values."""
    s = torch.linalg.svdvals(matrix)
    return float(s.sum() ** 2 / s.square().sum())


@pytest.mark.parametrize("hidden", ["torch.optim.Muon", "timm.optim.Muon"])
def test_hidden_matrices_move_by_an_orthogonal_matrix(hidden):
    net = small_vit()
    nn.init.normal_(net.heads.head.weight)  # zero at the start: nothing would reach the hidden layers
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    config = {"target": hidden, "params": {"weight_decay": 0.0}}
    optimizer = HiddenAndRest(groups(net, net.parameters(), 0.1, num_classes=5), 0.1, config, SGD)
    assert float(step(net, optimizer)) > 0
    moved = {n: p.detach() - before[n] for n, p in net.named_parameters()}
    for name, delta in moved.items():
        matrix = delta.ndim == 2 and name != "heads.head.weight"
        if matrix:
            # many directions of equal length, where the gradient has few long ones
            assert directions(delta) > 1.3 * directions(dict(net.named_parameters())[name].grad), name
        elif delta.abs().max() > 0:
            grad = dict(net.named_parameters())[name].grad
            torch.testing.assert_close(delta, -0.5 * grad, rtol=1e-3, atol=1e-6)
    assert moved["encoder.layers.encoder_layer_1.mlp.0.weight"].abs().max() > 0
    assert moved["conv_proj.weight"].abs().max() > 0


def test_filters_go_to_muon_but_first_and_last_layer_do_not():
    net = resnet20(num_classes=5, width=0.5)
    made = groups(net, net.parameters(), 0.1, num_classes=5)
    hidden = {id(p) for g in made if g["hidden"] for p in g["params"]}
    names = {n for n, p in net.named_parameters() if id(p) in hidden}
    assert names == {n for n, p in net.named_parameters() if p.ndim == 4 and n != "conv1.weight"}
    optimizer = HiddenAndRest(made, 0.1, MUON, ADAM)
    before = net.layer2[0].conv1.weight.detach().clone()
    step(net, optimizer)
    assert not torch.equal(before, net.layer2[0].conv1.weight)


def test_schedule_and_checkpoint_reach_both_parts(tmp_path):
    net = small_vit()
    nn.init.normal_(net.heads.head.weight)
    make = lambda n: HiddenAndRest(groups(n, n.parameters(), 0.02, num_classes=5), 0.02, MUON, ADAM)  # noqa: E731
    optimizer = make(net)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.5**n)
    for i in range(3):
        step(net, optimizer, i)
        schedule.step()
    assert {round(g["lr"], 6) for part in optimizer.parts for g in part.param_groups} == {0.0025}
    torch.save([net.state_dict(), optimizer.state_dict(), schedule.state_dict()], tmp_path / "x.pt")
    again = small_vit()
    other = make(again)
    other_schedule = torch.optim.lr_scheduler.LambdaLR(other, lambda n: 0.5**n)
    for thing, state in zip((again, other, other_schedule), torch.load(tmp_path / "x.pt"), strict=True):
        thing.load_state_dict(state)
    for i in range(3, 6):
        step(net, optimizer, i)
        step(again, other, i)
        schedule.step()
        other_schedule.step()
    for a, b in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_rest_may_have_its_own_rate_and_hidden_must_exist():
    net = small_vit()
    made = groups(net, net.parameters(), 0.1, 0.5, num_classes=5)
    optimizer = HiddenAndRest(made, 0.1, MUON, SGD)
    rest = {round(g["lr"], 9) for g in optimizer.parts[1].param_groups}
    assert max(rest) == 0.5 and min(rest) == 0.5 * 0.5**4  # the head learns at the full rate, the patches slowest
    with pytest.raises(ValueError, match="without layers between"):
        linear = nn.Linear(3, 5)
        HiddenAndRest(groups(linear, linear.parameters(), 0.1), 0.1, MUON, ADAM)


@pytest.mark.parametrize(
    ("target", "params"),
    [
        ("torch.optim.SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}),
        ("torch.optim.AdamW", {"weight_decay": 0.05}),
        ("timm.optim.Lamb", {"weight_decay": 0.02}),
        ("timm.optim.Muon", {"weight_decay": 0.1}),
        ("ldm.optim.HiddenAndRest", {"hidden": MUON, "rest": ADAM}),
    ],
)
def test_optimisers_by_config_lower_the_loss(target, params):
    net = resnet20(num_classes=5, width=0.5)
    made = groups(net, net.parameters(), 0.01, num_classes=5)
    optimizer = instantiate_from_config({"target": target, "params": params}, params=made, lr=0.01)
    losses = [float(step(net, optimizer)) for _ in range(8)]
    assert losses[-1] < losses[0] - 0.1


# --- groups -----------------------------------------------------------------------------------------------------------


def test_layers_are_counted_from_the_images():
    numbers = layer_numbers(small_vit())
    assert numbers["class_token"] == numbers["conv_proj.weight"] == numbers["encoder.pos_embedding"] == 0
    assert [numbers[f"encoder.layers.encoder_layer_{i}.ln_1.weight"] for i in range(3)] == [0, 1, 2]
    assert [numbers[f"encoder.layers.encoder_layer_{i}.mlp.0.weight"] for i in range(3)] == [1, 2, 3]
    assert numbers["heads.head.bias"] == 4
    numbers = layer_numbers(resnet20())
    assert numbers["conv1.weight"] == numbers["bn1.weight"] == 0
    assert numbers["layer1.0.conv1.weight"] == numbers["layer1.0.bn2.bias"] == 1
    assert numbers["layer3.2.conv2.weight"] == 9 and numbers["fc.weight"] == 10


def test_layer_decay_slows_the_layers_near_the_images():
    net = small_vit()
    made = groups(net, net.parameters(), 0.1, layer_decay=0.5, num_classes=5)
    rate = {id(p): g["lr"] for g in made for p in g["params"]}
    named = dict(net.named_parameters())
    assert rate[id(named["heads.head.weight"])] == 0.1
    assert rate[id(named["encoder.layers.encoder_layer_2.mlp.3.weight"])] == 0.05
    assert rate[id(named["conv_proj.weight"])] == 0.1 * 0.5**4
    with pytest.raises(UserError, match="layer_decay must be above 0"):
        groups(net, net.parameters(), 0.1, layer_decay=1.5)


@pytest.mark.parametrize(("wanted", "prefix"), [("head", ("fc.",)), (["layer3", "fc"], ("layer3.", "fc."))])
def test_only_what_is_named_is_trained(wanted, prefix):
    net = resnet20(num_classes=5)
    freeze(net, wanted, 5)
    assert {n for n, p in net.named_parameters() if p.requires_grad} == {
        n for n, _ in net.named_parameters() if n.startswith(prefix)
    }
    net.train()
    rest_frozen_parts(net)
    assert not net.bn1.training and not net.layer1[0].bn1.training
    assert net.layer3[0].bn1.training == ("layer3." in prefix)
    with pytest.raises(UserError, match=r"no 'layer9' \(did you mean layer\d\?\)"):
        freeze(net, ["layer9"], 5)


@pytest.mark.parametrize("part", ["hidden", "rest"])
def test_a_part_without_a_target_is_named(part):
    net = small_vit()
    configs = {"hidden": MUON, "rest": ADAM, part: 3}
    with pytest.raises(ConfigError, match=f"^{part}: expected a mapping with the key target, got 3"):
        HiddenAndRest(groups(net, net.parameters(), 0.1, num_classes=5), 0.1, **configs)


def test_what_is_hidden_is_told_by_kind_and_shape():
    """Tables, and what touches pictures, latents or logits, are no hidden matrices; each parameter has one place."""
    net = nn.ModuleDict(
        {
            "first": nn.Conv2d(3, 8, 3),
            "filters": nn.Conv2d(8, 8, 3),
            "table": nn.Embedding(10, 8),
            "norm": nn.GroupNorm(2, 8),
            "matrix": nn.Linear(8, 16),
            "last": nn.Linear(16, 1),
        }
    )
    hidden, rest = by_role(net, net.parameters())
    assert hidden["hidden"] and not rest["hidden"]
    assert {id(p) for p in hidden["params"]} == {id(net["filters"].weight), id(net["matrix"].weight)}
    assert len(hidden["params"]) + len(rest["params"]) == len(list(net.parameters()))
