"""The configuration of a training run: one pydantic model, read from YAML, overridden by flags."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fastlora.training.errors import UserError, near, require

Blocksize = Literal[32, 64, 128, 256, 512, 1024, 2048, 4096]
Quantization = Literal["nf4", "fp4", "none"]
MethodName = Literal[
    "lora",
    "lora-fa",
    "lora-plus",
    "dora",
    "vera",
    "delta-lora",
    "adalora",
    "dylora",
    "dynamic-rank",
    "prompt",
    "prefix",
    "bottleneck",
    "layers",
    "full",
    "head",
]
TaskName = Literal["causal-lm", "sequence-classification", "token-classification"]
Device = Literal["auto", "cpu", "cuda"]

FREE_ON_RESUME = frozenset(
    {
        *("step", "distributed"),
        *("output_dir", "resume", "overwrite", "tensorboard", "logging_steps", "save_steps", "save_total_limit"),
        *("eval_steps", "eval_batch_size", "max_steps", "epochs", "backend", "blocks", "liger", "chunked_loss"),
        *("gradient_checkpointing", "offload_checkpoints"),
    }
)
"""Fields that may change between a checkpoint and the run that resumes it; all others change what is learned."""


ELSEWHERE = {
    "model_name_or_path": "model",
    "dataset": "data",
    "max_seq_length": "max_length",
    "lora_r": "r",
    "rank": "r",
    "learning_rate": "lr",
    "lr_scheduler_type": "scheduler",
    "warmup_ratio": "warmup",
    "warmup_steps": "warmup",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "load_in_4bit": "quantization",
    "per_device_eval_batch_size": "eval_batch_size",
    "resume_from_checkpoint": "resume",
}
"""What other programs call our fields, where the names are not near."""


class TrainConfig(BaseModel):
    """Everything a training run depends on. Sizes are in tokens, rates per optimizer step."""

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False)

    model: str = Field(description="hub id, or path of a model folder or .gguf file", min_length=1)
    task: TaskName = Field("causal-lm", description="what is learned: the next token, or labels; see docs/tasks.md")
    data: str = Field(description="hub data set, or path of a .jsonl, .json, .csv or .txt file", min_length=1)
    data_config: str | None = Field(None, description="configuration name of a hub data set")
    split: str = Field("train", description="split of a hub data set to train on")
    eval_data: str | None = Field(None, description="hub data set or file to evaluate on")
    eval_split: str | None = Field(None, description="split of the hub data set to evaluate on")
    eval_fraction: float = Field(
        0.05, ge=0, lt=1, description="share of the data held out when no eval data is named; 0 to evaluate nothing"
    )
    max_samples: int | None = Field(None, ge=1, description="train on at most so many examples")
    max_eval_samples: int | None = Field(None, ge=1, description="evaluate on at most so many examples")

    text_column: str | None = Field(None, description="column of plain text [default: text]")
    messages_column: str | None = Field(None, description="column of chat messages with role and content")
    prompt_column: str | None = Field(None, description="column of prompts, with completion_column")
    completion_column: str | None = Field(None, description="column of completions, with prompt_column")
    label_column: str | None = Field(None, description="column of labels [default: label, or labels]")
    template: str = Field(
        "auto", min_length=1, description="chat, plain, auto, or a format with columns in braces: 'Q: {q} A: {a}'"
    )
    text_split: Literal["paragraph", "line", "document"] = Field("paragraph", description="one example of a .txt file")
    max_length: int = Field(1024, ge=8, description="tokens of a block, and of the longest example")
    packing: bool = Field(True, description="pack examples into blocks of max_length")
    prompt_loss: bool = Field(False, description="learn the prompts too, not only the completions")

    method: MethodName = Field("lora", description="what is trained over the frozen base; see docs/methods.md")
    quantization: Quantization = Field("nf4", description="4-bit type of the frozen base weights, or none")
    double_quant: bool = Field(True, description="quantize the block statistics too")
    blocksize: Blocksize = Field(64, description="weights that share one scale")
    r: int = Field(16, ge=1, le=1024, description="rank of the adapter")
    lora_alpha: float = Field(32, gt=0, description="the adapter's output is scaled by lora_alpha / r")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    target_modules: str | list[str] = Field(
        "all-linear", description="names of linear layers, by commas, or all-linear"
    )
    use_rslora: bool = Field(False, description="scale by lora_alpha / sqrt(r)")
    init: Literal["default", "gaussian", "pissa", "olora", "loftq"] = Field(
        "default", description="where A and B start; pissa, olora and loftq change the base"
    )
    lora_fa_correction: bool = Field(False, description="lora-fa: correct the gradient of B for the frozen A")
    lora_plus_ratio: float = Field(16.0, gt=0, description="lora-plus: B learns so many times as fast as A")
    vera_save_projection: bool = Field(True, description="vera: save the shared factors, not only their seed")
    delta_start: int = Field(0, ge=0, description="delta-lora: steps before the base begins to move")
    delta_weight: float = Field(1.0, gt=0, description="delta-lora: the base moves by this times the change of B A")
    target_r: int | None = Field(None, ge=1, description="adalora: mean rank at the end [default: r / 2]")
    orthogonality: float = Field(0.1, ge=0, description="adalora: weight of the penalty that keeps A and B orthogonal")
    min_r: int = Field(1, ge=1, description="dylora, dynamic-rank: the smallest rank")
    max_r: int | None = Field(None, ge=1, description="dynamic-rank: the largest rank [default: 4 r]")
    dylora_frozen: bool = Field(False, description="dylora: only the last row of the sampled rank learns")
    grow_below: float = Field(0.002, ge=0, description="dynamic-rank: improvement of the evaluation loss to grow below")
    shrink_above: float = Field(0.02, gt=0, description="dynamic-rank: improvement to shrink above")
    rank_patience: int = Field(2, ge=1, description="dynamic-rank: evaluations in a row that decide")
    virtual_tokens: int = Field(16, ge=1, description="prompt, prefix: tokens that are learned")
    trained_layers: str | None = Field(
        None, description="layers: regular expression for the whole names of the linear layers to train in full"
    )
    backend: str = Field("auto", description="fastlora backend, or peft to leave PEFT's layers as they are")

    lr: float = Field(2e-4, gt=0, le=1, description="peak learning rate")
    scheduler: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt", "cosine_with_restarts"
    ] = Field("cosine", description="learning-rate schedule")
    warmup: float = Field(0.03, ge=0, description="warm-up: a share of the steps below 1, else a number of steps")
    optim: str = Field(
        "auto",
        min_length=1,
        description="optimizer, by its transformers name, such as adamw_8bit; auto for AdamW, fused on a GPU",
    )
    weight_decay: float = Field(0.0, ge=0, description="weight decay")
    max_grad_norm: float = Field(1.0, ge=0, description="gradient clipping; 0 for none")
    epochs: float = Field(1.0, gt=0, description="passes over the data")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps; overrides epochs")
    batch_size: int = Field(4, ge=1, description="blocks of one forward pass on one device")
    eval_batch_size: int | None = Field(None, ge=1, description="the same in evaluation [default: batch_size]")
    gradient_accumulation_steps: int = Field(1, ge=1, description="forward passes of one optimizer step")
    blocks: bool = Field(
        True, description="compute q, k and v together, gated MLPs and norms as one [default: not with backend peft]"
    )
    liger: bool = Field(False, description="norms, rotary embedding and loss by Liger kernels, where installed")
    chunked_loss: bool = Field(
        True,
        description="head and loss some tokens at a time: logits never whole "
        "[default: for causal-lm with trainer transformers, not with backend peft]",
    )
    decoded_memory: float = Field(
        0.0, ge=0, allow_inf_nan=False,
        description="GiB of GPU memory for dense copies of 4-bit weights: faster, the same bits; 3.3 hold those of 8 "
        "blocks of Llama-3-8B",
    )  # fmt: skip
    attention: Literal["stock", "auto", "pytorch", "flash", "cudnn"] = Field(
        "stock", description="stock, with masks; else none, padding on the right, and the kernel: auto by the GPU"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, slower")
    kept_blocks: int = Field(0, ge=0, description="last blocks that gradient_checkpointing leaves out")
    offload_checkpoints: bool = Field(False, description="keep the checkpoints in the memory of the CPU")
    bf16: bool | Literal["auto"] = Field("auto", description="compute in bfloat16; auto where the GPU has it")
    step: Literal["eager", "compile", "cuda_graphs"] = Field(
        "eager", description="launch a step kernel by kernel, compile the model, or replay captured CUDA graphs"
    )
    distributed: Literal["auto", "ddp", "fsdp"] = Field(
        "auto",
        description="several processes: ddp, each with the whole base; fsdp, each with a share of it; auto for ddp, or "
        "for fsdp where accelerate is told so",
    )
    device: Device = Field("auto", description="cpu, cuda, or cuda where there is one")
    seed: int = Field(42, ge=0, lt=2**32, description="seed of adapter, data order and dropout")

    logging_steps: int = Field(1, ge=1, description="steps between two log lines")
    save_steps: int = Field(100, ge=1, description="steps between two checkpoints")
    save_total_limit: int | None = Field(2, ge=1, description="checkpoints kept")
    eval_steps: int | None = Field(None, ge=1, description="steps between evaluations [default: before and after only]")
    output_dir: Path = Field(Path("runs/train"), description="folder of adapter, checkpoints and logs")
    resume: bool = Field(False, description="go on from the last checkpoint in output_dir")
    overwrite: bool = Field(False, description="delete what an earlier run left in output_dir")
    trainer: Literal["auto", "transformers", "trl"] = Field(
        "transformers", description="transformers.Trainer, TRL's SFTTrainer, or auto for TRL where it is installed"
    )
    tensorboard: bool = Field(True, description="write TensorBoard logs to output_dir/tensorboard")

    @field_validator("target_modules", mode="before")
    @classmethod
    def _split_commas(cls, value: Any) -> Any:
        if not isinstance(value, str) or value.strip() == "all-linear":
            return value.strip() if isinstance(value, str) else value
        return [name.strip() for name in value.split(",") if name.strip()]

    @field_validator("target_modules")
    @classmethod
    def _not_empty(cls, value: str | list[str]) -> str | list[str]:
        if not value:
            raise ValueError("names no layer; use all-linear or names such as q_proj,v_proj")
        return value

    @field_validator("blocksize", mode="before")
    @classmethod
    def _blocksize_of_a_flag(cls, value: Any) -> Any:
        return int(value) if isinstance(value, str) and value.strip().isdigit() else value

    @field_validator("output_dir")
    @classmethod
    def _expand_home(cls, value: Path) -> Path:
        return value.expanduser()

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if (self.prompt_column is None) != (self.completion_column is None):
            raise ValueError("prompt_column and completion_column go together: set both or neither")
        if sum(c is not None for c in (self.text_column, self.messages_column, self.prompt_column)) > 1:
            raise ValueError("set only one of text_column, messages_column and prompt_column + completion_column")
        if self.offload_checkpoints and not self.gradient_checkpointing:
            raise ValueError("offload_checkpoints needs gradient_checkpointing: set both or neither")
        if self.offload_checkpoints and self.step != "eager":
            raise ValueError("offload_checkpoints moves checkpoints beside a step that is launched: set step eager")
        if self.kept_blocks and not self.gradient_checkpointing:
            raise ValueError("kept_blocks is for gradient_checkpointing: set both or neither")
        if self.backend == "peft":
            self._off_unless_given("blocks", "chunked_loss")
            if self.blocks or self.liger or self.chunked_loss or self.decoded_memory:
                raise ValueError(
                    "blocks, liger, chunked_loss and decoded_memory belong to fastlora's layers: backend peft has none"
                )
        if self.decoded_memory and self.quantization == "none":
            raise ValueError("decoded_memory is for copies of 4-bit weights: quantization none has no such weights")
        if self.trainer != "transformers" or self.task != "causal-lm":
            self._off_unless_given("chunked_loss")
        self._check_method()
        if self.eval_steps is not None and self.eval_fraction == 0 and not (self.eval_data or self.eval_split):
            raise ValueError("eval_steps needs data to evaluate on: set eval_fraction, eval_data or eval_split")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other: set one of them")
        if self.template not in ("auto", "chat", "plain") and "{" not in self.template:
            raise ValueError(f"template is chat, plain, auto or a format with {{column}}, not {self.template!r}")
        return self

    def _off_unless_given(self, *names: str) -> None:
        # Not by assignment, after which they would count as given.
        self.__dict__.update({name: False for name in names if name not in self.model_fields_set})

    def _check_method(self) -> None:
        lora = self.method not in ("vera", "adalora", "prompt", "prefix", "bottleneck", "layers", "full", "head")
        if self.method == "full" and self.quantization != "none":
            raise ValueError("method full trains every weight, which none of 4 bits can be: set quantization none")
        if self.method == "head" and self.task == "causal-lm":
            raise ValueError("method head trains what scores the labels: set a task of classification")
        if (self.method == "layers") != (self.trained_layers is not None):
            raise ValueError("method layers and trained_layers go together: set both or neither")
        try:
            re.compile(self.trained_layers or "")
        except re.error as error:
            raise ValueError(f"trained_layers {self.trained_layers!r} is no regular expression: {error}") from error
        if self.init != "default" and not lora:
            raise ValueError(
                f"init {self.init} is a start of LoRA's factors, which {self.method} has not: leave it out"
            )
        if self.init == "loftq" and self.quantization == "none":
            raise ValueError("init loftq is for a quantized base: set quantization nf4, or init pissa")
        if self.init in ("pissa", "olora", "loftq") and self.method == "delta-lora":
            raise ValueError(f"init {self.init} and delta-lora both move the base: choose one")
        if self.use_rslora and not lora:
            raise ValueError(f"use_rslora is a scale of LoRA's, which {self.method} has not: leave it out")
        if self.method == "dynamic-rank":
            if self.eval_steps is None:
                raise ValueError("dynamic-rank follows the evaluation loss: set eval_steps")
            if not self.min_r <= self.r <= (self.max_r or 4 * self.r):
                raise ValueError(f"min_r, r and max_r must ascend, not {self.min_r}, {self.r}, {self.max_r}")
            if self.grow_below >= self.shrink_above:
                raise ValueError("grow_below must be less than shrink_above")
        if self.method == "dylora" and self.min_r > self.r:
            raise ValueError(f"min_r must be at most r = {self.r}, not {self.min_r}")
        if self.method == "adalora" and self.target_r is not None and self.target_r > self.r:
            raise ValueError(f"target_r must be at most r = {self.r}, which is what training starts with")

    def to_yaml(self) -> str:
        """The whole configuration, defaults included, as YAML that `load` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def uses_trl(config: TrainConfig) -> bool:
    """Whether TRL's SFTTrainer runs. Raises UserError when it is asked for and not installed."""
    if config.trainer == "auto":
        return not (without_masks(config) or config.chunked_loss) and importlib.util.find_spec("trl") is not None
    if config.trainer == "trl":
        require("trl", extra="trl")
        return True
    return False


def without_masks(config: TrainConfig) -> bool:
    """Whether batches are padded on the right and attended without masks."""
    return config.step != "eager" or config.attention != "stock"


def load(path: str | Path | None = None, overrides: dict[str, Any] | None = None) -> TrainConfig:
    """The configuration of a YAML file (or of nothing), with ``overrides`` on top.

    Raises UserError, one line, for a missing or broken file, an unknown key (near ones are named), a missing or
    impossible value.
    """
    values = read_yaml(Path(path)) if path is not None else {}
    values.pop("search", None)  # what `fastlora search` reads of the same file
    values |= overrides or {}
    where = f"{path}: " if path is not None else ""
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        # A value of a union gets one error per member; the last one lists the choices.
        problems = {e["loc"][:1]: _problem(e) for e in error.errors(include_url=False)}
        raise UserError(where + "; ".join(problems.values())) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The ``key: value`` lines of a file. Raises UserError for a missing or broken one."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no such configuration file: {path}; {near_files(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the configuration file {path}: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or "not YAML"
        raise UserError(f"{path}{line} is not valid YAML ({reason}): mend that line") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, not 'key: value' lines: see examples/train.yaml")
    return {str(key): value for key, value in values.items()}


def _problem(error: Any) -> str:
    """One pydantic error as a clause that names the key, its value and what is wanted."""
    key = str(error["loc"][0]) if error["loc"] else ""
    if error["type"] == "extra_forbidden":
        hint = f"did you mean {ELSEWHERE[key]}?" if key in ELSEWHERE else near(key, TrainConfig.model_fields)
        return f"unknown key {key!r}; {hint or 'fastlora train --help lists all'}"
    if error["type"] == "missing":
        return f"{key} is missing: set '{key}:' in the YAML file or pass --{key.replace('_', '-')}"
    message = error["msg"].removeprefix("Value error, ").replace("Input should", "should")
    if error["type"] == "path_type":
        message = "should be a path"
    if not key:
        return message
    if error["type"] == "literal_error":
        choices = _literal_choices(key)
        hint = near(str(error["input"]), choices)
        return f"{key} should be one of {', '.join(choices)}, not {error['input']}" + (f"; {hint}" if hint else "")
    return f"{key} {message}, not {error['input']!r}"


def _literal_choices(key: str) -> list[str]:
    annotation = TrainConfig.model_fields[key].annotation
    found: list[str] = []
    for part in (annotation, *get_args(annotation)):
        found += [str(choice) for choice in get_args(part) if isinstance(choice, str | int)]
    if bool in get_args(annotation):
        found = ["true", "false", *found]
    return list(dict.fromkeys(found))


def near_files(path: Path) -> str:
    """A hint about what lies where ``path`` should: the near names of its folder, or the missing folder."""
    folder = path.parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist"
    return near(path.name, [p.name for p in folder.iterdir()]) or f"check the name in {folder.resolve()}"
