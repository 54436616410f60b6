"""Report downstream runs as tables and plots, with bootstrap intervals.

DIR is a folder that `s3prl-ekd superb` wrote: its output (result/superb), or the folder of an
upstream, a task or a run in it. For each upstream and task the learning rate with the best dev
metric is reported. Prints Markdown, and writes report.md, report.csv and plots into FOLDER.

example:
  s3prl-ekd report result/superb
  s3prl-ekd report result/superb -o my_report --against fbank --published
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import SetupError

PLOTS = ("scores.png", "params.png", "noise.png")
FILES = ("report.md", "report.csv", *PLOTS)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add = parser.add_argument
    add("folders", metavar="DIR", type=Path, nargs="+")
    add("-o", "--output", metavar="FOLDER", type=Path, help="default: report/ in the first DIR")
    add("--against", metavar="UPSTREAM", help="add the differences of all upstreams to this one")
    add(
        "--resamples", metavar="N", type=int, default=10_000,
        help="number of bootstrap resamples (default: 10000)",
    )  # fmt: skip
    add("--published", action="store_true", help="add published results on SUPERB's public set")
    add("--force", action="store_true", help="overwrite files that this command did not write")


def main(args: argparse.Namespace) -> int:
    """Read the runs, print the report and write it; the exit code is 0."""
    from ..files.atomic import atomic_file, make_folder, write_text
    from ..superb.report import make_report
    from ..superb.report_plots import plots
    from ..superb.report_text import MARK, as_csv, as_markdown
    from ..superb.results import check_known_upstream, read_results, select_best_lr
    from ..system.figures import require_matplotlib

    if not 100 <= args.resamples <= 1_000_000:
        raise SetupError(f"--resamples must be from 100 to 1000000, got {args.resamples}")
    results = read_results(args.folders)
    folder = args.output or args.folders[0] / "report"
    _check_free(folder, MARK, args.force)
    if args.against is not None:
        selections = select_best_lr(results.runs, results.unfinished)
        check_known_upstream(args.against, dict.fromkeys(name for name, _ in selections))
    report = make_report(results, args.resamples)
    text = as_markdown(report, args.against, published=args.published)
    print(text.split("\n", 1)[1].lstrip())

    make_folder(folder, SetupError)
    write_text(folder / "report.md", text)
    write_text(folder / "report.csv", as_csv(report, args.against))
    for name in PLOTS:
        (folder / name).unlink(missing_ok=True)  # remove plots of an earlier report
    written = ["report.md", "report.csv"]
    try:
        require_matplotlib()
        for name, draw in plots(report, published=args.published).items():
            with atomic_file(folder / name) as file:
                draw(file)
            written.append(name)
    except SetupError as error:
        print(f"no plots: {error}")
    print(f"wrote {', '.join(str(folder / name) for name in written)}")
    return 0


def _check_free(folder: Path, mark: str, force: bool) -> None:
    existing = [folder / name for name in FILES if (folder / name).exists()]
    if not existing or force:
        return
    path = folder / "report.md"
    if not path.is_file() or not path.read_bytes().startswith(mark.encode()):
        raise SetupError(
            f"{existing[0]} exists and was not written by this command; choose another folder with "
            "-o, or add --force to overwrite it"
        )
