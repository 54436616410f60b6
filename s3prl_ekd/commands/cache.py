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
import logging
import shlex
from pathlib import Path

from ..errors import ConfigError, SetupError
from ..files.atomic import make_folder
from ..files.config import override_option

logger = logging.getLogger(__name__)

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
    add("--seed", metavar="N", type=int, default=_SEED, help=f"for excerpts (default: {_SEED})")
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda if available)")
    add("--force", action="store_true", help="replace the cache in CACHE")


def main(args: argparse.Namespace) -> int:
    """Print the size, build the cache, compare it with padded batches."""
    if args.output is None and not args.size:
        raise ConfigError("no folder for the cache; add -o CACHE, or --size to print the size only")
    if args.output is not None and args.output.exists() and not args.output.is_dir():
        raise SetupError(f"-o {args.output} is a file; it must be a folder")

    from ..hidden_states.fingerprint import check_aggregated, check_aggregation_differs
    from ..pretrain.settings import load_model_config, load_runner_config
    from ..pretrain.target_cache.build import cached_rows
    from ..pretrain.target_cache.use import check_teacher_settings

    settings = load_model_config(args.upstream_config)
    expert = load_runner_config(args.config).pretrain_expert
    assert expert is not None  # checked by load_runner_config
    data = expert.datarc
    check_teacher_settings(settings)
    if args.aggregated:
        check_aggregated(settings)
        check_aggregation_differs(settings)
    rows = cached_rows(data, settings.student)  # before loading the teachers, which is slower

    import torch

    from .. import compat

    compat.apply()
    from ..distill.aggregation import build_aggregation
    from ..hidden_states.fingerprint import target_layout
    from ..hidden_states.store import Index
    from ..pretrain.target_cache.build import check_room, estimate_size
    from ..teachers import check_precision, load_teachers

    device = _device(args.device)
    check_precision(settings.teacher_precision, str(device))
    teachers = load_teachers(
        settings.teachers,
        settings.teacher_dropout,
        settings.teacher_backend,
        settings.teacher_precision,
        settings.teacher_compile,
    )
    teachers.eval()
    aggregate = None
    if args.aggregated:
        aggregate = build_aggregation(settings, teachers.shapes)
    index = Index(
        dtype=args.dtype,
        layout=target_layout(teachers, None if aggregate is None else aggregate.specs),
        seed=args.seed,
        key={},
        utterances=tuple(row.path for row in rows),
    )
    size = estimate_size(rows, data.sequence_length, index, settings.student.conv_layers)
    _print_size(size, index, args)
    if args.size:
        return 0
    make_folder(args.output, SetupError)
    check_room(size, args.output)

    from ..system.lock import FolderLock

    with FolderLock(args.output):
        return _build(
            args, settings, data, rows, teachers.to(torch.device(device)), aggregate, index
        )


def _build(args, settings, data, rows, teachers, aggregate, index) -> int:
    from ..hidden_states.fingerprint import cache_key
    from ..pretrain.config_diff import table_digests
    from ..pretrain.target_cache.build import build_cache, make_target_fn, start_build

    key = cache_key(
        teachers,
        settings,
        aggregated=args.aggregated,
        tables=table_digests(data.file_path, [*data.sets, *data.dev_sets]),
        sequence_length=data.sequence_length,
        max_timestep=data.max_timestep,
    )
    device = str(next(teachers.parameters()).device)
    try:
        index = start_build(args.output, dataclasses.replace(index, key=key), args.force)
    except OSError as error:
        raise SetupError(f"cannot write into {args.output}: {error.strerror}") from None
    weights = {name: teacher.weight for name, teacher in settings.teachers.items()}
    compute = make_target_fn(teachers, aggregate, weights)
    if index.complete:
        print(f"{args.output} is already complete")
    else:
        build_cache(
            args.output,
            index,
            compute,
            rows,
            data,
            min_samples=settings.student.min_samples,
            device=device,
        )
    _print_differences(args, settings, data, compute, device)
    files = ""
    if (args.config, args.upstream_config) != (RUNNER, MODEL):
        files = " " + shlex.join(["-c", str(args.config), "-g", str(args.upstream_config)])
    print(
        f"train with: run_pretrain.py -u ekd -n NAME{files} "
        + override_option("pretrain_expert.datarc.target_cache", str(args.output))
    )
    return 0


def _print_size(size, index, args: argparse.Namespace) -> None:
    from ..pretrain.target_cache.build import free_bytes

    blocks = ", ".join(f"{name} {count} x {dim}" for name, count, dim in index.layout)
    folder = args.output or Path(".")
    print(
        f"{size.utterances} utterances, {size.seconds / 3600:.2f} h; {index.dtype}, "
        f"{blocks} per frame: {size.bytes / 1e9:.3f} GB; {free_bytes(folder) / 1e9:.1f} GB free "
        f"for {folder.absolute()}",
        flush=True,
    )


def _print_differences(args, settings, data, compute, device: str) -> None:
    """Print how much targets computed in padded batches of this run differ from the cached ones."""
    from ..data.batches import DistillationDataset, train_loader
    from ..hidden_states.store import TargetReader
    from ..pretrain.target_cache.build import relative_differences

    reader = TargetReader(args.output)
    bad = int((reader.records["frames"] == 0).sum())
    if bad:
        print(f"{bad} utterances have no targets because of bad audio")
    dataset = train_loader(
        dataclasses.replace(data, num_workers=0),
        data.sets,
        min_samples=settings.student.min_samples,
        shuffle=False,
        targets=reader,
    ).dataset
    assert isinstance(dataset, DistillationDataset)
    print(
        "difference to targets computed in padded batches of this size (relative to the mean "
        "absolute target):"
    )
    for name, difference in relative_differences(dataset, compute, device).items():
        print(f"  {name}: mean {difference.mean:.2%}, maximum {difference.worst:.1%}")


def _device(name: str | None) -> str:
    import torch

    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cpu" and not device.startswith("cuda"):
        raise SetupError(f"--device must be cpu, cuda or cuda:N, got {device}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SetupError("--device cuda: torch finds no CUDA device; use --device cpu")
    return device
