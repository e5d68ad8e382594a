"""The page that compares families: verdicts by the figures, and a page that a browser shows whole."""

import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from ldm.evaluation import claims, page
from ldm.evaluation.claims import NOT, SUPPORTED, UNKNOWN


def row(family, fid, seconds=0.01, sharpness=1.0, recall=0.5, diversity=1.0, steps=None, name=None):
    name = name or family
    return {
        "family": family,
        "name": name if steps is None else f"{name}, {steps} steps",
        "run_name": name,
        "fid": fid,
        "seconds_per_picture": seconds,
        "sharpness": sharpness,
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
    row("GAN", 4, 0.002, sharpness=1.0, recall=0.2, diversity=0.6),
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
    assert "8 at 10 steps" in by_claim["Diffusion: N steps, which buy quality with time"].why


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
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    assert browser, "this test needs a browser: apt-get install chromium"
    index.write_text(index.read_text().replace("</body>", PROBE + "</body>"))
    shot = tmp_path / "shot.png"
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path / 'u'}",
    ]
    flags += ["--window-size=1000,3000", "--virtual-time-budget=5000", "--run-all-compositor-stages-before-draw"]
    done = subprocess.run([browser, *flags, "--dump-dom", index.as_uri()], capture_output=True, text=True, timeout=120)
    assert re.search(r"<title>14 pictures, 0 broken, 4 rows, wide false</title>", done.stdout), done.stderr[-2000:]
    subprocess.run([browser, *flags, f"--screenshot={shot}", index.as_uri()], capture_output=True, timeout=120)
    pixels = np.asarray(Image.open(shot).convert("L"))
    assert pixels.shape == (3000, 1000) and (pixels[:1500] < 128).mean() > 0.02  # text and pictures, no empty page
