"""Training steps: who is compared with whom, what is counted, and that a stack that is not there only says so."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing (extra: bench)")
pytest.importorskip("peft", reason="peft is missing (extra: bench)")
pytest.importorskip("transformers", reason="transformers is missing (extra: bench)")
pytest.importorskip("rich", reason="rich is missing (extra: bench)")

from fastlora.bench import models, record, report, train_loss
from fastlora.bench import train_step as suite
from fastlora.bench.train_step import BLOCKS, GEMM, LAYERS, PEFT, PEFT_PREPARED, SIDE, UNSLOTH, Case, Measured
from fastlora.training import offload

CPU = torch.device("cpu")
CASE = suite.tiny(suite.PARTS["goals"]).cases[0]
GOAL_CASE = next(iter(suite.GOALS))


def measured(stack: str, ms: float, gib: float = 1.0, case: Case = GOAL_CASE, **values: Any) -> Measured:
    return Measured(stack, case, None, ms, int(gib * 2**30), (3.0, 2.0), **values)


def goals(*found: Measured) -> dict[str, record.Row]:
    return {row.metric: row for row in suite.goal_rows(GOAL_CASE, found, suite.GOALS[GOAL_CASE])}


@pytest.mark.parametrize(
    ("memory", "stack", "ms", "ok"),
    [
        ((1.0, 2.0), BLOCKS, 100, [True, True, True, True]),
        ((1.0, 3.0), LAYERS, 125, [False, True, False, True]),
        ((2.5, 3.0), BLOCKS, 100, [True, True, True, False]),
    ],
)
def test_goals_are_those_of_our_fastest_stack(
    memory: tuple[float, float], stack: str, ms: float, ok: list[bool]
) -> None:
    """Of those that need no more memory than the peer, if there are any."""
    ours = [measured(LAYERS, 125, memory[0]), measured(BLOCKS, 100, memory[1])]
    rows = goals(measured(PEFT, 200), measured(PEFT_PREPARED, 250), measured(UNSLOTH, 130, 2.0), *ours)
    assert rows["tokens/s over Unsloth"].value == pytest.approx(130 / ms)
    assert rows["tokens/s over HF + PEFT"].value == pytest.approx(200 / ms)
    assert rows["tokens/s over HF + PEFT, prepared"].value == pytest.approx(250 / ms)
    assert rows["peak memory over Unsloth"].value == pytest.approx(memory[stack == BLOCKS] / 2)
    assert [row.note for row in rows.values()] == [stack] * 4
    assert [row.ok for row in rows.values()] == ok


def test_a_missing_peer_is_a_miss_with_its_reason() -> None:
    gone = Measured(UNSLOTH, GOAL_CASE, "unsloth is not installed")
    rows = goals(measured(PEFT, 200), gone, measured(LAYERS, 100))
    assert rows["tokens/s over HF + PEFT, prepared"].note == "HF + PEFT, prepared: not measured"
    assert rows["tokens/s over Unsloth"].note == "Unsloth: unsloth is not installed"
    assert rows["peak memory over Unsloth"].value is None
    assert [row.ok for row in rows.values()] == [False, False, True, False]
    assert all(row.value is None for row in goals(measured(PEFT, 200)).values())


def test_rows_of_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    case = dataclasses.replace(GOAL_CASE, batch=2)
    monkeypatch.setattr(suite, "predicted_peak", lambda case, blocks: 0.75 * 2**30)
    found = [
        measured(PEFT, 512.0, 2.5, case, gpu_ms={GEMM: 3.0}, flops_per_second=1e12),
        measured(LAYERS, 256.0, 1, case),
    ]
    rows = {row.metric: row.value for row in suite.rows_of(found)}
    assert rows["tokens/s, HF + PEFT"] == pytest.approx(8000)
    assert rows["peak memory GiB, HF + PEFT"] == pytest.approx(2.5)
    assert rows["loss after 2 steps, fastlora layers"] == 2.0
    assert rows[f"GPU ms, {GEMM}, HF + PEFT"] == 3.0
    assert rows["error of the predicted peak memory, fastlora layers"] == pytest.approx(0.25)
    assert "error of the predicted peak memory, HF + PEFT" not in rows
    needed = models.step_operations(case.config(), 2, 2048, suite.R)
    assert rows["MFU, HF + PEFT"] == pytest.approx(needed / 0.512e12)
    assert "MFU, fastlora layers" not in rows


def test_measurements_survive_their_file() -> None:
    one = measured(PEFT, 3.5, case=CASE, gpu_ms={"loss": 1.0})
    assert Measured.from_json(one.to_json()) == one


def test_operations_of_a_step() -> None:
    config = models.config("llama-3-8b", 1, 100)
    weights = 4096 * (4096 + 1024 + 1024 + 4096 + 3 * 14336)
    pairs = 2 * (4096 + 4096) + 2 * (1024 + 4096) + 3 * (4096 + 14336)
    expected = 64 * (4 * weights + 6 * 16 * pairs + 6 * 32 * 4096 + 4 * 100 * 4096)
    assert models.step_operations(config, 2, 32, 16) == expected


@pytest.mark.parametrize("name", models.CONFIGS)
def test_models_have_their_published_sizes(name: str) -> None:
    config = models.config(name)
    weights = sum(n * k for n, k in models.linear_sizes(config)) * config.num_hidden_layers
    heads = (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size
    billions = {
        "llama-3-8b": 8.03,
        "qwen3-8b": 8.19,
        "qwen2.5-7b": 7.61,
        "mistral-7b": 7.25,
        "gemma-2-9b": 9.24,
        "llama-3-70b": 70.55,
        "smollm2-135m": 0.1345,
    }[name]
    assert (weights + heads) / 1e9 == pytest.approx(billions, rel=0.003)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_tst_256x128_64x4_1x2_h_bz_coopB_TNN", GEMM),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", GEMM),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>", GEMM),
        ("linear_kernel", GEMM),
        ("input_gradient_kernel", GEMM),
        ("projecting_gemm_kernel", GEMM),
        ("project_kernel", SIDE),
        ("project_stacked_kernel", SIDE),
        ("gradients_kernel", SIDE),
        ("du_db_kernel", SIDE),
        ("dequantize_words_kernel", "dequantization"),
        ("void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>", "dequantization"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
        ("gated_backward_kernel", "activations"),
        ("_rms_norm_forward_kernel", "norms, RoPE, elementwise"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::silu_kernel>", "activations"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("void at::native::(anonymous namespace)::cunn_SoftMaxForward", "loss"),
        ("liger_cross_entropy_kernel", "loss"),
        ("Memcpy DtoD (Device -> Device)", "other"),
    ],
)
def test_kernels_have_their_class(kernel: str, kind: str) -> None:
    assert suite.kernel_class(kernel) == kind


def test_products_of_the_rank_are_side_passes() -> None:
    assert suite.is_side_product("aten::mm", [[8192, 4096], [4096, 16]], 16)
    assert suite.is_side_product("aten::addmm_", [[8192, 4096], [8192, 16], [16, 4096], []], 16)
    assert not suite.is_side_product("aten::mm", [[8192, 4096], [4096, 4096]], 16)
    assert not suite.is_side_product("aten::mul", [[8192, 16], []], 16)
    assert not suite.is_side_product("LoraBackward", [[8192, 16], [16, 16]], 16)


def test_stacks_start_together_and_learn() -> None:
    """B is zero at first: the first losses differ by rounding alone."""
    cases = (CASE, dataclasses.replace(CASE, checkpointing=True))
    found = list(suite.here((LAYERS, PEFT), cases, CPU))
    assert [(one.stack, one.case.checkpointing) for one in found] == [
        (name, kept) for name in (PEFT, LAYERS) for kept in (False, True)
    ]
    assert all(one.absent is None and one.ms > 0 and len(one.losses) == suite.WARM_UP + suite.TIMED for one in found)
    first = [one.losses[0] for one in found]
    assert max(first) - min(first) < 5e-3
    assert all(one.losses[-1] < one.losses[0] for one in found)
    assert found[0].losses == pytest.approx(found[1].losses, abs=5e-3)


def test_a_prepared_model_is_float32_between_its_layers() -> None:
    seen = {}
    for name in (PEFT, *suite.PREPARED):
        stack = dataclasses.replace(suite.STACKS[name], liger=False)
        model = suite._model(stack, CASE, CPU)
        norms = {p.dtype for key, p in model.named_parameters() if "norm" in key}
        assert norms == {torch.float32 if stack.prepared else torch.bfloat16}
        kinds = seen[name] = set()
        block = model.get_base_model().model.layers[-1]
        block.register_forward_hook(lambda module, args, out, kinds=kinds: kinds.add(out.dtype))
        step = suite.train_step(model, stack, CASE, CPU)
        assert math.isfinite(float(step()))
    assert seen == {PEFT: {torch.bfloat16}} | {name: {torch.float32} for name in suite.PREPARED}


def test_offloaded_checkpoints_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "offloaded"
    monkeypatch.setitem(suite.STACKS, name, suite.Stack("plain", "layers", offloaded=True))
    monkeypatch.setattr(suite, "skipped", lambda name, case: False)
    kept = dataclasses.replace(CASE, checkpointing=True)
    made, gone = [], []
    real, pack = suite._model, offload.Pipe.pack
    # Some versions of torch checkpoint an empty tensor beside what a block takes.
    monkeypatch.setattr(offload.Pipe, "pack", lambda self, t: (gone.append(t) if t.numel() else None) or pack(self, t))
    monkeypatch.setattr(suite, "_model", lambda *args: made.append(args) or real(*args))
    one, other = suite.here((LAYERS, name), (kept,), CPU)
    assert other.absent is None
    assert other.losses == one.losses
    assert len(made) == 1, "both run the same model"
    assert len(gone) == suite.WARM_UP + suite.TIMED


def test_a_model_with_the_loss_in_chunks_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = suite._model
    monkeypatch.setattr(suite, "_model", lambda stack, *args: made.append(stack) or real(stack, *args))
    found = list(suite.here((BLOCKS, suite.BLOCKS_LOSS), (CASE,), CPU))
    assert [one.absent for one in found] == [None, None]
    assert made == [suite.STACKS[BLOCKS], suite.STACKS[suite.BLOCKS_LOSS]]


def test_an_error_is_a_row_and_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    real = suite.measure

    def fails(name: str, *args: Any, **kwargs: Any) -> Measured:
        if name == PEFT:
            raise torch.OutOfMemoryError("too much")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(suite, "measure", fails)
    one, other = suite.here((PEFT, LAYERS), (CASE,), CPU)
    assert one.absent == "OutOfMemoryError: too much"
    assert other.absent is None


def test_what_is_not_measured_to_save_time() -> None:
    name = f"{LAYERS}, CUDA graph"
    large = dataclasses.replace(CASE, length=8192)
    deep = dataclasses.replace(CASE, blocks=32)
    found = list(suite.here((name,), (CASE, large, deep), CPU))
    assert [one.case for one in found] == [CASE]
    kept = dataclasses.replace(deep, checkpointing=True)
    assert [suite.skipped(suite.OFFLOADED, case) for case in (CASE, large, deep, kept)] == [True, True, True, False]
    assert [suite.skipped(PEFT, case) for case in (CASE, large, deep)] == [False] * 3
    assert [suite.skipped(BLOCKS, case) for case in (CASE, large, deep)] == [False] * 3
    assert [suite.skipped(LAYERS, case) for case in (CASE, large, deep)] == [False, False, True]


def test_processes_of_their_own() -> None:
    """One case is measured, one cannot be, and a process that is stopped says so."""
    broken = dataclasses.replace(CASE, model="no such model")
    one, other = suite.apart((PEFT,), (CASE, broken))
    assert one.absent is None
    assert math.isfinite(one.losses[-1])
    assert other.absent == "KeyError: 'no such model'"
    assert "longer than 0 s" in str(next(suite.apart((PEFT,), (CASE,), timeout=0.1)).absent)


def test_what_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite.importlib.util, "find_spec", lambda name: None)
    assert suite.missing(suite.STACKS[UNSLOTH]) == "unsloth is not installed"
    assert suite.missing(suite.STACKS[suite.PEFT_LIGER]) == "peft is not installed"
    monkeypatch.setattr(suite.importlib.util, "find_spec", lambda name: None if name == "liger_kernel" else name)
    assert suite.missing(suite.STACKS[suite.PEFT_LIGER]) == "liger_kernel is not installed"
    assert suite.missing(suite.STACKS[PEFT]) is None


def test_exported_models_are_the_same(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    suite.export(CASE, CPU, tmp_path)
    folder = suite.folder_of(CASE, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    built = models.base(CASE.config(), CPU)
    for (name, a), (_, b) in zip(loaded.named_parameters(), built.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert AutoTokenizer.from_pretrained(folder).pad_token_id == built.config.pad_token_id


class PublicInterface:
    """Unsloth's public interface, of which nothing but transformers and PEFT is behind it."""

    calls: ClassVar[list[dict[str, Any]]] = []

    @classmethod
    def from_pretrained(cls, name: str, **options: Any) -> tuple[Any, None]:
        from transformers import AutoModelForCausalLM

        cls.calls.append(options)
        return AutoModelForCausalLM.from_pretrained(name, dtype=options["dtype"]), None

    @staticmethod
    def get_peft_model(model: Any, use_gradient_checkpointing: Any, **options: Any) -> Any:
        from peft import LoraConfig, get_peft_model

        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))

    @staticmethod
    def for_training(model: Any, use_gradient_checkpointing: bool) -> Any:
        return model.train()


def test_a_stack_that_loads_a_checkpoint_trains_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "unsloth", types.SimpleNamespace(FastLanguageModel=PublicInterface))
    monkeypatch.setattr(suite, "missing", lambda stack: None)
    kept = dataclasses.replace(CASE, checkpointing=True)
    for case in (CASE, kept):
        suite.export(case, CPU, tmp_path)
    theirs = list(suite.here((UNSLOTH,), (CASE, kept), CPU, folder=tmp_path))
    assert [one.absent for one in theirs] == [None, None]
    assert [call["use_gradient_checkpointing"] for call in PublicInterface.calls] == [False, "unsloth"]
    (plain,) = suite.here((PEFT,), (CASE,), CPU)
    assert theirs[0].losses == pytest.approx(plain.losses, abs=1e-3)


def test_the_suite_writes_a_record_for_each_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("typer", reason="typer is missing (extra: bench)")
    from fastlora.cli import main

    assert main(["bench", "--suite", "train", "--quick", "--only", "breakdown", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/train_breakdown.json")
    data = json.loads(path.read_text())
    assert data["quick"]
    assert {row["case"] for row in data["rows"]} == {case.title for case in suite.tiny(suite.PARTS["breakdown"]).cases}
    shown = capsys.readouterr()
    assert str(path) in shown.out
    assert "tokens/s" in shown.err
    arguments = ["train_step", "--quick", "--only", "breakdown", "--stacks", PEFT, "--out", str(tmp_path / "some")]
    monkeypatch.setattr(sys, "argv", arguments)
    suite.main()
    (path,) = (tmp_path / "some").glob("*/train_breakdown.json")
    stacks = {row["metric"].split(", ")[1] for row in json.loads(path.read_text())["rows"] if row["goal"] is None}
    assert stacks == {PEFT}
    if not torch.cuda.is_available():
        assert main(["bench", "--suite", "train"]) == 2
        assert "--quick" in capsys.readouterr().err


def test_loss_curves_compare_means_over_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    base = models.base(CASE.config(), CPU)
    tokens = torch.arange(2000) * 7 % CASE.vocabulary
    rows, extra = train_loss.rows(CPU, train_loss.QUICK, (base, tokens))
    found = {row.metric: row for row in rows}
    distance = found[f"distance of the mean evaluation loss from PEFT's, share, {LAYERS}"]
    assert distance.goal == train_loss.TOLERANCE
    assert distance.ok
    ours, theirs = (found[f"evaluation loss, {name}"].value for name in (LAYERS, PEFT))
    assert distance.value == pytest.approx(abs(ours / theirs - 1))
    assert [len(run["losses"]) for run in extra["curves"][PEFT]] == [3, 3]
    one, other = extra["curves"][PEFT]
    assert one["evaluation"] != other["evaluation"]
    assert extra["curves"][LAYERS][0]["losses"] == pytest.approx(one["losses"], abs=5e-3)


def test_the_text_and_its_windows() -> None:
    assert len(train_loss.manual()) > 100_000
    tokens = torch.arange(1000)
    size = dataclasses.replace(train_loss.QUICK, length=10, batch=3)
    one, other = (train_loss.windows(tokens, size, 2, seed) for seed in (0, 1))
    assert [batch.shape for batch in one] == [(3, 10)] * 2
    assert torch.equal(one[0][:, 1:] - one[0][:, :-1], torch.ones(3, 9, dtype=torch.long))
    assert not torch.equal(one[0], other[0])
    assert torch.equal(one[1], train_loss.windows(tokens, size, 2, 0)[1])


def write(folder: Path, name: str, rows: list[record.Row], **extra: Any) -> None:
    path = record.write(name, rows, {"quick": False, **extra}, folder)
    path.write_text(path.read_text().replace('"gpu": null', '"gpu": "Some GPU"'))


def test_the_prediction_of_a_case_is_that_of_the_command() -> None:
    from fastlora.training import memory

    expected = memory.predict(CASE.config(), CASE.batch, CASE.length, r=suite.R)
    assert suite.predicted_peak(CASE, False) == expected.peak
    assert suite.predicted_peak(dataclasses.replace(CASE, checkpointing=True), False) != expected.peak


def test_report_of_training_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "predicted_peak", lambda case, blocks: 2**29)
    pytest.importorskip("matplotlib", reason="matplotlib is missing (extra: bench)")
    part = suite.PARTS["goals"]
    found = [
        measured(PEFT, 200, gpu_ms={GEMM: 150.0, suite.IDLE: 5.0}, flops_per_second=7e14),
        measured(LAYERS, 100, 0.5),
        Measured(UNSLOTH, GOAL_CASE, "unsloth is not installed"),
    ]
    rows = list(suite.by_case(part, found))
    write(tmp_path, "train", rows)
    write(tmp_path, "train_quick", rows, quick=True)
    text = report.training(tmp_path)
    assert "1 of 4 goals reached" in text
    assert "of 1 of these steps within 0.0% (1 within the goal of 10%)" in text
    assert "tokens/s over HF + PEFT | 2 | >= 1.95 | pass | fastlora layers |" in text
    assert "**MISS** | Unsloth: unsloth is not installed" in text
    device = next(tmp_path.iterdir()).name
    assert f"docs/plots/{device}-train.png" in report.summary(tmp_path)
    page = report.benchmarks(tmp_path)
    assert "| HF + PEFT | 40960 | 200 | 1 |" in page
    assert "| Unsloth | - | - | - | - | - | unsloth is not installed |" in page
    assert "| GPU ms of a step | products | idle |" in page
    readme = tmp_path / "README.md"
    readme.write_text("".join(f"<!-- {name}:begin -->\n<!-- {name}:end -->\n" for name in report.README_BLOCKS))
    written = report.write(tmp_path, tmp_path / "docs", readme)
    plots = [path for path in written if path.parent.name == "plots"]
    assert [path.name for path in plots] == [f"{device}-train.png", f"{device}-train.svg"]
    assert all(path.stat().st_size > 1000 for path in plots)
    before = [path.read_bytes() for path in plots]
    report.write(tmp_path, tmp_path / "docs", readme)
    assert [path.read_bytes() for path in plots] == before
