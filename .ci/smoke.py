"""A wheel in an environment that holds nothing but its dependencies: run from anywhere but the checkout."""

import sys
from pathlib import Path

import torch

import fastlora
from fastlora import FastLoRALinear, backends, cli, native, reference

assert Path(fastlora.__file__).is_relative_to(sys.prefix), fastlora.__file__
assert cli.main(["info"]) == 0
assert native.available("cpu") is None, native.available("cpu")
assert native.autograd()[1] is None, native.autograd()[1]

torch.manual_seed(0)
for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
    layer = FastLoRALinear(192, 96, r=4, lora_alpha=8, bias=True, init_lora_weights=False, dtype=dtype)
    lora_a, lora_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x, dy = torch.randn(2, 7, 192).to(dtype), torch.randn(2, 7, 96).to(dtype)
    problem = backends.Problem(14, 96, 192, 4, dtype, "cpu")
    assert backends.select(problem).name == "cpu" or torch.cpu._is_amx_tile_supported()
    dense = layer.base_layer.nf4.dequantize(torch.float64)
    rows = (t.detach().double() for t in (x.reshape(14, 192), dense, lora_a, lora_b, layer.base_layer.bias))
    want, u = reference.forward(*rows, layer.scaling["default"], None)
    wide = (t.detach().double() for t in (dy.reshape(14, 96), x.reshape(14, 192), u, dense, lora_a, lora_b))
    gradients = reference.backward(*wide, layer.scaling["default"], None)
    for backend in ("auto", "cpu", "torch"):
        layer.backend = backend
        inputs = x.clone().requires_grad_()
        y = layer(inputs)
        found = (y, *torch.autograd.grad(y, (inputs, lora_a, lora_b), dy))
        for name, got, truth in zip(("y", "dx", "dA", "dB"), found, (want, *gradients), strict=True):
            distance = (got.detach().double().view(truth.shape) - truth).norm() / truth.norm()
            assert distance < error, (backend, dtype, name, float(distance))
print("the wheel works")
