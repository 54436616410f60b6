"""Measure a distillation step, stage by stage, beside s3prl's way of making it.

The baseline is s3prl's distiller with three upstream experts for teachers, and nothing else
changed; ours is what `run_pretrain.py -u ekd` runs. Both start from the same random weights and
take turns over the same batches in one process; the peak memory of each is measured in a process
of its own. The floor is what the counted matrix products would take at the rate that this machine
reaches in one. A table in Markdown goes to stdout; the figures to FOLDER/bench.json and bench.png.

example:
  s3prl-ekd bench
  s3prl-ekd bench --size base --batch 2 --seconds 3 --turns 3 -o bench_base
  s3prl-ekd bench --size base --device cuda --batch 24 --seconds 15 --data /data/LibriSpeech
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import SetupError

SIZES = ("tiny", "base", "large")
_SIDES = ("ours", "ours-bf16", "ours-compile", "ours-cached")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``bench``."""
    add = parser.add_argument
    add(
        "--size", choices=SIZES, default="tiny",
        help="of the three teachers: demo's, 94 M or 315 M parameters each (default: tiny)",
    )  # fmt: skip
    add("--device", default="cpu", metavar="DEVICE", help="cpu or cuda (default: cpu)")
    add("--seconds", type=float, default=4.0, help="longest utterance (default: 4)")
    add("--batch", type=int, default=4, metavar="N", help="utterances a batch (default: 4)")
    add("--turns", type=int, default=5, metavar="N", help="steps of each side (default: 5)")
    add(
        "--data", type=Path, metavar="FOLDER",
        help="take the first audio files of a folder, cut to --seconds (default: noise)",
    )  # fmt: skip
    add(
        "--side", action="append", choices=_SIDES, metavar="SIDE",
        help=f"what to compare with the baseline, may be given again: {', '.join(_SIDES)} "
        "(default: ours)",
    )  # fmt: skip
    add("--distort", action="store_true", help="let ours distort the waveforms too")
    add("--no-memory", action="store_true", help="leave the peak memory out")
    add("--plan", action="store_true", help="project hours for larger corpora and more devices")
    add("-o", "--output", type=Path, metavar="FOLDER", default=Path("bench"))
    add("--force", action="store_true", help="replace an earlier bench.json and bench.png")


def main(args: argparse.Namespace) -> int:
    """Measure, print the table, write the two files; the exit code is 0."""
    if args.batch < 2:
        raise SetupError(f"--batch {args.batch}: s3prl's buckets drop single utterances; give 2")
    if args.turns < 1:
        raise SetupError(f"--turns {args.turns}: at least 1 is needed")
    if not 0.1 <= args.seconds <= 60:
        raise SetupError(f"--seconds {args.seconds:g}: 0.1 to 60 is allowed")
    if args.device != "cpu" and not args.device.startswith("cuda"):
        raise SetupError(f"--device {args.device}: cpu, cuda or cuda:N is allowed")
    if "ours-bf16" in (args.side or ()) and args.device == "cpu":
        raise SetupError("--side ours-bf16 needs --device cuda: not every CPU has bfloat16")
    if args.data is not None and not args.data.is_dir():
        raise SetupError(f"--data: there is no folder {args.data}")
    files = {name: args.output / name for name in ("bench.json", "bench.png")}
    there = [str(path) for path in files.values() if path.exists()]
    if there and not args.force:
        raise SetupError(f"{there[0]} exists; name another folder with -o, or add --force")

    import json
    import tempfile

    from ..analysis.plots import require_matplotlib
    from ..evaluate.bench import run_bench
    from ..evaluate.bench_plot import plot_bench
    from ..evaluate.bench_report import summary, table
    from ..files.atomic import whole_file

    require_matplotlib()  # before minutes of measuring
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"cannot write to {args.output}: {error.strerror}") from None
    with tempfile.TemporaryDirectory(prefix="s3prl_ekd_bench_") as folder:
        result = run_bench(
            Path(folder),
            size=args.size,
            device=args.device,
            longest=args.seconds,
            batch=args.batch,
            turns=args.turns,
            sides=["baseline", *dict.fromkeys(args.side or ["ours"])],
            source=args.data,
            distort=args.distort,
            memory=not args.no_memory,
        )
    print(table(result))
    if args.plan:
        from ..evaluate.bench_plan import plan_table

        for name in list(result["sides"])[1:]:
            print("\n" + plan_table(result, name))
    contents = {
        "bench.json": (
            json.dumps({**result, "summary": summary(result)}, indent=1) + "\n"
        ).encode(),
        "bench.png": plot_bench(result),
    }
    try:
        for name, path in files.items():
            with whole_file(path) as file:
                file.write(contents[name])
    except OSError as error:
        raise SetupError(f"cannot write to {args.output}: {error.strerror}") from None
    print(f"\nwrote {' and '.join(map(str, files.values()))}")
    return 0
