"""The report of `scripts/compare.py` as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.evaluation.claims import Verdict
from ldm.util import UserError

# column: key of a row, heading, format
COLUMNS = (
    ("name", "run", "{}"),
    ("family", "family", "{}"),
    ("parameters", "parameters", "{:,}"),
    ("minutes", "training, minutes", "{:.1f}"),
    ("trained_steps", "updates", "{:,}"),
    ("seconds_per_picture", "seconds a picture", "{:.3g}"),
    ("network_calls_per_picture", "network calls a picture", "{:.0f}"),
    ("fid", "FID", "{:.3g}"),
    ("kid", "KID", "{:.3g}"),
    ("precision", "precision", "{:.2f}"),
    ("recall", "recall", "{:.2f}"),
    ("coverage", "coverage", "{:.2f}"),
    ("diversity", "diversity", "{:.2f}"),
    ("sharpness", "sharpness", "{:.2f}"),
    ("class_agreement", "class as asked for", "{:.1%}"),
    ("copies", "copies", "{:.1%}"),
    ("peak_memory_gib", "memory, GiB", "{:.2f}"),
)
COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#805ad5", "#b83280", "#4a5568", "#d69e2e", "#0bc5ea", "#e53e3e", "#1a202c")
TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; color: #1a202c; }
h1, h2, h3 { line-height: 1.2; } table { border-collapse: collapse; font-size: .85rem; }
.wide { overflow-x: auto; } th, td { padding: .35rem .6rem; border-bottom: 1px solid #cbd5e0; text-align: right; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
td.best { font-weight: bold; } img { max-width: 100%; } img.pixels { width: 100%; image-rendering: pixelated; }
.walls { display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 1.5rem; }
.verdict { font-weight: bold; } .supported { color: #276749; } .partly-supported { color: #975a16; }
.not-supported { color: #9b2c2c; } figure { margin: 0; }
footer, .note { color: #4a5568; font-size: .85rem; }
</style></head><body>
<h1>{{ title }}</h1>
<p>{{ introduction }}</p>
<h2 id="figures">Figures</h2>
<div class="wide"><table><thead><tr>{% for h in headings %}<th>{{ h }}</th>{% endfor %}</tr></thead><tbody>
{% for cells in table %}<tr>
{% for c in cells %}<td{% if c.best %} class="best"{% endif %}>{{ c.text }}</td>{% endfor %}
</tr>{% endfor %}</tbody></table></div>
<p class="note">{{ features }} Bold: the best of the column. FID, KID: lower is better. Precision: share of drawn
pictures among the real ones; recall, coverage: share of the real ones that is reached. Diversity, sharpness: 1 is that
of the data. Copies: drawn pictures that are nearly one training picture.</p>
<h2 id="time">Quality against time</h2>
<figure><img src="{{ plot }}" alt="FID against seconds a picture"></figure>
<h2 id="claims">What the lecture says</h2>
{% for v in verdicts %}<h3>{{ v.claim }}</h3>
<p><span class="verdict {{ v.verdict | replace(' ', '-') }}">{{ v.verdict | capitalize }}.</span> {{ v.why }}</p>
{% endfor %}
{% macro gallery(pictures) %}<div class="walls">
{% for name, picture in pictures %}<figure><img class="pixels" src="{{ picture }}" alt="{{ name }}">
<figcaption>{{ name }}</figcaption></figure>
{% endfor %}</div>{% endmacro %}
<h2 id="samples">Drawn pictures</h2>
{{ gallery(walls) }}
<h2 id="nearest">Nearest training pictures</h2>
<p>In pairs: a drawn picture, and the training picture that is nearest to it in its pixels. Of all drawn pictures of
a row these are the ones that come nearest to any training picture, the nearest first.</p>
{{ gallery(nearest) }}
{% if reconstructions %}<h2 id="reconstructions">Reconstructions</h2>
{{ gallery(reconstructions) }}{% endif %}
<h2 id="curves">Training</h2>
<figure><img src="{{ curves }}" alt="training curves"></figure>
<footer><p>{{ footer }}</p></footer>
</body></html>
"""


def build(
    path: Path,
    rows: Sequence[dict[str, Any]],
    verdicts: Sequence[Verdict],
    *,
    title: str,
    introduction: str,
    features: str,
    footer: str,
) -> None:
    """Writes the page.

    Args:
        rows: from `scripts/compare.py`; besides the figures `pictures` (a folder), `nearest_picture` and `run` (paths).

    Raises:
        UserError: matplotlib or jinja2 is not installed.
    """
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise UserError(f"the report needs matplotlib and jinja2: pip install -e '.[eval]' ({e})") from e
    columns = [c for c in COLUMNS if any(r.get(c[0]) is not None for r in rows)]
    html = (
        jinja2.Environment(autoescape=True)
        .from_string(TEMPLATE)
        .render(
            title=title,
            introduction=introduction,
            features=features,
            footer=footer,
            headings=[c[1] for c in columns],
            table=cells(rows, columns),
            verdicts=verdicts,
            plot=quality_plot(rows),
            walls=[(r["name"], wall(Path(r["pictures"]))) for r in rows],
            nearest=[(r["name"], embedded(Path(r["nearest_picture"]))) for r in rows if r.get("nearest_picture")],
            reconstructions=[pair for r in rows if not r.get("steps") for pair in reconstructed(r)],
            curves=training_curves(rows),
        )
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")


LOWER, HIGHER = ("fid", "kid", "seconds_per_picture"), ("precision", "recall", "coverage", "class_agreement")


def cells(rows: Sequence[dict[str, Any]], columns: Sequence[tuple[str, str, str]]) -> list[list[dict[str, Any]]]:
    """The table's cells: text, and whether the value is the best of its column."""
    top = {}
    for key in (*LOWER, *HIGHER):
        values = [r[key] for r in rows if r.get(key) is not None]
        if values:
            top[key] = min(values) if key in LOWER else max(values)

    def cell(row: dict[str, Any], key: str, form: str) -> dict[str, Any]:
        value = row.get(key)
        return {
            "text": "–" if value is None else form.format(value),
            "best": value is not None and value == top.get(key),
        }

    return [[cell(r, key, form) for key, _, form in columns] for r in rows]


# --- pictures ---------------------------------------------------------------------------------------------------------


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def embedded(path: Path) -> str:
    """A picture file, written anew without its text."""
    with Image.open(path) as picture:
        file = io.BytesIO()
        picture.convert("L" if picture.mode == "L" else "RGB").save(file, format="PNG", optimize=True)
    return data_uri(file.getvalue())


def wall(folder: Path, side: int = 8) -> str:
    """The first side x side pictures of a folder."""
    arrays = [np.asarray(Image.open(p).convert("RGB")) for p in sorted(folder.glob("*.png"))[: side * side]]
    h, w, _ = arrays[0].shape
    page = np.zeros((side * (h + 1) + 1, side * (w + 1) + 1, 3), np.uint8)
    for i, a in enumerate(arrays):
        top, left = 1 + i // side * (h + 1), 1 + i % side * (w + 1)
        page[top : top + h, left : left + w] = a
    file = io.BytesIO()
    Image.fromarray(page).save(file, format="PNG", optimize=True)
    return data_uri(file.getvalue())


def reconstructed(row: dict[str, Any]) -> list[tuple[str, str]]:
    """Inputs and reconstructions that the run logged last."""
    found = []
    for what in ("inputs", "reconstructions"):
        files = sorted((Path(row["run"]) / "images").glob(f"*/{what}_gs-*.png"))
        if files:
            found.append((f"{row['name']}: {what}", embedded(files[-1])))
    return found if len(found) == 2 else []


# --- plots ------------------------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _png(figure: Any) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return data_uri(file.getvalue())


def quality_plot(rows: Sequence[dict[str, Any]]) -> str:
    """FID against seconds a picture; rows of one run are joined. A row whose cost is unknown has no place in it."""
    rows = [r for r in rows if r.get("seconds_per_picture") is not None]
    figure = _figure(8, 4.5)
    axes = figure.subplots()
    names = list(dict.fromkeys(r["run_name"] for r in rows))
    for i, name in enumerate(names):
        path = sorted((r for r in rows if r["run_name"] == name), key=lambda r: r["seconds_per_picture"])
        x, y = [r["seconds_per_picture"] for r in path], [max(r["fid"], 1e-6) for r in path]
        axes.plot(x, y, "o-", color=COLOURS[i % len(COLOURS)], label=name)
        for r, a, b in zip(path, x, y, strict=True):
            if r.get("steps"):
                axes.annotate(f"{r['steps']}", (a, b), textcoords="offset points", xytext=(4, 4), fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="seconds a picture", ylabel="FID")
    axes.grid(True, which="both", alpha=0.25)
    if rows:
        axes.legend(fontsize=8)
    return _png(figure)


def training_curves(rows: Sequence[dict[str, Any]]) -> str:
    """What each run logged of its training losses."""
    runs = list({r["run_name"]: r["run"] for r in rows}.items())
    figure = _figure(9, 2.6 * -(-len(runs) // 3))
    grid = np.atleast_1d(figure.subplots(-(-len(runs) // 3), min(3, len(runs)), squeeze=False)).ravel()
    for axes, (name, run) in zip(grid, runs, strict=False):
        for i, (key, points) in enumerate(losses(Path(run) / "metrics.csv").items()):
            axes.plot(*zip(*points, strict=True), color=COLOURS[i % len(COLOURS)], label=key, linewidth=1)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
        if axes.has_data():
            axes.legend(fontsize=6)
    for axes in grid[len(runs) :]:
        axes.axis("off")
    return _png(figure)


def losses(path: Path, most: int = 3) -> dict[str, list[tuple[float, float]]]:
    """The first few training losses of a metrics.csv as (step, value)."""
    if not path.is_file():
        return {}
    found: dict[str, list[tuple[float, float]]] = {}
    with path.open(encoding="utf-8") as f:
        for line in csv.DictReader(f):
            for key, value in line.items():
                if key and key.startswith("train/") and "loss" in key and value:
                    found.setdefault(key, []).append((float(line["step"]), float(value)))
    return dict(list(found.items())[:most])
