"""Write the hidden states of audio files into one safetensors file.

Each file and layer gives a tensor [frame, dim] called PATH#LAYER. PATH is relative to the folder
for a file found in a folder, and the path as written for a file given here or in a list. AUDIO may
be a manifest, too (.tsv, a Kaldi folder, lhotse's cuts), also of segments of longer files: PATH is
then the utterance's id, or the path (PATH@OFFSET+LENGTH in samples for a segment). Layer 0 is
the projected features (of a copied student, the input of the first transformer layer), layer n the
output of transformer layer n. The student processes one utterance at a time, because padding
changes hidden states (the first conv layer normalises over time). Its hidden states are written
immediately, so memory does not grow with the number of files.

example:
  s3prl-ekd features student.safetensors /data/dev-clean -o dev.safetensors --layers last
  s3prl-ekd features student.safetensors /data/kaldi/dev -o dev.safetensors
  python -c "from safetensors.torch import load_file; print([*load_file('dev.safetensors')])"
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from ..errors import CheckpointError, ConfigError, printable
from ..files.atomic import write_text
from ..teachers.student_source import check_student
from .export import add_checkpoint

_SHOW = 'import safetensors as s, sys; print([*s.safe_open(sys.argv[1], "pt").keys()][:5])'
_SHOWN = 5  # bad files printed; all are listed in a file


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_checkpoint(parser)
    parser.add_argument(
        "audio", metavar="AUDIO", nargs="*", help="audio files, folders, or manifests"
    )
    parser.add_argument(
        "--audio-root", metavar="ROOT", type=Path, help="folder that a manifest's paths are below"
    )
    parser.add_argument(
        "--list",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="file with one path per line",
    )
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, required=True)
    parser.add_argument(
        "--layers", default="all", help="all (default), last, or numbers such as 0,2"
    )
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if available)")
    parser.add_argument(
        "--on-bad-audio",
        choices=("skip", "error"),
        default="skip",
        help="skip unusable files and list them at the end (default), or stop at the first",
    )
    parser.add_argument(
        "--max-seconds",
        type=float,
        default=300.0,
        help="longer files count as bad; a full-size student needs 17 MB per second (default: 300)",
    )
    parser.add_argument("--force", action="store_true", help="overwrite an existing FILE")


def main(args: argparse.Namespace) -> int:
    """Write the features and list the skipped files; the exit code is 0."""
    if args.output.exists() and not args.force:
        raise CheckpointError(f"{args.output} exists; add --force to overwrite it")
    if not args.audio and not args.list:
        raise ConfigError("no audio: give files or folders, or a list of files with --list FILE")
    if not args.max_seconds > 0:
        raise ConfigError(f"--max-seconds must be above 0, got {args.max_seconds}")
    check_student(args.checkpoint)

    import torch
    from tqdm import tqdm

    from ..export.features import collect_audio, write_features
    from ..system.devices import choose_device

    device = choose_device(args.device)
    audio = collect_audio(args.audio, args.list, args.audio_root)
    written = write_features(
        args.checkpoint,
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
    skipped.unlink(missing_ok=True)  # it may be from an earlier run
    if written.bad:
        lines = [f"{ascii(key)[1:-1]}\t{printable(reason)}\n" for key, reason in written.bad]
        write_text(skipped, "".join(lines))
        print(f"skipped: {len(written.bad)} unusable files; full list: {skipped}")
        for _, reason in written.bad[:_SHOWN]:
            print(f"  {reason}")
    print(f"next: python -c '{_SHOW}' {shlex.quote(str(args.output))}")
    return 0
