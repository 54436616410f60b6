"""Run a plan (:mod:`.plan`) through ``run_downstream.py``: finished runs are kept.

A run that was cut goes on at its last checkpoint and ends as if it had not been cut
(:mod:`..downstream.resume`). One that failed does not stop the others.
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

from ..downstream.feature_cache import Counts, read_counts
from ..errors import CheckpointError, SetupError
from ..files.atomic import make_folder, write_text
from ..files.formats import NewerFormatError, refuse_newer
from ..files.run_checkpoints import newest, read_run
from ..hidden_states.feature_store import folder_size
from ..system.jobs import Processes
from ..system.lock import FolderLock
from .plan import CLEAN, Run, noise_digest
from .results import RECORD, check_paths

logger = logging.getLogger(__name__)

FORMAT = 1
PARENT_LOCK = ".superb.lock"  # of this command; NAME of system/lock.py is of what it starts
LEFTOVER = 10.0  # seconds for a run to end whose command was killed


def close_features(runs: Sequence[Run], keep: bool) -> None:
    """Say how often the hidden states of one upstream were found, and remove them unless ``keep``.

    Args:
        runs: all of one upstream, finished.
        keep: the folder is the user's, or was asked for.
    """
    first = runs[0]
    if first.features is None or not Path(first.features.folder).is_dir():
        return  # nothing was run now
    folder = Path(first.features.folder)
    total = Counts()
    for run in runs:
        log = run.folder / "log.txt"
        if log.is_file():
            total += read_counts(log.read_text(encoding="utf-8", errors="replace"))
    size = folder_size(folder)
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # those of other upstreams are there
            folder.parent.rmdir()
    logger.info(
        "%s: hidden states found %d times, computed %d times, and for %d random excerpts; "
        "%s has %.0f MB%s",
        first.upstream.name,
        total.hits,
        total.misses,
        total.excerpts,
        folder,
        size / 1e6,
        "" if keep else ", removed now",
    )


def environment_of(slot: int, jobs: int) -> dict[str, str]:
    """Several jobs: each its share of the cores, and a GPU of its own where there are several."""
    if jobs == 1:
        return dict(os.environ)
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    changed = {"OMP_NUM_THREADS": threads, **os.environ}
    import torch

    count = torch.cuda.device_count()
    if count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(i) for i in range(count)]
        changed["CUDA_VISIBLE_DEVICES"] = names[slot % len(names)]
    return changed


def run_command(
    folder: Path, words: list[str], environment: Mapping[str, str], processes: Processes
) -> None:
    """Run one command, with all it prints in ``folder/log.txt``.

    Raises:
        SetupError: it failed; with the sentence that it said, or its last line.
    """
    path = folder / "log.txt"
    begin = path.stat().st_size if path.exists() else 0
    code = processes.call(words, path, environment)
    if not code:
        return
    text = path.read_bytes()[begin:].decode("utf-8", "replace").strip().splitlines()
    # its own last word, which a progress bar may have written over as it was closed
    own = ("error: ", "stopped by ")
    said = next((line for line in reversed(text) if line.startswith(own)), None)
    why = said.removeprefix("error: ") if said else (text[-1] if text else "no message")
    if code < 0 and not said:
        why = f"ended by {_signal(-code)}; the last line was: {why}"
    raise SetupError(f"{folder}: {why} (see {path})")


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def read_record(folder: Path) -> dict[str, Any] | None:
    """What a run's folder says of itself; None where it says nothing.

    Raises:
        SetupError: it cannot be read.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        refuse_newer(record["format"], FORMAT, f"the record {path}", SetupError)
        if record["format"] != FORMAT:
            raise ValueError
        check_paths(record)
        return record
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise SetupError(f"{path} is damaged; remove {folder} to run it again") from None


def check_records(runs: Sequence[Run]) -> None:
    """Raise SetupError where a folder holds another run: nothing is ever trained over it.

    Also where a test under a noise of that name was made with other noises, or another task's runs
    of the upstream are of another model: the report would show the two as one.
    """
    for run in runs:
        record = read_record(run.folder)
        if record is None:
            continue
        if record["digest"] != run.digest:
            raise SetupError(
                f"{run.folder} holds a run of another checkpoint, recipe, setting or corpus; move "
                "it away, name the upstream otherwise (NAME=CHECKPOINT), or choose another -o"
                f"{_features_hint(run, record)}"
            )
        for condition, known in record.get("noises", {}).items():
            if condition in run.noises and known != noise_digest(run.noises[condition][0]):
                raise SetupError(
                    f"{run.folder} was tested under {condition} with other noises than those of "
                    f"{run.noises[condition][0]}; give that folder another name"
                )
    for upstream, root in {run.upstream: run.root for run in runs}.items():
        for folder in upstream_folders(root, upstream.name):
            model = (read_record(folder) or {}).get("model")
            if model is not None and model != upstream.digest:
                raise SetupError(
                    f"{folder} is of another model than {upstream.name} is now; move "
                    f"{root / upstream.name} away, name the upstream otherwise (NAME=CHECKPOINT), "
                    "or choose another -o"
                )


def upstream_folders(root: Path, name: str) -> list[Path]:
    """The folders of an upstream's runs that have a record, of any task."""
    return sorted(path.parent for path in (root / name).glob(f"*/*/{RECORD}"))


def _features_hint(run: Run, record: Mapping[str, Any]) -> str:
    alone = record.get("features_alone", False)
    if alone == (run.features is not None):
        return ""
    return f" (it ran {'with' if alone else 'without'} --cache-features)"


def is_finished(run: Run) -> bool:
    """Trained, and tested under every condition that is asked for."""
    record = read_record(run.folder)
    return bool(record and record["finished"] and run.conditions.keys() <= record["tested"].keys())


def commands(run: Run, gpus: int = 1) -> list[list[str]]:
    """Its commands as a user or a cluster's queue would type them."""
    best = run.task.best
    tests = [run.test(best, condition).command() for condition in run.conditions]
    return [_training(run, gpus), *tests]


def _training(run: Run, gpus: int) -> list[str]:
    argv = run.training().command()
    if gpus == 1:
        return argv
    return ["torchrun", "--standalone", f"--nproc_per_node={gpus}", "-m", "s3prl_ekd", *argv]


def run_all(
    runs: Sequence[Run],
    jobs: int = 1,
    gpus: int = 1,
    *,
    keep_features: bool = False,
    processes: Processes | None = None,
) -> list[tuple[Run, str]]:
    """Run what is not finished, ``jobs`` at a time.

    Args:
        keep_features: leave kept hidden states where they are.
        processes: what starts the commands; None: each is a new process.

    Returns:
        The runs that failed, each with its reason.
    """
    waiting = [run for run in runs if not is_finished(run)]
    if len(waiting) < len(runs):
        logger.info("%d of %d runs are finished and kept", len(runs) - len(waiting), len(runs))
    failed: list[tuple[Run, str]] = []
    processes = processes or Processes()
    open_runs = Counter(run.upstream.name for run in waiting)
    closed: set[str] = set()
    slots: queue.Queue[int] = queue.Queue()
    for slot in range(jobs):
        slots.put(slot)
    with (
        tqdm(total=len(runs), initial=len(runs) - len(waiting), unit=" runs", desc="superb") as bar,
        ThreadPoolExecutor(jobs) as pool,
    ):
        futures = {
            pool.submit(_with_slot, run, slots, jobs, gpus, processes): run for run in waiting
        }
        try:
            for future in as_completed(futures):
                run = futures[future]
                bar.update()
                bar.set_postfix_str(f"{run.upstream.name}/{run.task.name}/{run.name}")
                try:
                    future.result()
                    open_runs[run.upstream.name] -= 1
                    if not open_runs[run.upstream.name]:  # none failed: those stay counted
                        close_features(_of(run.upstream.name, runs), keep_features)
                        closed.add(run.upstream.name)
                except SetupError as error:
                    failed.append((run, str(error)))
                    tqdm.write(f"failed: {error}")
        except BaseException:
            for future in futures:
                future.cancel()
            processes.stop()
            raise
    if not keep_features:  # what a call left that was cut between its last run and this
        for name in {run.upstream.name: None for run in runs if run.upstream.name not in closed}:
            if all(is_finished(run) for run in _of(name, runs)):
                close_features(_of(name, runs), keep_features)
    return failed


def _of(upstream: str, runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run.upstream.name == upstream]


def _with_slot(run: Run, slots: queue.Queue, jobs: int, gpus: int, processes: Processes) -> None:
    slot = slots.get()
    try:
        environment = environment_of(slot, jobs)
        make_folder(run.folder, SetupError)
        # The same command, typed twice, trains nothing twice. Training and tests take the folder's
        # own lock; one whose command was killed may still be on its way out.
        with FolderLock(run.folder, PARENT_LOCK):
            with FolderLock(run.folder, wait=LEFTOVER):
                pass
            _run(run, lambda words: run_command(run.folder, words, environment, processes), gpus)
    finally:
        slots.put(slot)


def _run(run: Run, call: Callable[[list[str]], None], gpus: int) -> None:
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
        logger.info("%s was %s; it has been renamed", run.folder, record["upstream"])
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
                raise SetupError(f"{run.folder / folder} has no {name} after its evaluation")
        record["tested"][condition] = folder
        if condition in run.noises:
            digest = noise_digest(run.noises[condition][0])
            record.setdefault("noises", {})[condition] = digest
        _write(run.folder, record)
    record["finished"] = CLEAN in record["tested"]
    _write(run.folder, record)


def best_checkpoint(run: Run) -> tuple[str, float]:
    """The checkpoint that s3prl chose by dev, and its score in per cent.

    s3prl keeps none while all is wrong (100 % errors, 0 % right): then the last one is taken.

    Raises:
        SetupError: the run left no checkpoint.
    """
    best = run.folder / run.task.best
    if not best.is_file():
        last = newest(run.folder)
        if last is None:
            raise SetupError(f"{run.folder} has no checkpoint after its training")
        return last.name, run.task.worst
    try:
        score = read_run(best)["Downstream"]["best_score"]
    except NewerFormatError as error:
        raise SetupError(str(error)) from None
    except (CheckpointError, KeyError, TypeError):
        raise SetupError(f"{best} is damaged; remove {run.folder} to run it again") from None
    return best.name, float(score) * run.task.scale


def _write(folder: Path, record: Mapping[str, Any]) -> None:
    write_text(folder / RECORD, json.dumps(record, indent=1) + "\n")
