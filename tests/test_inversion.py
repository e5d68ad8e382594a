"""From a picture back to its latent, and latents as files."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import inversion, latents
from ldm.modules.lpips import PixelGradient
from ldm.util import UserError
from tests.models.gans import small_stylegan


@pytest.fixture
def model():
    torch.set_num_threads(1)
    return small_stylegan().eval().requires_grad_(False)


def picture_of(model, seed):
    return model.sample(seeds=[seed])


def test_distance_of_known_pictures():
    a, b = torch.zeros(1, 1, 16, 16), torch.full((1, 1, 16, 16), 0.5)
    assert torch.isclose(inversion.distance(a, b), torch.tensor(0.25))  # the same at every scale
    fine = torch.zeros(1, 1, 16, 16)
    fine[..., ::2], fine[..., 1::2] = 0.5, -0.5
    assert torch.isclose(inversion.distance(a, fine), torch.tensor(0.125))  # gone at half size
    assert inversion.distance(a, fine, PixelGradient()) > 0.2


@pytest.mark.parametrize("space", ["w", "w+"])
def test_projection_comes_near_a_picture_of_the_generator(model, space):
    target, said = picture_of(model, 5), []
    ws, losses = inversion.project(
        model.generator, target, space=space, steps=60, candidates=8, callback=lambda *step: said.append(step)
    )
    assert ws.shape == (1, model.generator.num_ws, 8)
    assert (ws == ws[:, :1]).all() if space == "w" else (ws != ws[:, :1]).any()
    found = inversion.report(model.generator, ws, target, {"project": losses})
    assert found.mse < 0.2 * float((picture_of(model, 6) - target).square().mean())
    assert len(losses) == 60 and said[-1] == ("project", 59, losses[-1])
    assert np.isclose(found.psnr, 10 * np.log10(4 / found.mse))


def test_tuning_makes_the_picture_exact_and_holds_the_latent(model):
    target = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    ws, _ = inversion.project(model.generator, target, steps=5, candidates=4)
    before = inversion.report(model.generator, ws, target, {})
    kept, mapping = ws.clone(), [p.clone() for p in model.generator.mapping.parameters()]
    losses = inversion.tune(model.generator, ws, target, steps=40, lr=1e-2)
    after = inversion.report(model.generator, ws, target, {})
    assert after.mse < 0.5 * before.mse and losses[-1] < losses[0]
    assert torch.equal(ws, kept)
    assert all(torch.equal(a, b) for a, b in zip(mapping, model.generator.mapping.parameters(), strict=True))
    assert not any(p.requires_grad for p in model.generator.parameters())


def test_faults(model):
    with pytest.raises(UserError, match=r"the picture is \[1, 1, 8, 8\], expected \[1, 1, 16, 16\]"):
        inversion.project(model.generator, torch.zeros(1, 1, 8, 8))
    with pytest.raises(UserError, match="space 'z': expected one of w, w\\+"):
        inversion.project(model.generator, torch.zeros(1, 1, 16, 16), space="z")


# --- files ------------------------------------------------------------------------------------------------------------


def test_latents_come_back_with_what_was_tuned(model, tmp_path):
    latent = latents.from_seed(model, 3, truncation=0.5)
    assert torch.equal(latent.ws, model.latents(None, latents.SeededNoise([3]), 0.5))
    tuned = {"synthesis.b4.const": torch.randn_like(model.generator.synthesis.b4.const)}
    path = tmp_path / "a/x.safetensors"
    latents.save_latent(latents.Latent(latent.ws, tuned, {"seed": 3}), path)
    other = small_stylegan().eval()
    found = latents.read_latent(path, other)
    assert torch.equal(found.ws, latent.ws) and found.about == {"seed": 3}
    assert torch.equal(other.generator.synthesis.b4.const, tuned["synthesis.b4.const"])


def test_latents_of_another_model_are_refused(model, tmp_path):
    path = tmp_path / "x.safetensors"
    latents.save_latent(latents.from_seed(model, 3), path)
    with pytest.raises(UserError, match=r"ws \[1, 6, 8\], but the generator has \[1, 8, 8\]"):
        latents.read_latent(path, small_stylegan(size=32))
    with pytest.raises(UserError, match="cannot be read"):
        latents.read_latent(tmp_path / "none.safetensors", model)
    wrong = latents.Latent(latents.from_seed(model, 3).ws, {"synthesis.b4.konst": torch.zeros(1)}, {})
    latents.save_latent(wrong, path)
    with pytest.raises(UserError, match="synthesis.b4.konst does not fit"):
        latents.read_latent(path, model)


def test_pictures_are_cut_to_their_middle_square(tmp_path):
    array = np.zeros((20, 40, 3), np.uint8)
    array[:, 10:30] = 255
    Image.fromarray(array).save(tmp_path / "x.png")
    said = []
    x = latents.square_picture(tmp_path / "x.png", 16, 1, said.append)
    assert x.shape == (1, 1, 16, 16) and x.min() == 1
    assert "40x20: its middle 20x20 is used" in said[0]
