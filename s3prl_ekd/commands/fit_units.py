"""Fit k-means units on the frames of a teacher's layer.

Writes a safetensors file with the centroids; its metadata has teacher, layer, width, clusters,
inertia and a digest of the teacher's weights. Needs scikit-learn.

example:
  s3prl-ekd fit-units pretrain/ekd/config_model.yaml --teacher hubert --layer 9 --clusters 100 \\
      --data data/len_for_bucket/train.csv --audio-root /data/LibriSpeech -o units.safetensors
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..analysis.choice import add_sample_options, choose_audio
from ..errors import ConfigError, TeacherError
from .export import check_output

if TYPE_CHECKING:
    from torch import nn

    from ..data.audio_files import AudioPart

logger = logging.getLogger(__name__)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("config", metavar="CONFIG", type=Path, help="a model config, as for -g")
    add = parser.add_argument
    add("--teacher", metavar="NAME", required=True, help="a teacher of CONFIG")
    add("--layer", metavar="N", type=int, required=True, help="index into hidden_states")
    add("--clusters", metavar="N", type=int, default=100, help="number of units (default: 100)")
    add_sample_options(parser, utterances=500)  # an utterance needs about 2 MB at width 768
    add("-o", "--output", metavar="FILE", type=Path, required=True)
    add("--force", action="store_true", help="replace an existing FILE")


def main(args: argparse.Namespace) -> int:
    """Fit the units, write them and print a summary."""
    from ..pretrain.settings import load_model_config

    for name, minimum in (("clusters", 2), ("utterances", 1), ("layer", 0)):
        if getattr(args, name) < minimum:
            raise ConfigError(f"--{name} must be at least {minimum}, got {getattr(args, name)}")
    check_output(args.output, args.force)
    teachers = load_model_config(args.config).teachers
    if args.teacher not in teachers:
        raise ConfigError(
            f"no such teacher in {args.config}: --teacher {args.teacher}; use one of: "
            f"{', '.join(teachers)}"
        )
    from ..analysis.sample import load_upstreams
    from ..essence.units import (
        collect_frames,
        fit_units,
        require_sklearn,
        save_units,
        upstream_digest,
    )

    require_sklearn()  # before minutes of computing
    paths = choose_audio(args.data, args.audio_root, args.utterances, args.seed)
    teacher = {args.teacher: teachers[args.teacher]}
    upstream = load_upstreams(teacher, args.device)[args.teacher]
    frames = collect_frames(_hidden_states(upstream, args.teacher, args.layer, paths))
    logger.info("%d frames of width %d", *frames.shape)
    source = {"teacher": args.teacher, "layer": args.layer, "model": teachers[args.teacher].model}
    source["weights"] = upstream_digest(upstream)
    units = fit_units(frames, args.clusters, args.seed, **source)
    save_units(units, args.output)
    print(f"{units.clusters} units of {args.teacher}, layer {args.layer} -> {args.output}")
    print(f"{units.frames} frames, mean squared distance {units.inertia:.4f}")
    return 0


def _hidden_states(upstream: nn.Module, name: str, layer: int, paths: list[AudioPart]) -> Iterator:
    """Yield the layer's output ``[1, frame, dim]`` for each utterance; skip bad audio."""
    import torch
    from tqdm import tqdm

    from ..analysis.sample import read_excerpt
    from ..system.devices import module_device

    device = module_device(upstream)
    for path in tqdm(paths, desc=name, unit=" files", dynamic_ncols=True):
        wave = read_excerpt(path)
        if wave is None:
            continue
        with torch.no_grad():
            states = upstream([wave.to(device)])["hidden_states"]
        if layer >= len(states):
            last = len(states) - 1
            raise TeacherError(f"--layer must be 0 to {last}, the layers of {name}, got {layer}")
        yield states[layer]
