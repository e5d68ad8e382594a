"""Dragging: each half of a step against cases with a known answer, what a step costs, and every fault."""

import math

import numpy as np
import pytest
import torch

from ldm import editing
from ldm.editing import DragOptions
from ldm.modules.stylegan2 import Generator
from ldm.util import UserError


def points(*pairs):
    return torch.tensor(pairs, dtype=torch.float32)


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    kwargs = dict(img_resolution=32, img_channels=3, channel_base=512, channel_max=32, num_fp16_res=0)
    return Generator(16, 0, 16, **kwargs, mapping_kwargs={"num_layers": 2}).eval().requires_grad_(False)


@pytest.fixture
def ws(generator):
    return generator.mapping(torch.randn(1, 16, generator=torch.Generator().manual_seed(3)), None)


def blob(x, y, size=32, channels=4):
    """Features with a bump at (x, y), a different height in each channel."""
    line = torch.arange(size).float()
    bump = torch.exp(-((line[None, :] - x) ** 2 + (line[:, None] - y) ** 2) / 8)
    return bump[None, None] * torch.arange(1, channels + 1).view(1, -1, 1, 1)


# --- reading features -------------------------------------------------------------------------------------------------


def test_features_are_read_at_pixels_and_between_them():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert torch.allclose(editing.read(x, points((0, 0), (3, 0), (2, 3)), 4)[:, 0], torch.tensor([0.0, 3.0, 14.0]))
    assert torch.allclose(editing.read(x, points((0.5, 1)), 4), torch.tensor([[4.5]]))
    # features of half the picture's size: pixel (0.5, 0.5) of the picture is the middle of feature pixel (0, 0)
    assert torch.allclose(editing.read(x, points((0.5, 0.5), (2.5, 0.5)), 8)[:, 0], torch.tensor([0.0, 1.0]))
    assert editing.read(x, torch.zeros(2, 5, 2), 4).shape == (2, 5, 1)


def test_discs_and_squares():
    assert len(editing.disc(1, "cpu")) == 5 and len(editing.disc(1.5, "cpu")) == 9
    assert len(editing.square(3, "cpu")) == 49 and editing.square(3, "cpu").abs().max() == 3


def test_features_are_those_of_the_network(generator, ws):
    found = {r: both for r, *both in generator.synthesis.steps(ws, noise_mode="const")}
    for resolution in (4, 16, 32):
        features, image = editing.features_at(generator, ws, resolution)
        assert torch.equal(features, found[resolution][0]) and torch.equal(image, found[resolution][1])


# --- the two halves ---------------------------------------------------------------------------------------------------


def test_tracking_finds_what_has_moved():
    """A bump goes from (10, 12) to (13, 11): the handle follows exactly, and no further than the radius."""
    reference = editing.read(blob(10, 12), points((10, 12)), 32)
    assert editing.track(blob(13, 11), reference, points((10, 12)), 4, 32).tolist() == [[13, 11]]
    near = editing.track(blob(13, 11), reference, points((10, 12)), 2, 32)
    assert near.tolist() == [[12, 11]]


def test_tracking_stays_in_the_picture():
    reference = editing.read(blob(0, 0), points((1, 1)), 32)
    found = editing.track(blob(-3, -3), reference, points((1, 1)), 5, 32)
    assert (found >= 0).all()


def test_motion_supervision_pulls_towards_the_target():
    """With the position of a bump as the latent, the loss falls where the bump moves to its target."""
    where = torch.tensor([10.0, 12.0], requires_grad=True)
    line = torch.arange(32.0)
    bump = torch.exp(-((line[None, :] - where[0]) ** 2 + (line[:, None] - where[1]) ** 2) / 8)[None, None]
    loss = editing.motion_loss(bump, points((10, 12)), points((20, 12)), 3, 32)
    (gradient,) = torch.autograd.grad(loss, where)
    assert gradient[0] < 0 and abs(gradient[1]) < 0.05 * abs(gradient[0])


def test_motion_of_a_known_ramp():
    """On features f = x the pixel one step to the right is 1 larger: the loss is 1 per point, 0.5 at half a step."""
    ramp = torch.arange(32.0).expand(1, 1, 32, 32)
    at = points((10, 12))
    assert math.isclose(float(editing.motion_loss(ramp, at, points((20, 12)), 3, 32)), 1, rel_tol=1e-5)
    assert math.isclose(float(editing.motion_loss(ramp, at, points((10.5, 12)), 3, 32)), 0.5, rel_tol=1e-4)
    assert float(editing.motion_loss(ramp, at, points((10, 20)), 3, 32)) < 1e-5
    assert float(editing.motion_loss(ramp, at, at, 3, 32)) == 0
    two = editing.motion_loss(ramp, points((10, 12), (5, 5)), points((20, 12), (9, 5)), 3, 32)
    assert math.isclose(float(two), 2, rel_tol=1e-5)


def test_the_features_behind_are_no_part_of_the_gradient():
    x = torch.randn(1, 2, 8, 8, requires_grad=True)
    loss = editing.motion_loss(x, points((2, 4)), points((7, 4)), 0, 8)
    (gradient,) = torch.autograd.grad(loss, x)
    assert gradient[0, :, 4, 3].abs().min() > 0 and gradient[0, :, 4, 2].abs().max() < 1e-6


def test_mask_loss():
    a, b = torch.zeros(1, 2, 4, 4), torch.ones(1, 2, 4, 4)
    fixed = torch.zeros(1, 1, 4, 4)
    assert editing.mask_loss(b, a, fixed) == 0
    fixed[..., :2] = 1
    assert editing.mask_loss(b, a, fixed) == 0.5


def test_adam_is_torchs():
    torch.manual_seed(0)
    x, p = torch.randn(3, 4), None
    p = x.clone().requires_grad_()
    optimizer, moments = torch.optim.Adam([p], lr=0.1), (torch.zeros_like(x), torch.zeros_like(x))
    for step in range(1, 6):
        g = torch.randn(3, 4)
        p.grad = g.clone()
        optimizer.step()
        x, moments = editing.adam(x, g, moments, step, 0.1)
    assert torch.allclose(x, p, atol=1e-6)


# --- a step -----------------------------------------------------------------------------------------------------------


class Counter:
    """Counts runs of the blocks of a synthesis network, and backward passes through the first one."""

    def __init__(self, generator):
        self.forward, self.backward = {}, 0
        self.hooks = []
        for resolution in generator.synthesis.block_resolutions:
            block = getattr(generator.synthesis, f"b{resolution}")
            self.hooks.append(block.register_forward_hook(self._count(resolution)))

    def _count(self, resolution):
        def hook(module, args, output):
            self.forward[resolution] = self.forward.get(resolution, 0) + 1
            if resolution == 4 and output[0].requires_grad:
                output[0].register_hook(self._backward)

        return hook

    def _backward(self, gradient):
        self.backward += 1

    def stop(self):
        for hook in self.hooks:
            hook.remove()


def test_a_step_costs_one_run_to_the_feature_layer_and_one_backward(generator, ws):
    job, state = editing.start(generator, ws, points((8, 8)), points((16, 8)), options=DragOptions(resolution=16))
    counter = Counter(generator)
    for n in range(1, 4):
        state = editing.drag_step(job, state)
        assert counter.forward == {4: n, 8: n, 16: n}  # nothing above the feature layer
        assert counter.backward == n
    counter.stop()
    assert state.step == 3


def test_a_step_of_256_pixels_costs_no_more():
    """The feature layer that is the default there, 128 pixels, and nothing above it; no run of the mapping."""
    torch.manual_seed(0)
    kwargs = dict(channel_base=256, channel_max=8, num_fp16_res=4, mapping_kwargs={"num_layers": 2})
    large = Generator(8, 0, 8, 256, 3, **kwargs).eval()
    ws = large.mapping(torch.randn(1, 8), None)
    mask = torch.zeros(256, 256, dtype=torch.bool)
    mask[:, :200] = True
    job, state = editing.start(large, ws, points((80, 80)), points((160, 80)), mask)
    counter, mapped, runs = Counter(large), [], []
    large.mapping.register_forward_hook(lambda *_: mapped.append(1))
    large.synthesis.register_forward_pre_hook(lambda *_: runs.append(1))  # a whole run, not one that stops
    for n in range(1, 4):
        state = editing.drag_step(job, state)
        assert counter.forward == dict.fromkeys((4, 8, 16, 32, 64, 128), n) and counter.backward == n
    counter.stop()
    assert state.step == 3 and not state.arrived and mapped == runs == []


def test_a_step_changes_nothing_but_the_leading_layers(generator, ws):
    before = {k: v.clone() for k, v in generator.state_dict().items()}
    options = DragOptions(resolution=16, layers=3)
    job, start = editing.start(generator, ws, points((8, 8)), points((16, 8)), options=options)
    kept = start.head.clone()
    state = editing.drag_step(job, start)
    full = editing.full_ws(job, state.head)
    assert torch.equal(full[:, 3:], ws[:, 3:])
    changed = (full[:, :3] - ws[:, :3]).abs()
    assert torch.allclose(changed, torch.full_like(changed, DragOptions.lr), atol=1e-3)  # Adam's first step is lr
    assert all(torch.equal(v, generator.state_dict()[k]) for k, v in before.items())
    assert torch.equal(start.head, kept) and start.step == 0  # the state it was given is as it was
    again = editing.drag_step(job, start)
    assert torch.equal(again.head, state.head)
    assert all(p.grad is None for p in generator.parameters())


def test_w_moves_all_its_layers_together(generator, ws):
    options = DragOptions(resolution=16, layers=4, w_plus=False)
    job, state = editing.start(generator, ws, points((8, 8)), points((16, 8)), options=options)
    state = editing.drag_step(job, state)
    full = editing.full_ws(job, state.head)
    assert state.head.shape == (1, 1, 16) and full.shape == ws.shape
    assert (full[:, :4] == full[:, :1]).all() and torch.equal(full[:, 4:], ws[:, 4:])


def test_one_pixel_is_reached(generator, ws):
    """A handle within the tolerance has arrived: no update, no backward pass."""
    job, state = editing.start(generator, ws, points((8, 8)), points((9, 8)))
    counter = Counter(generator)
    (state,) = editing.drag_points(job, state, 10)
    counter.stop()
    assert state.arrived and state.step == 0 and counter.backward == 0
    assert torch.equal(editing.full_ws(job, state.head), ws)


def test_dragging_lowers_the_loss_of_the_first_step(generator, ws):
    """The features around the handle come to be those one pixel nearer to the target."""
    handles, targets = points((16, 16)), points((22, 16))
    options = DragOptions(resolution=32, layers=None, lr=0.003)
    job, state = editing.start(generator, ws, handles, targets, options=options)

    def gap(head):
        now, _ = editing.features_at(generator, editing.full_ws(job, head), 32)
        around = handles[:, None] + editing.disc(2, "cpu")
        there = editing.read(now, around + points((1, 0)), 32)
        return float((there - editing.read(job.features0, around, 32)).abs().mean())

    moved = editing.drag_step(job, state)
    assert gap(moved.head) < gap(state.head)


def test_the_mask_holds_the_rest(generator, ws):
    """The same drag with a mask changes the features outside of it less."""
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[4:14, 4:22] = True
    change = {}
    for weight in (0.0, 200.0):
        options = DragOptions(resolution=16, mask_weight=weight, lr=0.02)
        job, state = editing.start(generator, ws, points((8, 8)), points((16, 8)), mask, options)
        for _ in range(12):
            state = editing.drag_step(job, state)
        features, image = editing.features_at(generator, editing.full_ws(job, state.head), 16)
        change[weight] = [
            float(editing.mask_loss(*both, job.fixed)) for both in ((features, job.features0), (image, job.image0))
        ]
    assert all(held < 0.7 * free for held, free in zip(change[200.0], change[0.0], strict=True))


def test_the_last_state_is_tracked(generator, ws):
    job, state = editing.start(generator, ws, points((8, 8)), points((24, 8)))
    states = list(editing.drag_points(job, state, 3))
    assert [s.step for s in states[:3]] == [1, 2, 3]
    assert torch.equal(states[3].handles, editing.locate(job, states[3]).handles)
    assert editing.picture(job, states[3]).shape == (1, 3, 32, 32)


def test_a_lost_handle_does_not_undo_the_drag(generator, ws, monkeypatch):
    """The last state is the picture in which the handle was nearest, though it went away again."""
    places = iter([10, 14, 11, 9, 8])  # at the second step's picture it is nearest
    monkeypatch.setattr(editing, "track", lambda *args: points((next(places), 8)))
    job, state = editing.start(generator, ws, points((8, 8)), points((24, 8)), options=DragOptions(resolution=16))
    *states, last = editing.drag_points(job, state, 5)
    assert [float(s.handles[0, 0]) for s in states] == [8, 10, 14, 11, 9]
    assert last.step == 2 and float(last.handles[0, 0]) == 14
    assert torch.equal(last.head, states[1].head) and not torch.equal(last.head, states[2].head)


def test_a_generator_without_a_picture_on_the_way_is_held_by_its_features(ws):
    torch.manual_seed(0)
    kwargs = dict(channel_base=512, channel_max=32, num_fp16_res=0, architecture="resnet")
    resnet = Generator(16, 0, 16, 32, 3, **kwargs, mapping_kwargs={"num_layers": 2}).eval()
    assert editing.features_at(resnet, ws[:, : resnet.num_ws], 16)[1] is None
    mask = torch.ones(32, 32, dtype=torch.bool)
    mask[20:] = False
    job, state = editing.start(resnet, ws[:, : resnet.num_ws], points((8, 8)), points((16, 8)), mask)
    moved = editing.drag_step(job, editing.drag_step(job, state))
    assert job.image0 is None and moved.step == 2 and moved.loss > 0


# --- points and faults ------------------------------------------------------------------------------------------------


def test_points_are_parsed():
    handles, targets = editing.parse_points(" 1,2>3,4 ; 5.5,6 > 7,8; ")
    assert handles.tolist() == [[1, 2], [5.5, 6]] and targets.tolist() == [[3, 4], [7, 8]]
    for text in ("", "1,2", "1,2>3", "a,b>c,d", "1,2>3,4>5,6"):
        with pytest.raises(UserError, match="--points"):
            editing.parse_points(text)


def test_faults_of_points():
    free = torch.ones(32, 32, dtype=torch.bool)
    fixed = free.clone()
    fixed[8, 20] = False  # y, x
    for handle, target, mask, text in (
        ((32, 0), (1, 1), None, r"handle 1 \(32, 0\) is outside of the picture: expected 0 to 31"),
        ((1, 1), (1, -1), None, r"target 1 \(1, -1\) is outside"),
        ((5, 5), (5, 5), None, r"handle 1 \(5, 5\) is at its target already"),
        ((20, 8), (5, 5), fixed, r"handle 1 \(20, 8\) is on a pixel that the mask keeps"),
        ((8, 20), (5, 5), fixed[:16], "the mask is 32x16 pixels, the picture 32x32"),
    ):
        with pytest.raises(UserError, match=text):
            editing.check_points(points(handle), points(target), 32, mask)
    editing.check_points(points((8, 20)), points((5, 5)), 32, fixed)
    editing.check_points(points((20, 8)), points((5, 5)), 32, free)


def test_a_resolution_that_is_not_there(generator, ws):
    with pytest.raises(UserError, match="resolution 12: the generator has 4, 8, 16, 32"):
        editing.start(generator, ws, points((8, 8)), points((9, 12)), options=DragOptions(resolution=12))


def test_radii_scale_with_the_picture():
    assert editing._radii(512, DragOptions()) == (3, 12, 2)
    assert editing._radii(64, DragOptions()) == (2, 3, 1)
    assert editing._radii(64, DragOptions(motion_radius=5, track_radius=7, tolerance=0.5)) == (5, 7, 0.5)


def test_marks():
    page = editing.mark(torch.full((1, 8, 8), -1.0), points((1, 1)), points((6, 6)), scale=8)
    assert page.shape == (3, 64, 64)
    pixels = ((page + 1) * 127.5).round().permute(1, 2, 0).numpy().astype(np.uint8)
    assert pixels[12, 12].tolist() == [255, 0, 0] and pixels[52, 52].tolist() == [0, 0, 255]
    assert pixels[2, 60].tolist() == [0, 0, 0]
