"""Write the scores of the tiny teachers into their model cards, from what `superb` left.

Only what stands between the two marks of a card changes. Rows: the teacher, its random twin,
tiny_hubert beside the robust one, and fbank (for SID and ER fbank_no_cmvn: fbank's mean over an
utterance is zero).

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
import sys
from pathlib import Path

from marked_text import between

from s3prl_ekd import zoo
from s3prl_ekd.atomic import whole_file
from s3prl_ekd.errors import EkdError, SetupError
from s3prl_ekd.evaluate.report import CLEAN, Report
from s3prl_ekd.evaluate.report_text import with_interval

BEGIN, END = "<!-- scores: tools/zoo_scores.py -->", "<!-- end of scores -->"
TWIN_OF = {
    "tiny_hubert": "tiny_hubert_random",
    "tiny_robust_hubert": "tiny_hubert_random",
    "tiny_wavlm": "tiny_wavlm_random",
}


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
        report = read(args.results)
        for name in zoo.TEACHERS:
            path = args.cards / f"{name}.md"
            write_between(path, section(report, name))
            print(path)
    except EkdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def read(folder: Path) -> Report:
    """The report on all that is finished below ``folder``.

    Raises:
        DataError: nothing is, or predictions are damaged.
    """
    from s3prl_ekd.evaluate.report import make_report
    from s3prl_ekd.evaluate.results import read_results

    return make_report(read_results([folder]))


def section(report: Report, name: str) -> str:
    """The tables of one teacher: its scores beside others, and what it is better than."""
    from s3prl_ekd.evaluate.matrix import markdown
    from s3prl_ekd.evaluate.tasks import TASKS

    twin = TWIN_OF[name]
    rows = [name, twin, *(["tiny_hubert"] if name == "tiny_robust_hubert" else [])]
    rows += ["fbank", "fbank_no_cmvn"]
    columns = [(t, c) for t in report.tasks for c in report.conditions]
    columns = [key for key in columns if (name, *key) in report.measures]
    if not columns:
        raise SetupError(f"the results have no finished run of {name}; evaluate it first")
    head = ["", *(f"{TASKS[t].title}{'' if c == CLEAN else ', ' + c}" for t, c in columns)]
    lines = [head]
    for row in rows:
        cells = [_score(report, row, *key) for key in columns]
        if any(cells):
            lines.append([row, *(cell or "–" for cell in cells)])
    others = [row for row in rows[1:] if row in report.upstreams]
    differences = [["less", *head[1:]]]
    for other in others:
        cells = [_difference(report, name, other, *key) for key in columns]
        if any(cells):
            differences.append([other, *(cell or "–" for cell in cells)])
    steps = ", ".join(_run(report, name, task) for task in report.tasks)
    return "\n\n".join(
        (
            f"Runs: {steps}. Per cent, mean over seeds; in brackets a 95 % interval, a bootstrap "
            "over test utterances; ± standard deviation over seeds.",
            markdown(lines),
            f"{name} less another, on the same utterances:",
            markdown(differences),
        )
    )


def _score(report: Report, upstream: str, task: str, condition: str) -> str:
    found = report.measures.get((upstream, task, condition))
    if found is None:
        return ""
    spread = "" if found.deviation is None else f" ±{found.deviation:.1f}"
    return with_interval(found.value, *found.interval, digits=1) + spread


def _difference(report: Report, one: str, other: str, task: str, condition: str) -> str:
    d = report.difference(one, other, task, condition)
    return "" if d is None else with_interval(d.value, d.low, d.high, digits=1, signed=True)


def _run(report: Report, upstream: str, task: str) -> str:
    chosen = report.selections.get((upstream, task))
    if chosen is None:
        return f"{task.upper()} none"
    run = chosen.runs[0]
    seeds = sorted({each.seed for each in chosen.runs})
    return (
        f"{task.upper()} {run.steps} steps of {Path(run.recipe).as_posix()}, learning rate "
        f"{run.lr:g}, seed{'s' * (len(seeds) > 1)} {' '.join(map(str, seeds))}"
    )


def write_between(path: Path, text: str) -> None:
    """Put ``text`` between the marks of a card.

    Raises:
        SetupError: the card or its marks are not there.
    """
    if not path.is_file():
        raise SetupError(f"there is no card {path}")
    card = between(path.read_text(encoding="utf-8"), BEGIN, END, text, path)
    with whole_file(path) as file:
        file.write(card.encode())


if __name__ == "__main__":
    raise SystemExit(main())
