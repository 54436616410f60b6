"""List the available teachers, or compare the layers of a config's teachers.

`list` prints the tiny teachers of this package (tiny_hubert, tiny_robust_hubert, tiny_wavlm, ...),
s3prl's hub names by family, and the supported checkpoint and folder formats. `inspect` runs each
teacher of CONFIG on some utterances. For every layer it prints the mean norm of a frame, and the
mean and standard deviation of its values. For the layers in CONFIG it prints the similarity between
teachers (linear CKA: 1 means equal up to rotation and scale). It writes layers.csv, cka.csv and
cka.png, over all layers of all teachers, to DIR.

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
from ..files.atomic import make_folder, write_csv

if TYPE_CHECKING:
    import numpy as np

    from ..distill.settings import TeacherSettings


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands and their options."""
    from ..analysis.choice import add_sample_options

    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    actions.add_parser("list", help="available teachers and supported formats")
    inspect = actions.add_parser("inspect", help="statistics of every layer, CKA between teachers")
    inspect.add_argument("config", metavar="CONFIG", type=Path, help="a model config, as for -g")
    add_sample_options(inspect)
    inspect.add_argument(
        "-o", "--out", metavar="DIR", type=Path, default=Path("inspected"),
        help="folder for the tables and the plot (default: inspected)",
    )  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """List teachers, or inspect those of a config."""
    return _list() if args.action == "list" else _inspect(args)


def _list() -> int:
    from ..teachers.checkpoint import KINDS
    from ..teachers.huggingface import MODEL_TYPES
    from ..teachers.names import names_by_family
    from ..teachers.zoo import NAMES, RANDOM_INIT

    print("tiny teachers of this package, for trying out distillation:\n")
    for name in NAMES:
        print(f"    {name}{' (random weights)' if name in RANDOM_INIT else ''}")
    print("\ns3prl's hub names, downloaded on first use:")
    for family, names in names_by_family().items():
        print(f"\n  {family}")
        for name in names:
            print(f"    {name}")
    print("\nlocal checkpoint files, by format (detected from the contents):\n")
    for kind, description in KINDS.items():
        print(f"  {kind.ljust(max(map(len, KINDS)))}  {description}")
    print("\nHugging Face folders, and ids of the Hugging Face Hub (ORG/NAME), by model_type:\n")
    print(f"  {', '.join(MODEL_TYPES)}")
    print("\nfolders of hidden states of other programs (s3prl_ekd.teachers.stored.write_states)")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from ..pretrain.settings import load_model_config

    settings = load_model_config(args.config).teachers
    from ..analysis.choice import choose_audio
    from ..analysis.layer_statistics import layer_statistics
    from ..analysis.layers import cka_matrix
    from ..analysis.plots import plot_similarity
    from ..analysis.sample import load_upstreams, sample_layers
    from ..files.report_file import check_beside, check_report
    from ..system.figures import require_matplotlib
    from ..system.tables import text_table

    require_matplotlib()  # before the teachers run for minutes
    make_folder(args.out, SetupError)
    check_report(args.out / "layers.csv", "teacher,layer,")
    check_beside(args.out / "layers.csv", "cka.csv", "cka.png")
    paths = choose_audio(args.data, args.audio_root, args.utterances, args.seed)
    sample, used = sample_layers(load_upstreams(settings, args.device), paths)

    rows = [("teacher", "layer", "norm", "mean", "spread")]
    for name, layers in sample.items():
        for index, hidden in enumerate(layers):
            norm, mean, deviation = layer_statistics(hidden)
            rows.append((name, str(index), f"{norm:.3f}", f"{mean:.4f}", f"{deviation:.4f}"))
    labels = [(name, index) for name in sample for index in range(len(sample[name]))]
    matrix = cka_matrix([frames for layers in sample.values() for frames in layers]).numpy()

    frames = len(next(iter(sample.values()))[0])
    print(f"{used} utterances, {frames} frames per layer\n")
    print("\n".join(text_table(rows, rule=True)))
    pairs = _pairs(settings, {label: i for i, label in enumerate(labels)}, matrix)
    if pairs:
        print("\nlinear CKA between teachers at the configured layers\n")
        table = text_table([("teachers", "layers", "CKA"), *pairs], rule=True)
        print("\n".join(table))

    header = ["", *(f"{name} {index}" for name, index in labels)]
    lines = [[header[i + 1], *(f"{v:.6f}" for v in row)] for i, row in enumerate(matrix)]
    write_csv(args.out / "layers.csv", rows)
    write_csv(args.out / "cka.csv", [header, *lines])
    plot_similarity(matrix, {n: len(ls) for n, ls in sample.items()}, args.out / "cka.png")
    print(f"\nwrote layers.csv, cka.csv and cka.png to {args.out}")
    return 0


def _pairs(
    settings: Mapping[str, TeacherSettings],
    index: Mapping[tuple[str, int], int],
    matrix: np.ndarray,
) -> list[tuple[str, str, str]]:
    """CKA of each pair of teachers at their first, second, ... configured layer or group."""
    rows = []
    for first, second in itertools.combinations(settings, 2):
        targets = zip(settings[first].targets, settings[second].targets, strict=False)
        for first_group, second_group in targets:
            # A group is represented by its middle layer.
            a = sorted(first_group)[len(first_group) // 2]
            b = sorted(second_group)[len(second_group) // 2]
            if (first, a) in index and (second, b) in index:
                value = matrix[index[first, a], index[second, b]]
                rows.append((f"{first} - {second}", f"{a} - {b}", f"{value:.4f}"))
    return rows
