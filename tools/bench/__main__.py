"""Benchmark a distillation step, stage by stage, against s3prl's distiller.

Variant `s3prl` is s3prl's distiller and optimizer with three upstream experts as teachers; `ekd` is
the step of `run_pretrain.py -u ekd` with its default optimizer, in float32. Both start from the
same random weights and alternately take steps on the same batches; peak memory is measured in a
separate process. The roofline is the time of the counted matrix products at this machine's measured
peak rate. Prints a Markdown table.

example:
  python -m tools.bench
  python -m tools.bench --size base --batch 4 --seconds 4 --variant ekd ekd-cached -o base.json
  python -m tools.bench --size base --device cuda --batch 24 --seconds 15 --data /data/LibriSpeech
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from s3prl_ekd import __version__, compat
from s3prl_ekd.errors import SetupError
from s3prl_ekd.files.atomic import write_text
from s3prl_ekd.system.terminal import prepare_streams, quiet_s3prl, show_errors

from .inputs import SIZES, write_corpus, write_teachers
from .measure import StageTimer, clock, flop_counter, matmul_rate, peak_memory
from .report import plot, projection, summary, table
from .variants import VARIANTS, BenchPlan, copy_weights


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--size",
        choices=SIZES,
        default="tiny",
        help="teachers: those of the demo, 94 M or 316 M parameters (default: tiny)",
    )
    add("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    add("--seconds", type=float, default=4.0, help="longest utterance (default: 4)")
    add("--batch", type=int, default=4, metavar="N", help="utterances in a batch (default: 4)")
    add("--turns", type=int, default=5, metavar="N", help="steps of each variant (default: 5)")
    add(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="folder of audio to take excerpts from (default: noise)",
    )
    add(
        "--variant",
        nargs="+",
        choices=list(VARIANTS)[1:],
        default=["ekd"],
        help="variants to compare with s3prl (default: ekd)",
    )
    add(
        "--cpu-time",
        action="store_true",
        help="measure CPU time, which other programs disturb less",
    )
    add("--no-memory", action="store_true", help="do not measure peak memory")
    add(
        "--plan", action="store_true", help="also project hours for larger corpora and more devices"
    )
    add("--plot", type=Path, metavar="PNG", help="also plot the stages")
    add("-o", "--output", type=Path, metavar="JSON", help="write all measurements to this file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Raises:
        SystemExit: code 2 for a user's error.
    """
    args = build_parser().parse_args(argv)
    prepare_streams()
    quiet_s3prl()
    with show_errors():
        bench(args)
    return 0


def bench(args: argparse.Namespace) -> None:
    """Check the options, measure, print and write the results.

    Raises:
        SetupError: an option is invalid.
    """
    if args.batch < 2 or args.turns < 1:
        raise SetupError(
            f"--batch {args.batch} --turns {args.turns}: --batch must be 2 or more (s3prl drops "
            "batches of one utterance), --turns 1 or more"
        )
    if not 0.1 <= args.seconds <= 60:
        raise SetupError(f"--seconds must be 0.1 to 60, got --seconds {args.seconds:g}")
    if args.device != "cpu" and not (args.device.startswith("cuda") and torch.cuda.is_available()):
        raise SetupError(f"--device {args.device} is not available; use cpu")
    if args.data is not None and not args.data.is_dir():
        raise SetupError(f"--data {args.data}: no such folder")
    for path in filter(None, (args.output, args.plot)):
        if path.exists() or not path.parent.is_dir():
            raise SetupError(f"{path} exists already, or its folder does not; name another file")
    result = measure(args)
    print(table(result))
    for name in list(result["variants"])[1:] if args.plan else []:
        print("\n" + projection(result, name))
    if args.output:
        write_text(args.output, json.dumps({**result, "summary": summary(result)}, indent=1) + "\n")
    if args.plot:
        plot(result, args.plot)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all variants.

    In each turn every variant takes one step on the same batch, in alternating order. The steps
    before the first turn, which warm up and count operations, are not timed.

    Returns:
        ``about`` (machine and options) and ``variants`` by name. A variant has ``seconds`` (by
        stage), ``audio`` (seconds) and ``losses`` of each turn, ``flops`` by stage on a batch of
        ``flops_audio`` seconds, and ``memory``.
    """
    compat.apply()
    names = ["s3prl", *dict.fromkeys(args.variant)]
    seconds, rate = clock(args.device, args.cpu_time), 0.0
    results: dict[str, dict[str, Any]] = {name: {} for name in names}
    with tempfile.TemporaryDirectory(prefix="s3prl_ekd_bench_") as folder:
        write_corpus(Path(folder), args.batch * args.turns, args.seconds, args.data)
        teachers = write_teachers(Path(folder), SIZES[args.size])
        plan = BenchPlan(Path(folder), teachers, args.size, args.device, args.batch)
        if not args.no_memory:  # before this process uses GPU memory itself
            for name in tqdm(names, desc="peak memory", unit="variant"):
                results[name]["memory"] = peak_memory(plan, name)
        variants = {name: VARIANTS[name](plan) for name in names}
        copy_weights(variants[names[1]], variants["s3prl"])
        for name, variant in variants.items():
            variant.step(0, StageTimer(seconds))
            with flop_counter() as flops:
                timer = StageTimer(lambda: float(flops.get_total_flops()))  # noqa: B023
                _, audio = variant.step(0, timer)
            results[name] |= {"flops": timer.totals, "flops_audio": audio}
            results[name] |= {"seconds": [], "audio": [], "losses": []}
        for turn in tqdm(range(args.turns), desc="turns", unit="turn"):
            rate = max(
                rate, matmul_rate(args.device)
            )  # a maximum, since other programs may slow some turns
            for name in names if turn % 2 == 0 else names[::-1]:
                timer = StageTimer(seconds)
                loss, audio = variants[name].step(turn, timer)
                results[name]["seconds"].append(timer.totals)
                results[name]["audio"].append(audio)
                results[name]["losses"].append(loss)
    about = {
        "made_by": f"s3prl_ekd {__version__}",
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "device": "cpu" if args.device == "cpu" else torch.cuda.get_device_name(args.device),
        "threads": torch.get_num_threads(),
        "size": args.size,
        "batch": args.batch,
        "longest_seconds": args.seconds,
        "turns": args.turns,
        "time": "CPU" if args.cpu_time else "wall",
        "matmul_rate": rate,
    }
    return {"about": about, "variants": results}


if __name__ == "__main__":
    sys.exit(main())
