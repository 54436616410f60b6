"""The processes of a run. There is one; with more, this is where they agree."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Processes:
    """``rank`` of this process among ``count``.

    One process writes: checkpoints, TensorBoard, the lock, the progress bar. Positions in the data
    are counted in batches of all processes together, so that a run may go on with another number
    of them; each has random numbers of its own.
    """

    rank: int = 0
    count: int = 1

    @property
    def writer(self) -> bool:
        return self.rank == 0

    def any(self, mine: bool) -> bool:
        """Whether it is so in any process: a signal reaches one of them, and all must stop."""
        return mine

    def gather(self, mine: object) -> list:
        """What each process has, by rank."""
        return [mine]
