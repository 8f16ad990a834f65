"""Models for training and generation: find, check, load in 4 bit, adapt, accelerate."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastlora.training.config import near_files
from fastlora.training.errors import UserError, first_line, is_disk_full, near, one_of, require

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HEADS = ("classifier", "score")
"""Names of the layer that gives the scores of labels, as transformers' models and PEFT call it."""
DEFAULT_BLOCKSIZE = 64
"""What bitsandbytes uses when transformers loads a model; the loader has no setting for another."""


IN_PACKAGE = "package:"
"""What the name of a model begins with that an installed package carries."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model comes from: what ``from_pretrained`` takes."""

    name: str
    gguf_file: str | None = None

    @property
    def kwargs(self) -> dict[str, Any]:
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}


def find(model: str) -> Source:
    """What ``model`` names: a hub id, a folder with a model or one .gguf file, or a .gguf file.

    ``package:NAME/FOLDER`` is a folder of an installed Python package, ``package:NAME`` the package's own.

    Raises UserError for a path that is missing or holds no model. A hub id is not looked up.
    """
    path = Path(model).expanduser()
    if model.startswith(IN_PACKAGE):
        path = _in_package(model)
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"model: {model} is a file: name a model folder, a .gguf file or a hub id")
        return Source(str(path.parent), path.name)
    if path.is_dir():
        if (path / "config.json").is_file():
            return Source(str(path))
        ggufs = sorted(p.name for p in path.glob("*.gguf"))
        if len(ggufs) == 1:
            return Source(str(path), ggufs[0])
        if ggufs:
            raise UserError(f"model: {model} holds several .gguf files: name one of {', '.join(ggufs)}")
        if (path / "adapter_config.json").is_file():
            base = _read_json(path / "adapter_config.json").get("base_model_name_or_path")
            raise UserError(f"model: {model} is an adapter, not a model: name its base model ({base})")
        raise UserError(f"model: {model} holds neither config.json nor a .gguf file: name a model folder")
    if model.startswith((".", "/", "~")) or path.suffix == ".gguf" or model.count("/") > 1:
        raise UserError(f"model: no such folder or file: {model}; {near_files(path)}")
    return Source(model)


def _in_package(model: str) -> Path:
    """The folder that ``package:NAME/FOLDER`` names. Nothing of the package is run."""
    name, _, inside = model.removeprefix(IN_PACKAGE).partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"model: no package {name!r} is installed: install the one that carries the model")
    folder = Path(next(iter(spec.submodule_search_locations))) / inside
    if not folder.exists():
        raise UserError(f"model: the package {name} has no {inside}; {near_files(folder)}")
    return folder


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read {path} ({first_line(error)}): the folder is damaged, use another copy") from error


def _load_error(source: Source, error: Exception) -> UserError:
    if is_disk_full(error):
        return UserError(f"the disk is full while {source.name} is loaded: free space or set HF_HOME")
    if Path(source.name).exists():
        return UserError(f"model: cannot load {source.name} ({first_line(error)}): check that its files are complete")
    return UserError(
        f"model: {source.name!r} is neither a local folder nor a model that the hub gives ({first_line(error)}): "
        "check the name, the network, or log in to the hub"
    )


def transformers() -> Any:
    """The transformers package, quiet unless something fails. Raises UserError when it is missing."""
    package = require("transformers")
    package.utils.logging.set_verbosity_error()
    # It reports an optional kernel package at import, which no one asked for.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return package


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token."""
    try:
        tokenizer = transformers().AutoTokenizer.from_pretrained(source.name, **source.kwargs)
    except UserError:
        raise
    except Exception as error:
        raise _load_error(source, error) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise UserError(f"model: the tokenizer of {source.name} has no pad and no eos token: add one to its files")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def skeleton(source: Source, auto_class: str = "AutoModelForCausalLM") -> PreTrainedModel:
    """The model without weights (meta device): names and shapes of its layers, before anything large is loaded.

    auto_class: the transformers class that chooses the model's.
    """
    try:
        config = _config(source)
        with torch.device("meta"):
            return getattr(transformers(), auto_class).from_config(config)
    except UserError:
        raise
    except Exception as error:
        raise _load_error(source, error) from error


def _config(source: Source) -> Any:
    hf = transformers()
    try:
        config = hf.AutoConfig.from_pretrained(source.name, **source.kwargs)
    except Exception as error:
        raise _load_error(source, error) from error
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    return config


def load_config(model: str) -> Any:
    """The transformers configuration of what `find` finds, or of a JSON file, without its quantization.

    Raises UserError as `find` does, and where there is no configuration.
    """
    path = Path(model).expanduser()
    if path.suffix == ".json" and path.is_file():
        path = path.parent if path.name == "config.json" else path
        return _config(Source(str(path)))
    return _config(find(model))


def check_causal(config: Any, name: str) -> None:
    """Raises UserError for an encoder, which reads in both directions and would see the token that it is to predict."""
    both = require("transformers.models.auto.modeling_auto").MODEL_FOR_MASKED_LM_MAPPING
    if type(config) in both and not getattr(config, "is_decoder", False):
        raise UserError(
            f"model: {name} is an encoder ({config.model_type}), which sees the token that it is to predict: set task "
            "sequence-classification or token-classification, or name a causal model"
        )


POSITIONS = ("position_embeddings", "embed_positions", "wpe")
"""What models call their learned positions, of which there are so many and no more."""


def check_length(model: nn.Module, tokens: int, key: str) -> None:
    """Raises UserError when ``model`` has learned fewer than ``tokens`` positions; key: the setting that has them."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in POSITIONS:
            # Positions begin after that of padding in RoBERTa's kind, after an offset in OPT's.
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            limit = module.num_embeddings - max(first, getattr(module, "offset", 0))
            if tokens > limit:
                raise UserError(f"{key}: {tokens} tokens, and the model has positions for {limit}: set {key} {limit}")


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Name to (out_features, in_features) of every linear layer, transformers' Conv1D included."""
    shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            shapes[name] = (module.out_features, module.in_features)
        elif type(module).__name__ == "Conv1D":
            shapes[name] = (module.weight.shape[1], module.weight.shape[0])
    return shapes


def targets(model: PreTrainedModel, target_modules: str | list[str]) -> list[str]:
    """Full names of the linear layers that ``target_modules`` names, as PEFT matches them.

    Raises UserError for a name that matches no linear layer, with the near ones.
    """
    shapes = linear_shapes(model)
    if target_modules == "all-linear":
        head = model.get_output_embeddings()
        return [name for name in shapes if model.get_submodule(name) is not head and name.split(".")[0] not in HEADS]
    matched: list[str] = []
    for wanted in target_modules:
        found = [name for name in shapes if name == wanted or name.endswith("." + wanted)]
        if not found:
            suffixes = dict.fromkeys(name.rpartition(".")[2] for name in shapes)
            hint = near(wanted, ["all-linear", *suffixes, *shapes])
            raise UserError(
                f"target_modules: no linear layer is called {wanted!r}; {hint} layers: {', '.join(suffixes)}"
            )
        matched += found
    return list(dict.fromkeys(matched))


def adapter_parameters(model: PreTrainedModel, target_modules: str | list[str], r: int) -> int:
    """Trainable parameters of an adapter of rank ``r``."""
    shapes = linear_shapes(model)
    return sum(r * sum(shapes[name]) for name in targets(model, target_modules))


def base_bytes(model: PreTrainedModel, quantization: str) -> int:
    """Bytes of a base model once it is loaded: 4-bit linear layers but the head, the rest in 16 bits."""
    shapes = linear_shapes(model) if quantization != "none" else {}
    head = model.get_output_embeddings()
    packed = sum(n * k for name, (n, k) in shapes.items() if model.get_submodule(name) is not head)
    rest = sum(p.numel() for p in model.parameters()) - packed
    return int(packed * (0.5 + 1 / 16)) + 2 * rest


def pick_device(device: str) -> torch.device:
    """The device of a configuration. Raises UserError when CUDA is asked for and not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: no CUDA GPU is visible to PyTorch: set device cpu or auto, or install a CUDA build")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def pick_bf16(bf16: bool | str, device: torch.device) -> bool:
    """Whether to compute in bfloat16. Raises UserError where the GPU cannot."""
    able = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if bf16 is True and not able:
        raise UserError(f"bf16: {torch.cuda.get_device_name(device)} has no bfloat16: set bf16 false or auto")
    return able and device.type == "cuda" if bf16 == "auto" else bool(bf16)


def load_base(
    source: Source,
    *,
    quantization: str = "nf4",
    double_quant: bool = True,
    blocksize: int = DEFAULT_BLOCKSIZE,
    device: torch.device,
    dtype: torch.dtype,
    auto_class: str = "AutoModelForCausalLM",
    heads: Iterable[str] = (),
    options: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """The base model on ``device``: 4-bit linear layers that compute in ``dtype``, or dense in ``dtype``.

    quantization: nf4, fp4 or none. auto_class: the transformers class that chooses the model's. heads: layers to leave
    dense, beside the model's own choice. options: further ones of ``from_pretrained``.
    """
    hf = transformers()
    for package in ("accelerate", *(["bitsandbytes"] if quantization != "none" else [])):
        require(package)
    kwargs: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}, **source.kwargs, **(options or {})}
    bnb_config = None
    if quantization != "none":
        bnb_config = hf.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization,
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=list(heads) or None,
        )
    in_place = bnb_config is not None and (source.gguf_file is not None or blocksize != DEFAULT_BLOCKSIZE)
    if source.gguf_file is not None:
        require("gguf", extra="demo")
        kwargs["quantization_config"] = hf.GgufConfig(dequantize=True)
    elif not in_place and bnb_config is not None:
        kwargs["quantization_config"] = bnb_config
    if in_place:
        kwargs["device_map"] = {"": "cpu"}
    try:
        model = getattr(hf, auto_class).from_pretrained(source.name, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise _load_error(source, error) from error
    if in_place:
        quantize_in_place(model, bnb_config, blocksize, device)
    for module in model.modules():
        # On CPUs with AVX512-BF16 bitsandbytes repacks the weight in the first forward in eval mode, after which the
        # layer has no gradient.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model.config.use_cache = False
    return model


def quantize_in_place(model: PreTrainedModel, bnb_config: Any, blocksize: int, device: torch.device) -> None:
    """Turns the dense linear layers of ``model`` (but its head) into bitsandbytes 4-bit layers on ``device``.

    For what ``from_pretrained`` cannot do: dense weights out of a GGUF file, and block sizes other than 64.
    """
    bnb = require("bitsandbytes")
    quantizer = require("transformers.quantizers.auto").AutoHfQuantizer.from_config(bnb_config, pre_quantized=False)
    kept = require("transformers.quantizers.base").get_keys_to_not_convert(model)
    kept += bnb_config.llm_int8_skip_modules or []
    for name, dense in list(model.named_modules()):
        if type(dense) is not nn.Linear or any(name == key or name.endswith("." + key) for key in kept):
            continue
        packed = bnb.nn.Linear4bit(
            dense.in_features,
            dense.out_features,
            dense.bias is not None,
            bnb_config.bnb_4bit_compute_dtype,
            compress_statistics=bnb_config.bnb_4bit_use_double_quant,
            quant_type=bnb_config.bnb_4bit_quant_type,
            device="meta",
        )
        packed.weight = bnb.nn.Params4bit(
            dense.weight.data,
            requires_grad=False,
            blocksize=blocksize,
            compress_statistics=bnb_config.bnb_4bit_use_double_quant,
            quant_type=bnb_config.bnb_4bit_quant_type,
            module=packed,
        ).to(device)
        packed.bias = dense.bias
        model.set_submodule(name, packed.requires_grad_(False))
    model.to(device)
    # What from_pretrained leaves on a model that it quantized; PEFT and the trainers ask for it.
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = bnb_config.quant_method
    quantizer.postprocess_model(model)


def check_backend(backend: str) -> None:
    """Raises UserError for a name that is no backend."""
    from fastlora.backends import BACKENDS

    one_of("backend", backend, ["auto", "peft", *BACKENDS])


def accelerate(
    model: nn.Module,
    backend: str,
    *,
    blocks: bool = False,
    liger: bool | str = False,
    loss: bool = False,
    decoded: float = 0.0,
) -> Any:
    """Fuses the LoRA layers of ``model`` and returns fastlora's report; None when ``backend`` is peft.

    blocks, liger, loss, decoded: as for `fastlora.accelerate`. Raises UserError where Liger is missing or does not know
    the model.
    """
    if backend == "peft":
        return None
    import fastlora

    try:
        return fastlora.accelerate(model, backend=backend, blocks=blocks, liger=liger, loss=loss, decoded=decoded)
    except RuntimeError as error:
        raise UserError(f"backend: {first_line(error)}: set backend auto") from error
    except (ImportError, ValueError) as error:
        if not liger:
            raise
        raise UserError(f"liger: {first_line(error)}") from error


def fuse_base(model: nn.Module, backend: str) -> int:
    """Fuses the 4-bit layers of a model whose adapter has no factors in them; how many, none with backend peft."""
    if backend == "peft":
        return 0
    from fastlora.integrations import bitsandbytes

    return bitsandbytes.fuse(model, backend)


def find_adapter(adapter: str | Path) -> Path:
    """The folder of an adapter: ``adapter`` itself, or the one in the output folder of a run."""
    path = Path(adapter).expanduser()
    for folder in (path, path / "adapter"):
        if (folder / "adapter_config.json").is_file():
            return folder
    if not path.is_dir():
        raise UserError(f"adapter: no such folder: {adapter}; {near_files(path)}")
    raise UserError(f"adapter: {adapter} holds no adapter_config.json: name the adapter folder of a finished run")


def own_method(adapter: Path) -> str | None:
    """The method of an adapter in a file of our own, which PEFT does not know; None for one of PEFT's."""
    values = _read_json(adapter / "adapter_config.json").get("fastlora")
    return None if values is None else str(values["method"])


def base_of(adapter: Path, model: str | None) -> str:
    """The base model to use with ``adapter``: ``model``, or else the one that the adapter names."""
    base = model or _read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    if not base:
        raise UserError(f"adapter: {adapter} does not name its base model: pass --model")
    return str(base)


def check_adapter(adapter: Path, source: Source, model: PreTrainedModel) -> None:
    """Raises UserError for files that were changed, for an adapter that scores labels where ``model`` continues texts,
    and for a layer that ``model`` has not or in another shape."""
    from fastlora.training.checkpoints import check_adapter_files

    check_adapter_files(adapter)
    config = _read_json(adapter / "adapter_config.json")
    if config.get("task_type") in ("SEQ_CLS", "TOKEN_CLS"):
        raise UserError(
            f"adapter: {adapter} scores labels ({config['task_type']}), and only adapters of models that continue "
            "texts are generated with or merged: load it with PEFT"
        )
    trained_on = config.get("base_model_name_or_path")
    advice = f"the adapter was trained on {trained_on!r}: pass --model with that model"
    width = model.get_input_embeddings().embedding_dim
    if config.get("peft_type") == "PROMPT_TUNING" and config.get("token_dim") != width:
        raise UserError(
            f"adapter: {adapter} is for another model: its tokens have {config['token_dim']} features and those of "
            f"{source.name} {width}; {advice}"
        )
    from fastlora.adapters import quantized

    try:
        if (adapter / quantized.FILE).is_file():
            weights = quantized.weights_of_file(adapter)
        else:
            weights = require("peft.utils").load_peft_weights(str(adapter), device="cpu")
    except Exception as error:
        file = adapter / (quantized.FILE if (adapter / quantized.FILE).is_file() else "adapter_model.safetensors")
        raise UserError(f"adapter: cannot read {file} ({first_line(error)}): use another copy") from error
    shapes = linear_shapes(model)
    for key, (part, side) in _lora_parts(weights):
        name = key.removeprefix("base_model.model.").removesuffix(f".{part}.weight")
        features = weights[key].shape[side]
        if name not in shapes:
            raise UserError(f"adapter: {adapter} is for another model: {source.name} has no layer {name}; {advice}")
        if shapes[name][side] != features:
            what = "out_features" if side == 0 else "in_features"
            raise UserError(
                f"adapter: {adapter} is for another model: {name} has {what} {features} in the adapter and "
                f"{shapes[name][side]} in {source.name}; {advice}"
            )


def _lora_parts(keys: Iterable[str]) -> Iterable[tuple[str, tuple[str, int]]]:
    """The keys of linear LoRA factors, with their part and the dimension that the base layer shares."""
    for key in keys:
        for part, side in (("lora_A", 1), ("lora_B", 0)):
            if key.endswith(f".{part}.weight"):
                yield key, (part, side)


def dense_weights(source: Source, auto_class: str = "AutoModelForCausalLM") -> dict[str, torch.Tensor]:
    """The weights (N, K) of the linear layers of a model as they are stored, on the CPU, by the names of the layers."""
    kwargs: dict[str, Any] = {"dtype": "auto", **source.kwargs}
    if source.gguf_file is not None:
        kwargs |= {"quantization_config": transformers().GgufConfig(dequantize=True), "dtype": torch.float32}
    try:
        model = getattr(transformers(), auto_class).from_pretrained(source.name, **kwargs)
    except Exception as error:
        raise _load_error(source, error) from error
    return {name: m.weight.detach() for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def load_adapter(model: PreTrainedModel, adapter: Path) -> PeftModel:
    """``model`` with the adapter of a folder, and with the base weights that the start of the adapter has changed."""
    from fastlora.adapters import quantized, starts

    peft = require("peft")
    try:
        if own_method(adapter) is not None:
            from fastlora.training.methods import load_own

            return load_own(model, adapter)
        if (adapter / quantized.FILE).is_file():
            adapted = quantized.load(model, adapter)
        else:
            adapted = peft.PeftModel.from_pretrained(model, str(adapter))
        if (adapter / starts.FILE).is_file():
            starts.load_base(adapted, adapter)
        return adapted
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"adapter: cannot load {adapter} ({first_line(error)}): use another copy") from error
