"""``s3prl-ekd demo``: the commands of the README in order on synthesised speech, and a summary."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..downstream.tasks import TASKS
from ..errors import SetupError
from ..files.run_checkpoints import newest_checkpoint, read_checkpoint
from ..pretrain.tensorboard import plot_run, read_scalars, teacher_curves
from ..superb.report import CLEAN, Difference, Report, make_report
from ..superb.report_text import with_interval
from ..superb.results import read_results
from ..system.jobs import child_command, child_environment
from ..teachers.zoo import TEACHERS
from ..workspace import write_workspace
from .corpus import make_corpus
from .labels import make_labels

SINGLE = "tiny/single_hubert"
STUDENTS = {"ekd": "tiny_model", "single": SINGLE}  # and their model configs
TWIN = "tiny_hubert_random"
# The rows of the last table, and which of them are compared.
UPSTREAMS = ("fbank", TWIN, *TEACHERS, "single", "ekd")
PAIRS = (
    *((teacher, TWIN) for teacher in TEACHERS),
    ("single", TWIN),
    ("ekd", TWIN),
    ("ekd", "single"),
    ("ekd", TEACHERS[0]),
)
NOTE = f"""\
{TWIN} is tiny_hubert's architecture with random weights; single is the student of
tiny_hubert alone, ekd that of all three teachers. fbank scores chance on SID and ER: its mean over
an utterance is zero. Upstreams whose difference has zero in its 95 % interval are not told apart;
the intervals are over test utterances, for one seed:"""
CACHE = "cache"  # the teachers' targets, for both students
# Of --downstream-steps, what each task takes: a linear probe's steps cost least.
SHARES = {"pr": 2.0, "sid": 0.5, "er": 0.5, "asr": 1.1}


def score_table(report: Report, order: Sequence[str]) -> list[tuple[str, ...]]:
    """Rows of text with a head: each upstream's metric on each task with its 95 % interval.

    Args:
        report: of the demo's runs.
        order: the upstreams, first row first; those that were not tested are left out.
    """
    rows = [("", *(TASKS[task].title for task in report.tasks))]
    for name in order:
        if name not in report.upstreams:
            continue
        cells = []
        for task in report.tasks:
            found = report.metrics.get((name, task, CLEAN))
            cells.append(with_interval(found.value, *found.interval, digits=1) if found else "")
        rows.append((name, *cells))
    return rows


def findings(report: Report, pairs: Iterable[tuple[str, str]]) -> list[str]:
    """A line for each pair of upstreams that were both tested: on which tasks the first is better.

    ``tiny_hubert against fbank: better on PR (-12.3), not told apart on ASR (+0.1)``

    Args:
        report: of the demo's runs.
        pairs: (one, other).
    """
    lines = []
    for one, other in pairs:
        said: dict[str, list[str]] = {"better": [], "worse": [], "not told apart": []}
        for task in report.tasks:
            difference = report.difference(one, other, task, CLEAN)
            if difference is not None:
                word = verdict(difference, higher=TASKS[task].higher_is_better)
                said[word].append(f"{task.upper()} ({difference.value:+.1f})")
        parts = [f"{word} on {', '.join(tasks)}" for word, tasks in said.items() if tasks]
        if parts:
            lines.append(f"{one} against {other}: {'; '.join(parts)}")
    return lines


def verdict(difference: Difference, *, higher: bool) -> str:
    """``better``, ``worse``, or ``not told apart`` where the 95 % interval has 0 in it.

    Args:
        difference: one less another.
        higher: whether more is better.
    """
    if difference.low <= 0 <= difference.high:
        return "not told apart"
    return "better" if (difference.value > 0) == higher else "worse"


@dataclass
class Demo:
    """One demo in one folder. Each step may be repeated: what is finished is kept.

    Args:
        folder: the workspace; everything is written below it.
        steps: steps of each distillation.
        downstream_steps: steps of a downstream model, times the task's share (:data:`SHARES`).
        utterances: training utterances of the synthetic corpus.
        tasks: the tasks to evaluate.
    """

    folder: Path
    steps: int = 200
    downstream_steps: int = 120
    utterances: int = 400
    tasks: Sequence[str] = tuple(TASKS)
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self) -> None:
        """Do all of it and print the summary.

        Raises:
            SetupError: a command of the way failed; it has said why.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        steps = (
            ("synthesise a speech corpus", self._corpus),
            ("set up the working folder", self._workspace),
            ("run the three teachers over the corpus, once", self._targets),
            ("distil the three teachers into one student", lambda: self._distil("ekd")),
            ("distil one teacher alone, to compare", lambda: self._distil("single")),
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

    # The steps

    def _corpus(self) -> None:
        corpus, labels = self.folder / "data" / "corpus", self.folder / "data" / "labels"
        record = make_corpus(
            corpus, utterances={"train-clean": self.utterances, "dev-clean": 40, "test-clean": 40}
        )
        make_labels(corpus, labels, moods=max(4, self.utterances // 10))
        for split, facts in record["splits"].items():
            minutes = facts["seconds"] / 60
            print(
                f"{split}: {facts['utterances']} utterances, {minutes:.1f} min, "
                f"{len(facts['speakers'])} voices"
            )
        for task, root in (("sid", "data/corpus"), ("er", "data/labels")):
            if not (self.folder / "data" / task).is_dir():
                self._command(
                    f"prepare {task} data/labels/{task}.tsv --audio-root {root} -o data/{task}"
                )

    def _workspace(self) -> None:
        states = [state for state, _ in write_workspace(self.folder, [SINGLE])]
        print(f"{states.count('created')} files created, {states.count('kept')} kept")

    def _targets(self) -> None:
        self._command(
            "cache -c pretrain/ekd/tiny_runner.yaml -g pretrain/ekd/tiny_model.yaml -o", CACHE
        )

    def _distil(self, name: str) -> None:
        every = max(1, self.steps // 3)
        run, config = self._run(name), STUDENTS[name]
        if (step := self._step(run)) >= self.steps:
            print(f"kept: {run} is at step {step} already")
        else:
            self._command(
                f"run_pretrain.py -u ekd -a -n {name} -c pretrain/ekd/tiny_runner.yaml "
                f"-g pretrain/ekd/{config}.yaml -o",
                f"config.runner.total_steps={self.steps},,config.runner.save_step={every}"
                f",,config.runner.log_step={max(1, self.steps // 30)}"
                f",,config.pretrain_expert.datarc.target_cache='{CACHE}'",
            )
        self._command(f"export student result/pretrain/{name} -o {name}.safetensors --force")

    @staticmethod
    def _step(folder: Path) -> int:
        """The step of the newest checkpoint in a run's folder; 0 where there is none."""
        latest = newest_checkpoint(folder) if folder.is_dir() else None
        return 0 if latest is None else read_checkpoint(latest)["Step"]

    def _superb(self) -> None:
        expert = "config.downstream_expert"
        phones = ",,".join(
            (
                f"{expert}.corpus.path='./data/corpus'",
                f"{expert}.corpus.lexicon=['./data/labels/lexicon.txt']",
                f"{expert}.model.select='FrameLevel'",  # SUPERB's own probe: linear
            )
        )
        own = [f"{name}.safetensors" if name in STUDENTS else name for name in UPSTREAMS]
        words = [*own, "--recipes", "tiny", "--cache-features"]
        words += ["--tasks", *self.tasks, "--override", f"pr={phones}", "--lr", "pr=1e-2"]
        for task in self.tasks:
            words += ["--steps", f"{task}={round(SHARES[task] * self.downstream_steps)}"]
        jobs = min(4, os.cpu_count() or 1)
        self._command("superb", *words, "--jobs", str(jobs))

    def _report(self) -> None:
        self._command("report result/superb -o report --against", TWIN)

    def _package(self) -> None:
        self._command("export superb ekd.safetensors -o submission --force")
        self._command("validate submission")

    # The rest

    def _run(self, name: str) -> Path:
        return self.folder / "result" / "pretrain" / name

    def _command(self, text: str, *more: str) -> None:
        """Run one of our commands in the folder, shown as a user would type it.

        Args:
            text: its words.
            more: words that may hold spaces or quotes.
        """
        words = [*text.split(), *more]
        shown = shlex.join(words)
        print(f"$ {shown if shown.startswith('run_') else f's3prl-ekd {shown}'}", flush=True)
        done = subprocess.run(child_command(words), cwd=self.folder, env=child_environment())
        if done.returncode:
            raise SetupError(
                f"the command above ended with exit code {done.returncode}; mend what it says and "
                "start the demo again: finished steps are kept"
            )

    def _scores(self) -> list[str]:
        """The lines of the last table and of what it says."""
        report = self._read_report()
        return [
            *_aligned(score_table(report, UPSTREAMS)),
            "",
            NOTE,
            *(f"  {line}" for line in findings(report, PAIRS)),
        ]

    def _read_report(self) -> Report:
        return make_report(read_results([self.folder / "result" / "superb"]))

    def _summary(self) -> None:
        scalars = read_scalars(self._run("ekd"))
        plot = self.folder / "distillation.png"
        loss = list(scalars["ekd/train-loss_mean"].values())
        rows = [("loss", loss[0], loss[-1])]
        for teacher, layers in teacher_curves(scalars).items():
            for layer, points in layers.items():
                values = list(points.values())
                rows.append((f"L1 to {teacher}, layer {layer}", values[0], values[-1]))
        print("\n== done")
        _table(("distillation", "first", "last"), rows, "{:.4f}".format)
        print()
        _table(("time", "s"), list(self.seconds.items()), "{:.0f}".format)
        try:
            plot_run(scalars, plot)
            drawn = f"  {plot}    the curves of the distillation\n"
        except SetupError as error:
            drawn = f"  (no plot: {error})\n"
        print("\n" + "\n".join(self._scores()))
        print(
            f"\nwhere things are:\n{drawn}"
            f"  {self.folder / 'report'}    report.md, report.csv and the plots of the scores\n"
            f"  {self.folder / 'submission'}    the package for SUPERB's hidden set\n"
            f"  {self.folder / 'ekd.safetensors'}    the student, for -u ekd_student\n"
            f"  {self._run('ekd')}    checkpoints and TensorBoard of the distillation\n"
            f"  {self.folder / 'result' / 'superb'}    the downstream models and predictions\n"
            f"  {self.folder / 'pretrain' / 'ekd'}    the configs: yours to change\n"
            f"\nnext, with your own teachers and corpus:\n"
            f"  s3prl-ekd init my_work && cd my_work\n"
            f"  s3prl-ekd length-tables AUDIO_FOLDER -o data/len_for_bucket\n"
            f"  (edit pretrain/ekd/config_model.yaml and config_runner.yaml)\n"
            f"  run_pretrain.py -u ekd -n my_student"
        )


def _table(head: tuple[str, ...], rows: list[tuple], number: Callable[[float], str]) -> None:
    print("\n".join(_aligned([head, *((row[0], *map(number, row[1:])) for row in rows)])))


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *others in cells:
        more = "".join(f"  {c:>{w}}" for c, w in zip(others, widths[1:], strict=True))
        lines.append(first.ljust(widths[0]) + more)
    return lines
