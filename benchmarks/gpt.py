"""A transformer over image tokens against transformers' GPT2LMHeadModel of equal depth, width and heads.

Generation: a grid of tokens from a start token by each side's own cache and loop. Training: forward, loss, backward and
AdamW over whole sequences. And how much a token at the end of a picture costs more than one at its beginning.

    python benchmarks/gpt.py                  (needs: pip install transformers)
    python benchmarks/gpt.py --layers 12 --width 768 --heads 12 --grid 32
    python benchmarks/gpt.py --only flatness --attention row column row conv    (DALL-E's masks, which GPT-2 has not)
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.timing import compare, report  # noqa: E402
from ldm.modules.decoding import generate  # noqa: E402
from ldm.modules.gpt import Transformer  # noqa: E402


def build(args: argparse.Namespace) -> tuple[Transformer, torch.nn.Module]:
    """Ours and GPT-2, without dropout: vocabulary, one start token, a position for each."""
    from transformers import GPT2Config, GPT2LMHeadModel

    length = args.grid**2 + 1
    ours = Transformer(args.vocabulary + 1, length, args.layers, args.heads, args.width, tie_weights=True)
    sizes = {"n_positions": length, "n_embd": args.width, "n_layer": args.layers, "n_head": args.heads}
    config = GPT2Config(
        vocab_size=args.vocabulary + 1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=args.vocabulary,
        eos_token_id=None, pad_token_id=args.vocabulary, **sizes,
    )  # fmt: skip
    return ours, GPT2LMHeadModel(config)


def generation(args: argparse.Namespace, ours: Transformer, theirs: torch.nn.Module, batch: int) -> None:
    n, start = args.grid**2, torch.full((batch, 1), args.vocabulary)
    ours.eval(), theirs.eval()

    def one() -> None:
        generate(ours, start, n, u=torch.rand(batch, n), last=args.vocabulary)

    def other() -> None:
        with torch.no_grad():
            made = theirs.generate(start, max_new_tokens=n, min_new_tokens=n, do_sample=True, top_k=0, use_cache=True)
        assert made.shape == (batch, n + 1)

    sides = {"ldm": one, "transformers": other}
    report(f"{n} tokens, batch {batch}", compare(sides, args.rounds), "ldm")


def flatness(args: argparse.Namespace) -> None:
    """Time of the last 64 tokens over that of the first 64."""
    length, masks = args.grid**2 + 1, {"attention": args.attention, "grid": [args.grid] * 2, "image_start": 1}
    ours = Transformer(args.vocabulary + 1, length, args.layers, args.heads, args.width, tie_weights=True, **masks)
    n, ratios = args.grid**2, []
    for _ in range(args.rounds):
        times: list[float] = []

        def note(i: int, tokens: Tensor, times: list[float] = times) -> None:
            times.append(time.perf_counter())

        start = torch.full((1, 1), args.vocabulary)
        generate(ours.eval(), start, n, u=torch.rand(1, n), last=args.vocabulary, callback=note)
        steps = [b - a for a, b in zip(times[:-1], times[1:], strict=True)]
        ratios.append(statistics.median(steps[-64:]) / statistics.median(steps[:64]))
    print(f"\nlast 64 tokens / first 64 tokens, batch 1: {statistics.median(ratios):.3f}")


def step(forward: Callable[[Tensor], Tensor], model: torch.nn.Module, x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def run() -> None:
        model.train()
        forward(x).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def training(args: argparse.Namespace, ours: Transformer, theirs: torch.nn.Module) -> None:
    x = torch.randint(args.vocabulary, (args.batch, args.grid**2))

    def loss(x: Tensor) -> Tensor:
        logits = ours.logits(ours.features(x[:, :-1]))
        return F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())

    sides = {"ldm": step(loss, ours, x), "transformers": step(lambda x: theirs(x, labels=x).loss, theirs, x)}
    report(f"training step, {args.batch} sequences of {x.shape[1]}", compare(sides, args.rounds), "ldm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--layers", type=int, default=8)
    add("--width", type=int, default=512)
    add("--heads", type=int, default=8)
    add("--vocabulary", type=int, default=1024)
    add("--grid", type=int, default=32, help="side of the picture in tokens (32)")
    add("--batch", type=int, default=4, help="sequences of a training step (4)")
    add("--rounds", type=int, default=5, help="measured rounds (5)")
    add("--threads", type=int, default=0, help="of PyTorch (its own choice)")
    add("--attention", nargs="+", default=["full"], help="of the layers in turn, where only flatness is measured")
    add("--only", choices=("generation", "flatness", "training"), help="one of the three parts")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    ours, theirs = build(args)
    sizes = (sum(p.numel() for p in m.parameters()) / 1e6 for m in (ours, theirs))
    print("parameters: {:.2f} M, transformers {:.2f} M".format(*sizes))
    if args.only in (None, "generation"):
        for batch in (1, 8):
            generation(args, ours, theirs, batch)
    if args.only in (None, "flatness"):
        flatness(args)
    if args.only in (None, "training"):
        training(args, ours, theirs)


if __name__ == "__main__":
    main()
