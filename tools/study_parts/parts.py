"""What is to be run, in order: corpora, the teachers' targets, students, their evaluation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .design import DOWNSTREAM, NONE, TASKS, Setting, Student, students
from .folder import Folder

# Seconds of a first guess, until a part of its kind was measured.
GUESS = {"prepare": 4.0, "cache": 80.0, "start": 10.0, "distil": 70.0}
GUESS |= {"pr": 50.0, "asr": 70.0, "sid": 20.0, "er": 20.0}

MADE = ("start", "distil")  # the kinds that make a student


@dataclass(frozen=True)
class Part:
    """Commands that are run one after the other, each ``s3prl-ekd WORDS``, in the study's folder.

    Attributes:
        kind: a key of :data:`GUESS`, or ``evaluate``.
        commands: the words of each.
        needs: names of parts that must have ended before.
        makes: a file that is there once it is finished, beside its record; "": none.
        whole: takes all jobs; the command is told how many.
        of: of ``evaluate``: the students.
    """

    name: str
    kind: str
    commands: tuple[tuple[str, ...], ...]
    needs: tuple[str, ...] = ()
    makes: str = ""
    whole: bool = False
    of: tuple[Student, ...] = ()


def plan(setting: Setting, speech: Path, noise: Path, jobs: int) -> list[Part]:
    """Every part, in the order in which they are begun.

    Args:
        speech: the folder with the manifests.
        noise: a folder of audio.
        jobs: runs at a time of an evaluation.
    """
    parts = [Part("init", "prepare", (("init", "."),))]
    parts += _preparations(setting, speech)
    first = students(setting)[-1]
    cache = ("cache", "-c", "configs/runner.yaml", "-g", f"configs/{first.row.name}.yaml")
    needs = ("init", "prepare-unlabeled")
    parts.append(Part("cache", "cache", ((*cache, "-o", "cache"),), needs, "cache"))
    for seed in setting.seeds:
        chosen = [student for student in students(setting) if student.seed == seed]
        parts += [_distillation(student) for student in chosen]
        needs = tuple(part.name for part in parts if part.kind in ("prepare", *MADE))
        words = evaluation(setting, chosen, seed, noise, jobs)
        parts.append(
            Part(f"evaluate-seed{seed}", "evaluate", (words,), needs, whole=True, of=tuple(chosen))
        )
    return parts


def _preparations(setting: Setting, speech: Path) -> list[Part]:
    more = {
        "unlabeled": (),
        "pr": ("--lexicon", str(speech / "lexicon.txt"), "--replace"),
        "asr": ("--replace",),
        "sid": ("--test-seconds", f"{setting.sid_seconds:g}", "--replace"),
        "er": ("--replace", *(("--fold-column", "speaker") if setting.all_folds else ())),
    }
    where = {"pr": "corpus_pr", "asr": "corpus"}  # where the tiny recipes look
    wanted = ("unlabeled", *(task for task in TASKS if task in setting.tasks))
    return [
        Part(
            f"prepare-{name}",
            "prepare",
            (
                ("prepare", name, str(speech / f"{name}.tsv"), "-o")
                + (f"data/{where.get(name, name)}", *more[name]),
            ),
            makes=f"data/{where.get(name, name)}",
        )
        for name in wanted
    ]


def _distillation(student: Student) -> Part:
    run, file = f"result/pretrain/{student.name}", f"students/{student.name}.pt"
    kind, runner = ("start", "start") if student.row.learned_from == NONE else ("distil", "runner")
    pretrain = ("run_pretrain.py", "-u", "ekd", "-p", run, "-a", "-c", f"configs/{runner}.yaml")
    pretrain += ("-g", f"configs/{student.row.name}.yaml", "--seed", str(student.seed))
    pretrain += ("-o", "config.pretrain_expert.datarc.target_cache='cache'")
    export = ("export", "student", run, "-o", file, "--heads", "drop", "--force")
    return Part(f"{kind}-{student.name}", kind, (pretrain, export), ("init", "cache"), file)


def evaluation(
    setting: Setting, chosen: Sequence[Student], seed: int, noise: Path, jobs: int
) -> tuple[str, ...]:
    """One ``s3prl-ekd superb`` over the students of a seed."""
    words = ["superb", *(f"{s.name}=students/{s.name}.pt" for s in chosen)]
    words += ["--tasks", *setting.tasks, "--recipes", "tiny"]
    for task, steps in setting.tasks.items():
        words += ["--steps", f"{task}={steps}", *DOWNSTREAM.get(task, ())]
    words += ["--noise", str(noise), "--snr", f"{setting.snr:g}", "--seeds", str(seed)]
    return (*words, "--jobs", str(jobs), "--cache-features")


def finished_runs(folder: Folder, part: Part, setting: Setting) -> dict[tuple[str, str], float]:
    """(student, task) -> seconds, for what an evaluation has finished so far."""
    found = {}
    for student in part.of:
        for task in setting.tasks:
            seconds, unfinished = 0.0, 0
            for record in (folder.superb / student.name / task).glob("*/superb.json"):
                try:
                    about = json.loads(record.read_text(encoding="utf-8"))
                    seconds += about["seconds"]
                    unfinished += not about["finished"] or len(about["tested"]) < 2
                except (OSError, ValueError, KeyError, TypeError):
                    unfinished += 1
            if seconds and not unfinished:
                found[student.name, task] = seconds
    return found


def is_done(folder: Folder, part: Part) -> bool:
    """Whether it need not be run again."""
    if folder.spent(part.name) is None:
        return False
    return not part.makes or (folder.root / part.makes).exists()
