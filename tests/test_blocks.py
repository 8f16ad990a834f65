"""Groups of projections and the gated MLP against the same layers one by one, in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from tolerance import assert_close

from fastlora import activation as plain
from fastlora import blocks, groups, native, ops, reference, tables
from fastlora.activation import ACTIVATIONS
from fastlora.blocks import Projection, gated_mlp, lora_linears
from fastlora.nf4 import NF4Weight

BACKENDS = ("torch", "reference", "auto", "triton")
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, device: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend; "triton" in its stacked form, whatever the sizes."""
    if request.param == "triton":
        pytest.importorskip("triton")
        from fastlora.kernels import config

        if device == "cpu" and torch.cuda.is_available():
            pytest.skip("Triton is compiled, not interpreted")
        if device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
            pytest.skip("needs the tensor memory accelerator")
        monkeypatch.setattr(config, "form", lambda *args: "decode" if args[3] == torch.float32 else "persistent")
        monkeypatch.setattr(config, "PROJECTED_ROWS", 1 << 30)
    return request.param


def parameter(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    return (torch.randn(shape) * shape[-1] ** -0.5).to(device, dtype).requires_grad_()


def make(
    n: int, k: int, r: int, dtype: torch.dtype, device: str, *, bias: bool = False, dense: bool = False,
    adapter_dtype: torch.dtype | None = None, scale: float = 0.7,
) -> Projection:  # fmt: skip
    w = (torch.randn(n, k) * k**-0.5).to(dtype)
    kind = adapter_dtype or dtype
    return Projection(
        w.to(device) if dense else NF4Weight.quantize(w).to(device),
        parameter(r, k, dtype=kind, device=device) if r else None,
        parameter(n, r, dtype=kind, device=device) if r else None,
        torch.randn(n).to(device, dtype).requires_grad_() if bias else None,
        scale,
    )


def leaves(projections: Sequence[Projection]) -> list[torch.Tensor]:
    return [t for p in projections for t in (p.lora_a, p.lora_b, p.bias) if t is not None]


def in_type(projections: Sequence[Projection], dtype: torch.dtype, compute: torch.dtype) -> list[Projection]:
    """The same projections on dense weights, with leaves of their own in ``dtype``."""

    def copy(t: torch.Tensor | None) -> torch.Tensor | None:
        return None if t is None else t.detach().to(dtype).requires_grad_(t.requires_grad)

    return [
        Projection(reference.dense(p.w, compute).to(dtype), copy(p.lora_a), copy(p.lora_b), copy(p.bias), p.scale)
        for p in projections
    ]


def one_by_one(x: torch.Tensor, projections: Sequence[Projection]) -> list[torch.Tensor]:
    ys = []
    for p in projections:
        y = x @ p.w.T
        if p.lora_a is not None:
            y = y + p.scale * ((x @ p.lora_a.to(x.dtype).T) @ p.lora_b.to(x.dtype).T)
        ys.append(y if p.bias is None else y + p.bias.to(x.dtype))
    return ys


def mlp_one_by_one(x: torch.Tensor, inner: Sequence[Projection], down: Projection, activation: str) -> torch.Tensor:
    ys = one_by_one(x, inner)
    gate, up = ys if len(ys) == 2 else ys[0].chunk(2, -1)
    return one_by_one(plain.forward(gate, up, activation), [down])[0]


Run = Callable[[torch.Tensor, list[Projection]], Sequence[torch.Tensor]]


def results(run: Run, x: torch.Tensor, projections: list[Projection], dys: Sequence[torch.Tensor]) -> dict[str, Any]:
    x = x.detach().requires_grad_()
    ys = run(x, projections)
    torch.autograd.backward(ys, [dy.to(y.dtype) for y, dy in zip(ys, dys, strict=True)])
    found = {f"y{i}": y.detach() for i, y in enumerate(ys)} | {"dx": x.grad}
    for i, t in enumerate(leaves(projections)):
        found[f"leaf{i}"], t.grad = t.grad, None
    return found


def compare(fused: Run, unfused: Run, x: torch.Tensor, projections: list[Projection], dys: list[torch.Tensor]) -> None:
    """Hold ``fused`` to the tolerance policy on every output and gradient, in the type of x."""
    got = results(fused, x, projections, dys)
    double = in_type(projections, torch.float64, x.dtype)
    truth = results(unfused, x.double(), double, [dy.double() for dy in dys])
    baseline = results(unfused, x, in_type(projections, x.dtype, x.dtype), dys)
    for name, expected in truth.items():
        kind = got[name].dtype
        assert_close(got[name], baseline[name].to(kind), expected, name)
    for i, t in enumerate(leaves(projections)):
        assert got[f"leaf{i}"].dtype == t.dtype


GROUPS = {
    "q k v": [{"n": 64, "r": 8}, {"n": 32, "r": 8}, {"n": 32, "r": 8}],
    "one": [{"n": 40, "r": 5}],
    "bias, ranks": [{"n": 48, "r": 3, "bias": True}, {"n": 16, "r": 0}, {"n": 24, "r": 20, "bias": True}],
    "float32 adapters": [{"n": 32, "r": 8, "adapter_dtype": torch.float32} for _ in range(2)],
    "mixed adapters": [{"n": 32, "r": 4, "adapter_dtype": torch.float32}, {"n": 32, "r": 4}],
    "dense": [{"n": 32, "r": 4, "dense": True}, {"n": 24, "r": 4}],
    "five": [{"n": 16, "r": 4} for _ in range(5)],
    "none": [{"n": 16, "r": 0}, {"n": 16, "r": 0}],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", GROUPS)
def test_group(kind: str, dtype: torch.dtype, backend: str, device: str) -> None:
    m, k = 19, 64
    projections = [make(k=k, dtype=dtype, device=device, **options) for options in GROUPS[kind]]
    x = torch.randn(m, k).to(device, dtype)
    dys = [torch.randn(m, p.w.shape[0]).to(device, dtype) for p in projections]
    compare(lambda x, p: lora_linears(x, p, backend=backend), one_by_one, x, projections, dys)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("joint", [False, True], ids=["gate and up", "gate_up"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp(activation: str, joint: bool, dtype: torch.dtype, backend: str, device: str) -> None:
    m, k, i = 19, 64, 48
    sizes = [2 * i] if joint else [i, i]
    options = {"dtype": dtype, "device": device, "bias": True}
    inner, down = [make(n, k, 6, **options) for n in sizes], make(k, i, 9, **options)
    x, dy = (torch.randn(m, k).to(device, dtype) for _ in range(2))
    compare(
        lambda x, p: [gated_mlp(x, p[:-1], p[-1], activation, backend=backend)],
        lambda x, p: [mlp_one_by_one(x, p[:-1], p[-1], activation)],
        x,
        [*inner, down],
        [dy],
    )


@pytest.mark.parametrize("ranks", [(0, 8, 8), (8, 8, 0), (0, 0, 0), (70, 70, 70)], ids=str)
def test_mlp_of_any_ranks(ranks: tuple[int, ...], backend: str, device: str) -> None:
    k, i, dtype = 64, 48, torch.bfloat16
    gate, up, down = (make(n, width, r, dtype, device) for n, width, r in zip((i, i, k), (k, k, i), ranks, strict=True))
    x, dy = (torch.randn(9, k).to(device, dtype) for _ in range(2))
    compare(
        lambda x, p: [gated_mlp(x, p[:-1], p[-1], backend=backend)],
        lambda x, p: [mlp_one_by_one(x, p[:-1], p[-1], "silu")],
        x,
        [gate, up, down],
        [dy],
    )


def double_problem() -> tuple[torch.Tensor, list[Projection], Projection]:
    x = torch.randn(5, 64, dtype=torch.float64, requires_grad=True)
    inner = [make(n, 64, 3, torch.float64, "cpu", bias=True) for n in (6, 6)]
    return x, inner, make(4, 6, 2, torch.float64, "cpu", dense=True)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradients_are_derivatives(backend: str) -> None:
    x, inner, down = double_problem()

    def group(x: torch.Tensor, *_: torch.Tensor) -> Any:
        return lora_linears(x, inner, backend=backend)

    def mlp(x: torch.Tensor, *_: torch.Tensor) -> Any:
        return gated_mlp(x, inner, down, "gelu_tanh", backend=backend)

    assert torch.autograd.gradcheck(group, (x, *leaves(inner)))
    assert torch.autograd.gradcheck(mlp, (x, *leaves([*inner, down])))


def small(device: str, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, list[Projection], Projection]:
    inner, down = [make(48, 64, 8, dtype, device) for _ in range(2)], make(64, 48, 8, dtype, device)
    return torch.randn(9, 64).to(device, dtype), inner, down


def test_only_what_is_asked_for(backend: str, device: str) -> None:
    """Each subset of leaves gets the gradients that it gets when all of them learn, and nothing else gets any."""
    x, inner, down = small(device)
    every = [x, *leaves([*inner, down])]

    def run(wanted: set[int]) -> list[torch.Tensor | None]:
        for i, t in enumerate(every):
            t.requires_grad_(i in wanted)
            t.grad = None
        gated_mlp(x, inner, down, backend=backend).float().square().sum().backward()
        return [t.grad for t in every]

    full = run(set(range(7)))
    for wanted in ({0}, {1}, {2, 3}, {5}, {6}, {0, 6}):
        for i, grad in enumerate(run(wanted)):
            assert (grad is not None) == (i in wanted)
            if grad is not None:
                torch.testing.assert_close(grad, full[i], rtol=1e-2, atol=1e-3)


def test_a_projection_without_gradient(backend: str, device: str) -> None:
    x, inner, _ = small(device)
    x.requires_grad_()
    first, _ = lora_linears(x, inner, backend=backend)
    first.float().sum().backward()
    assert not inner[1].lora_a.grad.any()
    alone = x.grad.clone()
    x.grad = None
    (only,) = lora_linears(x, inner[:1], backend=backend)
    only.float().sum().backward()
    torch.testing.assert_close(alone, x.grad, rtol=1e-2, atol=1e-2)


def test_outputs_are_versioned_apart(backend: str, device: str) -> None:
    """Writing into one output in place leaves the others usable in backward."""
    x, inner, _ = small(device)
    first, second = lora_linears(x, inner, backend=backend)
    loss = second.square().sum()
    with torch.no_grad():
        first.zero_()
    loss.backward()
    assert inner[1].lora_b.grad.any()


def test_backward_twice(backend: str, device: str) -> None:
    """What is kept for a backward pass is not written over while the graph is retained."""
    x, inner, down = small(device)
    y = gated_mlp(x, inner, down, backend=backend)
    every = leaves([*inner, down])
    first = torch.autograd.grad(y.float().sum(), every, retain_graph=True)
    second = torch.autograd.grad(y.float().sum(), every, retain_graph=True)
    last = torch.autograd.grad(y.float().sum(), every)
    for a, b, c in zip(first, second, last, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_no_second_derivative(device: str) -> None:
    x, inner, down = small(device)
    x.requires_grad_()
    for y in (gated_mlp(x, inner, down, backend="torch"), lora_linears(x, inner, backend="torch")[0]):
        (dx,) = torch.autograd.grad(y.float().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            dx.float().sum().backward()


@pytest.mark.parametrize("which", ["x", "lora_a", "lora_b"])
def test_no_forward_mode_derivative(which: str, device: str) -> None:
    x, inner, down = small(device, torch.float32)

    def changed(t: torch.Tensor) -> tuple[torch.Tensor, list[Projection]]:
        if which == "x":
            return t, inner
        return x, [inner[0], dataclasses.replace(inner[1], **{which: t})]

    at = (x if which == "x" else getattr(inner[1], which)).detach()
    with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
        torch.func.jvp(lambda t: lora_linears(*changed(t))[1], (at,), (at,))
    with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
        torch.func.jvp(lambda t: gated_mlp(*changed(t), down), (at,), (at,))


@pytest.mark.parametrize("shape", [(2, 5, 64), (64,), (0, 64), (3, 0, 64)], ids=str)
def test_shapes(shape: tuple[int, ...], backend: str, device: str) -> None:
    _, inner, down = small(device)
    x = torch.randn(shape).to(device, torch.bfloat16)
    for y in lora_linears(x, inner, backend=backend):
        assert y.shape == (*shape[:-1], 48)
    y = gated_mlp(x, inner, down, backend=backend)
    assert y.shape == shape
    y.float().sum().backward()
    assert inner[0].lora_a.grad.shape == (8, 64)


def test_strided_x(backend: str, device: str) -> None:
    _, inner, down = small(device)
    wide = torch.randn(4, 3, 128).to(device, torch.bfloat16)
    x = wide.transpose(0, 1)[..., ::2]
    got = [*lora_linears(x, inner, backend=backend), gated_mlp(x, inner, down, backend=backend)]
    want = [
        *lora_linears(x.contiguous(), inner, backend=backend),
        gated_mlp(x.contiguous(), inner, down, backend=backend),
    ]
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_wider_output(backend: str, device: str) -> None:
    x, inner, down = small(device)
    wide, narrow = (lora_linears(x, inner, out_dtype=kind, backend=backend)[0] for kind in (torch.float32, None))
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide.bfloat16(), narrow, rtol=8e-3, atol=1e-2)
    y = gated_mlp(x, inner, down, out_dtype=torch.float32, backend=backend)
    assert y.dtype == torch.float32
    y.sum().backward()
    assert inner[0].lora_a.grad.dtype == torch.bfloat16


def test_autocast(device: str) -> None:
    x, inner, down = small(device, torch.float32)
    with torch.autocast(device, torch.bfloat16):
        y = gated_mlp(x, inner, down, backend="torch")
        parts = lora_linears(x, inner, backend="torch")
    assert {t.dtype for t in (y, *parts)} == {torch.bfloat16}
    assert torch.equal(y, gated_mlp(x.bfloat16(), inner, down, backend="torch"))
    y.float().sum().backward()
    assert inner[0].lora_a.grad.dtype == torch.float32


def saved_bytes(run: Callable[[], Any], *known: torch.Tensor) -> int:
    """Bytes that autograd keeps, without ``known``."""
    storages: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    for t in known:
        storages.pop(t.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def test_what_is_kept(backend: str, device: str) -> None:
    """gate, up and the narrow products of the MLP; x, too, but no h, no output and no dense weight."""
    x, inner, down = small(device)
    kept = saved_bytes(lambda: gated_mlp(x, inner, down, backend=backend), x, *leaves([*inner, down]))
    rows = x.shape[0]
    assert 2 * rows * 96 <= kept <= 2 * rows * (96 + 3 * 16)
    kept = saved_bytes(lambda: lora_linears(x, inner, backend=backend), x, *leaves(inner))
    assert kept <= 2 * rows * 2 * 16


def test_checkpointing(backend: str, device: str) -> None:
    x, inner, down = small(device)
    x.requires_grad_()

    def run(x: torch.Tensor) -> torch.Tensor:
        return gated_mlp(x, inner, down, backend=backend)

    want = torch.autograd.grad(run(x).float().sum(), [x, *leaves([*inner, down])])
    for reentrant in (False, True):
        y = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=reentrant)
        y.float().sum().backward()
        got = [t.grad for t in (x, *leaves([*inner, down]))]
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
        for t in (x, *leaves([*inner, down])):
            t.grad = None


@pytest.mark.parametrize("after", [False, True], ids=["last", "then a norm"])
def test_a_checkpoint_multiplies_by_down_again_only_where_needed(
    after: bool, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, inner, down = small(device)
    x.requires_grad_()
    every = [x, *leaves([*inner, down])]
    products: list[int] = []
    real = blocks._Down.forward

    def counted(*args: Any) -> Any:
        products.append(1)
        return real(*args)

    monkeypatch.setattr(blocks._Down, "forward", staticmethod(counted))

    def run(x: torch.Tensor) -> torch.Tensor:
        y = x + gated_mlp(x, inner, down, backend=backend)
        return torch.nn.functional.rms_norm(y, y.shape[-1:]) if after else y

    want = torch.autograd.grad(run(x).float().sum(), every)
    y = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False)
    y.float().sum().backward()
    for t, grad in zip(every, want, strict=True):
        assert torch.equal(t.grad, grad)
        t.grad = None
    assert len(products) == 2 + after


def test_offloaded(backend: str, device: str) -> None:
    """What is kept may come back as other tensors than went."""
    x, inner, down = small(device)
    every = leaves([*inner, down])
    want = torch.autograd.grad(gated_mlp(x, inner, down, backend=backend).float().sum(), every)
    with torch.autograd.graph.save_on_cpu():
        y = gated_mlp(x, inner, down, backend=backend)
    for a, b in zip(torch.autograd.grad(y.float().sum(), every), want, strict=True):
        assert torch.equal(a, b)


def test_compiled_as_one_graph(device: str) -> None:
    x, inner, down = small(device, torch.float32)

    def run(x: torch.Tensor) -> torch.Tensor:
        return gated_mlp(x, inner, down, backend="torch") + sum(
            y.sum() for y in lora_linears(x, inner, backend="torch")
        )

    want = torch.autograd.grad(run(x).sum(), leaves([*inner, down]))
    got = torch.autograd.grad(torch.compile(run, backend="aot_eager", fullgraph=True)(x).sum(), leaves([*inner, down]))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["q k v", "bias, ranks", "dense", "none"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_registered_operator(kind: str, backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a compiler sees: schema, shapes and gradients agree, and the results are those of the eager node."""
    dtype = torch.float32
    projections = [make(k=64, dtype=dtype, device=device, **options) for options in GROUPS[kind]]
    x = torch.randn(2, 5, 64).to(device).requires_grad_()
    want = lora_linears(x, projections, backend=backend)
    dys = [torch.randn_like(y) for y in want]
    want_grads = torch.autograd.grad(want, [x, *leaves(projections)], dys)
    seen: list[Any] = []
    real = torch.ops.fastlora.lora_linears
    monkeypatch.setattr(ops, "must_dispatch", lambda x: True)
    monkeypatch.setattr(torch.ops.fastlora, "lora_linears", lambda *args: seen.append(args) or real(*args))
    got = lora_linears(x, projections, backend=backend)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    got_grads = torch.autograd.grad(got, [x, *leaves(projections)], dys)
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a, b)
    monkeypatch.undo()
    (args,) = seen
    detached = [
        [t.detach().requires_grad_(t.requires_grad) for t in arg] if i == 5 else arg for i, arg in enumerate(args)
    ]
    detached[0] = detached[0].detach().requires_grad_()
    torch.library.opcheck(real, tuple(detached))


def test_which_form(device: str) -> None:
    x, inner, _ = small(device)
    assert isinstance(groups.form(x, inner, "torch"), groups.Library)
    assert isinstance(groups.form(x, inner, "reference"), groups.Each)
    assert isinstance(groups.form(x, inner, "auto"), groups.Each), "too small to be worth it"
    assert blocks.stacks(x, inner, "torch")
    assert not blocks.stacks(x, inner)
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        groups.form(x, inner, "fast")


def test_fewer_products_are_stacked_for_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    x, inner, _ = small("cpu")
    monkeypatch.setattr(groups.kernels("config"), "form", lambda *args: "persistent")
    size = x.numel() * sum(groups.sizes(inner))
    for least, most, stacks in ((size, size + 1, (False, True)), (size + 1, size + 1, (False, False))):
        monkeypatch.setattr(groups.tables, "STACKED", least)
        monkeypatch.setattr(groups.tables, "PERSISTENT_WITH_LAUNCHES", most)
        found = [isinstance(groups.form(x, inner, "auto"), groups.Stacked)]
        with tables.for_graphs():
            found.append(isinstance(groups.form(x, inner, "auto"), groups.Stacked))
        assert tuple(found) == stacks


@pytest.mark.parametrize("frozen", ["nothing", "down's A", "up's B"])
def test_gradients_of_an_mlp_come_with_the_activation_where_all_are_needed(
    frozen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("Triton is compiled, not interpreted")
    monkeypatch.setattr(groups.kernels("config"), "form", lambda *args: "persistent")
    gated = groups.kernels("gated")
    x, inner, down = small("cpu")
    if frozen != "nothing":
        left = down.lora_a if frozen == "down's A" else inner[1].lora_b
        left.requires_grad_(False)
    every = [x.requires_grad_(), *(t for t in leaves([*inner, down]) if t.requires_grad)]
    passes = {name: Mock(wraps=getattr(gated, name)) for name in ("backward", "gradients")}
    for name, spy in passes.items():
        monkeypatch.setattr(gated, name, spy)
    found = torch.autograd.grad(gated_mlp(x, inner, down, backend="triton").float().square().sum(), every)
    expected = torch.autograd.grad(gated_mlp(x, inner, down, backend="torch").float().square().sum(), every)
    assert [name for name, spy in passes.items() if spy.called] == ["gradients" if frozen == "nothing" else "backward"]
    for a, b in zip(found, expected, strict=True):
        assert (a.float() - b.float()).norm() <= 0.03 * b.float().norm()


@pytest.mark.gpu
@pytest.mark.parametrize("frozen", [False, True], ids=["", "B frozen"])
@pytest.mark.parametrize("rank", [16, 40])
def test_du_and_db_come_from_one_read_of_dy_where_both_are_needed(
    rank: int, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native.available("cuda") is not None or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs the extension and compute capability 9.0")
    pytest.importorskip("triton")
    monkeypatch.setattr(groups.kernels("config"), "form", lambda *args: "persistent")
    spy = Mock(wraps=native.du_db)
    monkeypatch.setattr(native, "du_db", spy)
    inner = [make(n, 256, rank, torch.bfloat16, "cuda") for n in (512, 512)]
    down = make(256, 512, rank, torch.bfloat16, "cuda")
    for p in (*inner, down) if frozen else ():
        p.lora_b.requires_grad_(False)
    x = torch.randn(70, 256, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    every = [x, *(t for t in leaves([*inner, down]) if t.requires_grad)]

    def run(backend: str) -> list[torch.Tensor]:
        a, b = lora_linears(x, inner, backend=backend)
        y = gated_mlp(x, inner, down, backend=backend).float().square().sum()
        return list(torch.autograd.grad(y + (a.float() * b.float()).sum(), every))

    found, called = run("triton"), spy.call_count
    assert called == (0 if frozen or rank > 32 else 2)  # of the group, whose dys lie apart, and of down
    for got, expected in zip(found, run("torch"), strict=True):
        assert (got.float() - expected.float()).norm() <= 0.03 * expected.float().norm()


@pytest.mark.gpu
def test_large_groups_stack_on_a_gpu() -> None:
    pytest.importorskip("triton")
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs the tensor memory accelerator")
    projections = [make(n, 4096, 16, torch.bfloat16, "cuda") for n in (4096, 1024, 1024)]
    x = torch.empty(8192, 4096, dtype=torch.bfloat16, device="cuda")
    assert isinstance(groups.form(x, projections, "auto"), groups.Stacked)
    assert isinstance(groups.form(x[:16], projections, "auto"), groups.Each)
    with tables.for_graphs():
        assert isinstance(groups.form(x[:2048], projections, "auto"), groups.Stacked)
        assert isinstance(groups.form(x[:1024], projections, "auto"), groups.Each)


@pytest.mark.gpu
def test_in_a_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured forward and backward of the stacked form gives what the same calls give outside, for another x."""
    pytest.importorskip("triton")
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs the tensor memory accelerator")
    monkeypatch.setattr(groups.kernels("config"), "form", lambda *args: "persistent")
    x, inner, down = small("cuda")
    every = leaves([*inner, down])

    def run() -> list[torch.Tensor]:
        y = gated_mlp(x, inner, down, backend="triton")
        for part in lora_linears(x, inner, backend="triton"):
            y = y + part.float().sum()
        return [y.detach(), *torch.autograd.grad(y.float().sum(), every)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        captured = run()
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, run(), strict=True):
        assert torch.equal(a, b)


def test_refused(device: str) -> None:
    x, inner, down = small(device)
    other = make(48, 128, 8, torch.bfloat16, device)
    p = inner[0]
    with pytest.raises(ValueError, match="at least one projection"):
        lora_linears(x, [])
    with pytest.raises(ValueError, match="in_features = 64, got shape"):
        lora_linears(x[:, :32], inner)
    with pytest.raises(ValueError, match="projection 1 has in_features 128"):
        lora_linears(x, [p, other])
    with pytest.raises(ValueError, match="must be floating-point"):
        lora_linears(x.int(), inner)
    with pytest.raises(ValueError, match="give both"):
        lora_linears(x, [dataclasses.replace(p, lora_b=None)])
    with pytest.raises(ValueError, match=r"projection 0: .* lora_a \(R, 64\)"):
        lora_linears(x, [dataclasses.replace(p, lora_b=p.lora_b[:, :3])])
    with pytest.raises(ValueError, match=r"bias must have shape \(48,\)"):
        lora_linears(x, [dataclasses.replace(p, bias=torch.zeros(3, device=device))])
    with pytest.raises(ValueError, match="unknown activation 'relu'"):
        gated_mlp(x, inner, down, "relu")
    for wide in (torch.float64, torch.float16):
        with pytest.raises(ValueError, match=r"out_dtype must be torch\.bfloat16, the type computed in"):
            lora_linears(x, inner, out_dtype=wide)
        with pytest.raises(ValueError, match=r"out_dtype must be torch\.bfloat16, the type computed in"):
            gated_mlp(x, inner, down, out_dtype=wide)
    for wrong in ([*inner, p], [p], [make(40, 64, 8, torch.bfloat16, device), p]):
        with pytest.raises(ValueError, match="down takes 48 features"):
            gated_mlp(x, wrong, down)
    with pytest.raises(ValueError, match="lora_a is on meta"):
        lora_linears(x, [dataclasses.replace(p, lora_a=p.lora_a.to("meta"))])
    trained = make(48, 64, 8, torch.bfloat16, device, dense=True)
    trained.w.requires_grad_()
    with pytest.raises(RuntimeError, match="frozen"):
        lora_linears(x, [trained])


@pytest.mark.parametrize("grad", [True, False])
def test_a_result_apart_keeps_no_other(backend: str, device: str, grad: bool) -> None:
    x, inner, _ = small(device)
    with torch.set_grad_enabled(grad):
        together = lora_linears(x, inner, backend=backend)
        ys = lora_linears(x, inner, backend=backend, apart=(1,))
    assert all(torch.equal(a, b) for a, b in zip(together, ys, strict=True))
    shared = together[1].untyped_storage().nbytes() > together[1].nbytes
    assert shared == (backend in ("torch", "triton"))
    owned = ys[1].untyped_storage().nbytes() == ys[1].nbytes
    assert owned == (grad or not shared)
    if grad:
        every = leaves(inner)
        wanted, found = (torch.autograd.grad(sum(y.square().sum() for y in out), every) for out in (together, ys))
        assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
