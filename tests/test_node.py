"""The autograd node in C++: taken where it applies, declined elsewhere, and the same as the node in Python."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import FastLoRALinear, NF4Weight, backends, lora_linear, native, node, ops
from fastlora.dropout import Dropout, draw_seed
from fastlora.linear import NF4Linear

pytestmark = pytest.mark.skipif(
    native.autograd()[0] is None or native.available("cpu") is not None,
    reason=f"the node: {native.autograd()[1]}; the extension: {native.available('cpu')}",
)

M, N, K, R = 6, 32, 64, 4
NAME = "LoraLinearBackward"


def random(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()


def weight(device: str = "cpu", **kwargs: Any) -> NF4Weight:
    return NF4Weight.quantize(random(N, K).detach().to(device) / 8, **kwargs)


def operands(dtype: torch.dtype = torch.float32, adapter: torch.dtype | None = None, device: str = "cpu") -> list[Any]:
    """x, lora_a, lora_b and bias, all of them to be learned."""
    kinds = (dtype, adapter or dtype, adapter or dtype, dtype)
    shapes = ((M, K), (R, K), (N, R), (N,))
    return [random(*shape, dtype=kind, device=device) for shape, kind in zip(shapes, kinds, strict=True)]


def is_taken(y: torch.Tensor) -> bool:
    return y.grad_fn is not None and y.grad_fn.name() == NAME


def in_python(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(node, "call", lambda *args, **kwargs: None)
        return call()


DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float16),
    (torch.float32, torch.bfloat16),
]


@pytest.mark.parametrize(("dtype", "adapter"), DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("shape", [(M, K), (K,), (2, 3, K), (1, 2, 3, K)], ids=str)
@pytest.mark.parametrize("kind", [{}, {"nested": False, "quant_type": "fp4", "blocksize": 128}], ids=["nf4", "fp4"])
def test_results_and_gradients_are_those_of_the_node_in_python(
    dtype: torch.dtype, adapter: torch.dtype, shape: tuple[int, ...], kind: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    w = weight(**kind)
    _, a, b, bias = operands(dtype, adapter)
    x = random(*shape, dtype=dtype)
    for out_dtype in (None, torch.float32):

        def run(out_dtype: torch.dtype | None = out_dtype) -> tuple[torch.Tensor, ...]:
            y = lora_linear(x, w, a, b, bias, scale=0.5, out_dtype=out_dtype)
            return (y, *torch.autograd.grad(y, (x, a, b, bias), torch.ones_like(y).mul_(0.25)))

        found, wanted = run(), in_python(monkeypatch, run)
        assert is_taken(found[0])
        assert not is_taken(wanted[0])
        for got, want in zip(found, wanted, strict=True):
            assert got.dtype == want.dtype
            assert got.shape == want.shape
            assert torch.equal(got, want)


@pytest.mark.parametrize("p", [0.1, 0.5, 1, 1.0])
@pytest.mark.parametrize(("dtype", "adapter"), DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_dropout_is_that_of_the_node_in_python(
    dtype: torch.dtype, adapter: torch.dtype, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, (_, a, b, bias) = weight(), operands(dtype, adapter)
    x = random(2, 3, K, dtype=dtype)

    def run() -> tuple[torch.Tensor, ...]:
        torch.manual_seed(11)
        first, second = (lora_linear(x, w, a, b, bias, scale=0.5, dropout_p=p) for _ in range(2))
        dy = torch.ones_like(first)
        return (
            first, second, *torch.autograd.grad(first, (x, a, b, bias), dy),
            *torch.autograd.grad(second, (x, a, b, bias), dy), torch.get_rng_state(),
        )  # fmt: skip

    found, wanted = run(), in_python(monkeypatch, run)
    assert is_taken(found[0])
    assert not is_taken(wanted[0])
    assert torch.equal(found[0], found[1]) == (p == 1)
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


def test_the_mask_of_a_seed_is_that_of_the_definition() -> None:
    # A is the unit matrix and W zero: y counts what is kept, dx holds the mask.
    w, x = NF4Weight.quantize(torch.zeros(8, K)), torch.ones(200, K, requires_grad=True)
    a, b = torch.eye(K), torch.ones(8, K)
    torch.manual_seed(3)
    seed = draw_seed(x.device)
    after = torch.get_rng_state()
    for p in (0.1, 0.75):
        mask = Dropout(p, seed).apply(torch.ones(200, K))
        torch.manual_seed(3)
        y = lora_linear(x, w, a, b, dropout_p=p)
        assert torch.equal(after, torch.get_rng_state())
        (dx,) = torch.autograd.grad(y[:, 0].sum(), x)
        assert is_taken(y)
        assert torch.equal(dx, mask)
        torch.testing.assert_close(y[:, 0], mask.sum(1))
        kept = int((dx != 0).sum()), 200 * K * (1 - p)
        assert abs(kept[0] - kept[1]) < 5 * (kept[1] * p) ** 0.5


def test_dropout_out_of_range_and_without_adapters() -> None:
    w, (x, a, b, bias) = weight(), operands()
    for p in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"dropout_p must lie in \[0, 1\]"):
            lora_linear(x, w, a, b, bias, dropout_p=p)
    state = torch.get_rng_state()
    assert is_taken(lora_linear(x, w, None, None, bias, dropout_p=0.5))
    assert not is_taken(lora_linear(x, w, a, b, bias, dropout_p=0.0, backend="torch"))
    assert torch.equal(state, torch.get_rng_state())


def test_layers_reach_the_node_with_dropout() -> None:
    x = random(2, 3, K)
    layer = FastLoRALinear(K, N, r=R, lora_dropout=0.5, init_lora_weights=False, dtype=torch.float32)
    y = layer(x)
    assert is_taken(y)
    assert not torch.equal(y, layer(x))
    layer.eval()
    assert is_taken(layer(x))
    assert torch.equal(layer(x), layer(x))


def test_converted_layers_reach_the_node_with_dropout() -> None:
    peft, bnb = pytest.importorskip("peft"), pytest.importorskip("bitsandbytes")
    base = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    base.weight = weight().to_bitsandbytes()
    base.support_avx512bf16_for_cpu = False
    config = peft.LoraConfig(r=R, lora_alpha=R, lora_dropout=0.5, init_lora_weights=False)
    stock = peft.tuners.lora.Linear4bit(base, "default", config=config, r=R, lora_alpha=R)
    model = torch.nn.ModuleDict({"layer": stock})
    fastlora.accelerate(model)
    x = random(2, 3, K)
    assert is_taken(model["layer"](x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert is_taken(model["layer"](x))
    assert is_taken(model.eval()["layer"](x))


@pytest.mark.parametrize("needed", range(1, 16))
def test_every_set_of_gradients(needed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    w, given = weight(), operands()
    for i, t in enumerate(given):
        t.requires_grad_(bool(needed >> i & 1))
    leaves = [t for t in given if t.requires_grad]

    def run(p: float = 0.0) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(4)
        y = lora_linear(given[0], w, *given[1:], dropout_p=p)
        assert is_taken(y) == (node.call is real)
        return torch.autograd.grad(y, leaves, y.detach())

    real = node.call
    for p in (0.0, 0.3):
        for got, want in zip(run(p), in_python(monkeypatch, lambda p=p: run(p)), strict=True):
            assert torch.equal(got, want)
    # A part of them is asked for: the rest is not computed, and the graph holds what is left to compute.
    y = lora_linear(given[0], w, *given[1:])
    for leaf, want in zip(leaves, run(), strict=True):
        (got,) = torch.autograd.grad(y, leaf, y.detach(), retain_graph=True)
        assert torch.equal(got, want)


def test_without_adapters_and_without_gradients() -> None:
    w, (x, a, b, _) = weight(), operands()
    y = lora_linear(x, w)
    assert is_taken(y)
    torch.testing.assert_close(y, x @ w.dequantize(torch.float32).T)
    assert lora_linear(x.detach(), w).grad_fn is None
    with torch.no_grad():
        assert not lora_linear(x, w, a, b).requires_grad
    with torch.inference_mode():
        assert lora_linear(x, w, a, b).is_inference()


def test_strided_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weight()
    x, a, b = random(K, M).t(), random(R, 2 * K)[:, ::2], random(R, N).t()
    dy = torch.tensor(2.0).expand(M, N)

    def run() -> tuple[torch.Tensor, ...]:
        y = lora_linear(x, w, a, b)
        return (y, *torch.autograd.grad(y, (x, a, b), dy))

    found = run()
    assert is_taken(found[0])
    for got, want in zip(found, in_python(monkeypatch, run), strict=True):
        assert torch.equal(got, want)


class Wrapped(torch.Tensor):
    """A subclass that behaves as its base."""


def test_what_is_declined() -> None:
    w, (x, a, b, bias) = weight(), operands()
    assert is_taken(lora_linear(x, w, a, b, bias))
    assert is_taken(lora_linear(x, w, a, b, bias, backend="cpu"))
    assert not is_taken(lora_linear(x, w, a, b, bias, backend="torch"))
    assert not is_taken(lora_linear(x, w, a, b, bias, dropout_p=0.5, backend="torch"))
    assert not is_taken(lora_linear(x, w, a, b, bias, scale=torch.tensor(2.0)))
    assert not is_taken(lora_linear(x, w.dequantize(torch.float32), a, b, bias))
    assert not is_taken(lora_linear(x.half(), w, a, b, bias))
    assert not is_taken(lora_linear(x[:0], w, a, b, bias))
    assert not is_taken(lora_linear(x.as_subclass(Wrapped), w, a, b, bias))
    assert is_taken(lora_linear(x, w, a, b, bias))


def test_dispatch_modes_and_transforms_see_the_operator() -> None:
    w, (x, a, b, bias) = weight(), operands()
    seen: list[str] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        assert not is_taken(lora_linear(x, w, a, b, bias))
    assert "fastlora.lora_linear.default" in seen
    batched = torch.func.vmap(lambda x: lora_linear(x, w, a, b, bias))(x.detach()[None])
    assert torch.equal(batched[0], lora_linear(x, w, a, b, bias))
    with torch.autograd.forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError)):
        lora_linear(torch.autograd.forward_ad.make_dual(x.detach(), x.detach()), w, a, b, bias)


def test_wrong_arguments_are_named_as_before() -> None:
    w, (x, a, b, bias) = weight(), operands()
    with pytest.raises(ValueError, match="in_features = 64"):
        lora_linear(x[:, :-1], w, a, b)
    with pytest.raises(ValueError, match=r"adapters must be lora_a \(R, 64\)"):
        lora_linear(x, w, a.t(), b)
    with pytest.raises(ValueError, match=r"bias must have shape \(32,\)"):
        lora_linear(x, w, a, b, bias[1:])
    with pytest.raises(ValueError, match="both lora_a and lora_b"):
        lora_linear(x, w, a)


def test_graphs_are_freed_and_checked() -> None:
    w, (x, a, b, _) = weight(), operands()
    y = lora_linear(x, w, a, b)
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()
    frozen = lora_linear(x, w)  # which saves nothing
    frozen.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        frozen.sum().backward()

    hidden = x * 2
    y = lora_linear(hidden, w, a, b)
    hidden.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_saved_tensors() -> None:
    w, (x, a, b, _) = weight(), operands()
    hidden = x * 2
    held = weakref.ref(hidden)
    y = lora_linear(hidden, w, a, b)
    del hidden
    gc.collect()
    assert held() is not None
    y.sum().backward()
    gc.collect()
    assert held() is None

    a.requires_grad_(False)  # then x is not needed
    hidden = x * 2
    held = weakref.ref(hidden)
    y = lora_linear(hidden, w, a, b)
    del hidden
    gc.collect()
    assert held() is None
    y.sum().backward()


def test_hooks_of_saved_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    w, given = weight(), operands()
    leaves, packed, unpacked = given[:3], [], []

    def pack(t: torch.Tensor) -> Any:
        packed.append(tuple(t.shape))
        return t.detach().clone()

    def unpack(t: Any) -> torch.Tensor:
        unpacked.append(tuple(t.shape))
        return t

    def run() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(lora_linear(given[0], w, *given[1:]).square().sum(), leaves)

    want = run()
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        found = run()
    for shape in ((M, K), (M, R), (R, K), (N, R)):
        assert shape in packed
        assert shape in unpacked
    for got, right in zip(found, want, strict=True):
        assert torch.equal(got, right)
    with torch.autograd.graph.save_on_cpu():
        found = run()
    for got, right in zip(found, want, strict=True):
        assert torch.equal(got, right)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: 1 / 0), pytest.raises(ZeroDivisionError):
        run()


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool, p: float) -> None:
    w, (x, a, b, bias) = weight(), operands()
    torch.manual_seed(8)
    want = torch.autograd.grad(lora_linear(x, w, a, b, bias, dropout_p=p).square().sum(), (x, a, b, bias))
    torch.manual_seed(8)
    y = checkpoint(lambda x: lora_linear(x, w, a, b, bias, dropout_p=p), x, use_reentrant=reentrant)
    torch.rand(3)  # what is drawn between the two passes changes nothing
    y.square().sum().backward()
    for t, right in zip((x, a, b, bias), want, strict=True):
        assert torch.equal(t.grad, right)


def test_hooks_of_the_node_and_anomaly_mode() -> None:
    w, (x, a, b, _) = weight(), operands()
    y = lora_linear(x, w, a, b)
    seen: list[int] = []
    assert y.grad_fn is not None
    y.grad_fn.register_prehook(lambda grads: seen.append(len(grads)))
    y.grad_fn.register_hook(lambda grads, given: seen.append(len(grads)))
    y.register_hook(lambda grad: grad * 2)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert seen == [1, 4]
    (half,) = torch.autograd.grad(lora_linear(x, w, a, b), x, torch.ones_like(y))
    torch.testing.assert_close(dx, 2 * half)
    with (
        torch.autograd.detect_anomaly(check_nan=True),
        pytest.warns(UserWarning, match=NAME),
        pytest.raises(RuntimeError, match=f"'{NAME}' returned nan"),
    ):
        lora_linear(x, w, a, b).backward(torch.full((M, N), float("nan")))


def test_second_derivatives_are_refused() -> None:
    w, (x, a, b, bias) = weight(), operands()
    y = lora_linear(x, w, a, b, bias)
    dy = torch.ones_like(y).requires_grad_()
    grads = torch.autograd.grad(y, (x, a, b, bias), dy, create_graph=True)
    for grad in grads[:3]:
        with pytest.raises(RuntimeError, match=r"fastlora\.reference\.lora_linear"):
            torch.autograd.grad(grad.sum(), (x, dy), retain_graph=True, allow_unused=True)
    torch.autograd.grad(grads[3].sum(), dy)  # that of the bias is a sum of dy, as everywhere


def test_autocast() -> None:
    w, (x, a, b, bias) = weight(), operands()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lora_linear(x, w, a, b, bias)
    assert is_taken(y)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, lora_linear(x.bfloat16(), w, a, b, bias))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        grads = torch.autograd.grad(y, (x, a, b, bias), torch.ones_like(y))
    assert [grad.dtype for grad in grads] == [torch.float32] * 4


def test_what_decides_is_asked_again_when_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    w, (x, a, b, _) = weight(), operands()
    asked: list[int] = []
    real = backends.select

    def spy(problem: backends.Problem, *args: Any) -> Any:
        asked.append(problem.m)
        return real(problem, *args)

    monkeypatch.setattr(backends, "select", spy)
    node.chosen.cache_clear()  # type: ignore[attr-defined]
    for _ in range(2):
        lora_linear(x, w, a, b)
        lora_linear(x[:3], w, a, b)
    assert asked == [M, M, 3, 3]
    with backends.tables.use(backends.tables.Tables(())):
        lora_linear(x, w, a, b)
    assert asked == [M, M, 3, 3, M, M]
    monkeypatch.setenv(native.CAPABILITY_VARIABLE, "nothing")
    with pytest.raises(ValueError, match="nothing"):
        lora_linear(x, w, a, b)


def test_a_weight_is_copied_pickled_and_freed() -> None:
    w, (x, a, b, _) = weight(), operands()
    y = lora_linear(x, w, a, b)
    for other in (copy.copy(w), copy.deepcopy(w), pickle.loads(pickle.dumps(w))):
        assert torch.equal(lora_linear(x, other, a, b), y)
    packed = weakref.ref(w.w_packed)
    del w, other, y
    gc.collect()
    assert packed() is None


def test_a_layer_keeps_its_weight_until_its_buffers_change() -> None:
    layer = FastLoRALinear(K, N, r=R, dtype=torch.float32)
    base = layer.base_layer
    assert isinstance(base, NF4Linear)
    w = base.nf4
    assert base.nf4 is w
    x = random(M, K)
    assert is_taken(layer(x))
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    assert twin.base_layer.nf4 is not w
    other = NF4Linear(weight())
    base.load_state_dict(other.state_dict())
    assert base.nf4 is not w
    torch.testing.assert_close(layer(x), x @ other.nf4.dequantize(torch.float32).T)
    base.absmax_offset = base.absmax_offset + 1
    torch.testing.assert_close(layer(x), x @ base.nf4.dequantize(torch.float32).T)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 4, 64, 256, 300])
def test_on_a_gpu(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if (reason := native.available("cuda")) is not None:
        pytest.skip(reason)
    w = NF4Weight.quantize(random(256, 512).detach().cuda() / 16)
    x, dy = (
        random(2, m, 512, dtype=torch.bfloat16, device="cuda"),
        random(2, m, 256, dtype=torch.bfloat16, device="cuda"),
    )
    for adapter in (torch.bfloat16, torch.float32):
        a, b = random(16, 512, dtype=adapter, device="cuda"), random(256, 16, dtype=adapter, device="cuda")
        leaves = [t.detach().requires_grad_() for t in (x, a, b)]

        for p in (0.0, 0.2):

            def run(leaves: Any = leaves, p: float = p) -> tuple[torch.Tensor, ...]:
                torch.cuda.manual_seed(6)
                y = lora_linear(leaves[0], w, *leaves[1:], scale=2.0, dropout_p=p, backend="cuda")
                return (y, *torch.autograd.grad(y, leaves, dy.detach()))

            found = run()
            assert is_taken(found[0])
            for got, want in zip(found, in_python(monkeypatch, run), strict=True):
                assert torch.equal(got, want)


def test_the_python_node_is_there_without_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "autograd", lambda: (None, "not built"))
    w, (x, a, b, _) = weight(), operands()
    y = lora_linear(x, w, a, b)
    assert isinstance(y.grad_fn, ops._Eager._backward_cls)  # type: ignore[attr-defined]
