"""The results table of the README is the one that results/*.json give."""

import json
import shutil

import pytest

from scripts import common, results
from tests.cli.tools import ROOT


def run(monkeypatch, *argv):
    monkeypatch.setattr("sys.argv", ["results.py", *map(str, argv)])
    return common.main(results.build_parser(), results.write)


@pytest.fixture
def copy(tmp_path):
    """A page and a folder of results that a test may change."""
    shutil.copytree(ROOT / "results", tmp_path / "results")
    shutil.copy(ROOT / "README.md", tmp_path / "page.md")
    return tmp_path


def places(folder):
    return "--results", folder / "results", "--page", folder / "page.md"


@pytest.mark.smoke
def test_the_readme_is_up_to_date(monkeypatch):
    assert run(monkeypatch, "--check") == 0, "run `make results`"


@pytest.mark.smoke
def test_every_row_names_a_config_and_a_command_that_runs_it():
    for path in (ROOT / "results").glob("*.json"):
        row = results.read_row(path)
        assert (ROOT / row["config"]).is_file() and row["config"] in row["command"], path


def test_another_number_is_noticed_and_then_written(monkeypatch, copy, capsys):
    path = copy / "results/resnet_digits.json"
    row = json.loads(path.read_text())
    path.write_text(json.dumps({**row, "value": 0.5}))
    assert run(monkeypatch, "--check", *places(copy)) == 2
    assert "make results" in capsys.readouterr().err
    assert run(monkeypatch, *places(copy)) == 0
    page = (copy / "page.md").read_text()
    assert "50.0 % of 360 test pictures are right" in page
    assert page.partition(results.BEGIN)[0] == (ROOT / "README.md").read_text().partition(results.BEGIN)[0]
    assert run(monkeypatch, "--check", *places(copy)) == 0
    path.write_text(json.dumps({**row, "minutes": 7, "cores": 1}))
    assert run(monkeypatch, *places(copy)) == 0
    assert "| 7, on one |" in (copy / "page.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": "high"}, "key value must be"),
        ({"minute": 3}, "unknown key minute (did you mean minutes?)"),
        ({"n": None}, "key n must be"),
        ({"cores": 3}, "key cores must be 1 or 2"),
    ],
)
def test_a_wrong_row_is_named(monkeypatch, copy, capsys, change, message):
    path = copy / "results/resnet_digits.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert run(monkeypatch, *places(copy)) == 2
    error = capsys.readouterr().err
    assert message in error and "resnet_digits.json" in error


def test_broken_json_and_a_page_without_a_place(monkeypatch, copy, capsys):
    (copy / "page.md").write_text("nothing")
    assert run(monkeypatch, *places(copy)) == 2
    assert "has no place for the table" in capsys.readouterr().err
    shutil.copy(ROOT / "README.md", copy / "page.md")
    (copy / "results/resnet_digits.json").write_text("{")
    assert run(monkeypatch, *places(copy)) == 2
    assert "is not valid JSON" in capsys.readouterr().err
