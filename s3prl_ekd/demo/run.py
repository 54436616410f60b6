"""``s3prl-ekd demo``: run the commands of the README on synthetic speech, print a summary."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..downstream.tasks import COLUMNS
from ..errors import SetupError
from ..files.run_checkpoints import newest_step
from ..pretrain.curves import plot_run, read_scalars, teacher_curves
from ..superb.report import Difference, Report, make_report
from ..superb.report_text import with_interval
from ..superb.results import CLEAN, read_results
from ..system.jobs import Jobs, typed
from ..system.tables import text_table
from ..teachers.zoo import TEACHERS
from ..workspace import write_workspace
from .corpus import make_corpus, read_record
from .labels import make_labels

SINGLE = "tiny/single_hubert"
STUDENTS = {"ekd": "tiny_model", "single": SINGLE}  # name -> model config
RANDOM_INIT = "tiny_hubert_random"
# Rows of the score table, and pairs of them to compare.
UPSTREAMS = ("fbank", RANDOM_INIT, *TEACHERS, "single", "ekd")
PAIRS = (
    *((teacher, RANDOM_INIT) for teacher in TEACHERS),
    ("single", RANDOM_INIT),
    ("ekd", RANDOM_INIT),
    ("ekd", "single"),
    ("ekd", TEACHERS[0]),
)
NOTE = f"""\
{RANDOM_INIT} is tiny_hubert's architecture with random weights; single is the student of
tiny_hubert alone, ekd the student of all three teachers. fbank scores at chance level on SID and
ER, because its mean over an utterance is zero. A difference is not significant if its 95 % interval
contains 0. Intervals are over test utterances, for one seed:"""
STEPS = {"pr": 2.0, "sid": 0.5, "er": 0.5, "asr": 1.1}  # of a task, times those of the option
CACHE = "cache"  # cached targets of the teachers, for both students


def score_table(report: Report, order: Sequence[str]) -> list[tuple[str, ...]]:
    """A header and a row for each upstream: its metric on each task with a 95 % interval.

    ``order`` is that of the rows; upstreams without results are skipped.
    """
    rows = [("", *(COLUMNS[column].title for column in report.columns))]
    for name in order:
        if name not in report.upstreams:
            continue
        cells = []
        for column in report.columns:
            score = report.metrics.get((name, column, CLEAN))
            cells.append(with_interval(score.value, *score.interval, digits=1) if score else "")
        rows.append((name, *cells))
    return rows


def compare_upstreams(report: Report, pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Compare each upstream with its baseline, if both have results.

    ``tiny_hubert against fbank: better on PR (-12.3); not significant on ASR (+0.1)``
    """
    lines = []
    for upstream, baseline in pairs:
        tasks: dict[str, list[str]] = {"better": [], "worse": [], "not significant": []}
        for column in report.columns:
            difference = report.difference(upstream, baseline, column, CLEAN)
            if difference is not None:
                metric = COLUMNS[column].metric
                result = verdict(difference, higher=metric.higher_is_better)
                tasks[result].append(f"{column.upper()} ({difference.value:+.1f})")
        parts = [f"{result} on {', '.join(names)}" for result, names in tasks.items() if names]
        if parts:
            lines.append(f"{upstream} against {baseline}: {'; '.join(parts)}")
    return lines


def verdict(difference: Difference, *, higher: bool) -> str:
    """``better``, ``worse``, or ``not significant`` if the 95 % interval contains 0.

    ``higher``: whether a higher metric is better.
    """
    if difference.low <= 0 <= difference.high:
        return "not significant"
    return "better" if (difference.value > 0) == higher else "worse"


@dataclass
class Demo:
    """The demo in one folder. It can be restarted; finished steps are kept.

    Args:
        folder: the working folder; all files are written below it.
        steps: steps of each distillation.
        downstream_steps: steps of a downstream model, times the task's factor in :data:`STEPS`.
        utterances: training utterances of the synthetic corpus.
        tasks: tasks to evaluate.
    """

    folder: Path
    steps: int
    downstream_steps: int
    utterances: int
    tasks: Sequence[str]
    seconds: dict[str, float] = field(default_factory=dict, init=False)  # of each step

    def run(self) -> None:
        """Run all steps and print the summary."""
        self.folder.mkdir(parents=True, exist_ok=True)
        steps = (
            ("synthesise a speech corpus", self._corpus),
            ("set up the working folder", self._workspace),
            ("cache the targets of the three teachers", self._targets),
            ("distil the three teachers into one student", lambda: self._distil("ekd")),
            ("distil a single teacher, for comparison", lambda: self._distil("single")),
            ("train and evaluate " + ", ".join(map(str.upper, self.tasks)), self._superb),
            ("compare", self._report),
            ("pack the student for SUPERB's hidden set", self._package),
        )
        for number, (title, step) in enumerate(steps, start=1):
            print(f"\n== {number}/{len(steps)} {title}", flush=True)
            start = time.monotonic()
            step()
            self.seconds[title] = time.monotonic() - start
        self._summary()

    def _corpus(self) -> None:
        corpus, labels = self.folder / "data" / "corpus", self.folder / "data" / "labels"
        utterances = {"train-clean": self.utterances, "dev-clean": 40, "test-clean": 40}
        existing = read_record(corpus)
        if existing is not None and existing["parameters"].get("utterances") != utterances:
            raise SetupError(
                f"{self.folder} has the demo of another --utterances, whose targets and students "
                "would be kept; use another folder, or remove it"
            )
        record = make_corpus(corpus, utterances=utterances)
        make_labels(corpus, labels, moods=max(4, self.utterances // 10))
        for split, counts in record["splits"].items():
            minutes = counts["seconds"] / 60
            print(
                f"{split}: {counts['utterances']} utterances, {minutes:.1f} min, "
                f"{len(counts['speakers'])} voices"
            )
        for task, root in (("sid", "data/corpus"), ("er", "data/labels")):
            table = f"data/labels/{task}.tsv"
            self._command(f"prepare {task} {table} --audio-root {root} -o data/{task} --replace")

    def _workspace(self) -> None:
        states = [state for state, _ in write_workspace(self.folder, [SINGLE])]
        print(f"{states.count('created')} files created, {states.count('kept')} kept")

    def _targets(self) -> None:
        self._command(
            "cache -c pretrain/ekd/tiny_runner.yaml -g pretrain/ekd/tiny_model.yaml -o", CACHE
        )

    def _distil(self, name: str) -> None:
        save_step = max(1, self.steps // 3)
        run, config = self._run(name), STUDENTS[name]
        if (step := newest_step(run)) >= self.steps:
            print(f"kept: {run} is finished (step {step})")
        else:
            self._command(
                f"run_pretrain.py -u ekd -a -n {name} -c pretrain/ekd/tiny_runner.yaml "
                f"-g pretrain/ekd/{config}.yaml -o",
                f"config.runner.total_steps={self.steps},,config.runner.save_step={save_step}"
                f",,config.runner.log_step={max(1, self.steps // 30)}"
                f",,config.pretrain_expert.datarc.target_cache='{CACHE}'",
            )
        self._command(f"export student result/pretrain/{name} -o {name}.safetensors --force")

    def _superb(self) -> None:
        expert = "config.downstream_expert"
        phones = ",,".join(
            (
                f"{expert}.corpus.path='./data/corpus'",
                f"{expert}.corpus.lexicon=['./data/labels/lexicon.txt']",
                f"{expert}.model.select='FrameLevel'",  # SUPERB's linear probe
            )
        )
        upstreams = [f"{name}.safetensors" if name in STUDENTS else name for name in UPSTREAMS]
        argv = [*upstreams, "--recipes", "tiny", "--cache-features"]
        argv += ["--tasks", *self.tasks, "--override", f"pr={phones}", "--lr", "pr=1e-2"]
        for task in self.tasks:
            argv += ["--steps", f"{task}={round(STEPS[task] * self.downstream_steps)}"]
        jobs = min(4, os.cpu_count() or 1)
        self._command("superb", *argv, "--jobs", str(jobs))

    def _report(self) -> None:
        self._command("report result/superb -o report --against", RANDOM_INIT)

    def _package(self) -> None:
        self._command("export superb ekd.safetensors -o submission --force")
        self._command("validate submission")

    def _run(self, name: str) -> Path:
        return self.folder / "result" / "pretrain" / name

    def _command(self, text: str, *more: str) -> None:
        """Print a command as a user would type it, and run it in the folder."""
        argv = [*text.split(), *more]
        print(f"$ {typed(argv)}", flush=True)
        code = Jobs().call(argv, folder=self.folder)
        if code:
            raise SetupError(
                f"the command above failed with exit code {code}; fix the error that it printed "
                "and start the demo again: finished steps are kept"
            )

    def _scores(self) -> list[str]:
        """The lines of the score table and of the comparisons."""
        report = make_report(read_results([self.folder / "result" / "superb"]))
        comparisons = [f"  {line}" for line in compare_upstreams(report, PAIRS)]
        return [*text_table(score_table(report, UPSTREAMS)), "", NOTE, *comparisons]

    def _summary(self) -> None:
        scalars = read_scalars(self._run("ekd"))
        plot = self.folder / "distillation.png"
        loss = list(scalars["ekd/train-loss_mean"].values())
        rows = [("distillation", "first", "last"), _row("loss", loss)]
        for teacher, layers in teacher_curves(scalars).items():
            for layer, points in layers.items():
                rows.append(_row(f"L1 to {teacher}, layer {layer}", list(points.values())))
        print("\n== done")
        print("\n".join(text_table(rows)), end="\n\n")
        seconds = [(name, f"{value:.0f}") for name, value in self.seconds.items()]
        print("\n".join(text_table([("time", "s"), *seconds])))
        try:
            plot_run(scalars, plot)
            plot_line = f"  {plot}    curves of the distillation\n"
        except SetupError as error:
            plot_line = f"  (no plot: {error})\n"
        print("\n" + "\n".join(self._scores()))
        print(
            f"\noutput:\n{plot_line}"
            f"  {self.folder / 'report'}    report.md, report.csv and plots of the scores\n"
            f"  {self.folder / 'submission'}    package for SUPERB's hidden set\n"
            f"  {self.folder / 'ekd.safetensors'}    student, for -u ekd_student\n"
            f"  {self._run('ekd')}    checkpoints and TensorBoard of the distillation\n"
            f"  {self.folder / 'result' / 'superb'}    downstream models and predictions\n"
            f"  {self.folder / 'pretrain' / 'ekd'}    configs, which you can edit\n"
            f"\nnext, with your teachers and corpus:\n"
            f"  s3prl-ekd init my_work && cd my_work\n"
            f"  s3prl-ekd length-tables AUDIO_FOLDER -o data/len_for_bucket\n"
            f"  (edit pretrain/ekd/config_model.yaml and config_runner.yaml)\n"
            f"  run_pretrain.py -u ekd -n my_student"
        )


def _row(label: str, values: Sequence[float]) -> tuple[str, str, str]:
    return label, f"{values[0]:.4f}", f"{values[-1]:.4f}"
