"""Whether an audio file holds what its container announces; decided per container.

libsndfile takes a file that was cut off for a shorter one, without a word, in every container that
announces its size and holds plain samples. So the announced size is read here.

=====================  ============================================================================
container              when it is cut off
=====================  ============================================================================
WAV, RF64, W64, AIFF,  the size of its data goes past the end of the file. Less than 25 ms (one
CAF, AU, NIST SPHERE   frame) is accepted with a warning: some writers count the header as data, or
                       round up. A size of nothing but ones, or of 2 GB and more that is not there,
                       was written to a pipe; the samples that are there are used
FLAC, MP3              its last sample cannot be decoded. An MP3 without an index, whose length is
                       an estimate, is accepted with a warning
Ogg (Vorbis, Opus)     its last page is incomplete. A stream whose last page is not marked as the
                       last one may be cut between two pages, or come from a radio: it is accepted
                       with a warning
MP3 in a WAV           is not read: its length is an estimate, and decoding may end before or after
others                 are not read: nothing in them says whether they are whole
=====================  ============================================================================
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO

import soundfile

# id -> bytes before the first chunk; id and size of a chunk; how much of itself the size counts;
# what chunks begin at a multiple of
_CHUNKED = {
    b"RIFF": (12, "<4sI", 0, 2),
    b"RIFX": (12, ">4sI", 0, 2),
    b"RF64": (12, "<4sI", 0, 2),
    b"riff": (40, "<16sq", 24, 8),  # W64
    b"FORM": (12, ">4sI", 0, 2),
    b"caff": (8, ">4sq", 0, 1),
}
_DATA = (b"data", b"SSND")
_KNOWN = ("WAV", "WAVEX", "RF64", "W64", "AIFF", "CAF", "AU", "NIST")  # by soundfile's names
_MAX_CHUNKS = 1000  # a dozen kinds exist
_NEAR = 2**16  # bytes
_PAGE = 27 + 255 + 255 * 255  # bytes of the largest page of Ogg
_FRAME = 40  # of a second: 25 ms, what one frame of an upstream sees


class Unusable(Exception):
    """A file is not whole, or it cannot be told. Attributes: ``kind``, one of a few words, and
    ``reason``, the end of a sentence."""

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind, self.reason = kind, reason


def check_whole(path: str | Path, file: soundfile.SoundFile) -> str:
    """What is odd about a file that can be used all the same; mostly nothing.

    Args:
        path: of the file.
        file: the same, open, with a known number of samples above 0; its position changes.

    Raises:
        Unusable: it is cut off, or its container is not read; see the table above.
        OSError: it cannot be read.
    """
    if file.format in ("FLAC", "MP3"):
        try:
            file.seek(file.frames - 1)
            whole = len(file.read(1)) == 1
        except (soundfile.SoundFileError, RuntimeError):
            whole = False
        if not whole:
            raise Unusable(
                "cut off",
                f"it is cut off or damaged: the last of its {file.frames} samples is not there",
            )
        return _check_index(path) if file.format == "MP3" else ""
    if file.subtype.startswith("MPEG"):
        reason = "it is an MP3 in a WAV file, of which the length is unknown; convert it to FLAC"
        raise Unusable("MP3 in a WAV", reason)
    with open(path, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if file.format == "OGG":
            return _check_last_page(stream, size)
        announced = _announced(stream)
    if announced is None:
        if file.format in _KNOWN:
            return "its header has no size of its samples that can be found: it may be cut off"
        reason = f"nothing in a {file.format} file says whether it is whole; convert it to FLAC"
        raise Unusable("not audio", reason)
    start, length = announced
    there = size - start
    if length is None or not 0 < there < length:
        return ""
    missing = length - there
    packed = file.subtype.startswith("ALAC")  # its table of packets is at the end
    if packed or missing * file.frames * _FRAME > there * file.samplerate:
        raise Unusable("cut off", f"it is cut off: its last {missing} bytes are missing")
    return f"its header announces {missing} bytes more than there are"


def _check_index(path: str | Path) -> str:
    with open(path, "rb") as stream:
        _skip_id3(stream)
        begin = stream.read(4096)
    if any(index in begin for index in (b"Xing", b"Info", b"VBRI")):
        return ""
    return "it has no index, so its length is an estimate: it may be longer than what is read"


def bytes_behind(path: str | Path) -> int:
    """Bytes behind the header of a file that announces that it has no samples.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as stream:
        announced = _announced(stream)
        size = os.fstat(stream.fileno()).st_size
    return max(0, size - announced[0]) if announced else 0


def _announced(stream: BinaryIO) -> tuple[int, int | None] | None:
    """Where the samples begin and how many bytes of them are announced, None where the writer did
    not know; None instead of both for a container that does not say."""
    begin = _skip_id3(stream)
    magic = stream.read(4)
    if magic in (b".snd", b"dns."):
        order = ">II" if magic == b".snd" else "<II"
        start, length = struct.unpack(order, stream.read(8).ljust(8, b"\0"))
        return begin + start, None if _is_unknown(length) else length
    if magic == b"NIST":
        return _sphere(stream, begin)
    if magic not in _CHUNKED:
        return None
    first, layout, own, padded = _CHUNKED[magic]
    stream.seek(begin + first)
    long_size = None
    for _ in range(_MAX_CHUNKS):
        head = stream.read(struct.calcsize(layout))
        if len(head) < struct.calcsize(layout):
            return None
        name, length = struct.unpack(layout, head)
        length -= own
        here = stream.tell()
        if name[:4] in _DATA:
            wide = layout.endswith("q")
            if magic == b"RF64" and length == 2**32 - 1 and long_size is not None:
                length, wide = long_size, True
            return here, None if _is_unknown(length, wide) else length
        if length < 0:
            return None
        if name == b"ds64":
            long_size = struct.unpack("<Qq", stream.read(16).ljust(16, b"\0"))[1]
        end = here + length - begin
        stream.seek(begin + end + -end % padded)
    return None


def _skip_id3(stream: BinaryIO) -> int:
    """Bytes of the ID3 tag that some programs put before a file, as libsndfile skips it."""
    head = stream.read(10)
    begin = 0
    if len(head) == 10 and head[:3] == b"ID3":
        begin = 10 + sum((byte & 127) << 7 * (3 - i) for i, byte in enumerate(head[6:]))
    stream.seek(begin)
    return begin


def _is_unknown(length: int, wide: bool = False) -> bool:
    """Whether a size of 32 or 64 (``wide``) bits is one that programs put into a pipe: 0xffffffff,
    2**31, and these less a header or a block; in 64 bits a negative number, or 0xffffffff again."""
    if wide:
        return length < 0 or length == 2**32 - 1
    return abs(length - 2**31) <= _NEAR or length >= 2**32 - _NEAR


def _sphere(stream: BinaryIO, begin: int) -> tuple[int, int] | None:
    """Of NIST SPHERE: a header of lines of text, whose length is in the second one."""
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


def _check_last_page(stream: BinaryIO, size: int) -> str:
    stream.seek(max(0, size - _PAGE))
    data = stream.read(_PAGE)
    at = data.rfind(b"OggS\0")
    if at < 0:
        return "something follows its last page"
    head = data[at : at + 27]
    segments = data[at + 27 : at + 27 + head[26]] if len(head) == 27 else b""
    if len(head) < 27 or len(segments) < head[26] or at + 27 + head[26] + sum(segments) > len(data):
        raise Unusable("cut off", "it is cut off: its last page is incomplete")
    return "" if head[5] & 4 else "its last page is not marked as the last: it may be cut off"
