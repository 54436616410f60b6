"""Extract hidden states of audio files into one safetensors file.

Utterances are run one by one, never as a padded batch: the first conv layer normalises over time,
so padding would change every hidden state.
"""

from __future__ import annotations

import itertools
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
from ..files.atomic import atomic_file, explain_write_errors
from ..files.safetensors_file import SafetensorsWriter
from ..files.text import read_text
from ..teachers.student_source import find_student

FORMAT, VERSION = "s3prl_ekd.features", 1
_READ_AHEAD = 4  # files read in advance, while the model runs


def collect_audio(paths: Sequence[str], lists: Sequence[Path] = ()) -> dict[str, Path]:
    """Collect audio files as ``{key: path}``.

    The key of a file in a folder is its path relative to that folder; the key of a file named in
    ``paths`` or in a list (a text file with one path per line) is its path as written. Keys use
    ``/``.

    Raises:
        DataError: no audio files, a list that cannot be read, or two files with the same key.
    """
    audio: dict[str, Path] = {}

    def add(key: str, path: Path) -> None:
        if key in audio:
            raise DataError(
                f"{audio[key]} and {path} would both have the key {key}; name a folder that "
                "contains both, or write two output files"
            )
        audio[key] = path

    for text in paths:
        path = Path(text)
        if path.is_dir():
            for name in find_audio(path):
                add(name, path / name)
        else:
            add(PurePath(text).as_posix(), path)
    for list_file in lists:
        lines = read_text(list_file, "list", DataError, limit=1 << 28, utf8="utf-8-sig")
        for text in filter(None, map(str.strip, lines.splitlines())):
            add(PurePath(text).as_posix(), Path(text))
    if not audio:
        raise DataError(
            "no audio files (.flac .wav .ogg .opus) in "
            + ", ".join([*paths, *(str(path) for path in lists)])
        )
    return audio


@dataclass
class FeatureSummary:
    """Result of :func:`write_features`."""

    files: int = 0
    seconds: float = 0.0  # of audio
    bad: list[tuple[str, str]] = field(default_factory=list)  # (key, reason) of files left out


def choose_layers(text: str, count: int) -> list[int]:
    """Parse ``all``, ``last`` or numbers like ``0,2`` to indices into ``count`` hidden states.

    Raises:
        ConfigError: the text has another form, or a layer is repeated or out of range.
    """
    if text == "all":
        return list(range(count))
    if text == "last":
        return [count - 1]
    try:
        layers = [int(part) for part in text.split(",")]
    except ValueError:
        layers = []
    if not layers or len(set(layers)) < len(layers) or not set(layers) <= set(range(count)):
        raise ConfigError(
            f"--layers must be all, last, or distinct layers of this student (0 to {count - 1}) "
            f"like 0,2; got {text!r}"
        )
    return layers


def write_features(
    checkpoint: str | Path,
    audio: Mapping[str, Path],
    output: Path,
    *,
    layers: str = "all",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    max_seconds: float = 300.0,
    skip_bad: bool = False,
    progress: Callable[[Iterable, int], Iterable] = lambda items, total: items,
) -> FeatureSummary:
    """Write one tensor ``KEY#LAYER`` ``[frame, dim]`` per file and layer.

    Metadata: ``format``, ``version``, ``sample_rate`` (Hz), ``stride`` (samples per frame),
    ``layers``, ``dim``, ``checkpoint`` (name), ``checkpoint_sha256`` and ``made_by``.

    Args:
        checkpoint: a student; see :func:`~s3prl_ekd.teachers.student_source.find_student`.
        audio: ``{key: path}`` from :func:`collect_audio`.
        output: written atomically.
        max_seconds: a longer file counts as bad; a full-size student needs 17 MB per second.
        skip_bad: leave out bad files and list them in the summary; else the first is an error.
        progress: wraps the iterable of files, given their number; for a progress bar.

    Raises:
        DataError: a bad file, or no good file.
        ConfigError: see :func:`choose_layers`.
        CheckpointError: the checkpoint cannot be read or the output cannot be written.
    """
    from ..upstream.expert import UpstreamExpert

    source = find_student(checkpoint)
    upstream = UpstreamExpert(source.path).to(device).eval()
    settings = upstream.student.settings
    indices = choose_layers(layers, settings.encoder_layers + 1)
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "sample_rate": str(SAMPLE_RATE),
        "stride": str(settings.stride),
        "layers": ",".join(map(str, indices)),
        "dim": str(upstream.student.width),
        # a path's last part: folders of the user's machine stay private
        "checkpoint": source.path.name if source.name == str(source.path) else source.name,
        "checkpoint_sha256": source.sha256(),
        "made_by": f"s3prl_ekd {__version__}",
    }
    summary = FeatureSummary()
    with explain_write_errors(output, CheckpointError):
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(output) as file:
            keys = (f"{key}#{layer}" for key in audio for layer in indices)
            writer = SafetensorsWriter(file, keys, metadata)
            for key, wave in progress(_read_ahead(audio, max_seconds), len(audio)):
                try:
                    if isinstance(wave, DataError):
                        raise wave
                    states = _states(upstream, wave.to(device), indices, dtype, audio[key])
                except DataError as error:
                    if not skip_bad:
                        raise
                    summary.bad.append((key, str(error)))
                    continue
                for layer, state in zip(indices, states, strict=True):
                    writer.add(f"{key}#{layer}", state)
                summary.files += 1
                summary.seconds += len(wave) / SAMPLE_RATE
            if not summary.files:
                raise DataError(f"all {len(audio)} files are bad; the first: {summary.bad[0][1]}")
            writer.finish()
    return summary


def _states(
    upstream: nn.Module, wave: Tensor, layers: list[int], dtype: torch.dtype, path: Path
) -> list[Tensor]:
    """Hidden states ``layers`` of one waveform, ``[frame, dim]`` each, checked to be finite."""
    with torch.inference_mode():
        hidden_states = upstream([wave])["hidden_states"]
        states = [hidden_states[layer][0].to(dtype).cpu() for layer in layers]
    for state in states:
        if not state.isfinite().all():
            raise DataError(
                f"{path}: hidden states are not all finite in {str(dtype).split('.')[-1]}"
                + ("" if dtype == torch.float32 else "; try --dtype float32")
            )
    return states


def _read_ahead(
    audio: Mapping[str, Path], max_seconds: float
) -> Iterator[tuple[str, Tensor | DataError]]:
    """Yield each file's key and waveform (or error); a thread reads a few files ahead."""
    pending: deque = deque()
    pool = ThreadPoolExecutor(1)
    paths = iter(audio.values())
    try:
        for key in audio:
            for path in itertools.islice(paths, 1 + _READ_AHEAD - len(pending)):
                pending.append(pool.submit(_read, path, max_seconds))
            yield key, pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _read(path: Path, max_seconds: float) -> Tensor | DataError:
    try:
        str(path).encode("utf-8")
        seconds = read_header(path).samples / SAMPLE_RATE  # before reading the audio
        if seconds > max_seconds:
            return DataError(
                f"{path} is {seconds:.0f} s long, longer than --max-seconds {max_seconds:g}"
            )
        return read_audio(path, speech=True)
    except UnicodeEncodeError:
        return DataError(f"{path!r}: the file name is not UTF-8, so it cannot be a key")
    except DataError as error:
        return error
