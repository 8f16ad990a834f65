"""A small GPT-2 from nothing: tokenizer and weights, trained on Python's manual. ``python examples/gpt2.py``

Writes runs/gpt2/base, which examples/gpt2.yaml adapts to film reviews. No weights of GPT-2 are needed; no network.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import prepare

END = "<|endoftext|>"


def make_tokenizer(texts: Iterable[str], size: int) -> Any:
    """Byte-level BPE, as GPT-2's, of ``size`` tokens."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, bos_token=END, pad_token=END)


def make(
    folder: Path, *, steps: int = 300, width: int = 192, layers: int = 4, batch: int = 16, length: int = 128
) -> float:
    """Trains the model and writes it to ``folder``; its mean loss on held-out text, in nats a token."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    with tempfile.TemporaryDirectory() as name:
        prepare.prepare("manual", Path(name))
        train, test = (
            [json.loads(line)["text"] for line in (Path(name) / f"{part}.jsonl").read_text("utf-8").splitlines()]
            for part in ("train", "test")
        )
    tokenizer = make_tokenizer(train, 2048)
    tokens, held_out = (torch.tensor(tokenizer(END.join(texts))["input_ids"]) for texts in (train, test))
    torch.manual_seed(prepare.SEED)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=width,
        n_layer=layers,
        n_head=width // 32,
        n_positions=2 * length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    draw = random.Random(prepare.SEED)
    for step in range(steps):
        starts = [draw.randrange(len(tokens) - length) for _ in range(batch)]
        ids = torch.stack([tokens[start : start + length] for start in starts])
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            print(f"step {step}/{steps}  loss {loss.item():.3f}", flush=True)
    model.eval()
    with torch.no_grad():
        blocks = held_out[: len(held_out) // length * length].view(-1, length)
        final = torch.stack([model(input_ids=block[None], labels=block[None]).loss for block in blocks]).mean().item()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return final


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpt2/base"), help="folder [default: runs/gpt2/base]")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--width", type=int, default=192, help="a multiple of 32")
    arguments = parser.parse_args()
    loss = make(arguments.out, steps=arguments.steps, width=arguments.width)
    print(f"perplexity {math.exp(loss):.1f} on held-out text; saved in {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
