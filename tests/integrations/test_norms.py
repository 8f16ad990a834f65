"""Norms that ``accelerate(model, blocks=True)`` converts, for every architecture."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import sys
import types
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")
pytest.importorskip("triton")

import architectures
from architectures import ARCHITECTURES

from fastlora import norm
from fastlora.bench import models
from fastlora.integrations.peft import accelerate, norms, restore
from fastlora.integrations.peft.norms import Formula, FusedNorm, formula_of
from fastlora.training import step as steps
from fastlora.training.attention import use_causal_attention

pytestmark = pytest.mark.filterwarnings("ignore")

ARCHITECTURE = pytest.mark.parametrize("name", ARCHITECTURES)
IN_16_BITS: dict[str, Any] = {"dtype": torch.bfloat16, "rounded": True}


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "device" in request.fixturenames and request.getfixturevalue("device") == "cpu" and torch.cuda.is_available():
        pytest.skip("Triton is compiled, not interpreted")
    monkeypatch.setattr(norms, "NARROWEST", 16)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Every norm that our kernel computes."""
    spy = Mock(wraps=norm.rms_norm)
    monkeypatch.setattr(norm, "rms_norm", spy)
    return spy


def all_norms(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]


def step(model: Any) -> dict[str, torch.Tensor]:
    """The loss, and the gradient of every parameter that learns."""
    device = next(model.parameters()).device
    tokens = torch.randint(1, 128, (2, 4), generator=torch.Generator().manual_seed(3)).to(device)
    model.zero_grad()
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def norms_learn(model: Any) -> None:
    for module in all_norms(model):
        module.weight.requires_grad_()


def error(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], name: str) -> float:
    return float((got[name].double() - want[name].double()).norm())


@pytest.mark.parametrize(
    ("name", "learn"), [*((name, False) for name in ARCHITECTURES), ("llama", True), ("gemma2", True)], ids=str
)
def test_error_in_bfloat16(name: str, learn: bool, device: str, launches: Mock) -> None:
    """Of the loss and every gradient, against the same model in float32: at most twice that of the stock model."""
    prepare = norms_learn if learn else lambda model: None
    truth, stock, fast = (architectures.make(name, dtype, device, rounded=True) for dtype in
                          (torch.float32, torch.bfloat16, torch.bfloat16))  # fmt: skip
    for model in (truth, stock, fast):
        prepare(model)
    accelerate(fast, "torch", blocks=True)
    count = len(all_norms(fast))
    assert all(isinstance(module, FusedNorm) for module in all_norms(fast))
    want, unfused, fused = (step(model) for model in (truth, stock, fast))
    assert launches.call_count == count
    eps = torch.finfo(torch.bfloat16).eps
    assert fused.keys() == want.keys()
    for key, value in want.items():
        assert fused[key].dtype == unfused[key].dtype
        bound = 2 * error(unfused, want, key) + eps * float(value.double().norm())
        assert error(fused, want, key) <= bound, key


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, device: str, launches: Mock) -> None:
    fast = architectures.make("llama", device=device, **IN_16_BITS)
    accelerate(fast, "torch", blocks=True)
    fast.train()
    fast.enable_input_require_grads()
    want, once = step(fast), launches.call_count
    fast.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = step(fast)
    assert launches.call_count == 3 * once - 1, "all but the last norm are in blocks"
    for key, value in want.items():
        assert torch.equal(got[key], value), key


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_a_cuda_graph(checkpointing: bool, launches: Mock) -> None:
    """The losses of some steps, with the gradients of each in the one after it."""
    device = torch.device("cuda")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = models.config("llama-3-8b", 2, 97, **sizes, head_dim=64)
    results = []
    for captured in (False, True):
        model = models.adapt(models.base(config, device), r=4)
        accelerate(model, blocks=True, loss=True)
        models.checkpoint(model.train(), checkpointing, captured=captured)
        use_causal_attention(model.get_base_model(), "auto")
        learned = [p for _, p in models.adapters(model)]

        def run(batch: steps.Inputs, model: Any = model) -> torch.Tensor:
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(input_ids=batch["ids"], labels=batch["ids"]).loss
            loss.backward()
            return loss.detach()

        graph = steps.CapturedStep(run, learned)
        optimizer = torch.optim.AdamW(learned, lr=1e-2)
        losses = []
        for ids in models.token_batches(config, 2, 32, device, 0, 5):
            losses.append((graph if captured else run)({"ids": ids}).item())
            optimizer.step()
            optimizer.zero_grad()
        assert graph.failure is None
        assert (len(graph._graphs) == 1) == captured
        results.append(losses)
        # Five norms, and those of two blocks again; none where a captured step is replayed.
        assert launches.call_count % (5 + 4 * checkpointing) == 0
        assert launches.call_count > 0
        launches.reset_mock()
    assert results[1] == pytest.approx(results[0], rel=2e-3)


@pytest.mark.parametrize("case", ["float32", "another type of weight", "compiled", "no triton"])
def test_its_own_forward_elsewhere(case: str, launches: Mock, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("the interpreter stands for the GPU")
    options: dict[str, Any] = {} if case == "float32" else IN_16_BITS
    stock, fast = (architectures.make("llama", **options) for _ in range(2))
    accelerate(fast, "torch", blocks=True)
    if case == "another type of weight":
        for model in (stock, fast):
            for module in all_norms(model):
                module.weight.data = module.weight.data.float()
    elif case == "no triton":
        machine = dataclasses.replace(norm.backends.this_machine(), triton="it is not installed")
        monkeypatch.setattr(norm.backends, "this_machine", lambda: machine)
    run: Any = torch.compile(fast, backend="aot_eager", fullgraph=True) if case == "compiled" else fast
    tokens = torch.arange(1, 13).view(1, 12)
    with torch.no_grad():
        if case == "another type of weight":
            run = all_norms(fast)[0]
            x = stock.get_input_embeddings()(tokens)
            assert torch.equal(run(x), all_norms(stock)[0](x))
        else:
            assert run(input_ids=tokens).logits.isfinite().all()
    launches.assert_not_called()


def test_hooks_and_inference(launches: Mock, device: str) -> None:
    fast = architectures.make("llama", device=device, **IN_16_BITS)
    accelerate(fast, "torch", blocks=True)
    module, seen = all_norms(fast)[0], []
    handle = module.register_forward_hook(lambda module, args, y: seen.append(y) or y * 2)
    x = torch.randn(2, 3, 64, dtype=torch.bfloat16, device=device)
    with torch.inference_mode():
        y = module(x)
    handle.remove()
    assert launches.call_count == 1
    assert torch.equal(y, seen[0] * 2)
    torch.testing.assert_close(seen[0], type(module).stock.forward(module, x), rtol=1e-2, atol=1e-2)


# -- which norms ------------------------------------------------------------------------------------------------------


@ARCHITECTURE
def test_formula(name: str) -> None:
    offset = int(name.startswith("gemma"))
    formula = Formula(offset, not offset, "eps" if offset else "variance_epsilon")
    kinds = {type(module) for module in all_norms(architectures.make(name))}
    assert kinds
    for kind in kinds:
        assert formula_of(kind) == formula


class Usual(nn.Module):
    def __init__(self, k: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(k))
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return (n * self.weight.float()).to(x.dtype)


class Centered(Usual):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


class Halved(Usual):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 0.5


class Coarse(Usual):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class Widening(Usual):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).float()


class Inside(Usual):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm = x.float().square().mean(-1, keepdim=True).sqrt() + self.eps
        return (x.float() / norm * self.weight.float()).to(x.dtype)


class Pair(Usual):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), x


@pytest.mark.parametrize("kind", [Centered, Halved, Coarse, Widening, Inside, Pair, nn.LayerNorm, nn.RMSNorm])
def test_other_formulas_are_left_alone(kind: Any) -> None:
    assert formula_of(Usual) == Formula(0, False, "eps")
    assert isinstance(formula_of(kind), str)


def reason(module: nn.Module) -> str | None:
    (report,) = norms.convert(nn.Sequential(module))
    # What may run later, after a change of type or device, is converted.
    assert isinstance(module, FusedNorm) == (report.reason is None or "16-bit" in report.reason)
    return report.reason


def test_what_stays() -> None:
    if torch.cuda.is_available():
        pytest.skip("the interpreter stands for the GPU")
    assert reason(Usual(32).bfloat16()) is None
    assert reason(Usual(32)) == "float32 is not a 16-bit type"
    assert reason(Usual(8).bfloat16()) == "rows of 8 columns are too short for its kernel"
    odd = Usual(32).bfloat16()
    odd.forward = lambda x: x
    assert reason(odd) == "its forward is replaced on the instance"
    biased, holding, integer = Usual(32), Usual(32), Usual(32)
    biased.bias = nn.Parameter(torch.zeros(32))
    holding.inner = nn.Identity()
    integer.eps = 1
    for module in (biased, holding, integer, nn.Linear(4, 4), nn.Embedding(4, 4)):
        assert not norms.convert(nn.Sequential(module))


# -- copies, undoing, Liger -------------------------------------------------------------------------------------------


@ARCHITECTURE
def test_undone(name: str) -> None:
    fast, stock = architectures.make(name), architectures.make(name)
    for _ in range(2):
        accelerate(fast, "torch", blocks=True)
    assert all(type(module).__mro__.count(FusedNorm) == 1 for module in all_norms(fast))
    assert list(fast.state_dict()) == list(stock.state_dict())
    restore(fast)
    assert [type(module) for module in all_norms(fast)] == [type(module) for module in all_norms(stock)]
    assert not [key for module in fast.modules() for key in vars(module) if "fastlora" in key]
    accelerate(fast, "torch", blocks=True)
    accelerate(fast, "torch")
    assert not any(isinstance(module, FusedNorm) for module in all_norms(fast))


def copied(model: Any) -> Any:
    return copy.deepcopy(model)


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def ligers(self: Any, x: torch.Tensor) -> torch.Tensor:
    """What Liger binds to an instance."""
    return x + self.weight


ligers.__module__ = "liger_kernel.transformers.rms_norm"


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library with Liger's way of changing norms."""

    def apply_liger_kernel_to_llama(rms_norm: bool = True, model: Any = None) -> None:
        for module in all_norms(model):
            module.offset = 0.0
            module.forward = types.MethodType(ligers, module)

    modules = {name: types.ModuleType(name) for name in (
        "liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.rms_norm")}  # fmt: skip
    modules["liger_kernel.transformers"].apply_liger_kernel_to_llama = apply_liger_kernel_to_llama
    modules["liger_kernel.transformers.rms_norm"].ligers = ligers
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("make", [copied, pickled, saved])
def test_copies(make: Callable[[Any], Any], library: None, launches: Mock) -> None:
    fast = architectures.make("llama", **IN_16_BITS)
    accelerate(fast, "torch", blocks=True, liger=True)
    again = make(fast)
    module = all_norms(again)[0]
    assert isinstance(module, FusedNorm)
    x = torch.randn(2, 64)
    with torch.no_grad():
        module.weight.fill_(3)
        assert torch.equal(module.float()(x), x + 3), "Liger's, of the copy"
        assert not torch.equal(all_norms(fast)[0].weight.float(), module.weight)
    launches.assert_not_called()


@pytest.mark.parametrize("before", [False, True], ids=["together", "Liger before"])
def test_beside_liger(before: bool, library: None, launches: Mock, device: str) -> None:
    """Ours in 16 bits, Liger's where ours do not run."""
    fast, stock = (architectures.make("llama", device=device, **IN_16_BITS) for _ in range(2))
    if before:
        accelerate(fast, "torch", liger=True)
    for _ in range(2):
        accelerate(fast, "torch", blocks=True, liger=True)
    x = torch.randn(3, 64, device=device, dtype=torch.bfloat16)
    module, plain = all_norms(fast)[0], all_norms(stock)[0]
    torch.testing.assert_close(module(x), plain(x), rtol=1e-2, atol=1e-2)
    assert launches.call_count == 1
    wide = x.float()
    assert torch.equal(module(wide), wide + module.weight)
    accelerate(fast, "torch", liger=True)
    assert torch.equal(all_norms(fast)[0](x), x + module.weight), "without blocks it is Liger's"
    restore(fast)
    assert torch.equal(all_norms(fast)[0](x), plain(x))
    assert not [key for key in vars(all_norms(fast)[0]) if key in ("forward", "offset") or "fastlora" in key]
