"""Ridge regression and linear discriminant analysis over folds, both in closed form."""

from __future__ import annotations

import numpy as np

from ..errors import SetupError

PENALTIES = tuple(10.0**power for power in range(-4, 2))  # of the ridge, times the examples


def predict_by_ridge(
    train: np.ndarray, labels: np.ndarray, folds: np.ndarray, tests: list[np.ndarray]
) -> list[np.ndarray]:
    """Predict the labels of each fold by ridge regression on the others.

    The features are standardised; the targets are one-hot. The penalty of a fold's regression is
    the one of :data:`PENALTIES` that predicts the next fold best from the remaining ones.

    Args:
        train: features ``[example, dim]``.
        labels: class numbers ``[example]``.
        folds: ``[example]``, 0 to folds - 1; three folds or more.
        tests: features of the same examples for the prediction, one array for each condition.

    Returns:
        Predicted class numbers ``[example]`` for each of ``tests``.
    """
    count = int(folds.max()) + 1
    offset = train.mean(0)  # subtracted, as float32 sums of squares far from 0 are inexact
    classes = labels.max() + 1
    sums = [
        _Sums.of(train[folds == fold] - offset, labels[folds == fold], classes)
        for fold in range(count)
    ]
    predictions = [np.zeros(len(labels), dtype=np.int64) for _ in tests]
    for fold in range(count):
        dev = (fold + 1) % count
        candidates = _total(sums, {fold, dev}).solutions(PENALTIES)
        held_out = folds == dev
        right = [
            np.mean(_predict(train[held_out] - offset, *solution) == labels[held_out])
            for solution in candidates
        ]
        penalty = PENALTIES[int(np.argmax(right))]
        (solution,) = _total(sums, {fold}).solutions((penalty,))
        tested = folds == fold
        for features, result in zip(tests, predictions, strict=True):
            result[tested] = _predict(features[tested] - offset, *solution)
    return predictions


class _Sums:
    """Sums over examples from which a ridge regression follows."""

    def __init__(self, gram, total, by_class, counts):
        self.gram, self.total, self.by_class, self.counts = gram, total, by_class, counts

    @classmethod
    def of(cls, features: np.ndarray, labels: np.ndarray, classes: int) -> _Sums:
        one_hot = np.zeros((len(labels), classes), dtype=np.float32)
        one_hot[np.arange(len(labels)), labels] = 1
        return cls(
            (features.T @ features).astype(np.float64),
            features.sum(0, dtype=np.float64),
            (features.T @ one_hot).astype(np.float64),
            one_hot.sum(0, dtype=np.float64),
        )

    def solutions(self, penalties) -> list[tuple[np.ndarray, np.ndarray]]:
        """(weights ``[dim, class]``, bias ``[class]``) of raw features for each penalty."""
        examples = self.counts.sum()
        mean = self.total / examples
        centred = self.gram - examples * np.outer(mean, mean)
        deviation = np.sqrt(np.maximum(np.diag(centred) / examples, 1e-10))
        centred /= np.outer(deviation, deviation)
        cross = (self.by_class - np.outer(mean, self.counts)) / deviation[:, None]
        values, vectors = np.linalg.eigh(centred)
        rotated = vectors.T @ cross
        result = []
        for penalty in penalties:
            shrunk = rotated / (np.maximum(values, 0) + penalty * examples)[:, None]
            weights = vectors @ shrunk / deviation[:, None]
            bias = self.counts / examples - mean @ weights
            result.append((weights.astype(np.float32), bias.astype(np.float32)))
        return result


def _total(sums: list[_Sums], without: set[int]) -> _Sums:
    kept = [part for fold, part in enumerate(sums) if fold not in without]
    names = ("gram", "total", "by_class", "counts")
    return _Sums(*(sum(getattr(part, name) for part in kept) for name in names))


def _predict(features: np.ndarray, weights: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return (features @ weights + bias).argmax(1)


def predict_by_lda(
    train: np.ndarray, labels: np.ndarray, folds: np.ndarray, tests: list[np.ndarray]
) -> list[np.ndarray]:
    """Predict the labels of each fold by linear discriminant analysis on the other examples.

    The covariance is shrunk as by Ledoit and Wolf (2004), by scikit-learn. Examples of fold -1 are
    for training only; their prediction is -1. Arguments and result as of :func:`predict_by_ridge`.
    """
    model_class = require_lda()
    predictions = [np.full(len(labels), -1, dtype=np.int64) for _ in tests]
    for fold in range(int(folds.max()) + 1):
        tested = folds == fold
        mean, deviation = train[~tested].mean(0), train[~tested].std(0) + 1e-5
        model = model_class(solver="lsqr", shrinkage="auto")
        model.fit((train[~tested] - mean) / deviation, labels[~tested])
        for features, result in zip(tests, predictions, strict=True):
            result[tested] = model.predict((features[tested] - mean) / deviation)
    return predictions


def require_lda() -> type:
    """Import scikit-learn's linear discriminant analysis.

    Raises:
        SetupError: scikit-learn is not installed.
    """
    try:
        from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    except ImportError:
        raise SetupError(
            "probe needs scikit-learn; type: pip install scikit-learn matplotlib"
        ) from None
    return LinearDiscriminantAnalysis
