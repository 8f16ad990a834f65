"""Blocks, Liger and checkpoints on the CPU, as a training run has them."""

from __future__ import annotations

import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import tiny  # noqa: F401  (skips this module where the train extra is missing)
import torch
from torch.utils.checkpoint import checkpoint

from fastlora.training import model as models
from fastlora.training.config import load
from fastlora.training.errors import UserError
from fastlora.training.offload import OffloadCheckpoints, Pipe, Side, offload_checkpoints
from fastlora.training.train import train

CHECKPOINTS = {"gradient_checkpointing": True, "offload_checkpoints": True}


@pytest.mark.interpreted
@pytest.mark.parametrize("values", [{"blocks": True}, {"blocks": True, **CHECKPOINTS}])
def test_the_curve_stays(options: dict[str, Any], tmp_path: Path, values: dict[str, Any]) -> None:
    options["lora_dropout"] = 0.0
    apart = train(load(None, options | {"blocks": False}))
    other = train(load(None, {**options, "output_dir": str(tmp_path / "other"), **values}))
    assert other.losses == [(step, pytest.approx(loss, rel=1e-4)) for step, loss in apart.losses]
    assert apart.losses[0] != apart.losses[-1]


def test_only_the_inputs_of_checkpoints_go(tiny_model: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One hidden state for each layer, and the gradients are those of plain checkpointing."""
    gone: list[torch.Size] = []
    pack = Pipe.pack

    def watched(self: Pipe, t: torch.Tensor) -> Any:
        gone.append(t.shape)
        return pack(self, t)

    monkeypatch.setattr(Pipe, "pack", watched)
    source = models.find(str(tiny_model))
    model: Any = models.load_base(source, quantization="none", device=torch.device(device), dtype=torch.float32)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(5, 300, (2, 16), device=device)

    def grads() -> list[torch.Tensor]:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    want = grads()
    assert not gone
    assert offload_checkpoints(model) == offload_checkpoints(model) >= 2
    for _ in range(2):
        gone.clear()
        for a, b in zip(grads(), want, strict=True):
            assert torch.equal(a, b)
    assert [shape for shape in gone if shape == (2, 16, 64)] == [(2, 16, 64)] * 2
    assert all(shape.numel() <= 2 * 16 * 64 for shape in gone)


class Late:
    """Copies that happen when somebody waits for them, at the latest moment that a stream allows."""

    log: list[str]

    def __init__(self, device: torch.device) -> None:
        self.queue: list[tuple[int, Any]] = []
        self.log = []
        self.count = 0

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> int:
        target.fill_(torch.nan)
        # The side holds no memory: who asks for a copy does, until it has waited.
        ends = weakref.ref(target), weakref.ref(source)
        self.count += 1

        def run() -> None:
            to, of = (end() for end in ends)
            assert to is not None, "memory was let go before its copy was waited for"
            assert of is not None, "memory was let go before its copy was waited for"
            to.copy_(of)

        self.queue.append((self.count, run))
        self.log.append("copy")
        return self.count

    def wait(self, copied: int) -> None:
        self.log.append("wait")
        while self.queue and self.queue[0][0] <= copied:
            self.queue.pop(0)[1]()


def chain(pipe: Pipe | None, x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    """Layers of one input each, checkpointed."""
    for w in weights:

        def layer(t: torch.Tensor, w: torch.Tensor = w) -> torch.Tensor:
            return (t @ w).sin()

        if pipe is None:
            x = checkpoint(layer, x, use_reentrant=False)
        else:
            with torch.autograd.graph.saved_tensors_hooks(pipe.pack, pipe.unpack):
                x = checkpoint(layer, x, use_reentrant=False)
    return x.square().sum()


def problem(device: str = "cpu", n: int = 8, layers: int = 6) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(0)
    weights = [(torch.randn(n, n, device=device) / n**0.5).requires_grad_() for _ in range(layers)]
    return torch.randn(n, n, device=device), weights


@pytest.fixture
def late() -> tuple[Pipe, list[Late]]:
    sides: list[Late] = []

    def make(device: torch.device) -> Late:
        sides.append(Late(device))
        return sides[-1]

    return Pipe(make), sides


def test_nothing_is_read_before_its_copy_and_the_next_is_asked_for(late: tuple[Pipe, list[Late]]) -> None:
    pipe, sides = late
    x, weights = problem()
    want = torch.autograd.grad(chain(None, x, weights), weights)
    for _ in range(2):
        loss = chain(pipe, x, weights)
        (side,) = sides
        # Six leave; the pass waits for all but the last two.
        assert side.log == ["copy", "copy", *["copy", "wait"] * 4]
        side.log.clear()
        for a, b in zip(torch.autograd.grad(loss, weights), want, strict=True):
            assert torch.equal(a, b)
        # The last two have not left the device; each that comes back was asked for one layer earlier.
        assert side.log == ["wait", "wait", "copy", "wait", "copy", "wait", "copy", "wait", "copy", "wait"]
        side.log.clear()


def test_a_pass_that_ends_early_and_one_that_is_repeated(late: tuple[Pipe, list[Late]]) -> None:
    pipe, _ = late
    x, weights = problem()
    want = torch.autograd.grad(chain(None, x, weights), weights)
    loss = chain(pipe, x, weights)
    torch.autograd.grad(loss, weights[-3:])  # leaves one that was asked for and not used
    del loss
    other = chain(pipe, x, weights)
    loss = chain(pipe, x, weights)  # two passes at once
    for one in (other, loss):
        torch.autograd.grad(one, weights, retain_graph=True)
        for a, b in zip(torch.autograd.grad(one, weights), want, strict=True):
            assert torch.equal(a, b)


def test_a_change_in_place_is_noticed(late: tuple[Pipe, list[Late]]) -> None:
    pipe, _ = late
    t = torch.ones(4)
    kept = pipe.pack(t)
    t.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        pipe.unpack(kept)


def test_integers_stay_and_layouts_too() -> None:
    pipe, ids = Pipe(), torch.arange(3)
    assert pipe.unpack(pipe.pack(ids)) is ids
    tensors = [torch.randn(4, 6).T.contiguous().T, torch.randn(2, 3), torch.randn(3), torch.randn(5)]
    kept = [pipe.pack(t) for t in tensors]
    for packed, t in reversed(list(zip(kept, tensors, strict=True))):
        found = pipe.unpack(packed)
        assert torch.equal(found, t)
        assert found.stride() == t.stride()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_slow_copies_on_a_gpu() -> None:
    """Copies that take longer than the layers between them: a wait that is missing reads what is not there yet."""

    class Slow(Side):
        def copy(self, target: torch.Tensor, source: torch.Tensor) -> Any:
            with torch.cuda.stream(self.stream):
                torch.cuda._sleep(2_000_000)
            return super().copy(target, source)

    x, weights = problem("cuda", 512, 12)
    want = torch.autograd.grad(chain(None, x, weights), weights)
    pipe = Pipe(Slow)
    for _ in range(4):
        found = torch.autograd.grad(chain(pipe, x, weights), weights)
        noise = [torch.full_like(x, torch.nan) for _ in range(8)]  # takes what was let go too early
        del noise
        for a, b in zip(found, want, strict=True):
            assert torch.equal(a, b)
    before = torch.cuda.memory_allocated()
    loss = chain(Pipe(), x, weights)
    assert torch.cuda.memory_allocated() - before < 5 * x.nbytes
    del loss


def test_nothing_to_offload() -> None:
    with pytest.raises(RuntimeError, match="nothing to offload"):
        OffloadCheckpoints().on_train_begin(None, None, None, model=torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"offload_checkpoints": True}, "offload_checkpoints needs gradient_checkpointing"),
        ({**CHECKPOINTS, "step": "compile"}, "set step eager"),
        ({"blocks": True, "backend": "peft"}, "backend peft has none"),
    ],
)
def test_what_does_not_go_together(options: dict[str, Any], values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(None, options | values)


def test_liger_that_is_missing_is_one_line(
    tiny_model: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    with pytest.raises(UserError, match=r"^liger: liger=True needs Liger kernels: pip install") as caught:
        train(load(None, {**options, "liger": True}))
    assert "\n" not in str(caught.value)
