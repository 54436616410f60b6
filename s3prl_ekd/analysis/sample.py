"""The teachers' hidden states on a sample of utterances."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data.audio import Recording
from ..data.bad_audio import BadAudio
from ..distill.aggregation import crop_frames
from ..distill.settings import TeacherSettings
from ..distill.target_norm import usable_frames
from ..errors import ConfigError, DataError

logger = logging.getLogger(__name__)

EXCERPT = 250_000  # samples of an utterance that are used, 15.6 s: bounds the teachers' memory
SHORTEST = 400  # samples that give one frame
MAX_FRAMES = 4096  # kept over all utterances: 13 layers of width 768 are 160 MB a teacher


def load_all(settings: Mapping[str, TeacherSettings], device: str | None) -> dict[str, nn.Module]:
    """The upstreams of a configuration by teacher name, frozen, on ``device``.

    Raises:
        TeacherError, CheckpointError: see :func:`s3prl_ekd.teachers.load_upstream`.
        ConfigError: there is no such device.
    """
    from ..teachers import check_source, load_upstream

    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"--device {device} cannot be used: {first}") from None
    for name, teacher in settings.items():
        check_source(teacher.model, f"teachers.{name}.model")
    return {
        name: load_upstream(teacher.model, f"teachers.{name}.model")
        .eval()
        .requires_grad_(False)
        .to(place)
        for name, teacher in settings.items()
    }


def read_excerpt(path: Path) -> Tensor | None:
    """The first :data:`EXCERPT` samples of a file; None, and a warning, where it cannot be used."""
    try:
        with Recording(path) as recording:
            wave = recording.read_speech(0, min(EXCERPT, recording.samples))
    except BadAudio as error:
        logger.warning("left out %s: %s", path, error.reason)
        return None
    if len(wave) < SHORTEST:
        logger.warning("left out %s: %d samples give no frame", path, len(wave))
        return None
    return wave


@torch.no_grad()
def sample_layers(
    upstreams: Mapping[str, nn.Module], paths: Sequence[Path], max_frames: int = MAX_FRAMES
) -> dict[str, list[Tensor]]:
    """Listen to each file alone (no padding) and keep some frames, evenly spaced, of all layers.

    Args:
        upstreams: by teacher name; all hear the same sound, and the same frames are kept.
        paths: audio files, the first 250,000 samples of each are used.
        max_frames: kept in all, shared evenly among the files.

    Returns:
        For each teacher its layers from 0 up, ``[frame, dim]`` each, float32 on the CPU.

    Raises:
        DataError: no file can be used.
        TeacherError: the teachers' frame rates differ.
    """
    from tqdm import tqdm

    each = max(1, max_frames // len(paths))
    kept: dict[str, list[Tensor]] = {name: [] for name in upstreams}
    for path in tqdm(paths, desc="listen", unit=" files", delay=0.3, dynamic_ncols=True):
        wave = read_excerpt(path)
        if wave is None:
            continue
        hidden = {}
        for name, upstream in upstreams.items():
            place = next(upstream.parameters()).device
            states = upstream([wave.to(place)])["hidden_states"]
            hidden[name] = torch.stack(list(states), dim=1)  # [1, layer, frame, dim]
        for name, states in crop_frames(hidden).items():
            count = states.shape[2]
            pick = torch.linspace(0, count - 1, min(each, count)).round().long()
            kept[name].append(states[0][:, pick.to(states.device)].float().cpu())
    if not all(kept.values()):
        raise DataError(f"none of the {len(paths)} utterances can be used: see the warnings above")
    layers = {name: torch.cat(parts, dim=1) for name, parts in kept.items()}  # [layer, frame, dim]
    usable = torch.stack([usable_frames(each.transpose(0, 1)) for each in layers.values()]).all(0)
    if not usable.all():
        count = int((~usable).sum())
        logger.warning("left out %d of %d frames: not finite, or huge values", count, len(usable))
        if count == len(usable):
            raise DataError("no frame of the teachers is finite")
    return {name: list(each[:, usable].unbind(0)) for name, each in layers.items()}
