"""Two processes on the CPU (gloo) train what one process with the same global batch trains."""

import torch

from tests.cli.tools import DIGITS, config, finish, only_run, start

VIT = "{target: ldm.modules.classifiers.vit.VisionTransformer, params: {dim: 32, depth: 2, heads: 2, patch_size: 4, "
VIT += "image_size: 16, num_classes: 10, in_channels: 1}}"


def train(tmp_path, name, devices, batch):
    """Three SGD steps of a network without batch statistics or randomness: only the split over processes differs."""
    yaml = tmp_path / f"{name}.yaml"
    yaml.write_text(f"model:\n  params:\n    network_config: {VIT}\n    use_ema: false\n    scheduler_config: null\n")
    argv = [
        "-t",
        "-b",
        config(DIGITS),
        yaml,
        "-l",
        tmp_path / name,
        "--max_steps",
        3,
        "--no-test",
        "--accelerator",
        "cpu",
    ]
    argv += [f"data.params.batch_size={batch}", "data.params.num_workers=0", "--devices", devices]
    argv += ["--strategy", "ddp"] if devices > 1 else []
    returned, out = finish(start("main.py", *argv))
    assert returned == 0, out
    content = torch.load(only_run(tmp_path / name) / "checkpoints/last.ckpt", weights_only=True)
    assert content["global_step"] == 3
    return content["state_dict"]


def test_two_processes_do_what_one_does(tmp_path):
    two, one = train(tmp_path, "two", 2, 32), train(tmp_path, "one", 1, 64)
    assert len(list((tmp_path / "two").iterdir())) == 1  # the second process makes no directory of its own
    assert two.keys() == one.keys()
    for key, value in one.items():
        assert torch.allclose(two[key], value, atol=1e-5), key


def test_the_comparison_would_notice(tmp_path):
    """Another batch size gives weights that are far from equal, so that the tolerance above means something."""
    small, large = train(tmp_path, "small", 1, 32), train(tmp_path, "large", 1, 64)
    assert not all(torch.allclose(small[key], large[key], atol=1e-3) for key in small)
