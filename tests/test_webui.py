"""The page: what its buttons do, and a person's visit in a real browser."""

import asyncio
import os

import numpy as np
import pytest
import torch
from PIL import Image

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

from ldm import webui  # noqa: E402
from ldm.util import UserError  # noqa: E402
from tests.chromium import Browser  # noqa: E402
from tests.cli.gan_runs import stylegan_run  # noqa: E402


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.set_num_threads(1)
    return stylegan_run(tmp_path_factory.mktemp("logs"), "data.params.size=64")


@pytest.fixture
def session(run):
    return webui.load(str(run), 3, 0.7)


def clicked(session, *points):
    """Clicks on pixels of the model's picture."""
    scale = webui.SIDE / session.size
    for x, y in points:
        session = webui.add_point(session, (x + 0.5) * scale - 0.5, (y + 0.5) * scale - 0.5)
    return session


def test_runs_are_found(run, tmp_path):
    (tmp_path / "x.pkl").write_bytes(b"")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.yaml").write_text("model: {target: ldm.models.vae.VAE}")
    assert webui.models_in([run.parent, tmp_path, tmp_path / "none"]) == [str(tmp_path / "x.pkl"), str(run)]


def test_clicks_are_handles_and_targets(session):
    session = clicked(session, (10, 20), (30, 20), (5, 6))
    assert np.allclose(session.points, [(10, 20), (30, 20), (5, 6)])
    handles, targets = session.pairs
    assert torch.allclose(torch.cat([handles, targets]), torch.tensor([[10.0, 20.0], [30.0, 20.0]]))
    assert webui.without_points(session).points == []


def test_the_view_shows_points_and_mask(session):
    plain = webui.view(session)
    assert plain.shape == (512, 512, 3)
    marked = webui.view(clicked(session, (10, 20), (30, 20)))
    assert marked[164, 84].tolist() == [255, 0, 0] and marked[164, 244].tolist() == [0, 0, 255]
    layer = np.zeros((512, 512, 4), np.uint8)
    layer[:, :256, 3] = 255
    masked = webui.with_mask(session, {"layers": [layer]})
    assert masked.mask[:, :32].all() and not masked.mask[:, 32:].any()
    dark = webui.view(masked)
    assert np.array_equal(dark[:, :256], plain[:, :256]) and (dark[:, 256:] <= plain[:, 256:]).all()
    assert webui.with_mask(masked, {"layers": []}).mask is None
    assert webui.view(None).shape == (512, 512, 3)


def test_dragging_moves_picture_and_handles_and_can_be_undone(session):
    states = list(webui.dragging(clicked(session, (10, 20), (30, 20)), 3, 0.05, 20))
    last, text = states[-1]
    assert text.startswith("step 3: ") and "pixels to go" in text
    assert not torch.equal(last.latent.ws, session.latent.ws)
    assert np.allclose(last.points[1], (30, 20))
    back = webui.as_before(last)
    assert torch.equal(back.latent.ws, session.latent.ws) and back.points == []


def test_saved_latents_are_opened_again(session):
    picture, latent = webui.save(session)
    assert Image.open(picture).size == (64, 64)
    assert torch.equal(webui.with_latent(session, latent).latent.ws, session.latent.ws)


def test_faults_are_lines_on_the_page(session, tmp_path):
    for function, args, text in (
        (webui.load, ("", 0, 0.7), "no model yet"),
        (webui.add_point, (None, 1, 1), "no model yet"),
        (webui.load, (str(tmp_path / "none"), 0, 0.7), "does not exist"),
    ):
        assert text in webui.told(function, session, *args)[2]
        assert webui.told(function, session, *args)[0] is session
    assert "click a handle" in list(webui.run_drag(session, 3, 0.01, 20))[-1][2]
    same = clicked(session, (10, 20), (10, 20))
    assert "is at its target already" in list(webui.run_drag(same, 3, 0.01, 20))[-1][2]
    with pytest.raises(UserError, match="--tab dragg: expected one of drag"):
        webui.build([], "dragg")


def test_a_visit_in_a_browser(run, tmp_path):
    """Load a picture, click a handle and its target, press start, see the picture move, save it."""
    page = webui.build([str(run)], "drag")
    _, url, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, share=False)
    said = "document.querySelector('#said textarea, #said input').value"
    picture = "document.querySelector('#picture img')?.src"

    async def visit():
        async with Browser(tmp_path / "profile") as browser:
            await browser.open(url)
            await browser.until("document.querySelector('#load') !== null")
            grey = await browser.until(picture)
            await browser.press("#load")
            loaded = await browser.until(f"{picture} !== {grey!r} && {picture}")
            for share in (0.3, 0.7):
                before = await browser.run(picture)
                await browser.click(*await browser.at("#picture img", share, 0.5))
                await browser.until(f"{picture} !== {before!r}")
            pointed = await browser.run(picture)
            await browser.press("#start")
            await browser.until(f"{said}.startsWith('step ')")
            await browser.until(f"{picture} !== {pointed!r} && {picture} !== {loaded!r}")
            await browser.press("#stop")
            await browser.press("#save")
            await browser.until(r"document.querySelector('#files').innerText.replace(/\s/g, '').includes('drag.png')")
            await browser.run("window.scrollTo(0, 0)")
            await browser.screenshot(tmp_path / "page.png")
            return browser.errors

    try:
        assert asyncio.run(visit()) == []
    finally:
        page.close()
    shot = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"))
    assert shot.shape[1] == 1280 and shot.std() > 5
