"""Before and after, side by side."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import tiny
from rich.console import Console

from fastlora.training.errors import UserError
from fastlora.training.generate import Comparison, Sampling, generate, table

PROMPTS = [tiny.LINES[0][:12], "the sky is"]


def run(trained: Any, **values: Any) -> list[Comparison]:
    sampling = Sampling(**{"max_new_tokens": 8, **values.pop("sampling", {})})
    return generate(trained.output_dir, PROMPTS, sampling=sampling, device="cpu", **values)


def test_before_and_after_differ_and_repeat(trained: Any) -> None:
    one, two = run(trained, chat=False), run(trained, chat=False)
    assert one == two
    assert [c.prompt for c in one] == PROMPTS
    assert all(c.before != c.after for c in one)


def test_before_is_the_base_model(trained: Any) -> None:
    assert [c.before for c in run(trained, backend="peft")] == [c.before for c in run(trained)]


def test_seed_decides_the_samples(trained: Any) -> None:
    hot = {"temperature": 1.5, "top_k": 50, "top_p": 0.95}
    one, two = (run(trained, sampling={**hot, "seed": 1}) for _ in range(2))
    assert one == two != run(trained, sampling={**hot, "seed": 2})


def test_table_has_the_texts_as_they_are() -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(table([Comparison("[p]", "[red]b[/red]", "[/nothing] a")]))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(part in text for part in ("before", "after", "[p]", "[red]b[/red]", "[/nothing] a"))


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 2.0}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
    ],
)
def test_sampling_out_of_range(values: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        Sampling(**values)


def test_another_model_is_refused(trained: Any, other_model: Path) -> None:
    with pytest.raises(UserError, match="is for another model"):
        run(trained, model=str(other_model))


def test_no_prompt(trained: Any) -> None:
    with pytest.raises(UserError, match="--prompt"):
        generate(trained.output_dir, [])
