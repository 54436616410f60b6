"""Cut a student to the units that its gates keep: channels, attention heads, feed-forward units.

CKPT is of a run with `pruning` in its model config. FILE is a student file of the smaller student
with its prediction heads. Next to it, with other suffixes: .yaml, the model config of the second
distillation, whose command is printed, and .png, a picture of what is kept of each layer (extra
plots).

The student with gates and the cut student run on the same audio, and their hidden states are
compared. They are equal up to rounding, or nothing is written; but not with `pruning.norms: all`,
where layer norms are taken over fewer channels after the cut.

example:
  s3prl-ekd prune result/pretrain/my_student -o pruned.pt
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, ConfigError, DataError, SetupError
from ..files.atomic import atomic_file, explain_write_errors, write_text
from ..files.config import from_plain_data, to_plain_data
from ..files.text import read_text
from ..pretrain.settings import ModelFile, load_model_config
from ..system.tables import text_table
from ..teachers.student_source import check_student
from ..workspace import SECOND_STEP_TITLE, Schedule, second_step
from .export import add_checkpoint, check_output, load_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from ..distill.pruning.cut import StateDifference
    from ..distill.pruning.sparsity import SparsityTerm
    from ..distill.student_settings import PrunedSettings, Unit

logger = logging.getLogger(__name__)

ROUNDING = 1e-4  # largest relative difference that rounding may cause (measured: 1e-6)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_checkpoint(parser)
    add = parser.add_argument
    add("-o", "--output", metavar="FILE", type=Path, required=True)
    add(
        "--audio", metavar="AUDIO", type=Path, nargs="+", action="extend", default=[],
        help="audio files on which the two students are compared (default: noise)",
    )  # fmt: skip
    add(
        "--random", metavar="SEED", type=int,
        help="keep as many units of each layer, but drawn at random: a control",
    )  # fmt: skip
    add("--force", action="store_true", help="replace existing files")


def main(args: argparse.Namespace) -> int:
    """Write the student file and the picture; return exit code 0."""
    check_student(args.checkpoint)

    from ..distill.pruning import cut
    from ..distill.pruning.sparsity import SparsityTerm
    from ..distill.student_settings import CopySettings, PrunedSettings
    from ..student_file import LoadedStudent, write_student

    if not args.output.name or args.output.is_dir():
        raise ConfigError(f"-o {args.output}: expected a file name, such as pruned.pt")
    picture, config = (args.output.with_suffix(suffix) for suffix in (".png", ".yaml"))
    if args.output in (picture, config):
        raise ConfigError(
            f"-o {args.output}: expected a student file; {picture.name} is its picture and "
            f"{config.name} a config"
        )
    for output in (args.output, picture, config):
        check_output(output, args.force)
    if args.random is not None and not 0 <= args.random < 2**63:
        raise ConfigError(f"--random must be 0 to {2**63 - 1}, got {args.random}")
    source, loaded = load_checkpoint(args.checkpoint)
    path = source.path
    _check_replaced(args.output, config, path)
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
    if not math.isfinite(worst):
        raise CheckpointError(
            f"{path}: its hidden states are not finite ({worst}); prune an earlier checkpoint; "
            "nothing is written"
        )
    if exact and worst > ROUNDING:
        raise CheckpointError(
            f"{path}: the cut student differs by {worst:.1e} of the hidden states' size from the "
            f"student with gates (at most {ROUNDING:.0e} is expected); nothing is written"
        )

    model = _model_config(loaded.about, path)
    pruning = None if model is None else model.pruning
    term = None if pruning is None else SparsityTerm(loaded.student, pruning)
    before, after = _count(full), _count(small)
    about = {**loaded.about, "pruned": {"from": before, "to": after}}
    about.pop("initial_weights", None)  # two cuts of one student may keep different units
    if model is not None and isinstance(model.student, CopySettings):
        about["pruned"]["of"] = model.student.of
    if pruning is not None:
        about["pruned"] |= {"sparsity": pruning.sparsity, "by": pruning.by}
    if args.random is not None:
        about["pruned"]["random"] = args.random
    write_student(LoadedStudent(student, loaded.heads, loaded.targets, about), args.output)
    print("\n".join([*_conv_table(small, full), "", *_layer_table(small, full, differences), ""]))
    print(f"{path} -> {args.output}, heads {'kept' if loaded.heads else 'absent'}")
    print(f"{before:,} -> {after:,} parameters: {100 * (1 - after / before):.1f} % removed")
    if term is not None:
        _print_sparsity(term, small)
    _print_distance(exact, worst, args.random is not None)
    _draw(picture, small, full)
    if model is not None:
        first = _schedule(loaded.about)
        keep_heads = loaded.heads is not None
        text, command = second_step(to_plain_data(model), str(args.output), first, keep_heads)
        with explain_write_errors(config, CheckpointError):
            write_text(config, text)
        print(f"model config of the second distillation: {config}")
        print(f"next: {command}")
    return 0


def _check_replaced(output: Path, config: Path, checkpoint: Path) -> None:
    """Refuse to replace the student with gates, or a config that is not of this command.

    Raises:
        CheckpointError: with ``--force``, too.
    """
    if output.resolve() == checkpoint.resolve():
        raise CheckpointError(
            f"-o {output} is the student with gates, which can be cut again; write the cut one to "
            "another file"
        )
    if config.exists():
        lines = read_text(config, "configuration", CheckpointError).splitlines()
        if not lines or not lines[0].startswith(SECOND_STEP_TITLE):
            raise CheckpointError(
                f"{config} exists and is not of an earlier `prune`; give -o another name"
            )


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


def _model_config(about: Mapping[str, Any], path: Path) -> ModelFile | None:
    """The model config in ``about``, checked; None if the student is not of a run.

    Raises:
        ConfigError: it is not valid.
    """
    config = about.get("config")
    if not isinstance(config, dict):
        return None
    try:
        return load_model_config(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: the config in its `about`: {error}") from None


def _schedule(about: Mapping[str, Any]) -> Schedule:
    """Steps and learning rate of the run; a warning if it has not ended."""
    try:
        first = from_plain_data(Schedule, about.get("run", {}), "run")
    except ConfigError:  # of a hostile file
        first = Schedule()
    step = about.get("step")
    if "run" in about and isinstance(step, int) and step < first.total_steps:
        logger.warning("the run has not ended: step %d of %d", step, first.total_steps)
    return first


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
    small: PrunedSettings, full: PrunedSettings, differences: Sequence[StateDifference]
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


def _print_sparsity(term: SparsityTerm, small: PrunedSettings) -> None:
    """Print the expected sparsity beside its target, which the cut student has up to rounding."""
    from ..distill.pruning.cost import as_number, full_widths

    pruning = term.pruning
    if pruning.by == "macs":
        after = as_number(term.cost(full_widths(small)))
        share = f"{100 * (1 - after / term.full):.1f} % removed"
        print(f"{term.full:,.0f} -> {after:,.0f} MACs in {pruning.seconds:g} s: {share}")
    expected = term.expected().item()
    print(f"expected of the gates: {100 * expected:.1f} %; target: {100 * pruning.sparsity:.1f} %")
    if not term.is_reached():
        logger.warning(
            "the expected sparsity %.3f is far from the target %.3f: the run is not finished, or "
            "needs more steps after pruning.reach_at or another pruning.lr",
            expected,
            pruning.sparsity,
        )


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
    print(f"hidden states: up to {worst:.2g} (relative RMS) from the student with gates: {reason}")


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
