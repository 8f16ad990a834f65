"""The training run: from a configuration to a saved adapter."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastlora.integrations.inner import inner_model
from fastlora.training import checkpoints, data, distributed, durable, methods, optimizer, saving, tasks
from fastlora.training import model as models
from fastlora.training import step as steps
from fastlora.training.attention import use_causal_attention
from fastlora.training.config import TrainConfig, uses_trl, without_masks
from fastlora.training.errors import Interrupted, UserError, disk_errors, is_out_of_memory, require

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase, Trainer

PACKAGES = ("peft", "accelerate", "datasets", "rich", "psutil")


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run gave. Losses are means over learned tokens, in nats."""

    output_dir: Path
    adapter_path: Path
    steps: int
    eval_loss_before: float | None
    eval_loss_after: float | None
    losses: list[tuple[int, float]]
    """(step, training loss), one pair per ``logging_steps``."""
    step_ms: float
    """Median milliseconds of an optimizer step."""
    tokens_per_second: float
    peak_memory: int
    """Bytes, see `fastlora.training.callbacks.Meter`."""
    layers_replaced: int
    """Layers that run fused; 0 with backend peft."""
    log_history: list[dict[str, Any]]
    seconds: float = math.nan
    """Of all steps of this process, without evaluations and checkpoints."""
    parameters: int = 0
    """Trained ones."""
    task: str = "causal-lm"
    labels: tuple[str, ...] = ()
    """Of a classification, in the order of the model's scores."""
    metrics_before: dict[str, float] = dataclasses.field(default_factory=dict)
    """What was evaluated beside the loss before training: accuracy and f1 of a classification."""
    metrics_after: dict[str, float] = dataclasses.field(default_factory=dict)
    processes: int = 1
    distributed: str = "none"
    """ddp, fsdp, or none for one process. ``peak_memory`` is this process's, tokens are those of all."""

    def to_json(self) -> str:
        """The result as JSON; what was not measured is null."""
        values = dataclasses.asdict(self)
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        return json.dumps(plain, indent=2, default=str)

    def summary(self) -> str:
        """The result in a few lines for a terminal."""
        lines = []
        if self.eval_loss_before is not None and self.eval_loss_after is not None:
            lines.append(f"evaluation loss  {self.eval_loss_before:.4f} before, {self.eval_loss_after:.4f} after")
            if self.task == "causal-lm":
                before, after = (perplexity(loss) for loss in (self.eval_loss_before, self.eval_loss_after))
                lines.append(f"perplexity       {before:.4g} before, {after:.4g} after")
        for name, after in self.metrics_after.items():
            lines.append(f"{name:<15}  {self.metrics_before.get(name, math.nan):.4f} before, {after:.4f} after")
        if not math.isnan(self.step_ms):  # a resumed run may have had no step left
            lines.append(f"speed            {self.step_ms:.1f} ms a step, {self.tokens_per_second:,.0f} tokens/s")
            lines.append(f"peak memory      {self.peak_memory / 2**30:.2f} GiB")
        lines.append(f"adapter          {self.adapter_path}")
        return "\n".join(lines)


def perplexity(loss: float) -> float:
    """exp of a loss in nats; infinite where that is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf


def train(config: TrainConfig, callbacks: list[Any] | None = None) -> TrainResult:
    """Trains an adapter as ``config`` says and saves it, with the resolved configuration, in ``config.output_dir``.

    callbacks: further transformers.TrainerCallback objects.

    In a process of several, which ``torchrun`` or ``accelerate launch`` has started, it trains with the others; the
    first of them prints and writes (see `fastlora.training.distributed`).

    Raises UserError for every input that cannot work, before anything large is loaded where that is possible,
    Interrupted after Ctrl-C, with a checkpoint of the last whole step, and LostProcess after another process died.
    """
    models.transformers()
    for package in PACKAGES:
        require(package)
    if config.tensorboard:
        require("tensorboard")
    models.check_backend(config.backend)
    world = distributed.resolve(config)
    on_gpu = models.pick_device(config.device).type == "cuda"
    with distributed.processes(world, on_gpu), distributed.lost_processes(world, lambda: _how_to_go_on(config)):
        return _train(config, world, callbacks or [])


def _train(config: TrainConfig, world: distributed.World, callbacks: list[Any]) -> TrainResult:
    device = models.pick_device(config.device)
    bf16 = models.pick_bf16(config.bf16, device)
    optimizer.choose(config, device)
    check_step(config, device)
    tasks.check(config)
    task = tasks.make(config)
    data.check_source(config.data, "data")
    if config.eval_data is not None:
        data.check_source(config.eval_data, "eval_data")
    source = models.find(config.model)
    checkpoint = distributed.on_main(world, lambda: checkpoints.prepare(config))

    skeleton = models.skeleton(source, task.auto_class)
    if config.task == "causal-lm":
        models.check_causal(skeleton.config, config.model)
    parameters = models.adapter_parameters(skeleton, config.target_modules, config.r)
    needed = checkpoints.needed_bytes(config, parameters)
    distributed.on_main(world, lambda: checkpoints.check_space(config.output_dir, needed, "output_dir"))
    tokenizer = models.load_tokenizer(source)
    examples = distributed.main_first(world, lambda: task.prepare(tokenizer))
    _check_length(config, skeleton, examples)
    if world.main:
        print(f"data: {len(examples.train)} blocks with {examples.tokens:,} tokens", flush=True)
        if examples.labels:
            print(f"labels: {', '.join(examples.labels)}", flush=True)

    models.transformers().set_seed(config.seed)  # a new head is drawn as the model is loaded
    whole = world.kind != "fsdp" or distributed.fits(models.base_bytes(skeleton, config.quantization), device)
    with _out_of_memory(config):
        base = models.load_base(
            source,
            quantization=config.quantization,
            double_quant=config.double_quant,
            blocksize=config.blocksize,
            device=device if whole else torch.device("cpu"),
            dtype=torch.bfloat16 if bf16 else torch.float32,
            auto_class=task.auto_class,
            heads=task.heads,
            options=task.model_options(examples, tokenizer),
        )
        method = methods.make(config)
        model = method.adapt(base)
        report = method.accelerate(model)
        if report is not None and world.main:
            print(report, flush=True)
        inner = inner_model(model)  # not all methods wrap it
        if config.gradient_checkpointing:
            steps.checkpoint_blocks(inner, random=config.step != "cuda_graphs", keep=config.kept_blocks)
        kernel = "pytorch" if config.attention == "stock" else config.attention
        if config.step == "compile":
            steps.compile_model(model, kernel)
        elif without_masks(config):
            use_causal_attention(inner, kernel)
        if world.kind == "fsdp":
            distributed.shard(model, world, device)
        distributed.on_main(world, lambda: checkpoints.write_config(config))
        return _run(config, world, model, tokenizer, examples, device, bf16, checkpoint, report, method, callbacks)


def _check_length(config: TrainConfig, skeleton: Any, examples: data.TokenizedData) -> None:
    """Raises UserError for an example of more tokens than the model has positions."""
    virtual = config.virtual_tokens if config.method in ("prompt", "prefix") else 0
    try:
        models.check_length(skeleton, config.max_length + virtual, "max_length")
    except UserError:
        if config.step != "eager":
            raise
        parts = (part for part in (examples.train, examples.evaluation) if part is not None)
        longest = max(len(ids) for part in parts for ids in part["input_ids"])
        models.check_length(skeleton, longest + virtual, "max_length")


def _run(
    config: TrainConfig,
    world: distributed.World,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: data.TokenizedData,
    device: torch.device,
    bf16: bool,
    checkpoint: Path | None,
    report: Any,
    method: methods.Method,
    callbacks: list[Any],
) -> TrainResult:
    from fastlora.training.callbacks import Complete, FiniteLoss, LogFile, Meter, NoStepsLeft, Reporter, StopOnSignal

    meter, reporter, stop = Meter(device), Reporter(), StopOnSignal()
    trainer = make_trainer(config, model, tokenizer, examples, device, bf16, checkpoint is not None)
    trainer.method, trainer.world = method, world
    trainer.meter = meter
    if config.offload_checkpoints:
        from fastlora.training.offload import OffloadCheckpoints

        trainer.add_callback(OffloadCheckpoints())
    # The meter measures the step without what the callbacks after it do.
    log = LogFile(config.output_dir)
    for callback in (meter, log, FiniteLoss(), methods.callback(method), *callbacks, stop, reporter, Complete()):
        trainer.add_callback(callback)
    try:
        with reporter if world.main else contextlib.nullcontext(), stop, disk_errors(config.output_dir):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except NoStepsLeft:
        trainer.is_in_train = False
    except KeyboardInterrupt:
        stop.requested = True
    if stop.requested and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(_how_to_go_on(config))
    if examples.evaluation is not None and not _evaluated_now(trainer):
        with reporter if world.main else contextlib.nullcontext():
            trainer.evaluate()

    adapter = config.output_dir / checkpoints.ADAPTER
    history = list(trainer.state.log_history)
    evaluations = [float(log["eval_loss"]) for log in history if "eval_loss" in log]
    measured = [_metrics(log) for log in history if "eval_loss" in log] or [{}]
    result = TrainResult(
        output_dir=config.output_dir,
        adapter_path=adapter,
        steps=trainer.state.global_step,
        eval_loss_before=evaluations[0] if evaluations else None,
        eval_loss_after=evaluations[-1] if evaluations else None,
        losses=[(int(log["step"]), float(log["loss"])) for log in history if "loss" in log],
        step_ms=meter.step_ms,
        tokens_per_second=meter.tokens_per_second,
        peak_memory=meter.peak_memory,
        layers_replaced=0 if report is None else len(report.replaced),
        log_history=history,
        task=config.task,
        labels=examples.labels,
        metrics_before=measured[0],
        metrics_after=measured[-1],
        seconds=sum(meter.step_seconds),
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        processes=world.size,
        distributed=world.kind,
    )
    if trainer.is_world_process_zero():
        with disk_errors(config.output_dir):
            with durable.whole_folder(adapter, ".safetensors") as folder:
                method.finish_and_save(model, folder)
            durable.write_text(config.output_dir / checkpoints.RESULT_NAME, result.to_json())
    return result


def _metrics(log: dict[str, Any]) -> dict[str, float]:
    return {name: float(log[f"eval_{name}"]) for name in ("accuracy", "f1") if f"eval_{name}" in log}


def _evaluated_now(trainer: Trainer) -> bool:
    return any("eval_loss" in log and log["step"] == trainer.state.global_step for log in trainer.state.log_history)


def _how_to_go_on(config: TrainConfig) -> str:
    done = checkpoints.finished(config.output_dir)
    if not done:
        return f"interrupted before the first checkpoint: nothing is saved in {config.output_dir}; start again"
    return f"interrupted: saved {done[-1]}; the same command with --resume goes on from it"


@contextlib.contextmanager
def _out_of_memory(config: TrainConfig) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        advice = [f"halve batch_size (now {config.batch_size}) and double gradient_accumulation_steps"]
        if config.batch_size == 1:
            advice = []
        if not config.gradient_checkpointing:
            advice.append("set gradient_checkpointing true")
        elif not config.offload_checkpoints and config.step == "eager":
            advice.append("set offload_checkpoints true")
        advice.append(f"lower max_length (now {config.max_length})")
        if config.quantization == "none":
            advice.append("set quantization nf4")
        if not config.chunked_loss and config.backend != "peft" and config.task == "causal-lm":
            advice.append("set chunked_loss true")
        where = "GPU memory" if isinstance(error, torch.OutOfMemoryError) or "CU" in str(error) else "memory"
        done = checkpoints.finished(config.output_dir)
        go_on = f"; --resume goes on from {done[-1].name} where the setting allows it" if done else ""
        raise UserError(f"out of {where}: {', or '.join(advice)}{go_on}") from error


def check_step(config: TrainConfig, device: torch.device) -> None:
    """Raises UserError when the step cannot be launched as ``config`` asks."""
    if config.trainer == "trl" and config.chunked_loss:
        raise UserError("chunked_loss: TRL's SFTTrainer computes the loss itself: set chunked_loss false")
    if without_masks(config) and config.method == "prefix":
        raise UserError("method: prefix puts keys before every token: set step eager and attention stock")
    if config.attention != "stock" and config.trainer == "trl":
        raise UserError("attention: TRL's SFTTrainer makes its masks itself: set attention stock")
    if config.step == "eager":
        return
    if config.method in methods.CHANGING:
        raise UserError(f"step: {config.method} changes the layers between steps: set step eager")
    if config.trainer == "trl":
        raise UserError("step: TRL's SFTTrainer looks at masks and losses in every step: set trainer transformers")
    if config.step == "cuda_graphs":
        if device.type != "cuda":
            raise UserError("step: cuda_graphs needs a CUDA GPU: set step eager or compile")
        if config.gradient_checkpointing and config.lora_dropout > 0:
            raise UserError("step: cuda_graphs cannot repeat dropout in checkpointed blocks: set lora_dropout 0")


def make_trainer(
    config: TrainConfig,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: data.TokenizedData,
    device: torch.device,
    bf16: bool,
    resuming: bool = False,
) -> Trainer:
    """The trainer of ``config``, on tokenized examples that are the same for both kinds of trainer."""
    import transformers
    from transformers.trainer_callback import PrinterCallback

    from fastlora.training.callbacks import LearnedMean, MeteredLog

    arguments = _training_arguments(config, device, bf16, examples.evaluation is not None and not resuming)
    task = tasks.make(config)
    metrics = task.metrics(examples.labels)
    arguments["prediction_loss_only"] = metrics is None
    arguments["optim"], optimizer_class = optimizer.choose(config, device)
    trainer_class: Any = transformers.Trainer
    arguments_class: Any = transformers.TrainingArguments
    if uses_trl(config):
        trl = require("trl", extra="trl")
        trainer_class, arguments_class = trl.SFTTrainer, trl.SFTConfig
        arguments |= {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None, "packing": False}
    # The model has it where it is asked for; TRL turns it on unless told not to, and transformers renamed the setting.
    renamed = "activation_checkpointing" in {field.name for field in dataclasses.fields(arguments_class)}
    key = "activation_checkpointing" if renamed else "gradient_checkpointing"
    arguments[key] = False
    try:
        args = arguments_class(**arguments)
    except ValueError as error:
        raise UserError(f"the trainer refuses the configuration: {error}") from error
    # One process drives one device: the 4-bit layers cannot be replicated by DataParallel.
    args._n_gpu = min(args.n_gpu, 1)
    adapters = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    # Compiled or captured, a batch has always the same shape.
    fixed, causal = config.step != "eager", without_masks(config)
    if causal:
        tokenizer.padding_side = "right"
    padding: dict[str, Any] = {"padding": "max_length", "max_length": config.max_length} if fixed else {}
    bases = (
        distributed.DistributedTrainer,
        saving.SafeCheckpoints,
        methods.MethodTrainer,
        steps.StepLauncher,
        optimizer.FusedClipping,
        MeteredLog,
        LearnedMean,
        trainer_class,
    )
    language = config.task == "causal-lm"
    kind = {"causal": causal, "captured": config.step == "cuda_graphs", "shifted": language}
    trainer = type("MeteredTrainer", bases, kind)(
        model=model,
        args=args,
        train_dataset=examples.train,
        eval_dataset=examples.evaluation,
        processing_class=tokenizer,
        data_collator=task.collator(tokenizer, **padding),
        compute_metrics=metrics,
        preprocess_logits_for_metrics=None if metrics is None else tasks.best_labels,
        optimizer_cls_and_kwargs=optimizer_class,
        callbacks=[_tensorboard(config)] if config.tensorboard and args.process_index == 0 else None,
    )
    # Classifiers take the number of labels of a step and make no use of it, so that the trainer has to average.
    trainer.model_accepts_loss_kwargs = trainer.model_accepts_loss_kwargs and language
    # SFTTrainer rounds the adapters to bfloat16, in which small updates vanish: the master weights stay in float32.
    for name, parameter in model.named_parameters():
        if name in adapters:
            parameter.data = adapters[name]
    trainer.remove_callback(PrinterCallback)
    return trainer


def _training_arguments(config: TrainConfig, device: torch.device, bf16: bool, eval_on_start: bool) -> dict[str, Any]:
    return {
        "output_dir": str(config.output_dir),
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.eval_batch_size or config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "learning_rate": config.lr,
        "lr_scheduler_type": config.scheduler,
        "warmup_steps": config.warmup,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps or -1,
        "seed": config.seed,
        "bf16": bf16,
        "use_cpu": device.type == "cpu",
        "logging_steps": config.logging_steps,
        "logging_nan_inf_filter": False,
        "eval_strategy": "no" if config.eval_steps is None else "steps",
        "eval_steps": config.eval_steps,
        "eval_on_start": eval_on_start,
        "save_strategy": "steps",
        "save_steps": config.save_steps,
        "save_total_limit": config.save_total_limit,
        "label_names": ["labels"],
        "remove_unused_columns": False,
        "include_num_input_tokens_seen": "non_padding",
        "dataloader_pin_memory": device.type == "cuda",
        "disable_tqdm": True,
        "report_to": "none",
    }


def _tensorboard(config: TrainConfig) -> Any:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    folder = str(config.output_dir / "tensorboard")
    callback = TensorBoardCallback(SummaryWriter(log_dir=folder))
    callback.logging_dir = folder  # where it writes again after the end of training
    return callback
