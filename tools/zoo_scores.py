"""Write the scores of the tiny teachers into their model cards, from what `superb` left.

Only what stands between the two marks of a card changes. Rows: the teacher, its random twin,
tiny_hubert beside the robust one, and fbank (for SID and ER fbank_no_cmvn: fbank's mean over an
utterance is zero). Intervals are over test utterances and seeds, as in the study
(tools/study_parts/intervals.py). A condition under which not all were tested is left out. Needs the
extra analysis.

example, in a folder of `s3prl-ekd init` with the four tasks prepared (SID: --test-seconds 1), and
fold 3 of ESC-10 in esc10_fold3 (`cp SPEECH/esc10/*/3-*.flac esc10_fold3`), as tiny_robust_hubert
heard the other two:
  UPSTREAMS="tiny_hubert tiny_robust_hubert tiny_wavlm tiny_hubert_random tiny_wavlm_random fbank"
  NOISE="--noise esc10_fold3 --snr 5"
  s3prl-ekd superb $UPSTREAMS --recipes tiny --tasks pr --steps pr=1000 --lr pr=1e-2 \\
      --override "pr=config.downstream_expert.model.select='FrameLevel'" --seeds 1 2 3 $NOISE \\
      --cache-features
  s3prl-ekd superb $UPSTREAMS fbank_no_cmvn --recipes tiny --tasks sid er --steps sid=240 \\
      --steps er=160 --override "sid=config.downstream_expert.datarc.max_timestep=800000" \\
      --seeds 1 2 3 $NOISE --cache-features
  s3prl-ekd superb $UPSTREAMS --recipes tiny --tasks asr --steps asr=400 --lr asr=3e-3 \\
      --seeds 1 2 3 $NOISE --cache-features
  python tools/zoo_scores.py result/superb
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from marked_text import between
from study_parts.cells import METRICS, Metric, make_cells
from study_parts.intervals import BootstrapRates, bootstrap, mean_estimate, paired_difference
from study_parts.options import require_packages
from study_parts.words import format_estimate

from s3prl_ekd.errors import EkdError, SetupError
from s3prl_ekd.files.atomic import atomic_file
from s3prl_ekd.pretrain.sweep import markdown_table
from s3prl_ekd.superb.report import CLEAN, condition_title, sort_conditions
from s3prl_ekd.superb.results import SelectedRuns, incomplete, read_results, select_best_lr
from s3prl_ekd.teachers import zoo

BEGIN, END = "<!-- scores: tools/zoo_scores.py -->", "<!-- end of scores -->"
RANDOM_INIT_OF = {
    "tiny_hubert": "tiny_hubert_random",
    "tiny_robust_hubert": "tiny_hubert_random",
    "tiny_wavlm": "tiny_wavlm_random",
}


@dataclass(frozen=True)
class TeacherScores:
    """What is finished: (upstream, task) -> runs, (upstream, metric, condition) -> draws."""

    selections: dict[tuple[str, str], Selection]
    drawn: dict[tuple[str, str, str], BootstrapRates]

    def columns(self, name: str) -> list[tuple[Metric, str]]:
        """Metrics and conditions that every upstream with that task was tested in."""
        found = []
        for metric in METRICS:
            tested = [u for u, task in self.selections if task == metric.task]
            conditions = {c for _, key, c in self.drawn if key == metric.key}
            for condition in sort_conditions(conditions):
                if name in tested and all((u, metric.key, condition) in self.drawn for u in tested):
                    found.append((metric, condition))
        return found


def main(argv: list[str] | None = None) -> int:
    """0, or 2 after a sentence about what is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", metavar="RESULT_SUPERB", type=Path)
    parser.add_argument(
        "--cards", metavar="DIR", type=Path, default=zoo.card("tiny_hubert").parent,
        help="default: those of this package",
    )  # fmt: skip
    args = parser.parse_args(argv)
    try:
        require_packages()
        scores = read(args.results)
        sections = {name: section(scores, name) for name in zoo.TEACHERS}
        for name, text in sections.items():
            path = args.cards / f"{name}.md"
            write_between(path, text)
            print(path)
    except EkdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def read(folder: Path) -> TeacherScores:
    """All that is finished below ``folder``; what is not is said.

    Raises:
        DataError: nothing is, or predictions are damaged.
    """
    results = read_results([folder])
    for line in incomplete(results.runs, results.unfinished):
        print(f"left out: {line}", file=sys.stderr)
    selections = select_best_lr(results.runs, results.unfinished)
    drawn = {}
    for (upstream, task), selection in selections.items():
        seeds: dict[int, list] = {}
        for run in selection.runs:
            seeds.setdefault(run.seed, []).append(run)
        for metric in METRICS:
            if metric.task == task:
                for cell in make_cells(upstream, metric, seeds):
                    drawn[upstream, metric.key, cell.condition] = bootstrap(cell)
    return TeacherScores(selections, drawn)


def section(scores: TeacherScores, name: str) -> str:
    """The tables of one teacher: its scores beside others, and what it is better than.

    Raises:
        SetupError: it has no finished run, or the others were not run like it.
    """
    others = [RANDOM_INIT_OF[name], *(["tiny_hubert"] if name == "tiny_robust_hubert" else [])]
    others += ["fbank", "fbank_no_cmvn"]
    columns = scores.columns(name)
    if not columns:
        raise SetupError(f"the results have no finished run of {name}; evaluate it first")
    tasks = list(dict.fromkeys(metric.task for metric, _ in columns))
    runs = "; ".join(_run(scores, name, others, task) for task in tasks)
    head = [_title(*column) for column in columns]
    table, less = [["", *head]], [["less", *head]]
    for row in (name, *others):
        draws = [scores.drawn.get((row, metric.key, c)) for metric, c in columns]
        if any(draws):
            table.append([row, *(_score(found) for found in draws)])
        if any(draws) and row != name:
            own = [scores.drawn[name, metric.key, c] for metric, c in columns]
            less.append([row, *map(_difference, own, draws)])
    return "\n\n".join(
        (
            f"Runs: {runs}. Per cent, mean over the seeds ± their standard deviation; in brackets "
            "its 95 % interval over other test utterances (bootstrap) and other seeds of the "
            "downstream training (Student's t, wide with so few).",
            markdown_table(table),
            f"{name} less another, paired by seed and utterance:",
            markdown_table(less),
        )
    )


def _title(metric: Metric, condition: str) -> str:
    return metric.title + ("" if condition == CLEAN else f", {condition_title(condition)}")


def _score(draws: BootstrapRates | None) -> str:
    if draws is None:
        return "–"
    estimate = mean_estimate(draws)
    several = len(estimate.by_seed) > 1
    return format_estimate(estimate) + (
        f" ±{statistics.stdev(estimate.by_seed):.1f}" if several else ""
    )


def _difference(one: BootstrapRates, other: BootstrapRates | None) -> str:
    found = paired_difference(one, other) if other is not None else None
    return "–" if found is None else format_estimate(found, sign=True)


def _run(scores: TeacherScores, name: str, others: list[str], task: str) -> str:
    """How the runs of a task were made, all alike."""
    facts = {
        (row, run.steps, Path(run.recipe).as_posix(), run.features_alone, chosen.seeds, run.lr)
        for row in (name, *others)
        if (chosen := scores.selections.get((row, task))) is not None
        for run in chosen.runs
    }
    own = next(fact[1:] for fact in facts if fact[0] == name)
    for row, *fact in facts:
        if tuple(fact[:-1]) != own[:-1]:  # the learning rate is each one's own, chosen by dev
            raise SetupError(
                f"{row} was not run on {task} as {name} was: its steps, recipe, features or seeds "
                "are others; run it alike, or take it out of the results"
            )
    steps, recipe, _, seeds, lr = own
    return (
        f"{task.upper()} {steps} steps of {recipe}, learning rate {lr:g}, "
        f"seed{'s' * (len(seeds) > 1)} {' '.join(map(str, seeds))}"
    )


def write_between(path: Path, text: str) -> None:
    """Put ``text`` between the marks of a card.

    Raises:
        SetupError: the card or its marks are not there.
    """
    if not path.is_file():
        raise SetupError(f"there is no card {path}")
    card = between(path.read_text(encoding="utf-8"), BEGIN, END, text, path)
    with atomic_file(path) as file:
        file.write(card.encode())


if __name__ == "__main__":
    raise SystemExit(main())
