"""Count parameters and MACs of an upstream or a package, as SUPERB's leaderboard counts them.

MACs are summed over 32 utterances of LibriSpeech test-clean, each in a forward of its own, in four
buckets of eight by length. Without the corpus their published lengths are used: the figures are the
same, because they depend on the lengths alone. Matrix products and convolutions are counted, and
the terms that SUPERB's profiler adds for torch's multi_head_attention_forward. A parameter is
unused if no hidden state depends on it; the leaderboard counts it as well.

example:
  s3prl-ekd cost my_package -o cost.json
  s3prl-ekd cost -u ekd_student -k student.safetensors
  s3prl-ekd cost -u hubert_base --librispeech /data/LibriSpeech
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..compat.source import may_be_upstream
from ..errors import SetupError
from ..files.report_file import check_report, json_begin, write_report


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``cost``."""
    add = parser.add_argument
    add(
        "package", metavar="PACKAGE_DIR", type=Path, nargs="?",
        help="written by `export superb`; its expert.py is run in a separate process",
    )  # fmt: skip
    add("-u", "--upstream", metavar="NAME", help="a name of s3prl's hub, instead of PACKAGE_DIR")
    add("-k", "--ckpt", metavar="CKPT", help="checkpoint of the upstream -u")
    add(
        "-s", "--selection", metavar="KEY",
        help="outputs of -u that count, as in run_downstream.py (default: hidden_states)",
    )  # fmt: skip
    add("--librispeech", metavar="DIR", type=Path, help="read the lengths from this corpus")
    add("-o", "--output", metavar="FILE.json", type=Path)


def main(args: argparse.Namespace) -> int:
    """Count, print, and write the JSON with ``-o``; the exit code is 0."""
    if (args.package is None) == (args.upstream is None):
        raise SetupError("expected either PACKAGE_DIR or -u NAME")
    for option, value in (("-k", args.ckpt), ("-s", args.selection)):
        if args.package is not None and value is not None:
            raise SetupError(f"{option} needs -u; a package has its own model.pt and keys")
    if args.upstream is not None and not may_be_upstream(args.upstream):
        raise SetupError(f"no such upstream in s3prl: {args.upstream}; see run_downstream.py -h")

    from ..superb.cost import (
        LENGTHS,
        build_upstream,
        check_forward,
        librispeech_lengths,
        measure_cost,
    )

    selection = args.selection or "hidden_states"
    if args.output is not None:
        check_report(args.output, json_begin("parameters"))  # before counting, which takes minutes
    lengths = librispeech_lengths(args.librispeech) if args.librispeech else LENGTHS
    if args.package is not None:
        from ..export.hidden_set.sandbox import package_cost

        cost = package_cost(args.package, lengths)
    else:
        upstream = build_upstream(args.upstream, args.ckpt)
        check_forward(upstream, selection, args.upstream)
        cost = measure_cost(upstream, lengths, selection)
    print_cost(cost)
    if args.output is not None:
        write_report(args.output, cost)
    return 0


def print_cost(cost: dict) -> None:
    """Print the contents of ``cost.json`` as a few lines."""
    unused = f" ({cost['unused']:,} of them unused)" if cost["unused"] else ""
    print(f"parameters  {cost['parameters']:,}{unused}")
    buckets = " + ".join(f"{name} {macs / 1e9:.3f}" for name, macs in cost["macs_buckets"].items())
    print(f"MACs        {cost['macs'] / 1e9:,.3f} G = {buckets}")
    products = f"{cost['macs_products'] / 1e9:,.3f} G in matrix products and convolutions alone"
    print(f"            over {cost['utterances']} utterances; {products}")
