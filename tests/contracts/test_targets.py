"""Every old name leads to something that is there, and takes the parameters that the official YAMLs give it."""

import importlib
import json

import pytest

from ldm.legacy import TARGETS
from ldm.util import ConfigError, accepted_params, check_params, get_obj_from_str, trust
from tests.reference import FIXTURES

CONFIGS = json.loads((FIXTURES.parent / "official_configs.json").read_text())
# names in fixtures that describe a group of functions, not one target
GROUPS = {"functions", "samplers", "torch_utils.ops"}


def nodes(tree):
    if isinstance(tree, dict):
        if isinstance(tree.get("target"), str):
            yield tree["target"], tree.get("params") or {}
        for value in tree.values():
            yield from nodes(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from nodes(value)


@pytest.mark.parametrize("name", TARGETS)
def test_the_row_leads_somewhere(name):
    assert get_obj_from_str(name) is get_obj_from_str(TARGETS[name])


def named_in_yaml():
    found = {}
    for path, tree in CONFIGS.items():
        for target, params in nodes(tree):
            found.setdefault((target, tuple(sorted(params))), (path, params))
    return [(target, *rest) for (target, _), rest in found.items()]


@pytest.mark.parametrize(("target", "path", "params"), named_in_yaml(), ids=lambda v: v if isinstance(v, str) else "")
def test_official_yaml_targets_resolve_and_bind(target, path, params):
    cls = get_obj_from_str(target)
    accepted = accepted_params(cls)
    assert accepted is None or set(params) <= set(accepted), (
        f"{path}: {target} does not take {set(params) - set(accepted)}"
    )


@pytest.mark.parametrize("fixture", sorted(p.name for p in FIXTURES.glob("*.json")))
def test_targets_of_the_fixtures_resolve(fixture):
    target = json.loads((FIXTURES / fixture).read_text())["target"]
    if target in GROUPS or "{" in target or " / " in target:
        return
    if target == "ldm.lr_scheduler":
        assert importlib.import_module(target)
        return
    assert get_obj_from_str(target)


@pytest.mark.smoke
def test_allow_list(monkeypatch):
    import ldm.util

    monkeypatch.setattr(ldm.util, "ALLOWED_PACKAGES", set(ldm.util.ALLOWED_PACKAGES))
    with pytest.raises(ConfigError, match="--trust decimal"):
        get_obj_from_str("decimal.Decimal")
    trust(["decimal"])
    assert get_obj_from_str("decimal.Decimal")


@pytest.mark.parametrize(
    "target",
    ["ldm.util.np", "ldm.generate.hashlib", "torch.load", "torch.save", "torch.utils.data.dataset.os", "lightning.os"],
)
def test_no_way_around_the_allow_list(target):
    with pytest.raises(ConfigError):
        get_obj_from_str(target)


def test_kwargs_are_followed_to_the_bases():
    class Base:
        def __init__(self, a: int = 1, b: float | None = None) -> None: ...

    class Sub(Base):
        def __init__(self, c: str = "", **kwargs) -> None: ...

    assert set(accepted_params(Sub)) == {"a", "b", "c"}
    check_params(Sub, "Sub", {"a": 2, "b": 1, "c": "x"})
    for wrong in ({"d": 1}, {"a": "x"}, {"b": True}, {"c": 3}, {"a": None}):
        with pytest.raises(ConfigError):
            check_params(Sub, "Sub", wrong)
