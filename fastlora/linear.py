"""The user's layer: checks, the type to compute in, flattening. No mathematics."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from fastlora import node, ops, packed
from fastlora.dropout import draw_seed
from fastlora.nf4 import NF4Weight, Weight


def lora_linear(
    x: torch.Tensor,
    w: Weight,
    lora_a: torch.Tensor | None = None,
    lora_b: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    scale: float | torch.Tensor = 1.0,
    dropout_p: float = 0.0,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """``y = x W^T + scale * (dropout(x) A^T) B^T + bias`` with a frozen base weight, as one node with a fused backward.

    x: (..., K), of one dimension or more, any strides. w: an `NF4Weight` or a dense tensor (N, K), frozen.
    lora_a: (R, K), lora_b: (N, R), of any floating type: the products run in the type of x (under autocast: in its
    type), the gradients come back in the adapters' own type. Without them the layer is the base product alone.
    bias: (N,). scale: a number or a tensor of one. dropout_p: probability, 0 for evaluation.
    out_dtype: type of the result, by default the type computed in; float32 is filled from the accumulator of narrower
    types.
    backend: "auto", or a name of `fastlora.backends.BACKENDS`.

    Returns (..., N). Raises ValueError for shapes, types or devices that do not fit, RuntimeError when the named
    backend cannot run.
    """
    # It declines whatever the checks below would refuse, and costs less than they do.
    y = node.call(x, w, lora_a, lora_b, bias, out_dtype, scale, backend, True, dropout_p)
    if y is not None:
        return y
    if len(w.shape) != 2:
        raise ValueError(f"the base weight must be a matrix (N, K), got shape {tuple(w.shape)}")
    n, k = w.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"the last dimension of x must be in_features = {k}, got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x must be floating-point, got {x.dtype}")
    device = w.device
    for name, t in (("x", x), ("lora_a", lora_a), ("lora_b", lora_b), ("bias", bias)):
        if t is not None and t.device != device:
            raise ValueError(f"{name} is on {t.device}, the base weight on {device}")
    if (lora_a is None) != (lora_b is None):
        raise ValueError("give both lora_a and lora_b, or neither")
    if lora_a is not None and lora_b is not None:
        r = lora_a.shape[0]
        if tuple(lora_a.shape) != (r, k) or tuple(lora_b.shape) != (n, r):
            raise ValueError(
                f"for a base weight ({n}, {k}) the adapters must be lora_a (R, {k}) and lora_b ({n}, R); "
                f"got {tuple(lora_a.shape)} and {tuple(lora_b.shape)}"
            )
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"bias must have shape ({n},), got {tuple(bias.shape)}")
    if isinstance(scale, torch.Tensor) and scale.numel() != 1:
        raise ValueError(f"scale must be a number or a tensor of one, got shape {tuple(scale.shape)}")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must lie in [0, 1], got {dropout_p}")
    x = _autocast(x)
    check_out_dtype(out_dtype, x.dtype)
    return _run(x, w, lora_a, lora_b, bias, scale, dropout_p, out_dtype, backend)


def check_out_dtype(out_dtype: torch.dtype | None, dtype: torch.dtype) -> None:
    """Raise ValueError unless a layer computed in ``dtype`` has results of ``out_dtype``."""
    narrow = dtype.itemsize < torch.float32.itemsize
    if out_dtype in (None, dtype) or (out_dtype == torch.float32 and narrow):
        return
    others = ", or torch.float32" if narrow else ""
    raise ValueError(f"out_dtype must be {dtype}, the type computed in{others}; got {out_dtype}")


def _autocast(x: torch.Tensor) -> torch.Tensor:
    """x in the type that autocast wants a linear layer to compute in."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x


def _run(
    x: torch.Tensor,
    w: Weight,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: float | torch.Tensor,
    dropout_p: float,
    out_dtype: torch.dtype | None,
    backend: str,
) -> torch.Tensor:
    """`lora_linear` of arguments known to fit, in the type of x."""
    y = node.call(x, w, lora_a, lora_b, bias, out_dtype, scale, backend, False, dropout_p)
    if y is not None:
        return y
    factor = 1.0
    if lora_a is not None and lora_b is not None:
        if isinstance(scale, torch.Tensor) or torch.compiler.is_compiling():
            # A tensor may live on the device and change between replays of a graph, and a number that reaches an
            # opaque operator becomes a constant of the compiled graph: neither may cost a synchronisation or a
            # recompilation, so the scale goes into the small factor.
            lora_b = lora_b * scale
        else:
            factor = scale
    seed = draw_seed(x.device) if dropout_p > 0 and lora_a is not None else None
    if x.dim() == 2:
        return ops.lora_linear(x, w, lora_a, lora_b, bias, out_dtype, factor, dropout_p, seed, backend)
    n, k = w.shape
    y = ops.lora_linear(x.reshape(-1, k), w, lora_a, lora_b, bias, out_dtype, factor, dropout_p, seed, backend)
    return y.view(*x.shape[:-1], n)


class NF4Linear(nn.Module):
    """A frozen linear layer in 4 bits, saved under the keys that bitsandbytes' ``Linear4bit`` uses.

    The packed weight and its statistics are buffers. ``.to(dtype)`` moves them and never changes their types.
    """

    def __init__(self, weight: NF4Weight, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.blocksize, self.quant_type, self.dtype = weight.blocksize, weight.quant_type, weight.dtype
        self._set(weight)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    weight: torch.Tensor
    _STATISTICS = ("absmax", "absmax_q", "absmax_scale", "absmax_code", "absmax_offset")

    def _set(self, weight: NF4Weight) -> None:
        self.register_buffer("weight", weight.w_packed)
        for name in self._STATISTICS:  # saved under other names: see _save_to_state_dict
            self.register_buffer(name, getattr(weight, name), persistent=False)

    @property
    def nf4(self) -> NF4Weight:
        """The weight (N, K): the same object for as long as the layer has the same buffers."""
        buffers = self._buffers
        if not torch.compiler.is_compiling():
            known: NF4Weight | None = self.__dict__.get("_known")
            if known is not None and (
                buffers["weight"] is known.w_packed
                and buffers["absmax"] is known.absmax
                and buffers["absmax_q"] is known.absmax_q
                and buffers["absmax_scale"] is known.absmax_scale
                and buffers["absmax_code"] is known.absmax_code
                and buffers["absmax_offset"] is known.absmax_offset
            ):
                return known
        statistics = {name: buffers[name] for name in self._STATISTICS}
        shape = (self.out_features, self.in_features)
        weight = NF4Weight(self.weight, shape, self.blocksize, self.quant_type, self.dtype, **statistics)
        if not torch.compiler.is_compiling():
            self.__dict__["_known"] = weight
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return lora_linear(x, self.nf4, bias=self.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> NF4Linear:
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, t in before.items():
            moved = getattr(self, name)
            if moved.dtype != t.dtype:  # statistics in 16 bits would be other weights
                setattr(self, name, t.to(moved.device))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, value in self.nf4.state_dict().items():
            destination[f"{prefix}weight.{key}"] = value

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        inner = f"{prefix}weight."
        state = {key[len(inner) :]: value for key, value in state_dict.items() if key.startswith(inner)}
        rest = {key: value for key, value in state_dict.items() if not key.startswith(inner)}
        packed = rest.get(f"{prefix}weight")
        if packed is not None:
            if not local_metadata.get("assign_to_params_buffers", False):
                device = packed.device if self.weight.is_meta else self.weight.device
                packed = packed.to(device, copy=True)
                state = {key: value.to(device, copy=True) for key, value in state.items()}
            try:
                loaded = NF4Weight.from_state_dict(packed, state).check()
            except KeyError as error:
                error_msgs.append(f"{inner}{error.args[0]} is missing")
                return
            except ValueError as error:
                error_msgs.append(f"{prefix}weight: {error}")
                return
            if loaded.shape != (self.out_features, self.in_features):
                error_msgs.append(
                    f"{prefix}weight: the saved matrix is {loaded.shape}, "
                    f"this layer's is {(self.out_features, self.in_features)}"
                )
                return
            self.blocksize, self.quant_type, self.dtype = loaded.blocksize, loaded.quant_type, loaded.dtype
            self._set(loaded)
            rest[f"{prefix}weight"] = self.weight
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def extra_repr(self) -> str:
        nested = ", nested" if self.absmax_q is not None else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.quant_type}, blocksize={self.blocksize}{nested}"
        )


def base_weight(base: nn.Module) -> Weight:
    """The frozen weight (N, K) of a base layer: `NF4Linear`, bitsandbytes' ``Linear4bit``, or a dense layer.

    A 4-bit weight is known by its ``quant_state``, not by its class: sharding and pickling change the class and leave
    the state on the tensor or on the module. Raises ValueError as `NF4Weight.from_bitsandbytes` does.
    """
    if isinstance(base, NF4Linear):
        return base.nf4
    weight: Any = base.weight
    state = getattr(weight, "quant_state", None)
    state = getattr(base, "quant_state", None) if state is None else state
    return weight if state is None else NF4Weight.from_bitsandbytes(weight, state)


def kept_weight(owner: nn.Module, base: Any) -> Weight:
    """`base_weight` of ``base``, kept on ``owner`` for as long as it has the same bytes and statistics.

    A weight that FSDP2 gathers anew for each pass has one storage, which is emptied and filled again: the view of it
    that is kept sees each of them. Raises ValueError or AttributeError when there is no such weight.
    """
    packed = base._parameters.get("weight")
    packed = base.weight if packed is None else packed
    state = getattr(packed, "quant_state", None)
    if state is None:
        state = getattr(base, "quant_state", None)
    if state is None or ops.looked_at():
        return base_weight(base)
    known = owner.__dict__.get("fastlora_weight")
    # bitsandbytes' parameters would take the question of where their bytes are through Python.
    with torch._C.DisableTorchFunctionSubclass():
        # The statistics are kept alive, so that no other object can pass for them.
        if (
            known is not None
            and known[0] is state
            and known[1] is state.absmax
            and known[2].w_packed.data_ptr() == packed.data_ptr()
        ):
            weight: NF4Weight = known[2]
            return weight
    if ops.must_dispatch(packed.data):
        return base_weight(base)
    weight = NF4Weight.from_bitsandbytes(packed, state)
    owner.__dict__["fastlora_weight"] = (state, state.absmax, weight)
    return weight


def compute_type(
    base: nn.Module, weight: Weight, x: torch.Tensor
) -> tuple[torch.Tensor, torch.dtype | None, torch.dtype]:
    """x in the type that a layer on ``base`` computes in, float32 where that is to be written or None, and the type to
    return.

    bitsandbytes computes in the layer's ``compute_dtype`` and returns the type of x, in or out of autocast; every
    other base computes as ``nn.Linear`` does. ``weight``: `base_weight` of ``base``.
    """
    if isinstance(weight, torch.Tensor) or isinstance(base, NF4Linear):
        x = _autocast(x)
        return x, None, x.dtype
    dtype = x.dtype
    compute_dtype = getattr(base, "compute_dtype", None) or dtype
    if compute_dtype == dtype:
        return x, None, dtype
    # The accumulators are float32.
    wide = torch.float32 if dtype.itemsize > compute_dtype.itemsize < torch.float32.itemsize else None
    return x.to(compute_dtype), wide, dtype


def adapter_forward(layer: Any, x: torch.Tensor, adapter: str, weight: Weight, backend: str) -> torch.Tensor:
    """One adapter of a layer that keeps PEFT's attributes (base_layer, lora_A, lora_B, lora_dropout, scaling,
    lora_variant), on the `base_weight` of its base layer, in the type that `compute_type` says. A variant with
    ``factors`` (see `fastlora.adapters.variant`) says which A, B and scale stand for the adapter's own, one with
    ``run`` computes all of it.
    """
    modules = layer._modules  # as every attribute of a module, but without its search
    dropout = modules["lora_dropout"]._modules[adapter]
    p = dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0
    variant: Any = layer.lora_variant.get(adapter) if layer.lora_variant else None
    if variant is not None and hasattr(variant, "run"):
        return variant.run(layer, _autocast(x), adapter, weight, p, backend)
    if variant is not None and hasattr(variant, "factors"):
        lora_a, lora_b, scale = variant.factors(layer, adapter)
    else:
        a, b, scale = modules["lora_A"]._modules[adapter], modules["lora_B"]._modules[adapter], layer.scaling[adapter]
        if type(a) is not nn.Linear and p == 0:
            y = _packed_forward(modules["base_layer"], x, a, b, scale, weight, backend)
            if y is not None:
                return y
        lora_a, lora_b = a.weight, b.weight
    return factors_forward(modules["base_layer"], x, lora_a, lora_b, scale, p, weight, backend)


def _packed_forward(
    base: Any, x: torch.Tensor, a: nn.Module, b: nn.Module, scale: Any, weight: Weight, backend: str
) -> torch.Tensor | None:
    """`factors_forward` of quantized adapters, of which each has a ``packed`` factor; None where gradients or an
    operator are asked for, or the arguments do not fit."""
    lora_a, lora_b = getattr(a, "packed", None), getattr(b, "packed", None)
    if lora_a is None or lora_b is None or not packed.serves(x, base.bias, scale):
        return None
    if x.dim() == 0 or x.numel() == 0 or x.shape[-1] != weight.shape[1] or x.device != weight.device:
        return None
    rows, wide, dtype = compute_type(base, weight, x)
    rows = rows.reshape(-1, weight.shape[1])
    y = packed.read(rows, weight, lora_a, lora_b, base.bias, float(scale), wide, backend)
    if y is None:
        lora_a, lora_b = packed.both(lora_a, lora_b, rows.dtype)
        return factors_forward(base, x, lora_a, lora_b, scale, 0.0, weight, backend)
    return y.to(dtype).view(*x.shape[:-1], weight.shape[0])


def factors_forward(
    base: Any,
    x: torch.Tensor,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    scale: float | torch.Tensor,
    p: float,
    weight: Weight,
    backend: str,
) -> torch.Tensor:
    """`lora_linear` of a layer ``base``, of `base_weight` ``weight``, in the type that `compute_type` says."""
    bias = base.bias
    own = isinstance(base, NF4Linear)
    if own or getattr(base, "compute_dtype", None) in (None, x.dtype):
        # It declines whatever the check below would refuse, and costs less.
        y = node.call(x, weight, lora_a, lora_b, bias, None, scale, backend, own, p)
        if y is not None:
            return y
    if x.dim() == 0 or x.shape[-1] != weight.shape[1] or x.device != weight.device:
        return lora_linear(x, weight, lora_a, lora_b, bias)  # says what is wrong
    x, wide, dtype = compute_type(base, weight, x)
    y = _run(x, weight, lora_a, lora_b, bias, scale, p, wide, backend)
    return y if y.dtype == dtype else y.to(dtype)


class FastLoRALinear(nn.Module):
    """A frozen linear layer, in 4 bits or dense, with one trainable LoRA adapter, computed as one fused operator.

    Parameters, attributes and state-dict keys are PEFT's: ``base_layer``, ``lora_A.default``, ``lora_B.default``,
    ``lora_dropout``, ``scaling``, ``r``, ``lora_alpha``. The output is
    ``base_layer(x) + scaling * lora_B(lora_A(dropout(x)))`` with ``scaling = lora_alpha / r`` (or ``/ sqrt(r)``).

    in_features K, out_features N, r: rank, 1 or more. bias: whether the base layer has one. quant_type: "nf4", "fp4",
    or None for a dense base. blocksize, nested: see `fastlora.nf4`. dtype: of the base before quantization;
    adapter_dtype: of the adapters. backend: see `lora_linear`. On ``device="meta"`` nothing is allocated: load a
    state dict with ``assign=True``.

    Raises ValueError for sizes and probabilities out of range.
    """

    adapter = "default"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        bias: bool = False,
        *,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        quant_type: str | None = "nf4",
        blocksize: int = 64,
        nested: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(f"in_features and out_features must be positive, got {in_features} and {out_features}")
        base: nn.Module = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        if quant_type is not None:
            base = _quantized(base, quant_type, blocksize, nested)
        self._build(
            base.requires_grad_(False),
            r,
            lora_alpha,
            lora_dropout,
            use_rslora,
            init_lora_weights,
            backend,
            adapter_dtype,
        )

    def _build(
        self,
        base: nn.Module,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        use_rslora: bool,
        init_lora_weights: bool | str,
        backend: str,
        adapter_dtype: torch.dtype | None,
    ) -> None:
        if r < 1:
            raise ValueError(f"r must be a positive rank, got {r}")
        if not 0 <= lora_dropout < 1:
            raise ValueError(f"lora_dropout must lie in [0, 1), got {lora_dropout}")
        if init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(f'init_lora_weights must be True, False or "gaussian", got {init_lora_weights!r}')
        weight = base_weight(base)
        self.out_features, self.in_features = weight.shape
        self.backend, self.use_rslora = backend, use_rslora
        self.base_layer = base
        device, dtype = weight.device, adapter_dtype or weight.dtype
        name = self.adapter
        self.lora_variant: dict[str, Any] = {}
        self.r, self.lora_alpha = {name: r}, {name: lora_alpha}
        self.scaling = {name: lora_alpha / (math.sqrt(r) if use_rslora else r)}
        self.lora_dropout = nn.ModuleDict({name: nn.Dropout(lora_dropout) if lora_dropout else nn.Identity()})
        self.lora_A = nn.ModuleDict({name: nn.Linear(self.in_features, r, bias=False, device=device, dtype=dtype)})
        self.lora_B = nn.ModuleDict({name: nn.Linear(r, self.out_features, bias=False, device=device, dtype=dtype)})
        self.reset_lora_parameters(init_lora_weights)

    def reset_lora_parameters(self, init_lora_weights: bool | str = True) -> None:
        """PEFT's starts: True (A Kaiming-uniform, B zero), "gaussian" (A normal / r, B zero), False (both random)."""
        lora_a: Any = self.lora_A[self.adapter].weight
        lora_b: Any = self.lora_B[self.adapter].weight
        if init_lora_weights == "gaussian":
            nn.init.normal_(lora_a, std=1 / self.r[self.adapter])
        else:
            nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
        if init_lora_weights is False:
            nn.init.kaiming_uniform_(lora_b, a=math.sqrt(5))
        else:
            nn.init.zeros_(lora_b)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y (..., N) of x (..., K)."""
        return adapter_forward(self, x, self.adapter, base_weight(self.base_layer), self.backend)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        *,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        quant_type: str | None = "nf4",
        blocksize: int = 64,
        nested: bool = True,
        backend: str = "auto",
        adapter_dtype: torch.dtype | None = None,
    ) -> FastLoRALinear:
        """Put an adapter on a layer. ``bnb.nn.Linear4bit`` and `NF4Linear` keep their bytes, shared, not copied.

        An ``nn.Linear`` is quantized to ``quant_type``, or shared as it is with ``quant_type=None``. The layer is
        frozen. Raises TypeError for any other layer.
        """
        if not isinstance(linear, (nn.Linear, NF4Linear)):
            raise TypeError(f"expected nn.Linear, bnb.nn.Linear4bit or NF4Linear, got {type(linear).__name__}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        base: nn.Module = linear
        if isinstance(base_weight(linear), torch.Tensor) and quant_type is not None:
            base = _quantized(linear, quant_type, blocksize, nested)
        layer._build(
            base.requires_grad_(False),
            r,
            lora_alpha,
            lora_dropout,
            use_rslora,
            init_lora_weights,
            backend,
            adapter_dtype,
        )
        return layer.train(linear.training)

    @classmethod
    def from_peft(cls, peft_layer: Any, adapter: str | None = None, backend: str = "auto") -> FastLoRALinear:
        """The standalone form of a PEFT LoRA layer: the same base layer and the same parameters, shared.

        ``adapter`` names which adapter to take (default: the only active one). Raises ValueError when it is not plain
        LoRA (DoRA and other variants, a bias on lora_B, merged weights).
        """
        if adapter is None:
            active = [name for name in peft_layer.active_adapters if name in peft_layer.lora_A]
            if len(active) != 1:
                raise ValueError(f"name the adapter to take: the active ones are {active}")
            adapter = active[0]
        if adapter not in peft_layer.lora_A:
            raise ValueError(f"no adapter {adapter!r} on this layer; it has {sorted(peft_layer.lora_A)}")
        if adapter in peft_layer.lora_variant or peft_layer.lora_bias[adapter]:
            raise ValueError(f"adapter {adapter!r} is not plain LoRA")
        if peft_layer.merged:
            raise ValueError("unmerge the adapters first")
        if getattr(peft_layer, "fan_in_fan_out", False):
            raise ValueError("a base layer that stores its weight as (in_features, out_features) is not supported")
        layer = cls.from_linear(
            peft_layer.base_layer,
            peft_layer.r[adapter],
            peft_layer.lora_alpha[adapter],
            getattr(peft_layer.lora_dropout[adapter], "p", 0.0),
            use_rslora=peft_layer.use_rslora[adapter],
            quant_type=None,
            backend=backend,
        )
        layer.lora_A[cls.adapter], layer.lora_B[cls.adapter] = peft_layer.lora_A[adapter], peft_layer.lora_B[adapter]
        layer.scaling[cls.adapter] = peft_layer.scaling[adapter]
        return layer.train(peft_layer.training)

    def to_peft(self) -> Any:
        """A PEFT LoRA layer over the same base layer and parameters. A 4-bit base becomes bitsandbytes' ``Linear4bit``.

        Raises ImportError without PEFT, or without bitsandbytes for a 4-bit base, and ValueError where a variant of
        LoRA computes the adapter.
        """
        from peft import LoraConfig
        from peft.tuners import lora

        base, name = self.base_layer, self.adapter
        if name in self.lora_variant:
            kind = type(self.lora_variant[name]).__name__
            raise ValueError(f"the adapter is a {kind}, not plain LoRA: export or truncate it first")
        if isinstance(base, NF4Linear):
            base = to_linear4bit(base)
        kind = lora.Linear if isinstance(base_weight(base), torch.Tensor) else lora.Linear4bit
        r, alpha = self.r[name], self.lora_alpha[name]
        dropout = getattr(self.lora_dropout[name], "p", 0.0)
        config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, use_rslora=self.use_rslora)
        layer = kind(base, name, config=config, r=r, lora_alpha=alpha)
        layer.lora_A[name], layer.lora_B[name] = self.lora_A[name], self.lora_B[name]
        layer.scaling[name] = self.scaling[name]
        return layer.train(self.training)

    def extra_repr(self) -> str:
        name = self.adapter
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r[name]}, "
            f"scaling={self.scaling[name]:g}, backend={self.backend!r}"
        )


def _quantized(linear: nn.Module, quant_type: str, blocksize: int, nested: bool) -> NF4Linear:
    w: Any = linear.weight
    bias: Any = linear.bias
    if w.is_meta:
        empty = NF4Weight.empty(
            tuple(w.shape), blocksize=blocksize, quant_type=quant_type, nested=nested, dtype=w.dtype, device=w.device
        )
        return NF4Linear(empty, bias)
    return NF4Linear(NF4Weight.quantize(w, blocksize=blocksize, quant_type=quant_type, nested=nested), bias)


def to_linear4bit(base: NF4Linear) -> nn.Module:
    import bitsandbytes as bnb

    linear = bnb.nn.Linear4bit(
        base.in_features,
        base.out_features,
        bias=base.bias is not None,
        compute_dtype=base.dtype,
        compress_statistics=base.nf4.nested,
        quant_type=base.quant_type,
        device="meta",
    )
    linear.weight = base.nf4.to_bitsandbytes()
    linear.weight.module = linear
    linear.quant_state = linear.weight.quant_state
    linear.bias = base.bias
    # Its fast path for evaluation rewrites the packed bytes, which this layer shares.
    linear.support_avx512bf16_for_cpu = False
    return linear
