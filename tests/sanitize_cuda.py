"""Every kind of kernel once, on small odd sizes: what compute-sanitizer watches (make sanitize). No test of its own.

A kernel that reads or writes outside of its tensors, or races in shared memory, need not give a wrong result. With
``--races`` the sanitizer looks for the latter, and hazards in kernels of this package count. cuBLAS's, some without a
name, show some, since the sanitizer does not follow barriers between the blocks of a cluster. Nor does it follow bulk
copies that complete on the count of a barrier: where they fill a buffer again, they are left out.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from packed_factors import KINDS, packed_of
from tolerance import Problem, make_problem

from fastlora import kernels, native, tables
from fastlora.kernels import norm


def run(problem: Problem, backend: str, form: str) -> None:
    """Both passes of one problem, by one form of one backend."""
    module = native if backend == "cuda" else kernels
    tables.forced_forms[backend] = form
    try:
        problem.run(module.forward, module.backward)
    finally:
        tables.forced_forms.clear()
    torch.cuda.synchronize()
    print(backend, form, *problem.x.shape, problem.w.shape[0], problem.x.dtype, flush=True)


def run_strips(m: int, r: int, dtype: torch.dtype) -> None:
    """Both directions of the gated activation with what its adapters get, and du and dB, where they are taken."""
    n = 1096
    both, dh = torch.randn(m, 2 * n, device="cuda", dtype=dtype), torch.randn(m, n, device="cuda", dtype=dtype)
    narrow, lora_b = (
        torch.randn(m, 2 * r, device="cuda", dtype=dtype),
        torch.randn(2 * n, 2 * r, device="cuda").to(dtype),
    )
    gate, up = both.chunk(2, 1)
    if not native.gates(gate, up, r):
        return
    native.gated_forward(gate, up, "silu", lora_b.T[:r, :n].contiguous())
    native.gated_gradients(
        gate, up, dh, "silu", narrow, (1.0, 1.0), narrow[:, :r].contiguous(), lora_b, (dtype, dtype), in_place=True
    )
    native.du_db([gate, up], narrow, lora_b, (1.0, 1.0), dtype, torch.empty_like(both))
    torch.cuda.synchronize()
    print("strips", m, n, r, dtype, flush=True)


_HAZARD = re.compile(r"Race reported between .*(?:\n=+ +and .*)+")
_LIBRARY = re.compile(r"access at *(?:$|(?:void )?(?:nvjet|cutlass|cublas|sm\d+_))", re.MULTILINE)


def own_hazards(text: str) -> list[str]:
    """The hazards of a racecheck report that are in no library's kernel."""
    return [found[0] for found in _HAZARD.finditer(text) if not _LIBRARY.search(found[0])]


_FILLED_ONCE = "--filled-once"


def races() -> int:
    """Run this file under racecheck; the exit status."""
    tool = ["compute-sanitizer", "--tool", "racecheck", "--print-limit", "100000"]
    command = [*tool, sys.executable, __file__, _FILLED_ONCE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = own_hazards(done.stdout)
    if "RACECHECK SUMMARY" not in done.stdout or done.returncode:
        print(done.stdout[-2000:], done.stderr[-2000:], sep="\n")
        return 1
    print(*found, f"{len(found)} hazards in kernels of fastlora", sep="\n")
    return 1 if found else 0


def main(filled_once: bool = False) -> None:
    """filled_once: without problems whose bulk copies fill a buffer again."""
    capability = torch.cuda.get_device_capability()
    for dtype, nested, quant_type in ((torch.bfloat16, True, "nf4"), (torch.float16, False, "fp4")):
        for m in (1, 2, 3, 13, 40, 70, 140):
            problem = make_problem(
                m, 136, 320, 8, dtype, nested=nested, quant_type=quant_type, bias=True, device="cuda"
            )
            for form in native.forms(m, 136, 320, 8, 64, capability):
                run(problem, "cuda", form)
            if m <= native.few_rows(capability):
                for kind in KINDS:
                    a, b = packed_of(problem.lora_a, kind), packed_of(problem.lora_b, kind)
                    native.packed_forward(problem.x, problem.w, a, b, problem.bias, problem.scale)
            if m in (3, 140):
                for form in ("split", "persistent", "library", "decode") if m == 3 else ("persistent", "decode"):
                    run(problem, "triton", form)
        # Several slices of a row; shared memory filled more than once.
        for n, k, rank in ((2000, 1088, 40), (136 if filled_once else 2000, 14336, 8)):
            problem = make_problem(2, n, k, rank, dtype, nested=nested, quant_type=quant_type, bias=True, device="cuda")
            run(problem, "cuda", "few_rows")
        if "tile" in native.forms(2300, 1992, 1024, 8, 64, capability):  # enough tiles for those of 256 rows
            problem = make_problem(
                2300, 1992, 1024, 8, dtype, nested=nested, quant_type=quant_type, bias=True, device="cuda"
            )
            run(problem, "cuda", "tile")
        problem = make_problem(
            33, 72, 192, 16, dtype, nested=nested, quant_type=quant_type, dropout_p=0.1, device="cuda"
        )
        run(problem, "triton", "decode")
        for form in native.forms(33, 72, 192, 16, 64, capability):
            run(problem, "cuda", form)
        for m in (20,) if filled_once else (20, 300):
            for r in (16, 32):
                run_strips(m, r, dtype)
        x, weight = torch.randn(5, 1000, device="cuda", dtype=dtype), torch.ones(1000, device="cuda", dtype=dtype)
        for residual in (None, x):
            h, y, rstd = norm.forward(x, residual, weight, 1e-5, 0.0)
            norm.backward(y, residual, h, weight, rstd, 0.0)


if __name__ == "__main__":
    sys.exit(races() if "--races" in sys.argv else main(_FILLED_ONCE in sys.argv))
