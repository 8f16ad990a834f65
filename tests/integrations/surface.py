"""PEFT's LoRA surface as a list of features. ``python tests/integrations/surface.py`` writes the table of
docs/drop-in.md from it; ``test_surface.py`` runs every one of them against PEFT itself, and checks the table."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from peft_models import quantize_linears
from torch import nn
from transformers.pytorch_utils import Conv1D

import fastlora
from fastlora import backends
from fastlora.bench import record

BASES = {"dense": "`nn.Linear`", "4bit": "`bnb.nn.Linear4bit`", "conv1d": "transformers' `Conv1D`"}
Results = dict[str, torch.Tensor]


class Tiny(nn.Module):
    """Two residual blocks of two projections, and a head."""

    def __init__(self, base: str, dtype: torch.dtype = torch.float32, base_bias: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(2):
            block = nn.ModuleDict()
            for name, k, n in (("up", 64, 128), ("down", 128, 64)):
                block[name] = Conv1D(n, k) if base == "conv1d" else nn.Linear(k, n, bias=base_bias)
                block[name].weight.data.normal_(std=k**-0.5)
                if base_bias:
                    block[name].bias.data.normal_()
            self.layers.append(block)
        self.head = nn.Linear(64, 16)
        self.to(dtype)
        if base == "4bit":
            quantize_linears(self, dtype, skip=("head",))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.layers:
            x = x + block["down"](torch.tanh(block["up"](x)))
        return self.head(x)


def config(base: str, **fields: Any) -> Any:
    given = {"r": 8, "lora_alpha": 12, "target_modules": ["up", "down"], "init_lora_weights": False, **fields}
    return peft.LoraConfig(fan_in_fan_out=base == "conv1d", **given)


def make(
    base: str,
    dtype: torch.dtype = torch.float32,
    base_bias: bool = True,
    autocast_adapter_dtype: bool = True,
    device: str = "cpu",
    **fields: Any,
) -> Any:
    """One and the same adapted `Tiny` at every call."""
    torch.manual_seed(0)
    model = Tiny(base, dtype, base_bias).to(device)
    torch.manual_seed(1)
    return peft.get_peft_model(model, config(base, **fields), autocast_adapter_dtype=autocast_adapter_dtype)


def place(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def inputs(model: nn.Module) -> torch.Tensor:
    dtype = next(p.dtype for name, p in model.named_parameters() if "head" in name)
    return torch.randn(4, 6, 64, generator=torch.Generator().manual_seed(7)).to(place(model), dtype)


def output(model: nn.Module, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(inputs(model), **kwargs)


def train(model: nn.Module) -> Results:
    """The output and every gradient of one step, that of x included."""
    model.zero_grad()
    x = inputs(model).requires_grad_()
    y = model(x)
    y.float().square().sum().backward()
    grads = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad, **grads}


def add(model: Any, base: str, name: str = "other", **fields: Any) -> None:
    torch.manual_seed(5)
    model.add_adapter(name, config(base, **{"r": 4, **fields}))


def both(model: Any, base: str, **fields: Any) -> Results:
    add(model, base, **fields)
    model.base_model.set_adapter(["default", "other"])
    return train(model)


def mixed(model: Any, base: str, **fields: Any) -> Results:
    add(model, base, **fields)
    names = ["other", "__base__", "default", "other"]
    return {"y": output(model.eval(), adapter_names=names)}


def weights(model: nn.Module) -> Results:
    return {name: t for name, t in model.state_dict().items() if t.is_floating_point()}


def merged(model: Any, base: str, safe: bool = False) -> Results:
    model.eval()
    before = output(model)
    model.merge_adapter(safe_merge=safe)
    results = {"y": before, "merged": output(model), **weights(model)}
    model.unmerge_adapter()
    return results | {"unmerged": output(model)}


def unloaded(model: Any, base: str, merge: bool) -> Results:
    y = output(model.eval())
    model = model.merge_and_unload() if merge else model.unload()
    return {"y": y, "unloaded": output(model), **weights(model)}


def first(model: nn.Module) -> Any:
    return next(m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer))


def rescaled(model: Any, base: str) -> Results:
    results = {}
    for i, change in enumerate(
        (
            lambda m: m.scale_layer(2.0),
            lambda m: m.unscale_layer(),
            lambda m: m.set_scale("default", 0.3),
            lambda m: m.scaling.update(default=torch.tensor(0.7, device=place(m))),
        )
    ):
        for layer in lora_layers(model):
            change(layer)
        results |= {f"{i} {name}": t for name, t in train(model).items()}
    return results


def lora_layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]


def disabled(model: Any, base: str) -> Results:
    y = output(model)
    with model.disable_adapter():
        return {"y": y, "disabled": output(model)}


def deleted(model: Any, base: str) -> Results:
    add(model, base)
    model.set_adapter("other")
    y = output(model)
    model.set_adapter("default")
    model.delete_adapter("other")
    return {"other": y, **train(model)}


def weighted(model: Any, base: str) -> Results:
    add(model, base)
    model.add_weighted_adapter(["default", "other"], [0.3, 0.6], "sum", combination_type="cat")
    model.set_adapter("sum")
    return {"y": output(model)}


def hotswapped(model: Any, base: str) -> Results:
    from peft.utils.hotswap import hotswap_adapter

    y = output(model)
    other = make(base, r=8)
    with torch.no_grad():
        for layer in lora_layers(other):
            layer.lora_B["default"].weight.mul_(-2)
    with tempfile.TemporaryDirectory() as folder:
        other.save_pretrained(folder)
        hotswap_adapter(model, folder, adapter_name="default")
    return {"y": y, "swapped": output(model)}


def reloaded(model: Any, base: str) -> Results:
    y = output(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        files = {p.name: torch.frombuffer(bytearray(p.read_bytes()), dtype=torch.uint8).float()
                 for p in Path(folder).rglob("*.safetensors")}  # fmt: skip
        model.load_adapter(folder, "again", low_cpu_mem_usage=True)
        model.set_adapter("again")
    return {"y": y, "again": output(model), **files}


def eva(model: Any, base: str) -> Results:
    data = list(torch.randn(8, 1, 32, 64, generator=torch.Generator().manual_seed(3)).to(place(model)))
    peft.initialize_lora_eva_weights(
        model,
        data,
        forward_fn=lambda m, x: m(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda x, *rest: x[0].reshape(-1, x[0].shape[-1]),
        show_progress_bar=False,
    )
    with torch.no_grad():
        for layer in lora_layers(model):
            b = layer.lora_B["default"].weight
            b.copy_(torch.randn(b.shape, generator=torch.Generator().manual_seed(2)))
    return train(model)


def preprocessed(base: str, init: str, device: torch.device) -> tuple[Any, Any]:
    """The base model and the configuration after what CorDA or LoRA-GA do before adapters are made."""
    torch.manual_seed(0)
    model = Tiny(base).to(device)
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(3)).to(device)
    if init == "corda":
        from peft.tuners.lora.corda import preprocess_corda

        given = config(
            base, init_lora_weights="corda", corda_config=peft.tuners.lora.config.CordaConfig(corda_method="kpm")
        )
        preprocess_corda(model, given, run_model=lambda: model(x))
    else:
        from peft.tuners.lora.loraga import preprocess_loraga

        given = config(base, init_lora_weights="lora_ga", lora_ga_config=peft.tuners.lora.config.LoraGAConfig())
        preprocess_loraga(model, given, lambda: model(x).square().mean().backward())
    return model, given


def after_preprocessing(model: Any, base: str, init: str) -> Results:
    """On models of its own; as fused as ``model`` is."""
    fused = "fastlora_backend" in first(model).__dict__
    own, given = preprocessed(base, init, place(model))
    torch.manual_seed(1)
    own = peft.get_peft_model(own, fastlora.register(given) if fused else given)
    return train(own)


def step(model: Any, base: str) -> Results:
    return train(model)


def evaluation(model: Any, base: str) -> Results:
    return train(model.eval())


def autocast(model: Any, base: str) -> Results:
    with torch.autocast(place(model).type, torch.bfloat16):
        return {"y": output(model)}


def arrow(model: Any, base: str) -> Results:
    """A router over two adapters that were trained and saved before; as fused as ``model`` is."""
    from peft.tuners.lora.config import ArrowConfig

    with tempfile.TemporaryDirectory() as folder:
        add(model, base, r=8)
        model.save_pretrained(folder)
        torch.manual_seed(0)
        own = Tiny(base).to(place(model))
        routed = peft.tuners.lora.arrow.create_arrow_model(
            own, [folder, f"{folder}/other"], ArrowConfig(top_k=2, rng_seed=0)
        )
    if "fastlora_backend" in first(model).__dict__:
        fastlora.accelerate(routed)
    return {"y": output(routed.eval())}


def parameters_too(model: Any, base: str) -> Results:
    """A wrapper of a parameter beside layers."""
    assert base == "4bit" or {type(layer).__name__ for layer in lora_layers(model)} >= {"ParamWrapper"}
    return train(model)


def trained_bias(model: Any, base: str) -> Results:
    assert any("bias" in name and p.requires_grad for name, p in model.named_parameters())
    return train(model)


def no_adapter(model: Any, base: str) -> Results:
    for layer in lora_layers(model):
        layer.set_adapter([])
    return {"y": output(model)}


def hooked(model: Any, base: str) -> Results:
    seen: list[int] = []
    for layer in lora_layers(model):
        layer.base_layer.register_forward_hook(lambda *args: seen.append(1))
    y = output(model)
    return {"y": y, "calls": torch.tensor(len(seen))}


def trained_base(model: Any, base: str) -> Results:
    for layer in lora_layers(model):
        layer.base_layer.weight.requires_grad_()
    return train(model)


@dataclasses.dataclass(frozen=True)
class Feature:
    """One row of the table."""

    name: str
    run: Callable[..., Results] = step
    """Drives a model and returns what must be PEFT's."""
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of LoraConfig."""
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of ``run``."""
    cells: dict[str, str] = dataclasses.field(default_factory=dict)
    """What happens on the bases where it is not "fused"; "refused" where PEFT itself raises."""

    needs: str | None = None
    """A package that PEFT needs for it and does not install."""
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further arguments of `make`."""
    gpu: bool = False
    """PEFT itself does it only on a GPU."""

    def cell(self, base: str) -> str:
        return self.cells.get(base, self.cells.get("", "fused"))


PEFT = "PEFT: "
REFUSED = "refused by PEFT: "
FEATURES = [
    Feature("one adapter"),
    Feature("base without bias", model={"base_bias": False}),
    Feature("autocast", autocast),
    Feature("bfloat16 with `autocast_adapter_dtype=True`", model={"dtype": torch.bfloat16}),
    Feature("bfloat16 with `autocast_adapter_dtype=False`",
            model={"dtype": torch.bfloat16, "autocast_adapter_dtype": False}),
    Feature("`use_rslora`", fields={"use_rslora": True}),
    Feature("`rank_pattern`, `alpha_pattern`", fields={"rank_pattern": {"up": 2}, "alpha_pattern": {"down": 3}}),
    Feature("`layers_to_transform`", fields={"layers_to_transform": [1], "layers_pattern": "layers"}),
    Feature("`modules_to_save`", fields={"modules_to_save": ["head"]}),
    Feature('`bias="all"`, `"lora_only"`', trained_bias, fields={"bias": "all"}),
    Feature("`lora_bias`", fields={"lora_bias": True}),
    Feature("dropout, evaluation", evaluation, fields={"lora_dropout": 0.3}),
    Feature("`use_dora`", fields={"use_dora": True}),
    Feature("`use_dora`, base without bias", model={"base_bias": False}, fields={"use_dora": True}),
    Feature("several adapters active", both),
    Feature("several active, with `lora_bias`", both, fields={"lora_bias": True}, arguments={"lora_bias": True}),
    Feature("several active, DoRA among them", both, arguments={"use_dora": True},
            cells={"": PEFT + "DoRA is active together with other adapters"}),
    Feature("`adapter_names`, mixed batch", mixed),
    Feature("`adapter_names`, with `lora_bias`", mixed, arguments={"lora_bias": True}),
    Feature("`set_adapter`, `delete_adapter`", deleted),
    Feature("`add_weighted_adapter`", weighted),
    Feature("`scale_layer`, `unscale_layer`, `set_scale`, scaling as a tensor", rescaled),
    Feature("`disable_adapter`", disabled),
    Feature("`merge_adapter`, `unmerge_adapter`", merged),
    Feature("`merge_adapter(safe_merge=True)`", merged, arguments={"safe": True}),
    Feature("`merge_adapter` of DoRA", merged, fields={"use_dora": True}),
    Feature("`merge_and_unload`", unloaded, arguments={"merge": True}),
    Feature("`unload`", unloaded, arguments={"merge": False}),
    Feature("`hotswap_adapter`", hotswapped),
    Feature("`save_pretrained`, `load_adapter(low_cpu_mem_usage=True)`", reloaded),
    Feature("no active adapter", no_adapter, cells={"": PEFT + "no adapter is active"}),
    Feature("hooks on inner modules", hooked, cells={"": PEFT + "base layer: it has hooks"}),
    Feature("trained base weight", trained_base,
            cells={"": PEFT + "the base weight is trained", "4bit": REFUSED + "only Tensors of floating point"}),
    *(Feature(f"`init_lora_weights={value!r}`", fields={"init_lora_weights": value}) for value in (True, "gaussian")),
    Feature("`init_lora_weights='olora'`", fields={"init_lora_weights": "olora"},
            cells={"conv1d": REFUSED + "mat1 and mat2 shapes cannot be multiplied"}),
    *(
        Feature(f"`init_lora_weights={value!r}`", fields={"init_lora_weights": value},
                cells={"4bit": REFUSED + "Please initialize PiSSA under float32"})
        for value in ("pissa", "pissa_niter_4")
    ),
    Feature("`init_lora_weights='orthogonal'`", fields={"init_lora_weights": "orthogonal"},
            cells={"4bit": REFUSED + "Only Tensors of floating point"}),
    Feature("`init_lora_weights='eva'`", eva,
            fields={"init_lora_weights": "eva", "eva_config": peft.EvaConfig(rho=1.0, tau=0.5)}),
    *(
        Feature(f"`init_lora_weights={value!r}`", after_preprocessing, arguments={"init": value}, cells=cells,
                needs=needs)
        for value, needs, cells in (
            ("corda", "attr", {"4bit": REFUSED + "mat1 and mat2 shapes cannot be multiplied"}),
            ("lora_ga", None, {"4bit": REFUSED + "LoRA-GA does not support quantized models"}),
        )
    ),
    Feature("`init_lora_weights='loftq'` (in PEFT on a GPU only)", fields={
                "init_lora_weights": "loftq", "loftq_config": peft.LoftQConfig()},
            cells={"4bit": REFUSED + "mat1 and mat2 shapes cannot be multiplied",
                   "conv1d": REFUSED + "mat1 and mat2 shapes cannot be multiplied"}, needs="scipy", gpu=True),
    Feature("`init_lora_weights='mica'`", fields={"init_lora_weights": "mica"},
            cells={"4bit": REFUSED + "Please initialize MiCA under float32"}),
    Feature("`trainable_token_indices`, `exclude_modules`", fields={
                "trainable_token_indices": {"head": [0, 1]}, "exclude_modules": ["layers.0.down"]}),
    Feature("`target_parameters` beside layers", parameters_too,
            fields={"target_parameters": ["layers.0.up.weight"], "target_modules": ["down"]},
            cells={"conv1d": REFUSED + "does not work with fan_in_fan_out"}),
    Feature("`runtime_config.ephemeral_gpu_offload`", fields={
                "runtime_config": peft.tuners.lora.config.LoraRuntimeConfig(ephemeral_gpu_offload=True)}),
    Feature("`use_qalora` (for GPTQ bases)", fields={"use_qalora": True},
            cells={"": "fused, as the plain LoRA that PEFT makes"}),
    Feature("`kasa_config`", fields={"kasa_config": peft.tuners.lora.config.KasaConfig()},
            cells={"": PEFT + "adapter 'default' uses KasaLinearVariant",
                   "4bit": "fused, as the plain LoRA that PEFT makes",
                   "conv1d": REFUSED + "KaSA does not support"}),
    Feature("`monteclora_config`", evaluation, fields={"monteclora_config": peft.tuners.lora.config.MontecloraConfig()},
            cells={"": PEFT + "adapter 'default' uses MontecloraLinearVariant",
                   "4bit": "fused, as the plain LoRA that PEFT makes"}),
    Feature("`velora_config`", fields={"velora_config": peft.tuners.lora.config.VeloraConfig()},
            cells={"4bit": REFUSED + "Linear4bit does not support VeLoRA"}),
    Feature("Arrow routing", arrow, cells={
        "": PEFT + "adapter 'arrow_router' uses ArrowLinearVariant",
        "conv1d": PEFT + "adapter 'arrow_router' uses ArrowLinearVariant"}),
    Feature("`use_bdlora`", fields={"use_bdlora": peft.tuners.lora.config.BdLoraConfig(
                nblocks=2, target_modules_bd_a=["up"], match_strict=False)},
            cells={"": PEFT + "adapter 'default' uses BdLoraLinearVariant",
                   "4bit": "fused, as the plain LoRA that PEFT makes",
                   "conv1d": REFUSED + "'Conv1D' object has no attribute 'in_features'"}),
    Feature("`alora_invocation_tokens`", fields={"alora_invocation_tokens": [1], "task_type": None},
            cells={"": PEFT + "adapter 'default' uses ALoraLinearVariant"}),
]  # fmt: skip


def table() -> str:
    """The rows of docs/drop-in.md."""
    rows = [("feature", *BASES.values()), ("---",) * 4]
    rows += [(feature.name, *(feature.cell(base) for base in BASES)) for feature in FEATURES]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@dataclasses.dataclass(frozen=True)
class Kind:
    """One row of the table of backends."""

    name: str
    base: str
    dtype: torch.dtype
    dropout_p: float = 0.0

    def cell(self, backend: str) -> str:
        """What the backend says of such layers, where all that it needs is installed."""
        device = "cuda" if backend in ("cuda", "triton") else "cpu"
        format_ = (
            {"quant_type": "nf4"} if self.base == "4bit" else {"quant_type": None, "blocksize": 0, "nested": False}
        )
        dropout = bool(self.dropout_p)
        problem = backends.Problem(2048, 128, 64, 8, device_type=device, dtype=self.dtype, dropout=dropout, **format_)
        reasons = backends.BACKENDS[backend].unsupported(problem, backends.Machine(None, None, None, (9, 0)))
        return f"refused: {reasons[0]}" if reasons else "fused"


BACKENDS = ("cuda", "triton", "cpu", "torch", "reference")
KINDS = [
    Kind("`Linear4bit`, bfloat16", "4bit", BF16),
    Kind("`Linear4bit`, float16", "4bit", FP16),
    Kind("`Linear4bit`, float32", "4bit", FP32),
    Kind("`Linear4bit`, bfloat16, dropout in training", "4bit", BF16, 0.3),
    Kind("`nn.Linear`, bfloat16", "dense", BF16),
    Kind("`nn.Linear`, float32", "dense", FP32),
    Kind("`nn.Linear`, float32, dropout in training", "dense", FP32, 0.3),
    Kind("`nn.Linear`, float64", "dense", FP64),
    Kind("`Conv1D`, bfloat16", "conv1d", BF16),
    Kind("`Conv1D`, float32", "conv1d", FP32),
]


def backend_table() -> str:
    """The second table of docs/drop-in.md."""
    rows = [("base, type", *(f"`{name}`" for name in BACKENDS)), ("---",) * (len(BACKENDS) + 1)]
    rows += [(kind.name, *(kind.cell(name) for name in BACKENDS)) for kind in KINDS]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


DOCUMENT = Path(__file__).parents[2] / "docs" / "drop-in.md"


def merge_table() -> str:
    """What each way of merging keeps of a fine-tune, from the committed record of ``fastlora bench --suite merge``."""
    path = DOCUMENT.parents[1] / "bench" / "results" / "cpu" / "merge.json"
    _, rows = record.read(path)
    values = {row.metric: row.value for row in rows}
    lines = [("", "loss", "KL divergence from the adapter beside its base"), ("---",) * 3]
    for metric, value in values.items():
        kind, _, way = metric.partition(", ")
        if kind == "loss":
            moved = values.get(f"KL divergence, {way}")
            lines.append((way, f"{value:.3f}", "" if moved is None else f"{moved:.2g}"))
    return f"{rows[0].case}:\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def documented() -> str:
    """docs/drop-in.md with the tables as they must be."""
    text = DOCUMENT.read_text()
    for name, content in (("surface", table()), ("backends", backend_table()), ("merge", merge_table())):
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        head, _, rest = text.partition(begin)
        text = head + begin + "\n" + content + "\n" + end + rest.partition(end)[2]
    return text


if __name__ == "__main__":
    DOCUMENT.write_text(documented())
