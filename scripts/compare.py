"""Trains one run of each family within one time, measures all alike, and writes a page that compares them.

python scripts/compare.py configs/autoencoder/vae_digits.yaml configs/diffusion/ddpm_digits.yaml --budget 300
    writes report/index.html
python scripts/compare.py configs/autoencoder/kl_digits.yaml+configs/latent-diffusion/digits_class.yaml logs/<run>
    A+B: B is trained on the first stage A, in half of the time each; a run is taken as it is

What was trained or measured already is not done again when the command is given once more.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts import common  # noqa: E402

METRICS = ("fid", "kid", "prc", "dc", "diversity", "sharpness", "memorisation")
SPARE = 0.9  # share of the budget that the updates alone may take: validation and pictures take the rest


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "what", nargs="+", metavar="CONFIG|RUN|KEY=VALUE", help="what to compare; key.path=value goes to every training"
    )
    add("--budget", type=float, default=300, help="seconds of training for each (default: 300)")
    add("--steps", type=int, nargs="+", default=[10, 50, 250, 1000], help="of samplers that have steps, a row each")
    add("-n", "--n_samples", type=int, default=1000, help="drawn pictures of each (default: 1000)")
    add("--real", default=None, metavar="PLACE", help="real pictures, as in evaluate.py (default: those of each run)")
    add("--features", default=None, metavar="NAME", help="feature network, as in evaluate.py")
    add("--seed", type=int, default=23, help="of the trainings")
    add("--title", default="The families side by side")
    add("--outdir", default="report", help="runs, results and index.html (default: report)")
    return parser


# --- training ---------------------------------------------------------------------------------------------------------


def call(argv: list[str], log: Path) -> str:
    """Runs a script of the project, its output in `log` too; a failure is told with its last lines."""
    from ldm.util import UserError

    print("$ python", *argv, flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as f:
        code = subprocess.call([sys.executable, str(ROOT / argv[0]), *argv[1:]], stdout=f, stderr=subprocess.STDOUT)
    text = log.read_text(encoding="utf-8", errors="replace")
    if code:
        lines = [line for line in text.splitlines() if line.strip()]
        raise UserError(f"{' '.join(argv)} failed (exit code {code}, see {log}):\n" + "\n".join(lines[-5:]))
    return text


def names_of(what: list[str]) -> dict[str, str]:
    """What each entry is called: its config or run, with the folder before it, then a number, where two would be one.

    An entry A+B is called B.
    """
    paths = {w: Path(w.rpartition("+")[2]) for w in what}
    plain = {w: p.name.partition("_")[2] or p.name if p.is_dir() else p.stem for w, p in paths.items()}
    several = {n for n, count in Counter(plain.values()).items() if count > 1}
    names: dict[str, str] = {}
    for w, name in plain.items():
        found = f"{paths[w].parent.name}-{name}" if name in several and not paths[w].is_dir() else name
        number = next(i for i in itertools.count(1) if (found if i == 1 else f"{found}-{i}") not in names.values())
        names[w] = found if number == 1 else f"{found}-{number}"
    return names


def trained(config: str, budget: float, args: argparse.Namespace, extra: list[str], name: str) -> dict[str, Any]:
    """Trains a config for `budget` seconds, or finds what an earlier call trained under that name.

    The number of updates is set from the time of one, so that schedules come to their end; a clock stops what would
    take longer all the same.
    """
    out = Path(args.outdir)
    place, done = out / "runs" / name, out / "runs" / f"{name}.json"
    own = {"config": config, "budget": budget, "seed": args.seed, "extra": extra}
    if done.is_file() and (found := json.loads(done.read_text(encoding="utf-8"))).get("asked") == own:
        return found
    base = ["main.py", "-b", config, "-s", str(args.seed), *extra]
    said = call([*base, "--dry-run"], out / "logs" / f"{name}-dry.txt")
    steps, milliseconds = re.search(r"steps +(\d+); (\d+) ms", said).groups()
    fitting = max(1, min(int(steps), int(SPARE * budget * 1000 / max(1, int(milliseconds)))))
    limits = [f"lightning.trainer.max_steps={fitting}", "lightning.trainer.max_epochs=-1"]
    limits += [f"lightning.trainer.max_time={{seconds: {max(1, round(budget))}}}"]
    before = set(place.glob("*"))
    start = time.monotonic()
    call([*base, "-t", "--no-test", "-l", str(place), *limits], out / "logs" / f"{name}.txt")
    run = max(set(place.glob("*")) - before, key=lambda p: p.stat().st_mtime)
    found = {"asked": own, "run": str(run), "name": name, "minutes": (time.monotonic() - start) / 60}
    done.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def prepared(what: str, args: argparse.Namespace, extra: list[str], name: str) -> dict[str, Any]:
    """The run of one entry of the command line; `name` is what it is called."""
    from ldm.checkpoint import find_run, minutes_of, read

    if Path(what).is_dir():
        run, file = find_run(what)
        return {"run": str(run), "name": name, "minutes": minutes_of(read(file)), "budget": None}
    first, _, second = what.partition("+")
    if not second:
        return {**trained(first, args.budget, args, extra, name), "budget": args.budget}
    # under a name of its own: the same config may be an entry, too, which has the whole time
    stage = trained(first, args.budget / 2, args, extra, f"{name}-on-{Path(first).stem}")
    model = trained(second, args.budget / 2, args, [*extra, f"first_stage={stage['run']}"], name)
    minutes = model["minutes"] + stage["minutes"]
    return {**model, "minutes": minutes, "budget": args.budget, "first_stage": Path(first).stem}


# --- measuring --------------------------------------------------------------------------------------------------------


def measured(entry: dict[str, Any], args: argparse.Namespace, steps: int | None) -> dict[str, Any]:
    """One row: a run at one number of sampler steps."""
    from ldm.evaluation.claims import family_of

    out = Path(args.outdir)
    name = entry["name"] if steps is None else f"{entry['name']}, {steps} steps"
    file = out / "results" / f"{entry['name']}{'' if steps is None else f'-{steps}'}.json"
    argv = ["scripts/evaluate.py", "-r", entry["run"], "-n", str(args.n_samples), "--outdir", str(out / "evaluation")]
    argv += ["--json", str(file), "--metrics", *METRICS, *(["agreement"] if entry["classes"] else [])]
    for flag, value in (("--real", args.real), ("--features", args.features)):
        argv += [flag, value] if value else []
    argv += ["--set", f"steps={steps}"] if steps else []
    call(argv, out / "logs" / f"{file.stem}-evaluate.txt")
    result = json.loads(file.read_text(encoding="utf-8"))
    return {
        **{k: v for k, v in result["metrics"].items() if not isinstance(v, (list, dict))},
        **(result["sampling"]["cost"] or {}),  # none where an older evaluation was killed at its very end
        "name": name,
        "run_name": entry["name"],
        "run": entry["run"],
        "family": family_of(result["model"]),
        "steps": steps,
        "parameters": result["parameters"],
        "trained_steps": result["global_step"],
        "minutes": entry["minutes"],
        "budget": entry["budget"],
        "first_stage": entry.get("first_stage"),
        "pictures": result["drawn"]["folder"],
        "features": result["features"],
        "result": result,
    }


def rows_of(entry: dict[str, Any], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each number of steps, where the model has them."""
    from ldm.generate import knobs_of, load_run

    model, info = load_run(entry["run"])
    classes = getattr(model, "num_classes", None)
    entry["classes"] = bool(classes) and _reads_classes(info["config"], args.features, classes)
    most = getattr(model, "num_timesteps", None)
    steps = sorted({min(s, most or s) for s in args.steps}) if "steps" in knobs_of(model) else [None]
    del model
    return [measured(entry, args, s) for s in steps]


def one_data_set(data: dict[str, str | None]) -> None:
    """Checks that all were, or will be, measured on the same pictures; None: not known yet.

    Args:
        data: entry or row -> what its real pictures are.

    Raises:
        UserError: they are not the same.
    """
    from ldm.util import UserError

    if len(set(data.values()) - {None}) > 1:
        said = "; ".join(f"{name}: {what}" for name, what in data.items() if what)
        raise UserError(f"these cannot be compared, as their real pictures differ ({said}). Give one --real for all")


def one_size(what: str, extra: list[str]) -> None:
    """Checks that both stages of an entry A+B read the same pictures, as far as their configs tell.

    Raises:
        UserError: they do not.
    """
    from ldm.util import UserError

    first, _, second = what.partition("+")
    stages = [planned_data(w, extra) for w in (first, second) if w]
    if len(set(stages) - {None}) > 1:
        raise UserError(f"{what}: the first stage reads {stages[0]}, the second one {stages[1]}: give both one size")


def planned_data(what: str, extra: list[str]) -> str | None:
    """The training pictures of a config or run as far as its config tells: data set and size."""
    from omegaconf import OmegaConf

    from ldm.checkpoint import find_run, read
    from ldm.config import load_yaml
    from ldm.generate import run_config

    if Path(what).is_dir():
        run, file = find_run(what)
        config = run_config(run, read(file))
    else:
        own = [e for e in extra if e.startswith("data.")]
        config = OmegaConf.merge(load_yaml(what.rpartition("+")[2]), OmegaConf.from_dotlist(own))
        config = OmegaConf.to_container(config, resolve=False)
    params = (config.get("data") or {}).get("params") or {}
    train = params.get("train") or {}
    size = (train.get("params") or {}).get("size", params.get("size"))
    if not train.get("target") or size is None or isinstance(size, str):
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return f"{train['target']} at {height}x{width}"


def measured_data(real: dict[str, Any]) -> str:
    """The real pictures of a result, down to their pixels."""
    height, width = real["size"]
    data = f"{real.get('data', real.get('folder'))} at {height}x{width}, {real.get('split', 'all')}"
    return f"{data}, {real['channels']} channels, {real['n']} pictures, {real['sha256'][:8]}"


def _reads_classes(config: dict[str, Any], features: str | None, classes: int) -> bool:
    """Whether the features come from a classifier of the run's classes."""
    from ldm.config import load_yaml
    from ldm.evaluation.features import MODELS, shipped

    train = ((config.get("data") or {}).get("params") or {}).get("train") or {}
    name = shipped(train.get("target"))
    if name is None or features not in (None, name):
        return False
    return len(load_yaml(MODELS / "classifier" / name / "config.yaml").class_names) == classes


def compare(args: argparse.Namespace) -> None:
    from ldm.evaluation.claims import judge
    from ldm.evaluation.page import build
    from ldm.evaluation.store import write_json
    from ldm.training import quieten
    from ldm.util import UserError

    quieten()
    what = [w for w in args.what if "=" not in w]
    extra = [w for w in args.what if "=" in w]
    if not what:
        raise UserError("nothing to compare: give configs or runs")
    for w in what:
        one_size(w, extra)
    if args.real is None:
        one_data_set({w: planned_data(w, extra) for w in what})
    rows: list[dict[str, Any]] = []
    for w, name in names_of(what).items():
        rows += rows_of(prepared(w, args, extra, name), args)
        one_data_set({r["name"]: measured_data(r["result"]["real"]) for r in rows})
    page = Path(args.outdir) / "index.html"
    build(page, rows, judge(rows), title=args.title, **texts(args, rows))
    write_json(Path(args.outdir) / "rows.json", [{k: v for k, v in r.items() if k != "result"} for r in rows])
    print(page)


def texts(args: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, str]:
    """What the page says beside its figures."""
    from ldm.evaluation.metrics import commit

    features, real, first = rows[0]["features"], rows[0]["result"]["real"], rows[0]["result"]
    data = f"{real.get('data', real.get('folder'))}, {real.get('split', 'all')}"
    what = " ".join(args.what).replace(f"{ROOT}/", "")
    steps = " ".join(map(str, args.steps))
    command = f"python scripts/compare.py {what} --budget {args.budget:g} -n {args.n_samples} --steps {steps}"
    command += f" --seed {args.seed}"
    for flag, value in (("--real", args.real), ("--features", args.features)):
        command += f" {flag} {value}".replace(f"{ROOT}/", "") if value else ""
    height, width = real["size"]
    return {
        "introduction": f"{origins(rows)} {args.n_samples:,} pictures drawn from each are compared with "
        f"{real['n']:,} real ones ({data}, {height}x{width}; resized: {real['resize']}).",
        "features": f"Features: {features['name']} ({features['layer']}, {features['sha256'][:8]}).",
        "footer": f"Made by: {command}. Commit {commit()}, torch {first['versions']['torch']}, "
        f"{first['device']}, threads: {first['threads']}.",
    }


def _with_stage(row: dict[str, Any]) -> str:
    stage = row.get("first_stage")
    return row["run_name"] + (f" (half of the time for its first stage, {stage})" if stage else "")


def origins(rows: list[dict[str, Any]]) -> str:
    """Which runs were trained for this page within the budget, and which were taken as they were."""
    runs = list({r["run"]: r for r in rows}.values())
    said = []
    made, taken = ([r for r in runs if (r["budget"] is None) == t] for t in (False, True))
    if made:
        said.append(
            f"Trained for this page, within {made[0]['budget']:g} seconds each by the Trainer's clock (the table's "
            f"minutes hold the program's start and end, too): {', '.join(map(_with_stage, made))}."
        )
    if taken:
        names = ", ".join(
            r["run_name"] + (f" ({r['minutes']:.1f} minutes)" if r["minutes"] is not None else "") for r in taken
        )
        said.append(f"Taken as they were, however long they had been trained: {names}.")
    return " ".join(said)


if __name__ == "__main__":
    sys.exit(common.main(build_parser(), compare))
