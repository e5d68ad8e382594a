"""The web page: a tab to drag points of a picture with the mouse.

What a tab does is in functions of plain values, so that it is tested without a browser; `build` only joins them to
gradio's widgets.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm import editing, generate, latents
from ldm.util import UserError, to_uint8

SIDE = 512  # pixels of a picture on the page
DARK = 0.35  # brightness of what the mask keeps, as it is shown
NO_MODEL = "no model yet: choose one and press Load"


@dataclass
class Session:
    """One person's picture.

    Attributes:
        model: a StyleGAN2 recipe.
        info: what `load_stylegan` says of it.
        latent: of the picture as it is now.
        first: of the picture before any dragging.
        points: handle, target, handle, target, ... in pixels of the model's picture.
        mask: bool [size, size], true where the picture may change; None for everywhere.
    """

    model: Any
    info: dict[str, Any]
    latent: latents.Latent
    first: latents.Latent
    points: list[tuple[float, float]] = field(default_factory=list)
    mask: torch.Tensor | None = None

    @property
    def size(self) -> int:
        return self.model.generator.img_resolution

    @property
    def pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Handles and targets of the pairs that are complete, [N, 2] each."""
        n = len(self.points) // 2
        both = torch.tensor(self.points[: 2 * n], dtype=torch.float32).reshape(n, 2, 2)
        return both[:, 0], both[:, 1]


def models_in(folders: Sequence[str | Path]) -> list[str]:
    """Runs and files under these folders that can be dragged, the newest first."""
    found = []
    for folder in map(Path, folders):
        for config in (*folder.glob("*/configs/*-project.yaml"), *folder.glob("*/config.yaml"), *folder.glob("*.pkl")):
            if config.suffix == ".pkl" or "stylegan2" in config.read_text(encoding="utf-8").lower():
                found.append(config if config.suffix == ".pkl" else _run_of(config))
    return list(dict.fromkeys(str(p) for p in sorted(found, key=lambda p: -p.stat().st_mtime)))


def _run_of(config: Path) -> Path:
    return config.parent.parent if config.parent.name == "configs" else config.parent


# --- what the buttons do ----------------------------------------------------------------------------------------------


def load(run: str | None, seed: float, truncation: float, device: str = "auto") -> Session:
    """Raises UserError for a run that is no StyleGAN2."""
    if not run:
        raise UserError(NO_MODEL)
    model, info = latents.load_stylegan(run, device=device)
    latent = latents.from_seed(model, int(seed), truncation=truncation)
    return Session(model, info, latent, latent)


def with_latent(session: Session | None, file: str) -> Session:
    """The picture of a latent that was saved.

    Raises:
        UserError: no model yet, or the latent of another one.
    """
    if session is None:
        raise UserError(NO_MODEL)
    latent = latents.read_latent(file, session.model)
    return Session(session.model, session.info, latent, latent)


def add_point(session: Session | None, x: float, y: float) -> Session:
    """A click on the page's picture, in its pixels: a handle, or the target of the handle before.

    Raises:
        UserError: no model yet.
    """
    if session is None:
        raise UserError(NO_MODEL)
    scale = session.size / SIDE
    point = tuple(min(session.size - 1.0, max(0.0, (n + 0.5) * scale - 0.5)) for n in (x, y))
    return replace(session, points=[*session.points, point])


def without_points(session: Session | None) -> Session | None:
    """The same picture with all points taken away."""
    return None if session is None else replace(session, points=[])


def as_before(session: Session | None) -> Session | None:
    """The picture before any dragging, without points."""
    return None if session is None else replace(session, latent=session.first, points=[])


def with_mask(session: Session | None, painted: dict[str, Any] | None) -> Session | None:
    """Where something was painted the picture may change; where nothing is painted at all, everywhere."""
    if session is None:
        return None
    layers = [np.asarray(layer)[..., 3] > 0 for layer in (painted or {}).get("layers") or () if layer is not None]
    if not layers or not np.any(layers):
        return replace(session, mask=None)
    page = Image.fromarray(np.any(layers, axis=0).astype(np.uint8) * 255)
    small = page.resize((session.size, session.size), Image.Resampling.BOX)
    return replace(session, mask=torch.from_numpy(np.asarray(small) >= 128))


def dragging(session: Session | None, steps: float, lr: float, mask_weight: float) -> Iterator[tuple[Session, str]]:
    """Drags; gives the session after each step and a line about it.

    Raises:
        UserError: no model, no pair of points, or points that cannot be dragged.
    """
    if session is None:
        raise UserError(NO_MODEL)
    handles, targets = session.pairs
    if not len(handles):
        raise UserError("click a handle (red) and then where it shall go (blue)")
    options = editing.DragOptions(lr=lr, mask_weight=mask_weight)
    job, state = editing.start(session.model.generator, session.latent.ws, handles, targets, session.mask, options)
    for moved in editing.drag_points(job, state, int(steps)):
        latent = replace(session.latent, ws=editing.full_ws(job, moved.head))
        both = torch.stack([moved.handles, targets.to(moved.handles)], 1).reshape(-1, 2).tolist()
        session = replace(session, latent=latent, points=[tuple(p) for p in both])
        far = float(editing.distances(job, moved.handles).mean())
        yield session, f"step {moved.step}: {far:.1f} pixels to go" + (", arrived" if moved.arrived else "")


@torch.no_grad()
def view(session: Session | None) -> np.ndarray:
    """The picture with its points, uint8 [SIDE, SIDE, 3]; what the mask keeps is dark."""
    if session is None:
        return np.full((SIDE, SIDE, 3), 230, np.uint8)
    x = session.model.synthesize(session.latent.ws)[0].cpu().expand(3, -1, -1)
    if session.mask is not None:
        x = torch.where(session.mask, x, (x + 1) * DARK - 1)
    large = torch.nn.functional.interpolate(x[None], SIDE, mode="nearest")[0]
    scale = SIDE / session.size
    ends = [((a + 0.5) * scale - 0.5, (b + 0.5) * scale - 0.5) for a, b in session.points]
    odd = [ends[-1]] if len(ends) % 2 else []
    points = torch.tensor([*ends, *odd], dtype=torch.float32).reshape(-1, 2, 2)
    return to_uint8(editing.mark(large, points[:, 0], points[:, 1])[None])[0]


def save(session: Session) -> list[str]:
    """Writes picture and latent; their paths."""
    folder = Path(tempfile.mkdtemp(prefix="drag-"))
    about = {**session.latent.about, "sha256": session.info["sha256"]}
    x = session.model.synthesize(session.latent.ws)
    generate.save_png(generate.pictures(x, "the model")[0], folder / "drag.png", about)
    latents.save_latent(replace(session.latent, about=about), folder / "drag.safetensors")
    return [str(folder / "drag.png"), str(folder / "drag.safetensors")]


# --- the page ---------------------------------------------------------------------------------------------------------


def build(runs: Sequence[str], tab: str = "drag", device: str = "auto") -> Any:
    """The page as gradio Blocks.

    Raises:
        UserError: gradio is missing, or an unknown tab.
    """
    try:
        import gradio
    except ImportError as e:
        raise UserError("the page needs gradio: pip install 'ldm[webui]'") from e
    tabs = {"drag": drag_tab}
    if tab not in tabs:
        raise UserError(f"--tab {tab}: expected one of {', '.join(tabs)}")
    with gradio.Blocks(title="ldm") as page:
        tabs[tab](gradio, runs, device)
    return page


def page_of(session: Session | None, text: str = "") -> tuple[Session | None, np.ndarray, str]:
    """What the page shows: its state, picture and line of text."""
    return session, view(session), text


def told(function: Callable[..., Session], old: Session | None, *args: Any) -> Any:
    """A user's mistake is a line on the page; the picture stays."""
    try:
        return page_of(function(*args))
    except UserError as e:
        return page_of(old, str(e))


def opened(function: Callable[..., Session], old: Session | None, *args: Any, kept: Any = None) -> Any:
    """`told` for a function that brings another picture, and what the painter shows then.

    That is the new picture without strokes, since the mask went with the old one; after a mistake it is `kept`.
    """
    shown = told(function, old, *args)
    return *shown, kept if shown[0] is old else shown[1]


def run_drag(old: Session | None, *knobs: float) -> Iterator[Any]:
    """`dragging`, as the page shows it."""
    try:
        for new, text in dragging(old, *knobs):
            yield page_of(new, text)
    except UserError as e:
        yield page_of(old, str(e))


def drag_tab(gr: Any, runs: Sequence[str], device: str) -> None:
    """Widgets, left the model and the knobs, right the picture; `wire` says what they do."""
    w: dict[str, Any] = {"session": gr.State(None)}
    with gr.Row():
        with gr.Column(scale=1):
            first = next(iter(runs), None)
            w["run"] = gr.Dropdown(list(runs), value=first, label="Model", allow_custom_value=True, elem_id="run")
            w["seed"] = gr.Number(0, label="Seed", precision=0, elem_id="seed")
            w["psi"] = gr.Slider(0, 1, 0.7, label="Truncation")
            w["load"] = gr.Button("Load", variant="primary", elem_id="load")
            w["file"] = gr.File(label="Latent of scripts/invert.py or of an earlier drag", file_types=[".safetensors"])
            w["steps"] = gr.Slider(1, 500, 100, step=1, label="Steps at most")
            w["lr"] = gr.Slider(0.002, 0.3, 0.1, label="Step size")
            w["weight"] = gr.Slider(0, 100, editing.DragOptions.mask_weight, label="How firmly the rest is kept")
        with gr.Column(scale=2):
            label = "Click a handle, then its target"
            size = {"width": SIDE, "height": SIDE}
            w["image"] = gr.Image(view(None), label=label, interactive=False, elem_id="picture", **size)
            with gr.Row():
                w["start"] = gr.Button("Start", variant="primary", elem_id="start")
                w["stop"] = gr.Button("Stop", elem_id="stop")
                w["clear"] = gr.Button("Clear points", elem_id="clear")
                w["reset"] = gr.Button("Reset picture", elem_id="reset")
            w["said"] = gr.Textbox(show_label=False, elem_id="said", interactive=False)
            with gr.Accordion("Mask: paint over what may change", open=False, elem_id="painting"):
                w["painter"] = gr.ImageEditor(label="Mask", elem_id="mask", layers=False, transforms=(), type="numpy")
            w["save"] = gr.Button("Save picture and latent", elem_id="save")
            w["files"] = gr.Files(label="Saved", elem_id="files")
    wire(gr, w, device)


def wire(gr: Any, w: dict[str, Any], device: str) -> None:
    """Joins widgets and functions."""
    session, shows = w["session"], [w["session"], w["image"], w["said"]]

    def clicked(old: Session | None, event: gr.SelectData) -> Any:
        return told(add_point, old, old, *event.index)

    def loaded(old: Session | None, *args: Any) -> Any:
        return opened(lambda *a: load(*a, device=device), old, *args, kept=gr.skip())

    def uploaded(old: Session | None, file: str) -> Any:
        return opened(with_latent, old, old, file, kept=gr.skip())

    clicked.__annotations__["event"] = gr.SelectData  # gradio cannot read a postponed annotation of a local name
    w["load"].click(loaded, [session, w["run"], w["seed"], w["psi"]], [*shows, w["painter"]])
    w["file"].upload(uploaded, [session, w["file"]], [*shows, w["painter"]])
    w["image"].select(clicked, [session], shows)
    w["clear"].click(lambda old: told(without_points, old, old), [session], shows)
    w["reset"].click(lambda old: told(as_before, old, old), [session], shows)
    # gradio's change leaves out the first stroke after the painter was opened, its input what is cleared or undone
    for event in (w["painter"].change, w["painter"].input):
        event(lambda old, p: told(with_mask, old, old, p), [session, w["painter"]], shows)
    running = w["start"].click(run_drag, [session, w["steps"], w["lr"], w["weight"]], shows)
    w["stop"].click(None, cancels=[running])
    w["save"].click(lambda old: None if old is None else save(old), [session], [w["files"]])
