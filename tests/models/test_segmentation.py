"""The Segmenter: loss and mIoU against their definitions, and ENet trained from a folder."""

import json

import pytest
import torch
import torch.nn.functional as F

from ldm.models.segmentation import Segmenter, coloured
from ldm.util import UserError
from tests.cli.tools import QUICK, config, only_run, run_main
from tests.data.scenes import make_scenes

ENET = {"target": "ldm.modules.classifiers.enet.enet", "params": {"width": 0.5, "stem": "small"}}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def batch(classes=4):
    g = torch.Generator().manual_seed(0)
    mask = torch.randint(classes, (3, 16, 16), generator=g)
    mask[:, :4] = 255
    return {"image": torch.rand(3, 16, 16, 3, generator=g) * 2 - 1, "mask": mask}


def test_loss_leaves_out_what_does_not_count():
    model, b = Segmenter(ENET, 4).eval(), batch()
    loss, logs = model.loss(b)
    logits = model(model.get_input(b, "image"))
    assert logits.shape == (3, 4, 16, 16)
    counted, labels = logits[:, :, 4:], b["mask"][:, 4:]
    torch.testing.assert_close(loss, F.cross_entropy(counted, labels))
    torch.testing.assert_close(logs["acc"], (counted.argmax(1) == labels).float().mean())


def test_miou_is_the_mean_of_intersection_over_union():
    model, b = Segmenter(ENET, 4).eval(), batch()
    b["mask"][b["mask"] == 3] = 2
    predicted = model.predict(model.get_input(b, "image"))
    for metric in (*model.scores["val"].values(), model.confusion["val"]):
        metric.update(predicted, b["mask"])
    counts, p = b["mask"] != 255, predicted.argmax(1)
    ious = {}
    for c in range(4):
        union = (((p == c) | (b["mask"] == c)) & counts).sum()
        if union:
            ious[str(c)] = float(((p == c) & (b["mask"] == c) & counts).sum() / union)
    assert float(model.scores["val"]["miou"].compute()) == pytest.approx(sum(ious.values()) / len(ious))
    report = model.per_class(model.confusion["val"].compute())["iou"]
    assert {k: v for k, v in report.items() if v is not None} == pytest.approx(ious, abs=1e-5)


def test_faults():
    model, b = Segmenter(ENET, 2), batch()
    with pytest.raises(UserError, match=r"label out of range: image 0 of the batch has class [23], expected 0 to 1"):
        model.check_batch(b)
    with pytest.raises(ValueError, match="got augment_config, which changes images but not their masks"):
        Segmenter(ENET, 2, augment_config=[{"target": "torchvision.transforms.v2.RandAugment"}])
    with pytest.raises(ValueError, match="expected none for segmentation"):
        Segmenter(ENET, 2, test_views="flip")


def test_colours_and_pictures():
    labels = torch.tensor([[[0, 1], [2, 255]]])
    x = coloured(labels, 3)
    assert x.shape == (1, 3, 2, 2) and torch.equal(x[0, :, 1, 1], -torch.ones(3))
    assert len({tuple(x[0, :, i, j].tolist()) for i in (0, 1) for j in (0, 1)}) == 4
    shown = Segmenter(ENET, 4).eval().log_images(batch(), 2)
    assert {k: v.shape for k, v in shown.items()} == dict.fromkeys(("inputs", "masks", "predictions"), (2, 3, 128, 128))


def test_enet_learns_from_a_folder(tmp_path):
    make_scenes(tmp_path / "data", 24, size=(32, 32))
    argv = ["-t", "-b", config("configs/segmentation/enet.yaml"), f"data.params.root={tmp_path / 'data'}", *QUICK]
    argv += ["data.params.size=32", "data.params.batch_size=8", "model.params.network_config.params.stem=small"]
    argv += ["model.params.scheduler_config.params.warm_up_steps=3", "-l", tmp_path / "logs", "--max_epochs", 20]
    argv += ["--check_val_every_n_epoch", 20, "lightning.callbacks.image_logger.params.batch_frequency=1000"]
    assert run_main(*argv) == 0
    run = only_run(tmp_path / "logs")
    report = json.loads((run / "report_val.json").read_text())["raw"]
    assert report["miou"] > 0.6 and set(report["iou"]) == {"ground", "red box", "blue box"}
    assert list((run / "images/val").glob("predictions_*.png"))
