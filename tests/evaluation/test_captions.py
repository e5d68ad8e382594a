"""Figures of text-to-image models of captioned drawings, against pictures whose figures are known."""

from types import SimpleNamespace

import pytest
import torch

from ldm.data.openmoji import COLORS, OpenMoji, recolor
from ldm.evaluation import captions
from ldm.models.autoencoder import IdentityFirstStage


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Training pictures, held-out pairs, and everything, of food at 32x32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LDM_DATA", str(tmp_path_factory.mktemp("data")))
        return [OpenMoji(s, groups="food", colors=True, size=32) for s in ("train", "validation", "all")]


@pytest.fixture
def model():
    """A first stage that changes nothing."""
    stage = IdentityFirstStage()
    return SimpleNamespace(first_stage_model=stage, encode_first_stage=stage.encode, device=torch.device("cpu"))


def test_pictures_that_are_the_drawings_are_perfect(sets, model):
    train = sets[0]
    prompts = sorted(c for names in train.captions for c in names)
    owner = {c: i for i, names in enumerate(train.captions) for c in names}
    drawn = captions.images_of(train)[[owner[p] for p in prompts]]
    found = captions.fidelity(model, drawn, prompts, train)
    assert found["top1_pixels"] == found["top1_latents"] == 1.0 and found["wrong"] == [] and found["n"] == len(prompts)
    assert found["psnr"] > 100


def test_a_wrong_drawing_is_counted_and_named(sets, model):
    train = sets[0]
    x = captions.images_of(train)
    prompts = [names[0] for names in train.captions[:10]]
    drawn = x[[1, *range(1, 10)]]  # the first prompt got the second drawing
    found = captions.fidelity(model, drawn, prompts, train)
    assert found["top1_pixels"] == pytest.approx(0.9) and found["wrong"] == [prompts[0]]


def test_identical_drawings_count_as_one(sets, model):
    train = OpenMoji.__new__(OpenMoji)
    train.__dict__.update(sets[0].__dict__)
    train.images = train.images.clone()
    train.images[1] = train.images[0]
    found = captions.fidelity(model, captions.images_of(train)[:2], [n[0] for n in train.captions[:2]], train)
    assert found["top1_pixels"] == 1.0


def test_composition_tells_shape_from_color(sets):
    _, held_out, everything = sets
    x = captions.images_of(held_out)
    right = captions.composition(x, held_out, everything)
    assert (right["share"], right["object"], right["color"], right["wrong"]) == (1.0, 1.0, 1.0, [])
    hues = [COLORS[names[0].split()[0]] for names in held_out.captions]
    turned = [recolor(p.numpy(), hue + 90) for p, hue in zip(held_out.images, hues, strict=True)]
    other = torch.stack([torch.tensor(p) for p in turned]).permute(0, 3, 1, 2).float() / 127.5 - 1
    found = captions.composition(other, held_out, everything)
    assert found["object"] == 1.0 and found["color"] == found["share"] == 0.0 and len(found["wrong"]) == len(held_out)
    same_color = [recolor(everything.images[0].numpy(), hue) for hue in hues]  # one drawing in every asked colour
    other = torch.stack([torch.tensor(p) for p in same_color]).permute(0, 3, 1, 2).float() / 127.5 - 1
    found = captions.composition(other, held_out, everything)
    assert found["color"] == 1.0 and found["object"] < 0.5


def test_first_stage_figures(sets, model):
    x = captions.images_of(sets[0])[:20]
    perfect = captions.first_stage(model, x * 0.9)
    assert perfect["ssim"] == pytest.approx(1.0, abs=1e-6) and perfect["psnr"] > 100
    model.first_stage_model.decode = lambda z: z - 0.2
    shifted = captions.first_stage(model, x.clamp(-0.5, 0.5), batch_size=7)
    assert shifted["psnr"] == pytest.approx(20.0, abs=1e-3) == shifted["psnr_of_all_pixels"]  # 10 log10(4 / 0.04)
    assert shifted["n"] == 20


def test_nearest():
    x = torch.eye(4)[:, None, None]
    assert captions.nearest(torch.cat([x[2:], x[:1] + 1]), x).tolist() == [2, 3, 0]
