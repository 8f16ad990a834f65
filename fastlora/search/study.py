"""The search: it alone writes to the study, hands trials to worker processes and hears of their progress."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fastlora.search import results, worker
from fastlora.search.space import Choices, Range, SearchConfig, default_space, start
from fastlora.training import checkpoints, data, durable, tasks
from fastlora.training import model as models
from fastlora.training.config import TrainConfig
from fastlora.training.errors import Interrupted, UserError, disk_errors, require

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import Trial

NAME = "fastlora"
FAILURES = 3
"""Trials that may fail before one has succeeded."""
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a search found."""

    folder: Path
    rows: list[dict[str, Any]]
    """One a trial, see `results.rows`."""
    best: dict[str, Any]
    """The row of the best trial."""
    held_out: dict[str, dict[str, float]]
    """``default`` and ``best``: what each has on data that no trial saw. Empty where it was not measured."""
    config: Path
    """The configuration with the best settings, for ``fastlora train``."""
    files: list[Path]


def search(
    config: TrainConfig,
    settings: SearchConfig,
    folder: Path,
    *,
    jobs: int = 1,
    final: bool = True,
    say: Say = print,
    progress: Callable[[int, int, str], None] | None = None,
) -> Outcome:
    """Runs the trials that are missing in ``folder`` and writes what was found there.

    jobs: trials at a time, each in a process of its own. final: train the settings of ``config`` and the best ones once
    more, and evaluate both on data that no trial saw: what ``config`` evaluates on. say: gets a line for each trial.
    progress: gets trials that are done, all trials, and the best value so far.

    Raises UserError for inputs that cannot work, for a folder of another search, and where no trial succeeds;
    Interrupted after Ctrl-C, with everything finished kept.
    """
    require("optuna", "search")
    require("sqlalchemy", "search")

    checkpoints.make_writable(folder, "output_dir")
    source = models.find(config.model)
    skeleton = models.skeleton(source, tasks.TASKS[config.task].auto_class)
    space = settings.space or default_space(config, skeleton)
    with _alone(folder), disk_errors(folder):
        _check_same(folder, config, settings, space)
        parts = _split(config, settings, folder)
        study = _open(folder, settings, jobs)
        runner = _Runner(study, config, settings, space, parts, folder, jobs, say, progress or (lambda *_: None))
        try:
            runner.run()
            held_out = runner.compare() if final and results.finished(study) else {}
        except KeyboardInterrupt:
            results.write(study, settings, folder, plots=False)
            done = len(results.finished(study))
            raise Interrupted(
                f"interrupted: {done} of {settings.trials} trials are kept in {folder}; the same command goes on"
            ) from None
        finally:
            runner.close()
        return _outcome(study, config, settings, folder, held_out)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps a second search out of ``folder``: what runs there would look to it like what a crash left."""
    try:
        import fcntl
    except ImportError:  # not on this system
        yield
        return
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"output_dir: another search runs in {folder}: wait, or name another folder") from None
        yield


def _check_same(folder: Path, config: TrainConfig, settings: SearchConfig, space: dict[str, Choices | Range]) -> None:
    """Raises UserError when the trials in ``folder`` are of another search than this one."""
    path = folder / "search.json"
    free = {"output_dir", "overwrite", "resume", "tensorboard"}
    now = {
        **config.model_dump(mode="json", exclude=free),
        **{f"search.{key}": value for key, value in settings.model_dump(exclude={"trials", "space"}).items()},
        "search.space": {name: dimension.model_dump() for name, dimension in space.items()},
    }
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"cannot read {path}: remove the folder, or name another output_dir") from error
        changed = [key for key in now if before.get(key) != now[key]]
        if changed:
            raise UserError(
                f"output_dir: {folder} holds another search, in which {', '.join(changed)} was different: "
                "set it back, or name another --output-dir"
            )
    durable.write_text(path, json.dumps(now, indent=1))


def _split(config: TrainConfig, settings: SearchConfig, folder: Path) -> dict[str, str]:
    """Files of what trials train on, of what they are judged by, and of what is kept for the end."""
    files = {name: folder / "data" / f"{name}.jsonl" for name in ("train", "validation", "test")}
    if not all(path.is_file() for path in files.values()):
        train, test = data.read_splits(config)
        if test is None:
            raise UserError("eval_fraction: a search needs data to evaluate on: set eval_fraction or eval_data")
        train = _first(train, config.max_samples)
        held_out = max(1, round(settings.validation * len(train)))
        if held_out >= len(train):
            raise UserError(f"data: {len(train)} example is too few to hold some out: add examples")
        parts = train.train_test_split(test_size=held_out, seed=config.seed)
        rows = {"train": parts["train"], "validation": parts["test"], "test": _first(test, config.max_eval_samples)}
        files["train"].parent.mkdir(exist_ok=True)
        for name, path in files.items():
            with durable.replacing(path) as part:
                rows[name].to_json(str(part), force_ascii=False)
    return {name: str(path) for name, path in files.items()}


def _first(rows: Any, limit: int | None) -> Any:
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def _open(folder: Path, settings: SearchConfig, jobs: int) -> Study:
    """The study of ``folder``, new or with the trials of earlier calls. Those that a crash cut short are repeated."""
    import optuna
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    path = folder / "study.db"
    try:
        storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
        study = optuna.create_study(study_name=NAME, storage=storage, direction=settings.direction, load_if_exists=True)
        before = study.get_trials(deepcopy=False)
    except Exception as error:
        raise UserError(
            f"output_dir: cannot read {path} ({type(error).__name__}): it is damaged; remove it, or name another folder"
        ) from error
    # A seed alone would draw the settings of the first call again.
    study.sampler = optuna.samplers.TPESampler(
        seed=settings.seed + len(before), n_startup_trials=settings.startup, constant_liar=jobs > 1
    )
    pruner = optuna.pruners.MedianPruner(n_startup_trials=settings.startup)
    study.pruner = pruner if settings.prune else optuna.pruners.NopPruner()
    for trial in before:
        if trial.state == TrialState.RUNNING:
            _give_up(study, trial.number, trial.params)
    return study


def _give_up(study: Study, number: int, params: dict[str, Any]) -> None:
    """Ends a trial that its search did not finish, and asks for another with its settings."""
    from optuna.trial import TrialState

    trial = next(trial for trial in study.get_trials(deepcopy=False) if trial.number == number)
    study._storage.set_trial_user_attr(trial._trial_id, results.LOST, True)
    study.tell(number, state=TrialState.FAIL)
    if params:
        study.enqueue_trial(params)


@dataclasses.dataclass
class _Worker:
    """A process and what it is busy with."""

    process: Any
    connection: Connection
    trial: Trial | None = None
    began: float = 0.0


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """Ctrl-C is for the search, which ends its processes: one that starts now takes no notice.

    It starts with the signal blocked, as this thread has it. What comes meanwhile reaches the search afterwards.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if os.name == "posix":  # it starts with the first process, and unblocks the signal when it has
        resource_tracker.ensure_running()
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    mask = getattr(signal, "pthread_sigmask", None)  # not on Windows
    blocked = mask(signal.SIG_BLOCK, {signal.SIGINT}) if mask else set()
    try:
        yield
    finally:
        if mask:
            mask(signal.SIG_SETMASK, blocked)
        signal.signal(signal.SIGINT, before)
        if came and callable(before):
            before(signal.SIGINT, None)


class _Runner:
    """Trials and the processes that train them."""

    def __init__(
        self,
        study: Study,
        config: TrainConfig,
        settings: SearchConfig,
        space: dict[str, Choices | Range],
        parts: dict[str, str],
        folder: Path,
        jobs: int,
        say: Say,
        progress: Callable[[int, int, str], None],
    ) -> None:
        self.study, self.config, self.settings, self.parts, self.folder = study, config, settings, parts, folder
        self.distributions = {name: dimension.distribution() for name, dimension in space.items()}
        self.start = start(config, space)
        self.jobs, self.say, self.progress = jobs, say, progress
        self.workers: list[_Worker] = []
        self.started = 0

    # --- processes

    def _new_worker(self) -> _Worker:
        import torch

        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        gpus = torch.cuda.device_count() if self.config.device != "cpu" else 0
        gpu = self.started % gpus if gpus > 1 else None
        threads = max(1, torch.get_num_threads() // self.jobs)
        process = context.Process(target=worker.main, args=(there, threads, gpu), daemon=True)
        with _no_interrupt():
            process.start()
        there.close()
        self.started += 1
        return _Worker(process, here)

    def close(self) -> None:
        """End all processes; what they were busy with is to be repeated."""
        for each in self.workers:
            if each.trial is not None:
                with contextlib.suppress(Exception):
                    _give_up(self.study, each.trial.number, each.trial.params)
                each.trial = None
            else:
                with contextlib.suppress(OSError):
                    each.connection.send(None)
                    each.process.join(10)
            each.process.kill()  # it has nothing that is not in its files
            each.process.join()
            each.connection.close()
        self.workers.clear()

    def _values(self, params: dict[str, Any], name: str, evaluation: str) -> dict[str, Any]:
        """A configuration of a trial, as `fastlora.training.config.load` takes it."""
        given = self.config.model_dump(mode="json", exclude_unset=True)
        return given | {
            **params,
            "data": self.parts["train"],
            "eval_data": self.parts[evaluation],
            "split": "train",
            "eval_split": None,
            "data_config": None,
            "max_samples": None,
            "max_eval_samples": None,
            "output_dir": str(self.folder / name),
            "overwrite": True,
            "resume": False,
            "tensorboard": False,
            "save_steps": 10**9,
        }

    # --- trials

    def run(self) -> None:
        """Run what is missing."""
        from optuna.trial import TrialState

        if not self.study.get_trials(deepcopy=False) and self.start:
            self.study.enqueue_trial(self.start)  # what the search has to beat
        self._report()
        while True:
            running = [each for each in self.workers if each.trial is not None]
            counted = len(results.counted(self.study))
            idle = [each for each in self.workers if each.trial is None]
            while counted + len(running) < self.settings.trials and len(running) < self.jobs:
                if idle:
                    each = idle.pop()
                else:
                    each = self._new_worker()
                    self.workers.append(each)
                self._begin(each)
                running.append(each)
            if not running:
                return
            for ready in wait([each.connection for each in running]):
                self._hear(next(each for each in running if each.connection is ready))
            failed = [trial for trial in results.counted(self.study) if trial.state == TrialState.FAIL]
            if len(failed) >= FAILURES and not results.finished(self.study):
                raise UserError(f"the first {len(failed)} trials failed: {failed[0].user_attrs.get('message')}")

    def _begin(self, each: _Worker) -> None:
        each.trial = self.study.ask(self.distributions)
        each.began = time.monotonic()
        values = self._values(each.trial.params, f"trials/{each.trial.number:04d}", "validation")
        each.connection.send((values, self.settings.evaluations))

    def _hear(self, each: _Worker) -> None:
        from optuna.trial import TrialState

        trial = each.trial
        assert trial is not None
        try:
            kind, *rest = each.connection.recv()
        except (EOFError, OSError):
            each.process.join()
            code = each.process.exitcode
            self.workers.remove(each)
            self._end(each, trial, TrialState.FAIL, message=f"its process ended with exit code {code}")
            return
        if kind == "evaluated":
            number, metrics = rest
            trial.report(metrics[self.settings.metric], number)
            each.connection.send(self.settings.prune and trial.should_prune())
        elif kind == "done":
            value = rest[0][self.settings.metric]
            if not math.isfinite(value):
                self._end(each, trial, TrialState.FAIL, message=f"its {self.settings.metric} is {value}")
                return
            trial.set_user_attr(results.LAST, rest[0])
            self._end(each, trial, TrialState.COMPLETE, value=value)
        elif kind == "pruned":
            self._end(each, trial, TrialState.PRUNED)
        else:
            self._end(each, trial, TrialState.FAIL, message=rest[0])

    def _end(self, each: _Worker, trial: Trial, state: Any, *, value: float | None = None, message: str = "") -> None:
        if message:
            trial.set_user_attr("message", message)
        each.trial = None
        self.study.tell(trial, value, state)
        seconds = time.monotonic() - each.began
        params = "  ".join(f"{name} {results.short(given)}" for name, given in trial.params.items())
        what = {"PRUNED": "stopped", "FAIL": "failed"}.get(state.name) or results.short(value)
        self.say(f"trial {trial.number}  {what}  {params}  ({seconds:.0f} s){'  ' + message if message else ''}")
        self._report()

    def _report(self) -> None:
        best = results.best(self.study)
        text = "" if best is None else f"best {self.settings.metric} {results.short(best.value)}, trial {best.number}"
        self.progress(len(results.counted(self.study)), self.settings.trials, text)

    # --- the end

    def compare(self) -> dict[str, dict[str, float]]:
        """What the settings of the configuration and the best ones reach on the data that no trial saw."""
        path = self.folder / "held_out.json"
        best = results.best(self.study)
        assert best is not None
        key = {"trial": best.number, "params": best.params}
        if path.is_file():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept.pop("of", None) == key:
                return dict(kept)
        found = {}
        for name, params in (("default", {}), ("best", best.params)):
            self.say(f"{name} settings on held-out data ...")
            try:
                found[name] = self._once(self._values(params, name, "test"))
            except UserError as error:  # the trials were what the search is for
                self.say(f"{name} settings failed: {error}")
        if len(found) == 2:
            durable.write_text(path, json.dumps({"of": key, **found}, indent=1))
        return found

    def _once(self, values: dict[str, Any]) -> dict[str, float]:
        """Train one configuration to its end."""
        if not self.workers:
            self.workers.append(self._new_worker())
        connection = self.workers[0].connection
        connection.send((values, 1))
        while True:
            try:
                kind, *rest = connection.recv()
            except (EOFError, OSError):
                self.workers.pop(0).process.join()
                raise UserError(f"the process that trained {values['output_dir']} ended: see its log.txt") from None
            if kind == "evaluated":
                connection.send(False)
            elif kind == "done":
                return dict(rest[0])
            else:
                raise UserError(f"{values['output_dir']}: {rest[0]}")


def _outcome(
    study: Study, config: TrainConfig, settings: SearchConfig, folder: Path, held_out: dict[str, dict[str, float]]
) -> Outcome:
    best = results.best(study)
    if best is None:
        results.write(study, settings, folder, plots=False)
        reasons = [trial.user_attrs["message"] for trial in results.counted(study) if "message" in trial.user_attrs]
        if reasons:
            raise UserError(f"no trial of {folder} was finished, and {len(reasons)} failed: {reasons[0]}")
        raise UserError(f"no trial of {folder} was finished: raise search.trials, or set search.prune false")
    files = results.write(study, settings, folder, held_out)
    path = folder / "best.yaml"
    chosen = TrainConfig.model_validate(config.model_dump(exclude_unset=True) | best.params)
    head = f"# The best of {len(results.counted(study))} trials, number {best.number}: fastlora train {path}\n"
    written = yaml.safe_dump(
        chosen.model_dump(mode="json", include=config.model_fields_set | set(best.params) | {"output_dir"}),
        sort_keys=False,
        allow_unicode=True,
    )
    durable.write_text(path, head + written)
    rows = results.rows(study, settings)
    row = next(row for row in rows if row["trial"] == best.number)
    return Outcome(folder, rows, row, held_out, path, [path, *files])
