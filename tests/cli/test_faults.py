"""Every bad input gets one message that says what to do, and exit code 2; nothing already made is lost."""

import errno
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import checkpoint
from tests.cli.tools import DIGITS, QUICK, config, only_run, run_main


def fails(capsys, *argv, code=2):
    assert run_main(*argv) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert err.count("error: ") == 1
    return err[err.index("error: ") :]


def train(tmp_path, *argv):
    return ["-t", "-b", config(DIGITS), "-l", tmp_path / "logs", "--max_steps", 2, *QUICK, *argv]


def test_no_config(capsys):
    assert "-b" in fails(capsys, "-t")


def test_missing_yaml(capsys):
    message = fails(capsys, "-t", "-b", config("configs/classifier/resnet_digit.yaml"))
    assert "resnet_digit.yaml does not exist" in message and "did you mean" in message


def test_yaml_that_is_none(capsys, tmp_path):
    (tmp_path / "a.yaml").write_text("model: [1, 2\n")
    assert "a.yaml" in fails(capsys, "-t", "-b", tmp_path / "a.yaml")


@pytest.mark.smoke
def test_unknown_parameter_names_key_file_and_neighbour(capsys, tmp_path):
    yaml = tmp_path / "more.yaml"
    yaml.write_text("model:\n  params:\n    optimiser_config: {target: torch.optim.SGD}\n")
    message = fails(capsys, "-t", "-b", config(DIGITS), yaml, "-l", tmp_path)
    assert "model.params.optimiser_config" in message
    assert "did you mean optimizer_config?" in message
    assert str(yaml) in message


def test_unknown_parameter_on_the_command_line(capsys, tmp_path):
    message = fails(capsys, *train(tmp_path, "model.params.network_config.params.widht=2"))
    assert "model.params.network_config.params.widht" in message and "the command line" in message


def test_unknown_section(capsys, tmp_path):
    assert "did you mean model?" in fails(capsys, *train(tmp_path, "modle.params.x=1"))


def test_unknown_key_beside_target(capsys, tmp_path):
    assert "model.parms" in fails(capsys, *train(tmp_path, "model.parms.x=1"))


def test_unknown_target(capsys, tmp_path):
    message = fails(capsys, *train(tmp_path, "model.target=ldm.models.classifier.Clasifier"))
    assert "model.target" in message and "did you mean ldm.models.classifier.Classifier?" in message


@pytest.mark.parametrize(
    "target", ["os.system", "subprocess.run", "torch.hub.load", "builtins.eval", "ldm.util.importlib"]
)
def test_target_outside_the_allow_list(capsys, tmp_path, target):
    message = fails(capsys, *train(tmp_path, f"model.target={target}"))
    assert target in message and "model.target" in message


def test_wrong_type(capsys, tmp_path):
    message = fails(capsys, *train(tmp_path, "data.params.batch_size=many"))
    assert "data.params.batch_size" in message and "'many'" in message and "int" in message


def test_dashes_before_a_config_key(capsys, tmp_path):
    message = fails(capsys, *train(tmp_path, "--model.learning_rate", "0.1"))
    assert "model.learning_rate=0.1" in message


def test_misspelt_flag(capsys, tmp_path):
    assert "did you mean max_steps?" in fails(capsys, *train(tmp_path, "--max_step", "3"))


def test_misspelt_trainer_key(capsys, tmp_path):
    message = fails(capsys, *train(tmp_path, "lightning.trainer.max_stebs=3"))
    assert "lightning.trainer.max_stebs" in message and "max_steps" in message


def test_name_with_resume(capsys, tmp_path):
    assert "--init-from" in fails(capsys, "-t", "-r", tmp_path, "-n", "x")


def test_missing_run(capsys, tmp_path):
    assert "does not exist" in fails(capsys, "-t", "-r", tmp_path / "nowhere")


def test_missing_checkpoint(capsys, tmp_path):
    message = fails(capsys, *train(tmp_path, "--init-from", tmp_path / "no.ckpt"))
    assert "no.ckpt does not exist" in message


def test_checkpoint_of_another_model(capsys, tmp_path):
    torch.save({"state_dict": {f"layer{i}.weight": torch.zeros(2) for i in range(9)}}, tmp_path / "other.ckpt")
    message = fails(capsys, *train(tmp_path, "--init-from", tmp_path / "other.ckpt"))
    assert "9 unexpected (first: layer0.weight, layer1.weight" in message and "missing (first: " in message


def test_resume_from_weights_only(capsys, tmp_path):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/configs").mkdir()
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "run/checkpoints/last.ckpt")
    message = fails(capsys, "-t", "-b", config(DIGITS), "-r", tmp_path / "run")
    assert "--init-from" in message


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-LFS"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
        (b"model:\n  target: x\n", "text file"),
        (b"", "empty"),
        (b"PK\x03\x04" + bytes(range(256)), "damaged"),
    ],
)
def test_what_is_no_checkpoint(capsys, tmp_path, content, word):
    path = tmp_path / "w.ckpt"
    path.write_bytes(content)
    assert word in fails(capsys, *train(tmp_path, "--init-from", path))


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["zip", "old", "pickle"])
def test_a_pickle_that_would_run_code_does_not(capsys, tmp_path, how):
    path, bomb = tmp_path / "w.ckpt", {"state_dict": {"a": torch.zeros(1)}, "x": Bomb(tmp_path / "exploded")}
    if how == "pickle":
        path.write_bytes(pickle.dumps(bomb))
    else:
        torch.save(bomb, path, _use_new_zipfile_serialization=how == "zip")
    assert "mkdir" in fails(capsys, *train(tmp_path, "--init-from", path))
    assert not (tmp_path / "exploded").exists()


def folder(tmp_path, *argv):
    yaml = config("configs/classifier/folder.yaml")
    return [
        "-t",
        "-b",
        yaml,
        "-l",
        tmp_path / "logs",
        "--max_steps",
        2,
        *QUICK,
        f"data.params.root={tmp_path}/images",
        *argv,
    ]


def test_empty_folder(capsys, tmp_path):
    (tmp_path / "images").mkdir()
    assert str(tmp_path / "images") in fails(capsys, *folder(tmp_path))


def test_missing_folder(capsys, tmp_path):
    assert "images" in fails(capsys, *folder(tmp_path))


def test_caption_without_image(capsys, tmp_path):
    (tmp_path / "images").mkdir()
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "images/a.png")
    (tmp_path / "images/metadata.jsonl").write_text('{"file_name": "b.png", "text": "a ship"}\n')
    assert "b.png" in fails(capsys, *folder(tmp_path))


def test_label_out_of_range(capsys, tmp_path):
    message = fails(capsys, *train(tmp_path, "model.params.num_classes=5"))
    assert "label" in message and "5" in message


def test_statistics_of_three_channels_for_grey_pictures(capsys, tmp_path):
    message = fails(capsys, *train(tmp_path, "model.params.normalize=imagenet"))
    assert "model.params.normalize: got means and deviations of 3 channels for images of 1, expected 1" in message
    assert "normalize=none" in message and "data.params.channels=3" in message


def class_folders(root, **counts):
    """Pictures of 32x32 in folders: `train__cat=3` are three in train/cat."""
    for name, count in counts.items():
        where = root / name.replace("__", "/")
        where.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(where / f"{i}.png")


SLIM = "model.params.network_config.params.width=0.125"


def test_a_class_more_than_the_model_has_is_told_before_training(capsys, tmp_path):
    class_folders(tmp_path / "images", cat=9, dog=9, fox=9)
    message = fails(capsys, *folder(tmp_path, SLIM, "model.params.num_classes=2"))
    assert "label out of range: data.params.train has 3 classes (cat, dog, fox), expected at most 2" in message
    assert "model.params.num_classes" in message


def test_one_class_is_nothing_to_tell_apart(capsys, tmp_path):
    class_folders(tmp_path / "images", cat=9)
    assert "got num_classes=1, expected 2 or more" in fails(capsys, *folder(tmp_path, SLIM))


@pytest.mark.parametrize("where", ["fox", "train__fox"])
def test_an_empty_class_folder(capsys, tmp_path, where):
    split = where.startswith("train")
    filled = [f"{s}{c}" for s in (("train__", "val__") if split else ("",)) for c in ("cat", "dog")]
    class_folders(tmp_path / "images", **dict.fromkeys(filled, 9), **{where: 0})
    message = fails(capsys, *folder(tmp_path, SLIM))
    assert (
        "no pictures in" in message and f"{where.replace('__', '/')}, a folder beside those of the classes" in message
    )


def test_class_folders_that_differ(capsys, tmp_path):
    class_folders(tmp_path / "images", train__cat=9, train__dog=9, val__cat=9, val__fox=9)
    message = fails(capsys, *folder(tmp_path, SLIM))
    assert "the class folders differ: fox in validation but not in train (train has cat, dog)" in message


@pytest.mark.parametrize("others", [("cat", "fox"), ("cat", "dog", "fox"), ("bird", "cat", "dog")])
def test_class_folders_of_two_roots_that_differ(capsys, tmp_path, others):
    class_folders(tmp_path / "a", cat=9, dog=9)
    class_folders(tmp_path / "b", **dict.fromkeys(others, 9))
    roots = ["data.params.root=null", "data.params.test=null"]
    for split, name in (("train", "a"), ("validation", "b")):
        roots += [f"data.params.{split}.params.root={tmp_path / name}", f"data.params.{split}.params.split=all"]
    message = fails(capsys, *folder(tmp_path, SLIM, *roots))
    assert "the class folders differ: data.params.train has cat, dog, data.params.validation has " in message
    assert ", ".join(others) in message


def test_pictures_that_break_amid_an_epoch(capsys, caplog, tmp_path):
    class_folders(tmp_path / "images", train__cat=40, train__dog=40, val__cat=4, val__dog=4)
    broken = sorted((tmp_path / "images/train/dog").glob("*.png"))
    broken[5].write_bytes(broken[5].read_bytes()[:1000])
    late = ["data.params.train.params.cache=false", "data.params.train.params.verify=1"]
    argv = folder(tmp_path, SLIM, *late, "--max_steps", 6)
    assert run_main(*argv) == 0
    assert caplog.text.count("another image takes its place") == 1
    assert f"{broken[5].name} cannot be read any more" in caplog.text
    assert (only_run(tmp_path / "logs") / "checkpoints/last.ckpt").is_file()
    for path in broken:
        path.write_bytes(b"nothing")
    message = fails(capsys, *argv, "data.params.num_workers=1")  # told by the process that reads
    assert message.startswith(f"error: {tmp_path}") and "no picture of a known format" in message
    assert "is the disk still there?" in message and "Traceback" not in message


@pytest.mark.parametrize(
    ("network", "words"),
    [
        ("{target: timm.create_model, params: {model_name: resnet1}}", "Unknown model (resnet1)"),
        ("{target: torchvision.models.alexnet}", "unexpected keyword argument 'in_channels'"),
    ],
)
def test_another_project_s_network_that_refuses_its_params(capsys, tmp_path, network, words):
    message = fails(capsys, *train(tmp_path, f"model.params.network_config={network}"))
    assert "model.params.network_config.target: " in message and "refuses its params" in message and words in message


@pytest.mark.parametrize(
    ("network", "words"),
    [
        ("{target: ldm.modules.classifiers.alexnet.alexnet}", "got images of 32x32, expected at least 63x63"),
        ("{target: ldm.modules.classifiers.vit.vit_ti_16, params: {image_size: 64}}", "32x32, expected 64x64"),
        ("{target: torchvision.models.alexnet, params: {}}", "got images of 32x32, expected a size that the network"),
    ],
)
def test_pictures_too_small_for_the_network(capsys, tmp_path, network, words):
    class_folders(tmp_path / "images", cat=9, dog=9)
    argv = folder(tmp_path, f"model.params.network_config={network}")
    if "ldm" in network:
        argv += ["model.params.network_config.params.stem=imagenet"]
    message = fails(capsys, *argv)
    assert words in message and "data.params.size" in message


def test_weights_of_another_number_of_classes(capsys, tmp_path):
    from ldm.modules.classifiers.resnet import resnet18

    class_folders(tmp_path / "images", cat=9, dog=9)
    torch.save(resnet18(5, stem="small", width=0.125).state_dict(), tmp_path / "five.pth")
    argv = folder(tmp_path, SLIM, f"model.params.weights={tmp_path / 'five.pth'}", "--max_steps", 1)
    assert "is for 5 classes, the model has 2 (fc.weight, fc.bias): set model.params.allow_head=true" in fails(
        capsys, *argv
    )
    assert run_main(*argv, "--allow-head") == 0
    assert "fresh: fc.weight, fc.bias" in capsys.readouterr().err


def test_nan_loss_stops_and_keeps_the_good_checkpoint(capsys, tmp_path):
    assert run_main(*train(tmp_path, "--no-test")) == 0
    run = only_run(tmp_path / "logs")
    good = (run / "checkpoints/last.ckpt").read_bytes()
    message = fails(capsys, "-t", "-r", run, "--max_steps", 6, "model.learning_rate=1e30", "--no-test")
    assert "not finite at step" in message and "batch" in message
    assert (run / "checkpoints/last.ckpt").read_bytes() == good


def test_full_disk_keeps_the_last_good_file(capsys, tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    checkpoint.save_atomic({"a": torch.ones(3)}, path)
    good = path.read_bytes()

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save_atomic({"a": torch.zeros(3)}, path)
    assert path.read_bytes() == good
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
    assert "No space left" in fails(capsys, *train(tmp_path), code=1)


def test_no_test_set_is_one_line(capsys, tmp_path):
    assert run_main(*train(tmp_path, "data.params.test=null")) == 0
    assert (only_run(tmp_path / "logs") / "checkpoints/last.ckpt").is_file()


def test_monitor_that_is_never_logged(capsys, tmp_path):
    every = ["lightning.trainer.val_check_interval=2", "lightning.trainer.check_val_every_n_epoch=null"]
    message = fails(capsys, *train(tmp_path, "model.params.monitor=val/lss", *every))
    assert "val/lss" in message and "did you mean val/loss?" in message
    assert (only_run(tmp_path / "logs") / "checkpoints/last.ckpt").is_file()


def test_no_validation_set_keeps_the_last_checkpoint(tmp_path):
    assert run_main(*train(tmp_path, "data.params.validation=null", "--no-test")) == 0
    assert (only_run(tmp_path / "logs") / "checkpoints/last.ckpt").is_file()


def test_test_only_without_weights(capsys, tmp_path):
    assert "-r" in fails(capsys, "-b", config(DIGITS), "-l", tmp_path)


def test_the_platform_has_no_such_signal(monkeypatch, tmp_path):
    import signal

    from ldm.callbacks import RunDirectory, Signals

    monkeypatch.delattr(signal, "SIGUSR1")
    callback = Signals(RunDirectory(tmp_path, "now", "", ""))
    before = signal.getsignal(signal.SIGINT)
    callback.on_train_start(None, None)
    assert signal.getsignal(signal.SIGINT) != before
    callback.teardown(None, None, "fit")
    assert signal.getsignal(signal.SIGINT) == before


def test_windows_paths(tmp_path):
    from pathlib import PureWindowsPath

    from ldm.config import Merged

    merged = Merged()
    merged.add_dotlist([r"data.params.root=C:\Users\me\pictures"])
    assert PureWindowsPath(merged.config.data.params.root) == PureWindowsPath("C:/Users/me/pictures")
