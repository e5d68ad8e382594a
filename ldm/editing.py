"""Dragging points of a generated picture (Pan et al. 2023, "Drag Your GAN"), as functions of tensors.

The features of one middle layer say where a part of the picture is. A step moves the latent so that the features around
each handle reappear one pixel nearer to its target (motion supervision, section 3.2), and then looks for where the
handle has gone (point tracking, section 3.3). It costs one run of the generator up to that layer and one backward pass.

Points are (x, y) in pixels of the picture, float32 [N, 2], pixel centres at whole numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.util import UserError

BETAS, EPS = (0.9, 0.999), 1e-8  # of Adam
FEATURES = 0.2  # weight of fixed features where the picture is known too, which alone shows what a person would see


@dataclass(frozen=True)
class DragOptions:
    """What a drag depends on besides the picture and its points.

    Attributes:
        lr: Adam's step in the latent; the paper takes 0.002 and some hundred steps at 512 pixels.
        layers: leading ws that move, which carry pose and shape; the others keep texture and colour. None for those up
            to the feature layer. The paper moves 6.
        resolution: of the feature layer; None for half of the picture's, at most 128.
        motion_radius, track_radius: of the disc that is moved and of the square that is searched, in pixels; None for
            the paper's 3 and 12 at 512 pixels, at least 2 and 3.
        mask_weight: of keeping what is outside of the mask: the features there, and, where the generator adds up a
            picture layer by layer (skip connections), the picture so far.
        tolerance: a handle this near to its target has arrived, in pixels; None for the paper's 2 at 512, at least 1.
        w_plus: a latent per layer instead of one for all that move.
    """

    lr: float = 0.1
    layers: int | None = 6
    resolution: int | None = None
    motion_radius: float | None = None
    track_radius: int | None = None
    mask_weight: float = 10.0
    tolerance: float | None = None
    w_plus: bool = True


@dataclass(frozen=True)
class Drag:
    """What stays the same during a drag.

    Attributes:
        generator: a StyleGAN2 generator, without gradients for its weights.
        targets: [N, 2].
        features0: of the picture at the start [1, C, h, w]; reference: at the handles then [N, C].
        image0: the picture so far at the feature layer [1, 3, h, w]; None where the generator makes none on the way.
        fixed: share of each feature pixel that must not change [1, 1, h, w], or None.
        tail: ws that do not move [1, num_ws - layers, w_dim].
    """

    generator: nn.Module
    targets: Tensor
    features0: Tensor
    image0: Tensor | None
    reference: Tensor
    fixed: Tensor | None
    tail: Tensor
    options: DragOptions


@dataclass(frozen=True)
class DragState:
    """What a step changes.

    Attributes:
        head: ws that move [1, layers, w_dim], or [1, 1, w_dim] for one w.
        handles: where the handles are in the picture of `head` before the last update [N, 2].
        moments: Adam's two, like `head`.
        step: number of updates so far.
        loss: of the last update.
        arrived: all handles are at their targets.
    """

    head: Tensor
    handles: Tensor
    moments: tuple[Tensor, Tensor]
    step: int = 0
    loss: float = float("nan")
    arrived: bool = False


# --- points and masks -------------------------------------------------------------------------------------------------


def parse_points(text: str) -> tuple[Tensor, Tensor]:
    """ "x,y>x,y; x,y>x,y" -> handles and targets, [N, 2] each.

    Raises:
        UserError: written in another way.
    """
    pairs = []
    for item in filter(None, (part.strip() for part in text.split(";"))):
        try:
            ends = [[float(n) for n in end.split(",")] for end in item.split(">")]
        except ValueError:
            ends = []
        if [len(end) for end in ends] != [2, 2]:
            raise UserError(f'--points {item!r}: expected "x,y>x,y", pairs separated by ;')
        pairs.append(ends)
    if not pairs:
        raise UserError('--points: no points, expected "x,y>x,y; x,y>x,y"')
    handles, targets = torch.tensor(pairs).unbind(1)
    return handles, targets


def check_points(handles: Tensor, targets: Tensor, size: int, mask: Tensor | None = None) -> None:
    """Raises UserError for a point outside of the picture, a handle on a fixed pixel, or one at its target.

    Args:
        size: side of the picture.
        mask: bool [size, size], true where the picture may change; None for everywhere.
    """
    if mask is not None and mask.shape != (size, size):
        height, width = mask.shape
        raise UserError(f"the mask is {width}x{height} pixels, the picture {size}x{size}: they must have the same size")
    for i, (handle, target) in enumerate(zip(handles.tolist(), targets.tolist(), strict=True), 1):
        for what, (x, y) in (("handle", handle), ("target", target)):
            if not (0 <= x <= size - 1 and 0 <= y <= size - 1):
                raise UserError(f"{what} {i} ({x:g}, {y:g}) is outside of the picture: expected 0 to {size - 1}")
        if handle == target:
            raise UserError(f"handle {i} ({handle[0]:g}, {handle[1]:g}) is at its target already: nothing to drag")
        if mask is not None and not bool(mask[round(handle[1]), round(handle[0])]):
            raise UserError(
                f"handle {i} ({handle[0]:g}, {handle[1]:g}) is on a pixel that the mask keeps: handles must lie where "
                "the mask is white"
            )


# --- features ---------------------------------------------------------------------------------------------------------


def feature_resolution(generator: nn.Module, options: DragOptions) -> int:
    """Raises UserError for a resolution that the generator does not have."""
    known = generator.synthesis.block_resolutions
    wanted = options.resolution or max(known[0], min(128, generator.img_resolution // 2))
    if wanted not in known:
        raise UserError(f"resolution {wanted}: the generator has {', '.join(map(str, known))}")
    return wanted


def features_at(generator: nn.Module, ws: Tensor, resolution: int) -> tuple[Tensor, Tensor | None]:
    """Runs the generator up to that resolution and no further, in float32 as the picture is drawn.

    Returns:
        Features [1, C, resolution, resolution] and the picture so far [1, 3, resolution, resolution] or None, float32.
    """
    for reached, features, image in generator.synthesis.steps(ws, noise_mode="const", force_fp32=True):
        if reached == resolution:
            return features, image
    raise ValueError(f"resolution: got {resolution}, expected one of {generator.synthesis.block_resolutions}")


def read(features: Tensor, points: Tensor, size: int) -> Tensor:
    """Features [1, C, h, w] at points [..., 2] of a picture of `size` pixels, bilinear -> [..., C]."""
    grid = (points + 0.5) * (2 / size) - 1  # -1 and 1 are the outer borders of the outer pixels
    flat = grid.reshape(1, 1, -1, 2)
    found = F.grid_sample(features, flat, mode="bilinear", padding_mode="border", align_corners=False)
    return found[0, :, 0].t().unflatten(0, points.shape[:-1])


def disc(radius: float, device: torch.device) -> Tensor:
    """Whole-numbered offsets within `radius`, [M, 2]."""
    square_ = square(int(radius), device)
    return square_[square_.norm(dim=1) <= radius]


def square(radius: int, device: torch.device) -> Tensor:
    """Whole-numbered offsets from -radius to radius, [(2 radius + 1)^2, 2]."""
    line = torch.arange(-radius, radius + 1, dtype=torch.float32, device=device)
    return torch.cartesian_prod(line, line)


# --- the two halves of a step -----------------------------------------------------------------------------------------


def motion_loss(features: Tensor, handles: Tensor, targets: Tensor, radius: float, size: int) -> Tensor:
    """Equation 1 without its mask: what is around each handle, without gradient, is to be one pixel nearer its target.

    Mean absolute difference per point, summed over points. A handle at its target adds nothing.
    """
    way = targets - handles
    distance = way.norm(dim=1, keepdim=True)
    step = way * (distance.clamp(max=1) / distance.clamp(min=1e-6))  # a pixel, or what is left
    around = handles[:, None] + disc(radius, handles.device)  # [N, M, 2]
    here = read(features, around, size).detach()
    there = read(features, around + step[:, None], size)
    return ((here - there).abs().mean((1, 2)) * (distance[:, 0] > 0)).sum()


def mask_loss(x: Tensor, x0: Tensor, fixed: Tensor) -> Tensor:
    """The second half of equation 1: mean absolute change of features, or of a picture, where they are fixed."""
    return ((x - x0).abs() * fixed).mean()


def track(features: Tensor, reference: Tensor, handles: Tensor, radius: int, size: int) -> Tensor:
    """Equation 2: the point around each handle whose features are nearest to those at the start; [N, 2]."""
    around = handles[:, None] + square(radius, handles.device)  # [N, M, 2]
    inside = ((around >= 0) & (around <= size - 1)).all(2)
    distance = (read(features, around, size) - reference[:, None]).abs().sum(2)
    nearest = distance.masked_fill(~inside, torch.inf).argmin(1)
    return around[torch.arange(len(handles), device=handles.device), nearest]


def _radii(size: int, options: DragOptions) -> tuple[float, int, float]:
    motion = max(2.0, 3 * size / 512) if options.motion_radius is None else options.motion_radius
    search = max(3, round(12 * size / 512)) if options.track_radius is None else options.track_radius
    return motion, search, max(1.0, 2 * size / 512) if options.tolerance is None else options.tolerance


# --- dragging ---------------------------------------------------------------------------------------------------------


def start(
    generator: nn.Module,
    ws: Tensor,
    handles: Tensor,
    targets: Tensor,
    mask: Tensor | None = None,
    options: DragOptions | None = None,
) -> tuple[Drag, DragState]:
    """Checks the points and reads the features of the picture as it is.

    Args:
        ws: [1, num_ws, w_dim].
        mask: bool [H, W], true where the picture may change; None for everywhere.

    Raises:
        UserError: see `check_points` and `feature_resolution`.
    """
    options, size = options or DragOptions(), generator.img_resolution
    check_points(handles, targets, size, mask)
    generator.requires_grad_(False)
    resolution = feature_resolution(generator, options)
    used = 2 * generator.synthesis.block_resolutions.index(resolution) + 1  # ws up to the feature layer
    layers = used if options.layers is None else min(options.layers, used)
    handles, targets = handles.to(ws), targets.to(ws)
    with torch.no_grad():
        features, image = features_at(generator, ws, resolution)
        reference = read(features, handles, size)
    fixed = None
    if mask is not None:
        keep = 1 - mask.to(ws)[None, None]
        fixed = F.adaptive_avg_pool2d(keep, [resolution, resolution])
    head = ws[:, :layers] if options.w_plus else ws[:, :1]
    head = head.detach().clone()
    drag = Drag(generator, targets, features, image, reference, fixed, ws[:, layers:].detach(), options)
    return drag, DragState(head, handles, (torch.zeros_like(head), torch.zeros_like(head)))


def full_ws(drag: Drag, head: Tensor) -> Tensor:
    """The latent of the whole picture, [1, num_ws, w_dim]."""
    layers = drag.generator.num_ws - drag.tail.shape[1]
    return torch.cat([head.expand(-1, layers, -1), drag.tail], 1)


def drag_step(drag: Drag, state: DragState) -> DragState:
    """Tracks the handles in the picture of `state`, and where they have not arrived moves the latent towards it.

    One run of the generator up to the feature layer; one backward pass unless all have arrived.
    """
    size = drag.generator.img_resolution
    motion, search, tolerance = _radii(size, drag.options)
    head = state.head.detach().requires_grad_()
    with torch.enable_grad():
        features, image = features_at(drag.generator, full_ws(drag, head), drag.features0.shape[2])
        handles = state.handles
        if state.step > 0:
            handles = track(features.detach(), drag.reference, handles, search, size)
        if bool(((drag.targets - handles).norm(dim=1) <= tolerance).all()):
            return replace(state, handles=handles, arrived=True)
        loss = motion_loss(features, handles, drag.targets, motion, size)
        if drag.fixed is not None:
            change = mask_loss(features, drag.features0, drag.fixed)
            if drag.image0 is not None and image is not None:
                change = FEATURES * change + mask_loss(image, drag.image0, drag.fixed)
            loss = loss + drag.options.mask_weight * change
        (gradient,) = torch.autograd.grad(loss, head)
    new, moments = adam(state.head, gradient, state.moments, state.step + 1, drag.options.lr)
    return DragState(new, handles, moments, state.step + 1, float(loss.detach()))


def adam(
    x: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], step: int, lr: float
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One step of Adam (Kingma & Ba 2015, algorithm 1) without hidden state; `step` counts from 1."""
    m = moments[0].lerp(gradient, 1 - BETAS[0])
    v = moments[1].lerp(gradient.square(), 1 - BETAS[1])
    m_hat, v_hat = m / (1 - BETAS[0] ** step), v / (1 - BETAS[1] ** step)
    return x - lr * m_hat / (v_hat.sqrt() + EPS), (m, v)


def drag_points(drag: Drag, state: DragState, steps: int) -> Iterator[DragState]:
    """The states of at most `steps` updates; the last one has its handles tracked.

    Where the handles do not arrive, that is the one in which they were nearest: a handle may be lost again.
    """
    nearest = None
    while state.step < steps and not state.arrived:
        before, state = state, drag_step(drag, state)
        nearest = _nearer(drag, nearest, replace(before, handles=state.handles))  # they are in the picture of before
        yield state
    if not state.arrived:
        yield _nearer(drag, nearest, locate(drag, state))


def _nearer(drag: Drag, one: DragState | None, other: DragState) -> DragState:
    """The one whose handles are nearer to their targets; of equals the first."""
    far = [float(distances(drag, s.handles).mean()) for s in (one or other, other)]
    return one if one is not None and far[0] <= far[1] else other


@torch.no_grad()
def locate(drag: Drag, state: DragState) -> DragState:
    """The same state with the handles where they are in its picture."""
    size = drag.generator.img_resolution
    _, search, tolerance = _radii(size, drag.options)
    features, _ = features_at(drag.generator, full_ws(drag, state.head), drag.features0.shape[2])
    handles = track(features, drag.reference, state.handles, search, size)
    return replace(state, handles=handles, arrived=bool((distances(drag, handles) <= tolerance).all()))


def distances(drag: Drag, handles: Tensor) -> Tensor:
    """Pixels from each handle to its target, [N]."""
    return (drag.targets - handles).norm(dim=1)


@torch.no_grad()
def picture(drag: Drag, state: DragState) -> Tensor:
    """The picture of a state, [1, C, H, W] in [-1, 1]."""
    return drag.generator.synthesis(full_ws(drag, state.head), noise_mode="const", force_fp32=True).clamp(-1, 1)


# --- pictures with points on them -------------------------------------------------------------------------------------


def mark(image: Tensor, handles: Tensor, targets: Tensor, scale: int = 1) -> Tensor:
    """A picture [C, H, W] in [-1, 1], `scale` times as large, with red handles and blue targets; [3, H', W']."""
    from PIL import Image, ImageDraw

    from ldm.util import to_pil

    side = image.shape[2] * scale
    page = to_pil(image[None])[0].convert("RGB").resize((side, image.shape[1] * scale), Image.Resampling.NEAREST)
    pen, r = ImageDraw.Draw(page), max(2, side // 80)

    def dot(p: Sequence[float], color: str) -> None:
        pen.ellipse([p[0] - r, p[1] - r, p[0] + r, p[1] + r], fill=color, outline="white")

    for handle, target in zip(handles.tolist(), targets.tolist(), strict=True):
        a, b = ([(n + 0.5) * scale for n in end] for end in (handle, target))
        pen.line([*a, *b], fill="white", width=max(1, r // 2))
        dot(b, "blue")
        dot(a, "red")
    data = torch.frombuffer(bytearray(page.tobytes()), dtype=torch.uint8).view(page.height, page.width, 3)
    return data.permute(2, 0, 1).float() / 127.5 - 1
