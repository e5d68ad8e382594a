"""The page that compares families: verdicts by the figures, and a page that a browser shows whole."""

import re
import subprocess

import numpy as np
import pytest
from PIL import Image

from ldm.evaluation import claims, page
from ldm.evaluation.claims import NOT, OPEN, PARTLY, SUPPORTED, UNKNOWN
from tests.chromium import program
from tests.cli.tools import ROOT


def row(family, fid, seconds=0.01, sharpness=1.0, recall=0.5, diversity=1.0, precision=0.5, steps=None, name=None):
    name = name or family
    return {
        "family": family,
        "name": name if steps is None else f"{name}, {steps} steps",
        "run_name": name,
        "fid": fid,
        "seconds_per_picture": seconds,
        "sharpness": sharpness,
        "precision": precision,
        "recall": recall,
        "diversity": diversity,
        "steps": steps,
    }


PROBE = """<script>addEventListener("load", () => {
const broken = [...document.images].filter(i => !i.naturalWidth).length;
const rows = document.querySelectorAll("tbody tr").length;
document.title = `${document.images.length} pictures, ${broken} broken, ${rows} rows, ` +
  `wide ${document.body.scrollWidth > innerWidth}`; })</script>"""
LECTURE = [
    row("VAE", 9, 0.001, sharpness=0.7, recall=0.6, diversity=0.9),
    row("GAN", 4, 0.002, sharpness=1.0, recall=0.2, diversity=0.6, precision=0.8),
    row("diffusion", 8, 0.1, steps=10, recall=0.7, name="ddpm"),
    row("diffusion", 2, 1.0, steps=100, recall=0.7, name="ddpm"),
]
OPPOSITE = [
    row("VAE", 3, 0.001, sharpness=1.2, recall=0.1, diversity=0.4),
    row("GAN", 14, 2.0, sharpness=1.0, recall=0.9, diversity=1.0),
    row("diffusion", 5, 0.1, steps=10, name="ddpm"),
    row("diffusion", 6, 1.0, steps=100, name="ddpm"),
]


@pytest.mark.smoke
def test_the_lecture_s_world_supports_every_claim_and_its_opposite_none():
    assert [v.verdict for v in claims.judge(LECTURE)] == [SUPPORTED] * 6
    assert [v.verdict for v in claims.judge(OPPOSITE)] == [NOT] * 6


@pytest.mark.smoke
def test_a_verdict_names_the_figures():
    by_claim = {v.claim: v for v in claims.judge(LECTURE)}
    assert "0.70 (VAE), 1.00 (GAN)" in by_claim["VAE: blurrier than GAN and diffusion"].why
    assert "500 times as long" in by_claim["GAN: fast sampling"].why
    slow = claims.judge([r | {"seconds_per_picture": 4.5} if r["family"] == "diffusion" else r for r in LECTURE])
    assert "2,250 times as long" in next(v.why for v in slow if v.claim == "GAN: fast sampling")
    assert "8 at 10 steps" in by_claim["Diffusion: N steps, which buy quality with time"].why


def verdicts(rows):
    return {v.claim: v for v in claims.judge(rows)}


def test_a_claim_about_gans_is_held_against_every_one_of_them():
    """A second GAN with a worse FID, imprecise and diverse: the best row alone would hide it."""
    poor = row("GAN", 12, 0.5, sharpness=0.6, recall=0.9, diversity=1.1, precision=0.4, name="poor")
    found = verdicts([*LECTURE, poor])
    for claim in ("GAN: high quality", "GAN: mode collapse", "VAE: blurrier than GAN and diffusion"):
        assert found[claim].verdict == PARTLY, claim
        assert "(GAN)" in found[claim].why and "(poor)" in found[claim].why
    assert "4 and 0.80 (GAN), 12 and 0.40 (poor), against 9 and 0.50 (VAE). So of 1 of 2." in (
        found["GAN: high quality"].why
    )
    fast = found["GAN: fast sampling"]
    assert fast.verdict == SUPPORTED and "500 times as long as one of GAN, 2 times as long as one of poor" in fast.why
    assert "12 (poor)" in found["Diffusion: best quality"].why


def test_high_quality_needs_precision_too():
    blurred = [{**r, "precision": 0.1} if r["family"] == "GAN" else r for r in LECTURE]
    assert verdicts(blurred)["GAN: high quality"].verdict == NOT


def test_the_recall_of_scattered_pictures_says_nothing_of_modes():
    scattered = [{**r, "precision": 0.1, "recall": 0.9} if r["family"] == "GAN" else r for r in LECTURE]
    found = verdicts(scattered)["GAN: mode collapse"]
    assert found.verdict == OPEN and "Of GAN it cannot be told" in found.why
    collapsed = row("GAN", 5, recall=0.1, diversity=0.3, name="collapsed")
    found = verdicts([*scattered, collapsed])["GAN: mode collapse"]
    assert found.verdict == PARTLY and "So of 1 of 2" in found.why


def test_a_row_without_its_cost_is_judged_by_what_it_has():
    unknown = [{**r, "seconds_per_picture": None} if r["family"] == "GAN" else r for r in LECTURE]
    found = verdicts(unknown)
    assert found["GAN: fast sampling"].verdict == UNKNOWN and found["GAN: high quality"].verdict == SUPPORTED
    table = page.cells(unknown, page.COLUMNS)
    assert [c["text"] for c in table[1]][5] == "–" and page.quality_plot(unknown).startswith("data:image/png")
    assert page.quality_plot(unknown[1:2]).startswith("data:image/png")  # no row has one


@pytest.mark.smoke
def test_what_is_not_there_is_not_judged():
    found = {v.claim: v for v in claims.judge(LECTURE[:1])}
    assert all(v.verdict == UNKNOWN for v in found.values())
    assert found["GAN: high quality"].why == "No GAN here."
    one = claims.judge(LECTURE[2:3])[-1]
    assert one.verdict == UNKNOWN and "two numbers of steps" in one.why


def test_families_of_recipes():
    assert claims.family_of("ldm.models.vae.VAE") == "VAE"
    assert claims.family_of("ldm.models.diffusion.ddpm.DDPM") == "diffusion"
    assert claims.family_of("ldm.models.diffusion.latent_diffusion.LatentDiffusion") == "latent diffusion"
    assert claims.family_of("mine.Own") == "Own"


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def index(tmp_path):
    """A page of four rows with real files behind them."""
    rng, rows = np.random.default_rng(0), []
    for i, r in enumerate(LECTURE):
        run = tmp_path / f"run{i}"
        (run / "images/val").mkdir(parents=True)
        for j in range(70):
            Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).save(run / f"{j:08}.png")
        for what in ("inputs", "reconstructions"):
            Image.fromarray(rng.integers(0, 256, (40, 80), dtype=np.uint8)).save(
                run / f"images/val/{what}_gs-000001.png"
            )
        (run / "metrics.csv").write_text("step,train/loss,val/loss\n1,3.0,\n2,2.0,\n,,1.0\n")
        rows.append({**r, "run": str(run), "pictures": str(run), "nearest_picture": str(run / "00000000.png")})
    path = tmp_path / "report/index.html"
    words = {"title": "A & B", "introduction": "Four <runs>.", "features": "Features: none.", "footer": "Made here."}
    page.build(path, rows, claims.judge(rows), **words)
    return path


def test_the_page_needs_nothing_beside_it(index):
    html = index.read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', html)
    assert len(sources) >= 4 + 4 + 2 and all(s.startswith("data:image/png;base64,") for s in sources)
    assert "A &amp; B" in html and "Four &lt;runs&gt;." in html  # names of runs cannot break the page
    assert "http" not in re.sub(r"data:[^\"]*", "", html)
    assert html.count('class="best"') >= 2 and len(html) < 2e6
    for verdict in claims.judge(LECTURE):
        assert verdict.claim in html


def test_a_browser_shows_every_picture(index, tmp_path):
    counts, pixels = seen(index, tmp_path)
    assert counts == (14, 0, 4, "false")
    assert (pixels[:1500] < 128).mean() > 0.02  # text and pictures, no empty page


@pytest.mark.parametrize("page", ["index.html", "cifar10.html"])
def test_a_browser_shows_the_page_of_the_repository(page, tmp_path):
    """docs/report: whole, with a row and a wall for every run, and small enough for a repository."""
    committed = ROOT / "docs/report" / page
    copy = tmp_path / "index.html"
    copy.write_text(committed.read_text(encoding="utf-8"), encoding="utf-8")
    (pictures, broken, rows, wide), pixels = seen(copy, tmp_path)
    assert rows >= 8 and pictures >= 2 * rows + 2 and broken == 0 and wide == "false"
    assert (pixels[:1500] < 128).mean() > 0.01
    html = re.sub(r"data:image[^\"]*", "", committed.read_text(encoding="utf-8"))
    assert not re.findall(r"(?:src|href)=[\"']?http", html)
    for claim, *_ in claims.CLAIMS:
        assert claim in html
    assert sum(p.stat().st_size for p in committed.parent.rglob("*") if p.is_file()) <= 6e6


def seen(index, tmp_path):
    """((pictures, broken ones, rows, whether it is wider than the window), grey levels) of a page in a browser."""
    index.write_text(index.read_text(encoding="utf-8").replace("</body>", PROBE + "</body>"), encoding="utf-8")
    shot = tmp_path / "shot.png"
    browser = program()
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path / 'u'}",
    ]
    flags += ["--window-size=1000,3000", "--virtual-time-budget=5000", "--run-all-compositor-stages-before-draw"]
    done = subprocess.run([browser, *flags, "--dump-dom", index.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r"<title>(\d+) pictures, (\d+) broken, (\d+) rows, wide (\w+)</title>", done.stdout)
    assert found, done.stderr[-2000:]
    subprocess.run([browser, *flags, f"--screenshot={shot}", index.as_uri()], capture_output=True, timeout=120)
    pixels = np.asarray(Image.open(shot).convert("L"))
    assert pixels.shape == (3000, 1000)
    return (*map(int, found.groups()[:3]), found[4]), pixels
