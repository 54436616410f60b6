"""Hidden states of audio files, one utterance at a time, in one safetensors file.

One at a time and never as a padded batch: the first conv layer normalises over time, so padding
would change every hidden state. What is written is what the upstream gives for the file alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePath

import torch
from torch import Tensor, nn

from .. import __version__
from ..data.audio import read_audio
from ..data.audio_files import SAMPLE_RATE, find_audio, read_header
from ..errors import CheckpointError, ConfigError, DataError
from ..files.atomic import file_sha256
from ..files.safetensors_file import SafetensorsWriter
from ..files.text import read_text

FORMAT, VERSION = "s3prl_ekd.features", 1
_AHEAD = 4  # files that are read while the model works


def collect_audio(given: Sequence[str], lists: Sequence[Path] = ()) -> dict[str, Path]:
    """Files, folders and lists of files -> ``{key: path}``.

    The key of a file in a folder is its path inside that folder; the key of a file that is named,
    on the command line or in a list, is its path as it is written there. Always with ``/``.

    Raises:
        DataError: nothing is there, a list cannot be read, or two files have one key.
    """
    found: dict[str, Path] = {}

    def add(key: str, path: Path) -> None:
        if key in found:
            raise DataError(
                f"{found[key]} and {path} would both be called {key}; give the folder above both, "
                "or write two files"
            )
        found[key] = path

    for text in given:
        path = Path(text)
        if path.is_dir():
            for name in find_audio(path):
                add(name, path / name)
        else:
            add(PurePath(text).as_posix(), path)
    for listed in lists:
        for text in _lines(listed):
            add(PurePath(text).as_posix(), Path(text))
    if not found:
        raise DataError("there are no audio files in what was given (.flac .wav .ogg .opus)")
    return found


def _lines(path: Path) -> list[str]:
    text = read_text(path, "list", DataError, limit=1 << 28, utf8="utf-8-sig")
    return [line.strip() for line in text.splitlines() if line.strip()]


@dataclass
class Written:
    """What :func:`write_features` did."""

    files: int = 0
    seconds: float = 0.0  # of audio
    bad: list[tuple[str, str]] = field(default_factory=list)  # (key, why) of files left out


def choose_layers(text: str, count: int) -> list[int]:
    """``all``, ``last`` or numbers like ``0,2`` -> indices into ``count`` hidden states.

    Raises:
        ConfigError: something else, or a layer that is not there.
    """
    if text == "all":
        return list(range(count))
    if text == "last":
        return [count - 1]
    try:
        layers = [int(part) for part in text.split(",")]
    except ValueError:
        layers = []
    if not layers or len(set(layers)) < len(layers):
        raise ConfigError(f"--layers {text!r}: write all, last, or different numbers as 0,2")
    for layer in layers:
        if not 0 <= layer < count:
            raise ConfigError(
                f"--layers: there is no layer {layer}; this student has 0 to {count - 1}"
            )
    return layers


def write_features(
    checkpoint: Path,
    audio: Mapping[str, Path],
    output: Path,
    *,
    layers: str = "all",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    max_seconds: float = 300.0,
    skip_bad: bool = False,
    progress: Callable[[Iterable, int], Iterable] = lambda items, total: items,
) -> Written:
    """Write a tensor ``KEY#LAYER`` ``[frame, dim]`` for each file and layer.

    The metadata are ``format``, ``version``, ``sample_rate`` (Hz), ``stride`` (samples a frame),
    ``layers``, ``dim``, ``checkpoint`` (name), ``checkpoint_sha256`` and ``made_by``.

    Args:
        checkpoint: a student file or ``states-*.ckpt``.
        audio: ``{key: path}``, of :func:`.features.collect_audio`.
        output: whole or not at all.
        max_seconds: a longer file is a bad one; a full-size student takes 17 MB a second.
        skip_bad: leave out bad files and say so; else the first one is an error.
        progress: wraps the files, whose number it is given, for a progress bar.

    Raises:
        DataError: a bad file, or none that is good.
        ConfigError: see :func:`choose_layers`.
        CheckpointError: the checkpoint cannot be read, or the output not be written.
    """
    from ..files.atomic import whole_file
    from ..upstream.expert import UpstreamExpert

    upstream = UpstreamExpert(str(checkpoint)).to(device).eval()
    settings = upstream.student.settings
    chosen = choose_layers(layers, settings.encoder_layers + 1)
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "sample_rate": str(SAMPLE_RATE),
        "stride": str(settings.stride),
        "layers": ",".join(map(str, chosen)),
        "dim": str(upstream.student.width),
        "checkpoint": checkpoint.name,
        "checkpoint_sha256": file_sha256(checkpoint),
        "made_by": f"s3prl_ekd {__version__}",
    }
    written = Written()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(output) as file:
            keys = (f"{key}#{layer}" for key in audio for layer in chosen)
            features = SafetensorsWriter(file, keys, metadata)
            for key, wave in progress(_read_ahead(audio, max_seconds), len(audio)):
                try:
                    if isinstance(wave, DataError):
                        raise wave
                    states = _states(upstream, wave.to(device), chosen, dtype, audio[key])
                except DataError as error:
                    if not skip_bad:
                        raise
                    written.bad.append((key, str(error)))
                    continue
                for layer, state in zip(chosen, states, strict=True):
                    features.add(f"{key}#{layer}", state)
                written.files += 1
                written.seconds += len(wave) / SAMPLE_RATE
            if not written.files:
                raise DataError(f"none of the {len(audio)} files is good: {written.bad[0][1]}")
            features.finish()
    except OSError as error:
        if error.errno is None:  # not the system's
            raise
        raise CheckpointError(f"cannot write {output}: {error.strerror}") from None
    return written


def _states(
    upstream: nn.Module, wave: Tensor, layers: list[int], dtype: torch.dtype, path: Path
) -> list[Tensor]:
    """The chosen hidden states of one waveform, ``[frame, dim]`` each.

    Raises:
        DataError: a value is not finite, or too large for ``dtype``.
    """
    with torch.inference_mode():
        every = upstream([wave])["hidden_states"]
        states = [every[layer][0].to(dtype).cpu() for layer in layers]
    for state in states:
        if not state.isfinite().all():
            raise DataError(
                f"the hidden states of {path} are not all finite in {str(dtype).split('.')[-1]}"
                + ("" if dtype == torch.float32 else "; --dtype float32 may hold them")
            )
    return states


def _read_ahead(
    audio: Mapping[str, Path], max_seconds: float
) -> Iterator[tuple[str, Tensor | DataError]]:
    """Each file's key and waveform, or why there is none; a few are read in advance."""
    waiting: deque = deque()
    pool = ThreadPoolExecutor(1)
    try:
        for key, path in audio.items():
            waiting.append((key, pool.submit(_read, path, max_seconds)))
            if len(waiting) > _AHEAD:
                first, job = waiting.popleft()
                yield first, job.result()
        for key, job in waiting:
            yield key, job.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _read(path: Path, max_seconds: float) -> Tensor | DataError:
    try:
        try:
            str(path).encode("utf-8")
        except UnicodeEncodeError:
            raise DataError(f"{path!r} is not a UTF-8 name, so no key can hold it") from None
        seconds = read_header(path).samples / SAMPLE_RATE  # before an hour of it is in memory
        if seconds > max_seconds:
            raise DataError(
                f"{path} is {seconds:.0f} s long, more than --max-seconds {max_seconds:g}"
            )
        wave = read_audio(path, speech=True)
    except DataError as error:
        return error
    return wave
