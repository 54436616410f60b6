"""Write a student as a package for SUPERB's hidden set: a folder that needs torch and nothing else.

DIR gets expert.py (the whole model in one file), model.pt (plain tensors and settings), cli.py,
requirements.txt, LICENSE and README.md, a model card. The package is run beside the student on a
padded batch before it gets its name. Kept heads' outputs stand behind the layers in hidden_states,
as in hidden_states_and_heads; heads whose outputs nobody uses are better dropped, for the board
counts their parameters.

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
from .student import add_checkpoint, add_heads, load

if TYPE_CHECKING:
    from torch import nn

TOLERANCE = 1e-6  # relative to the largest value, if that is above 1


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``export superb``."""
    add_checkpoint(parser)
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, required=True)
    add_heads(parser, "the prediction heads, and their outputs among the hidden states")
    parser.add_argument(
        "--data", metavar="TEXT", default="", help="what it was trained on, for the model card"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing package")


def main(args: argparse.Namespace) -> int:
    """Write the folder; the exit code is 0."""
    from ...export.folder import whole_folder
    from ...export.hidden_set.card import model_card
    from ...export.hidden_set.package import FILES, package_contents, write_package
    from ...export.hidden_set.template.expert import UpstreamExpert
    from ...superb.cost import measure_cost
    from ..cost import print_cost

    path, loaded = load(args.checkpoint)
    keep = args.heads == "keep" and loaded.heads is not None
    contents = package_contents(loaded, keep)
    with whole_folder(args.output, args.force, FILES) as folder:
        write_package(contents, "", folder)
        expert = UpstreamExpert(folder / "model.pt").eval()
        error = _compare(expert, path, keep)
        cost = measure_cost(expert)
        card = model_card(
            loaded,
            contents["config"]["heads"],
            cost,
            args.output.resolve().name,
            args.data,
        )
        write_package(contents, card, folder)
    print(f"{path} -> {args.output}, heads {'kept' if keep else 'dropped'}")
    print_cost(cost)
    print(f"hidden states equal the student's: largest difference {error:.1e} on a padded batch")
    print(f"next: s3prl-ekd validate {shlex.quote(str(args.output))}")
    return 0


def _compare(expert: nn.Module, path: Path, heads: bool) -> float:
    """The largest difference between the package and ``ekd_student`` on three waveforms.

    Raises:
        CheckpointError: they are not the same.
    """
    import torch

    from ...upstream.expert import UpstreamExpert as Student

    generator = torch.Generator().manual_seed(0)
    waves = [0.1 * torch.randn(n, generator=generator) for n in (32000, 9600, 200)]
    with torch.no_grad():
        ours = Student(path).eval()(waves)["hidden_states_and_heads" if heads else "hidden_states"]
        theirs = expert(waves)["hidden_states"]
    shapes = [tuple(state.shape) for state in ours], [tuple(state.shape) for state in theirs]
    error = float("inf")
    if shapes[0] == shapes[1]:
        error = max(
            ((a - b).abs().max() / a.abs().max().clamp(min=1)).item()
            for a, b in zip(ours, theirs, strict=True)
        )
    if not error <= TOLERANCE:
        raise CheckpointError(
            f"the package of {path} would give other hidden states than the student (difference "
            f"{error:.1e}); it is not written"
        )
    return error
