"""The page: what its buttons do, and a person's visit in a real browser."""

import asyncio
import os
import shutil

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


def test_another_picture_begins_with_a_painter_without_strokes(session, tmp_path):
    """The mask goes with the picture that it was painted on; after a mistake both stay."""
    masked = webui.replace(session, mask=torch.ones(64, 64, dtype=torch.bool))
    latent = webui.save(session)[1]
    new, picture, text, painter = webui.opened(webui.with_latent, masked, masked, latent, kept="kept")
    assert new.mask is None and text == "" and np.array_equal(painter, picture)
    assert np.array_equal(picture, webui.view(session))
    (tmp_path / "x.safetensors").write_bytes(b"")
    old, _, text, painter = webui.opened(
        webui.with_latent, masked, masked, str(tmp_path / "x.safetensors"), kept="kept"
    )
    assert old is masked and "cannot be read" in text and painter == "kept"
    # both ways to another picture are joined to the painter
    functions = webui.build([], "drag").fns.values()
    painted = {
        event for f in functions for _, event in f.targets if any(type(o).__name__ == "ImageEditor" for o in f.outputs)
    }
    assert painted == {"click", "upload"}


PICTURE = "#picture img"


async def visit(browser, url, tmp_path, loaded):
    """Picks a model, types a seed, loads, paints a mask, sets a handle and its target, drags, saves."""
    said = "document.querySelector('#said textarea, #said input').value"
    source = f"document.querySelector({PICTURE!r})?.src"

    async def changed(before):
        await browser.until(f"{source} && {source} !== {before!r}")
        return await browser.pixels(PICTURE)

    await browser.open(url)
    await browser.until("document.querySelector('#load') !== null")
    grey = await browser.until(source)
    await browser.press("#run input")
    await browser.press("#run li[data-index='1']")
    await browser.type("#seed input", "12")
    await browser.press("#load")
    seen = {"loaded": await changed(grey)}
    assert len(loaded) == 1

    await browser.press("#painting button")
    # an empty canvas has 800 pixels and is shown at 36 %; a picture of 512 in the same place at 56 %
    await browser.until("parseInt(document.querySelector('#mask .zoom-number')?.innerText) > 50")
    x, y = await browser.at("#mask canvas", 0.5, 0.5)  # the picture is in the middle, 288 pixels wide
    before = await browser.run(source)
    await browser.stroke([(x + dx, y) for dx in range(-100, 101, 10)])
    seen["masked"] = await changed(before)

    for share in (0.35, 0.65):
        before = await browser.run(source)
        await browser.click(*await browser.at(PICTURE, share, 0.5))
        seen["pointed"] = await changed(before)
    before = await browser.run(source)
    await browser.press("#start")
    await browser.until(f"{said}.startsWith('step ')")
    seen["dragged"] = await changed(before)
    await browser.press("#stop")
    await browser.press("#save")
    await browser.until(r"document.querySelector('#files').innerText.replace(/\s/g, '').includes('drag.png')")
    await browser.run("window.scrollTo(0, 0)")
    await browser.screenshot(tmp_path / "page.png")
    assert browser.errors == []
    return seen


def test_a_visit_in_a_browser(run, tmp_path, monkeypatch):
    other = shutil.copytree(run, tmp_path / "other")
    loaded, load = [], webui.load

    def spy(*args, **kwargs):
        loaded.append((args, load(*args, **kwargs)))
        return loaded[-1][1]

    monkeypatch.setattr(webui, "load", spy)
    page = webui.build([str(run), str(other)], "drag")
    _, url, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, share=False)

    async def stay():
        async with Browser(tmp_path / "profile") as browser:
            return await visit(browser, url, tmp_path, loaded)

    try:
        seen = {name: x.astype(float) for name, x in asyncio.run(stay()).items()}
    finally:
        page.close()
    ((asked, session),) = loaded
    assert asked == (str(other), 12, 0.7)
    assert np.abs(seen["loaded"] - webui.view(session)).mean() < 3  # it comes compressed
    middle, edge = (slice(250, 262), slice(150, 362)), (slice(440, 500), slice(20, 492))
    assert np.abs(seen["masked"][middle] - seen["loaded"][middle]).mean() < 3  # under the stroke it may change
    assert np.abs(seen["masked"][edge] - webui.DARK * seen["loaded"][edge]).mean() < 3  # elsewhere it is kept, and dark
    red, green, blue = seen["pointed"].transpose(2, 0, 1)
    for x, color in ((179, red), (332, blue)):  # handle and target, where they were clicked
        spot = (slice(250, 262), slice(x - 6, x + 7))
        assert color[spot].max() > 150 and (color - green)[spot].max() > 100
    assert np.abs(seen["dragged"] - seen["pointed"]).max() > 20
    shot = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"))
    assert shot.shape[1] == 1280 and shot.std() > 5
