"""Detect truncated audio files, container by container.

libsndfile silently reads a truncated file as a shorter one in every container with uncompressed
samples. So the data size in the header is read here and compared with the file's size.

=====================  ============================================================================
container              truncated if
=====================  ============================================================================
WAV, RF64, W64, AIFF,  the data size exceeds the rest of the file. Up to 25 ms (one frame) is
CAF, AU, NIST SPHERE   accepted with a warning: some programs count the header as data, or round
                       up. Sizes that programs write when their output is a pipe (see
                       ``_is_pipe_size``) are ignored, and the samples in the file are used
FLAC, MP3              the last sample cannot be decoded. An MP3 without an index, whose length is
                       an estimate, is accepted with a warning
Ogg (Vorbis, Opus)     the last page is incomplete. A last page without the end-of-stream mark is
                       accepted with a warning: the file may be truncated between two pages, or
                       recorded from a live stream
MP3 in a WAV           not supported: the length is an estimate, and decoding may end before or
                       after it
other containers       not supported: they do not record the size of their data
=====================  ============================================================================
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO

import soundfile

from .bad_audio import BadAudio

# magic -> bytes before the first chunk, struct format of a chunk's header (id and size), bytes of
# that header which the size includes, alignment of chunks in bytes
_CHUNKED = {
    b"RIFF": (12, "<4sI", 0, 2),
    b"RIFX": (12, ">4sI", 0, 2),
    b"RF64": (12, "<4sI", 0, 2),
    b"riff": (40, "<16sq", 24, 8),  # W64
    b"FORM": (12, ">4sI", 0, 2),
    b"caff": (8, ">4sq", 0, 1),
}
_DATA = (b"data", b"SSND")
_SUPPORTED = ("WAV", "WAVEX", "RF64", "W64", "AIFF", "CAF", "AU", "NIST")  # soundfile's names
_MAX_CHUNKS = 1000  # about a dozen types exist
_PIPE_TOLERANCE = 2**16  # bytes
_MAX_PAGE = 27 + 255 + 255 * 255  # bytes of the largest Ogg page
_TOLERATED = 40  # 1 / 40 s (25 ms, one frame of an upstream) may be missing at the end


def check_complete(path: str | Path, file: soundfile.SoundFile) -> str:
    """Check that a file is complete; return a warning if it may not be, else an empty string.

    Args:
        path: the file.
        file: the same file, open, with a known number of samples above 0; its position changes.

    Raises:
        BadAudio: it is truncated, or its container is not supported; see the table above.
        OSError: it cannot be read.
    """
    if file.format in ("FLAC", "MP3"):
        try:
            file.seek(file.frames - 1)
            complete = len(file.read(1)) == 1
        except (soundfile.SoundFileError, RuntimeError, ValueError):
            # ValueError: the position in a damaged MP3 may be beyond its number of samples
            complete = False
        if not complete:
            reason = f"it is cut off or damaged: the last of its {file.frames} samples is not there"
            raise BadAudio(path, "cut off", reason)
        return _check_mp3_index(path) if file.format == "MP3" else ""
    if file.subtype.startswith("MPEG"):
        reason = "it is an MP3 in a WAV file, whose length is unknown; convert it to FLAC"
        raise BadAudio(path, "MP3 in a WAV", reason)
    with open(path, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if file.format == "OGG":
            return _check_last_page(path, stream, size)
        data_range = _data_range(stream)
    if data_range is None:
        if file.format in _SUPPORTED:
            return "no data size found in its header, so it may be truncated"
        reason = f"{file.format} files do not record the size of their data; convert it to FLAC"
        raise BadAudio(path, "not audio", reason)
    start, data_size = data_range
    available = size - start
    if data_size is None or not 0 < available < data_size:
        return ""
    shortfall = data_size - available
    is_alac = file.subtype.startswith("ALAC")  # its packet table is at the end of the file
    if is_alac or shortfall * file.frames * _TOLERATED > available * file.samplerate:
        raise BadAudio(path, "cut off", f"it is cut off: its last {shortfall} bytes are missing")
    return f"the data size in its header is {shortfall} bytes too large"


def _check_mp3_index(path: str | Path) -> str:
    with open(path, "rb") as stream:
        _skip_id3(stream)
        start = stream.read(4096)
    if any(tag in start for tag in (b"Xing", b"Info", b"VBRI")):
        return ""
    return "it has no index, so its length is an estimate and its end may not be read"


def bytes_after_header(path: str | Path) -> int:
    """Number of bytes after the header of a file whose header gives a data size of 0."""
    with open(path, "rb") as stream:
        data_range = _data_range(stream)
        size = os.fstat(stream.fileno()).st_size
    return max(0, size - data_range[0]) if data_range else 0


def _data_range(stream: BinaryIO) -> tuple[int, int | None] | None:
    """Read the offset of the samples and their size in bytes from the header.

    Returns:
        ``(offset, size)``, where size is None if the file was written to a pipe; or None if the
        header has no data size.
    """
    begin = _skip_id3(stream)
    magic = stream.read(4)
    if magic in (b".snd", b"dns."):
        order = ">II" if magic == b".snd" else "<II"
        start, length = struct.unpack(order, stream.read(8).ljust(8, b"\0"))
        return begin + start, None if _is_pipe_size(length) else length
    if magic == b"NIST":
        return _sphere_data_range(stream, begin)
    if magic not in _CHUNKED:
        return None
    chunks_start, layout, included, alignment = _CHUNKED[magic]
    stream.seek(begin + chunks_start)
    rf64_size = None
    for _ in range(_MAX_CHUNKS):
        head = stream.read(struct.calcsize(layout))
        if len(head) < struct.calcsize(layout):
            return None
        name, length = struct.unpack(layout, head)
        length -= included
        offset = stream.tell()
        if name[:4] in _DATA:
            is_64_bit = layout.endswith("q")
            if magic == b"RF64" and length == 2**32 - 1 and rf64_size is not None:
                length, is_64_bit = rf64_size, True
            return offset, None if _is_pipe_size(length, is_64_bit) else length
        if length < 0:
            return None
        if name == b"ds64":
            rf64_size = struct.unpack("<Qq", stream.read(16).ljust(16, b"\0"))[1]
        end = offset + length - begin
        stream.seek(begin + end + -end % alignment)
    return None


def _skip_id3(stream: BinaryIO) -> int:
    """Seek past an ID3 tag that precedes the header, as libsndfile does; return its length."""
    head = stream.read(10)
    begin = 0
    if len(head) == 10 and head[:3] == b"ID3":
        begin = 10 + sum((byte & 127) << 7 * (3 - i) for i, byte in enumerate(head[6:]))
    stream.seek(begin)
    return begin


def _is_pipe_size(length: int, is_64_bit: bool = False) -> bool:
    """Whether programs write this data size when their output is a pipe.

    In 32 bits: 0xffffffff, 2**31, and these minus a header or a block. In 64 bits: a negative
    number, or 0xffffffff.
    """
    if is_64_bit:
        return length < 0 or length == 2**32 - 1
    return abs(length - 2**31) <= _PIPE_TOLERANCE or length >= 2**32 - _PIPE_TOLERANCE


def _sphere_data_range(stream: BinaryIO, begin: int) -> tuple[int, int] | None:
    """:func:`_data_range` for NIST SPHERE: a text header whose second line is its length."""
    stream.seek(begin)
    lines = stream.read(1024).split(b"\n")
    try:
        start = begin + int(lines[1])
        fields = dict(line.split(None, 1) for line in lines[2:] if len(line.split()) == 3)
        count, size, channels = (
            int(fields[name].split()[1])
            for name in (b"sample_count", b"sample_n_bytes", b"channel_count")
        )
    except (IndexError, KeyError, ValueError):
        return None
    return start, count * size * channels


def _check_last_page(path: str | Path, stream: BinaryIO, size: int) -> str:
    """:func:`check_complete` for Ogg. A page: 27 bytes of header, lengths of segments, segments."""
    stream.seek(max(0, size - _MAX_PAGE))
    data = stream.read(_MAX_PAGE)
    page = data.rfind(b"OggS\0")
    if page < 0:
        return "its last page is followed by other data"
    head = data[page : page + 27]
    table = page + 27
    segments = data[table : table + head[26]] if len(head) == 27 else b""
    if len(head) < 27 or len(segments) < head[26] or table + head[26] + sum(segments) > len(data):
        raise BadAudio(path, "cut off", "it is cut off: its last page is incomplete")
    return "" if head[5] & 4 else "its last page has no end-of-stream mark: it may be truncated"
