"""The head with its cross-entropy in chunks, against the logits of all tokens at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close

from fastlora import loss as losses
from fastlora import native
from fastlora.loss import linear_cross_entropy

DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "capped": {"softcap": 3.0},
    "both": {"label_smoothing": 0.3, "softcap": 2.0},
    "counted": {"count": 7.5},
}


def whole(x: torch.Tensor, w: torch.Tensor, bias: Any, labels: torch.Tensor, **options: Any) -> torch.Tensor:
    logits = F.linear(x, w, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if (cap := options.get("softcap")) is not None:
        logits = cap * torch.tanh(logits / cap)
    count = options.get("count")
    each = F.cross_entropy(
        logits,
        labels,
        label_smoothing=options.get("label_smoothing", 0.0),
        reduction="mean" if count is None else "sum",
    )
    return each if count is None else each / count


def problem(dtype: torch.dtype, device: str, m: int = 21, k: int = 24, v: int = 300) -> tuple[torch.Tensor, ...]:
    x = torch.randn(m, k).to(device, dtype)
    w = (torch.randn(v, k) / k**0.5 * 2).to(device, dtype)
    bias = torch.randn(v).to(device, dtype)
    labels = torch.randint(0, v, (m,), device=device)
    labels[[0, m // 3, m - 1]] = -100
    return x, w, bias, labels


def results(function: Any, tensors: tuple[torch.Tensor, ...], gain: float, **options: Any) -> list[torch.Tensor]:
    *inputs, labels = tensors
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    if function is linear_cross_entropy:
        loss = function(leaves[0], leaves[1], labels, bias=leaves[2], **options)
    else:
        loss = function(*leaves, labels, **options)
    return [loss.detach(), *torch.autograd.grad(loss * gain, leaves)]


@pytest.fixture(params=["torch", "kernel", *native.CAPABILITIES])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the softmax is computed; returns the device."""
    if request.param != "kernel":
        monkeypatch.setattr(losses, "_on_kernels", lambda x: False)
        if request.param == "torch":
            monkeypatch.setattr(losses, "_on_extension", lambda x, options: False)
        elif (reason := native.available("cpu")) is not None:
            pytest.skip(reason)
        elif native.CAPABILITIES.index(request.param) > native.best_capability():
            pytest.skip("not a path of this processor")
        else:
            monkeypatch.setenv(native.CAPABILITY_VARIABLE, request.param)
        return "cpu"
    pytest.importorskip("triton")
    return request.getfixturevalue("kernel_device")


@DTYPE
@pytest.mark.parametrize("chunk", [None, 8])
@pytest.mark.parametrize("kind", OPTIONS)
def test_loss_and_gradients(kind: str, chunk: int | None, dtype: torch.dtype, path: str) -> None:
    tensors, options = problem(dtype, path), OPTIONS[kind]
    truth = results(whole, tuple(t.double() if t.is_floating_point() else t for t in tensors), 0.7, **options)
    plain = results(whole, tensors, 0.7, **options)
    found = results(linear_cross_entropy, tensors, 0.7, chunk=chunk, **options)
    for name, actual, base, true in zip(("loss", "dx", "dw", "db"), found, plain, truth, strict=True):
        assert_close(actual, base, true, name)


def test_rows_longer_than_a_tile(path: str) -> None:
    tensors = problem(torch.float32, path, m=4, k=8, v=9001)
    truth = results(whole, tuple(t.double() if t.is_floating_point() else t for t in tensors), 1.0)
    for actual, base, true in zip(
        results(linear_cross_entropy, tensors, 1.0), results(whole, tensors, 1.0), truth, strict=True
    ):
        assert_close(actual, base, true)


def test_large_and_infinite_logits(path: str) -> None:
    x, _, _, labels = problem(torch.float32, path, m=6, v=40)
    labels = labels.clamp(0)
    w = torch.randn(40, x.shape[1], device=path) * 1e4
    bias = torch.zeros(40, device=path)
    bias[3] = float("-inf")
    labels[labels == 3] = 4
    expected = whole(x.double(), w.double(), bias.double(), labels)
    found = linear_cross_entropy(x, w, labels, bias=bias)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_count_may_lie_on_the_device_and_gradients_add_up(path: str) -> None:
    x, w, _, labels = problem(torch.float32, path)
    x.requires_grad_()
    total = linear_cross_entropy(x, w, labels)
    (expected,) = torch.autograd.grad(total, x)
    count = (labels != -100).sum()
    parts = [linear_cross_entropy(x[s], w, labels[s], count=count) for s in (slice(0, 9), slice(9, None))]
    torch.testing.assert_close(parts[0] + parts[1], total)
    torch.testing.assert_close(torch.autograd.grad(parts[0] + parts[1], x)[0], expected)


def test_only_what_learns_gets_a_gradient_and_a_graph_may_be_kept(path: str) -> None:
    x, w, _, labels = problem(torch.float32, path)
    x.requires_grad_()
    loss = linear_cross_entropy(x, w, labels)
    first = torch.autograd.grad(loss, x, torch.tensor(3.0, device=path), retain_graph=True)[0]
    second = torch.autograd.grad(loss, x)[0]
    torch.testing.assert_close(first, 3 * second)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(x, w, labels), loss.detach())
    assert not linear_cross_entropy(x.detach(), w, labels).requires_grad


def test_no_tokens_are_no_number(path: str) -> None:
    x, w, bias, labels = problem(torch.float32, path)
    loss, dx, dw, _ = results(linear_cross_entropy, (x[:0], w, bias, labels[:0]), 1.0)
    assert loss.isnan()
    assert dx.shape == (0, x.shape[1])
    assert dw.shape == w.shape
    assert linear_cross_entropy(x[:0], w, labels[:0], count=3) == 0


@pytest.mark.parametrize("label", [300, -1])
@pytest.mark.parametrize("kind", ["plain", "both"])
def test_a_label_outside_of_the_vocabulary_is_no_number(kind: str, label: int, path: str) -> None:
    x, w, bias, labels = problem(torch.float32, path)
    options = OPTIONS[kind]
    expected = results(linear_cross_entropy, (x, w, bias, labels), 1.0, **options)
    labels[4] = label
    loss, dx, _, _ = results(linear_cross_entropy, (x, w, bias, labels), 1.0, **options)
    assert loss.isnan()
    assert dx.isfinite().all()
    assert [row for row in range(len(x)) if not torch.allclose(dx[row], expected[1][row], rtol=1e-4)] == [4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_extension_leaves_no_number_unnoticed(dtype: torch.dtype) -> None:
    """A label outside of the vocabulary and a NaN among the logits, in a whole vector and in the rest of the row."""
    if (reason := native.available("cpu")) is not None:
        pytest.skip(reason)
    options = {"ignore_index": -100, "label_smoothing": 0.0, "softcap": None, "gradient": True}
    clean = torch.randn(4, 101).to(dtype)
    labels, scale = torch.tensor([3, 101, 7, -100]), torch.ones(())
    for column in (5, 100):
        logits, loss = clean.clone(), torch.empty(4)
        logits[2, column] = float("nan")
        native.cross_entropy(logits, labels, loss, scale, **options)
        assert loss.isnan().tolist() == [False, True, True, False]
        assert logits.isnan().any(1).tolist() == [False, False, True, False]
        assert (loss[3], logits[3].abs().max()) == (0, 0)
        expected = torch.autograd.functional.jacobian(lambda x: F.cross_entropy(x, labels[0]), clean[0].float())
        torch.testing.assert_close(logits[0].float(), expected, atol=1e-2 if dtype == torch.bfloat16 else 1e-6, rtol=0)


def test_the_extension_checks_what_it_is_given() -> None:
    if (reason := native.available("cpu")) is not None:
        pytest.skip(reason)
    options = {"ignore_index": -100, "label_smoothing": 0.0, "softcap": None, "gradient": True}
    good = {"logits": torch.zeros(3, 8), "labels": torch.zeros(3).long(), "loss": torch.zeros(3)}
    good["scale"] = torch.ones(1)
    bad = {
        "logits": torch.zeros(3, 16)[:, ::2],
        "labels": torch.zeros(4).long(),
        "loss": torch.zeros(3).double(),
        "scale": torch.ones(2),
    }
    for name, tensor in {**bad, "logits ": torch.zeros(3, 8).half()}.items():
        with pytest.raises(ValueError, match=name.strip()):
            native.cross_entropy(**{**good, name.strip(): tensor}, **options)


def test_autocast_decides_the_type() -> None:
    x, w, _, labels = problem(torch.float32, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        x.requires_grad_()
        loss = linear_cross_entropy(x, w, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    rounded = linear_cross_entropy(x.detach().bfloat16(), w.bfloat16(), labels)
    torch.testing.assert_close(loss.detach(), rounded)


def test_chunks_hold_a_bounded_number_of_logits() -> None:
    assert losses.chunk_rows(8192, 32000) == 2048
    assert losses.chunk_rows(8192, 128256) == 512
    assert losses.chunk_rows(8192, 256000) == 512
    assert losses.chunk_rows(100, 32000) == 100
    assert losses.chunk_rows(100, 2**30) == 100


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.ones(21, 23)}, "do not fit"),
        ({"labels": torch.zeros(20, dtype=torch.long)}, "one for each row"),
        ({"bias": torch.ones(299)}, "bias must be"),
        ({"label_smoothing": 1.5}, "between 0 and 1"),
        ({"weight": torch.ones(300, 24, dtype=torch.float64)}, "of one type"),
    ],
)
def test_what_does_not_fit_is_said(change: dict[str, Any], words: str) -> None:
    x, w, _, labels = problem(torch.float32, "cpu")
    with pytest.raises(ValueError, match=words):
        linear_cross_entropy(**{"x": x, "weight": w, "labels": labels, **change})


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    x, w, _, labels = problem(torch.bfloat16, "cuda", m=1000, k=512, v=5000)
    x.requires_grad_()
    linear_cross_entropy(x, w, labels, chunk=256).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(x, w, labels, chunk=256).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
