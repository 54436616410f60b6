"""Check a package for SUPERB's hidden set: the official checks, and more.

First the files are read without running them. Then expert.py is imported and run in a separate
process, which has torch but not s3prl, fairseq or s3prl_ekd; an empty home folder; few of your
environment variables (no tokens); a time limit; and, on most Linux systems, no network. No code in
model.pt is executed. The process returns only outputs; the checks run outside of it. At the end it
is killed with all processes that it has started.

Not prevented: the package runs as your user. It can read and change your files, use memory, disk
and GPU, and return outputs that its model did not compute. Validate only code that you would run
anyway; run a stranger's package in a container (docs/security.md).

`*` marks the official checks. The exit code is 1 if a check fails, else 0; warnings do not count.

example:
  s3prl-ekd validate my_package
  s3prl-ekd validate another_package --json report.json --timeout 1800
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SetupError, printable

if TYPE_CHECKING:
    from ..export.hidden_set.outcome import CheckOutcome


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``validate``."""
    parser.add_argument("package", metavar="DIR", type=Path)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the report as JSON")
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=float,
        default=600.0,
        help="limit for all checks that run the package (default: 600)",
    )
    parser.add_argument(
        "--librispeech",
        metavar="DIR",
        type=Path,
        help="read the utterance lengths for MACs from this LibriSpeech test-clean (default: "
        "built-in lengths)",
    )


def main(args: argparse.Namespace) -> int:
    """Print a line for each check; return 1 if one failed, else 0."""
    from ..export.hidden_set.sandbox import validate
    from ..files.report_file import check_report, json_begin, write_report
    from ..superb.cost import LENGTHS, librispeech_lengths

    if not args.timeout > 0:
        raise SetupError(f"--timeout must be above 0 seconds, got {args.timeout:g}")
    if args.json is not None:
        check_report(args.json, json_begin("package"))
    lengths = librispeech_lengths(args.librispeech) if args.librispeech else LENGTHS
    results, cost = validate(args.package, lengths, args.timeout, _print)
    counts = Counter(result.status for result in results)
    failed = [result.name for result in results if result.status == "fail"]
    print(
        f"{counts['pass']} passed, {counts['fail']} failed, {counts['warn']} warnings, "
        f"{counts['skip']} skipped" + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    if args.json is not None:
        checks = [{**asdict(result), "official": result.official} for result in results]
        report = {"package": args.package.resolve().name, "ok": not failed, "checks": checks}
        write_report(args.json, {**report, "cost": cost})
    return 1 if failed else 0


def _print(result: CheckOutcome) -> None:
    status = result.status.upper() if result.status == "fail" else result.status
    mark = "*" if result.official else " "
    print(f"{status:4} {mark} {result.name:12}  {printable(result.reason)}", flush=True)
