"""Checks of conditioners against the key lists and norm lists of whole official models."""

from pathlib import Path

from torch import nn

from tests.reference import compare

FIXTURES = Path(__file__).parents[1] / "reference" / "fixtures"


def check_norms(module: nn.Module, norms: dict, prefix: str = "") -> None:
    """Every listed norm and dropout is there with its epsilon or rate, and no other one is."""
    have = {}
    for name, m in module.named_modules():
        if isinstance(m, nn.LayerNorm):
            have[prefix + name] = ["LayerNorm", m.eps]
        elif isinstance(m, nn.Dropout):
            have[prefix + name] = ["Dropout", m.p]
    assert have == {k: v for k, v in norms.items() if k.startswith(prefix)}


def check_official(module: nn.Module, name: str, prefix: str) -> None:
    """State-dict keys, shapes, dtypes and norms equal those under `prefix` in fixtures/keys_<name>.json."""
    fx = compare.load(FIXTURES / f"keys_{name}.json")
    want = {k: v for k, v in fx["keys"].items() if k.startswith(prefix)}
    state = {prefix + k: v for k, v in module.state_dict().items()}
    assert {k: list(v.shape) for k, v in state.items()} == want
    for key, dtype in fx["dtypes"].items():
        if key.startswith(prefix):
            assert str(state[key].dtype) == f"torch.{dtype}"
    check_norms(module, fx["norms"], prefix)
