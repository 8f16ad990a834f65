"""Tiny random models under the names that PEFT's tests ask the Hub for, and a server on this machine that has them.

The weights are not those of the Hub: the tests compare models with themselves, with and without adapters.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 1024
_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
_OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "ffn_dim": 4,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 512}
_T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_ff": 37, "d_kv": 8, "num_layers": 2, "num_heads": 4}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_ffn_dim": 4,
    "decoder_ffn_dim": 4,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 512,
}
_MOE = {**_LLAMA, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
_QWEN_VL = {
    "text_config": {**_LLAMA, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1]}},
    "vision_config": {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16},
}
_LLAVA = {
    "text_config": {**_LLAMA, "model_type": "llama"},
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 32,
        "image_size": 30,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 15,
        "projection_dim": 16,
    },
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "hf-internal-testing/Mixtral-tiny": ("Mixtral:ForCausalLM", {**_LLAMA, "num_local_experts": 4}),
    "hf-internal-testing/tiny-qwen3-moe": ("Qwen3Moe:ForCausalLM", _MOE),
    "hf-internal-testing/tiny-random-BertModel": ("Bert:Model", _BERT),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3Text:Gemma3ForCausalLM",
        {**_LLAMA, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("Llama:ForCausalLM", _LLAMA),
    "hf-internal-testing/tiny-random-LlavaForConditionalGeneration": ("Llava:ForConditionalGeneration", _LLAVA),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("Mistral:ForCausalLM", _LLAMA),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2:LMHeadModel", _GPT2),
    "peft-internal-testing/opt-125m": ("OPT:ForCausalLM", {**_OPT, "num_hidden_layers": 12}),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2:ForCausalLM", _LLAMA),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("Bart:ForConditionalGeneration", _BART),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("Bert:ForSequenceClassification", _BERT),
    "peft-internal-testing/tiny-random-BertModel": ("Bert:Model", _BERT),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (
        "Bloom:ForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    ),
    "peft-internal-testing/tiny-random-DebertaModel": ("Deberta:Model", _BERT),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2:Model", _BERT),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2:LMHeadModel", _GPT2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJ:ForCausalLM", {**_GPT2, "rotary_dim": 4}),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": ("GPTNeoX:ForCausalLM", _BERT),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("Llama:ForCausalLM", _LLAMA),
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPT:ForCausalLM", _OPT),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": ("Roberta:ForSequenceClassification", _BERT),
    "peft-internal-testing/tiny-random-RobertaModel": ("Roberta:Model", _BERT),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": ("T5:ForConditionalGeneration", _T5),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": ("T5:ForConditionalGeneration", _T5),
    "peft-internal-testing/tiny-random-gpt2": ("GPT2:LMHeadModel", _GPT2),
    "peft-internal-testing/tiny-random-t5": ("T5:ForConditionalGeneration", _T5),
    "google/flan-t5-small": ("T5:ForConditionalGeneration", _T5),
    "trl-internal-testing/tiny-GptOssForCausalLM": (
        "GptOss:ForCausalLM",
        {**_LLAMA, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "trl-internal-testing/tiny-Llama4ForCausalLM": (
        "Llama4Text:Llama4ForCausalLM",
        {**_LLAMA, "head_dim": 8, "intermediate_size_mlp": 32, "num_local_experts": 4, "moe_layers": [0, 1]},
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": ("Llama:ForSequenceClassification", _LLAMA),
    "trl-internal-testing/tiny-Qwen2_5_VLForConditionalGeneration": ("Qwen2_5_VL:ForConditionalGeneration", _QWEN_VL),
    "trl-internal-testing/tiny-Qwen3MoeForCausalLM": ("Qwen3Moe:ForCausalLM", _MOE),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": ("Qwen3:ForCausalLM", {**_LLAMA, "head_dim": 8}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("Llama:ForCausalLM", _LLAMA),
}
"""Name on the Hub: configuration and architecture, sizes."""


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<pad>", "<s>", "</s>", "<unk>", "<mask>", *letters]
    words = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="<mask>", **special)


def make(name: str, folder: Path) -> None:
    """Write the stand-in of ``name``: configuration, weights, tokenizer."""
    kind, sizes = MODELS[name]
    config_name, _, architecture = kind.partition(":")
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if config_name in ("T5", "Bart"):
        ids["decoder_start_token_id"] = 0
    config = getattr(transformers, f"{config_name}Config")(**sizes, **ids)
    prefixed = architecture if architecture.startswith(config_name[:4]) else config_name + architecture
    torch.manual_seed(0)
    model = getattr(transformers, prefixed)(config).eval()
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)


class _Handler(BaseHTTPRequestHandler):
    """The few answers of the Hub that loading a model asks for."""

    find: Callable[[str], Path | None]
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Nothing on stderr."""

    def _answer(self, status: int, body: bytes, headers: dict[str, str], send: bool) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if send:
            self.wfile.write(body)

    def _serve(self, send: bool) -> None:
        path = self.path.partition("?")[0].strip("/")
        api = path.startswith("api/models/")
        parts = path.removeprefix("api/models/").split("/")
        folder = type(self).find("/".join(parts[:2])) if len(parts) >= 2 else None
        if folder is None:
            return self._answer(404, b"", {"X-Error-Code": "RepoNotFound"}, send)
        commit = hashlib.sha1(str(folder).encode()).hexdigest()
        files = sorted(p for p in folder.iterdir() if p.is_file())
        if api:
            if "tree" in parts:
                value: Any = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": commit} for p in files]
            else:
                siblings = [{"rfilename": p.name} for p in files]
                value = {"id": "/".join(parts[:2]), "sha": commit, "siblings": siblings, "tags": [], "private": False}
            return self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"}, send)
        file = folder / "/".join(parts[4:])
        headers = {"X-Repo-Commit": commit}
        if len(parts) < 5 or not file.is_file():
            return self._answer(404, b"", {**headers, "X-Error-Code": "EntryNotFound"}, send)
        body = file.read_bytes()
        etag = hashlib.sha1(body).hexdigest()
        return self._answer(200, body, {**headers, "ETag": f'"{etag}"', "X-Linked-Size": str(len(body))}, send)

    def do_GET(self) -> None:
        self._serve(send=True)

    def do_HEAD(self) -> None:
        # The length of a HEAD's answer is that of the file.
        self._serve(send=False)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(404, b"", {"X-Error-Code": "RepoNotFound"}, send=True)


@contextlib.contextmanager
def hub(folder: Path) -> Iterator[str]:
    """The address of a server of the stand-ins, each made in ``folder`` when it is first asked for."""
    lock = threading.Lock()

    def find(name: str) -> Path | None:
        if name not in MODELS:
            return None
        made = folder / name
        with lock:
            if not made.exists():
                make(name, made)
        return made

    handler = type("Handler", (_Handler,), {"find": staticmethod(find)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
