"""A whole step repeats to the bit, at the size of a model: a race in a kernel may take memory that is busy to show."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

for name in ("bitsandbytes", "peft", "transformers"):
    pytest.importorskip(name, reason=f"{name} is missing (extra: bench)")

_STEPS = """
    import sys
    import torch
    from fastlora.bench import models
    from fastlora.bench import train_step as suite

    stack, case = suite.STACKS[sys.argv[1]], suite.Case("llama-3-8b", 2, 4, 2048)
    device = torch.device("cuda")
    torch.use_deterministic_algorithms(True)  # attention's dq, and what is empty is filled with NaN
    model = suite._model(stack, case, device)
    model.train()
    models.restart(model, 0)
    torch.manual_seed(0)
    parameters = dict(models.adapters(model))
    for name, parameter in parameters.items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    (ids,) = models.token_batches(case.config(), case.batch, case.length, device, 0, 1)

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        return {"loss": loss.detach(), **dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()))))}

    first = step()
    assert all(torch.isfinite(value).all() for value in first.values())
    for _ in range(10):
        differ = [name for name, value in step().items() if not torch.equal(value, first[name])]
        assert not differ, differ
"""


@pytest.mark.gpu
@pytest.mark.parametrize("stack", ["fastlora layers", "fastlora blocks", "fastlora blocks + loss"])
def test_steps_give_the_same_bits(stack: str) -> None:
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    command = [sys.executable, "-c", textwrap.dedent(_STEPS), stack]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
