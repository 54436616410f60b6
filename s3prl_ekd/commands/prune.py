"""Cut a student to the units that its gates keep: channels, attention heads, feed-forward units.

CKPT is of a run with `pruning:` in its model config. FILE is a student file of the smaller student,
with the prediction heads, for a second distillation or for use as it is. Both students run on the
same audio, and their hidden states are compared: they are equal up to rounding, except with
`pruning.norms: all`, where a layer norm is taken over fewer channels after the cut. FILE.png shows
what is kept of each layer (extra plots).

example:
  s3prl-ekd prune result/pretrain/my_student -o pruned.pt
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, ConfigError, DataError, SetupError
from ..files.atomic import atomic_file, explain_write_errors
from ..system.tables import text_table
from .export import add_checkpoint, check_output, load_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from ..distill.pruning.cut import Difference
    from ..distill.student import Student
    from ..distill.student_settings import PrunedSettings, PruningSettings, Unit

logger = logging.getLogger(__name__)

FAR = 0.02  # distance of the expected sparsity from its target that gives a warning (ours)
ROUNDING = 1e-4  # largest relative difference that rounding may cause (measured: 1e-6)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_checkpoint(parser)
    add = parser.add_argument
    add("-o", "--output", metavar="FILE", type=Path, required=True)
    add(
        "--audio", metavar="AUDIO", type=Path, nargs="+", default=[],
        help="audio files on which the two students are compared (default: noise)",
    )  # fmt: skip
    add(
        "--random", metavar="SEED", type=int,
        help="keep as many units of each layer, but drawn at random: a control",
    )  # fmt: skip
    add("--force", action="store_true", help="replace an existing FILE and its picture")


def main(args: argparse.Namespace) -> int:
    """Write the student file and the picture; return exit code 0."""
    from ..distill.pruning import cut
    from ..distill.student_settings import PrunedSettings
    from ..student_file import LoadedStudent, write_student

    picture = args.output.with_suffix(".png")
    if picture == args.output:
        raise ConfigError(f"-o {args.output}: expected a student file; the picture is a .png file")
    for output in (args.output, picture):
        check_output(output, args.force)
    if args.random is not None and not 0 <= args.random < 2**63:
        raise ConfigError(f"--random must be 0 to {2**63 - 1}, got {args.random}")
    path, loaded = load_checkpoint(args.checkpoint)
    try:
        values = cut.gate_values(loaded.student, args.random)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    full = loaded.student.settings
    assert isinstance(full, PrunedSettings)
    waves = _waves(args.audio)
    student = cut.cut(loaded.student, values)
    small = student.settings
    assert isinstance(small, PrunedSettings)
    differences = cut.differences(loaded.student, student, waves)
    exact = cut.is_exact(full) and args.random is None
    worst = max(difference.relative for difference in differences)
    if exact and not worst <= ROUNDING:
        raise CheckpointError(
            f"{path}: the cut student differs by {worst:.1e} of the hidden states' size from the "
            f"student with gates (at most {ROUNDING:.0e} is expected); nothing is written"
        )

    pruning = _pruning_settings(loaded.about, path)
    before, after = _count(full), _count(small)
    about = {**loaded.about, "pruned": {"from": before, "to": after}}
    if pruning is not None:
        about["pruned"] |= {"sparsity": pruning.sparsity, "by": pruning.by}
    if args.random is not None:
        about["pruned"]["random"] = args.random
    write_student(LoadedStudent(student, loaded.heads, loaded.targets, about), args.output)
    print("\n".join([*_conv_table(small, full), "", *_layer_table(small, full, differences), ""]))
    print(f"{path} -> {args.output}, heads {'kept' if loaded.heads else 'absent'}")
    print(f"{before:,} -> {after:,} parameters: {100 * (1 - after / before):.1f} % removed")
    if pruning is not None:
        _print_sparsity(loaded.student, small, pruning)
    _print_distance(exact, worst, args.random is not None)
    _draw(picture, small, full)
    print(
        "next: the second distillation, with a model config (-g) of these three lines:\n"
        f"  extends: {_first_config(args.checkpoint)}\n"
        f"  student: {json.dumps({'kind': 'file', 'file': str(args.output)}, ensure_ascii=False)}\n"
        "  pruning: null\n"
        "and the command: run_pretrain.py -u ekd -n NAME -g MODEL_CONFIG"
    )
    return 0


def _waves(paths: Sequence[Path]) -> list[Tensor]:
    """The start of each file, ``[sample]``; without files, noise. Raises DataError."""
    from ..analysis.sample import read_excerpt
    from ..export.compare import noise_waves

    if not paths:
        return noise_waves(32_000, 9_600)
    waves = [wave for path in paths if (wave := read_excerpt(path)) is not None]
    if not waves:
        raise DataError(
            f"--audio: none of the {len(paths)} files is usable: see the warnings above"
        )
    return waves


def _pruning_settings(about: Mapping[str, Any], path: Path) -> PruningSettings | None:
    """``pruning`` of the model config in ``about``; None without one. Raises ConfigError."""
    from ..distill.student_settings import PruningSettings
    from ..files.config import from_plain_data

    config = about.get("config")
    data = config.get("pruning") if isinstance(config, dict) else None
    return None if data is None else from_plain_data(PruningSettings, data, f"{path}: pruning")


def _count(settings: PrunedSettings) -> int:
    """Number of parameters of a student, without gates and heads."""
    from ..distill.pruning.cost import full_widths, parameters

    return round(float(parameters(settings, full_widths(settings))))


def _conv_table(small: PrunedSettings, full: PrunedSettings) -> list[str]:
    """Kept channels of each conv layer."""
    rows = [("conv layer", "channels")]
    for i, (kept, total) in enumerate(zip(small.conv_layers, full.conv_layers, strict=True), 1):
        rows.append((str(i), f"{kept[0]}/{total[0]}"))
    return text_table(rows, rule=True)


def _layer_table(
    small: PrunedSettings, full: PrunedSettings, differences: Sequence[Difference]
) -> list[str]:
    """Kept units of each transformer layer, and the difference of its output."""
    rows = [("layer", "heads", "feed-forward units", "largest difference", "relative RMS")]
    units = [("", "")]  # of the input of the first layer
    for layer in range(full.encoder_layers):
        heads = f"{len(small.heads[layer])}/{len(full.heads[layer])}"
        units.append((heads, f"{small.ffn_dims[layer]}/{full.ffn_dims[layer]}"))
    for i, (kept, (largest, relative)) in enumerate(zip(units, differences, strict=True)):
        rows.append((str(i), *kept, f"{largest:.1e}", f"{relative:.1e}"))
    return text_table(rows, rule=True)


def _print_sparsity(student: Student, small: PrunedSettings, pruning: PruningSettings) -> None:
    """Print the removed share of the cost, beside its expectation and its target."""
    from ..distill.pruning.cost import as_number, full_widths
    from ..distill.pruning.sparsity import SparsityTerm

    term = SparsityTerm(student, pruning)
    expected = term.expected().item()
    removed = 1 - as_number(term.cost(full_widths(small))) / term.full
    print(
        f"sparsity in {pruning.by}: {removed:.4f}; expected of the gates: {expected:.4f}, target: "
        f"{pruning.sparsity:.4f}"
    )
    if not abs(expected - pruning.sparsity) <= FAR:
        logger.warning(
            "the expected sparsity %.4f is more than %s from the target %.4f: the run is not "
            "finished, or needs more steps after pruning.reach_at or a higher pruning.lr",
            expected, FAR, pruning.sparsity,
        )  # fmt: skip


def _print_distance(exact: bool, worst: float, drawn: bool) -> None:
    """Print how far the cut student is from the student with gates, and why."""
    if exact:
        print(
            f"hidden states: equal to those of the student with gates up to rounding ({worst:.1e})"
        )
        return
    reason = "the kept units are drawn at random"
    if not drawn:
        reason = "pruning.norms is all, so a layer norm is taken over fewer channels than before"
    print(f"hidden states: {100 * worst:.2g} % from those of the student with gates: {reason}")


def _draw(path: Path, small: PrunedSettings, full: PrunedSettings) -> None:
    """Write the picture of the widths; without matplotlib, say so."""
    from ..distill.pruning.cost import as_number, full_widths
    from ..pretrain.widths import draw_widths
    from ..system.figures import png

    units: tuple[Unit, ...] = ("conv", "heads", "ffn")
    kept, total = (
        {unit: [as_number(width) for width in full_widths(settings).of(unit)] for unit in units}
        for settings in (small, full)
    )
    try:
        picture = png(draw_widths(kept, total))
    except SetupError as error:
        print(f"no picture {path}: {error}")
        return
    with explain_write_errors(path, CheckpointError), atomic_file(path) as file:
        file.write(picture)
    print(f"widths: {path}")


def _first_config(checkpoint: Path) -> str:
    """The model config of the run that a checkpoint is of, as YAML; a word to replace if it is not
    known."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    path = folder.resolve() / "config_model.yaml"
    return json.dumps(str(path), ensure_ascii=False) if path.is_file() else "FIRST_MODEL_CONFIG"
