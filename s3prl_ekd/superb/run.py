"""Run a plan (:mod:`.plan`) through s3prl's ``run_downstream.py``.

A child process trains a run and tests it under all conditions, so that torch and s3prl are imported
once. Finished runs are skipped. An interrupted run resumes from its last checkpoint and ends as it
would have without the interruption (:mod:`..downstream.resume`).
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..downstream.feature_cache import CacheCounts, read_counts
from ..downstream.tasks import TASKS
from ..errors import CheckpointError, DataError, SetupError
from ..files import trust
from ..files.atomic import make_folder, write_text
from ..files.config import to_plain_data
from ..files.formats import NewerFormatError
from ..files.run_checkpoints import RECORD, newest_checkpoint, read_checkpoint, run_checkpoints
from ..hidden_states.feature_store import folder_size
from ..request import DownstreamRequest
from ..system.jobs import Jobs
from ..system.lock import FolderLock
from ..system.torchrun import torchrun_command
from .plan import PlannedRun, noise_digest
from .results import (
    CLEAN,
    DevMetric,
    RunRecord,
    read_finished_run,
    read_record,
    select_best_lr,
)

logger = logging.getLogger(__name__)

PARENT_LOCK = ".superb.lock"  # held by `superb`; its child processes take FolderLock's default lock
ORPHAN_TIMEOUT = 10.0  # seconds for a child process to exit after its command was killed


def check_records(runs: Sequence[PlannedRun]) -> None:
    """Check that existing records belong to these runs, so that no other run is overwritten.

    Raises:
        SetupError: a folder contains another run; or runs of the upstream used another model, were
            tested with other noises of the same name or, on a task, used another recipe (a report
            would show both as one).
    """
    for run in runs:
        record = read_record(run.folder)
        if record is None:
            continue
        if record.digest != run.digest:
            hint = ""
            if record.features_alone != (run.features is not None):
                cached = "--cache-features (with --gpus 1)"
                option = cached if record.features_alone else "--no-cache-features"
                hint = f"; if it was the same otherwise, add {option}"
            raise SetupError(
                f"{run.folder} contains a run with a different checkpoint, recipe, setting or "
                f"corpus; move it away, rename the upstream (NAME=CHECKPOINT), or choose another "
                f"-o{hint}"
            )
    recipes = {run.task.name: run.recipe for run in runs}
    recipe_digests = {task: recipe.digest(Path.cwd()) for task, recipe in recipes.items()}
    for run in {run.upstream: run for run in runs}.values():
        upstream, root = run.upstream, run.root
        for folder in recorded_folders(root, upstream.name):
            record = read_record(folder)
            if record is None:
                continue
            for condition in record.noises.keys() & run.noises.keys() & record.tested.keys():
                noises, tested = run.noises[condition][0], folder / record.tested[condition]
                if tested.is_dir() and record.noises[condition] != noise_digest(noises):
                    raise SetupError(
                        f"{tested} is a test with different noises than those in {noises}; rename "
                        "the folder of the noises, or remove that of the test"
                    )
            if record.model not in (None, upstream.digest):
                raise SetupError(
                    f"{folder} contains a run of a different model than the current "
                    f"{upstream.name}; move {root / upstream.name} away, rename the upstream "
                    "(NAME=CHECKPOINT), or choose another -o"
                )
            digests = {record.recipe_digest, recipe_digests.get(record.task)} - {None}
            if record.finished and len(digests) > 1:
                raise SetupError(
                    f"{folder} contains a run of {record.task} with other settings (--override, "
                    "--steps, an edited YAML) or another prepared corpus, which `report` does not "
                    f"average with the new ones; move {folder.parent} away, rename the upstream "
                    "(NAME=CHECKPOINT), or choose another -o"
                )


def recorded_folders(root: Path, name: str) -> list[Path]:
    """Folders of an upstream's runs on all tasks that have a record."""
    return sorted(path.parent for path in (root / name).glob(f"*/*/{RECORD}"))


def chosen_learning_rates(runs: Sequence[PlannedRun]) -> list[str]:
    """A line for each upstream and task that has several learning rates: which one counts."""
    rates: dict[tuple[str, str], set[float]] = {}
    for run in runs:
        if run.lr is not None:
            rates.setdefault((run.upstream.name, run.task.name), set()).add(run.lr)
    finished = [read_finished_run(run.folder) for run in runs]
    best = select_best_lr([run for run in finished if run is not None])
    lines = []
    for (upstream, task), tried in rates.items():
        selection = best.get((upstream, task))
        if len(tried) == 1 or selection is None:
            continue
        dev = TASKS[task].dev.name.upper()
        others = ", ".join(f"{rate:g}" for rate in sorted(tried) if rate != selection.lr)
        line = f"{upstream}, {task}: learning rate {selection.lr:g} ({dev} {selection.dev:.2f} %)"
        line += f" counts, of this one and {others}"
        if selection.lr in (min(tried), max(tried)):
            factor, end = (0.1, "lowest") if selection.lr == min(tried) else (10, "highest")
            line += f"; it is the {end} one, so try --lr {task}={factor * selection.lr:g}, too"
        lines.append(line)
    return lines


def is_finished(run: PlannedRun) -> bool:
    """Whether a run is trained, and tested under all of its conditions."""
    record = read_record(run.folder)
    return bool(
        record
        and record.finished
        and all(_is_tested(run, record, condition) for condition in run.conditions)
    )


def _is_tested(run: PlannedRun, record: RunRecord, condition: str) -> bool:
    """Whether a run is tested under a condition, and the predictions are there."""
    folder = record.tested.get(condition)
    return folder is not None and not _missing_files(run, run.folder / folder)


def commands(run: PlannedRun, gpus: int = 1) -> list[list[str]]:
    """The commands of a run, to type or to submit to a cluster's queue."""
    training = torchrun_command(run.training().command(), gpus)
    if run.task.selection == "dev":
        best = DevMetric(run.task.dev.name, run.task.worst, run.task.best)
        return [training, *(run.test(best, condition).command() for condition in run.conditions)]
    if run.task.selection == "checkpoints":
        runner = run.recipe.config["runner"]
        steps = range(runner["save_step"], runner["total_steps"] + 1, runner["save_step"])
        kept = [f"states-{step}.ckpt" for step in steps][-runner["max_keep"] :]
        tests = [run.checkpoint_test(name, run.folder / Path(name).stem) for name in kept]
        return [training, *(test.command() for test in tests)]
    return [
        run.layer_test(layer, split, run.folder / f"layer{layer}_{split}").command()
        for layer in range(_count_layers(run))
        for split in ("dev", run.task.split)
    ]


def run_plan(
    runs: Sequence[PlannedRun], jobs: int = 1, gpus: int = 1, *, keep_features: bool = False
) -> None:
    """Run the unfinished runs, ``jobs`` in parallel.

    Args:
        keep_features: do not remove the feature caches.

    Raises:
        SetupError: runs failed; the message has the reason of each.
    """
    pending = [run for run in runs if not is_finished(run)]
    if len(pending) < len(runs):
        logger.info("skipping %d of %d runs: already finished", len(runs) - len(pending), len(runs))
    processes = Jobs(jobs)

    def finish(upstream: str) -> None:
        own_runs = [run for run in runs if run.upstream.name == upstream]
        if all(is_finished(run) for run in own_runs):
            finish_feature_cache(own_runs, keep_features)

    if not keep_features:  # caches left by a command that was killed after its last run
        for upstream in {run.upstream.name for run in runs}:
            finish(upstream)
    processes.run_all(
        lambda run, environment: _run(run, gpus, processes, environment),
        pending,
        lambda run: finish(run.upstream.name),
    )


def _run(run: PlannedRun, gpus: int, processes: Jobs, environment: dict[str, str]) -> None:
    make_folder(run.folder, SetupError)
    log = run.folder / "log.txt"
    # The first lock excludes a second `superb`. The second one is held by a training: wait for a
    # child process whose `superb` was killed.
    with FolderLock(run.folder, PARENT_LOCK):
        with FolderLock(run.folder, wait=ORPHAN_TIMEOUT):
            pass
        if gpus > 1 and run.task.trained:

            def call(request: DownstreamRequest) -> None:
                processes.run(torchrun_command(request.command(), gpus), log, environment)

            train(run, call)
        argv = ["superb-job", *trust.trust_argv()]  # launch.superb_job
        processes.run(argv, log, environment, stdin=run.to_json())


def train(run: PlannedRun, call: Callable[[DownstreamRequest], None]) -> RunRecord:
    """Train a run, unless it is trained already or its task has no training.

    Args:
        call: calls s3prl's script.

    Returns:
        The run's record, which is written too. It has the checkpoint with the best dev score, if
        the recipe has a dev set.
    """
    new = run.new_record()
    record = read_record(run.folder) or new
    if record.recipe_digest is None:  # of an old version, and with the digest of this run
        record = replace(record, recipe_digest=new.recipe_digest, folds=new.folds)
    if record.upstream != run.upstream.name:
        logger.info("%s: upstream renamed, it was %s", run.folder, record.upstream)
        record = replace(record, upstream=run.upstream.name)
    _write(run, record)
    if run.task.trained and record.dev is None and not record.seconds:
        start = time.monotonic()
        call(run.training())
        dev = best_checkpoint(run) if run.task.selection == "dev" else None
        record = replace(record, dev=dev, seconds=time.monotonic() - start)
        _write(run, record)
    return record


def _choose(run: PlannedRun, call: Callable[[DownstreamRequest], None]) -> tuple[DevMetric, Path]:
    """Evaluate each checkpoint or layer of a run whose recipe has no training with a dev set.

    Evaluations that are there and complete are not repeated.

    Returns:
        The best one, and the folder of its predictions.
    """
    task = run.task
    requests: list[tuple[DownstreamRequest, Path, dict[str, Any]]] = []
    if task.selection == "checkpoints":
        for name in _checkpoints(run):
            folder = run.folder / Path(name).stem
            requests.append((run.checkpoint_test(name, folder), folder, {"checkpoint": name}))
        if not requests:
            raise SetupError(f"the training saved no checkpoint in {run.folder}")
    elif task.selection == "layers":
        for layer in range(_count_layers(run)):
            folder = run.folder / f"layer{layer}_dev"
            requests.append((run.layer_test(layer, "dev", folder), folder, {"layer": layer}))
    else:
        raise SetupError(f"{run.folder / RECORD} is damaged; remove {run.folder} to run it again")
    results = []
    for request, folder, chosen in requests:
        try:
            value = task.measure(folder, run.fold)[0].value
        except DataError:  # not evaluated, or interrupted while it wrote its predictions
            evaluate(run, request, folder, call)
            value = task.measure(folder, run.fold)[0].value
        logger.info("%s: %s %.2f %%", folder, task.dev.name.upper(), value)
        results.append((DevMetric(task.dev.name, value, **chosen), folder))
    sign = -1 if task.dev.higher_is_better else 1
    return min(results, key=lambda result: sign * result[0].value)  # the first of equal ones


def _checkpoints(run: PlannedRun) -> list[str]:
    """The checkpoints ``states-STEP.ckpt`` of a run, by step."""
    names = (path.name for path in run_checkpoints(run.folder))
    matches = filter(None, (re.fullmatch(r"states-(\d+)\.ckpt", name) for name in names))
    return [match[0] for match in sorted(matches, key=lambda match: int(match[1]))]


def _count_layers(run: PlannedRun) -> int:
    """How many hidden states the upstream of a run has."""
    from .cost import build_upstream, check_forward

    upstream = build_upstream(run.upstream.hub, run.upstream.checkpoint)
    return check_forward(upstream, run.upstream.selection, run.upstream.name)


def evaluate(
    run: PlannedRun,
    request: DownstreamRequest,
    folder: Path,
    call: Callable[[DownstreamRequest], None],
) -> None:
    """Evaluate, and check that the predictions are in ``folder``."""
    gc.collect()  # models of the previous call
    for path in _missing_files(run, folder):
        if path.parent != folder:  # s3prl makes SD's folder scoring/predictions only with scoring
            make_folder(path, SetupError)
    call(request)
    missing = _missing_files(run, folder)
    if missing:
        raise SetupError(f"the evaluation wrote no {missing[0]}")


def _missing_files(run: PlannedRun, folder: Path) -> list[Path]:
    """Files and folders that an evaluation into ``folder`` has not left."""
    paths = [folder / name for name in run.task.files(run.fold)]
    return [
        path for path in paths if not (path.is_file() or (path.is_dir() and any(path.iterdir())))
    ]


def train_and_test(run: PlannedRun, call: Callable[[DownstreamRequest], None]) -> None:
    """Train a run, and test it under each condition; what is done already is skipped.

    Args:
        call: calls s3prl's script, which sets the random seed.
    """
    record = train(run, call)
    if record.dev is None:
        dev, folder = _choose(run, call)
        record = replace(record, dev=dev)
        if run.task.selection == "checkpoints":  # chosen on the test set: it is tested
            record = replace(record, tested={CLEAN: folder.name})
        _write(run, record)
    assert record.dev is not None
    for condition, name in run.conditions.items():
        if _is_tested(run, record, condition):
            continue
        evaluate(run, run.test(record.dev, condition), run.folder / name, call)
        noises = record.noises
        if condition in run.noises:
            noises = {**noises, condition: noise_digest(run.noises[condition][0])}
        record = replace(record, tested={**record.tested, condition: name}, noises=noises)
        _write(run, record)
    finished = record.finished or run.conditions.keys() <= record.tested.keys()
    _write(run, replace(record, finished=finished))


def best_checkpoint(run: PlannedRun) -> DevMetric:
    """The best checkpoint on dev, as s3prl saved it, and its metric.

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
        return DevMetric(run.task.dev.name, run.task.worst, last.name)
    try:
        score = float(read_checkpoint(best)["Downstream"]["best_score"])
    except NewerFormatError:
        raise
    except (CheckpointError, KeyError, TypeError, ValueError):
        raise SetupError(f"{best} is damaged; remove {run.folder} to run it again") from None
    return DevMetric(run.task.dev.name, score * run.task.scale, best.name)


def finish_feature_cache(runs: Sequence[PlannedRun], keep: bool) -> None:
    """Log the cache hits of all runs of one upstream, and remove its cache unless ``keep``."""
    features, name = runs[0].features, runs[0].upstream.name
    if features is None or not Path(features.folder).is_dir():
        return  # no cache, or removed by an earlier command
    folder = Path(features.folder)
    total = CacheCounts()
    for log in (run.folder / "log.txt" for run in runs):
        if log.is_file():
            total += read_counts(log.read_text(encoding="utf-8", errors="replace"))
    size = folder_size(folder)
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: caches of other upstreams
            folder.parent.rmdir()
    logger.info(
        "%s: feature cache: %d hits, %d misses, %d random excerpts (not cached); %s: %.0f MB%s",
        name, total.hits, total.misses, total.excerpts,
        folder, size / 1e6, "" if keep else ", removed",
    )  # fmt: skip


def _write(run: PlannedRun, record: RunRecord) -> None:
    write_text(run.folder / RECORD, json.dumps(to_plain_data(record), indent=1) + "\n")
