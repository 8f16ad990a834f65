"""What ``--method`` means: how a base model is adapted, what learns at which rate, what happens between steps, what a
checkpoint holds beside the adapter's own file.

One class a method; those that PEFT knows write PEFT's files, and so do Delta-LoRA and changing ranks at the end.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastlora.training import durable, tasks
from fastlora.training.config import TrainConfig
from fastlora.training.errors import UserError, first_line, require

STARTS = ("pissa", "olora", "loftq")
"""Values of ``init`` that change the base."""
CHANGING = ("delta-lora", "adalora", "dylora", "dynamic-rank")
"""Methods whose layers are others after some steps: no step of theirs can be compiled or captured."""


class Method:
    """Plain LoRA, and what the other methods change of it."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    @property
    def task_type(self) -> str:
        """PEFT's name of the task: it decides which layers learn in full."""
        return tasks.TASKS[self.config.task].peft_type

    def peft_config(self) -> Any:
        """PEFT's configuration of the adapter."""
        c = self.config
        return require("peft").LoraConfig(
            task_type=self.task_type,
            r=c.r,
            lora_alpha=c.lora_alpha,
            lora_dropout=c.lora_dropout,
            target_modules=c.target_modules,
            use_rslora=c.use_rslora,
            init_lora_weights="gaussian" if c.init == "gaussian" else True,
        )

    def adapt(self, model: Any) -> Any:
        """``model`` with a fresh adapter; ``config.seed`` decides its weights."""
        import transformers

        transformers.set_seed(self.config.seed)
        config = self.peft_config()
        if self.task_type == "TOKEN_CLS" and getattr(config, "target_modules", None) == "all-linear":
            from fastlora.training import model as models

            # By all-linear PEFT means the head too, which is no layer for an adapter: it learns in full.
            config.target_modules = set(models.targets(model, "all-linear"))
        model = require("peft").get_peft_model(model, config)
        if self.config.init in STARTS:
            self._start(model)
        return model

    def _start(self, model: Any) -> None:
        """Let the factors start from the base weights, as they are before quantization."""
        from fastlora.adapters import starts
        from fastlora.training import model as models

        source = models.find(self.config.model)
        auto_class = tasks.TASKS[self.config.task].auto_class
        originals = {} if self.config.quantization == "none" else models.dense_weights(source, auto_class)
        try:
            starts.apply(model, self.config.init, originals)
        except ValueError as error:
            raise UserError(f"init: {first_line(error)}") from error
        self._first = starts.factors(model) if self.config.quantization == "none" else None

    def accelerate(self, model: nn.Module) -> Any:
        """Fuse the layers of the adapted model; fastlora's report, None where PEFT's layers are to stay."""
        from fastlora.training import model as models

        config = self.config
        liger = "captured" if config.liger and config.step == "cuda_graphs" else config.liger
        return models.accelerate(
            model,
            config.backend,
            blocks=config.blocks,
            liger=liger,
            loss=config.chunked_loss,
            decoded=config.decoded_memory,
        )

    def groups(self, model: nn.Module) -> list[dict[str, Any]] | None:
        """Parameter groups of the optimizer; None for those of the trainer."""
        return None

    def optimized(self, model: Any, optimizer: Any) -> None:
        """Called once, with the optimizer of ``model``."""

    def step_begins(self, model: Any, step: int) -> None:
        """Called before the optimizer step ``step``, from 0."""

    def begins(self, model: Any, steps: int) -> None:
        """Called when training begins, of ``steps`` optimizer steps in all."""

    def stepped(self, model: Any, step: int, optimizer: Any) -> None:
        """Called after the optimizer step ``step``, from 1, while its gradients are there."""

    def evaluated(self, model: Any, loss: float, optimizer: Any) -> None:
        """Called after an evaluation."""

    def save(self, model: Any, folder: Path) -> None:
        """Write what a checkpoint needs beside the adapter's own file."""

    def before_load(self, model: Any, folder: Path) -> bool:
        """Make ``model`` ready for the adapter's file of a checkpoint. Returns whether the weights are loaded now."""
        return False

    def after_load(self, model: Any, folder: Path) -> None:
        """Read what `save` wrote."""

    def finish(self, model: Any) -> None:
        """Make the adapter what is to be saved at the end."""
        from fastlora.adapters import starts

        if self.config.init in STARTS and self._first is not None:
            starts.export(model, self._first)

    def finish_and_save(self, model: Any, folder: Path) -> None:
        """Write the adapter of a finished run, and the base weights that its start has changed, if any."""
        from fastlora.adapters import starts

        self.finish(model)
        model.peft_config["default"].base_model_name_or_path = self.config.model
        model.save_pretrained(str(folder))
        if self.config.init in STARTS and self.config.quantization != "none":
            starts.save_base(model, folder)


class LoraFA(Method):
    def adapt(self, model: Any) -> Any:
        from fastlora.adapters import lora_fa

        model = super().adapt(model)
        lora_fa.freeze(model)
        return model

    def optimized(self, model: Any, optimizer: Any) -> None:
        from fastlora.adapters import lora_fa

        if self.config.lora_fa_correction:
            lora_fa.Correction(model).attach(optimizer)

    def after_load(self, model: Any, folder: Path) -> None:
        from fastlora.adapters import lora_fa

        lora_fa.freeze(model)  # PEFT's loading lets all of the adapter learn


class LoraPlus(Method):
    def groups(self, model: nn.Module) -> list[dict[str, Any]] | None:
        from fastlora.adapters import lora_plus

        c = self.config
        return lora_plus.parameter_groups(model, c.lr, c.lora_plus_ratio, weight_decay=c.weight_decay)


class Dora(Method):
    def peft_config(self) -> Any:
        config = super().peft_config()
        config.use_dora = True
        return config

    def accelerate(self, model: nn.Module) -> Any:
        from fastlora.adapters import dora

        dora.keep_type(model)
        return super().accelerate(model)


class Vera(Method):
    def peft_config(self) -> Any:
        c = self.config
        return require("peft").VeraConfig(
            task_type=self.task_type,
            r=c.r,
            vera_dropout=c.lora_dropout,
            target_modules=c.target_modules,
            projection_prng_key=c.seed,
            save_projection=c.vera_save_projection,
        )


class DeltaLora(Method):
    def adapt(self, model: Any) -> Any:
        from fastlora.adapters import delta

        model = super().adapt(model)
        delta.enable(model, self.config.delta_weight)
        self.begun = False
        return model

    def step_begins(self, model: Any, step: int) -> None:
        from fastlora.adapters import delta

        if step >= self.config.delta_start and not self.begun:
            self.begun = True
            delta.begin(model)

    def save(self, model: Any, folder: Path) -> None:
        from fastlora.adapters import delta

        delta.save(model, folder)

    def after_load(self, model: Any, folder: Path) -> None:
        from fastlora.adapters import delta
        from fastlora.adapters.variant import require_layers

        delta.load(model, folder)
        self.begun = require_layers(model)[0][1].lora_variant["default"].begun

    def finish(self, model: Any) -> None:
        from fastlora.adapters import delta

        delta.export(model)
        super().finish(model)


class AdaLora(Method):
    FILE = "adalora.safetensors"
    _LONG = 2**31

    def peft_config(self) -> Any:
        c = self.config
        return require("peft").AdaLoraConfig(
            task_type=self.task_type,
            init_r=c.r,
            target_r=c.target_r or max(1, c.r // 2),
            lora_alpha=c.lora_alpha,
            lora_dropout=c.lora_dropout,
            target_modules=c.target_modules,
            tinit=0,
            tfinal=0,
            deltaT=1,
            total_step=self._LONG,  # known when training begins
            orth_reg_weight=c.orthogonality,
        )

    def adapt(self, model: Any) -> Any:
        from fastlora.adapters import adalora

        model = super().adapt(model)
        self.allocator = adalora.Allocator(model)
        adalora.penalize(model)
        return model

    def begins(self, model: Any, steps: int) -> None:
        config = model.peft_config["default"]
        config.total_step, config.tinit, config.tfinal = steps, steps // 10, math.ceil(steps * 0.3)
        config.deltaT = max(1, steps // 100)
        if steps <= config.tinit + config.tfinal:
            raise UserError(f"method: adalora needs more than {steps} steps: raise max_steps or epochs")

    def stepped(self, model: Any, step: int, optimizer: Any) -> None:
        self.allocator.step(step, optimizer)

    def save(self, model: Any, folder: Path) -> None:
        from safetensors.torch import save_file

        tensors = {
            f"{kind}.{i}": t.contiguous()
            for kind, values in self.allocator.state_dict().items()
            for i, t in enumerate(values)
        }
        pattern = model.peft_config["default"].rank_pattern
        save_file(tensors, folder / self.FILE, {"rank_pattern": json.dumps(pattern)})

    def before_load(self, model: Any, folder: Path) -> bool:
        from safetensors import safe_open

        state: dict[str, list[torch.Tensor]] = {"parameters": [], "smoothed": [], "uncertainty": []}
        with safe_open(folder / self.FILE, framework="pt") as file:
            for key in sorted(file.keys(), key=lambda key: int(key.rpartition(".")[2])):
                state[key.rpartition(".")[0]].append(file.get_tensor(key))
            pattern = json.loads(file.metadata()["rank_pattern"])
        if pattern is not None:  # PEFT's files leave the adapter's name out of the keys
            pattern = {key if key.endswith(".default") else f"{key}.default": mask for key, mask in pattern.items()}
        self.allocator.load_state_dict(state)
        model.peft_config["default"].rank_pattern = pattern
        return True


class DyLora(Method):
    FILE = "dylora.safetensors"

    def adapt(self, model: Any) -> Any:
        from fastlora.adapters import dylora

        model = super().adapt(model)
        c = self.config
        self.nested = dylora.enable(model, c.min_r, frozen=c.dylora_frozen, seed=c.seed)
        return model

    def step_begins(self, model: Any, step: int) -> None:
        self.nested.sample()

    def save(self, model: Any, folder: Path) -> None:
        durable.save_tree(self.nested.state_dict(), folder / self.FILE)

    def after_load(self, model: Any, folder: Path) -> None:
        self.nested.load_state_dict(durable.load_tree(folder / self.FILE))


class DynamicRank(Method):
    FILE = "rank.json"

    def adapt(self, model: Any) -> Any:
        from fastlora.adapters.rank import RankController

        c = self.config
        self.controller = RankController(
            c.r, c.min_r, c.max_r or 4 * c.r, c.grow_below, c.shrink_above, c.rank_patience
        )
        return super().adapt(model)

    def evaluated(self, model: Any, loss: float, optimizer: Any) -> None:
        from fastlora.adapters import rank

        new = self.controller.update(loss)
        if new is not None and optimizer is not None:
            rank.resize(model, new, optimizer)
            print(f"rank {new} from now on", flush=True)

    def save(self, model: Any, folder: Path) -> None:
        (folder / self.FILE).write_text(json.dumps(self.controller.state_dict()), encoding="utf-8")

    def before_load(self, model: Any, folder: Path) -> bool:
        from fastlora.adapters import rank

        self.controller.load_state_dict(json.loads((folder / self.FILE).read_text(encoding="utf-8")))
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        rank.resize(model, config["r"])
        return False


class _FusedBase(Method):
    """Methods that leave the linear layers without adapters."""

    def accelerate(self, model: nn.Module) -> Any:
        from fastlora.training import model as models

        if self.config.backend != "peft" and self.config.quantization != "none":
            print(f"{models.fuse_base(model, self.config.backend)} 4-bit layers fused", flush=True)


class Prompt(_FusedBase):
    def peft_config(self) -> Any:
        return require("peft").PromptTuningConfig(
            task_type=self.task_type, num_virtual_tokens=self.config.virtual_tokens
        )


class Prefix(_FusedBase):
    def peft_config(self) -> Any:
        return require("peft").PrefixTuningConfig(
            task_type=self.task_type, num_virtual_tokens=self.config.virtual_tokens
        )

    def accelerate(self, model: nn.Module) -> Any:
        if self.config.backend != "peft":
            from fastlora.integrations import prefix

            prefix.enable(model)
        return super().accelerate(model)


class _OwnFiles(_FusedBase):
    """Methods that PEFT does not know: the file holds the trained parameters, the configuration how to make them."""

    def put_in(self, model: Any) -> None:
        """Make the trained parameters in ``model`` and freeze the rest."""
        raise NotImplementedError

    def adapt(self, model: Any) -> Any:
        import transformers

        transformers.set_seed(self.config.seed)
        try:
            self.put_in(model)
        except ValueError as error:
            raise UserError(f"method: {first_line(error)}") from error
        for name in tasks.heads(model):
            model.get_submodule(name).requires_grad_(True)
        model._hf_peft_config_loaded = True  # what the trainer asks whether a quantized model may be trained
        return model

    def save_adapter(self, model: Any, folder: Path) -> None:
        """Write the trained parameters and how to make their place in a model."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        trained = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
        save_file(trained, folder / "adapter_model.safetensors", {"format": "pt"})
        keys = ("task", "method", "quantization", "r", "trained_layers", "target_modules")
        values = {"fastlora": {key: getattr(self.config, key) for key in keys}}
        config = {"base_model_name_or_path": self.config.model, **values}
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")

    def finish_and_save(self, model: Any, folder: Path) -> None:
        self.save_adapter(model, folder)

    def before_load(self, model: Any, folder: Path) -> bool:
        from safetensors.torch import load_file

        state = load_file(folder / "adapter_model.safetensors")
        parameters = dict(model.named_parameters())
        if state.keys() != {name for name, p in parameters.items() if p.requires_grad}:
            raise ValueError("the file is of another model")
        with torch.no_grad():
            for name, t in state.items():
                parameters[name].copy_(t)
        return True


class Bottlenecks(_OwnFiles):
    def put_in(self, model: Any) -> None:
        from fastlora.adapters import bottleneck

        names = self.config.target_modules
        bottleneck.add(model, self.config.r, bottleneck.TARGETS if isinstance(names, str) else tuple(names))


class Layers(_OwnFiles):
    def put_in(self, model: Any) -> None:
        from fastlora.adapters import layerwise

        assert self.config.trained_layers is not None
        layerwise.unfreeze(model, self.config.trained_layers)


class Full(_OwnFiles):
    """Full fine-tuning: every weight learns."""

    def put_in(self, model: Any) -> None:
        if any(not parameter.is_floating_point() for parameter in model.parameters()):
            raise ValueError("full trains every weight, and some are of 4 bits: load the base with quantization none")
        model.requires_grad_(True)

    def accelerate(self, model: nn.Module) -> Any:
        return None


class Head(_OwnFiles):
    """A linear probe: what scores the labels learns, on a model that stays as it is."""

    def put_in(self, model: Any) -> None:
        model.requires_grad_(False)


def load_own(model: Any, folder: Path) -> Any:
    """Put what `bottleneck` or `layers` trained into ``model``. Raises UserError when it does not fit."""
    values = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["fastlora"]
    method = make(TrainConfig(model="-", data="-", **values))
    model = method.adapt(model)
    try:
        method.before_load(model, folder)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"adapter: cannot load {folder} ({first_line(error)}): use another copy") from error
    return model


METHODS: dict[str, type[Method]] = {
    "lora": Method,
    "lora-fa": LoraFA,
    "lora-plus": LoraPlus,
    "dora": Dora,
    "vera": Vera,
    "delta-lora": DeltaLora,
    "adalora": AdaLora,
    "dylora": DyLora,
    "dynamic-rank": DynamicRank,
    "prompt": Prompt,
    "prefix": Prefix,
    "bottleneck": Bottlenecks,
    "layers": Layers,
    "full": Full,
    "head": Head,
}
"""The class of each ``method`` of a configuration."""


def make(config: TrainConfig) -> Method:
    """The method of a configuration."""
    return METHODS[config.method](config)


class MethodTrainer:
    """Mix-in of a Trainer: lets a method see its optimizer, its checkpoints and its steps."""

    method: Method | None = None

    def create_optimizer(self: Any, model: Any = None) -> Any:
        method, optimizer = self.method, self.optimizer
        groups = method.groups(self.model) if method is not None and optimizer is None else None
        try:
            if groups is not None:
                given = self.optimizer_cls_and_kwargs
                kind, options = given or self.get_optimizer_cls_and_kwargs(self.args, self.model)
                self.optimizer = kind(groups, **options)
            else:
                super().create_optimizer(model)  # type: ignore[misc]
        except (ImportError, ValueError) as error:  # a package that is missing, or settings that there are none of here
            raise UserError(f"optim: {method.config.optim if method else ''}: {first_line(error)}") from error
        if method is not None and optimizer is None:
            method.optimized(self.model, self.optimizer)
        return self.optimizer

    def _save(self: Any, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        if isinstance(self.method, _OwnFiles):
            if self.args.should_save:
                self.method.save_adapter(self.model, folder)
            return
        super()._save(output_dir, state_dict)  # type: ignore[misc]
        if self.method is not None:
            self.method.save(self.model, folder)

    def _load_from_checkpoint(self: Any, checkpoint: str, model: Any = None) -> None:
        folder = Path(checkpoint)
        try:
            if self.method is None or not self.method.before_load(self.model, folder):
                super()._load_from_checkpoint(checkpoint, model)  # type: ignore[misc]
            if self.method is not None:
                self.method.after_load(self.model, folder)
        except (OSError, KeyError, ValueError) as error:
            raise UserError(f"resume: cannot read {folder} ({first_line(error)}): use another checkpoint") from error


def callback(method: Method) -> Any:
    """A transformers callback that tells ``method`` of each step."""
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            method.begins(model, state.max_steps)

        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            method.step_begins(model, state.global_step)

        def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            method.stepped(model, state.global_step + 1, kwargs.get("optimizer"))

        def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            loss = (kwargs.get("metrics") or {}).get("eval_loss")
            if loss is not None and state.global_step < state.max_steps:
                method.evaluated(model, float(loss), kwargs.get("optimizer"))

    return Steps()
