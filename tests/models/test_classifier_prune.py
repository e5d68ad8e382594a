"""The Classifier's prune_config: InfoBatch leaves easy images out of a batch."""

import pytest
import torch
import torch.nn.functional as F

from ldm.models.segmentation import IGNORE, Segmenter
from ldm.modules.classifiers.prune import InfoBatch
from ldm.util import UserError
from tests.cli.tools import ROOT, run_main
from tests.models.test_classifier import GOOGLENET, Pictures, batch, classifier, fit
from tests.models.test_classifier_options import train

PRUNE = {"target": "ldm.modules.classifiers.prune.InfoBatch", "params": {"easy": 0.5, "keep": 0.5, "until": 0.5}}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


class Indexed(Pictures):
    def __getitem__(self, i):
        return {**super().__getitem__(i), "index": i}


def known(losses, **options):
    prune = InfoBatch(**options)
    prune.losses = torch.tensor(losses)
    return prune


def test_hard_images_stay_and_easy_ones_are_drawn_and_count_for_those_left_out():
    losses = [0.1, 3.0, 0.2, 2.0, 0.3, 0.4, 0.5, 4.0, 0.6]
    prune = known(losses, easy=2 / 3, keep=0.5)
    b = {"index": torch.arange(9), "image": torch.arange(9) * 10, "relpath": [f"{i}.png" for i in range(9)], "note": 1}
    counts = torch.zeros(9)
    for _ in range(400):
        chosen = prune.choose(b, 0.0)
        index = chosen["index"]
        assert torch.equal(chosen["image"], index * 10) and chosen["note"] == 1
        assert chosen["relpath"] == [f"{i}.png" for i in index.tolist()]
        assert dict(zip(index.tolist(), chosen["weight"].tolist(), strict=True)).items() >= {1: 1, 3: 1, 7: 1}.items()
        assert chosen["weight"].sum() == 9 and len(index) == 6
        counts.index_add_(0, index, chosen["weight"])
    assert (counts[[1, 3, 7]] == 400).all()
    assert ((counts - 400).abs() < 80).all()  # four standard deviations of 2 * Binomial(400, 1/2)


def test_the_mean_of_the_batch_is_kept_on_average():
    losses = torch.linspace(0.0, 2.0, 8) ** 3
    prune, means = known(losses.tolist(), easy=0.5, keep=0.5), []
    for _ in range(500):
        chosen = prune.choose({"index": torch.arange(8)}, 0.0)
        means.append(prune.mean(losses[chosen["index"]], chosen))
    means = torch.stack(means)
    assert means.std() > 0.01
    assert abs(means.mean() - losses.mean()) < 4 * means.std() / 500**0.5


def test_nothing_is_left_out_near_the_end():
    prune = known([0.0] * 6, until=0.8)
    assert len(prune.choose({"index": torch.arange(6)}, 0.79)["index"]) == 4
    chosen = prune.choose({"index": torch.arange(6)}, 0.8)
    assert sorted(chosen["index"].tolist()) == [0, 1, 2, 3, 4, 5] and (chosen["weight"] == 1).all()


def test_images_not_seen_yet_are_hard_and_losses_are_kept_with_the_run():
    prune = known([0.5, 0.1], easy=0.5, keep=0.1)
    chosen = prune.choose({"index": torch.tensor([0, 3, 1, 2])}, 0.0)
    assert set(chosen["index"].tolist()) >= {2, 3} and len(chosen["index"]) == 3
    prune.mean(torch.tensor([1.0, 2.0, 3.0]), {"index": torch.tensor([3, 0, 2]), "weight": torch.ones(3)})
    other = InfoBatch()
    other.load_state_dict(prune.state_dict())
    torch.testing.assert_close(other.losses, torch.tensor([2.0, 0.1, 3.0, 1.0]))


@pytest.mark.parametrize("wrong", [{"easy": 0.0}, {"easy": 1.0}, {"keep": 0}, {"keep": 1.5}, {"until": -0.1}])
def test_shares_out_of_range(wrong):
    with pytest.raises(ValueError, match=f"got {next(iter(wrong))}="):
        InfoBatch(**wrong)


def test_model_trains_on_what_is_left():
    model, sizes = classifier(prune_config=PRUNE, label_smoothing=0.1), []
    model.model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])) if module.training else None)
    fit(model, steps=8, data=Indexed())
    assert sizes == [6, 6, 6, 2, 8, 8, 8, 3]
    assert torch.isfinite(model.prune.losses).sum() == 27


def test_loss_is_that_of_the_chosen_and_the_last_outputs_losses_are_remembered():
    model = classifier(network=GOOGLENET, prune_config=PRUNE, label_smoothing=0.2)
    outs = []
    model.model.register_forward_hook(lambda module, args, out: outs.append(out))
    model.prune.choose = lambda b, progress: {**b, "weight": torch.tensor([3.0, 1.0, 1.0, 1.0, 1.0, 1.0])}
    model.prune.losses = torch.zeros(6)
    model._trainer = type("T", (), {"estimated_stepping_batches": 10, "global_step": 0})()
    b = {**batch(6, size=32), "index": torch.arange(6)}
    loss, _ = model.loss(b)
    logits, aux = model._split(outs[0])
    each = [F.cross_entropy(a, b["class_label"], label_smoothing=0.2, reduction="none") for a in (logits, *aux)]
    weight = torch.tensor([3.0, 1, 1, 1, 1, 1]) / 8
    expected = (each[0] * weight).sum() + 0.3 * sum((e * weight).sum() for e in each[1:])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(model.prune.losses, each[0].detach())


def test_loss_of_each_picture_of_a_segmentation_counts_its_pixels():
    model = Segmenter.__new__(Segmenter)
    torch.nn.Module.__init__(model)
    model.class_weights = None
    logits, labels = torch.randn(2, 3, 4, 4), torch.randint(3, (2, 4, 4))
    labels[0, :3] = IGNORE
    each = model.cross_entropy(logits, labels, reduction="none")
    expected = [model.cross_entropy(logits[i : i + 1], labels[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(each, torch.stack(expected))


def test_data_that_do_not_say_which_images_they_give():
    with pytest.raises(UserError, match=r"prune_config .* gives only \['class_label', 'image'\].*'index'"):
        fit(classifier(prune_config=PRUNE), steps=1, data=Pictures())


def test_option_file_and_going_on(tmp_path):
    run = train(tmp_path, ROOT / "configs/classifier/options/prune.yaml")
    first = losses_of(run)
    assert 0 < torch.isfinite(first).sum() < len(first)
    assert run_main("-t", "-r", run, "--max_steps", 6, "--no-test") == 0
    later = losses_of(run)
    assert torch.isfinite(later).sum() > torch.isfinite(first).sum()
    same = torch.isfinite(first)
    assert (later[: len(first)][same] == first[same]).any()


def losses_of(run):
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]["prune._extra_state"]
