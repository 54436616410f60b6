"""Run the teachers once over a corpus and store their targets, so that no step runs a teacher.

Takes the files of a run: -c says which corpus and which excerpts, -g which teachers and layers. By
default each teacher's targets are stored, which serve any aggregation, weights, standardisation and
teacher dropping, and any choice among these teachers and layers; --aggregated stores what one
aggregation makes of them, which is smaller. Teachers hear each utterance, or its one excerpt, alone
and clean: padding would change what they say. Says the size first and refuses what does not fit on
the disk. When it is cut, the same command goes on. Then train with
pretrain_expert.datarc.target_cache: CACHE.

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
from ..files.config import typed

logger = logging.getLogger(__name__)

RUNNER, MODEL = "pretrain/ekd/config_runner.yaml", "pretrain/ekd/config_model.yaml"
_SEED = 1337  # run_pretrain.py's


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add = parser.add_argument
    add("-c", "--config", metavar="RUNNER", default=RUNNER, help=f"(default: {RUNNER})")
    add("-g", "--upstream-config", metavar="MODEL", default=MODEL, help=f"(default: {MODEL})")
    add("-o", "--output", metavar="CACHE", type=Path, help="a folder, made if it is not there")
    add(
        "--dtype", choices=("float16", "bfloat16", "int8"), default="float16",
        help="of the numbers; int8 has a scale for each utterance and layer (default: float16)",
    )  # fmt: skip
    add("--aggregated", action="store_true", help="the targets after aggregation, not before")
    add("--size", action="store_true", help="only say how large it would be")
    add("--seed", metavar="N", type=int, default=_SEED, help=f"of the excerpts (default: {_SEED})")
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    add("--force", action="store_true", help="replace the cache that is in CACHE")


def main(args: argparse.Namespace) -> int:
    """Say the size, build, compare with batches; the exit code is 0."""
    if args.output is None and not args.size:
        raise ConfigError("name the folder of the cache with -o CACHE, or add --size")
    if args.output is not None and args.output.exists() and not args.output.is_dir():
        raise SetupError(f"-o {args.output} is a file; name a folder")

    from ..hidden_states.fingerprint import check_aggregated, check_worth
    from ..pretrain.settings import load_model_config, load_runner_config
    from ..pretrain.target_cache.build import cached_rows
    from ..pretrain.target_cache.use import check_teacher_settings

    settings = load_model_config(args.upstream_config)
    expert = load_runner_config(args.config).pretrain_expert
    assert expert is not None  # refused when it was read
    data = expert.datarc
    check_teacher_settings(settings)
    if args.aggregated:
        check_aggregated(settings)
        check_worth(settings)
    rows = cached_rows(data, settings.student)  # before the teachers, which take longer

    import torch

    from .. import compat

    compat.apply()
    from ..distill.aggregation import build_aggregation
    from ..hidden_states.fingerprint import layout_of
    from ..hidden_states.store import Index
    from ..pretrain.target_cache.build import check_room, size_of
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
        layout=layout_of(teachers, None if aggregate is None else aggregate.specs),
        seed=args.seed,
        key={},
        utterances=tuple(row.path for row in rows),
    )
    size = size_of(rows, data.sequence_length, index, settings.student.conv_layers)
    _say_size(size, index, args)
    if args.size:
        return 0
    _make(args.output)
    check_room(size, args.output)

    from ..system.lock import FolderLock

    with FolderLock(args.output):
        return _build(
            args, settings, data, rows, teachers.to(torch.device(device)), aggregate, index
        )


def _build(args, settings, data, rows, teachers, aggregate, index) -> int:
    from ..hidden_states.fingerprint import make_key
    from ..pretrain.config_diff import table_digests
    from ..pretrain.target_cache.build import begin, build, targets_of

    key = make_key(
        teachers,
        settings,
        aggregated=args.aggregated,
        tables=table_digests(data.file_path, [*data.sets, *data.dev_sets]),
        sequence_length=data.sequence_length,
        max_timestep=data.max_timestep,
    )
    device = str(next(teachers.parameters()).device)
    try:
        index = begin(args.output, dataclasses.replace(index, key=key), args.force)
    except OSError as error:
        raise SetupError(f"cannot write into {args.output}: {error.strerror}") from None
    weights = {name: teacher.weight for name, teacher in settings.teachers.items()}
    compute = targets_of(teachers, aggregate, weights)
    if index.complete:
        print(f"{args.output} is complete already")
    else:
        build(
            args.output,
            index,
            compute,
            rows,
            data,
            min_samples=settings.student.min_samples,
            device=device,
        )
    _print_distances(args, settings, data, compute, device)
    files = ""
    if (args.config, args.upstream_config) != (RUNNER, MODEL):
        files = " " + shlex.join(["-c", str(args.config), "-g", str(args.upstream_config)])
    print(
        f"train with: run_pretrain.py -u ekd -n NAME{files} "
        + typed("pretrain_expert.datarc.target_cache", str(args.output))
    )
    return 0


def _say_size(size, index, args: argparse.Namespace) -> None:
    from ..pretrain.target_cache.build import free_bytes

    blocks = ", ".join(f"{name} {count} x {dim}" for name, count, dim in index.layout)
    where = args.output or Path(".")
    print(
        f"{size.utterances} utterances, {size.seconds / 3600:.2f} h; {index.dtype}, a frame has "
        f"{blocks}: {size.gigabytes:.3f} GB; {free_bytes(where) / 1e9:.1f} GB are free for "
        f"{where.absolute()}",
        flush=True,
    )


def _print_distances(args, settings, data, compute, device: str) -> None:
    """What batches of this run's size would have had for targets."""
    from ..data.batches import DistillationDataset, train_loader
    from ..hidden_states.store import TargetReader
    from ..pretrain.target_cache.build import distances

    reader = TargetReader(args.output)
    bad = int((reader.records["frames"] == 0).sum())
    if bad:
        print(f"{bad} utterances have no targets: their audio is bad")
    dataset = train_loader(
        dataclasses.replace(data, num_workers=0),
        data.sets,
        min_samples=settings.student.min_samples,
        shuffle=False,
        targets=reader,
    ).dataset
    assert isinstance(dataset, DistillationDataset)
    print(
        "targets computed in padded batches of this size differ from the stored ones, which are of "
        "each utterance alone, by (shares of the mean absolute target):"
    )
    for name, distance in distances(dataset, compute, device).items():
        print(f"  {name}: {distance.mean:.2%} in the mean, {distance.worst:.1%} at worst")


def _device(wanted: str | None) -> str:
    import torch

    device = wanted or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cpu" and not device.startswith("cuda"):
        raise SetupError(f"--device {device}: cpu, cuda or cuda:N is allowed")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SetupError("--device cuda: torch sees no CUDA device here; use --device cpu")
    return device


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"cannot write to {folder}: {error.strerror}") from None
