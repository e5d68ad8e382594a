import logging
import warnings

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import get_worker_info

from ldm.data.base import Txt2ImgIterableBaseDataset
from ldm.data.datamodule import DataModuleFromConfig
from ldm.util import ConfigError, UserError, instantiate_from_config, trust
from tests.data.pictures import fill, metadata

trust(["tests"])
DIGITS = "ldm.data.builtin.Digits"
FOLDER = "ldm.data.image.ImageFolder"


def digits(split, **params):
    return {"target": DIGITS, "params": {"split": split, **params}}


def module(**params):
    both = {"train": digits("train"), "validation": digits("validation")}
    return DataModuleFromConfig(**{"batch_size": 32, "seed": 3, **both, **params})


class Mine:
    """A user's own data set by the official contract; takes no root."""

    def __init__(self, size=8, n=10):
        self.size, self.n = size, n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return {"image": np.full((self.size, self.size, 3), i / 10, np.float32), "class_label": i}


class Stream(Txt2ImgIterableBaseDataset):
    def __init__(self):
        super().__init__(num_records=8, valid_ids=list(range(8)))

    def __iter__(self):
        worker = get_worker_info()
        return iter(
            {"image": torch.zeros(4, 4, 3), "id": i, "worker": worker.id if worker else -1} for i in self.sample_ids
        )


# --- loaders ---


def test_official_target_and_loaders():
    data = instantiate_from_config(
        {"target": "main.DataModuleFromConfig", "params": {"batch_size": 32, "wrap": True, "train": digits("train")}}
    )
    assert isinstance(data, DataModuleFromConfig)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (32, 16, 16, 1) and batch["class_label"].shape == (32,)
    assert not data.has_validation and not data.has_test


def test_each_epoch_sees_every_image_once():
    loader = module().train_dataloader()
    labels = torch.cat([b["class_label"] for b in loader])
    assert len(labels) == len(loader.dataset) and len(loader) == -(-len(labels) // 32)
    assert labels.bincount().tolist() == loader.dataset.dataset.labels.bincount().tolist()
    assert len(module(drop_last=True).train_dataloader()) == len(labels) // 32


def test_training_is_shuffled_and_evaluation_is_not():
    data = module(test=digits("test"), predict=digits("all"))
    data.setup()
    for name, split in (("val", "validation"), ("test", "test"), ("predict", "predict")):
        loader = getattr(data, f"{name}_dataloader")()
        assert torch.equal(torch.cat([b["class_label"] for b in loader]), data.datasets[split].labels)
    train = torch.cat([b["class_label"] for b in data.train_dataloader()])
    assert not torch.equal(train, data.datasets["train"].labels)
    other = module(test=digits("test"), shuffle_test_loader=True, shuffle_val_dataloader=True)
    other.setup()
    for name, split in (("val", "validation"), ("test", "test")):
        labels = torch.cat([b["class_label"] for b in getattr(other, f"{name}_dataloader")()])
        assert not torch.equal(labels, other.datasets[split].labels)


def test_one_seed_one_order():
    a, b, c = (torch.cat([x["class_label"] for x in module(seed=s).train_dataloader()]) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_users_own_data_set_and_what_it_tells():
    data = DataModuleFromConfig(4, train={"target": f"{__name__}.Mine", "params": {"n": 10}}, num_workers=0)
    batches = list(data.train_dataloader())
    assert sorted(torch.cat([b["class_label"] for b in batches]).tolist()) == list(range(10))
    assert batches[0]["image"].shape == (4, 8, 8, 3) and batches[0]["image"].dtype == torch.float32
    assert (data.size, data.channels, data.num_classes, data.class_names) == (8, 3, None, None)


def test_properties_come_from_the_data():
    data = module(size=[16, 24], channels=3)
    assert (data.size, data.channels, data.num_classes, data.class_names[3]) == ([16, 24], 3, 10, "3")
    only_test = DataModuleFromConfig(4, test=digits("test", size=32))
    assert (only_test.size, only_test.channels) == (32, 1)


def test_worker_count_is_chosen(tmp_path, monkeypatch):
    import ldm.data.datamodule as datamodule

    monkeypatch.setattr(datamodule, "available_cpus", lambda: 2)
    fill(tmp_path, 4)
    folder = {"target": FOLDER, "params": {"size": 8, "cache": False, "root": str(tmp_path)}}
    assert module().train_dataloader().num_workers == 0
    loader = DataModuleFromConfig(2, train=folder).train_dataloader()
    assert loader.num_workers == 2 and loader.persistent_workers and not loader.pin_memory
    assert DataModuleFromConfig(2, train=folder, num_workers=1).train_dataloader().num_workers == 1


def test_streams_are_split_among_the_workers():
    data = DataModuleFromConfig(1, train={"target": f"{__name__}.Stream"}, num_workers=2, use_worker_init_fn=True)
    seen = [(int(b["id"]), int(b["worker"])) for b in data.train_dataloader()]
    assert sorted(seen) == [(i, i // 4) for i in range(8)]


# --- root, size, channels ---


def test_root_takes_the_place_of_any_data_set(tmp_path, caplog):
    for name in ("cat", "dog"):
        fill(tmp_path / name, 10)
    for config, shape in (
        (digits("train", size=16), (16, 16, 1)),
        ({"target": "ldm.data.vision.CIFAR10", "params": {"split": "train"}}, (32, 32, 3)),
        ({"target": "ldm.data.vision.MNIST", "params": {"split": "train", "size": 32}}, (32, 32, 1)),
        ({"target": "ldm.data.imagenet.ImageNetTrain", "params": {"config": {"size": 24}}}, (24, 24, 3)),
        ({"target": "ldm.data.lsun.LSUNBedroomsTrain", "params": {"size": 24, "flip_p": 0.0}}, (24, 24, 3)),
        ({"target": "ldm.data.filelist.FullOpenImagesTrain", "params": {"size": 32, "crop_size": 24}}, (24, 24, 3)),
        ({"target": f"{__name__}.Mine", "params": {}}, (8, 8, 3)),
    ):
        held = {**config, "params": {**config["params"]}}
        with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
            caplog.clear()
            data = DataModuleFromConfig(4, train=config, validation=held, root=str(tmp_path))
            batch = next(iter(data.train_dataloader()))
        assert batch["image"].shape == (4, *shape), config
        assert data.num_classes == 2 and data.class_names == ["cat", "dog"]
        data.setup("validate")
        names = [set(data.datasets[s].entries.names) for s in ("train", "validation")]
        assert not names[0] & names[1] and len(names[0] | names[1]) == 20
        lines = [r.getMessage() for r in caplog.records if "take the place of" in r.getMessage()]
        assert len(lines) == 1 and config["target"].rpartition(".")[2] in lines[0]


def test_root_is_handed_to_data_sets_that_take_it(tmp_path):
    fill(tmp_path, 12)
    pairs = {"target": "ldm.data.imagenet.ImageNetSRTrain", "params": {"size": 16, "degradation": "pil_nearest"}}
    batch = next(iter(DataModuleFromConfig(4, train=pairs, root=str(tmp_path)).train_dataloader()))
    assert batch["LR_image"].shape == (4, 4, 4, 3)
    folder = {"target": FOLDER, "params": {"split": "train", "flip_p": 0.5}}
    data = DataModuleFromConfig(4, train=folder, root=str(tmp_path), size=24, channels=1)
    assert next(iter(data.train_dataloader()))["image"].shape == (4, 24, 24, 1)
    assert data.datasets["train"].flip_p == 0.5


def test_a_data_sets_own_settings_win():
    data = module(train=digits("train", size=32), size=16)
    assert data.size == 32 and next(iter(data.val_dataloader()))["image"].shape[1] == 16


def test_root_without_test_folder_leaves_testing_out(tmp_path):
    fill(tmp_path, 12)
    data = module(test=digits("test"), root=str(tmp_path))
    assert data.has_test
    data.setup("test")
    assert not data.has_test
    for part in ("train", "test"):
        fill(tmp_path / "b" / part, 3)
    data = module(test=digits("test"), root=str(tmp_path / "b"))
    data.setup("test")
    assert data.has_test and len(data.datasets["test"]) == 3


# --- faults ---


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"batch_size": 0}, UserError, "batch_size must be at least 1"),
        ({"num_workers": -1}, UserError, "num_workers must be 0 or more"),
        ({"train": None, "validation": None}, UserError, "names no data set"),
        ({"train": {"params": {}}}, UserError, "data.params.train must be a mapping with target"),
        ({"train": digits("train", sise=16)}, ConfigError, r"unknown key sise \(did you mean size\?\)"),
        ({"train": {"target": "ldm.data.builtin.Digit"}}, ConfigError, "did you mean ldm.data.builtin.Digits"),
        ({"train": {"target": f"{__name__}.Mine", "params": {"n": 0}}}, UserError, "data.params.train .* is empty"),
        ({"root": "/nowhere"}, UserError, "there is no folder or zip /nowhere"),
        ({"train": {"target": FOLDER, "params": {}}}, ConfigError, "missing key root"),
    ],
)
def test_faults(params, error, message):
    with pytest.raises(error, match=message):
        module(**params).setup("fit")


# --- resume: the batches are those of the uninterrupted run ---


class Watch(pl.LightningModule):
    """Remembers what it saw."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, _):
        self.seen.append(batch["image"].clone())
        return self.w * batch["image"].mean()

    def validation_step(self, batch, _):
        return None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class SaveAt(pl.Callback):
    def __init__(self, path, step, hook):
        self.path, self.step = path, step
        setattr(self, hook, self.save)

    def save(self, trainer, model, *args):
        if trainer.global_step >= self.step and not self.path.exists() and not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)
            self.count = len(model.seen)


def fit(checkpoint=None, callbacks=(), workers=0, **limits):
    model = Watch()
    split = digits("validation", flip_p=0.5, pad_crop=2)  # 9 batches of 20
    data = DataModuleFromConfig(20, train=split, validation=digits("validation"), num_workers=workers, seed=3)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            accelerator="cpu",
            num_sanity_val_steps=0,
            callbacks=list(callbacks),
            use_distributed_sampler=False,
            **quiet,
            **limits,
        )
        trainer.fit(model, data, ckpt_path=checkpoint)
    return model.seen


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def straight():
    return fit(max_steps=25)


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end", "on_train_epoch_end"])
@pytest.mark.parametrize("step", [4, 9, 13])
def test_resume_from_anywhere(tmp_path, straight, hook, step):
    save = SaveAt(tmp_path / "x.ckpt", step, hook)
    assert same(fit(callbacks=[save], max_steps=25), straight)
    assert same(fit(tmp_path / "x.ckpt", max_steps=25), straight[save.count :])


@pytest.mark.parametrize("step", [5, 9, 13])
def test_a_run_stopped_by_max_steps_goes_on_where_it_stopped(tmp_path, straight, step):
    first = fit(callbacks=[SaveAt(tmp_path / "a.ckpt", step, "on_train_end")], max_steps=step)
    second = fit(tmp_path / "a.ckpt", [SaveAt(tmp_path / "b.ckpt", 20, "on_train_end")], max_steps=20)
    third = fit(tmp_path / "b.ckpt", max_steps=25)
    assert [len(first), len(second), len(third)] == [step, 20 - step, 5]
    assert same(first + second + third, straight)


def test_workers_change_nothing_and_resume_with_them(tmp_path, straight):
    save = SaveAt(tmp_path / "x.ckpt", 13, "on_train_batch_end")
    assert same(fit(callbacks=[save], workers=2, max_steps=25), straight)
    assert same(fit(tmp_path / "x.ckpt", workers=2, max_steps=25), straight[13:])


def test_runs_limited_by_epochs(tmp_path, straight):
    save = SaveAt(tmp_path / "x.ckpt", 13, "on_train_batch_end")
    whole = fit(callbacks=[save], max_epochs=2)
    assert same(whole, straight[:18])
    assert same(fit(tmp_path / "x.ckpt", max_epochs=2), straight[13:18])
    # stopped within an epoch by max_steps, then limited by epochs: Lightning starts a whole new one
    fit(callbacks=[SaveAt(tmp_path / "y.ckpt", 5, "on_train_end")], max_steps=5)
    assert same(fit(tmp_path / "y.ckpt", max_epochs=2), straight[9:18])


def test_the_seed_of_the_run_comes_back(tmp_path, straight):
    fit(callbacks=[SaveAt(tmp_path / "x.ckpt", 4, "on_train_batch_end")], max_steps=4)
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)["DataModuleFromConfig"]
    assert (state["epoch"], state["batch"], state["seed"]) == (0, 4, 3)
    data = module(seed=99)
    data.load_state_dict(state)
    assert data.seed == 3 and data.position() == (0, 4)


def test_a_shuffled_epoch_is_not_the_last_one_again(straight):
    assert not any(torch.equal(a, b) for a in straight[:8] for b in straight[9:17])


def test_trains_on_images_that_several_workers_read(tmp_path):
    fill(tmp_path, 12)
    metadata(tmp_path, [{"file_name": f"{i:04d}.png", "text": f"no {i}"} for i in range(12)])
    folder = {"target": FOLDER, "params": {"size": 8, "cache": False, "random_crop": True, "root": str(tmp_path)}}
    read = [list(DataModuleFromConfig(5, train=folder, num_workers=n, seed=1).train_dataloader()) for n in (0, 2)]
    for a, b in zip(*read, strict=True):
        assert torch.equal(a["image"], b["image"]) and a["caption"] == b["caption"]
