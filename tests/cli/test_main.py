"""main.py as a user types it: run directory, flags, config printing, dry run, learning rate, logs."""

import csv
import re
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml

from tests.cli.tools import DIGITS, QUICK, config, finish, only_run, run_main, start

SLOW = "lightning.trainer.max_steps=100000"


def train(tmp_path, *argv, steps=2):
    argv = [*QUICK, *argv]
    return run_main("-t", "-b", config(DIGITS), "-l", tmp_path / "logs", "--max_steps", steps, "--no-test", *argv)


@pytest.mark.smoke
def test_a_run_leaves_what_the_official_code_leaves(tmp_path):
    assert train(tmp_path, "lightning.callbacks.image_logger.params.batch_frequency=1") == 0
    run = only_run(tmp_path / "logs")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d_resnet_digits", run.name)
    project, lightning = (
        sorted((run / "configs").glob("*-project.yaml")),
        sorted((run / "configs").glob("*-lightning.yaml")),
    )
    assert set(yaml.safe_load(project[0].read_text())) == {"model", "data"}
    assert yaml.safe_load(lightning[0].read_text())["lightning"]["trainer"]["max_steps"] == 2
    names = [p.name for p in (run / "images/train").glob("*.png")]
    assert names and all(re.fullmatch(r".+_gs-\d{6}_e-\d{6}_b-\d{6}\.png", n) for n in names)
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert any(r.get("train/loss") for r in rows)
    assert list((run / "tensorboard").glob("events.*"))
    content = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert yaml.safe_load(content["config"])["model"]["target"] == "ldm.models.classifier.Classifier"
    assert content["global_step"] == 2
    assert content["hyper_parameters"]["num_classes"] == 10


def test_two_runs_of_one_second_do_not_collide(tmp_path):
    from argparse import Namespace

    from ldm.training import name_run

    args = Namespace(name="", base=["a/b.yaml"], logdir=str(tmp_path), postfix="", print_config=False, dry_run=False)
    first, second = name_run(args, "2026-01-01T00-00-00"), name_run(args, "2026-01-01T00-00-00")
    assert first != second and first.is_dir() and second.is_dir()


def test_name_and_postfix(tmp_path):
    assert train(tmp_path, "-n", "mine", "-f", "_x") == 0
    assert only_run(tmp_path / "logs").name.endswith("_mine_x")


def test_print_config_names_the_source_of_each_value(tmp_path, capsys):
    more = tmp_path / "more.yaml"
    more.write_text("data: {params: {batch_size: 8}}\n")
    argv = ["-b", config(DIGITS), more, "--print-config", "model.learning_rate=0.5", "--max_epochs", "3"]
    assert run_main(*argv) == 0
    out = capsys.readouterr().out
    assert f"data.params.batch_size: 8  # {more}" in out
    assert "model.learning_rate: 0.5  # the command line" in out
    assert "lightning.trainer.max_epochs: 3  # the command line" in out
    assert f"model.target: 'ldm.models.classifier.Classifier'  # {config(DIGITS)}" in out
    assert not (tmp_path / "logs").exists()


def test_dry_run_says_the_size_and_writes_nothing(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_main("-t", "-b", config(DIGITS), "--dry-run", *QUICK) == 0
    out = capfd.readouterr().out
    for word in ("parameters", "batch", "image: (16, ", "MiB", "ms a step", "of training"):
        assert word in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "batches"),
    [
        (["-b", config(DIGITS), "--accumulate_grad_batches", 4], 4),
        (["-b", config("configs/gan/wgan_gp_digits.yaml"), "model.params.disc_steps=5"], 5),  # of the critic
    ],
)
def test_a_dry_run_times_whole_steps(argv, batches, capfd, monkeypatch):
    """By a clock that goes on one second with every batch."""
    from ldm import dry_run

    seen = []
    monkeypatch.setattr(dry_run.time, "perf_counter", lambda: float(len(seen)))
    after = dry_run._Clock.on_train_batch_end
    monkeypatch.setattr(dry_run._Clock, "on_train_batch_end", lambda *args: seen.append(0) or after(*args))
    assert run_main("-t", *argv, "--dry-run", *QUICK) == 0
    assert f"; {batches * 1000} ms a step" in capfd.readouterr().out and len(seen) == 3 * batches


def test_base_learning_rate_is_scaled_and_shown_once(tmp_path, capfd):
    argv = ["model.learning_rate=null", "model.base_learning_rate=1e-4", "--accumulate_grad_batches", "2"]
    assert train(tmp_path, *argv) == 0
    text = capfd.readouterr()
    assert (text.out + text.err).count(
        "3.20e-03 = 2 (accumulate_grad_batches) * 1 (gpus) * 16 (batch_size) * 1.00e-04"
    ) == 1
    assert train(tmp_path / "b", *argv, "--scale_lr", "false") == 0
    text = capfd.readouterr()
    assert "learning rate 1.00e-04" in text.out + text.err


def test_old_trainer_keys_are_translated_and_shown(tmp_path, capfd):
    assert train(tmp_path, "lightning.trainer.gpus='0,'", "lightning.trainer.progress_bar_refresh_rate=0") == 0
    text = capfd.readouterr()
    assert (
        "gpus: '0,'" in text.out + text.err
        and "progress_bar_refresh_rate -> enable_progress_bar" in text.out + text.err
    )


def test_init_from_counts_the_tensors_and_starts_at_step_0(tmp_path, capfd):
    assert train(tmp_path) == 0
    run = only_run(tmp_path / "logs")
    assert train(tmp_path / "b", "--init-from", run / "checkpoints/last.ckpt", steps=1) == 0
    text = capfd.readouterr()
    assert re.search(r"loaded (\d+) of \1 tensors", text.out + text.err)
    content = torch.load(only_run(tmp_path / "b/logs") / "checkpoints/last.ckpt", weights_only=True)
    assert content["global_step"] == 1


def test_resume_keeps_the_directory_and_the_rows(tmp_path, capfd):
    assert train(tmp_path) == 0
    run = only_run(tmp_path / "logs")
    assert run_main("-t", "-r", run, "--max_steps", 4, "--no-test") == 0
    text = capfd.readouterr()
    assert "resumed from" in text.out + text.err and "at step 2" in text.out + text.err
    assert only_run(tmp_path / "logs") == run
    steps = [int(r["step"]) for r in csv.DictReader((run / "metrics.csv").open()) if r.get("train/loss")]
    assert steps == sorted(steps) and steps[0] < 2 <= steps[-1]
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 4


def test_test_only(tmp_path, capfd):
    assert train(tmp_path) == 0
    run = only_run(tmp_path / "logs")
    assert run_main("-r", run) == 0
    text = capfd.readouterr()
    assert "test/" in text.out


def test_wandb_offline_by_one_flag(tmp_path):
    assert train(tmp_path, "--wandb", "-p", "course") == 0
    run = only_run(tmp_path / "logs")
    assert list(run.glob("wandb/offline-run-*/*.wandb"))


def test_debug_runs_are_moved_away(tmp_path):
    assert train(tmp_path, "-d") == 0
    assert len(list((tmp_path / "logs/debug_runs").iterdir())) == 1


def test_nothing_is_written_where_the_user_does_not_look(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_main("-t", "-b", config(DIGITS), "--max_steps", 1, "--no-test", *QUICK) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["logs"]


def wait_for_step(run_parent, process, seconds=120):
    """The run directory, once a few steps were logged."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        found = list(Path(run_parent).glob("*/metrics.csv"))
        if found:
            return found[0].parent
        time.sleep(0.1)
    raise AssertionError(process.communicate()[0])


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_saves_and_ends_the_run(tmp_path, name, code):
    argv = ["-t", "-b", config(DIGITS), "-l", tmp_path, SLOW, *QUICK]
    process = start("main.py", *argv)
    run = wait_for_step(tmp_path, process)
    process.send_signal(getattr(signal, name))
    returned, out = finish(process)
    assert returned == code and "Traceback" not in out, out
    assert f"stopped by {name}; go on: python main.py -t -r {run}\n" in out
    step = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert step > 0
    assert run_main("-t", "-r", run, "--max_steps", step + 1, "--no-test") == 0


def test_sigusr1_saves_and_goes_on(tmp_path):
    process = start("main.py", "-t", "-b", config(DIGITS), "-l", tmp_path, SLOW, *QUICK)
    run = wait_for_step(tmp_path, process)
    process.send_signal(signal.SIGUSR1)
    end = time.monotonic() + 60
    while not (run / "checkpoints/last.ckpt").exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert (run / "checkpoints/last.ckpt").is_file()
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 143


def test_overrides_may_stand_anywhere():
    import main

    argv = [
        "-t",
        "-b",
        "a.yaml",
        "x.y=1",
        "--trust",
        "mine",
        "z=2",
        "--no-test",
        "w.v=a=b",
        "-n",
        "k=v",
        "--max_steps",
        "3",
    ]
    rest, overrides = main.take_overrides(argv)
    assert rest == ["-t", "-b", "a.yaml", "--trust", "mine", "--no-test", "-n", "k=v", "--max_steps", "3"]
    assert overrides == ["x.y=1", "z=2", "w.v=a=b"]
