"""Compile every launch of the Triton backend for a GPU that need not be there, and print a JSON line for each.

    python aot.py 9.0 bfloat16 float16

The host functions run on CPU tensors as they are; a launch compiles its kernel down to machine code instead of
running it. So what is compiled is what a GPU would get: the same types, constants, divisibility and tiles.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import unittest.mock
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora import kernels
from fastlora.activation import ACTIVATIONS
from fastlora.dropout import Dropout
from fastlora.int8 import Int8Matrix
from fastlora.kernels import columns, config, cross_entropy, gated, launch, norm, rotary, split, stacked
from fastlora.kernels.dequantize import dequantize_merged, dequantize_pair, dequantize_stacked
from fastlora.kernels.epilogue import finish
from fastlora.kernels.gemm import gemm, projecting_gemm, projects
from fastlora.kernels.lora import Gradients
from fastlora.nf4 import NF4Weight

_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "launch_pdl", "launch_cooperative_grid")
_POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
_POINTERS |= {torch.int8: "*i8", torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64"}


def specialize(fn: Any, arguments: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """(signature, constants, attributes) of a call, as Triton's own launcher derives them."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for i, p in enumerate(fn.params):
        value = arguments[p.name]
        if p.is_constexpr or value is None or (type(value) is int and value == 1 and not p.do_not_specialize):
            signature[p.name], constants[p.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[p.name] = _POINTERS[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            signature[p.name] = f"tensordesc<{_POINTERS[value.base.dtype][1:]}{value.block_shape}>"
        elif isinstance(value, float):
            signature[p.name] = "fp32"
        else:
            signature[p.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not p.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


class Compiler:
    """Stands in for ``JITFunction.run``."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.device = config.Device(capability, 132)
        self.target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
        self.case = ""
        self.done: set[str] = set()

    def __call__(self, fn: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        arguments = dict(zip(fn.arg_names, args, strict=False)) | kwargs
        signature, constants, attributes = specialize(fn, arguments)
        key = repr((fn.__name__, signature, sorted(constants.items()), attributes, options))
        if key in self.done:
            return
        self.done.add(key)
        source = ASTSource(fn, signature, constants, attributes)
        compiled = triton.compile(source, target=self.target, options=options)
        record = {
            "kernel": fn.__name__,
            "case": self.case,
            "cubin": len(compiled.asm["cubin"]),
            "shared": compiled.metadata.shared,
            "shared_limit": self.device.shared_memory,
            "fused": compiled.asm["ptx"].count("fma.rn.f32"),
            "target": f"sm_{self.target.arch}" in compiled.asm["ptx"],
        }
        print(json.dumps(record), flush=True)


def decoding(compiler: Compiler, dtype: torch.dtype, *, thorough: bool) -> None:
    """One forward, backward and dequantization of every kind of weight, rank and range of M."""
    cases: list[tuple[int, int, int, int, str, float]] = [
        # M, N, K, R, weight, dropout
        (300, 256, 512, 16, "nested", 0.1),
        (1, 256, 512, 3, "flat", 0.0),
        (40, 65, 33, 200, "nested", 0.1),
    ]
    if thorough:
        cases += [(300, 256, 512, 64, "dense", 0.0), (300, 256, 512, 0, "flat", 0.0), (300, 256, 96, 8, "nested", 0.0)]
    for m, n, k, r, kind, p in cases:
        compiler.case = f"{m}x{n}x{k} r={r} {kind} p={p} {dtype}"
        w: Any = torch.randn(n, k).to(dtype)
        if kind != "dense":
            w = NF4Weight.quantize(w, nested=kind == "nested")
            kernels.dequantize(w, dtype)
            kernels.dequantize(w, dtype, torch.empty(n, 2 * k, dtype=dtype)[:, :k])
            dequantize_stacked([w, w, w], dtype)
            dequantize_merged(w, torch.randn(r or 1, k), torch.randn(n, r or 1), 0.5, dtype)
        x, dy, bias = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype), torch.randn(n)
        a, b = (torch.randn(r, k), torch.randn(n, r)) if r else (None, None)
        dropout = Dropout(p, torch.tensor([1])) if p else None
        _, u = kernels.forward(x, w, a, b, bias, 0.5, dropout)
        kernels.backward(dy, x, u, w, a, b, 0.5, dropout)
        kernels.backward(dy, x, u, w, a, b, 0.5, dropout, (False, True, False))


def buffered(compiler: Compiler, dtype: torch.dtype, *, thorough: bool) -> None:
    """The kernels beside and instead of library products, for every choice of tiles and type of result."""
    for m, n, k, r in [(300, 512, 256, 0), (300, 512, 256, 16), (300, 520, 264, 24), (300, 512, 256, 1024)]:
        w, dy, x = (torch.empty(shape, dtype=dtype) for shape in ((n, k), (m, n), (m, k)))
        narrow, b, a = (torch.empty(shape, dtype=dtype) for shape in ((m, r), (n, r), (r, k)))
        factors, bias = ((narrow, b, a) if r else (None, None, None)), torch.empty(n)
        for out_dtype in (dtype, torch.float32):
            compiler.case = f"buffered {m}x{n}x{k} r={r} {dtype} to {out_dtype}"
            if compiler.device.capability >= (9, 0):
                gemm(x, w, factors[0], factors[1], bias, transposed=True, out_dtype=out_dtype)
            if r:
                sums, adapter = torch.empty(m, n), b.float() if thorough else b
                finish(sums, narrow, adapter, bias, 0.5, out_dtype)
                finish(sums[:16], narrow[:16], b, None, 0.5, out_dtype)
        if compiler.device.capability >= (9, 0):
            compiler.case = f"buffered {m}x{n}x{k} r={r} {dtype}, dx"
            gemm(dy, w, factors[0], factors[2], transposed=False)
            if r:
                Gradients(dy, narrow, x, a, b).run(narrow, 0.5, None, overlap=True)
            if projects(r, x, w, b, a) and projects(r, dy, w, b, a):
                done = torch.zeros(1, dtype=torch.int32)
                projecting_gemm(x, w, a, b, bias, 0.5, done, transposed=True)
                projecting_gemm(dy, w, b, a, None, 0.5, done, transposed=False, overlap=True)
            if thorough:
                gemm(x, w, factors[0], factors[1], transposed=True)


def few_rows(compiler: Compiler, dtype: torch.dtype, *, thorough: bool) -> None:
    """The products whose reduced side is split, for every range of rows, in both directions."""
    cases: list[tuple[int, int, str, str, float]] = [
        # M, R, quant_type, statistics, dropout
        (1, 16, "nf4", "nested", 0.0),
        (20, 70, "fp4", "flat", 0.1),
        (50, 0, "nf4", "flat", 0.0),
        (100, 3, "nf4", "nested", 0.1),
    ]
    n, k = 1024, 512
    for m, r, quant_type, kind, p in cases:
        x, dy, bias = torch.empty(m, k, dtype=dtype), torch.empty(m, n, dtype=dtype), torch.empty(n)
        a, b = (torch.empty(r, k), torch.empty(n, r, dtype=dtype)) if r else (None, None)
        w = NF4Weight.quantize(torch.zeros(n, k), quant_type=quant_type, nested=kind == "nested")
        dropout = Dropout(p, torch.tensor([1])) if p else None
        for permute in (True, False) if thorough else (True,):
            compiler.case = f"few rows {m}x{n}x{k} r={r} {quant_type} {kind} p={p} {dtype} permute={permute}"
            wanted = dataclasses.replace(
                config.split_product(m, n, k, r, compiler.device, transposed=True), permute=permute
            )
            with unittest.mock.patch.object(config, "split_product", lambda *args, wanted=wanted, **kwargs: wanted):
                split.linear(x, w, a, b, bias, 0.5, dropout, torch.float32 if p else None)
        compiler.case += ", dx"
        split.input_gradient(dy, w, a, b, 0.5, dropout)


def packed_adapters(compiler: Compiler, dtype: torch.dtype) -> None:
    """Adapters in 8 bits and NF4: decoded, and read by the product of few rows."""
    for n, k, r in [(512, 256, 16), (512, 256, 5)]:
        a, b = torch.ones(r, k), torch.ones(n, r)
        pairs = [(Int8Matrix.quantize(t), NF4Weight.quantize(t, nested=False)) for t in (a, b)]
        compiler.case = f"packed adapters {n}x{k} r={r} {dtype}"
        for of_a in pairs[0]:
            for of_b in pairs[1]:
                dequantize_pair(of_a, of_b, dtype)
        if dtype != torch.float32:
            w = NF4Weight.quantize(torch.ones(n, k))
            for m in (3, 64):
                split.linear(torch.empty(m, k, dtype=dtype), w, pairs[0][0], pairs[1][0], None, 0.5, None)


def blocks(compiler: Compiler, dtype: torch.dtype) -> None:
    """Projections of one x, and the gated activation."""
    k, m = 512, 300
    x = torch.empty(m, k, dtype=dtype)
    for sizes, r, adapter_dtype in (((512, 256), 16, torch.float32), ((512, 72, 40), 24, dtype), ((512,), 130, dtype)):
        compiler.case = f"stacked {sizes} r={r} {dtype}"
        weights = [NF4Weight.quantize(torch.zeros(n, k)) for n in sizes]
        lora_a = [torch.empty(r, k, dtype=adapter_dtype) for _ in sizes]
        lora_b = [torch.empty(n, r, dtype=adapter_dtype) for n in sizes]
        adapters = stacked.Adapters([w.shape for w in weights], lora_a, lora_b, [0.5] * len(sizes), x)
        u = stacked.project(x, adapters)
        dys = [torch.empty(m, n, dtype=dtype) for n in sizes]
        dy, du = stacked.project_gradients(dys, adapters, dtype)
        stacked.project_gradients(dy.split(sizes, 1), adapters, dtype)
        stacked.gradients(dy, u, x, du, adapters, adapter_dtype, adapter_dtype)
        if compiler.device.capability >= (9, 0):
            stacked.forward(x, weights, adapters, [None] * len(sizes))
            stacked.input_gradient(dy, du, weights, adapters)
    both, dh = torch.empty(m, 2 * k, dtype=dtype), torch.empty(m, k, dtype=dtype)
    gate, up = both.chunk(2, 1)
    for activation in ACTIVATIONS:
        compiler.case = f"{activation} {dtype}"
        gated.forward(gate, up, activation)
        gated.backward(gate, up, dh, activation, in_place=True)
        for r, rd, kinds in ((16, 16, (torch.float32,) * 2), (32, 32, (dtype, dtype))):
            u, du = torch.empty(m, 2 * r, dtype=dtype), torch.empty(m, rd, dtype=dtype)
            gated.gradients(gate, up, dh, activation, u, (0.5, 0.5), du, kinds, in_place=True)


def columns_of(compiler: Compiler, dtype: torch.dtype) -> None:
    """What DoRA adds to a layer."""
    for m, n, r in [(300, 512, 16), (3, 70, 5)]:
        compiler.case = f"columns {m}x{n} r={r} {dtype}"
        z, gain = torch.empty(m, n, dtype=dtype), torch.empty(n)
        for bias, rest in ((None, None), (gain.to(dtype), None), (gain, z)):
            columns.scaled(z, gain, bias, rest)
        for given, need_dz in ((z, True), (None, True), (z, False)):
            columns.scaled_gradients(z, given, gain, None, need_dz)
        columns.scaled_gradients(z, z, gain, gain.to(dtype), True)
        b = torch.empty(n, r, dtype=dtype)
        columns.row_norm(torch.empty(r, n), torch.empty(r, r), b, gain, gain.to(dtype), 0.5)
        columns.finished(torch.empty(9, n), gain, dtype, gain, b)
        columns.finished(torch.empty(9, n), gain, torch.float32)
    if dtype == torch.float32:
        return
    for n, r, nested, kind in ((14336, 16, True, torch.float32), (64, 5, False, dtype), (4096, 64, True, dtype)):
        compiler.case = f"folded {n} r={r} {dtype}"
        w = NF4Weight.quantize(torch.ones(n, 128), nested=nested)
        a, b, gain = torch.empty(r, 128, dtype=kind), torch.empty(n, r, dtype=kind), torch.empty(n)
        columns.folded(w, a, b, gain, gain, 0.5, dtype, 2.0**-60)


def loss_of(compiler: Compiler, dtype: torch.dtype) -> None:
    """The cross-entropy of logits."""
    logits, labels = torch.empty(3, 32000, dtype=dtype), torch.zeros(3, dtype=torch.long)
    losses, scale = torch.empty(3), torch.ones(())
    for softcap, smoothing, gradient in ((None, 0.0, True), (30.0, 0.1, True), (None, 0.0, False)):
        compiler.case = f"loss {softcap} {smoothing} {dtype}"
        cross_entropy.cross_entropy(
            logits,
            labels,
            losses,
            scale,
            ignore_index=-100,
            label_smoothing=smoothing,
            softcap=softcap,
            gradient=gradient,
        )
    cross_entropy.rescale(logits, scale)


def stream(compiler: Compiler, dtype: torch.dtype) -> None:
    """The norms of rows, with and without a sum, and the rotary embedding."""
    for k in (4096, 3584, 72):
        compiler.case = f"norm {k} {dtype}"
        x, weight, rstd = torch.empty(3, k, dtype=dtype), torch.empty(k, dtype=dtype), torch.empty(3)
        for other in (None, x):
            norm.forward(x, other, weight, 1e-5, 0.0)
            norm.backward(x, other, x, weight, rstd, 0.0)
    compiler.case = f"norm of heads {dtype}"
    heads, weight = torch.empty(3, 48, 128, dtype=dtype)[:, :32], torch.empty(128, dtype=dtype)
    norm.forward(heads, None, weight, 1e-5, 0.0)
    norm.backward(torch.empty(3, 32, 128, dtype=dtype), None, heads, weight, torch.empty(96), 0.0)
    q, k, cos = (torch.empty(1, heads, 3, 128, dtype=dtype) for heads in (32, 8, 1))
    for inverse in (False, True):
        compiler.case = f"rotary {inverse} {dtype}"
        rotary.rotate(q, k, cos[0], cos[0], inverse=inverse)


def main(capability: str, *dtypes: str) -> None:
    major, minor = capability.split(".")
    compiler = Compiler((int(major), int(minor)))
    JITFunction.run = lambda fn, *args, **kwargs: compiler(fn, *args, **kwargs)
    config.Device.of = classmethod(lambda cls, device: compiler.device)
    for module in (
        "dequantize",
        "forward",
        "backward",
        "lora",
        "gemm",
        "epilogue",
        "split",
        "stacked",
        "gated",
        "columns",
        "cross_entropy",
        "norm",
        "rotary",
    ):
        sys.modules[f"fastlora.kernels.{module}"].on_device = lambda t: contextlib.nullcontext()
    assert not launch.interpreted()
    for i, name in enumerate(dtypes):
        dtype = getattr(torch, name)
        decoding(compiler, dtype, thorough=i == 0)
        columns_of(compiler, dtype)
        loss_of(compiler, dtype)
        stream(compiler, dtype)
        if dtype != torch.float32:
            buffered(compiler, dtype, thorough=i == 0)
            few_rows(compiler, dtype, thorough=i == 0)
            blocks(compiler, dtype)
        packed_adapters(compiler, dtype)


if __name__ == "__main__":
    main(*sys.argv[1:])
