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
from ..data.audio_files import SAMPLE_RATE, SUFFIXES, AudioPart, find_audio, read_header
from ..data.manifest import is_manifest, read_manifest
from ..errors import CheckpointError, ConfigError, DataError
from ..files.atomic import atomic_file, explain_write_errors
from ..files.safetensors_file import SafetensorsWriter
from ..files.text import read_text
from ..teachers.student_source import find_student

FORMAT, VERSION = "s3prl_ekd.features", 1
_READ_AHEAD = 4  # files read in advance, while the model runs


def collect_audio(
    paths: Sequence[str], lists: Sequence[Path] = (), audio_root: Path | None = None
) -> dict[str, AudioPart]:
    """Collect audio files and segments as ``{key: part}``.

    The key of a file in a folder is its path relative to that folder; the key of a file named in
    ``paths`` or in a list (a text file with one path per line) is its path as written. Keys use
    ``/``. The key of an utterance of a manifest is its ``id``, in a table without this column
    its path (``PATH@OFFSET+LENGTH`` for a segment).

    Args:
        paths: files, folders of audio, or manifests (:mod:`..data.manifest`).
        audio_root: of the manifests.

    Raises:
        DataError: no audio files, a list or manifest that cannot be read, two files with the same
            key, or ``audio_root`` without a manifest.
    """
    if audio_root is not None and not any(map(is_manifest, paths)):
        raise DataError("--audio-root is for manifests, but none is given; leave it out")
    audio: dict[str, AudioPart] = {}

    def add(key: str, part: AudioPart) -> None:
        if key in audio:
            raise DataError(
                f"{audio[key]} and {part} would both have the key {key}; name a folder that "
                "contains both, or write two output files"
            )
        audio[key] = part

    for text in paths:
        path = Path(text)
        if is_manifest(text):
            manifest = read_manifest(text, columns=("path",), audio_root=audio_root)
            for entry in manifest.entries:
                add(entry.cells.get("id") or entry.name, entry.part(manifest.root))
        elif path.is_dir():
            for name in find_audio(path):
                add(name, AudioPart(path / name))
        else:
            add(PurePath(text).as_posix(), AudioPart(path))
    for list_file in lists:
        lines = read_text(list_file, "list", DataError, limit=1 << 28, utf8="utf-8-sig")
        for text in filter(None, map(str.strip, lines.splitlines())):
            add(PurePath(text).as_posix(), AudioPart(Path(text)))
    if not audio:
        raise DataError(
            f"no audio files ({' '.join(SUFFIXES)}) in "
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
    audio: Mapping[str, Path | AudioPart],
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
        audio: ``{key: file or segment}`` from :func:`collect_audio`.
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
    upstream: nn.Module,
    wave: Tensor,
    layers: list[int],
    dtype: torch.dtype,
    path: Path | AudioPart,
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
    audio: Mapping[str, Path | AudioPart], max_seconds: float
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


def _read(audio: Path | AudioPart, max_seconds: float) -> Tensor | DataError:
    part = audio if isinstance(audio, AudioPart) else AudioPart(audio)
    try:
        str(part).encode("utf-8")
        samples = part.samples_of(read_header(part.path).samples)  # before reading the audio
        seconds = samples / SAMPLE_RATE
        if seconds > max_seconds:
            return DataError(
                f"{part} is {seconds:.0f} s long, longer than --max-seconds {max_seconds:g}"
            )
        return read_audio(part, speech=True)
    except UnicodeEncodeError:
        return DataError(f"{str(part)!r}: the file name is not UTF-8, so it cannot be a key")
    except DataError as error:
        return error
