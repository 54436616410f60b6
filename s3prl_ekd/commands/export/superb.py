"""Export a student as a package for SUPERB's hidden set: a folder that needs only torch.

DIR gets expert.py (the model's code in one file), model.pt (tensors and settings), cli.py,
requirements.txt, LICENSE and README.md (a model card). The package is compared with the student on
a padded batch; if they differ, DIR is not written. With --heads keep, the outputs of the prediction
heads follow the layers in hidden_states, as in hidden_states_and_heads. Drop heads that you do not
use: SUPERB counts their parameters.

example:
  s3prl-ekd export superb student.safetensors -o my_package --heads drop
  s3prl-ekd validate my_package
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import CheckpointError
from .student import add_checkpoint, add_heads, load_checkpoint

if TYPE_CHECKING:
    from torch import nn

TOLERANCE = 1e-6  # relative to a hidden state's largest value if that is above 1, else absolute


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``export superb``."""
    add_checkpoint(parser)
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, required=True)
    add_heads(parser, "the prediction heads and their outputs in hidden_states")
    parser.add_argument(
        "--data",
        metavar="TEXT",
        default="",
        help="training data, as text for the model card",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing package in DIR")


def main(args: argparse.Namespace) -> int:
    """Write the folder; return exit code 0."""
    from ...export.folder import export_folder
    from ...export.hidden_set.card import package_card
    from ...export.hidden_set.package import FILES, package_contents, write_package
    from ...export.hidden_set.template.expert import UpstreamExpert
    from ...superb.cost import measure_cost
    from ..cost import print_cost

    path, loaded = load_checkpoint(args.checkpoint)
    keep = args.heads == "keep" and loaded.heads is not None
    contents = package_contents(loaded, keep)
    with export_folder(args.output, args.force, FILES) as folder:
        write_package(contents, "", folder)
        expert = UpstreamExpert(folder / "model.pt").eval()
        error = _compare(expert, path, keep)
        cost = measure_cost(expert)
        card = package_card(
            loaded,
            contents["config"]["heads"],
            cost,
            args.output.resolve().name,
            args.data,
        )
        write_package(contents, card, folder)
    print(f"{path} -> {args.output}, heads {'kept' if keep else 'dropped'}")
    print_cost(cost)
    print(f"largest difference from the student's hidden states on a padded batch: {error:.1e}")
    print(f"next: s3prl-ekd validate {shlex.quote(str(args.output))}")
    return 0


def _compare(expert: nn.Module, path: Path, heads: bool) -> float:
    """Compare the package with ``ekd_student`` on a batch of three waveforms.

    Returns:
        The largest relative difference in a hidden state.

    Raises:
        CheckpointError: the difference is above :data:`TOLERANCE`, or shapes differ.
    """
    import torch

    from ...upstream.expert import UpstreamExpert as Student

    generator = torch.Generator().manual_seed(0)
    waves = [0.1 * torch.randn(n, generator=generator) for n in (32000, 9600, 200)]
    with torch.no_grad():
        expected = Student(path).eval()(waves)[
            "hidden_states_and_heads" if heads else "hidden_states"
        ]
        states = expert(waves)["hidden_states"]
    shapes = [tuple(state.shape) for state in expected], [tuple(state.shape) for state in states]
    error = float("inf")
    if shapes[0] == shapes[1]:
        error = max(
            ((a - b).abs().max() / a.abs().max().clamp(min=1)).item()
            for a, b in zip(expected, states, strict=True)
        )
    if not error <= TOLERANCE:
        raise CheckpointError(
            f"{path}: the hidden states of the package differ from the student's by {error:.1e} "
            f"(at most {TOLERANCE:.0e} is allowed); nothing is written"
        )
    return error
