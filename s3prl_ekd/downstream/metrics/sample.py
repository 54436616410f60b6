"""What the bootstrap needs of a metric: its value when units of the test set count more or less."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np


class Sample(ABC):
    """The results on a test set, as units that are drawn together.

    Attributes:
        names: the units (utterances, recordings, speakers or queries), sorted and distinct.
    """

    names: tuple[str, ...]

    @property
    @abstractmethod
    def reference(self) -> bytes:
        """Key of the reference: with equal keys and names, two systems had the same test set."""

    @abstractmethod
    def values(self, weights: np.ndarray) -> np.ndarray:
        """The metric in per cent for each resample, ``[resample]``; NaN where it is not defined.

        Args:
            weights: how often each unit is drawn, float64 ``[resample, unit]``.
        """

    @property
    def value(self) -> float:
        """The metric of the whole test set, in per cent."""
        return float(self.values(np.ones((1, len(self.names))))[0])
