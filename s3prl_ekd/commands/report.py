"""Tables and plots of downstream runs, with bootstrap intervals, from their prediction files.

DIR is what `s3prl-ekd superb` has written: its root (result/superb), or the folder of an upstream,
a task or a run; several may be given. For each upstream and task the learning rate that is best on
dev is taken. Prints Markdown and writes report.md, report.csv and plots into FOLDER.

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
    parser.add_argument("folders", metavar="DIR", type=Path, nargs="+")
    parser.add_argument(
        "-o", "--output", metavar="FOLDER", type=Path, help="default: report in the first DIR"
    )
    parser.add_argument(
        "--against", metavar="UPSTREAM", help="also every upstream's difference to this one"
    )
    parser.add_argument(
        "--resamples",
        metavar="N",
        type=int,
        default=10_000,
        help="bootstrap resamples (default: 10000)",
    )
    parser.add_argument(
        "--published", action="store_true", help="also published rows of SUPERB's public set"
    )
    parser.add_argument(
        "--force", action="store_true", help="write over files that no report has written"
    )


def main(args: argparse.Namespace) -> int:
    """Read, measure, print, write; see the module's text."""
    from ..analysis.plots import require_matplotlib
    from ..files.atomic import make_folder, whole_file
    from ..superb.report import make_report
    from ..superb.report_plots import plots
    from ..superb.report_text import MARK, as_csv, as_markdown
    from ..superb.results import check_upstream, read_results, select

    if not 100 <= args.resamples <= 1_000_000:
        raise SetupError(f"--resamples is {args.resamples}; 100 to 1000000 is allowed")
    results = read_results(args.folders)
    folder = args.output or args.folders[0] / "report"
    _check_free(folder, MARK, args.force)
    if args.against is not None:
        check_upstream(
            args.against,
            dict.fromkeys(name for name, _ in select(results.runs, results.unfinished)),
        )
    report = make_report(results, args.resamples)
    text = as_markdown(report, args.against, published=args.published)
    print(text.split("\n", 1)[1].lstrip())

    make_folder(folder, SetupError)
    with whole_file(folder / "report.md") as file:
        file.write(text.encode())
    with whole_file(folder / "report.csv") as file:
        file.write(as_csv(report, args.against).encode())
    for name in PLOTS:
        (folder / name).unlink(missing_ok=True)  # none may be left of an earlier report
    written = ["report.md", "report.csv"]
    try:
        require_matplotlib()
        for name, draw in plots(report, published=args.published).items():
            with whole_file(folder / name) as file:
                draw(file)
            written.append(name)
    except SetupError as error:
        print(f"no plots: {error}")
    print(f"wrote {', '.join(str(folder / name) for name in written)}")
    return 0


def _check_free(folder: Path, mark: str, force: bool) -> None:
    there = [folder / name for name in FILES if (folder / name).exists()]
    if not there or force:
        return
    try:
        with open(folder / "report.md", encoding="utf-8") as file:
            ours = file.readline().strip() == mark
    except (OSError, UnicodeDecodeError):
        ours = False
    if not ours:
        raise SetupError(
            f"{there[0]} was not written by this command; choose another folder with -o, or add "
            "--force to write over it"
        )
