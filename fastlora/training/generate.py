"""What an adapter changed: the same prompts with it off and on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastlora.training import model as models
from fastlora.training.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel
    from rich.table import Table
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose the next token. ``temperature`` 0 takes the most likely one."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """0 for all tokens."""
    seed: int = 42
    beams: int = 1
    """Continuations kept in a beam search; 1 for none."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_new_tokens", 1, 2**20),
            ("temperature", 0, 100),
            ("top_p", 0, 1),
            ("top_k", 0, 2**20),
            ("seed", 0, 2**32 - 1),
            ("beams", 1, 256),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise UserError(f"{name} should be from {low} to {high}, not {value}")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The continuations of one prompt."""

    prompt: str
    before: str
    """With the adapter disabled."""
    after: str


@torch.no_grad()
def complete(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    sampling: Sampling,
    chat: bool | None = None,
) -> str:
    """The model's continuation of ``prompt``, without the prompt.

    chat: send the prompt as a user's message through the chat template; None for yes where the model has one.
    """
    if chat and not tokenizer.chat_template:
        raise UserError("chat: this model has no chat template: pass --no-chat")
    if chat or (chat is None and tokenizer.chat_template):
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].shape[1] == 0:
        raise UserError("prompt is empty: pass some text")
    device = next(model.parameters()).device
    ids = inputs["input_ids"].to(device)
    models.transformers().set_seed(sampling.seed)
    choice = (
        {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        if sampling.temperature > 0
        else {"do_sample": False}
    )
    was_training = model.training
    model.eval()
    output = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=inputs["attention_mask"].to(device),
        max_new_tokens=sampling.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
        num_beams=sampling.beams,
        **choice,
    )
    model.train(was_training)
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def compare(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    sampling: Sampling | None = None,
    chat: bool | None = None,
) -> list[Comparison]:
    """Continues each prompt with the adapter disabled and enabled, from the same seed."""
    from rich.console import Console
    from rich.progress import track

    sampling, console = sampling or Sampling(), Console(stderr=True)
    shown = console.is_terminal and len(prompts) > 1
    results = []
    for prompt in track(prompts, "generating", console=console, transient=True, disable=not shown):
        with model.disable_adapter():
            before = complete(model, tokenizer, prompt, sampling, chat)
        results.append(Comparison(prompt, before, complete(model, tokenizer, prompt, sampling, chat)))
    return results


def generate(
    adapter: str | Path,
    prompts: Sequence[str],
    *,
    model: str | None = None,
    sampling: Sampling | None = None,
    chat: bool | None = None,
    quantization: str = "nf4",
    backend: str = "auto",
    device: str = "auto",
) -> list[Comparison]:
    """Loads a base model and its adapter and continues ``prompts`` without and with it.

    adapter: the folder of an adapter or of a finished run. model: the base, by default the one the adapter names.

    Raises UserError for an adapter that is missing or for another model.
    """
    if not prompts:
        raise UserError("prompt is missing: pass --prompt, once for each prompt")
    folder = models.find_adapter(adapter)
    models.check_backend(backend)
    target = models.pick_device(device)
    source = models.find(models.base_of(folder, model))
    if (method := models.own_method(folder)) is not None:
        raise UserError(
            f"adapter: {folder} is of method {method}, no adapter that can be taken off: only PEFT's and LoRA's are "
            "compared"
        )
    models.check_adapter(folder, source, models.skeleton(source))
    tokenizer = models.load_tokenizer(source)
    dtype = torch.bfloat16 if models.pick_bf16("auto", target) else torch.float32
    base = models.load_base(source, quantization=quantization, device=target, dtype=dtype)
    peft_model = models.load_adapter(base, folder)
    if peft_model.active_peft_config.is_prompt_learning:
        models.fuse_base(peft_model, backend)
    else:
        models.accelerate(peft_model, backend)
    return compare(peft_model, tokenizer, prompts, sampling, chat)


def table(comparisons: Sequence[Comparison]) -> Table:
    """The comparisons side by side, for a rich console."""
    from rich.table import Table
    from rich.text import Text

    result = Table(show_lines=True, expand=True)
    for title in ("prompt", "before", "after"):
        result.add_column(title, ratio=1 if title == "prompt" else 2)
    for row in comparisons:
        result.add_row(Text(row.prompt), Text(row.before), Text(row.after))
    return result
