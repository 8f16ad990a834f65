"""PEFT's own test files, unmodified, without and with fused layers: ``make peft-tests`` or

    python tests/peft_suite/run.py [--file test_lora_variants.py ...] [--match EXPRESSION] [--folder build/peft-tests]

The files come with the source distribution of the installed PEFT on the package index. Every test runs once as it is
and once with every LoRA layer that PEFT makes fused, and its outcome must be the same. Nothing else is reached by
network: a server on this machine stands in for the Hub (`stand_ins`), and what it does not have fails alike in both.
Exit status 1 when an outcome differs.
"""

from __future__ import annotations

import argparse
import collections
import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

import stand_ins  # noqa: E402

BIG = (
    "config",
    "custom_models",
    "decoder_models",
    "encoder_decoder_models",
    "feature_extraction_models",
    "seq_classifier",
)
"""Files of thousands of tests of every method that PEFT has, of which only those that name LoRA are run by default."""
WHOLE = (
    *("arrow", "bdlora", "helpers", "initialization", "integrations", "lora_conversion", "lora_ga", "lora_intruders"),
    *("lora_variants", "lorafa", "loraplus", "low_level_api", "mixed", "other", "poly", "quantization"),
    *("riemannian_lora", "shadow", "target_parameters", "token_classification_qa", "trainable_tokens", "tuners_utils"),
    *("velora", "xlora"),
)
"""Files with tests of LoRA layers, run whole."""
SETTINGS = """[pytest]
markers =
    single_gpu_tests
    multi_gpu_tests
    regression
    bitsandbytes
"""
Record = dict[str, dict[str, Any]]


def fetch(folder: Path) -> Path:
    """The folder of PEFT's tests: of the release that is installed, unpacked from its source distribution."""
    name = f"peft-{importlib.metadata.version('peft')}"
    tests = folder / name / "tests"
    if not tests.exists():
        folder.mkdir(parents=True, exist_ok=True)
        options = ["--no-binary", ":all:", "--no-deps", "--no-build-isolation", "--dest", str(folder)]
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", name.replace("-", "=="), *options], check=True)
        with tarfile.open(folder / f"{name}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    if not any(tests.glob("test_*.py")):
        raise SystemExit(f"the source distribution of {name} has no tests")
    # The files import one another as a package, whose __init__ the distribution leaves out, as it does the settings.
    (tests / "__init__.py").touch()
    (tests.parent / "pytest.ini").write_text(SETTINGS)
    return tests


def run(tests: Path, file: str, match: str | None, fused: bool, record: Path, endpoint: str, timeout: int) -> Record:
    """Run one file; the outcome of each of its tests."""
    record.parent.mkdir(parents=True, exist_ok=True)
    record.unlink(missing_ok=True)
    path = [str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(part for part in path if part),
        "FASTLORA_SUITE_RECORD": str(record),
        "FASTLORA_SUITE_FUSED": str(int(fused)),
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tests.parents[1] / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "recorder", "-p", "no:cacheprovider", f"--timeout={timeout}"]
    command += ["-k", match] if match else []
    log = record.with_suffix(".log")
    with log.open("w") as output:
        subprocess.run([*command, f"tests/{file}"], cwd=tests.parent, env=environment, stdout=output, stderr=output)
    lines = record.read_text().splitlines() if record.exists() else []
    return {line["test"]: line for line in map(json.loads, lines)}


def differences(stock: Record, fused: Record) -> list[str]:
    """What became of the tests that ended differently."""
    absent = {"outcome": "absent", "why": ""}
    found = []
    for name in dict.fromkeys([*stock, *fused]):
        before, after = stock.get(name, absent), fused.get(name, absent)
        if before["outcome"] != after["outcome"]:
            found.append(f"{name}: {before['outcome']} -> {after['outcome']} {after['why'] or before['why']}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", action="append", help="of PEFT's tests; may be repeated")
    parser.add_argument("--match", help="as pytest's -k; by default 'lora' for the files of thousands of tests")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "peft-tests")
    parser.add_argument("--timeout", type=int, default=300, help="seconds for one test")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    tests = fetch(folder)
    files = arguments.file or [f"test_{name}.py" for name in (*WHOLE, *BIG)]
    failures: list[str] = []
    total: collections.Counter[str] = collections.Counter()
    with stand_ins.hub(folder / "models") as endpoint:
        for file in files:
            big = file.removeprefix("test_").removesuffix(".py") in BIG
            match = arguments.match or ("lora" if big else None)
            records, begin = [], time.monotonic()
            for fused in (False, True):
                record = folder / "records" / f"{Path(file).stem}-{'fused' if fused else 'stock'}.jsonl"
                records.append(run(tests, file, match, fused, record, endpoint, arguments.timeout))
            stock, with_fused = records
            found = differences(stock, with_fused)
            failures += found
            outcomes = collections.Counter(line["outcome"] for line in with_fused.values())
            reached = sum(bool(line.get("fused")) for line in with_fused.values())
            total += outcomes
            total["fused"] += reached
            counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
            print(
                f"{file}: {counts}; {reached} computed by fused layers; {len(found)} differ; "
                f"{time.monotonic() - begin:.0f} s",
                flush=True,
            )
            print("".join(f"  {line}\n" for line in found), end="", flush=True)
    reached = total.pop("fused", 0)
    print(
        f"all: {', '.join(f'{count} {outcome}' for outcome, count in sorted(total.items()))}; "
        f"{reached} computed by fused layers; {len(failures)} differ"
    )
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
