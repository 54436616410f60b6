"""Run what is missing: probes of teachers and sets, then students, seed by seed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from tqdm import tqdm

from s3prl_ekd.errors import SetupError

from .folder import StudyFolder
from .processes import process_pool
from .results import StudyResult, machine, probe_states, read_result, write_result
from .rows import PROBED_SETS, Row, set_name, teacher_config

RATE, WARMUP = 4e-3, 0.1  # learning rate, and share of the steps of its warm-up
WIDTH = 576  # dimensions of a teacher's three target layers
SAMPLE = 300  # waveforms for the principal components of a set
STORE_GB = 20.0  # of the teachers' layers on all probed waveforms


StatesFn = Callable[[Any], list[Any]]  # [sample] -> [frame, dim] of each layer


def teacher_path(results: Path, name: str) -> Path:
    """File of the probes of a teacher or a set."""
    return results / f"teacher_{name.replace('+', '-')}.json"


def student_path(results: Path, row: Row, seed: int) -> Path:
    """File of the result of a student."""
    return results / f"{row.file_name}_{seed}.json"


def measure_teachers(folder: StudyFolder, names: tuple[str, ...], results: Path) -> StudyResult:
    """Probe the target layers of a teacher, or of several teachers together.

    Those of several are reduced to :data:`WIDTH` dimensions, as many as one teacher has, since more
    dimensions of anything give better probes.
    """
    import torch

    from s3prl_ekd import compat

    torch.set_num_threads(1)
    compat.apply()
    start = time.monotonic()
    teachers = [load_states(folder, name) for name in names]

    def states_of(wave: torch.Tensor) -> list[torch.Tensor]:
        states = [state for teacher in teachers for state in teacher(wave)]
        frames = min(len(state) for state in states)
        return [state[:frames] for state in states]

    if len(names) > 1:
        states_of = reduced(states_of, folder.sample_waves(SAMPLE))
    scores = probe_states(folder, states_of)
    digests = folder.teacher_digests(names)
    seconds = round(time.monotonic() - start, 1)
    result = StudyResult(set_name(names), 0, scores, digests, seconds=seconds, machine=machine())
    write_result(result, teacher_path(results, set_name(names)))
    return result


def reduced(states_of: StatesFn, waves: Iterable[Any]) -> StatesFn:
    """Reduce the layers of several teachers to :data:`WIDTH` dimensions.

    By principal components of all standardised dimensions, of every tenth frame of ``waves``.
    """
    import torch

    frames = torch.cat([torch.cat(states_of(wave), dim=1)[::10] for wave in waves]).double()
    mean, deviation = frames.mean(0), frames.std(0).clamp(min=1e-5)
    _, vectors = torch.linalg.eigh(((frames - mean) / deviation).T.cov())
    basis = (vectors[:, -WIDTH:] / deviation[:, None]).float()
    offset = mean.float() @ basis

    def reduce(wave: Any) -> list[Any]:
        return [torch.cat(states_of(wave), dim=1) @ basis - offset]

    return reduce


def load_states(folder: StudyFolder, name: str) -> StatesFn:
    """A function from a waveform to the target layers of a teacher, ``[frame, dim]`` each.

    Each teacher is a member of several sets, so the layers are kept in OUT/teacher_states.
    """
    import torch

    from s3prl_ekd.files.states_file import wave_key
    from s3prl_ekd.hidden_states.feature_store import FeatureStore
    from s3prl_ekd.teachers import load_upstream

    if name == "resemblyzer":
        from resemblyzer_features import load_encoder, project

        from s3prl_ekd.files.safetensors_file import read_safetensors

        encoder = load_encoder(folder.wheel)
        path = folder.folder / "resemblyzer/projection.safetensors"
        projection = read_safetensors(path, "projection")[1]
        return lambda wave: list(project(encoder(wave), projection))
    upstream = load_upstream(folder.files[name], name).eval()
    layers = teacher_config(name, folder.files)["layers"]
    (digest,) = folder.teacher_digests((name,)).values()
    store = FeatureStore(folder.folder / "teacher_states", f"{name}-{digest}", STORE_GB)

    def states_of(wave: Any) -> list[Any]:
        key = wave_key(wave)
        states = store.read(key)
        if states is None:
            hidden = upstream([wave])["hidden_states"]
            states = torch.stack([hidden[layer][0] for layer in layers])
            store.write(key, states)
        return list(states.float())

    return states_of


def measure_student(
    folder: StudyFolder, row: Row, seed: int, steps: int, results: Path
) -> StudyResult:
    """Train the student of a row and seed, unless it is there, and probe its hidden states.

    A row without teachers has the first weights of its seed.
    """
    import torch
    from s3prl_ekd.upstream.expert import UpstreamExpert

    torch.set_num_threads(1)
    start, loss = time.monotonic(), None
    name = f"{row.file_name}_{seed}_{steps}"
    if not row.teachers:
        upstream = UpstreamExpert(folder.first_weights(row, seed)).eval()
    else:
        model = folder.model(row)
        last = folder.train(name, model, steps, RATE, WARMUP, seed, log=f"log_{name}")
        loss = round(folder.dev_loss(model, steps, last), 5)
        upstream = UpstreamExpert(last).eval()

    def states_of(wave: torch.Tensor) -> list[torch.Tensor]:
        return [state[0] for state in upstream([wave])["hidden_states"]]

    scores = probe_states(folder, states_of)
    digests = folder.teacher_digests(row.needed)
    trained = steps if row.teachers else 0
    seconds = round(time.monotonic() - start, 1)
    result = StudyResult(row.name, seed, scores, digests, trained, seconds, loss, machine())
    write_result(result, student_path(results, row, seed))
    return result


def run_missing(
    folder: StudyFolder,
    rows: Sequence[Row],
    seeds: Sequence[int],
    steps: int,
    results: Path,
    jobs: int,
    stop: Callable[[], bool],
) -> tuple[int, list[str]]:
    """Measure what has no result yet.

    Args:
        folder, rows, seeds, steps: what to run.
        results: folder of the result files.
        jobs: processes at a time.
        stop: no further job is started once it returns True.

    Returns:
        (number of results that are still missing, reasons of failed jobs).
    """
    todo: list[tuple[str, Any]] = []
    sets = [(name,) for name in folder.teachers]
    sets += [names for names in PROBED_SETS if set(names) <= set(folder.teachers)]
    for names in sets:
        if not teacher_path(results, set_name(names)).exists():
            todo.append((set_name(names), (measure_teachers, folder, names, results)))
    for seed in seeds:
        for row in rows:
            if not student_path(results, row, seed).exists():
                job = (measure_student, folder, row, seed, steps, results)
                todo.append((f"{row.name}, seed {seed}", job))
    failed, done = [], 0
    with (
        process_pool(jobs) as pool,
        tqdm(total=len(todo), unit=" results", dynamic_ncols=True) as bar,
    ):
        waiting, running = list(todo), {}
        while running or (waiting and not stop()):
            while waiting and len(running) < jobs and not stop():
                name, (function, *arguments) = waiting.pop(0)
                try:
                    running[pool.submit(function, *arguments)] = name
                except BrokenProcessPool:  # a process was killed, such as for lack of memory
                    return len(todo) - done, [*failed, f"{name}: a process was killed"]
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                name, error = running.pop(future), future.exception()
                if error is None:
                    done += 1
                    bar.update()
                    bar.set_postfix_str(name)
                else:
                    failed.append(f"{name}: {error}")
                    tqdm.write(failed[-1])
    return len(todo) - done, failed


def check_results(
    results: Path,
    steps: int,
    digests: dict[str, str] | None = None,
    seeds: Sequence[int] = (),
) -> None:
    """Check that results belong together: equal updates, and for each seed the same teachers.

    A training on another kind of processor ends with other weights, so other seeds may be of other
    trainings of a teacher: contrasts are within a seed.

    Args:
        results: folder of the result files.
        steps: updates of the students.
        digests: of the teachers' files now, by name.
        seeds: those that are to be run with these files.

    Raises:
        SetupError: they do not.
    """
    seen: dict[tuple[int, str], tuple[str, str]] = {
        (seed, name): (digest, "the folder OUT")
        for seed in seeds
        for name, digest in (digests or {}).items()
    }
    for path in sorted(results.glob("*.json")):
        result = read_result(path)
        if result.steps not in (0, steps):
            raise SetupError(
                f"{path} is of {result.steps} updates, not of {steps}; use its --steps, or another "
                "folder with --results"
            )
        for name, digest in result.teachers.items():
            other = seen.setdefault((result.seed, name), (digest, str(path)))
            if other[0] != digest:
                raise SetupError(
                    f"{path} and {other[1]} are of different trainings of the teacher {name}; use "
                    "--seeds that have no results yet, or another folder with --results"
                )
