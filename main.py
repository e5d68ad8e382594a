"""Trains and tests any model of this project from YAML.

python main.py -t -b configs/diffusion/ddpm_digits.yaml
python main.py -t -b a.yaml b.yaml model.params.x=1 --max_steps 1000 -l logs
python main.py -t -r logs/<run>
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any


def str2bool(value: str | bool) -> bool:
    if isinstance(value, bool):
        return value
    if value.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if value.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got {value!r} (is a -b missing before it?)")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="main.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Further arguments: key.path=value changes one value of the YAML; --max_steps 100, --devices 2,\n"
        "--precision bf16-mixed, ... go to lightning.trainer. Examples: configs/; explanations: docs/.",
        allow_abbrev=False,
    )
    switch: dict[str, Any] = {"type": str2bool, "nargs": "?", "const": True, "default": False, "metavar": "BOOL"}
    add = parser.add_argument
    add("-b", "--base", nargs="*", default=[], metavar="YAML", help="config files, merged from left to right")
    add("-t", "--train", help="train (without it: test only)", **switch)
    add(
        "-r",
        "--resume",
        nargs="?",
        const="",
        default="",
        metavar="RUN",
        help="go on with a run directory or checkpoint",
    )
    add("-l", "--logdir", default="logs", help="folder of the run directories (default: logs)")
    add("-n", "--name", nargs="?", const="", default="", help="suffix of the run's name (default: first config's name)")
    add("-f", "--postfix", default="", help="added to the end of the run's name")
    add("-p", "--project", default=None, help="project name for the logger (wandb)")
    add("-s", "--seed", type=int, default=23, help="seed of everything (default: 23)")
    add("-d", "--debug", help="debugger at an error; the run goes to <logdir>/debug_runs", **switch)
    add("--no-test", help="do not test after training", **switch)
    add("--scale_lr", help="scale model.base_learning_rate as the official code does", **{**switch, "default": True})
    add("--init-from", metavar="FILE", help="start from these weights with a fresh optimiser (step 0)")
    add("--allow-partial", action="store_true", help="with --init-from: take the tensors that fit, say what is left")
    add("--allow-head", action="store_true", help="model.params.allow_head=true: weights of another number of classes")
    add("--wandb", help="log to Weights & Biases too", **switch)
    add("--trust", nargs="+", default=[], metavar="PACKAGE", help="let target: name classes of these packages")
    add("--dry-run", action="store_true", help="build everything, run one batch, print memory, steps and ETA, stop")
    add("--print-config", action="store_true", help="print the merged config with each value's source, stop")
    return parser


def take_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """(the other arguments, the `key.path=value` items), wherever the items stand: `-b`, `--trust` and switches such as
    `--no-test` would take them for their own values.
    """
    one_value = {o for a in build_parser()._actions if a.nargs is None or a.const == "" for o in a.option_strings}
    rest: list[str] = []
    overrides: list[str] = []
    for item in argv:
        key, equals, _ = item.partition("=")
        is_key = bool(equals) and key.replace(".", "").replace("_", "").replace("-", "").isalnum() and item[0] != "-"
        (overrides if is_key and not (rest and rest[-1] in one_value) else rest).append(item)
    return rest, overrides


def run(argv: list[str] | None = None) -> None:
    """Parses the command line and does what it says."""
    argv = sys.argv[1:] if argv is None else argv
    rest, overrides = take_overrides(argv)
    args, extra = build_parser().parse_known_args(rest)
    args.argv = argv
    if not (args.base or args.resume):
        from ldm.util import UserError

        build_parser().print_usage(sys.stderr)
        raise UserError("no config given: -b configs/<family>/<name>.yaml, or -r logs/<run> to go on with a run")
    from ldm import training

    training.start(args, [*extra, *overrides])


def out_of_memory() -> str:
    """What a user can do about it; the last checkpoint is whole."""
    import torch

    from ldm.callbacks import peak_memory_mib

    peak = peak_memory_mib(torch.device("cuda" if torch.cuda.is_available() else "cpu")) / 1024
    return (
        f"out of memory (peak {peak:.1f} GiB). Lower data.params.batch_size and raise --accumulate_grad_batches by as "
        "much; lower data.params.size; or set --precision bf16-mixed, and use_checkpoint: true in the U-Net's params. "
        "--dry-run tries a setting in three steps, -r logs/<run> goes on from the last checkpoint"
    )


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 the machine's fault, 2 the user's, 128 + n stopped by signal n."""
    try:
        run(argv)
    except KeyboardInterrupt:
        return 130
    except Exception as e:
        from ldm.util import is_out_of_memory, message_of

        code, message = getattr(e, "exit_code", None), message_of(e)
        if code is None and message != str(e).strip():  # the user's fault, raised in a process that loads data
            code = 2
        if code is None and is_out_of_memory(e):
            code, message = 1, out_of_memory()
        if code is None:
            raise
        print(f"error: {message}" if code < 128 else message, file=sys.stderr)
        return code
    return 0


if __name__ == "__main__":
    # run directories, configs and data are looked for where the user is, modules beside this file
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    from ldm.memory import keep_freed_memory

    keep_freed_memory()
    sys.exit(main())
