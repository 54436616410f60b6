"""List the teachers that can be named in a config, or look at those of one.

`list` shows the tiny teachers that come with this package (tiny_hubert, tiny_robust_hubert,
tiny_wavlm), s3prl's hub names by family, and the kinds of files and folders that are understood.
`inspect` listens to some utterances with each teacher of CONFIG and shows, for every layer, how
large its frames are, and how alike the teachers are at the layers that CONFIG asks for (linear
CKA: 1 is the same up to rotation and scale). DIR gets layers.csv, cka.csv and cka.png over all
layers of all teachers.

example:
  s3prl-ekd teachers list
  s3prl-ekd teachers inspect pretrain/ekd/config_model.yaml --data /data/LibriSpeech -o inspected
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SetupError
from ..files.atomic import write_csv

if TYPE_CHECKING:
    import numpy as np

    from ..distill.settings import TeacherSettings


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands and their options."""
    from ..analysis.choice import add_sample_options

    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    actions.add_parser("list", help="hub names by family, and the local kinds understood")
    inspect = actions.add_parser("inspect", help="statistics of every layer, CKA between teachers")
    inspect.add_argument("config", metavar="CONFIG", type=Path, help="a model config, for -g")
    add_sample_options(inspect)
    inspect.add_argument(
        "-o",
        "--out",
        metavar="DIR",
        type=Path,
        default=Path("inspected"),
        help="folder for the tables and the plot (default: inspected)",
    )


def main(args: argparse.Namespace) -> int:
    """List or inspect; see the module's text."""
    return _list() if args.action == "list" else _inspect(args)


def _list() -> int:
    from ..teachers.checkpoint import KINDS
    from ..teachers.huggingface import MODEL_TYPES
    from ..teachers.load import names_by_family
    from ..teachers.zoo import NAMES, TWINS

    print("tiny teachers of this package, to try things with:\n")
    for name in NAMES:
        print(f"    {name}{' (untrained)' if name in TWINS else ''}")
    print("\nhub names of s3prl, downloaded on first use:")
    for family, names in names_by_family().items():
        print(f"\n  {family}")
        for name in sorted(names):
            print(f"    {name}")
    print("\nlocal files, told apart by what is in them:\n")
    for kind, what in KINDS.items():
        print(f"  {kind.ljust(max(map(len, KINDS)))}  {what}")
    print("\nlocal folders (config.json and model.safetensors, as Hugging Face has them):\n")
    print(f"  model_type {', '.join(MODEL_TYPES)}")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from ..analysis.choice import choose_audio
    from ..analysis.layer_statistics import aligned, layer_statistics
    from ..analysis.layers import cka_matrix
    from ..analysis.plots import plot_similarity, require_matplotlib
    from ..analysis.sample import load_all, sample_layers
    from ..pretrain.settings import load_model_config

    require_matplotlib()  # before minutes of listening
    settings = load_model_config(args.config).teachers
    paths = choose_audio(args.data, args.audio_root, args.utterances, args.seed)
    sample = sample_layers(load_all(settings, args.device), paths)

    rows = [("teacher", "layer", "norm", "mean", "spread")]
    for name, layers in sample.items():
        for number, hidden in enumerate(layers):
            found = layer_statistics(hidden)
            values = (f"{found.norm:.3f}", f"{found.mean:.4f}", f"{found.std:.4f}")
            rows.append((name, str(number), *values))
    labels = [(name, number) for name in sample for number in range(len(sample[name]))]
    matrix = cka_matrix([frames for layers in sample.values() for frames in layers]).numpy()

    frames = len(next(iter(sample.values()))[0])
    print(f"{len(paths)} utterances, {frames} frames of each layer\n")
    print(aligned(rows))
    pairs = _pairs(settings, {label: i for i, label in enumerate(labels)}, matrix)
    if pairs:
        print("\nlinear CKA between teachers at the configured layers\n")
        print(aligned([("teachers", "layers", "CKA"), *pairs]))

    head = ["", *(f"{name} {number}" for name, number in labels)]
    lines = [[head[i + 1], *(f"{v:.6f}" for v in row)] for i, row in enumerate(matrix)]
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        write_csv(args.out / "layers.csv", rows)
        write_csv(args.out / "cka.csv", [head, *lines])
        plot_similarity(matrix, {n: len(ls) for n, ls in sample.items()}, args.out / "cka.png")
    except OSError as error:
        raise SetupError(f"cannot write to {args.out}: {error.strerror}") from None
    print(f"\nwrote layers.csv, cka.csv and cka.png to {args.out}")
    return 0


def _pairs(
    settings: Mapping[str, TeacherSettings],
    index: Mapping[tuple[str, int], int],
    matrix: np.ndarray,
) -> list[tuple[str, str, str]]:
    """CKA of each two teachers at their first, second, ... configured layers (or groups)."""
    rows = []
    for one, other in itertools.combinations(settings, 2):
        for ours, theirs in zip(settings[one].targets, settings[other].targets, strict=False):
            # Of a group, its middle layer stands for it.
            a, b = sorted(ours)[len(ours) // 2], sorted(theirs)[len(theirs) // 2]
            if (one, a) in index and (other, b) in index:
                value = matrix[index[one, a], index[other, b]]
                rows.append((f"{one} - {other}", f"{a} - {b}", f"{value:.4f}"))
    return rows
