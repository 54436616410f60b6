"""Compute the teachers' targets once for a corpus, so that training runs no teacher.

The corpus and the excerpts are those of -c, the teachers and layers those of -g. By default the
cache has the targets of each teacher. It then works with any aggregation, weights, target
normalisation and teacher dropping, and with any subset of these teachers and layers. With
--aggregated it has the targets after aggregation: smaller, but for this aggregation only. Teachers
run on one clean utterance (or its fixed excerpt) at a time, because padding would change their
outputs. The command prints the size first, and stops if the disk has too little space. If it is
interrupted, run it again to continue. Then train with pretrain_expert.datarc.target_cache: CACHE.

example:
  s3prl-ekd cache --size
  s3prl-ekd cache -c pretrain/ekd/config_runner.yaml -g pretrain/ekd/config_model.yaml -o cache
  run_pretrain.py -u ekd -n NAME -o "config.pretrain_expert.datarc.target_cache='cache'"
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError, SetupError
from ..files.atomic import make_folder
from ..files.config import override_option
from ..system.seeds import seed_number

if TYPE_CHECKING:
    from ..data.settings import DataSettings
    from ..pretrain.target_cache.build import TargetFn

RUNNER, MODEL = "pretrain/ekd/config_runner.yaml", "pretrain/ekd/config_model.yaml"
_SEED = 1337  # the default of run_pretrain.py


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add = parser.add_argument
    add("-c", "--config", metavar="RUNNER", default=RUNNER, help=f"default: {RUNNER}")
    add("-g", "--upstream-config", metavar="MODEL", default=MODEL, help=f"default: {MODEL}")
    add("-o", "--output", metavar="CACHE", type=Path, help="folder to write")
    add(
        "--dtype", choices=("float16", "bfloat16", "int8"), default="float16",
        help="number format; int8 has a scale for each utterance and layer (default: float16)",
    )  # fmt: skip
    add("--aggregated", action="store_true", help="store targets after aggregation")
    add("--size", action="store_true", help="only print the size of the cache")
    add(
        "--seed",
        metavar="N",
        type=seed_number,
        default=_SEED,
        help=f"for excerpts (default: {_SEED})",
    )
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda if available)")
    add("--force", action="store_true", help="replace the cache in CACHE")


def main(args: argparse.Namespace) -> int:
    """Print the size, build the cache, compare it with padded batches."""
    if args.output is None and not args.size:
        raise ConfigError("no folder for the cache; add -o CACHE, or --size to print the size only")
    if args.output is not None and args.output.exists() and not args.output.is_dir():
        raise SetupError(f"-o {args.output} is a file; it must be a folder")

    from ..pretrain.settings import load_model_config, load_runner_config
    from ..teachers import check_teacher_sources

    settings = load_model_config(args.upstream_config)
    expert = load_runner_config(args.config).pretrain_expert
    check_teacher_sources(settings.teachers)

    from .. import compat

    compat.apply()
    from ..data.audio_files import SAMPLE_RATE
    from ..data.sampling import used
    from ..distill.aggregation import build_aggregation
    from ..distill.conv_layers import receptive_field
    from ..hidden_states import fingerprint
    from ..hidden_states.store import Index
    from ..pretrain.config_diff import table_digests
    from ..pretrain.target_cache import build
    from ..pretrain.target_cache.use import check_teacher_settings
    from ..student_file import input_layers
    from ..system.devices import choose_device
    from ..system.lock import FolderLock
    from ..teachers import choose_teacher_precision, load_teachers

    data = expert.datarc
    check_teacher_settings(settings)
    if args.aggregated:
        fingerprint.check_aggregated(settings)
        fingerprint.check_aggregation_differs(settings)
    conv = input_layers(settings.student)
    min_samples = receptive_field(conv)
    rows = build.cached_rows(data, min_samples)  # before loading the teachers, which is slower
    device = choose_device(args.device)
    precision, reason = choose_teacher_precision(settings, device)
    print(f"teachers in {precision} ({reason})", flush=True)
    settings = dataclasses.replace(settings, teacher_precision=precision)  # for the cache's key
    teachers = load_teachers(
        settings.teachers,
        settings.teacher_dropout,
        settings.teacher_backend,
        settings.teacher_precision,
        settings.teacher_compile,
        settings.teacher_masked_norm,
    ).eval()
    aggregate = build_aggregation(settings, teachers.shapes) if args.aggregated else None
    index = Index(
        dtype=args.dtype,
        layout=fingerprint.target_layout(teachers, None if aggregate is None else aggregate.specs),
        seed=args.seed,
        key={},
        utterances=tuple(row.name for row in rows),
    )
    size = build.estimate_bytes(rows, data.sequence_length, index, conv)
    folder = args.output or Path(".")
    blocks = ", ".join(f"{name} {count} x {dim}" for name, count, dim in index.layout)
    hours = sum(used(row, data.sequence_length) for row in rows) / SAMPLE_RATE / 3600
    print(
        f"{len(rows)} utterances, {hours:.2f} h; {args.dtype}, {blocks} per frame: "
        f"{size / 1e9:.3f} GB; {build.free_bytes(folder) / 1e9:.1f} GB free for "
        f"{folder.absolute()}",
        flush=True,
    )
    if args.size:
        return 0
    make_folder(args.output, SetupError)
    build.check_room(size, args.output)
    with FolderLock(args.output):
        teachers = teachers.to(device)
        tables = table_digests(data.file_path, [*data.sets, *data.dev_sets])
        key = fingerprint.cache_key(teachers, settings, data, tables, aggregated=args.aggregated)
        try:
            index = build.start_build(args.output, dataclasses.replace(index, key=key), args.force)
        except OSError as error:
            raise SetupError(f"cannot write into {args.output}: {error.strerror}") from None
        weights = {name: teacher.weight for name, teacher in settings.teachers.items()}
        compute = build.make_target_fn(teachers, aggregate, weights)
        if index.complete:
            print(f"{args.output} is already complete")
        else:
            build.build_cache(
                args.output, index, compute, rows, data, min_samples=min_samples, device=device
            )
        _print_differences(args.output, data, min_samples, compute, device)
    files = ""
    if (args.config, args.upstream_config) != (RUNNER, MODEL):
        files = " " + shlex.join(["-c", str(args.config), "-g", str(args.upstream_config)])
    print(
        f"train with: run_pretrain.py -u ekd -n NAME{files} "
        + override_option("pretrain_expert.datarc.target_cache", str(args.output))
    )
    return 0


def _print_differences(
    folder: Path, data: DataSettings, min_samples: int, compute: TargetFn, device: str
) -> None:
    """Print how much targets computed in padded batches of this run differ from the cached ones."""
    from ..data.batches import DistillationDataset, train_loader
    from ..hidden_states.store import TargetReader
    from ..pretrain.target_cache.build import relative_differences

    reader = TargetReader(folder)
    bad = int((reader.records["frames"] == 0).sum())
    if bad:
        print(f"{bad} utterances have no targets because of bad audio")
    dataset = train_loader(
        dataclasses.replace(data, num_workers=0),
        data.sets,
        min_samples=min_samples,
        shuffle=False,
        targets=reader,
    ).dataset
    assert isinstance(dataset, DistillationDataset)
    print(
        "difference to targets computed in padded batches of this size (relative to the mean "
        "absolute target):"
    )
    for name, (mean, worst) in relative_differences(dataset, compute, device).items():
        print(f"  {name}: mean {mean:.2%}, maximum {worst:.1%}")
