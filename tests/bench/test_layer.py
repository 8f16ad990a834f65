"""One layer: every provider computes the same, and a wrong one is not timed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing (extra: bench)")
pytest.importorskip("peft", reason="peft is missing (extra: bench)")

from fastlora.backends import BACKENDS, Problem, this_machine
from fastlora.bench import layer, providers, timing
from fastlora.bench.providers import FLOOR, MODES, PROVIDERS, Mode

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter computes bf16 products wrongly; compiling takes longer than all the rest.
LEFT_OUT = ("fastlora triton", "PEFT compiled")


def runs_here(name: str) -> bool:
    """Whether the backend in the name of a provider, if it is one, can run."""
    backend = BACKENDS.get(name.removeprefix("fastlora "))
    problem = Problem(8, 64, 128, 4, device_type=DEVICE.type)
    return backend is None or not backend.unsupported(problem, this_machine())


NAMES = tuple(name for name in PROVIDERS if name not in LEFT_OUT and runs_here(name))


def compare(names: tuple[str, ...], mode: Mode, **options: Any) -> dict[str, layer.Measured]:
    return layer.compare((64, 128), 8, 4, mode, names, device=DEVICE, rounds=1, **options)


@pytest.mark.parametrize("mode", MODES)
def test_every_provider_agrees_and_is_timed(mode: Mode) -> None:
    found = compare(NAMES, mode)
    assert tuple(found) == NAMES
    for name, measured in found.items():
        assert measured.absent is None, f"{name}: {measured.absent}"
        assert measured.gpu_us is not None
        assert measured.gpu_us.p50 > 0


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_every_provider_can_be_captured(mode: Mode) -> None:
    left_out = ("fastlora reference", "PEFT compiled")
    names = tuple(name for name in PROVIDERS if name not in left_out and runs_here(name))
    found = compare(names, mode)
    assert {name: one.gpu_us and one.gpu_us.launches for name, one in found.items()} == dict.fromkeys(names, False)


@pytest.mark.parametrize(("mode", "part"), [("decode", "y"), ("fwd+bwd", "dx")])
def test_a_wrong_provider_is_not_timed(monkeypatch: pytest.MonkeyPatch, mode: Mode, part: str) -> None:
    class Shifted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:
            return y * 1.2 if part == "y" else y.clone()

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
            return dy * 1.2

    def wrong(one: providers.Layer) -> providers.Provider:
        right = providers.naive(one)
        return dataclasses.replace(right, forward=lambda x: Shifted.apply(right.forward(x)))

    monkeypatch.setitem(PROVIDERS, "wrong", wrong)
    found = compare(("wrong", "fastlora"), mode)
    assert found["wrong"].gpu_us is None
    assert found["wrong"].absent is not None
    assert f"{part} is wrong by 0.2" in found["wrong"].absent
    assert found["fastlora"].absent is None


def test_a_failing_provider_is_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(one: providers.Layer) -> providers.Provider:
        raise OSError("no such thing\nmore")

    monkeypatch.setitem(PROVIDERS, "failing", failing)
    found = compare(("failing", "fastlora"), "fwd", wall=True, host=True)
    assert found["failing"] == layer.Measured(absent="OSError: no such thing")
    assert found["fastlora"].wall_us is not None
    assert found["fastlora"].host_us is not None


def test_bare_products_are_those_of_the_layer() -> None:
    one = providers.make_layer(64, 128, 4, torch.float32, DEVICE)
    x, dy = torch.randn(8, 128, device=DEVICE).requires_grad_(), torch.randn(8, 64, device=DEVICE)
    y, dx = providers.products(one).call(x, dy, "fwd+bwd")()
    torch.testing.assert_close(y, x.detach() @ one.dense.T)
    torch.testing.assert_close(dx, dy @ one.dense)
    torch.testing.assert_close(providers.products(one).call(x, dy, "decode")(), y)


def test_copies_share_nothing() -> None:
    one = providers.make_layer(64, 128, 4, torch.bfloat16, DEVICE)
    other = providers.copy_of(one)
    pairs = [(one.dense, other.dense), (one.lora_a, other.lora_a)]
    pairs += zip(one.w.tensors().values(), other.w.tensors().values(), strict=True)
    for a, b in pairs:
        assert a.data_ptr() != b.data_ptr()
        assert torch.equal(a, b)


@pytest.mark.parametrize("copies", [1, 7, 19])
def test_graphs_hold_whole_rotations(copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def measured(variants: dict[str, timing.Call], *, calls: int, **options: Any) -> dict[str, timing.Times]:
        seen.append(calls)
        return {}

    monkeypatch.setattr(timing, "copies_past_cache", lambda nbytes, device: copies)
    monkeypatch.setattr(timing, "measure_graph", measured)
    compare((FLOOR,), "decode")
    assert seen == [{1: 20, 7: 21, 19: 38}[copies]]


def test_what_does_not_fit_is_skipped_with_the_reason() -> None:
    found = layer.compare((2**20, 2**20), 1, 4, "fwd", ("fastlora",), device=DEVICE)
    assert "GiB are free" in (found["fastlora"].absent or "")


def test_cases_leave_out_twins_and_decoding_of_many() -> None:
    shapes = ("llama-3-8b q/o", "mistral-7b q/o", "llama-3-8b k/v")
    found = layer.cases(shapes, (1, 8192), (16,), ("fwd", "decode"))
    assert {shape for shape, *_ in found} == {"llama-3-8b q/o", "llama-3-8b k/v"}
    assert [(m, mode) for shape, m, _, mode in found if shape == shapes[0]] == [
        (1, "fwd"),
        (8192, "fwd"),
        (1, "decode"),
    ]


def test_least_work_by_hand() -> None:
    assert layer.moved_bytes(1000, (64, 128), 8, "decode") == 1000 + 2 * 8 * (64 + 128)
    assert layer.moved_bytes(1000, (64, 128), 8, "fwd+bwd") == 2 * (1000 + 2 * 8 * (64 + 128))
    products = [(8, 128, 4), (8, 4, 64), (8, 128, 64)]  # u, u B^T, x W^T
    forward = sum(2 * a * b * c for a, b, c in products)
    backward = [(8, 64, 4), (4, 8, 128), (64, 8, 4), (8, 4, 128), (8, 64, 128)]  # du, dA, dB, du A, dy W
    assert layer.operations((64, 128), 8, 4, "fwd") == forward
    assert layer.operations((64, 128), 8, 4, "fwd+bwd") == forward + sum(2 * a * b * c for a, b, c in backward)


def test_a_case_that_fails_is_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(layer, "compare", broken)
    case = ("smollm2-135m k/v", 1, 4, MODES[0])
    (line,) = layer.lines(case, (FLOOR,), timing.Ceilings(1.0, 1.0), DEVICE)
    assert line["absent"] == "RuntimeError: out of luck"
