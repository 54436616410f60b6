"""Hidden states of teachers for a sample of utterances."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data.audio import Recording
from ..data.audio_files import AudioPart
from ..data.bad_audio import BadAudio
from ..distill.aggregation import crop_frames
from ..distill.moments import usable_frames
from ..distill.settings import TeacherSettings
from ..errors import DataError
from ..system.devices import choose_device, module_device

logger = logging.getLogger(__name__)

EXCERPT = 250_000  # samples used per utterance, 15.6 s, to limit the teachers' memory
MIN_SAMPLES = 400  # length of one frame
MAX_FRAMES = 4096  # over all utterances: 13 layers of width 768 take 160 MB per teacher


def load_upstreams(
    settings: Mapping[str, TeacherSettings], device: str | None
) -> dict[str, nn.Module]:
    """Load the upstreams of a config, frozen, on ``device`` (default: cuda if available)."""
    from ..teachers import check_teacher_sources, load_upstream

    device = choose_device(device)
    check_teacher_sources(settings)
    upstreams = {}
    for name, teacher in settings.items():
        upstream = load_upstream(teacher.model, f"teachers.{name}.model")
        upstreams[name] = upstream.eval().requires_grad_(False).to(device)
    return upstreams


def read_excerpt(path: Path | AudioPart) -> Tensor | None:
    """Read the first :data:`EXCERPT` samples of a file or segment; None with a warning if it is
    unusable."""
    try:
        with Recording(path) as recording:
            wave = recording.read_speech(0, min(EXCERPT, recording.samples))
    except BadAudio as error:
        logger.warning("skipped %s: %s", path, error.reason)
        return None
    if len(wave) < MIN_SAMPLES:
        logger.warning("skipped %s: %d samples are too few for one frame", path, len(wave))
        return None
    return wave


@torch.no_grad()
def sample_layers(
    upstreams: Mapping[str, nn.Module],
    paths: Sequence[Path | AudioPart],
    max_frames: int = MAX_FRAMES,
) -> tuple[dict[str, list[Tensor]], int]:
    """Run the teachers on the start of each file alone (no padding); keep evenly spaced frames.

    The same frames are kept for all teachers and layers; in all ``max_frames``, shared evenly among
    the files.

    Returns:
        Teacher name -> its layers from 0 up, ``[frame, dim]`` each, float32 on the CPU; and the
        number of files that were usable.

    Raises:
        DataError: no file is usable, or no frame is finite.
        TeacherError: the teachers' frame rates differ.
    """
    from tqdm import tqdm

    frames_per_file = max(1, max_frames // len(paths))
    sampled: dict[str, list[Tensor]] = {name: [] for name in upstreams}
    for path in tqdm(paths, desc="teachers", unit=" files", delay=0.3, dynamic_ncols=True):
        wave = read_excerpt(path)
        if wave is None:
            continue
        hidden = {}
        for name, upstream in upstreams.items():
            states = upstream([wave.to(module_device(upstream))])["hidden_states"]
            hidden[name] = torch.stack(list(states), dim=1)  # [1, layer, frame, dim]
        for name, states in crop_frames(hidden).items():
            count = states.shape[2]
            indices = torch.linspace(0, count - 1, min(frames_per_file, count)).round().long()
            sampled[name].append(states[0][:, indices.to(states.device)].float().cpu())
    if not all(sampled.values()):
        raise DataError(f"none of the {len(paths)} utterances is usable: see the warnings above")
    # teacher -> [layer, frame, dim]
    layers = {name: torch.cat(states, dim=1) for name, states in sampled.items()}
    usable = torch.stack([usable_frames(x.transpose(0, 1)) for x in layers.values()]).all(0)
    if not usable.all():
        count = int((~usable).sum())
        logger.warning("skipped %d of %d frames: values not finite or huge", count, len(usable))
        if count == len(usable):
            raise DataError("no frame of the teachers is finite")
    used = len(next(iter(sampled.values())))
    return {name: list(x[:, usable].unbind(0)) for name, x in layers.items()}, used
