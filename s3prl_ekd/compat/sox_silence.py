"""SoX's effect ``silence`` for one channel: remove silence at the start and in the middle.

Follows ``silence.c`` of SoX 14.4.2. A sample is loud if the RMS of the 20 ms that end with it is
above a threshold. The output begins with the first ``above`` samples that are all loud. It pauses
where ``below`` samples in a row are not loud, leaves these out, and goes on with the next
``above`` samples that are all loud; the window of the RMS is then empty again. Shorter silence is
kept, also at the end.
"""

from __future__ import annotations

import numpy as np

_SCALE = 2.0**31  # SoX computes with integers of 32 bits
_WINDOWS_PER_SECOND = 50
_BLOCK = 32_768  # samples whose RMS is computed at a time: later ones may follow a restart


def sounding(
    wave: np.ndarray, rate: int, above: tuple[int, float], below: tuple[int, float]
) -> list[tuple[int, int]]:
    """The parts of a waveform that ``silence`` keeps, as ``(start, end)`` in samples.

    Args:
        wave: ``[sample]`` in [-1, 1].
        rate: in Hz.
        above, below: duration in samples and threshold, as a share of full scale, for the end and
            the beginning of silence.
    """
    samples = np.asarray(wave, dtype=np.float64) * _SCALE
    window = rate // _WINDOWS_PER_SECOND
    parts, restart = [], 0
    while restart < len(samples):
        loudness = _Loudness(samples[restart:], window)
        start = _first_run(loudness, 0, above, loud=True)
        if start is None:
            break
        end = _first_run(loudness, start + above[0], below, loud=False)
        if end is None:
            parts.append((restart + start, len(samples)))
            break
        parts.append((restart + start, restart + end))
        restart += end + below[0]
    return parts


class _Loudness:
    """RMS of the window that ends at each sample, as a share of full scale, computed in blocks.

    SoX adds and subtracts squares in float64; the sums here are of the same order, so rounding is
    the same, too.
    """

    def __init__(self, samples: np.ndarray, window: int):
        self._squares = samples * samples
        self._window = window
        self._last = 0.0  # the sum of squares at the last computed sample
        self._done = np.empty(0)

    def __len__(self) -> int:
        return len(self._squares)

    def upto(self, end: int) -> np.ndarray:
        """The values of at least the first ``end`` samples."""
        while len(self._done) < min(end, len(self)):
            start, stop = len(self._done), min(len(self._done) + _BLOCK, len(self))
            steps = np.zeros(2 * (stop - start) + 1)
            steps[0] = self._last
            leaving = self._squares[max(0, start - self._window) : max(0, stop - self._window)]
            steps[1::2][stop - start - len(leaving) :] = -leaving
            steps[2::2] = self._squares[start:stop]
            sums = np.add.accumulate(steps)[2::2]
            self._last = float(sums[-1])
            # the RMS is an integer in SoX; rounding may make a sum negative
            rms = np.trunc(np.sqrt(np.maximum(sums, 0) / self._window)) / (_SCALE - 1)
            self._done = np.concatenate([self._done, rms])
        return self._done


def _first_run(
    loudness: _Loudness, start: int, rule: tuple[int, float], *, loud: bool
) -> int | None:
    """The start of the first run, of the rule's duration, of samples that all are (not) loud."""
    duration, threshold = rule
    known = start
    run = 0  # samples of the current run
    while known < len(loudness):
        values = loudness.upto(known + 1)[known:]
        fits = (values > threshold) if loud else ~(values > threshold)
        breaks = np.flatnonzero(~fits)
        # runs within the block: before the first break, between breaks, after the last one
        edges = np.concatenate([[-1 - run], breaks, [len(fits)]])
        lengths = np.diff(edges) - 1
        enough = np.flatnonzero(lengths >= duration)
        if len(enough):
            return int(known + edges[enough[0]] + 1)
        run = int(lengths[-1])
        known += len(fits)
    return None
