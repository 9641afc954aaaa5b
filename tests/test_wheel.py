"""What is built is what runs: a wheel carries the bundled draft, and its demo works away from the source tree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from eyas.serve.recording import PAGE

ROOT = Path(__file__).parent.parent


@pytest.mark.real
def test_a_built_wheel_contains_the_draft_and_runs_the_demo(embedded, tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("eyas-*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(installed)
    assert "eyas/bundled/config.json" in names
    assert "eyas/bundled/training.json" in names
    assert any(name.startswith("eyas/bundled/") and name.endswith(".safetensors") for name in names)
    assert "eyas/lessons/smollm2-135m.safetensors" in names
    assert {f"eyas/serve/page/{name}" for name in PAGE} <= set(names)
    code = "import eyas, sys; assert eyas.__file__.startswith(sys.argv[1]); from eyas.cli import main; sys.exit(main(sys.argv[2:]))"
    demo = ["demo", "--json", "--precision", "fp32", "--tree", "chain:3", "--max-new-tokens", "16"]
    environment = os.environ | {"PYTHONPATH": str(installed)}
    ran = subprocess.run([sys.executable, "-c", code, str(installed), *demo], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)  # one object and nothing else
    assert set(found) == {"same_text", "tau", "ratio", "tokens", "copy"}
    assert found["same_text"] is True and found["tau"] > 1
