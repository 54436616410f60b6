"""Jobs of the study, in order: corpora, cached targets, students, evaluations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .design import DOWNSTREAM_OPTIONS, NONE, TASKS, StudySetting, StudyStudent, students
from .folder import StudyFolder

# Seconds of a job, or of a downstream run, for the estimate until one of its kind is finished.
GUESSED_SECONDS = {"prepare": 4.0, "cache": 80.0, "start": 10.0, "distil": 70.0}
GUESSED_SECONDS |= {"pr": 50.0, "asr": 70.0, "sid": 20.0, "er": 20.0}

STUDENT_KINDS = ("start", "distil")  # kinds of jobs that write a student file


@dataclass(frozen=True)
class Job:
    """Commands that run one after the other in the study's folder.

    Attributes:
        kind: ``prepare``, ``cache``, ``start``, ``distil`` or ``evaluate``.
        commands: arguments of ``s3prl-ekd`` for each command.
        needs: names of the jobs that must have ended before.
        output: a file or folder that the job writes; "": none.
        exclusive: no other job runs at the same time; its command runs several processes.
        students: the students of an ``evaluate`` job.
    """

    name: str
    kind: str
    commands: tuple[tuple[str, ...], ...]
    needs: tuple[str, ...] = ()
    output: str = ""
    exclusive: bool = False
    students: tuple[StudyStudent, ...] = ()


def plan(setting: StudySetting, speech: Path, noise: Path, parallel: int) -> list[Job]:
    """All jobs, in the order in which they are started.

    Args:
        speech: the folder with the manifests.
        noise: a folder of audio.
        parallel: number of downstream runs in parallel in an evaluation.
    """
    jobs = [Job("init", "prepare", (("init", "."),))]
    jobs += _preparations(setting, speech)
    last = students(setting)[-1]  # of an ensemble, so its config has all teachers
    cache = ("cache", "-c", "configs/runner.yaml", "-g", f"configs/{last.row.name}.yaml")
    needs = ("init", "prepare-unlabeled")
    jobs.append(Job("cache", "cache", ((*cache, "-o", "cache"),), needs, "cache"))
    for seed in setting.seeds:
        of_seed = [student for student in students(setting) if student.seed == seed]
        jobs += [_distillation(student) for student in of_seed]
        needs = tuple(job.name for job in jobs if job.kind in ("prepare", *STUDENT_KINDS))
        command = superb_command(setting, of_seed, seed, noise, parallel)
        jobs.append(
            Job(
                f"evaluate-seed{seed}",
                "evaluate",
                (command,),
                needs,
                exclusive=True,
                students=tuple(of_seed),
            )
        )
    return jobs


def _preparations(setting: StudySetting, speech: Path) -> list[Job]:
    options = {
        "unlabeled": (),
        "pr": ("--lexicon", str(speech / "lexicon.txt"), "--replace"),
        "asr": ("--replace",),
        "sid": ("--test-seconds", f"{setting.sid_seconds:g}", "--replace"),
        "er": ("--replace", *(("--fold-column", "speaker") if setting.all_folds else ())),
    }
    folders = {"pr": "corpus_pr", "asr": "corpus"}  # as in the tiny recipes
    names = ("unlabeled", *(task for task in TASKS if task in setting.tasks))
    return [
        Job(
            f"prepare-{name}",
            "prepare",
            (
                ("prepare", name, str(speech / f"{name}.tsv"), "-o")
                + (f"data/{folders.get(name, name)}", *options[name]),
            ),
            output=f"data/{folders.get(name, name)}",
        )
        for name in names
    ]


def _distillation(student: StudyStudent) -> Job:
    run, file = f"result/pretrain/{student.name}", f"students/{student.name}.pt"
    kind, runner = ("start", "start") if student.row.learned_from == NONE else ("distil", "runner")
    pretrain = ("run_pretrain.py", "-u", "ekd", "-p", run, "-a", "-c", f"configs/{runner}.yaml")
    pretrain += ("-g", f"configs/{student.row.name}.yaml", "--seed", str(student.seed))
    pretrain += ("-o", "config.pretrain_expert.datarc.target_cache='cache'")
    export = ("export", "student", run, "-o", file, "--heads", "drop", "--force")
    return Job(f"{kind}-{student.name}", kind, (pretrain, export), ("init", "cache"), file)


def superb_command(
    setting: StudySetting, evaluated: Sequence[StudyStudent], seed: int, noise: Path, parallel: int
) -> tuple[str, ...]:
    """Arguments of ``s3prl-ekd superb`` for the students of a seed."""
    argv = ["superb", *(f"{s.name}=students/{s.name}.pt" for s in evaluated)]
    argv += ["--tasks", *setting.tasks, "--recipes", "tiny"]
    for task, steps in setting.tasks.items():
        argv += ["--steps", f"{task}={steps}", *DOWNSTREAM_OPTIONS.get(task, ())]
    argv += ["--noise", str(noise), "--snr", f"{setting.snr:g}", "--seeds", str(seed)]
    return (*argv, "--jobs", str(parallel), "--cache-features")


def finished_runs(
    folder: StudyFolder, job: Job, setting: StudySetting
) -> dict[tuple[str, str], float]:
    """(student, task) -> seconds, for the finished downstream runs of an evaluation."""
    finished = {}
    for student in job.students:
        for task in setting.tasks:
            seconds, unfinished = 0.0, 0
            for record in (folder.superb / student.name / task).glob("*/superb.json"):
                try:
                    run = json.loads(record.read_text(encoding="utf-8"))
                    seconds += run["seconds"]
                    unfinished += not run["finished"] or len(run["tested"]) < 2
                except (OSError, ValueError, KeyError, TypeError):
                    unfinished += 1
            if seconds and not unfinished:
                finished[student.name, task] = seconds
    return finished


def is_done(folder: StudyFolder, job: Job) -> bool:
    """Whether a job is finished and its output exists."""
    if folder.time_spent(job.name) is None:
        return False
    return not job.output or (folder.root / job.output).exists()
