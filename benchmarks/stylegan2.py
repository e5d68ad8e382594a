"""StyleGAN2's training iteration and its operations: this project against the plain formulation, in one run.

The plain formulation has the same networks and weights, but one grouped convolution with weights per image for every
modulated convolution, and zero insertion and a full convolution for every resampling. Lazy regularisation is counted
with its share: an iteration is one step of each network, 1/4 path-length step and 1/16 R1 step.

    python benchmarks/stylegan2.py            # ratios: median over rounds of ours / plain, alternating
    python benchmarks/stylegan2.py --batch 16 --resolution 64 --channel-base 4096 --rounds 5
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules import gan_losses, stylegan2, stylegan2_discriminator, stylegan2_layers
from ldm.modules import stylegan2_ops as ops

G_INTERVAL, D_INTERVAL = 4, 16


# --- the plain formulation --------------------------------------------------------------------------------------------


def plain_upfirdn2d(x, f, up=1, down=1, padding=0, flip_filter=False, gain=1.0):
    """Insert zeros, pad, filter at the full resolution, drop pixels."""
    b, c, h, w = x.shape
    (ux, uy), (dx, dy) = ops._pair(up, "up"), ops._pair(down, "down")
    y = x.reshape(b, c, h, 1, w, 1)
    y = F.pad(y, [0, ux - 1, 0, 0, 0, uy - 1]).reshape(b, c, h * uy, w * ux)
    y = F.pad(y, ops._sides(padding))
    f = f if f.ndim == 2 else torch.outer(f, f)
    f = (f * gain if flip_filter else f.flip(0, 1) * gain).to(x.dtype)
    return F.conv2d(y, f[None, None].repeat(c, 1, 1, 1), groups=c)[:, :, ::dy, ::dx]


def plain_conv2d_resample(x, w, f=None, up=1, down=1, padding=0, flip_weight=True, groups=1, bias=None):
    """Filter at the higher resolution, and a strided or transposed convolution; then the bias."""
    if bias is not None:
        return plain_conv2d_resample(x, w, f, up, down, padding, flip_weight, groups) + bias[:, None, None]
    k = w.shape[2]
    left, right, *_ = ops._centred(f, (up, up), (down, down))
    left, right = left + padding, right + padding
    w = w if flip_weight else w.flip(2, 3)
    if up > 1 and k > 1:
        out, into = w.shape[0] // groups, w.shape[1]
        w = w.flip(2, 3).reshape(groups, out, into, k, k).transpose(1, 2).reshape(groups * into, out, k, k)
        x = F.conv_transpose2d(x, w, stride=up, groups=groups)
        a, b = left - (k - 1), right - (k - up)
        return plain_upfirdn2d(x, f, padding=[a, b, a, b], gain=up**2)
    if up > 1:
        return plain_upfirdn2d(F.conv2d(x, w, groups=groups), f, up=up, padding=[left, right] * 2, gain=up**2)
    if down > 1:
        if k == 1:
            return F.conv2d(plain_upfirdn2d(x, f, down=down, padding=[left, right] * 2), w, groups=groups)
        return F.conv2d(plain_upfirdn2d(x, f, padding=[left, right] * 2), w, stride=down, groups=groups)
    return F.conv2d(x, w, padding=padding, groups=groups)


def plain_modulated_conv2d(
    x,
    weight,
    styles,
    noise=None,
    up=1,
    down=1,
    padding=0,
    resample_filter=None,
    demodulate=True,
    flip_weight=True,
    fused_modconv=True,
    gain=1.0,
):
    """Weights per image, images as groups of one convolution (the formulation that the paper's authors suggest)."""
    b, c, h, w = x.shape
    per_image = weight[None] * styles[:, None, :, None, None]
    if demodulate:
        per_image = per_image * (per_image.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
    per_image = per_image.reshape(-1, *weight.shape[1:])
    y = plain_conv2d_resample(
        x.reshape(1, b * c, h, w), per_image, resample_filter, up, down, padding, flip_weight, groups=b
    )
    y = y.reshape(b, -1, *y.shape[2:]) * gain
    return y if noise is None else y + noise


def plain_bias_act(x, b=None, dim=1, act="linear", alpha=None, gain=None, clamp=None, overwrite=False):
    """One operation after the other."""
    fn, default_alpha, default_gain, _ = ops.ACTIVATIONS[act]
    x = x if b is None else x + b.view([-1 if i == dim else 1 for i in range(x.ndim)])
    x = fn(x, default_alpha if alpha is None else alpha)
    gain = default_gain if gain is None else gain
    x = x if gain == 1 else x * gain
    return x if clamp is None else x.clamp(-clamp, clamp)


def plain_upsample2d(x, f):
    return plain_upfirdn2d(x, f, up=2, padding=ops._centred(f, (2, 2), (1, 1)), gain=4)


def plain_downsample2d(x, f):
    return plain_upfirdn2d(x, f, down=2, padding=ops._centred(f, (1, 1), (2, 2)))


PLAIN = {
    "modulated_conv2d": plain_modulated_conv2d,
    "conv2d_resample": plain_conv2d_resample,
    "upsample2d": plain_upsample2d,
    "downsample2d": plain_downsample2d,
    "bias_act": plain_bias_act,
}


@contextlib.contextmanager
def formulation(plain: bool) -> Iterator[None]:
    """Inside, the networks compute by the plain operations, in PyTorch's default memory format."""
    saved = []
    modules = (stylegan2, stylegan2_layers, stylegan2_discriminator)
    for module in modules if plain else ():
        for name, fn in PLAIN.items():
            if hasattr(module, name):
                saved.append((module, name, getattr(module, name)))
                setattr(module, name, fn)
    channels_last = torch.channels_last
    if plain:
        torch.channels_last = torch.contiguous_format
    try:
        yield
    finally:
        torch.channels_last = channels_last
        for module, name, fn in saved:
            setattr(module, name, fn)


# --- one training iteration -------------------------------------------------------------------------------------------


class Training:
    """The steps of StyleGAN2's training, without data loading and logging."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        size = dict(img_resolution=args.resolution, img_channels=3, channel_base=args.channel_base, channel_max=512)
        self.G = stylegan2.Generator(512, 0, 512, **size, num_fp16_res=0, mapping_kwargs={"num_layers": 8})
        self.D = stylegan2.Discriminator(0, **size, num_fp16_res=0)
        self.average = copy.deepcopy(self.G)
        self.optimizers = [torch.optim.Adam(m.parameters(), lr=2e-3, betas=(0.0, 0.99)) for m in (self.G, self.D)]
        self.batch = args.batch
        self.real = torch.randn(args.batch, 3, args.resolution, args.resolution)
        self.path_length = gan_losses.PathLength()

    def z(self, batch: int) -> Tensor:
        return torch.randn(batch, 512)

    def ws(self, batch: int) -> Tensor:
        return stylegan2.style_mixing(self.G.mapping(self.z(batch), None), self.G.mapping(self.z(batch), None))

    def update(self, which: int, loss: Tensor) -> None:
        optimizer = self.optimizers[which]
        optimizer.zero_grad(set_to_none=True)
        loss.backward(inputs=[p for p in (self.G, self.D)[which].parameters()])
        optimizer.step()

    def generator(self) -> None:
        self.update(0, F.softplus(-self.D(self.G.synthesis(self.ws(self.batch)))).mean())
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.G.parameters()), 0.001)

    def discriminator(self) -> None:
        with torch.no_grad():
            fake = self.G.synthesis(self.ws(self.batch))
        self.update(1, F.softplus(self.D(fake)).mean() + F.softplus(-self.D(self.real)).mean())

    def path(self) -> None:
        ws = self.ws(self.batch // 2)
        self.update(0, self.path_length(self.G.synthesis(ws), ws) * 2 * G_INTERVAL)

    def r1(self) -> None:
        self.update(1, gan_losses.r1(self.D, self.real) * D_INTERVAL)

    def parts(self) -> dict[str, tuple[Callable[[], None], float]]:
        return {
            "generator": (self.generator, 1.0),
            "discriminator": (self.discriminator, 1.0),
            "path length": (self.path, 1 / G_INTERVAL),
            "R1": (self.r1, 1 / D_INTERVAL),
        }


def seconds(fn: Callable[[], None]) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def compare(fns: dict[str, Callable[[], None]], rounds: int) -> dict[str, tuple[float, float, float]]:
    """name -> (median seconds of ours, of plain, median ratio); the two alternate."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in fns}
    for i in range(rounds + 1):
        for name, fn in fns.items():
            pair = {}
            for plain in (False, True) if i % 2 else (True, False):
                with formulation(plain):
                    pair[plain] = seconds(fn)
            if i:  # the first round warms up
                times[name].append((pair[False], pair[True]))
    return {
        name: (*(statistics.median(side) for side in zip(*t, strict=True)), statistics.median(a / b for a, b in t))
        for name, t in times.items()
    }


def iteration(args: argparse.Namespace) -> None:
    training = Training(args)
    parts = training.parts()
    times = compare({name: fn for name, (fn, _) in parts.items()}, args.rounds)
    print(f"\ntraining, {args.resolution}x{args.resolution}, batch {args.batch}, channel_base {args.channel_base}")
    total = [sum(times[name][i] * share for name, (_, share) in parts.items()) for i in (0, 1)]
    times["ITERATION"] = (*total, total[0] / total[1])
    for name, (ours, plain, ratio) in times.items():
        print(f"  {name:28s} {ours * 1e3:9.1f} ms  plain {plain * 1e3:9.1f} ms  ratio {ratio:.2f}")


# --- operations -------------------------------------------------------------------------------------------------------


def operations(args: argparse.Namespace) -> None:
    """Forward and backward of each operation, at the shapes of the highest resolution."""
    r, c, b = args.resolution, args.channel_base // args.resolution, args.batch
    f = ops.setup_filter([1, 3, 3, 1])
    weight, styles, bias = torch.randn(c, c, 3, 3), torch.randn(b, c), torch.randn(c)

    def both(name: str, shape: tuple[int, ...], *others: Tensor, **options: object) -> Callable[[], None]:
        x = torch.randn(shape)
        leaves = {False: x.to(memory_format=torch.channels_last).clone().requires_grad_(), True: x.requires_grad_()}
        others = tuple(nn.Parameter(o) if o is not f else o for o in others)

        def run() -> None:
            plain = stylegan2_layers.conv2d_resample is plain_conv2d_resample
            fn = PLAIN.get(name, plain_upfirdn2d) if plain else getattr(ops, name)
            y = fn(leaves[plain], *others, **options)
            y.backward(torch.ones_like(y))

        return run

    low, high = (b, c, r // 2, r // 2), (b, c, r, r)
    fns = {
        "upfirdn2d, up 2": both("upfirdn2d", low, f, up=2, padding=[2, 1, 2, 1]),
        "upfirdn2d, down 2": both("upfirdn2d", high, f, down=2, padding=1),
        "upfirdn2d": both("upfirdn2d", high, f, padding=[2, 1, 2, 1]),
        "bias_act": both("bias_act", high, bias, act="lrelu", clamp=256),
        "conv2d_resample, down 2": both("conv2d_resample", high, weight, f=f, down=2, padding=1),
        "modulated_conv2d": both("modulated_conv2d", high, weight, styles, padding=1),
        "modulated_conv2d, up 2": both(
            "modulated_conv2d", low, weight, styles, up=2, padding=1, resample_filter=f, flip_weight=False
        ),
        "modulated_conv2d, to RGB": both("modulated_conv2d", high, torch.randn(3, c, 1, 1), styles, demodulate=False),
    }
    print(f"\noperations (forward and backward), {c} channels, {r}x{r}, batch {b}")
    for name, (ours, plain, ratio) in compare(fns, args.rounds).items():
        print(f"  {name:28s} {ours * 1e3:9.1f} ms  plain {plain * 1e3:9.1f} ms  ratio {ratio:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=64, help="of the images (64)")
    parser.add_argument("--batch", type=int, default=16, help="images per step (16)")
    parser.add_argument("--channel-base", type=int, default=4096, help="channels times resolution (4096)")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (5)")
    parser.add_argument("--threads", type=int, default=0, help="of PyTorch (its own choice)")
    parser.add_argument("--only", choices=("operations", "iteration"), help="one of the two parts")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    if args.only != "iteration":
        operations(args)
    if args.only != "operations":
        iteration(args)


if __name__ == "__main__":
    main()
