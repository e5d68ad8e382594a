"""Operations of StyleGAN2 in plain PyTorch: FIR resampling, biased activations, modulated convolutions.

Karras et al. 2020, "Analyzing and improving the image quality of StyleGAN" (StyleGAN2), section 2.2 and appendix B, and
Karras et al. 2020, "Training GANs with limited data" (ADA), appendix D.1 (mixed precision). All of them are written for
channels-last activations, and all can be differentiated twice (R1 and path-length regularisation need that).

Every resampling operation here equals: extend the image by zeros to infinity, insert `up - 1` zeros behind each pixel,
filter, keep every `down`-th pixel, crop. `padding` says where the crop lies: it counts pixels of the upsampled image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = int | Sequence[int]

# name -> (function of (x, alpha), alpha, gain that keeps the variance, f(g x) == g f(x) for g > 0)
ACTIVATIONS: dict[str, tuple[Callable[[Tensor, float], Tensor], float, float, bool]] = {
    "linear": (lambda x, a: x, 1.0, 1.0, True),
    "relu": (lambda x, a: F.relu(x), 0.0, math.sqrt(2), True),
    "lrelu": (lambda x, a: F.leaky_relu(x, a), 0.2, math.sqrt(2), True),
    "tanh": (lambda x, a: torch.tanh(x), 0.0, 1.0, False),
    "sigmoid": (lambda x, a: torch.sigmoid(x), 0.0, 1.0, False),
    "elu": (lambda x, a: F.elu(x), 0.0, 1.0, False),
    "selu": (lambda x, a: F.selu(x), 0.0, 1.0, False),
    "softplus": (lambda x, a: F.softplus(x), 0.0, 1.0, False),
    "swish": (lambda x, a: F.silu(x), 0.0, math.sqrt(2), False),
}


def activation_gain(act: str) -> float:
    """The factor that follows an activation so that unit variance stays unit variance.

    Raises:
        ValueError: unknown name.
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"activation: got {act!r}, expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[act][2]


class _LeakyClamp(torch.autograd.Function):
    """Leaky ReLU, then clamp to [-limit, limit], in place.

    Only the result is kept: its sign and size tell which slope applied. The backward pass does not differentiate the
    slope, which is constant almost everywhere, so a second backward pass does not run through the activations again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float, limit: float | None) -> Tensor:
        ctx.mark_dirty(x)
        if slope != 1:
            F.leaky_relu_(x, slope)
        if limit is not None:
            x.clamp_(-limit, limit)
        ctx.save_for_backward(x)
        ctx.slope, ctx.limit = slope, limit
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        y = ctx.saved_tensors[0].detach()
        if ctx.slope != 1:
            grad = torch.ops.aten.leaky_relu_backward(grad, y, ctx.slope, True)
        if ctx.limit is not None:
            grad = torch.ops.aten.hardtanh_backward(grad, y, -ctx.limit, ctx.limit)
        return grad, None, None


def bias_act(
    x: Tensor,
    b: Tensor | None = None,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    overwrite: bool = False,
) -> Tensor:
    """clamp(gain * act(x + b)).

    Args:
        x: any shape.
        b: bias over axis `dim` of x, [x.shape[dim]].
        act: name in ACTIVATIONS.
        alpha: negative slope of "lrelu"; None for 0.2.
        gain: None for the one that keeps the variance (square root of 2 for relu, lrelu and swish, 1 otherwise).
        clamp: limit of the absolute value; None for no limit.
        overwrite: x may be changed; nobody else needs it.

    Raises:
        ValueError: unknown activation, bias of another size, negative clamp.
    """
    default_gain = activation_gain(act)
    fn, default_alpha, _, homogeneous = ACTIVATIONS[act]
    alpha = default_alpha if alpha is None else float(alpha)
    gain = default_gain if gain is None else float(gain)
    if clamp is not None and clamp < 0:
        raise ValueError(f"clamp: got {clamp}, expected at least 0 or None")
    if b is not None:
        if b.ndim != 1 or b.shape[0] != x.shape[dim]:
            raise ValueError(f"bias: got shape {list(b.shape)}, expected [{x.shape[dim]}]")
        b = b.to(x.dtype).view([-1 if i == dim % x.ndim else 1 for i in range(x.ndim)])
    if homogeneous and gain > 0 and alpha >= 0:
        if b is None and gain == 1 and alpha == 1 and clamp is None:
            return x
        if b is None:
            z = x if overwrite and gain == 1 else x * gain
        else:
            z = torch.add(b if gain == 1 else b * gain, x, alpha=gain)
        return z if alpha == 1 and clamp is None else _LeakyClamp.apply(z, alpha, clamp)
    y = fn(x if b is None else x + b, alpha)
    y = y if gain == 1 else y * gain
    return y if clamp is None else y.clamp(-clamp, clamp)


def takes_gain_early(act: str) -> bool:
    """Whether a gain may come before the activation, where a weight or a bias can hold it: f(g x) = g f(x)."""
    return ACTIVATIONS[act][3]


def normalize_2nd_moment(x: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """x divided by its root mean square over `dim`."""
    return x * (x.square().mean(dim, keepdim=True) + eps).rsqrt()


# --- FIR filters ------------------------------------------------------------------------------------------------------


def setup_filter(
    f: Tensor | Sequence[float] | Sequence[Sequence[float]] | float | None,
    normalize: bool = True,
    flip_filter: bool = False,
    gain: float = 1.0,
    separable: bool | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Filter taps -> float32 filter for `upfirdn2d`: [fh, fw], or [taps] for one that is applied along both axes.

    Args:
        f: one or two dimensions; None or a number for no filter.
        normalize: scale to a sum of 1.
        separable: keep [taps] apart; None keeps filters of eight taps and more apart, where two passes are cheaper.

    Raises:
        ValueError: more than two dimensions, no taps, or `separable` asked of a two-dimensional filter.
    """
    f = torch.atleast_1d(torch.as_tensor(1.0 if f is None else f, dtype=torch.float32, device=device))
    if f.ndim > 2 or f.numel() == 0:
        raise ValueError(f"filter: got shape {list(f.shape)}, expected [taps] or [height, width]")
    if separable and f.ndim == 2:
        raise ValueError("filter: got two dimensions, expected one where separable is True")
    if separable is None:
        separable = f.ndim == 1 and f.numel() >= 8
    if f.ndim == 1 and not separable:
        f = torch.outer(f, f)
    if normalize:
        f = f / f.sum()
    if flip_filter:
        f = f.flip(list(range(f.ndim)))
    return f * gain ** (f.ndim / 2)


def filter_size(f: Tensor | None) -> tuple[int, int]:
    """(width, height) of a filter; (1, 1) for None."""
    return (1, 1) if f is None else (f.shape[-1], f.shape[0])


def _pair(value: Pair, name: str) -> tuple[int, int]:
    x, y = (value, value) if isinstance(value, int) else value
    if min(x, y) < 1:
        raise ValueError(f"{name}: got {value}, expected at least 1")
    return x, y


def _sides(padding: Pair) -> tuple[int, int, int, int]:
    """n, [x, y] or [left, right, top, bottom] -> the latter."""
    if isinstance(padding, int):
        padding = [padding, padding]
    if len(padding) == 2:
        padding = [padding[0], padding[0], padding[1], padding[1]]
    left, right, top, bottom = padding
    return left, right, top, bottom


def upfirdn2d(
    x: Tensor,
    f: Tensor | None,
    up: Pair = 1,
    down: Pair = 1,
    padding: Pair = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """Upsample by zero insertion, pad or crop, filter, downsample: [B, C, H, W] -> [B, C, H', W'].

    H' = ceil((H * up + top + bottom - fh + 1) / down). The zeros are never made: going up is a transposed convolution
    with one filter per channel, going down a strided one.

    Args:
        f: from `setup_filter`; None for the identity.
        up, down: one number, or (x, y).
        padding: one number, (x, y) or (left, right, top, bottom), in upsampled pixels; negative numbers crop.
        flip_filter: False convolves, True correlates.
        gain: factor of the result.

    Raises:
        ValueError: x of another number of dimensions, factors below 1, nothing left to filter.
    """
    if x.ndim != 4:
        raise ValueError(f"upfirdn2d: got {x.ndim} dimensions, expected [B, C, H, W]")
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":  # no fast backward pass of a depthwise convolution there
        return upfirdn2d(x.float(), f, up, down, padding, flip_filter, gain).to(x.dtype)
    (ux, uy), (dx, dy) = _pair(up, "up"), _pair(down, "down")
    left, right, top, bottom = _sides(padding)
    f = torch.ones(1, 1, device=x.device) if f is None else f
    f = (f * gain ** (f.ndim / 2)).to(x.dtype)
    f = f if flip_filter else f.flip(list(range(f.ndim)))
    fw, fh = filter_size(f)
    if x.shape[3] * ux + left + right < fw or x.shape[2] * uy + top + bottom < fh:
        raise ValueError(f"upfirdn2d: got {list(x.shape)} with padding {padding}, expected at least the filter's size")
    if f.ndim == 2:
        return _fir(x, f, (uy, ux), (dy, dx), (left, right, top, bottom))
    x = _fir(x, f[None, :], (1, ux), (1, dx), (left, right, 0, 0))
    return _fir(x, f[:, None], (uy, 1), (dy, 1), (0, 0, top, bottom))


def _fir(x: Tensor, f: Tensor, up: tuple[int, int], down: tuple[int, int], sides: tuple[int, int, int, int]) -> Tensor:
    """Correlate with f [fh, fw] in one depthwise convolution; up and down are (y, x)."""
    left, right, top, bottom = sides
    fh, fw = f.shape
    weight = f.expand(x.shape[1], 1, fh, fw)
    if up == (1, 1):
        if left == right >= 0 and top == bottom >= 0:
            return F.conv2d(x, weight, stride=down, padding=(top, left), groups=x.shape[1])
        return F.conv2d(F.pad(x, sides), weight, stride=down, groups=x.shape[1])
    # a transposed convolution gives the full convolution: fw - 1 columns more on each side than filtering without
    # padding, but without the up - 1 zeros that would follow the last pixel
    left, right = left - (fw - 1), right - (fw - 1) + up[1] - 1
    top, bottom = top - (fh - 1), bottom - (fh - 1) + up[0] - 1
    crop = (max(0, min(-top, -bottom)), max(0, min(-left, -right)))
    x = F.conv_transpose2d(x, weight.flip(2, 3), stride=up, padding=crop, groups=x.shape[1])
    rest = (left + crop[1], right + crop[1], top + crop[0], bottom + crop[0])
    x = F.pad(x, rest) if any(rest) else x
    return x[:, :, :: down[0], :: down[1]]


def _centred(f: Tensor | None, up: tuple[int, int], down: tuple[int, int]) -> list[int]:
    """Padding (left, right, top, bottom) under which resampling by f keeps the image where it is."""
    sides = []
    for size, u, d in zip(filter_size(f), up, down, strict=True):
        before = (size + u - 1) // 2 if u > 1 else 0
        after = (size - u) // 2 if u > 1 else 0
        sides += [before + ((size - d + 1) // 2 if d > 1 else 0), after + ((size - d) // 2 if d > 1 else 0)]
    return sides


def filter2d(x: Tensor, f: Tensor, padding: Pair = 0, flip_filter: bool = False, gain: float = 1.0) -> Tensor:
    """Filter at the same resolution; `padding` is beyond what keeps the size."""
    (fw, fh), (left, right, top, bottom) = filter_size(f), _sides(padding)
    sides = [left + fw // 2, right + (fw - 1) // 2, top + fh // 2, bottom + (fh - 1) // 2]
    return upfirdn2d(x, f, padding=sides, flip_filter=flip_filter, gain=gain)


def upsample2d(
    x: Tensor, f: Tensor | None, up: Pair = 2, padding: Pair = 0, flip_filter: bool = False, gain: float = 1.0
) -> Tensor:
    """[B, C, H, W] -> [B, C, H * up, W * up], centred; the brightness is kept."""
    ux, uy = _pair(up, "up")
    sides = [a + b for a, b in zip(_sides(padding), _centred(f, (ux, uy), (1, 1)), strict=True)]
    return upfirdn2d(x, f, up=(ux, uy), padding=sides, flip_filter=flip_filter, gain=gain * ux * uy)


def downsample2d(
    x: Tensor, f: Tensor | None, down: Pair = 2, padding: Pair = 0, flip_filter: bool = False, gain: float = 1.0
) -> Tensor:
    """[B, C, H, W] -> [B, C, H / down, W / down], centred."""
    dx, dy = _pair(down, "down")
    sides = [a + b for a, b in zip(_sides(padding), _centred(f, (1, 1), (dx, dy)), strict=True)]
    return upfirdn2d(x, f, down=(dx, dy), padding=sides, flip_filter=flip_filter, gain=gain)


# --- convolutions -----------------------------------------------------------------------------------------------------


def conv2d_resample(
    x: Tensor,
    w: Tensor,
    f: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: Pair = 0,
    flip_weight: bool = True,
    flip_filter: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
    """Upsample by f, convolve by w, downsample by f; each in the order that costs least.

    Filters commute, so a 1x1 kernel works at the lower resolution, and a larger one going up works on the small image
    (as a transposed convolution) before the filter.

    Args:
        x: [B, Cin, H, W].
        w: [Cout, Cin, kh, kw].
        padding: as in `upfirdn2d`, beyond what keeps the image centred; k // 2 keeps the size.
        flip_weight: True correlates with w (what PyTorch calls a convolution), False convolves.
        bias: [Cout]; the convolution adds it where it comes last.
    """
    kh, kw = w.shape[2:]
    sides = [a + b for a, b in zip(_sides(padding), _centred(f, (up, up), (down, down)), strict=True)]
    w = w if flip_weight or kh == kw == 1 else w.flip(2, 3)  # from here on: correlate with w
    if up == 1 and down == 1:
        return _conv(x, w, sides, bias)
    if up == 1:
        one = kh == kw == 1
        x = upfirdn2d(x, f, down=down if one else 1, padding=sides, flip_filter=flip_filter)
        return F.conv2d(x, w, bias, stride=1 if one else down)
    if kh == kw == 1 and down == 1:
        x = upfirdn2d(F.conv2d(x, w), f, up=up, padding=sides, gain=up**2, flip_filter=flip_filter)
    else:  # the transposed convolution is a full one; see _fir
        full = [kw - 1, kw - up, kh - 1, kh - up]
        sides = [a - b for a, b in zip(sides, full, strict=True)]
        x = F.conv_transpose2d(x, w.flip(2, 3).transpose(0, 1), stride=up)
        x = upfirdn2d(x, f, padding=sides, gain=up**2, flip_filter=flip_filter)
        x = x if down == 1 else upfirdn2d(x, f, down=down, flip_filter=flip_filter)
    return x if bias is None else x + bias[:, None, None]


def _conv(x: Tensor, w: Tensor, sides: Sequence[int], bias: Tensor | None = None) -> Tensor:
    left, right, top, bottom = sides
    if left == right >= 0 and top == bottom >= 0:
        return F.conv2d(x, w, bias, padding=(top, left))
    return F.conv2d(F.pad(x, list(sides)), w, bias)


def modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    noise: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: Pair = 0,
    resample_filter: Tensor | None = None,
    demodulate: bool = True,
    flip_weight: bool = True,
    fused_modconv: bool = True,
    gain: float = 1.0,
) -> Tensor:
    """Convolution whose input channels are scaled by a style per image (StyleGAN2, equations 1 to 3).

    The paper's weights per image, w'_oik = s_i w_oik / sqrt(sum_ik (s_i w_oik)^2 + eps), are never made for a batch:
    the input is scaled by s, all images share one convolution, and the output is scaled by the demodulation, whose
    sums are one small matrix product, (s^2) (sum_k w^2)^T. 1x1 kernels are a batched matrix product instead.

    Args:
        x: [B, Cin, H, W].
        weight: [Cout, Cin, kh, kw].
        styles: [B, Cin].
        noise: added to the result, broadcast to [B, Cout, H', W'].
        fused_modconv: fold style and demodulation into the weights where that needs no weights per image (batch of
            one); the numbers are the same.
        gain: factor of the result before the noise.

    Raises:
        ValueError: styles that are not [B, Cin].
    """
    if styles.shape != (x.shape[0], weight.shape[1]):
        raise ValueError(f"styles: got {list(styles.shape)}, expected {[x.shape[0], weight.shape[1]]}")
    if x.dtype == torch.float16 and demodulate:
        # demodulation cancels any scale, so choose those that cannot overflow (ADA, appendix D.1)
        largest = weight.abs().amax((1, 2, 3), keepdim=True)
        weight = weight * (1 / math.sqrt(weight[0].numel()) / largest)
        styles = styles / styles.abs().amax(1, keepdim=True)
    demod = None
    if demodulate:
        power = weight.square().sum((2, 3))  # [Cout, Cin]
        demod = (styles.square() @ power.t() + 1e-8).rsqrt() * gain  # [B, Cout]
    elif gain != 1:
        styles = styles * gain
    resample = dict(f=resample_filter, up=up, down=down, padding=padding, flip_weight=flip_weight)
    if weight.shape[2:] == (1, 1) and up == down == 1 and _sides(padding) == (0, 0, 0, 0):
        y = _modulated_1x1(x, weight[:, :, 0, 0], styles, demod)
    elif fused_modconv and x.shape[0] == 1:
        w = weight * styles[0].view(1, -1, 1, 1)
        w = w if demod is None else w * demod[0].view(-1, 1, 1, 1)
        y = conv2d_resample(x, w.to(x.dtype), **resample)
    else:
        y = conv2d_resample(x * styles.to(x.dtype)[:, :, None, None], weight.to(x.dtype), **resample)
        y = y if demod is None else y * demod.to(x.dtype)[:, :, None, None]
    return y if noise is None else y.add_(noise.to(x.dtype))


def _modulated_1x1(x: Tensor, weight: Tensor, styles: Tensor, demod: Tensor | None) -> Tensor:
    b, c, h, w = x.shape
    per_image = weight.t() * styles[:, :, None]  # [B, Cin, Cout]
    per_image = per_image if demod is None else per_image * demod[:, None, :]
    y = torch.bmm(x.permute(0, 2, 3, 1).reshape(b, h * w, c), per_image.to(x.dtype))  # free of copies if channels-last
    return y.view(b, h, w, -1).permute(0, 3, 1, 2)
