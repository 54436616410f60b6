"""Check a recipe's plan before anything runs, and run it; finished stages are skipped.

Every stage is a command in a child process. The stages of a student run in order, those of several
students side by side. An interrupted command continues from what is there, because its commands do:
distillations with ``-a``, and ``superb``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from ..errors import DataError, EkdError, SetupError
from ..files.atomic import make_folder, write_text
from ..files.formats import check_format_version
from ..files.text import read_json
from ..hidden_states.feature_store import folder_size
from ..prepare.lexicon import read_lexicon
from ..system.jobs import Jobs, typed
from ..system.lock import FolderLock
from ..teachers.names import check_teacher_sources
from ..workspace import CorpusPaths, report_differences
from .plan import VOXCELEB1_SPLIT, RecipeOptions, RecipePlan, Stage, Training
from .projection import project, total_gigabytes

RECORD = "recipe.json"  # in the working folder: what may not change between two commands
LOCK = ".recipe.lock"
LOGS = "logs"
ORPHAN_TIMEOUT = 45.0  # seconds for a training to save and end after its command was killed


def problems(plan: RecipePlan) -> list[str]:
    """Everything that keeps a plan from running, a sentence each."""
    checks: Sequence[Callable[[RecipePlan], None]] = (
        check_record,
        check_corpora,
        check_lexicon,
        check_configs,
        check_teachers,
        check_gpus,
        check_disk,
    )
    found = []
    for check in checks:
        try:
            check(plan)
        except EkdError as error:
            found.append(str(error))
    return found


def _record(options: RecipeOptions) -> dict[str, object]:
    steps = [f"--steps {options.steps}"] if options.steps else []
    return {"format": 1, "options": " ".join([*["--tiny"] * options.tiny, *steps])}


def check_record(plan: RecipePlan) -> None:
    """Check that the working folder has no recipe of another size or number of steps."""
    path = plan.options.folder / RECORD
    if not path.exists():
        return
    record = read_json(path, "record", SetupError)
    check_format_version(record.get("format", 1), 1, f"the record {path}", SetupError)
    if record != _record(plan.options):
        options = record.get("options") or "neither --tiny nor --steps"
        raise SetupError(
            f"{plan.options.folder} has results of a recipe with {options}; give the same options, "
            "or another folder with -o"
        )


def check_corpora(plan: RecipePlan) -> None:
    """Check that the folders of the corpora have what the stages read."""
    options = plan.options
    CorpusPaths(options.librispeech, options.voxceleb1, options.iemocap).check()
    for name in plan.sets:
        if not (options.librispeech / name).is_dir():
            raise DataError(
                f"--librispeech: {options.librispeech} lacks {name}/, on which students are "
                f"distilled; unpack {name}.tar.gz there"
            )
    if options.voxceleb1 and not (options.voxceleb1 / VOXCELEB1_SPLIT).is_file():
        raise DataError(
            f"--voxceleb1: {options.voxceleb1} has no {VOXCELEB1_SPLIT}; put the file there, which "
            "is published with VoxCeleb1"
        )


def check_lexicon(plan: RecipePlan) -> None:
    """Check the lexicons, and that the package of ``--g2p`` is installed."""
    options = plan.options
    try:
        read_lexicon(options.lexicon, ())
    except DataError as error:
        raise DataError(f"--lexicon: {error}") from None
    if options.g2p and importlib.util.find_spec("g2p_en") is None:
        raise SetupError("--g2p needs g2p_en; type: pip install espnet-g2p-en")


def check_configs(plan: RecipePlan) -> None:
    """Check that configs of the working folder have the LibriSpeech of the options."""
    folder = plan.options.folder
    if (folder / "pretrain/ekd").is_dir():
        differences = report_differences(folder, CorpusPaths(plan.options.librispeech).values())
        if differences:
            raise SetupError(f"in {folder}: {differences[0]}; or use another folder with -o")


def check_teachers(plan: RecipePlan) -> None:
    """Check that every teacher is a known name, a file or a Hugging Face folder."""
    for row, model in plan.models.items():
        check_teacher_sources(model.teachers, f"{row}: ")


def check_gpus(plan: RecipePlan) -> None:
    """Check that the machine has the GPUs; tiny students need none."""
    needed = plan.options.gpus * plan.options.jobs
    if plan.options.tiny:
        return
    import torch

    count = torch.cuda.device_count()
    if count < needed:
        raise SetupError(
            f"{needed} GPU{'s are' if needed > 1 else ' is'} needed (--gpus {plan.options.gpus}, "
            f"--jobs {plan.options.jobs}), this machine has {count or 'none'}; a rehearsal with "
            "--tiny needs none"
        )


def check_disk(plan: RecipePlan) -> None:
    """Check that the disk has room for what the projection says; tiny students need little."""
    options = plan.options
    if options.tiny:
        return
    folder = Path(os.path.abspath(options.folder))
    present = folder_size(folder) / 1e9 if folder.is_dir() else 0.0
    needed = total_gigabytes(project(plan)) - present
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.is_dir())).free / 1e9
    if free < needed:
        raise SetupError(
            f"{options.folder}: {needed:,.0f} GB are needed and {free:,.0f} GB are free; choose "
            "another disk with -o, or fewer --rows"
        )


def run(plan: RecipePlan) -> Path:
    """Run the stages that are not done; return the report.

    Raises:
        SetupError: stages failed; the message names each, its log and its command.
    """
    options = plan.options
    make_folder(options.folder / LOGS, SetupError)
    processes = Jobs(options.jobs)

    def run_stages(stages: Sequence[Stage], environment: Mapping[str, str]) -> None:
        first = len(stages)  # what comes before a result is not needed any more
        while first > 0 and not stages[first - 1].is_done(options.folder):
            first -= 1
        for stage in stages[first:]:
            _run_stage(stage, options.folder, processes, environment)

    with FolderLock(options.folder, LOCK):
        write_text(options.folder / RECORD, json.dumps(_record(options)) + "\n")
        for stage in plan.setup:
            made = options.folder / LOGS / f"{stage.name}.command"  # that made its result
            command = typed(stage.argv) + "\n"
            other = made.is_file() and made.read_text(encoding="utf-8") != command
            if other or not stage.is_done(options.folder):
                _run_stage(stage, options.folder, processes, os.environ)
                write_text(made, command)
        processes.run_all(run_stages, list(plan.students.values()))
        _run_stage(plan.report, options.folder, processes, os.environ)
    return options.folder / "report/report.md"


def _run_stage(stage: Stage, folder: Path, processes: Jobs, environment: Mapping[str, str]) -> None:
    log = folder / LOGS / f"{stage.name}.txt"
    tqdm.write(f"{stage.name}: {typed(stage.argv)}")
    if isinstance(stage, Training) and (folder / stage.result).is_dir():
        with FolderLock(folder / stage.result, wait=ORPHAN_TIMEOUT):
            pass  # a training whose command was killed saves and ends
    try:
        processes.run(stage.argv, log, environment, folder=folder)
    except SetupError as error:
        raise SetupError(
            f"stage {stage.name}: {error}; this stage alone, to type in {folder}: "
            f"{typed(stage.argv)}"
        ) from None
