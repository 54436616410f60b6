"""``torchaudio.sox_effects`` in Python, for the effects of the SUPERB tasks.

Resampling uses torchaudio instead of SoX: the band is the same and the filter differs; where the
resampled length is not an integer, torchaudio returns one sample more. All other effects agree with
SoX to the last bit of float32. Effects outside :data:`EFFECTS` (``vad``, ``pad``, ...) raise an
error.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from ..errors import SetupError
from .shim import Shim
from .torchaudio_import import LOAD_FAILURES, set_attributes

if TYPE_CHECKING:
    import torch

# An effect: ([channel, time], rate in Hz, arguments) -> ([channel, time], rate in Hz)


def _channels(wav: torch.Tensor, rate: int, count: str) -> tuple[torch.Tensor, int]:
    """Mix down to ``count`` channels, or repeat the channels cyclically up to ``count``."""
    import torch

    inputs, outputs = wav.size(0), int(count)
    if outputs > inputs:
        return wav[torch.arange(outputs) % inputs], rate
    # output channel k is the mean of the input channels i with i % outputs == k
    return torch.stack([wav[i::outputs].mean(dim=0) for i in range(outputs)]), rate


def _rate(wav: torch.Tensor, rate: int, hertz: str) -> tuple[torch.Tensor, int]:
    import torchaudio

    return torchaudio.functional.resample(wav, rate, int(hertz)), int(hertz)


def _speed(wav: torch.Tensor, rate: int, factor: str) -> tuple[torch.Tensor, int]:
    """Declare a higher rate; the ``rate`` effect that follows resamples."""
    return wav, round(rate * float(factor))


def _norm(wav: torch.Tensor, rate: int, decibel: str = "0") -> tuple[torch.Tensor, int]:
    """Scale all channels by one factor so that their peak is at ``decibel`` dBFS."""
    peak = wav.abs().max() if wav.numel() else 0
    return (wav / peak * _amplitude(decibel) if peak > 0 else wav), rate


def _gain(wav: torch.Tensor, rate: int, decibel: str) -> tuple[torch.Tensor, int]:
    # in integers of 32 bits, as SoX
    scaled = (wav.double() * 2**31 * _amplitude(decibel)).round() / 2**31
    return scaled.clamp(-1, 1).to(wav.dtype), rate


def _silence(wav: torch.Tensor, rate: int, *arguments: str) -> tuple[torch.Tensor, int]:
    """Remove silence at the start and in the middle; ``1 SECONDS PERCENT% -1 SECONDS PERCENT%``.

    Like SoX after an effect with 32 bits, such as ``gain``.
    """
    import torch

    from .sox_silence import sounding  # for ASV alone

    start, above, loud, stop, below, silent = arguments
    if (start, stop, loud[-1:], silent[-1:]) != ("1", "-1", "%", "%") or wav.size(0) != 1:
        raise ValueError("expected 1 SECONDS PERCENT% -1 SECONDS PERCENT%, and one channel")
    rules = [
        (_samples(seconds, rate), float(percent[:-1]) / 100)
        for seconds, percent in ((above, loud), (below, silent))
    ]
    parts = sounding(wav[0].numpy(), rate, *rules)
    return torch.cat([wav[:, begin:end] for begin, end in parts] or [wav[:, :0]], dim=1), rate


def _trim(
    wav: torch.Tensor, rate: int, start: str, length: str | None = None
) -> tuple[torch.Tensor, int]:
    """Keep ``length`` from ``start`` on; both in seconds or, with the suffix ``s``, in samples."""
    begin = _samples(start, rate)
    end = wav.size(1) if length is None else begin + _samples(length, rate)
    return wav[:, begin:end], rate


def _samples(position: str, rate: int) -> int:
    if position.endswith("s"):
        return int(position[:-1])
    samples = round(float(position) * rate)
    if samples < 0 or position.startswith("+"):
        raise ValueError(f"expected seconds from the start, got {position}")
    return samples


def _amplitude(decibel: str) -> float:
    return 10 ** (float(decibel) / 20)


EFFECTS = {
    "channels": _channels,
    "gain": _gain,
    "norm": _norm,
    "rate": _rate,
    "silence": _silence,
    "speed": _speed,
    "trim": _trim,
}


def effect_names() -> list[str]:
    """The names of the supported effects."""
    return sorted(EFFECTS)


def apply_effects_tensor(
    tensor: torch.Tensor,
    sample_rate: int,
    effects: Sequence[Sequence[str]],
    channels_first: bool = True,
) -> tuple[torch.Tensor, int]:
    """Apply effects in order; return the samples and their rate in Hz.

    Args:
        tensor: float samples in [-1, 1], [channel, time] ([time, channel] if not
            ``channels_first``).
        effects: name and arguments of each effect as strings: ``[["rate", "16000"]]``.

    Raises:
        SetupError: an effect is not supported, or its arguments are not valid.
    """
    wav = tensor if channels_first else tensor.t()
    for name, *arguments in effects:
        if name not in EFFECTS:
            raise SetupError(
                f"sox effect {name!r} needs SoX, which is not available; supported without it: "
                f"{', '.join(effect_names())}. Install torchaudio below 2.9 with libsox"
            )
        try:
            wav, sample_rate = EFFECTS[name](wav, sample_rate, *arguments)
        except (TypeError, ValueError) as error:
            raise SetupError(
                f"sox effect {' '.join([name, *arguments])!r} is not valid: {error}"
            ) from error
    return (wav if channels_first else wav.t()), sample_rate


def apply_effects_file(
    path: str,
    effects: Sequence[Sequence[str]],
    normalize: bool = True,
    channels_first: bool = True,
    format: str | None = None,
) -> tuple[torch.Tensor, int]:
    """Read a file with ``torchaudio.load`` and apply effects; see :func:`apply_effects_tensor`.

    ``normalize`` and ``format`` are ignored: the samples are always float32.
    """
    import torchaudio

    wav, sample_rate = torchaudio.load(path, channels_first=channels_first)
    return apply_effects_tensor(wav, sample_rate, effects, channels_first)


def _missing() -> bool:
    try:
        importlib.import_module("torchaudio.sox_effects")
    except (ModuleNotFoundError, *LOAD_FAILURES):
        return True
    return False


def _add_module() -> None:
    module = ModuleType("torchaudio.sox_effects", "Replacement; see s3prl_ekd.compat.sox.")
    for function in (apply_effects_file, apply_effects_tensor, effect_names):
        setattr(module, function.__name__, function)
    sys.modules[module.__name__] = module
    set_attributes(sox_effects=module)


SOX_EFFECTS = Shim(
    name="torchaudio.sox_effects",
    needed_by=(
        "upstream/mos_prediction/expert.py:9",
        "downstream/speech_commands/dataset.py:5",
        "downstream/sv_voxceleb1/dataset.py:19",
    ),
    since="torchaudio 2.9",
    summary=f"a replacement in Python with {', '.join(effect_names())}",
    missing=_missing,
    apply=_add_module,
)
