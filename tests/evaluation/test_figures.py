"""What is seen in pictures, reconstructions, classifiers and likelihoods: values that are known by hand."""

import csv
import math
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import norm
from torchmetrics.classification import MulticlassCalibrationError
from torchmetrics.functional.classification import multiclass_calibration_error

from ldm.data.base import ArrayDataset
from ldm.data.builtin import Digits
from ldm.data.openmoji import OpenMoji
from ldm.data.vision import CIFAR10
from ldm.evaluation import likelihood, quality, recognition, reconstruction
from ldm.evaluation.corruptions import CORRUPTIONS
from ldm.evaluation.evaluation import Request
from ldm.evaluation.features import MODELS
from ldm.evaluation.metrics import evaluate
from ldm.evaluation.path_length import path_length
from ldm.evaluation.pictures import Pictures, of_config, of_dataset, of_files, of_folder
from ldm.evaluation.sampling import balanced
from ldm.evaluation.text import clip_score
from ldm.generate import load_run
from ldm.models.diffusion.ddpm import DDPM
from ldm.models.vae import VAE
from ldm.modules.open_clip_text import CLIP
from ldm.util import UserError
from tests.evaluation.memory import Largest

CONFIG = {
    "data": {
        "target": "main.DataModuleFromConfig",
        "params": {
            "batch_size": 8,
            "size": 16,
            "channels": 1,
            "train": {"target": "ldm.data.builtin.Digits", "params": {"split": "train", "pad_crop": 4, "flip_p": 0.5}},
            "validation": {"target": "ldm.data.builtin.Digits", "params": {"split": "validation"}},
        },
    }
}


def pictures(x, labels=None):
    """uint8 [N, C, H, W] as a set."""
    return Pictures(ArrayDataset(x.permute(0, 2, 3, 1).contiguous(), labels), {})


def noise(n, channels=1, size=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, size, size), generator=g, dtype=torch.uint8)


# --- sets of pictures -------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_real_pictures_are_the_loader_s_without_its_augmentations():
    found = of_config(CONFIG, "train")
    digits = Digits("train")
    assert torch.equal(found.get(range(len(found))), digits.images.permute(0, 3, 1, 2))
    assert (found.labels() == digits.labels.numpy()).all()
    assert found.about["split"] == "train" and found.about["n"] == 1257 and found.about["size"] == [16, 16]


@pytest.mark.parametrize(
    ("size", "resize"), [(8, "none"), (16, "bicubic, antialiased, from 8x8"), (32, "bicubic, antialiased, from 8x8")]
)
def test_the_filter_of_the_digits_is_stated(size, resize):
    params = {**CONFIG["data"]["params"], "size": size}
    assert of_config({"data": {**CONFIG["data"], "params": params}}, "train").about["resize"] == resize


def test_the_filters_of_other_sets_are_stated(tmp_path):
    drawings = OpenMoji(size=16)
    assert of_dataset(drawings, {}).about["resize"] == "none: drawn at this size"
    for side, resize in ((32, "none"), (24, "bicubic, antialiased, from 32x32")):
        data = ArrayDataset(torch.zeros(2, side, side, 3, dtype=torch.uint8))
        data.__class__ = type("CIFAR10", (ArrayDataset,), {"native_size": CIFAR10.native_size})  # without its files
        assert of_dataset(data, {}).about["resize"] == resize
    for i in range(2):
        Image.new("L", (20, 20)).save(tmp_path / f"{i}.png")
    names, labels = ["0.png", "1.png"], np.zeros(2, np.int64)
    assert of_files(tmp_path, names, labels, 1).about["resize"] == "none"
    small = of_files(tmp_path, names, labels, 3, (16, 16))  # brought to the real pictures' size and channels
    assert small.about["resize"] == "bicubic, crop, from 20x20" and small.get([0, 1]).shape == (2, 3, 16, 16)


def test_the_checksum_is_that_of_the_pixels():
    x = noise(20)
    assert pictures(x).sha256() == pictures(x.clone()).sha256()
    changed = x.clone()
    changed[19, 0, 15, 15] += 1
    assert pictures(x).sha256() != pictures(changed).sha256()
    assert pictures(x).sha256() != pictures(x.reshape(20, 1, 8, 32)).sha256()


def test_an_unknown_split_names_those_that_are_there():
    with pytest.raises(UserError, match="--split test: the config's data has train, validation"):
        of_config(CONFIG, "test")


@pytest.mark.smoke
def test_classes_come_in_the_data_s_shares():
    assert balanced([1, 1, 1], 7).tolist() == [0, 1, 2, 0, 1, 2, 0]
    chosen = balanced([0.7, 0.2, 0.1], 1000)
    assert (np.bincount(chosen) == [700, 200, 100]).all()
    assert (balanced([0.7, 0.2, 0.1], 37) == chosen[:37]).all()
    for n in (10, 33, 500):
        assert np.abs(np.bincount(chosen[:n], minlength=3) - n * np.array([0.7, 0.2, 0.1])).max() <= 1


# --- drawn pictures ---------------------------------------------------------------------------------------------------


def test_class_agreement_and_balance():
    logits = np.eye(3)[[0, 1, 1, 0]]
    found = quality.class_agreement(logits, np.array([0, 1, 0, 0]))
    assert found == {"class_agreement": 0.75, "per_class": [pytest.approx(2 / 3), 1.0, None]}
    found = quality.class_balance(logits, np.array([0.5, 0.25, 0.25]))
    assert found["classes_read"] == [0.5, 0.5, 0.0] and found["class_distance"] == 0.25


def test_sharpness_of_stripes_and_of_nothing():
    x = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    assert quality.sharpness(pictures(x)) == 0
    x[..., ::2] = 100
    assert quality.sharpness(pictures(x)) == 50  # 100 sideways, 0 downwards


def test_copies_are_found_whatever_the_blocks(tmp_path):
    real, drawn = noise(600, seed=1), noise(30, seed=2)
    drawn[7], drawn[11] = real[399], real[3].clone() + 1  # one more grey level: 255 becomes 0, a small change
    distances, where = quality.nearest(pictures(drawn), pictures(real))
    assert where[7, 0] == 399 and distances[7, 0] == 0 and where[11, 0] == 3
    naive = torch.cdist(drawn.float().flatten(1), real.float().flatten(1)) / 16
    assert torch.allclose(distances, naive.topk(2, largest=False).values, atol=0.05)
    found = quality.memorisation(pictures(drawn), pictures(real), tmp_path / "n.png")
    assert found["copies"] == pytest.approx(2 / 30) and (tmp_path / "n.png").is_file()


def test_every_drawn_picture_is_compared_and_listed_the_nearest_first(tmp_path, monkeypatch):
    """Copies may be the very last pictures of many; blocks of any size find the same."""
    real, drawn = noise(300, size=4, seed=1), noise(2100, size=4, seed=2)
    drawn[2099], drawn[2050] = real[17], real[250]
    drawn[2050, 0, 0, 0] ^= 1  # one pixel by one grey level
    whole = quality.nearest(pictures(drawn), pictures(real))
    monkeypatch.setattr(quality, "HELD", 100 * 16)
    for a, b in zip(quality.nearest(pictures(drawn), pictures(real)), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)
    found = quality.memorisation(pictures(drawn), pictures(real), tmp_path / "n.png")
    with open(found["nearest_list"], newline="") as f:
        rows = list(csv.DictReader(f))
    assert found["nearest_compared"] == len(rows) == 2100 and {r["picture"] for r in rows} == set(map(str, range(2100)))
    assert [(r["picture"], r["nearest"], r["nearest_picture"]) for r in rows[:2]] == [
        ("2099", "17", "17"),
        ("2050", "250", "250"),
    ]
    each = [float(r["distance"]) for r in rows]
    assert each == sorted(each) and each[0] < 0.05 and each[1] == pytest.approx(0.25, abs=0.05) and each[2] > 1
    shown = np.asarray(Image.open(found["nearest_picture"]).convert("L"))  # 12 pictures of 4x4 a row, 2 pixels between
    assert (shown[2:6, 2:6] == real[17, 0].numpy()).all() and (shown[2:6, 8:12] == real[17, 0].numpy()).all()
    assert (shown[2:6, 14:18] == drawn[2050, 0].numpy()).all() and (shown[2:6, 20:24] == real[250, 0].numpy()).all()


def test_files_are_named_in_the_list_of_nearest_pictures(tmp_path):
    x, sets = noise(12, size=8), []
    for place in ("drawn", "real"):
        (tmp_path / place).mkdir()
        for i in range(12):
            Image.fromarray(x[i if place == "drawn" else 11 - i, 0].numpy()).save(tmp_path / place / f"p{i:02}.png")
        sets.append(of_folder(tmp_path / place, (8, 8), 1))
    found = quality.memorisation(*sets, tmp_path / "n.png")
    with open(found["nearest_list"], newline="") as f:
        pairs = {r["picture"]: (r["nearest"], r["nearest_picture"]) for r in csv.DictReader(f)}
    assert pairs == {f"p{i:02}.png": (str(11 - i), f"p{11 - i:02}.png") for i in range(12)}


def test_comparing_holds_no_more_for_more_drawn_pictures(monkeypatch):
    monkeypatch.setattr(quality, "HELD", 128 * 64)
    largest = []
    for n in (400, 1600):
        sets = [pictures(noise(m, size=8, seed=m)) for m in (n, 300)]
        with Largest() as seen:
            distances, _ = quality.nearest(*sets)
        assert distances.shape == (n, 2)
        largest.append(seen.elements)
    assert largest[0] == largest[1] <= 128 * 258 * 2


def test_clip_score_is_the_cosine():
    vision = {"image_size": 16, "patch_size": 8, "width": 64, "layers": 1}
    clip = CLIP(vision, {"embed_dim": 16, "width": 64, "heads": 2, "layers": 1})
    x = pictures(noise(5, 3))
    score = clip_score(clip, x, ["a", "b", "c", "d", "e"])["clip_score"]
    with torch.no_grad():
        clip.visual.proj.zero_()
        clip.text_projection.zero_()
        clip.visual.proj[:, 0] = 1e3  # every picture on one axis; its sign by the picture
        clip.text_projection[:, 1] = 1e3  # every caption on another one
    assert 0 <= score <= 100
    assert clip_score(clip, x, ["a", "b", "c", "d", "e"])["clip_score"] == pytest.approx(0, abs=1e-3)
    with pytest.raises(UserError, match="1 captions for 5 pictures"):
        clip_score(clip, x, ["a"])


def linear_vae(scale):
    """A decoder g(z) = scale z, one pixel for each number."""
    model = VAE(size=2, channels=1, latent_dim=4, encoder_config=MLP_IN, decoder_config=MLP_OUT).eval()
    model.decode = lambda z: scale * z.reshape(-1, 1, 2, 2)
    return model


def test_path_length_of_a_linear_generator():
    """|g(z_t) - g(z_(t + eps))|^2 / eps^2 = scale^2 |b - a|^2, whose mean is 2 D scale^2."""

    def squared(a, b):
        return ((a.double() - b.double()) ** 2).flatten(1).sum(1)

    found = path_length(linear_vae(0.5), squared, None, 4000, 0, "cpu", batch_size=500)
    assert found["ppl"] == pytest.approx(2 * 4 * 0.25, rel=0.05)
    twice = path_length(linear_vae(1.0), squared, None, 4000, 0, "cpu", batch_size=500)
    assert twice["ppl"] == pytest.approx(4 * found["ppl"], rel=1e-2)
    with pytest.raises(UserError, match="Classifier does not draw from one vector"):
        path_length(load_run(MODELS / "classifier/digits")[0], squared, None, 4, 0, "cpu")


# --- reconstructions --------------------------------------------------------------------------------------------------


class Shift(torch.nn.Module):
    """An autoencoder that is wrong by one grey level in every pixel."""

    def encode(self, x):
        return x

    def decode(self, z):
        return z - 2 / 255


def test_psnr_of_one_grey_level(tmp_path):
    x = noise(40, 3).clamp(min=1)
    found = reconstruction.reconstruction(Shift(), pictures(x), ["psnr", "ssim"], tmp_path, "cpu", batch_size=7)
    assert found["psnr"] == pytest.approx(20 * math.log10(255), rel=1e-4)
    assert 0.99 < found["ssim"] < 1
    assert len(list(tmp_path.glob("*.png"))) == 40


def test_reconstructions_use_the_mode_of_the_posterior():
    model = VAE(size=16, channels=1, latent_dim=4, encoder_config=MLP_IN, decoder_config=MLP_OUT).eval()
    x = torch.rand(3, 1, 16, 16) * 2 - 1
    assert torch.equal(reconstruction.reconstruct(model, x), reconstruction.reconstruct(model, x))


# --- classifiers ------------------------------------------------------------------------------------------------------


def answers(logits, y, batch=2):
    """Of logits [N, K] and classes, added up batch by batch."""
    y = torch.as_tensor(y)
    return recognition.answers(zip(logits.split(batch), y.split(batch), strict=True))


def test_accuracy_by_hand():
    logits = torch.tensor([[3.0, 2, 1, 0, 0, 0], [0, 9, 0, 0, 0, 0], [0, 1, 2, 3, 4, 5.0]])
    found = recognition.accuracy(answers(logits, [0, 0, 0]))
    assert found["top1"] == pytest.approx(1 / 3) and found["top5"] == pytest.approx(2 / 3)
    assert found["per_class"] == [pytest.approx(1 / 3), None, None, None, None, None]


def test_calibration_of_a_sure_liar_and_torchmetrics():
    sure = torch.eye(10)[[0, 1, 2, 3]] * 100
    assert recognition.calibration(answers(sure, [0, 1, 2, 3]))["calibration_error"] == pytest.approx(0, abs=1e-5)
    assert recognition.calibration(answers(sure, [1, 2, 3, 4]))["calibration_error"] == pytest.approx(1, abs=1e-5)
    logits, y = torch.randn(200, 10), torch.randint(0, 10, (200,))
    expected = MulticlassCalibrationError(10, n_bins=15)(logits.softmax(1), y)
    assert recognition.calibration(answers(logits, y))["calibration_error"] == pytest.approx(float(expected), abs=1e-6)


def test_figures_of_batches_are_those_of_all_logits_at_once():
    g = torch.Generator().manual_seed(3)
    logits, y = torch.randn(900, 7, generator=g) * 3, torch.randint(0, 6, (900,), generator=g)  # no picture of class 6
    found = answers(logits, y, batch=256)
    hit, confidence = logits.argmax(1) == y, logits.softmax(1).max(1).values
    figures = recognition.accuracy(found)
    assert figures["top1"] == pytest.approx(float(hit.double().mean()), rel=1e-12)
    assert figures["top5"] == pytest.approx(float((logits.topk(5, 1).indices == y[:, None]).any(1).double().mean()))
    assert figures["per_class"] == [*(pytest.approx(float(hit[y == c].double().mean())) for c in range(6)), None]
    assert figures["nll"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits.double(), y)), rel=1e-12)
    assert confidence.max() > 14 / 15
    expected = multiclass_calibration_error(logits.softmax(1), y, 7, n_bins=15, norm="l1")
    assert recognition.calibration(found)["calibration_error"] == pytest.approx(float(expected), abs=1e-6)


def test_reading_holds_no_more_logits_for_more_pictures():
    """Logits are a thousand numbers a picture here: none may be held beyond its batch."""
    largest, alive = [], []
    for n in (600, 1800):
        held = weakref.WeakSet()

        def read(x, held=held):
            logits = torch.arange(len(x) * 1000).view(len(x), 1000).float() % 97
            held.add(logits)
            alive.append(len(held))
            return logits

        with Largest() as seen:
            batches = recognition.readings(read, pictures(noise(n, size=4)), np.zeros(n, np.int64))
            found = recognition.answers(batches)
        assert found.n == n and found.asked[0] == n
        largest.append(seen.elements)
    assert largest[0] == largest[1] == 256 * 1000 and max(alive) <= 2


def test_a_classifier_reads_its_pictures_once_for_all_figures(tmp_path, monkeypatch):
    calls, reader = [], recognition.reader

    def counting(model, device):
        read = reader(model, device)
        return lambda x: (calls.append(len(x)), read(x))[1]

    monkeypatch.setattr(recognition, "reader", counting)
    request = Request(str(MODELS / "classifier/digits"), ["accuracy", "calibration"], outdir=tmp_path, device="cpu")
    found = evaluate(request)["metrics"]
    assert sum(calls) == 360 and found["top1"] > 0.99 and 0 < found["calibration_error"] < 0.2


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_corruption_grows_with_its_severity_and_repeats(name, channels):
    x = Digits("test", channels=channels).images[:16].permute(0, 3, 1, 2)
    out = [CORRUPTIONS[name](x, s, torch.Generator().manual_seed(0)) for s in (1, 3, 5)]
    again = CORRUPTIONS[name](x, 5, torch.Generator().manual_seed(0))
    assert all(o.shape == x.shape and o.dtype == torch.uint8 for o in out)
    assert torch.equal(again, out[2])
    change = [float((o.float() - x.float()).abs().mean()) for o in out]
    assert 0 < change[0] < change[1] < change[2]


def test_at_least_a_dozen_corruptions_and_what_they_do_to_the_digits():
    assert len(CORRUPTIONS) >= 12
    model, _ = load_run(MODELS / "classifier/digits")
    test = pictures(Digits("test").images[:100].permute(0, 3, 1, 2), Digits("test").labels[:100].numpy())
    found = recognition.robustness(recognition.reader(model, "cpu"), test, test.labels(), severities=(1, 5))
    assert set(found["corruptions"]) == set(CORRUPTIONS)
    mild, strong = (np.mean([row[s] for row in found["corruptions"].values()]) for s in ("1", "5"))
    assert 0.9 < mild <= 1 and strong < mild - 0.1
    assert found["corrupted_top1"] == pytest.approx((mild + strong) / 2)


# --- likelihoods ------------------------------------------------------------------------------------------------------

MLP_IN = {"target": "ldm.modules.vae_nets.MLPEncoder", "params": {"hidden": [8]}}
MLP_OUT = {"target": "ldm.modules.vae_nets.MLPDecoder", "params": {"hidden": [8]}}


def test_a_vae_that_knows_nothing_needs_eight_bits():
    """A very wide logistic gives every level nearly the same mass: log2(256) bits."""
    config = {"encoder_config": MLP_IN, "decoder_config": MLP_OUT, "likelihood": "logistic"}
    model = VAE(size=8, channels=1, latent_dim=2, likelihood_scale=200.0, **config).eval()
    with torch.no_grad():
        for p in model.encoder.parameters():
            p.zero_()  # q(z | x) is the prior: no bits in the latent
    found = likelihood.bits_per_dimension(model, pictures(noise(50, size=8).clamp(1, 254)), "cpu")
    assert found["bits_per_dimension"] > 8


def diffusion(cls, image_size=4):
    unet = {"model_channels": 32, "num_res_blocks": 1, "channel_mult": [1], "attention_resolutions": []}
    unet |= {"image_size": image_size, "in_channels": 1, "out_channels": 1, "num_heads": 1}
    config = {"target": "ldm.modules.unet.UNetModel", "params": unet}
    return cls(config, timesteps=20, use_ema=False, channels=1).eval()


@pytest.mark.parametrize("family", ["vae", "ddpm"])
def test_bits_are_a_function_of_the_seed_and_the_picture(family):
    """Not of the batches, nor of random numbers drawn before."""
    config = {"encoder_config": MLP_IN, "decoder_config": MLP_OUT, "likelihood": "gaussian", "iwae_samples": 3}
    model = VAE(size=4, channels=1, latent_dim=2, **config).eval() if family == "vae" else diffusion(DDPM)
    x = pictures(noise(9, size=4))
    first = likelihood.bits_per_dimension(model, x, "cpu", seed=5)
    torch.rand(7)
    again = likelihood.bits_per_dimension(model, x, "cpu", batch_size=4, seed=5)
    assert again["bits_per_dimension"] == pytest.approx(first["bits_per_dimension"], rel=1e-6)
    assert first["bits_per_dimension_seed"] == 5
    other = likelihood.bits_per_dimension(model, x, "cpu", seed=6)
    assert abs(other["bits_per_dimension"] - first["bits_per_dimension"]) > 1e-5 * first["bits_per_dimension"]
    assert likelihood.bits_per_dimension(model, x, "cpu", seed=5) == first


def test_the_elbo_of_a_vae_whose_terms_are_known():
    """Every z decodes to a grey whose pixels have variance 1, and the posterior is the same for all pictures."""
    config = {"encoder_config": MLP_IN, "decoder_config": MLP_OUT, "likelihood": "gaussian", "likelihood_scale": 1.0}
    model = VAE(size=4, channels=1, latent_dim=2, **config).eval()
    for network in (model.encoder, model.decoder):
        for last in [m for m in network.modules() if isinstance(m, torch.nn.Linear)][-1:]:
            torch.nn.init.zeros_(last.weight)
            torch.nn.init.zeros_(last.bias)
    model.encoder.requires_grad_(False)
    last.requires_grad_(False)
    [m for m in model.encoder.modules() if isinstance(m, torch.nn.Linear)][-1].bias.copy_(
        torch.tensor([0.5, -1, 0.2, 0])
    )
    kl = 0.5 * (0.5**2 + 1 + math.exp(0.2) - 1.2)
    x = noise(9, size=4)
    squares = float((x.float() / 127.5 - 1).square().sum((1, 2, 3)).mean())
    expected = -0.5 * (squares + 16 * math.log(2 * math.pi)) - kl
    found = likelihood.elbo(model, pictures(x), "cpu", batch_size=4)
    assert found["elbo"] == pytest.approx(expected, rel=1e-5) and found["elbo_seed"] == 0


class Oracle(DDPM):
    """The perfect denoiser of data that is one constant picture."""

    def predict_start(self, x_t, t, out):
        return torch.full_like(x_t, 0.2)


def test_the_bound_of_a_perfect_ddpm_is_what_the_tables_leave():
    """All terms but L_T and L_0 vanish; both are computed here from the tables alone."""
    unet = {"model_channels": 32, "num_res_blocks": 1, "channel_mult": [1], "attention_resolutions": []}
    unet |= {"image_size": 4, "in_channels": 1, "out_channels": 1, "num_heads": 1}
    model = Oracle({"target": "ldm.modules.unet.UNetModel", "params": unet}, timesteps=20, use_ema=False, channels=1)
    model.eval()
    x = torch.full((3, 1, 4, 4), 0.2)
    a = float(model.alphas_cumprod[-1])
    last = 0.5 * (-math.log(1 - a) - 1 + (1 - a) + a * 0.2**2)
    std = math.exp(0.5 * float(model.posterior_log_variance_clipped[1]))
    first = -math.log(norm.cdf(1 / 255 / std) - norm.cdf(-1 / 255 / std))
    found = likelihood.ddpm_bound(model, x, None)
    assert torch.allclose(found, torch.full((3,), 16 * (last + first)), rtol=1e-3)
    bits = likelihood.bits_per_dimension(model, pictures(torch.full((3, 1, 4, 4), 153, dtype=torch.uint8)), "cpu")
    assert bits["bits_per_dimension"] == pytest.approx((last + first) / math.log(2), rel=1e-2)


def test_a_worse_denoiser_needs_more_bits():
    unet = {"model_channels": 32, "num_res_blocks": 1, "channel_mult": [1], "attention_resolutions": []}
    unet |= {"image_size": 4, "in_channels": 1, "out_channels": 1, "num_heads": 1}
    config = {"target": "ldm.modules.unet.UNetModel", "params": unet}
    good, poor = (c(config, timesteps=20, use_ema=False, channels=1).eval() for c in (Oracle, DDPM))
    x = torch.full((2, 1, 4, 4), 0.2)
    assert (likelihood.ddpm_bound(poor, x, None) > likelihood.ddpm_bound(good, x, None)).all()


def test_a_classifier_has_no_likelihood():
    model, _ = load_run(MODELS / "classifier/digits")
    with pytest.raises(UserError, match="Classifier gives no likelihood"):
        likelihood.bits_per_dimension(model, pictures(noise(4)), "cpu")
