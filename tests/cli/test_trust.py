"""A class of one's own package is trained, and its checkpoint is read by the scripts: each asks for --trust."""

import sys

import pytest

from ldm import util
from scripts import evaluate, sample
from tests.cli.gan_runs import call, gan_run

PACKAGE = "my_networks"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package outside the project with one class, not yet allowed."""
    (tmp_path / "code" / PACKAGE).mkdir(parents=True)
    code = "from ldm.models.gan import GAN\n\n\nclass Mine(GAN):\n    pass\n"
    (tmp_path / "code" / PACKAGE / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path / "code")
    monkeypatch.setattr(util, "ALLOWED_PACKAGES", set(util.ALLOWED_PACKAGES))
    yield PACKAGE
    sys.modules.pop(PACKAGE, None)


def test_a_run_of_ones_own_class_is_sampled_and_evaluated_where_its_package_is_trusted(
    package, tmp_path, capsys, monkeypatch
):
    allowed = set(util.ALLOWED_PACKAGES)
    run = gan_run(tmp_path / "logs", f"model.target={package}.Mine", "--trust", package)
    draw = ["-r", run, "-n", 2, "--outdir", tmp_path / "pictures"]

    monkeypatch.setattr(util, "ALLOWED_PACKAGES", set(allowed))
    assert call(sample, sample.draw, *draw) == 2
    assert f"pass --trust {package}" in capsys.readouterr().err
    assert call(sample, sample.draw, *draw, "--trust", package) == 0
    assert list((tmp_path / "pictures").rglob("*.png"))

    monkeypatch.setattr(util, "ALLOWED_PACKAGES", set(allowed))
    measure = ["-r", run, "-n", 16, "--metrics", "fid", "--outdir", tmp_path / "metrics"]
    assert call(evaluate, evaluate.measure, *measure) == 2
    assert f"pass --trust {package}" in capsys.readouterr().err
    assert call(evaluate, evaluate.measure, *measure, "--trust", package) == 0
