"""What a search tries: the section ``search`` of a training configuration."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from fastlora.training.config import TrainConfig, read_yaml
from fastlora.training.errors import UserError, near

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from transformers import PreTrainedModel

FIXED = frozenset(
    {
        *("task", "data", "data_config", "split", "eval_data", "eval_split", "eval_fraction", "max_samples"),
        *("max_eval_samples", "output_dir", "resume", "overwrite", "tensorboard", "save_steps", "save_total_limit"),
        *("device", "eval_steps", "logging_steps", "text_column", "label_column", "messages_column"),
        *("prompt_column", "completion_column"),
    }
)
"""Fields of a configuration that a search cannot change: its trials must stay comparable."""
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "query", "key", "value", "c_attn")
"""Names of the layers of attention in the models of transformers."""
Value = bool | int | float | str


class Choices(BaseModel):
    """One of some values."""

    model_config = ConfigDict(extra="forbid")

    choices: list[Value] = Field(min_length=2)

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.choices)

    def samples(self) -> list[Value]:
        return self.choices


class Range(BaseModel):
    """A number from ``low`` to ``high``, both included; whole where both are whole and ``log`` is not set."""

    model_config = ConfigDict(extra="forbid")

    low: int | float
    high: int | float
    log: bool = False
    """Draw the logarithm evenly."""

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"low must be less than high, not {self.low} and {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs a low above 0, not {self.low}")
        return self

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import FloatDistribution, IntDistribution

        if self.whole:
            return IntDistribution(int(self.low), int(self.high), log=self.log)
        return FloatDistribution(float(self.low), float(self.high), log=self.log)

    def samples(self) -> list[Value]:
        return [self.low, self.high]


def _kind(value: Any) -> str:
    return "Choices" if isinstance(value, Choices) or (isinstance(value, dict) and "choices" in value) else "Range"


Dimension = Annotated[
    Annotated[Choices, Tag("Choices")] | Annotated[Range, Tag("Range")],
    Discriminator(_kind),  # of one kind alone, whose problems are then named
]


class SearchConfig(BaseModel):
    """How to search, and where."""

    model_config = ConfigDict(extra="forbid")

    trials: int = Field(20, ge=1, description="runs, those that are stopped early included")
    metric: Literal["loss", "accuracy", "f1"] = Field("loss", description="of the evaluation: what is to be best")
    evaluations: int = Field(4, ge=1, description="evaluations of a trial; after each it may be stopped")
    prune: bool = Field(True, description="stop a trial that is worse than the median of those before it")
    startup: int = Field(5, ge=1, description="trials before any is stopped, and before settings are more than random")
    validation: float = Field(0.1, gt=0, lt=1, description="share of the training data that the search evaluates on")
    seed: int = Field(42, ge=0, lt=2**32, description="seed of the settings that are tried")
    space: dict[str, Dimension] | None = Field(None, description="settings to try [default: see docs/search.md]")

    @property
    def direction(self) -> Literal["minimize", "maximize"]:
        return "minimize" if self.metric == "loss" else "maximize"


def load(path: Path, trials: int | None = None) -> tuple[TrainConfig, SearchConfig]:
    """The training configuration of a file and its section ``search``, which may be missing.

    Raises UserError, one line, for what is wrong with either.
    """
    values = read_yaml(path)
    section = values.pop("search", None) or {}
    if not isinstance(section, dict):
        raise UserError(f"{path}: search should hold 'key: value' lines, not {section!r}")
    if trials is not None:
        section = {**section, "trials": trials}
    from fastlora.training.config import load as load_training

    config = load_training(path)
    try:
        search = SearchConfig.model_validate(section)
    except ValidationError as error:
        problems = dict.fromkeys(_problem(e) for e in error.errors(include_url=False))
        raise UserError(f"{path}: {'; '.join(problems)}") from error
    if search.metric != "loss" and config.task == "causal-lm":
        raise UserError(f"{path}: search.metric: causal-lm has no {search.metric}: set metric loss")
    for name, dimension in (search.space or {}).items():
        check_dimension(config, name, dimension)
    return config, search


def _problem(error: Any) -> str:
    # pydantic names the kind of a dimension in the place of the error.
    names = [str(part) for part in error["loc"] if part not in ("Choices", "Range")]
    key = ".".join(["search", *names])
    if error["type"] == "extra_forbidden":
        known = [*SearchConfig.model_fields, "choices", "low", "high", "log"]
        return f"unknown key {key}; {near(names[-1], known) or 'see docs/search.md'}"
    if error["type"] == "missing":
        return f"{key} is missing: give choices, or low and high"
    if error["type"] in ("model_type", "model_attributes_type"):
        return f"{key}: give choices, or low and high, not {error['input']!r}"
    return f"{key}: {error['msg'].removeprefix('Value error, ').replace('Input should', 'should')}"


def check_dimension(config: TrainConfig, name: str, dimension: Choices | Range) -> None:
    """Raises UserError for a setting that there is not, that cannot be searched, or that cannot have such a value."""
    if name not in TrainConfig.model_fields:
        raise UserError(
            f"search.space: unknown setting {name!r}; {near(name, TrainConfig.model_fields) or 'see docs/search.md'}"
        )
    if name in FIXED:
        raise UserError(f"search.space: {name} must be the same in all trials: take it out")
    for value in dimension.samples():
        try:
            TrainConfig.model_validate(config.model_dump(exclude_unset=True) | {name: value})
        except ValidationError as error:
            message = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
            message = message.replace("Input should be", "it should be")
            raise UserError(f"search.space: {name} cannot be {value!r}: {message}") from error


def default_space(config: TrainConfig, skeleton: PreTrainedModel) -> dict[str, Choices | Range]:
    """Rank, scale, rate, targets, method and dropout, around what ``config`` has."""
    from fastlora.training.model import linear_shapes

    names = {name.rpartition(".")[2] for name in linear_shapes(skeleton)}
    attention = [name for name in ATTENTION if name in names]
    space: dict[str, Choices | Range] = {
        "r": Choices(choices=_with(config.r, [4, 8, 16, 32])),
        "lora_alpha": Choices(choices=_with(config.lora_alpha, [8.0, 16.0, 32.0, 64.0])),
        "lr": Range(low=config.lr / 10, high=min(1.0, config.lr * 10), log=True),
        "lora_dropout": Choices(choices=_with(config.lora_dropout, [0.0, 0.05, 0.1])),
    }
    if config.method in ("lora", "lora-plus", "dora"):
        space["method"] = Choices(choices=["lora", "lora-plus", "dora"])
    if attention and config.target_modules == "all-linear":
        space["target_modules"] = Choices(choices=["all-linear", ",".join(attention)])
    return space


def _with(value: Any, usual: list[Any]) -> list[Value]:
    return sorted({*usual, value})


def start(config: TrainConfig, space: dict[str, Choices | Range]) -> dict[str, Value]:
    """The values that ``config`` has, for the settings of ``space`` that can have them."""
    found: dict[str, Value] = {}
    for name, dimension in space.items():
        value = getattr(config, name)
        value = ",".join(value) if isinstance(value, list) else value
        if isinstance(dimension, Choices):
            if value in dimension.choices:
                found[name] = value
        elif isinstance(value, int | float) and dimension.low <= value <= dimension.high and math.isfinite(value):
            found[name] = value
    return found
