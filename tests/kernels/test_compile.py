"""Every kernel compiles to machine code for the GPUs that the project names, with no GPU at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {
    "dequantize_kernel", "dequantize_words_kernel", "project_kernel", "linear_kernel", "input_gradient_kernel",
    "gradient_kernel", "gradients_kernel", "add_parts_kernel", "dequantize_stacked_kernel", "dequantize_pair_kernel",
    "merged_kernel", "scaled_kernel", "scaled_gradients_kernel", "row_norm_kernel", "finished_kernel",
    "cross_entropy_kernel", "rescale_kernel", "norm_kernel", "norm_backward_kernel", "rotary_kernel",
}  # fmt: skip
NARROW = {
    "partial_kernel", "finish_kernel", "epilogue_kernel", "folded_kernel", "pack_kernel", "project_stacked_kernel",
    "gradients_stacked_kernel", "gated_kernel", "gated_backward_kernel", "gated_gradients_kernel",
}  # fmt: skip
"""Those in 16 bits alone; from compute capability 9.0 on there is one more of them, and on 9.x another one."""


def compile_all(capability: str, dtype: str, cache: Path) -> list[dict[str, Any]]:
    """The records of ``aot.py``, run where Triton compiles."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": path}
    command = [sys.executable, str(Path(__file__).with_name("aot.py")), capability, dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ("9.0", "bfloat16"),
        ("8.0", "float16"),
        *(
            pytest.param(capability, dtype, marks=pytest.mark.slow)
            for capability, dtype in (
                # The 16-bit types differ in one word of the instructions, so a generation compiles one of them.
                ("9.0", "float32"), ("8.0", "float32"), ("8.6", "bfloat16"), ("8.9", "bfloat16"), ("10.0", "bfloat16"),
            )
        ),
    ],
)  # fmt: skip
def test_every_kernel_compiles(capability: str, dtype: str, request: pytest.FixtureRequest) -> None:
    # Triton's cache is keyed by the source of the kernels: kept between runs, it makes the second one short.
    cache = request.config.cache
    assert cache is not None
    records = compile_all(capability, dtype, cache.mkdir("triton"))
    kernels, new = set(KERNELS), float(capability) >= 9
    if not new:
        kernels |= {"du_db_kernel"}
    if dtype != "float32":
        kernels |= NARROW | ({"gemm_kernel"} if new else set())
        kernels |= {"projecting_gemm_kernel"} if capability == "9.0" else set()
    assert {record["kernel"] for record in records} == kernels
    for record in records:
        assert record["target"], record
        assert record["cubin"] > 0, record
        assert record["shared"] <= record["shared_limit"], record
        if record["kernel"] in ("dequantize_kernel", "dequantize_words_kernel", "dequantize_pair_kernel"):
            assert record["fused"] == 0, "a fused multiply-add changes the bits of nested statistics"
