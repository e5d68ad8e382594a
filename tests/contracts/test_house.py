"""The plan of the house: who imports whom, how long files and functions are, what both install files name."""

import ast
import re
from pathlib import Path

import pytest
import yaml

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings tomli
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([ROOT / "main.py", *(ROOT / "ldm").rglob("*.py"), *(ROOT / "scripts").glob("*.py")])
# layer (longest prefix wins) -> packages that it must not import
FORBIDDEN = {
    "ldm/diffusion": ("lightning", "omegaconf", "ldm.models", "ldm.modules", "ldm.data", "torchvision"),
    "ldm/modules": ("lightning", "omegaconf", "ldm.models", "ldm.data", "ldm.diffusion"),
    "ldm/models": ("ldm.data", "ldm.evaluation", "ldm.editing", "ldm.webui", "scripts", "main"),
    "ldm/data": ("ldm.models", "ldm.modules", "ldm.diffusion", "scripts", "main"),
    "ldm/util.py": ("lightning", "omegaconf", "ldm.models", "ldm.modules", "ldm.data"),
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.smoke
@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_go_down(path):
    name = str(path.relative_to(ROOT))
    for layer, forbidden in FORBIDDEN.items():
        if name.startswith(layer):
            wrong = [i for i in imports(path) for f in forbidden if i == f or i.startswith(f + ".")]
            assert not wrong, f"{name} is in {layer} and must not import {wrong}"


@pytest.mark.smoke
@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_is_read_in_one_sitting(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 450
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno + 1 <= 60, f"{path.name}:{node.lineno} {node.name}"


@pytest.mark.smoke
def test_no_device_and_no_free_unpickling_in_the_package():
    wrong = re.compile(r"\.cuda\(|torch\.load\((?!.*weights_only=True)|pickle\.load|cpp_extension\.load|import pudb")
    for path in SOURCES:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert not wrong.search(line), f"{path}:{number} {line}"


@pytest.mark.smoke
def test_environment_yaml_names_what_pyproject_names():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    environment = yaml.safe_load((ROOT / "environment.yaml").read_text())
    pip = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    wanted = {*project["dependencies"], *project["optional-dependencies"]["test"], "-e ."}
    assert set(pip) == wanted
    assert f"python{project['requires-python']}" in environment["dependencies"]
    assert environment["name"] == "ldm"


@pytest.mark.smoke
def test_no_git_urls_and_a_lower_bound_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [d for group in project["optional-dependencies"].values() for d in group]
    for dependency in project["dependencies"] + extras:
        assert re.fullmatch(r"[a-zA-Z0-9_.-]+(\[[a-z,]+\])?>=[0-9.]+", dependency) or dependency.startswith("ldm["), (
            dependency
        )
