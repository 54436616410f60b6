"""Check a package for SUPERB's hidden set: what the organisers check, and what they may meet.

First the folder is read. Then its expert.py is imported and run, in a process of its own that has
torch but neither s3prl, fairseq nor s3prl_ekd, a home that is empty, few of your environment's
variables (no tokens), a time limit, and on most Linux systems no network; nothing is executed out
of model.pt. The process gives outputs only: all checks of them are made outside of it, and it is
ended with all that it has started.

Not prevented: the package runs as you. It can read and change your files, use memory, disk and GPU,
and give outputs that its model does not compute. Validate what you would run anyway; run a
stranger's package in a container (docs/security.md).

`*` marks the official checks. The exit code is 1 if a check fails; a warning is not a failure.

example:
  s3prl-ekd validate my_package
  s3prl-ekd validate somebody_elses_package --json report.json --timeout 1800
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SetupError, printable

if TYPE_CHECKING:
    from ..export.hidden_set.outcome import Outcome


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``validate``."""
    parser.add_argument("package", metavar="DIR", type=Path)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the report as JSON")
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=float,
        default=600.0,
        help="for all checks that run the package (default: 600)",
    )
    parser.add_argument(
        "--librispeech", metavar="DIR", type=Path, help="count MACs over LibriSpeech's own lengths"
    )


def main(args: argparse.Namespace) -> int:
    """Print a line for each check; 1 if one failed, else 0."""
    from ..export.hidden_set.sandbox import validate
    from ..superb.cost import LENGTHS, librispeech_lengths
    from .cost import check_report, write_report

    if not args.timeout > 0:
        raise SetupError(f"--timeout {args.timeout:g}: a number of seconds above 0 is needed")
    if args.json is not None:
        check_report(args.json)
    lengths = librispeech_lengths(args.librispeech) if args.librispeech else LENGTHS
    outcomes, cost = validate(args.package, lengths, args.timeout, _print)
    counts = {status: 0 for status in ("pass", "fail", "warn", "skip")}
    for outcome in outcomes:
        counts[outcome.status] += 1
    failed = [outcome.name for outcome in outcomes if outcome.status == "fail"]
    print(
        f"{counts['pass']} passed, {counts['fail']} failed, {counts['warn']} warnings, "
        f"{counts['skip']} skipped" + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    if args.json is not None:
        report = {
            "package": args.package.resolve().name,
            "ok": not failed,
            "checks": [
                {
                    "name": outcome.name,
                    "official": outcome.official,
                    "status": outcome.status,
                    "reason": outcome.reason,
                }
                for outcome in outcomes
            ],
            "cost": cost,
        }
        write_report(args.json, report)
    return 1 if failed else 0


def _print(outcome: Outcome) -> None:
    status = outcome.status.upper() if outcome.status == "fail" else outcome.status
    mark = "*" if outcome.official else " "
    print(f"{status:4} {mark} {outcome.name:12}  {printable(outcome.reason)}", flush=True)
