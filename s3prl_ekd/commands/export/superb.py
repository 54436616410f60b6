"""Export a student as a package for SUPERB's hidden set: a folder that needs only torch.

DIR gets expert.py (the model's code in one file), model.pt (tensors and settings), cli.py,
requirements.txt, LICENSE and README.md (a model card). The package is compared with the student on
a padded batch; if they differ, DIR is not written. With --heads keep, the outputs of the prediction
heads follow the layers in hidden_states, as in hidden_states_and_heads. Drop heads that you do not
use: SUPERB counts their parameters. A student with gates has to be cut by `s3prl-ekd prune` first.

example:
  s3prl-ekd export superb student.safetensors -o my_package --heads drop
  s3prl-ekd validate my_package
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from . import add_heads, heads_text, load_checkpoint

if TYPE_CHECKING:
    from torch import nn

TOLERANCE = 1e-5  # see largest_difference; rounding of two conv extractors reaches 3e-6


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``export superb``."""
    add_heads(parser, "the prediction heads and their outputs in hidden_states")
    parser.add_argument(
        "--data", metavar="TEXT", default="", help="training data, as text for the model card"
    )


def main(args: argparse.Namespace) -> int:
    """Write the folder; return exit code 0."""
    from ...export.folder import export_folder
    from ...export.hidden_set.package import FILES, package_contents, write_package
    from ...export.hidden_set.template.expert import UpstreamExpert
    from ...export.model_card import package_card
    from ...student_file import require_cut
    from ...superb.cost import measure_cost
    from ..cost import print_cost

    source, loaded = load_checkpoint(args.checkpoint)
    require_cut(loaded.student, source.path)
    keep = args.heads == "keep" and loaded.heads is not None
    contents = package_contents(loaded, keep)
    with export_folder(args.output, args.force, FILES) as folder:
        write_package(contents, "", folder)
        expert = UpstreamExpert(folder / "model.pt").eval()
        error = _compare(expert, source.path, keep)
        cost = measure_cost(expert)
        name, heads = args.output.resolve().name, contents["config"]["heads"]
        card = package_card(loaded, heads, cost, name, args.data)
        write_package(contents, card, folder)
    print(f"{source} -> {args.output}, {heads_text(loaded, keep)}")
    print_cost(cost)
    print(f"largest difference from the student's hidden states on a padded batch: {error:.1e}")
    print(f"next: s3prl-ekd validate {shlex.quote(str(args.output))}")
    return 0


def _compare(expert: nn.Module, path: Path, heads: bool) -> float:
    """Compare the package with ``ekd_student``; return the largest difference.

    Raises:
        CheckpointError: it is above :data:`TOLERANCE`.
    """
    import torch

    from ...export.compare import largest_difference, noise_waves
    from ...upstream.expert import UpstreamExpert as Student

    waves = noise_waves(32_000, 9_600, 200)
    with torch.no_grad():
        outputs = Student(path).eval()(waves)
        states = expert(waves)["hidden_states"]
    expected = outputs["hidden_states_and_heads" if heads else "hidden_states"]
    return largest_difference(expected, states, TOLERANCE, f"the package of {path}")
