"""Write the hidden states of audio files into one safetensors file.

A tensor [frame, dim] for each file and layer, called PATH#LAYER: for a file in a folder PATH is its
path inside that folder, for a file named here or in a list it is the path as written. Layer 0 is
the projected features, layer n the output of transformer layer n. Utterances go through the student
one by one, because padding changes hidden states (the first conv layer normalises over time); they
are written as they come, so memory does not grow with their number.

example:
  s3prl-ekd features student.safetensors /data/dev-clean -o dev.safetensors --layers last
  python -c "from safetensors import safe_open
  f = safe_open('dev.safetensors', 'pt'); print(f.metadata()); print(f.get_tensor(f.keys()[0]))"
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from ..errors import CheckpointError, ConfigError, first_line, printable
from ..files.atomic import write_text
from .export.student import add_checkpoint, load

_SHOWN = 5  # bad files named on the screen; all are in a file


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_checkpoint(parser)
    parser.add_argument("audio", metavar="AUDIO", nargs="*", help="audio files or folders of them")
    parser.add_argument(
        "--list", metavar="FILE", type=Path, action="append", default=[], help="one path a line"
    )
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, required=True)
    parser.add_argument("--layers", default="all", help="all, last, or numbers as 0,2 (all)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: cuda where there is one)")
    parser.add_argument(
        "--on-bad-audio",
        choices=("skip", "error"),
        default="skip",
        help="leave out files that cannot be used and name them at the end, or stop at the first",
    )
    parser.add_argument(
        "--max-seconds",
        type=float,
        default=300.0,
        help="a longer file counts as bad; a full-size student takes 17 MB a second (300)",
    )
    parser.add_argument("--force", action="store_true", help="write over an existing FILE")


def main(args: argparse.Namespace) -> int:
    """Write the file and say what was left out; the exit code is 0."""
    if args.output.exists() and not args.force:
        raise CheckpointError(f"{args.output} exists; add --force to write over it")
    if not args.audio and not args.list:
        raise ConfigError("name audio files or folders, or a list of files with --list FILE")
    if not args.max_seconds > 0:
        raise ConfigError(f"--max-seconds is {args.max_seconds}; more than 0 is allowed")

    import torch
    from tqdm import tqdm

    from ..export.features import collect_audio, write_features

    device = choose_device(args.device)
    audio = collect_audio(args.audio, args.list)
    path, _ = load(args.checkpoint)
    written = write_features(
        path,
        audio,
        args.output,
        layers=args.layers,
        dtype=getattr(torch, args.dtype),
        device=device,
        max_seconds=args.max_seconds,
        skip_bad=args.on_bad_audio == "skip",
        progress=lambda items, total: tqdm(
            items, total=total, desc="features", unit=" files", dynamic_ncols=True
        ),
    )
    size = args.output.stat().st_size
    print(
        f"{args.output}: {written.files} files, {written.seconds / 3600:.2f} h, "
        f"{size / 1e6:.1f} MB, {args.dtype}, on {device}"
    )
    skipped = args.output.with_name(args.output.name + ".skipped.txt")
    skipped.unlink(missing_ok=True)  # one of an earlier run would mislead
    if written.bad:
        lines = [f"{ascii(key)[1:-1]}\t{printable(why)}\n" for key, why in written.bad]
        write_text(skipped, "".join(lines))
        print(f"left out: {len(written.bad)} files that cannot be used; all of them: {skipped}")
        for _, why in written.bad[:_SHOWN]:
            print(f"  {why}")
    print(f"next: safetensors.safe_open({str(args.output)!r}, 'pt').keys()")
    return 0


def choose_device(name: str | None) -> str:
    """The device that was asked for, or the one that is there.

    Raises:
        ConfigError: it is unknown or not there.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|(cuda|xpu)(:\d+)?", name):
        raise ConfigError(f"--device {name} is not known; use cpu, cuda, cuda:N, xpu or mps")
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"--device {name} cannot be used: {first_line(error)}") from None
    return name
