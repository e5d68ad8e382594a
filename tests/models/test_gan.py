"""The GAN recipe: every loss and penalty trains, classes reach both players, the score is kept, faults are named."""

import math
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.callbacks import NaNGuard
from ldm.models.game import Game, film_strip
from ldm.models.gan import GAN
from ldm.modules import gan_losses
from ldm.modules.ada import AdaptiveAugment, DiffAugment
from ldm.util import UserError
from tests.models.gans import Blobs, loader, scaled_trainer, small_gan, spoil_loss, trainer


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def batch(n=8, **kwargs):
    data = Blobs(n, **kwargs)
    return {"image": data.x, "class_label": data.y}


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [None, *gan_losses.PENALTIES])
@pytest.mark.parametrize("loss", gan_losses.LOSSES)
def test_every_loss_and_penalty_trains_both_players(tmp_path, loss, penalty):
    model = small_gan(loss=loss, penalty=penalty)
    before = [p.detach().clone() for p in model.parameters()]
    trainer(tmp_path, max_steps=2).fit(model, loader())
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    names = [n for n, _ in model.named_parameters()]
    for player in ("generator.", "discriminator."):
        assert any(c for n, c in zip(names, changed, strict=True) if n.startswith(player))
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_the_penalty_is_what_the_formula_says():
    """One discriminator loss by hand: hinge + 10 gp, with the same random numbers."""
    model, data = small_gan(loss="hinge", penalty="gp", penalty_weight=10.0).train(), batch()
    torch.manual_seed(1)
    loss, logs = model.discriminator_loss(data)
    torch.manual_seed(1)
    x = data["image"].permute(0, 3, 1, 2)
    fake = model.generator(torch.randn(8, 8)).detach()
    expected = gan_losses.hinge_d(model.discriminator(x), model.discriminator(fake))
    penalty = gan_losses.gradient_penalty(model.discriminator, x, fake)
    assert torch.allclose(logs["penalty"], penalty, rtol=1e-5)
    assert torch.allclose(loss, expected + 10 * penalty, rtol=1e-5)


def test_the_distance_to_the_picture_that_was_asked_for_joins_the_generators_loss():
    """pix2pix: lambda times the mean absolute difference to the real picture with the same label."""
    classes = {"cond_stage_key": "class_label", "num_classes": 2}
    bare, model = small_gan(**classes).train(), small_gan(**classes, reconstruction_weight=5.0).train()
    model.load_state_dict(bare.state_dict())
    data = batch()
    torch.manual_seed(1)
    plain, without = bare.generator_loss(data)
    torch.manual_seed(1)
    loss, logs = model.generator_loss(data)
    torch.manual_seed(1)
    fake = bare.fake(8, data["class_label"])
    distance = (fake - data["image"].permute(0, 3, 1, 2)).abs().mean()
    assert "reconstruction" not in without
    assert torch.allclose(logs["reconstruction"], distance, rtol=1e-5)
    assert torch.allclose(loss - plain, 5 * distance, rtol=1e-4)
    with pytest.raises(ValueError, match=r"reconstruction_weight: got 5\.0, expected 0: without classes"):
        small_gan(reconstruction_weight=5.0)


def test_lazy_penalties_come_rarely_and_count_more():
    every, lazy = small_gan(penalty="r1").train(), small_gan(penalty="r1", penalty_interval=4).train()
    torch.manual_seed(1)
    a, logs = every.discriminator_loss(batch())
    torch.manual_seed(1)
    b, _ = lazy.discriminator_loss(batch())
    assert torch.allclose(b - a, 3 * logs["penalty"], rtol=1e-4)
    lazy.disc_updates = 1
    assert "penalty" not in lazy.discriminator_loss(batch())[1]


def test_the_critic_plays_more_often_and_stays_clipped(tmp_path):
    model = small_gan(loss="wgan", clip_weights=0.01, disc_steps=3, lr=0.1)
    t = trainer(tmp_path, max_steps=4)
    t.fit(model, loader())
    assert t.global_step == model.updates == 4 and model.disc_updates == 12
    assert all(p.abs().max() <= 0.01 for p in model.discriminator.parameters())
    assert any(p.abs().max() > 0.01 for p in model.generator.parameters())


def test_the_turn_of_the_generator_survives_the_checkpoint(tmp_path):
    model = small_gan(disc_steps=3)
    model.updates, model.disc_updates = 2, 7
    content = {}
    model.on_save_checkpoint(content)
    other = small_gan(disc_steps=3)
    other.on_load_checkpoint(content)
    assert (other.updates, other.disc_updates) == (2, 7)


@pytest.mark.parametrize("loss", ["lsgan", "relativistic"])
def test_a_game_in_one_picture_size_is_learned(tmp_path, loss):
    """After a short training, generated pictures are nearer to the data's mean than at the start."""
    mean = Blobs().x.mean(0).permute(2, 0, 1)
    model = small_gan(loss=loss, lr=5e-3, use_ema=False)
    z = torch.randn(64, 8)

    def gap():
        return float((model.generator.train()(z).detach().mean(0) - mean).abs().mean())

    before = gap()
    trainer(tmp_path, max_steps=60).fit(model, loader(16))
    assert gap() < 0.5 * before


# --- classes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conditioning", ["concat", "projection", "auxiliary"])
def test_classes_reach_both_players(tmp_path, conditioning):
    model = small_gan(conditioning=conditioning, cond_stage_key="class_label", num_classes=2)
    trainer(tmp_path, max_steps=2).fit(model, loader())
    model.eval()
    x = model.sample(model.condition([5, 5], classes=[0, 1]), seeds=[5, 5])
    assert (x[0] - x[1]).abs().max() > 1e-4
    assert model.condition([3, 4]).tolist() == [1, 0]


def test_auxiliary_classifiers_are_trained_by_both():
    model = small_gan(conditioning="auxiliary", cond_stage_key="class_label", num_classes=2, class_weight=2.0).train()
    free = small_gan(conditioning="auxiliary", cond_stage_key="class_label", num_classes=2, class_weight=0.0).train()
    for name in ("generator_loss", "discriminator_loss"):
        torch.manual_seed(1)
        with_classes, _ = getattr(model, name)(batch())
        torch.manual_seed(1)
        without, _ = getattr(free, name)(batch())
        assert with_classes > without + 0.1  # 2 log 2 at the start


@pytest.mark.parametrize("classes", [2, 5])
def test_the_auxiliary_classifier_of_the_discriminator_is_asked_about_real_and_generated_pictures(classes):
    """Odena et al. 2017, equation 3: with uniform class logits each picture costs log K, in D twice, in G once."""
    params = {"conditioning": "auxiliary", "cond_stage_key": "class_label", "num_classes": classes}
    model, free = (small_gan(**params, class_weight=w).train() for w in (3.0, 0.0))
    for m in (model, free):
        torch.nn.init.zeros_(m.discriminator.classes.weight)
        torch.nn.init.zeros_(m.discriminator.classes.bias)
    for name, times in (("generator_loss", 1), ("discriminator_loss", 2)):
        torch.manual_seed(1)
        with_classes, _ = getattr(model, name)(batch())
        torch.manual_seed(1)
        without, _ = getattr(free, name)(batch())
        assert torch.isclose(with_classes - without, torch.tensor(times * 3.0 * math.log(classes)), atol=1e-5)


def test_the_two_class_losses_of_the_discriminator_are_those_of_their_pictures(monkeypatch):
    """Real pictures are read right with probability 3/4, generated ones with 1/4: log 4/3 + log 4."""
    params = {"conditioning": "auxiliary", "cond_stage_key": "class_label", "num_classes": 2}
    model, data = small_gan(**params).train(), batch()
    right = torch.nn.functional.one_hot(data["class_label"], 2) * math.log(3)
    real = data["image"].permute(0, 3, 1, 2)

    def with_classes(images):
        sign = 1 if torch.equal(images, real) else -1
        return torch.zeros(len(images), 1, requires_grad=True), sign * right

    monkeypatch.setattr(model.discriminator, "with_classes", with_classes)
    loss, _ = model.discriminator_loss(data)
    assert torch.isclose(loss, torch.tensor(2 * math.log(2) + math.log(4 / 3) + math.log(4)))
    loss, _ = model.generator_loss(data)
    assert torch.isclose(loss, torch.tensor(math.log(2) + math.log(4)))


def test_a_class_that_is_not_there():
    model = small_gan(conditioning="concat", cond_stage_key="class_label", num_classes=2)
    with pytest.raises(UserError, match="class 7 does not exist: the model knows 0 to 1"):
        model.condition([0], classes=[7])
    with pytest.raises(UserError, match="label 2 in batch"):
        model.on_before_batch_transfer({"class_label": torch.tensor([0, 2])}, 0)
    with pytest.raises(ValueError, match="cond_stage_key needs num_classes"):
        small_gan(cond_stage_key="class_label")
    with pytest.raises(UserError, match="takes no class"):
        small_gan().condition([0], classes=[1])


# --- drawing ----------------------------------------------------------------------------------------------------------


def test_a_picture_depends_on_its_seed_only():
    model = small_gan().eval()
    both, alone = model.sample(seeds=[3, 4]), model.sample(seeds=[4])
    assert torch.allclose(both[1:], alone, atol=1e-5)
    assert both.abs().max() <= 1


def test_interpolation_starts_at_the_pictures_and_closes():
    model = small_gan().eval()
    frames = torch.stack(list(model.interpolate(seeds=[3, 4], frames=5)))
    assert frames.shape == (10, 1, 8, 8)
    assert torch.allclose(frames[[0, 5]], model.sample(seeds=[3, 4]), atol=1e-5)
    steps = (frames - frames.roll(-1, 0)).abs().mean((1, 2, 3))
    assert steps.max() < 0.6 * (frames[0] - frames[5]).abs().mean()


# --- augmentation -----------------------------------------------------------------------------------------------------


def test_augmentations_by_name(tmp_path):
    ada = small_gan(augment="ada", augment_params={"pipe": "blit", "kimg": 0.01, "interval": 1})
    assert isinstance(ada.augment, AdaptiveAugment)
    trainer(tmp_path, max_steps=3).fit(ada, loader())
    assert int(ada.augment.steps) == 3  # it has seen every step's real logits
    diff = small_gan(augment="diffaugment", augment_params={"policy": "translation"})
    assert isinstance(diff.augment, DiffAugment) and diff.augment.names == ["translation"]
    for bad, text in (
        ({"augment": "adda"}, "did you mean ada"),
        ({"augment": "ada", "augment_params": {"pipe": "bcg"}}, "augment_params.pipe: got 'bcg'"),
        ({"loss": "hing"}, "did you mean hinge"),
        ({"penalty": "r3"}, "penalty: got 'r3', expected one of gp, r1"),
    ):
        with pytest.raises(ValueError, match=text):
            small_gan(**bad)


def test_both_players_see_augmented_pictures():
    model = small_gan(augment="diffaugment").train()
    seen = []
    model.augment.register_forward_hook(lambda module, args, x: seen.append(len(x)))
    model.generator_loss(batch())
    model.discriminator_loss(batch())
    assert seen == [8, 8, 8]  # fake; real, fake


# --- watching ---------------------------------------------------------------------------------------------------------


def test_diversity_and_accuracy_of_known_cases():
    x = torch.stack([torch.full((1, 4, 4), v) for v in (0.0, 1.0, 3.0)])
    assert torch.isclose(gan_losses.diversity(x), torch.tensor(2.0))  # mean of 1, 3, 2
    assert torch.isclose(gan_losses.diversity(x, torch.tensor([0, 0, 1])), torch.tensor(1.0))
    assert gan_losses.diversity(x, torch.arange(3)).isnan()
    assert gan_losses.diversity(x[:1].repeat(5, 1, 1, 1)) == 0
    real, fake = torch.tensor([1.0, -1.0]), torch.tensor([-2.0, -3.0])
    assert gan_losses.accuracy(real, fake) == 0.75
    assert gan_losses.accuracy(real, fake, boundary=2.0) == 0.5


def play(game, updates, start=0, **values):
    said = []
    for i in range(start, start + updates):
        game.add(**{k: torch.tensor(v) for k, v in values.items()})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            game.score(i + 1)
        said += [str(w.message) for w in caught]
    return said


def test_collapse_and_victory_are_said_once_and_after_a_while():
    fine = dict(diversity_real=1.0, diversity_fake=0.5, accuracy=0.8)
    assert play(Game(10, 50), 200, **fine) == []
    game = Game(10, 50)
    assert play(game, 40, **{**fine, "diversity_fake": 0.05}) == []
    (said,) = play(game, 60, 40, **{**fine, "diversity_fake": 0.05})
    assert "5.0% as much as the data's" in said and "mode collapse" in said and "Try" in said
    (said,) = play(Game(10, 50), 100, **{**fine, "accuracy": 0.99})
    assert "tells 99.0% of all pictures apart" in said and "for 50 steps" in said
    game = Game(10, 50)
    assert play(game, 40, **{**fine, "accuracy": 0.99}) + play(game, 10, 40, **fine) == []
    assert play(game, 40, 50, **{**fine, "accuracy": 0.99}) == []  # it counts from the beginning again


def test_scores_are_means_and_leave_out_nan():
    game = Game(2, 10)
    game.add(a=torch.tensor(1.0), diversity_real=torch.tensor(float("nan")))
    assert game.score(1) is None
    game.add(a=torch.tensor(3.0), diversity_real=torch.tensor(2.0), diversity_fake=torch.tensor(1.0))
    assert game.score(2) == {"a": 2.0, "diversity_real": 2.0, "diversity_fake": 1.0, "diversity": 0.5}


def test_the_score_is_logged(tmp_path):
    model = small_gan(watch=2)
    t = trainer(tmp_path, max_steps=4)
    t.fit(model, loader())
    names = {"g_loss", "d_loss", "d_real", "d_fake", "accuracy", "diversity", "g_norm", "d_norm"}
    assert {f"train/{n}" for n in names} <= set(t.callback_metrics)


def test_a_critic_has_no_accuracy(tmp_path):
    t = trainer(tmp_path, max_steps=2)
    t.fit(small_gan(loss="wgan", watch=2), loader())
    assert "train/accuracy" not in t.callback_metrics and "train/diversity" in t.callback_metrics


def test_film_strip(tmp_path):
    folder = tmp_path / "images/train"
    folder.mkdir(parents=True)
    assert film_strip(folder) is None
    for step in (0, 100, 900, 1000):
        grey = Image.fromarray(np.full((8, 10), step // 10, np.uint8))
        grey.save(folder / f"samples_gs-{step:06}_e-000000_b-000000.png")
    path = film_strip(folder, frames=3)
    strip = np.asarray(Image.open(path))
    assert path == tmp_path / "images/film_strip.png" and strip.shape == (22, 42, 3)
    assert [int(strip[20, x, 0]) for x in (5, 21, 37)] == [0, 90, 100]  # steps 0, 900 and 1000


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("player", ["generator", "discriminator"])
def test_nan_stops_and_says_where(tmp_path, player):
    model = small_gan(use_ema=False)
    parameter = next(getattr(model, player).parameters())
    parameter.register_hook(lambda g: g * float("nan"))
    before = parameter.detach().clone()
    with pytest.raises(UserError, match=f"the {player}'s gradient is not finite at step 0"):
        trainer(tmp_path, max_steps=3).fit(model, loader())
    assert torch.equal(parameter, before)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize("player", ["generator", "discriminator"])
def test_a_loss_that_is_nan_names_its_player(tmp_path, monkeypatch, player, precision):
    model = small_gan(use_ema=False)
    spoil_loss(monkeypatch, model, player)
    with pytest.raises(UserError, match=f"^the loss is not finite at step 0, batch 0: the {player}'s; the last good"):
        scaled_trainer(tmp_path, precision, callbacks=[NaNGuard()]).fit(model, loader())


@pytest.mark.parametrize("player", ["generator", "discriminator"])
def test_a_checkpoint_is_not_written_after_a_loss_that_is_nan(player):
    """On a GPU a loss is read late: whoever asks first, the guard or the checkpoint, hears the player's name."""
    model, guard = small_gan(), NaNGuard()
    for ask in (lambda: guard.on_save_checkpoint(None, model, {}), lambda: model.on_save_checkpoint({})):
        model._last_loss = (player, torch.tensor(float("inf")), "step 7, batch 3")
        guard._previous = (torch.tensor(False), 7, 3)
        with pytest.raises(
            UserError, match=f"^the loss is not finite at step 7, batch 3: the {player}'s; the last good"
        ):
            ask()


def test_few_images_warn(tmp_path):
    with pytest.warns(UserWarning, match="16 training images: below 50"):
        trainer(tmp_path, max_steps=1).fit(small_gan(), loader(n=16))


def test_pictures_of_another_shape():
    with pytest.raises(UserError, match="images of 3 x 8 x 8 .* expect 1 x 8 x 8.*data.params.channels"):
        small_gan().generator_loss(batch(channels=3))
    with pytest.raises(UserError, match="images of 1 x 16 x 16"):
        small_gan().generator_loss(batch(size=16))
    with pytest.raises(ValueError, match=r"img_resolution: got \[64, 96\].*data.params.size=64 pictures are cropped"):
        small_gan(size=[64, 96])


def test_without_a_discriminator_it_draws_and_does_not_train(tmp_path):
    shape = {"img_resolution": 8, "img_channels": 1, "z_dim": 8, "channels": 8}
    model = GAN({"target": "ldm.modules.dcgan.DCGANGenerator", "params": shape}).eval()
    assert model.sample(seeds=[1]).shape == (1, 1, 8, 8)
    with pytest.raises(UserError, match="without model.params.discriminator_config"):
        model.discriminator_parameters()
