"""How a trainer writes and reads checkpoints: whole, sealed, of finite weights, without pickles."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import torch

from fastlora.training import checkpoints, durable
from fastlora.training.errors import UserError

STATE = "trainer_state.safetensors"
"""Optimizer, schedule and the scaler of gradients."""


def _generators_file(args: Any) -> str:
    """Each process has generators of its own."""
    return "rng_state.safetensors" if args.world_size <= 1 else f"rng_state_{args.process_index}.safetensors"


class SafeCheckpoints:
    """Mix-in of a Trainer. A checkpoint appears under its name when all of it is on the disk, and has no pickle."""

    _writing: str | None = None

    def _get_output_dir(self: Any, trial: Any) -> str:
        return self._writing or super()._get_output_dir(trial)  # type: ignore[misc]

    def _save_checkpoint(self: Any, model: Any, trial: Any) -> None:
        output_dir = Path(self._get_output_dir(trial))
        self._refuse_broken_weights(output_dir)
        main, name = self.args.should_save, f"checkpoint-{self.state.global_step}"
        part = output_dir / durable.WRITING / name
        if main:
            shutil.rmtree(part.parent, ignore_errors=True)
            part.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self._writing = str(part.parent)
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            self._writing = None
            self.accelerator.wait_for_everyone()
            if main:
                durable.seal(part)
                durable.place(part, output_dir / name)
                best = self.state.best_model_checkpoint
                checkpoints.rotate(output_dir, self.args.save_total_limit, Path(best) if best else None)
        finally:
            self._writing = None
            if main:
                shutil.rmtree(part.parent, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _refuse_broken_weights(self: Any, output_dir: Path) -> None:
        """Raises UserError, in every process, before weights that are no numbers get into a checkpoint."""
        broken = ""
        for name, p in self.model.named_parameters():
            if p.requires_grad and not torch.isfinite(getattr(p, "_local_tensor", p)).all():
                broken = name
                break
        if self.args.world_size > 1:
            flag = torch.tensor(float(bool(broken)), device=self.args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            broken = broken or ("a parameter of another process" if flag.item() else "")
        if broken:
            advice = checkpoints.after_divergence(self.args.learning_rate, output_dir)
            raise UserError(f"{broken} is not finite at step {self.state.global_step}, so it is not saved: {advice}")

    def _save(self: Any, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)  # type: ignore[misc]
        # The trainer's own arguments, as a pickle that nothing reads: config.yaml has them.
        (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)

    def _save_optimizer_and_scheduler(self: Any, output_dir: str) -> None:
        if self.args.should_save:
            scaler = getattr(self.accelerator, "scaler", None)
            tree = {
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.lr_scheduler.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
            }
            durable.save_tree(tree, Path(output_dir) / STATE)

    def _save_scaler(self: Any, output_dir: str) -> None:
        """It is in the file of the optimizer."""

    def _load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        tree = durable.load_tree(Path(checkpoint) / STATE)
        try:
            self.optimizer.load_state_dict(tree["optimizer"])
            self.lr_scheduler.load_state_dict(tree["scheduler"])
            if tree["scaler"] is not None and getattr(self.accelerator, "scaler", None) is not None:
                self.accelerator.scaler.load_state_dict(tree["scaler"])
        except (KeyError, TypeError, ValueError) as error:
            path = Path(checkpoint) / STATE
            raise UserError(f"resume: {path} is of another optimizer ({error}): use another checkpoint") from error

    def _load_scaler(self: Any, checkpoint: str | None) -> None:
        """It came with the optimizer."""

    def _save_rng_state(self: Any, output_dir: str) -> None:
        import numpy

        kind, keys, *rest = numpy.random.get_state()
        states = {
            "python": random.getstate(),
            "numpy": (kind, keys, *rest),
            "cpu": torch.random.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        }
        os.makedirs(output_dir, exist_ok=True)  # another process may come here before the main one
        durable.save_tree(states, Path(output_dir) / _generators_file(self.args))

    def _load_rng_state(self: Any, checkpoint: str | None) -> None:
        import numpy

        if checkpoint is None:
            return
        path = Path(checkpoint) / _generators_file(self.args)
        if not path.is_file():  # the run went on with another number of processes
            return
        states = durable.load_tree(path)
        random.setstate(states["python"])
        kind, keys, *rest = states["numpy"]
        numpy.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
        torch.random.set_rng_state(states["cpu"])
        if states["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"])
