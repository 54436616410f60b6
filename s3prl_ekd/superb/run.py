"""Run a plan (:mod:`.plan`) through ``run_downstream.py``.

Finished runs are skipped. An interrupted run resumes from its last checkpoint and ends as it would
have without the interruption (:mod:`..downstream.resume`). A run that fails does not stop the rest.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..downstream.feature_cache import CacheCounts, read_counts
from ..errors import CheckpointError, SetupError
from ..files.atomic import make_folder, write_text
from ..files.formats import NewerFormatError, check_format_version
from ..files.run_checkpoints import newest_checkpoint, read_checkpoint
from ..hidden_states.feature_store import folder_size
from ..system.jobs import CommandRunner
from ..system.lock import FolderLock
from .plan import CLEAN, PlannedRun, noise_digest
from .results import RECORD, check_paths

logger = logging.getLogger(__name__)

FORMAT = 1
PARENT_LOCK = ".superb.lock"  # held by `superb`; its child processes take FolderLock's default lock
ORPHAN_TIMEOUT = 10.0  # seconds for a child process to exit after its command was killed


def finish_feature_cache(runs: Sequence[PlannedRun], keep: bool) -> None:
    """Log the cache hits of all runs of one upstream, and remove its cache unless ``keep``."""
    first = runs[0]
    if first.features is None or not Path(first.features.folder).is_dir():
        return  # no cache, or removed by an earlier command
    folder = Path(first.features.folder)
    total = CacheCounts()
    for run in runs:
        log = run.folder / "log.txt"
        if log.is_file():
            total += read_counts(log.read_text(encoding="utf-8", errors="replace"))
    size = folder_size(folder)
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: caches of other upstreams
            folder.parent.rmdir()
    logger.info(
        "%s: feature cache: %d hits, %d misses, %d random excerpts (not cached); %s: %.0f MB%s",
        first.upstream.name,
        total.hits,
        total.misses,
        total.excerpts,
        folder,
        size / 1e6,
        "" if keep else ", removed",
    )


def job_environment(slot: int, jobs: int) -> dict[str, str]:
    """Environment of the commands in a job's slot. With several jobs, each gets one GPU and, unless
    ``OMP_NUM_THREADS`` is set, an equal share of the cores."""
    if jobs == 1:
        return dict(os.environ)
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    import torch

    count = torch.cuda.device_count()
    if count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(i) for i in range(count)]
        environment["CUDA_VISIBLE_DEVICES"] = names[slot % len(names)]
    return environment


def run_command(
    folder: Path, argv: list[str], environment: Mapping[str, str], processes: CommandRunner
) -> None:
    """Run one command and append its output to ``folder/log.txt``.

    Raises:
        SetupError: the command failed; the message is its error, or the last line it printed.
    """
    path = folder / "log.txt"
    offset = path.stat().st_size if path.exists() else 0
    code = processes.call(argv, path, environment)
    if not code:
        return
    lines = path.read_bytes()[offset:].decode("utf-8", "replace").strip().splitlines()
    # not always the last line: a progress bar may print after it when it is closed
    prefixes = ("error: ", "stopped by ")
    message = next((line for line in reversed(lines) if line.startswith(prefixes)), None)
    reason = message.removeprefix("error: ") if message else (lines[-1] if lines else "no output")
    if code < 0 and not message:
        reason = f"killed by {_signal_name(-code)}; last line of output: {reason}"
    raise SetupError(f"{folder}: {reason} (see {path})")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def read_record(folder: Path) -> dict[str, Any] | None:
    """Read a run's ``superb.json``; None if there is no such file.

    Raises:
        SetupError: the file is damaged, or of a newer format.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        check_format_version(record["format"], FORMAT, f"the record {path}", SetupError)
        if record["format"] != FORMAT:
            raise ValueError
        check_paths(record)
        return record
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise SetupError(f"cannot read {path}: damaged; remove {folder} to run it again") from None


def check_records(runs: Sequence[PlannedRun]) -> None:
    """Check that existing records belong to these runs, so that no other run is overwritten.

    Raises:
        SetupError: a folder contains another run; a condition was tested with other noises; or runs
            of the upstream, on any task, used another model (a report would show both as one).
    """
    for run in runs:
        record = read_record(run.folder)
        if record is None:
            continue
        if record["digest"] != run.digest:
            raise SetupError(
                f"{run.folder} contains a run with a different checkpoint, recipe, setting or "
                "corpus; move it away, rename the upstream (NAME=CHECKPOINT), or choose another -o"
                f"{_features_hint(run, record)}"
            )
        for condition, digest in record.get("noises", {}).items():
            if condition in run.noises and digest != noise_digest(run.noises[condition][0]):
                raise SetupError(
                    f"{run.folder}: condition {condition} was tested with different noises than "
                    f"those in {run.noises[condition][0]}; rename that folder"
                )
    for upstream, root in {run.upstream: run.root for run in runs}.items():
        for folder in recorded_folders(root, upstream.name):
            model = (read_record(folder) or {}).get("model")
            if model is not None and model != upstream.digest:
                raise SetupError(
                    f"{folder} contains a run of a different model than the current "
                    f"{upstream.name}; move {root / upstream.name} away, rename the upstream "
                    "(NAME=CHECKPOINT), or choose another -o"
                )


def recorded_folders(root: Path, name: str) -> list[Path]:
    """Folders of an upstream's runs on all tasks that have a record."""
    return sorted(path.parent for path in (root / name).glob(f"*/*/{RECORD}"))


def _features_hint(run: PlannedRun, record: Mapping[str, Any]) -> str:
    alone = record.get("features_alone", False)
    if alone == (run.features is not None):
        return ""
    return f" (that run was {'with' if alone else 'without'} --cache-features)"


def is_finished(run: PlannedRun) -> bool:
    """Whether a run is trained, and tested under all of its conditions."""
    record = read_record(run.folder)
    return bool(record and record["finished"] and run.conditions.keys() <= record["tested"].keys())


def commands(run: PlannedRun, gpus: int = 1) -> list[list[str]]:
    """The commands of a run, to type or to submit to a cluster's queue."""
    best = run.task.best
    tests = [run.test(best, condition).command() for condition in run.conditions]
    return [_training(run, gpus), *tests]


def _training(run: PlannedRun, gpus: int) -> list[str]:
    argv = run.training().command()
    if gpus == 1:
        return argv
    return ["torchrun", "--standalone", f"--nproc_per_node={gpus}", "-m", "s3prl_ekd", *argv]


def run_plan(
    runs: Sequence[PlannedRun],
    jobs: int = 1,
    gpus: int = 1,
    *,
    keep_features: bool = False,
    processes: CommandRunner | None = None,
) -> list[tuple[PlannedRun, str]]:
    """Run the unfinished runs, ``jobs`` in parallel.

    Args:
        keep_features: do not remove the feature caches.
        processes: starts the commands; None: a new process for each.

    Returns:
        (run, error message) of each run that failed.
    """
    pending = [run for run in runs if not is_finished(run)]
    if len(pending) < len(runs):
        logger.info("skipping %d of %d runs: already finished", len(runs) - len(pending), len(runs))
    failed: list[tuple[PlannedRun, str]] = []
    processes = processes or CommandRunner()
    pending_counts = Counter(run.upstream.name for run in pending)
    finished_upstreams: set[str] = set()
    slots: queue.Queue[int] = queue.Queue()
    for slot in range(jobs):
        slots.put(slot)
    with (
        tqdm(total=len(runs), initial=len(runs) - len(pending), unit=" runs", desc="superb") as bar,
        ThreadPoolExecutor(jobs) as pool,
    ):
        futures = {
            pool.submit(_run_in_slot, run, slots, jobs, gpus, processes): run for run in pending
        }
        try:
            for future in as_completed(futures):
                run = futures[future]
                bar.update()
                bar.set_postfix_str(f"{run.upstream.name}/{run.task.name}/{run.name}")
                try:
                    future.result()
                    pending_counts[run.upstream.name] -= 1
                    if not pending_counts[run.upstream.name]:  # stays above 0 if a run fails
                        finish_feature_cache(_runs_of(run.upstream.name, runs), keep_features)
                        finished_upstreams.add(run.upstream.name)
                except SetupError as error:
                    failed.append((run, str(error)))
                    tqdm.write(f"failed: {error}")
        except BaseException:
            for future in futures:
                future.cancel()
            processes.stop()
            raise
    if not keep_features:  # caches left by a command that was killed after its last run
        for name in dict.fromkeys(run.upstream.name for run in runs):
            own_runs = _runs_of(name, runs)
            if name not in finished_upstreams and all(is_finished(run) for run in own_runs):
                finish_feature_cache(own_runs, keep_features)
    return failed


def _runs_of(upstream: str, runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    return [run for run in runs if run.upstream.name == upstream]


def _run_in_slot(
    run: PlannedRun, slots: queue.Queue, jobs: int, gpus: int, processes: CommandRunner
) -> None:
    slot = slots.get()
    try:
        environment = job_environment(slot, jobs)
        make_folder(run.folder, SetupError)
        # The first lock excludes a second `superb`. The second one is held by training and tests:
        # wait for a child process whose `superb` was killed.
        with FolderLock(run.folder, PARENT_LOCK):
            with FolderLock(run.folder, wait=ORPHAN_TIMEOUT):
                pass
            _train_and_test(
                run, lambda argv: run_command(run.folder, argv, environment, processes), gpus
            )
    finally:
        slots.put(slot)


def _train_and_test(run: PlannedRun, call: Callable[[list[str]], None], gpus: int) -> None:
    record = read_record(run.folder) or {
        "format": FORMAT,
        "upstream": run.upstream.name,
        "hub": run.upstream.hub,
        "checkpoint": run.upstream.checkpoint,
        "task": run.task.name,
        "lr": run.lr,
        "seed": run.seed,
        "fold": run.fold,
        "steps": run.recipe.config["runner"]["total_steps"],
        "recipe": run.recipe.path,
        "split": run.task.split,
        "digest": run.digest,
        "dev": None,
        "tested": {},
        "seconds": 0.0,
        "finished": False,
        "features_alone": run.features is not None,
        "model": run.upstream.digest,
        "noises": {},
    }
    if record["upstream"] != run.upstream.name:
        logger.info("%s: upstream renamed, it was %s", run.folder, record["upstream"])
        record["upstream"] = run.upstream.name
    _write(run.folder, record)
    start = time.monotonic()
    if record["dev"] is None:
        call(_training(run, gpus))
        checkpoint, value = best_checkpoint(run)
        record["dev"] = {"metric": run.task.metric, "value": value, "checkpoint": checkpoint}
        record["seconds"] += time.monotonic() - start
        _write(run.folder, record)
    for condition, folder in run.conditions.items():
        if condition in record["tested"]:
            continue
        call(run.test(record["dev"]["checkpoint"], condition).command())
        for name in run.task.files(run.fold):
            if not (run.folder / folder / name).is_file():
                raise SetupError(f"the evaluation wrote no {run.folder / folder / name}")
        record["tested"][condition] = folder
        if condition in run.noises:
            digest = noise_digest(run.noises[condition][0])
            record.setdefault("noises", {})[condition] = digest
        _write(run.folder, record)
    record["finished"] = CLEAN in record["tested"]
    _write(run.folder, record)


def best_checkpoint(run: PlannedRun) -> tuple[str, float]:
    """The best checkpoint on dev, as s3prl saved it, and its metric in per cent.

    s3prl saves none while the metric is at its worst (WER of 100 % or more, accuracy 0 %); then the
    last checkpoint is used.

    Raises:
        SetupError: there is no checkpoint, or it is damaged.
    """
    best = run.folder / run.task.best
    if not best.is_file():
        last = newest_checkpoint(run.folder)
        if last is None:
            raise SetupError(f"the training saved no checkpoint in {run.folder}")
        return last.name, run.task.worst
    try:
        score = read_checkpoint(best)["Downstream"]["best_score"]
    except NewerFormatError as error:
        raise SetupError(str(error)) from None
    except (CheckpointError, KeyError, TypeError):
        raise SetupError(f"{best} is damaged; remove {run.folder} to run it again") from None
    return best.name, float(score) * run.task.scale


def _write(folder: Path, record: Mapping[str, Any]) -> None:
    write_text(folder / RECORD, json.dumps(record, indent=1) + "\n")
