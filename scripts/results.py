"""Writes the results table of README.md from the files in results/, one JSON file a row.

python scripts/results.py            (`make results` does the same)
python scripts/results.py --check    exit code 2 if the table is another one
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts import common  # noqa: E402

BEGIN, END = "<!-- results: written by `make results` from results/*.json -->", "<!-- end of results -->"
KEYS: dict[str, type | tuple[type, ...]] = {
    "family": str,
    "config": str,
    "command": str,
    "metric": str,
    "value": (int, float),
    "n": int,
    "minutes": (int, float),
    "commit": str,
}
CORES = "cores"  # optional: of the training, where there were not two
NUMBERS = {"minutes": float, "cores": int}
# metric -> how its value is said; {n} is the number of pictures it was measured on
SENTENCES = {
    "class_agreement": "{value:.1%} of {n:,} drawn pictures are read as the class asked for",
    "acc1": "{value:.1%} of {n:,} test pictures are right",
    "top1": "{value:.1%} of {n:,} test pictures are right",
    "caption_fidelity": "{value:.1%} of {n:,} captions give the drawing they name",
    "elbo": "ELBO of {n:,} test pictures: {value:.1f} nats",
    "fid": "FID of {n:,} drawn pictures, in the features of the data set's classifier: {value:.2f}",
    "psnr": "PSNR of {n:,} reconstructions: {value:.1f} dB",
    "miou": "mean IoU of {n:,} test pictures: {value:.1%}",
}
OTHER = "{metric} of {n:,} pictures: {value:.4g}"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="results.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--check", action="store_true", help="change nothing, say whether the table is up to date")
    parser.add_argument("--results", default=str(ROOT / "results"), help="folder of the JSON files")
    parser.add_argument("--page", default=str(ROOT / "README.md"), help="the page that holds the table")
    return parser


def read_row(path: Path) -> dict[str, Any]:
    """One result.

    Raises:
        UserError: no JSON, or a key that is missing, unknown or of another type.
    """
    from ldm.util import UserError, suggest

    try:
        row = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{path} is not valid JSON: {e}") from e
    if not isinstance(row, dict):
        raise UserError(f"{path} must be an object with the keys {', '.join(KEYS)}, got {type(row).__name__}")
    for key in row:
        if key not in (*KEYS, CORES):
            raise UserError(f"{path}: unknown key {key}{suggest(key, KEYS)}; expected {', '.join(KEYS)}")
    for key, kind in KEYS.items():
        if not isinstance(row.get(key), kind):
            raise UserError(f"{path}: key {key} must be {kind}, got {row.get(key)!r}")
    if row.setdefault(CORES, 2) not in (1, 2):
        raise UserError(f"{path}: key {CORES} must be 1 or 2, got {row[CORES]!r}")
    return row


# --- a row from a run -------------------------------------------------------------------------------------------------


def facts(words: list[str]) -> tuple[Path, dict[str, Any]]:
    """["results/a.json", "commit=1a2b3c4", ...] -> (the file, what is given of its row).

    Raises:
        UserError: a key that is measured, or that a row does not have; a value that is no number where one must be.
    """
    from ldm.util import UserError, suggest

    path, given = Path(words[0]), {}
    known = [k for k in (*KEYS, CORES) if k not in ("metric", "value", "n")]
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if not equals or key not in known:
            raise UserError(f"--row {word}: expected KEY=VALUE of {', '.join(known)}{suggest(key, known)}")
        try:
            given[key] = NUMBERS.get(key, str)(value)
        except ValueError as e:
            raise UserError(f"--row {word}: expected a number") from e
    return path, given


def write_row(words: list[str], metric: str, value: float, n: int, training: dict[str, Any], model: str) -> Path:
    """Writes a file of results/ from a measured run.

    Args:
        words: from the command line, see `facts`; they stand above what the run says.
        training: from the result: "command", "config", "commit", "cores", "device", "minutes".
        model: dotted path of the recipe, whose family is named where neither `words` nor the file that is there does.

    Raises:
        UserError: the run does not say all of it, was not trained on the CPU, or by a command that holds a path of this
            machine.
    """
    from ldm.evaluation.claims import family_of
    from ldm.evaluation.store import write_json
    from ldm.util import UserError

    path, given = facts(words)
    if training.get("device", "cpu") != "cpu":
        raise UserError(f"--row {path}: trained on {training['device']}, and the table is of two cores of a CPU")
    old = {"family": read_row(path)["family"]} if path.is_file() else {}
    said = {k: training[k] for k in ("config", "command", "commit", CORES) if training.get(k) is not None}
    if training.get("minutes") is not None:
        said["minutes"] = round(training["minutes"], 1)
    row = {"family": family_of(model), **old, **said, **given}
    row |= {"metric": metric, "value": float(f"{value:.4g}"), "n": n}
    missing = [k for k in (*KEYS, CORES) if k not in row]
    if missing:
        hints = " ".join(f"{k}=..." for k in missing)
        raise UserError(f"--row {path}: the run's checkpoint does not say its {', '.join(missing)}: add {hints}")
    if row[CORES] not in (1, 2):
        raise UserError(f"--row {path}: trained on {row[CORES]} cores, and the table is of two at most")
    away = [w for w in row["command"].split() if any(part.startswith("/") for part in w.split("="))]
    if away or Path(row["config"]).is_absolute():
        raise UserError(f"--row {path}: {' '.join(away) or row['config']} is on this machine only: add command=...")
    write_json(path, {k: row[k] for k in KEYS} | ({CORES: 1} if row[CORES] == 1 else {}))
    return path


# --- the table --------------------------------------------------------------------------------------------------------


def line(row: dict[str, Any]) -> str:
    """The table row of one result."""
    measured = SENTENCES.get(row["metric"], OTHER).format(**row).replace("%", " %")
    name = Path(row["config"]).stem
    cells = (row["family"], f"[{name}]({row['config']})", f"`{row['command']}`", measured)
    minutes = f"{row['minutes']:g}" + (", on one" if row[CORES] == 1 else "")
    return "| " + " | ".join((*cells, minutes, row["commit"])) + " |"


def table(folder: Path) -> str:
    """The whole table in Markdown, sorted by family and config."""
    rows = sorted(map(read_row, folder.glob("*.json")), key=lambda r: (r["family"], r["config"]))
    head = ["| family | config | command | measured | minutes on two cores | commit |", "|---|---|---|---|---|---|"]
    return "\n".join([*head, *map(line, rows)])


def write(args: argparse.Namespace) -> None:
    from ldm.util import UserError

    page = Path(args.page)
    old = page.read_text(encoding="utf-8")
    if BEGIN not in old or END not in old:
        raise UserError(f"{page} has no place for the table: expected the lines {BEGIN} and {END}")
    before, _, rest = old.partition(BEGIN)
    new = f"{before}{BEGIN}\n\n{table(Path(args.results))}\n\n{END}{rest.partition(END)[2]}"
    if args.check and new != old:
        raise UserError(f"the results table of {page} is not that of {args.results}/*.json: run make results")
    if new != old:
        page.write_text(new, encoding="utf-8")
    print(f"{page}: {'written' if new != old else 'up to date'}")


if __name__ == "__main__":
    sys.exit(common.main(build_parser(), write))
