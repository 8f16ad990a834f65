"""The Triton backend: ``dequantize``, ``forward`` and ``backward`` with the signatures of ``fastlora.reference``.

Importing this package needs Triton. It runs on CUDA tensors, and on CPU tensors in Triton's interpreter
(TRITON_INTERPRET=1 in the environment before the first import).
"""

from fastlora.kernels.backward import backward
from fastlora.kernels.dequantize import dequantize
from fastlora.kernels.forward import forward
from fastlora.kernels.launch import interpreted

__all__ = ["backward", "dequantize", "forward", "interpreted"]
