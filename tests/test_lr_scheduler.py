"""The official learning-rate lambdas, against the official numbers."""

import pytest

from ldm import lr_scheduler
from tests.reference import FIXTURES, compare

FIXTURE = compare.load(FIXTURES / "lr_schedulers.json")


@pytest.mark.smoke
@pytest.mark.parametrize("name", FIXTURE["params"])
def test_factors_equal_the_official_ones(name):
    scheduler = getattr(lr_scheduler, name)(**FIXTURE["params"][name])
    assert compare.check(FIXTURE, {name: [scheduler.schedule(n) for n in FIXTURE["steps"]]}) == []
    assert scheduler(5) == scheduler.schedule(5)


def test_stable_diffusion_v1():
    scheduler = lr_scheduler.LambdaLinearScheduler([10000], [1.0], [1.0], [1e-6], [10000000000000])
    assert compare.check(FIXTURE, {"sd_v1_linear": [scheduler.schedule(n) for n in FIXTURE["steps_sd_v1"]]}) == []


def test_past_the_last_cycle_the_end_value_stays():
    assert lr_scheduler.LambdaLinearScheduler([0], [0.1], [1.0], [0.0], [10]).schedule(50) == pytest.approx(0.1)


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="f_max: 2"):
        lr_scheduler.LambdaLinearScheduler([1], [0.1], [1.0, 2.0], [0.0], [10])
