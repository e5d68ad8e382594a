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
# metric -> how its value is said; {n} is the number of pictures it was measured on
SENTENCES = {
    "class_agreement": "{value:.1%} of {n:,} drawn pictures are read as the class asked for",
    "acc1": "{value:.1%} of {n:,} test pictures are right",
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
