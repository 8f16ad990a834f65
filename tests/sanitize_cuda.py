"""Every kind of kernel once, on small odd sizes: what compute-sanitizer watches (make sanitize). No test of its own.

A kernel that reads or writes outside of its tensors, or races in shared memory, need not give a wrong result.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from tolerance import Problem, make_problem

from fastlora import kernels, native, tables


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


def main() -> None:
    capability = torch.cuda.get_device_capability()
    for dtype, nested, quant_type in ((torch.bfloat16, True, "nf4"), (torch.float16, False, "fp4")):
        for m in (1, 3, 13, 40, 70, 140):
            problem = make_problem(
                m, 136, 320, 8, dtype, nested=nested, quant_type=quant_type, bias=True, device="cuda"
            )
            for form in native.forms(m, 136, 320, 8, 64, capability):
                run(problem, "cuda", form)
            if m in (3, 140):
                for form in ("split", "persistent", "library", "decode") if m == 3 else ("persistent", "decode"):
                    run(problem, "triton", form)
        if "tile" in native.forms(2300, 1992, 1024, 8, 64, capability):  # enough tiles for those of 256 rows
            problem = make_problem(
                2300, 1992, 1024, 8, dtype, nested=nested, quant_type=quant_type, bias=True, device="cuda"
            )
            run(problem, "cuda", "tile")
        problem = make_problem(
            33, 72, 192, 16, dtype, nested=nested, quant_type=quant_type, dropout_p=0.1, device="cuda"
        )
        run(problem, "triton", "decode")


if __name__ == "__main__":
    main()
