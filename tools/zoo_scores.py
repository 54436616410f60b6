"""Write results of `s3prl-ekd superb` for the tiny teachers into their model cards.

Only the text between the two marks of a card changes. Rows: the teacher, its random initialisation,
tiny_hubert (in the card of tiny_robust_hubert), and fbank (fbank_no_cmvn for SID and ER, since the
mean of fbank over an utterance is zero). Intervals are over test utterances and seeds, see
tools/scores/intervals.py. Test conditions that an upstream lacks are skipped. Needs
the extra analysis.

example, in a folder of `s3prl-ekd init` with the four tasks prepared (SID: --test-seconds 1), and
fold 3 of ESC-10 in esc10_fold3 (`cp SPEECH/esc10/*/3-*.flac esc10_fold3`; tiny_robust_hubert was
trained on the other two folds):
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
from scores.cells import METRICS, Metric, make_cells
from scores.intervals import (
    BootstrapRates,
    Estimate,
    bootstrap,
    mean_estimate,
    paired_difference,
)

from s3prl_ekd.errors import EkdError, SetupError
from s3prl_ekd.files.atomic import atomic_file
from s3prl_ekd.superb.report import condition_title, sort_conditions
from s3prl_ekd.superb.report_text import with_interval
from s3prl_ekd.superb.results import CLEAN, SelectedRuns, incomplete, read_results, select_best_lr
from s3prl_ekd.system.tables import markdown_table
from s3prl_ekd.teachers import zoo

BEGIN, END = "<!-- scores: tools/zoo_scores.py -->", "<!-- end of scores -->"
RANDOM_INIT_OF = {
    "tiny_hubert": "tiny_hubert_random",
    "tiny_robust_hubert": "tiny_hubert_random",
    "tiny_wavlm": "tiny_wavlm_random",
}


@dataclass(frozen=True)
class TeacherScores:
    """Finished results.

    Attributes:
        selections: (upstream, task) -> runs with the best learning rate.
        rates: (upstream, metric's key, condition) -> bootstrap rates.
    """

    selections: dict[tuple[str, str], SelectedRuns]
    rates: dict[tuple[str, str, str], BootstrapRates]

    def columns(self, name: str) -> list[tuple[Metric, str]]:
        """Metrics and conditions with results of every upstream that has the task."""
        columns = []
        for metric in METRICS:
            tested = [u for u, task in self.selections if task == metric.task]
            conditions = {c for _, key, c in self.rates if key == metric.key}
            for condition in sort_conditions(conditions):
                if name in tested and all((u, metric.key, condition) in self.rates for u in tested):
                    columns.append((metric, condition))
        return columns


def main(argv: list[str] | None = None) -> int:
    """Run the command; return 0, or 2 for a user's error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "results", metavar="RESULT_SUPERB", type=Path, help="results of s3prl-ekd superb"
    )
    parser.add_argument(
        "--cards", metavar="DIR", type=Path, default=zoo.card("tiny_hubert").parent,
        help="folder of the cards (default: those of this package)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    try:
        scores = read_scores(args.results)
        sections = {name: section(scores, name) for name in zoo.TEACHERS}
        for name, text in sections.items():
            path = args.cards / f"{name}.md"
            write_between(path, text)
            print(path)
    except EkdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def read_scores(folder: Path) -> TeacherScores:
    """Read all finished runs below ``folder``; report unfinished ones on stderr.

    Raises:
        DataError: no run is finished, or predictions are damaged.
    """
    results = read_results([folder])
    for line in incomplete(results.runs, results.unfinished):
        print(f"skipped: {line}", file=sys.stderr)
    selections = select_best_lr(results.runs, results.unfinished)
    rates = {}
    for (upstream, task), selection in selections.items():
        seeds: dict[int, list] = {}
        for run in selection.runs:
            seeds.setdefault(run.seed, []).append(run)
        for metric in METRICS:
            if metric.task == task:
                for cell in make_cells(upstream, metric, seeds):
                    rates[upstream, metric.key, cell.condition] = bootstrap(cell)
    return TeacherScores(selections, rates)


def section(scores: TeacherScores, name: str) -> str:
    """Make the section of a card: the scores, and the differences to the other upstreams.

    Raises:
        SetupError: the teacher has no finished run, or others were run with other settings.
    """
    baselines = [RANDOM_INIT_OF[name], *(["tiny_hubert"] if name == "tiny_robust_hubert" else [])]
    baselines += ["fbank", "fbank_no_cmvn"]
    columns = scores.columns(name)
    if not columns:
        raise SetupError(
            f"no finished run of {name} in the results; run s3prl-ekd superb {name} first"
        )
    tasks = list(dict.fromkeys(metric.task for metric, _ in columns))
    runs = "; ".join(_run_settings(scores, name, baselines, task) for task in tasks)
    head = [_title(*column) for column in columns]
    table, less = [["", *head]], [["less", *head]]
    for row in (name, *baselines):
        row_rates = [scores.rates.get((row, metric.key, c)) for metric, c in columns]
        if any(row_rates):
            table.append([row, *(_score(rates) for rates in row_rates)])
        if any(row_rates) and row != name:
            of_teacher = [scores.rates[name, metric.key, c] for metric, c in columns]
            less.append([row, *map(_difference, of_teacher, row_rates)])
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


def _score(rates: BootstrapRates | None) -> str:
    if rates is None:
        return "–"
    estimate = mean_estimate(rates)
    if len(estimate.by_seed) == 1:
        return _text(estimate)
    return f"{_text(estimate)} ±{statistics.stdev(estimate.by_seed):.1f}"


def _difference(a: BootstrapRates, b: BootstrapRates | None) -> str:
    estimate = paired_difference(a, b) if b is not None else None
    return "–" if estimate is None else _text(estimate, signed=True)


def _text(estimate: Estimate, signed: bool = False) -> str:
    """An estimate as ``45.1 [43.0, 47.2]``."""
    return with_interval(estimate.value, estimate.low, estimate.high, digits=1, signed=signed)


def _run_settings(scores: TeacherScores, name: str, baselines: list[str], task: str) -> str:
    """Describe the settings of the runs of a task, which must be the same for all upstreams."""
    settings = {
        (row, run.steps, Path(run.recipe).as_posix(), run.features_alone, selection.seeds, run.lr)
        for row in (name, *baselines)
        if (selection := scores.selections.get((row, task))) is not None
        for run in selection.runs
    }
    selections = (scores.selections.get((row, task)) for row in (name, *baselines))
    digests = {selection.recipe_digest for selection in selections if selection is not None}
    if len(digests - {None}) > 1:
        raise SetupError(
            f"{task}: {name} and {', '.join(baselines)} differ in settings of the recipe "
            "(--override, an edited YAML) or in the prepared corpus; run all with the same settings"
        )
    expected = next(values for row, *values in settings if row == name)
    for row, *values in settings:
        if values[:-1] != expected[:-1]:  # except the learning rate, chosen on dev for each
            raise SetupError(
                f"{task}: {row} and {name} differ in steps, recipe, features or seeds; run both "
                f"with the same settings, or move {row} out of the results"
            )
    steps, recipe, _, seeds, lr = expected
    return (
        f"{task.upper()} {steps} steps of {recipe}, learning rate {lr:g}, "
        f"seed{'s' * (len(seeds) > 1)} {' '.join(map(str, seeds))}"
    )


def write_between(path: Path, text: str) -> None:
    """Replace the text between the marks of a card.

    Raises:
        SetupError: the card or its marks are missing.
    """
    if not path.is_file():
        raise SetupError(f"no such card: {path}")
    card = between(path.read_text(encoding="utf-8"), BEGIN, END, text, path)
    with atomic_file(path) as file:
        file.write(card.encode())


if __name__ == "__main__":
    raise SystemExit(main())
