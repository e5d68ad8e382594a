"""--help answers at once: heavy imports come after parsing."""

import subprocess
import sys

import pytest

from tests.cli.tools import ROOT

SCRIPTS = ["main.py", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "scripts").glob("*.py"))]
SCRIPTS = [s for s in SCRIPTS if s not in ("scripts/__init__.py", "scripts/common.py")]
PROBE = """
import sys, runpy
sys.argv = [{script!r}, "--help"]
try:
    runpy.run_path({script!r}, run_name="__main__")
except SystemExit as e:
    assert not e.code, e.code
heavy = {{"torch", "lightning", "torchvision", "omegaconf", "timm", "transformers", "diffusers"}} & set(sys.modules)
assert not heavy, f"--help imports {{heavy}}"
"""


@pytest.mark.smoke
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_nothing_heavy(script, tmp_path):
    code = PROBE.format(script=str(ROOT / script))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
