"""What runs PEFT's own tests: the comparison, the stand-ins of the Hub, and one of PEFT's files."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parent))

import run
import stand_ins


def test_differences() -> None:
    passed, failed = {"outcome": "passed", "why": ""}, {"outcome": "failed", "why": "assert 1 == 2"}
    stock = {"same": passed, "broken": passed, "gone": passed, "both fail": failed}
    fused = {"same": passed, "broken": failed, "both fail": failed, "new": passed}
    assert run.differences(stock, fused) == [
        "broken: passed -> failed assert 1 == 2",
        "gone: passed -> absent ",
        "new: absent -> passed ",
    ]


def test_stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "peft-internal-testing/tiny-random-OPTForCausalLM"
    with stand_ins.hub(tmp_path) as address:
        with urllib.request.urlopen(f"{address}/{name}/resolve/main/config.json") as answer:
            assert json.load(answer)["model_type"] == "opt"
        with urllib.request.urlopen(f"{address}/api/models/{name}") as answer:
            assert {"rfilename": "model.safetensors"} in json.load(answer)["siblings"]
        for path in ("nobody/nothing/resolve/main/config.json", f"{name}/resolve/main/absent.bin"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(f"{address}/{path}")


@pytest.mark.slow
def test_one_file() -> None:
    """Where ``make peft-tests`` has brought the files."""
    folder = run.ROOT / "build" / "peft-tests"
    if not folder.exists():
        pytest.skip("make peft-tests fetches PEFT's tests")
    command = [sys.executable, str(run.HERE / "run.py"), "--file", "test_lorafa.py", "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 differ" in done.stdout
