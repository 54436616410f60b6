"""Project the GPU hours and the disk of a recipe. No full-size run has been measured.

Hours of a distillation are its multiply-accumulates (MACs) at an assumed rate: a forward of each
teacher, a forward and a backward of the student, twice as dear as a forward. Hours of the tasks are
guesses of seconds a batch. Waiting for audio, dev losses, evaluations and the heads' own MACs are
left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from ..downstream.tasks import TASKS
from ..files.text import parse_yaml
from ..system.tables import text_table
from .plan import RecipePlan, Stage, Training

# MACs of a forward over SUPERB's 32 utterances (superb/cost.py: LENGTHS), of these seconds in all.
SECONDS_OF_32 = 224.86
MACS_OF_32 = {
    "teacher": 1669.156e9,  # HuBERT Base, published; docs/students.md
    "copy": 1669.156e9,  # gates save nothing before the cut
    "two layers": 825.64e9,  # Robust DistilHuBERT with one set of heads, published
    "pruned": 654e9,  # DPHuBERT, published (arXiv 2305.17651)
}
# Parameters: docs/students.md, superb/score.py.
PARAMETERS = {"two layers": 23_491_200, "copy": 94_370_944, "pruned": 23_590_000}
HEADS = 3_543_552  # parameters of one set of three heads, 768 wide

PEAK = 312e12  # FLOP/s of an A100 in bfloat16, dense: NVIDIA's data sheet
UTILISATION = 0.15  # ours: a guess
REFERENCE = "three_average"  # the row of --updates-per-second
REFERENCE_WORK = (3, "two layers", 24 * 12.3)  # its teachers, student, seconds of audio an update

STATES = 3  # float32 numbers a parameter in a checkpoint: the weight and AdamW's two moments
DOWNSTREAM_CHECKPOINTS = 2  # the last and the best
TABLES_GB = 0.1  # length tables, lexicon, lists, TensorBoard, predictions (ours: rounded up)

# A target cache: three teachers, three layers of width 768, 50 frames a second, float16, in bytes.
TARGETS_PER_SECOND = 3 * 3 * 768 * 50 * 2
CORPUS_HOURS = 960

NOTE = """\
A projection, not a measurement: this version has trained no full-size student and has not been run
on a GPU. Distillation: multiply-accumulates at {rate:.0f} TFLOP/s a GPU, {origin}.
Tasks, seconds a batch: {batches}; ASR's from its recipe, the others guessed.
Waiting for audio and evaluations are left out. To replace the rate, add --updates-per-second X:
updates a second of {reference} on one of your GPUs; the progress bar in its log shows them.
Disk: {kept} checkpoints of a run at most, students, results. LibriSpeech is read where it is, and
teachers are in s3prl's download folder. Targets are not cached: they would take {cache:.1f} TB."""


@dataclass(frozen=True)
class StudentCost:
    """The projection for one student.

    Attributes:
        updates: of its distillations.
        audio: hours of audio in them.
        distillation, tasks: GPU hours.
        gigabytes: on disk.
    """

    updates: int
    audio: float
    distillation: float
    tasks: float
    gigabytes: float


def training_flops(teachers: int, student: str) -> float:
    """FLOPs of a distillation for a second of audio; a MAC is two."""
    macs = teachers * MACS_OF_32["teacher"] + 3 * MACS_OF_32[student]
    return 2 * macs / SECONDS_OF_32


def flops_per_second(updates_per_second: float | None = None) -> float:
    """The assumed rate of a GPU, or that of a user's run of :data:`REFERENCE`."""
    if updates_per_second is None:
        return PEAK * UTILISATION
    teachers, student, audio = REFERENCE_WORK
    return updates_per_second * audio * training_flops(teachers, student)


def task_hours(task: str, steps: int | None = None) -> float:
    """GPU hours of a task's training, all folds; 0 for a task without training.

    Args:
        steps: training steps; None for those of SUPERB's recipe.
    """
    if not TASKS[task].trained:
        return 0.0
    recipe = resources.files("s3prl_ekd.downstream_recipes")
    for part in TASKS[task].full.split("/")[1:]:
        recipe = recipe / part
    runner = parse_yaml(recipe.read_text(encoding="utf-8"), str(recipe))["runner"]
    batches = (steps or runner["total_steps"]) * runner["gradient_accumulate_steps"]
    return _folds(task) * batches * TASKS[task].batch_seconds / 3600


def task_gigabytes(task: str) -> float:
    """Disk of a task's downstream models, all folds."""
    models = _folds(task) * DOWNSTREAM_CHECKPOINTS
    return models * STATES * 4 * TASKS[task].parameters / 1e9


def _folds(task: str) -> int:
    return len(TASKS[task].board_folds) or 1


def student_cost(
    stages: Sequence[Stage], tasks: Sequence[str], steps: int | None, rate: float
) -> StudentCost:
    """The projection for the stages of a student, at ``rate`` FLOP/s."""
    trainings = [stage for stage in stages if isinstance(stage, Training)]
    hours, files = 0.0, 0.0
    for stage in trainings:
        seconds = stage.steps * stage.audio
        hours += seconds * training_flops(stage.teachers, stage.student) / rate / 3600
        parameters = PARAMETERS[stage.student] + stage.targets * HEADS
        files += 4 * PARAMETERS[stage.student]  # the student file
        # one more while a checkpoint is written
        files += (stage.checkpoints + 1) * STATES * 4 * parameters
    return StudentCost(
        sum(stage.steps for stage in trainings),
        sum(stage.steps * stage.audio for stage in trainings) / 3600,
        hours,
        sum(task_hours(task, steps) for task in tasks),
        files / 1e9 + sum(map(task_gigabytes, tasks)),
    )


def project(plan: RecipePlan, updates_per_second: float | None = None) -> dict[str, StudentCost]:
    """The projection for each student of a plan."""
    rate = flops_per_second(updates_per_second)
    options = plan.options
    return {
        name: student_cost(stages, options.tasks, options.steps, rate)
        for name, stages in plan.students.items()
    }


def total_gigabytes(costs: dict[str, StudentCost]) -> float:
    """Disk of the whole recipe."""
    return TABLES_GB + sum(cost.gigabytes for cost in costs.values())


def projection_lines(plan: RecipePlan, updates_per_second: float | None = None) -> list[str]:
    """The projection as lines of text."""
    costs, options = project(plan, updates_per_second), plan.options
    tasks = " ".join(map(str.upper, plan.options.tasks))
    head = ["student", "updates", "hours of audio", "distil, GPU h", f"{tasks}, GPU h", "disk, GB"]
    rows = [head]
    for name, cost in costs.items():
        rows.append([name, f"{cost.updates:,}", *_cells(cost)])
    total = StudentCost(
        0,
        sum(cost.audio for cost in costs.values()),
        sum(cost.distillation for cost in costs.values()),
        sum(cost.tasks for cost in costs.values()),
        total_gigabytes(costs),
    )
    rows.append(["total", "", *_cells(total)])
    gpus = plan.options.gpus * plan.options.jobs
    hours = total.distillation + total.tasks
    days = f", {hours / gpus / 24:,.1f} days on {gpus} GPU{'s' * (gpus > 1)} that never wait"
    cache = TARGETS_PER_SECOND * 3600 * CORPUS_HOURS
    trainings = [stage for stage in plan.stages if isinstance(stage, Training)]
    note = NOTE.format(
        rate=flops_per_second(updates_per_second) / 1e12,
        origin=f"{UTILISATION:.0%} of an A100's peak (a guess)"
        if updates_per_second is None
        else f"from --updates-per-second {updates_per_second:g}",
        batches=", ".join(f"{name.upper()} {TASKS[name].batch_seconds}" for name in options.tasks),
        reference=REFERENCE,
        kept=max(stage.checkpoints for stage in trainings),
        cache=cache / 1e12,
    )
    return [
        *text_table(rows, rule=True),
        "",
        f"{hours:,.0f} GPU hours{days}",
        "",
        *note.split("\n"),
    ]


def _cells(cost: StudentCost) -> list[str]:
    numbers = (cost.audio, cost.distillation, cost.tasks)
    return [*(f"{number:,.0f}" for number in numbers), f"{cost.gigabytes:,.1f}"]
