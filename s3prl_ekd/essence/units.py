"""Discrete units: k-means clusters of the frames of a teacher's layer.

k-means units as targets are from HuBERT (Hsu et al. 2021, arXiv 2106.07447); here they come from a
trained teacher. Fitting needs scikit-learn, labelling only torch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..distill.moments import usable_frames
from ..errors import CheckpointError, ConfigError, DataError, SetupError
from ..files.atomic import atomic_file, make_folder
from ..files.formats import check_format_version
from ..files.hub import may_be_same
from ..files.safetensors_file import read_safetensors, write_safetensors
from ..files.weights_digest import weights_digest

logger = logging.getLogger(__name__)

FORMAT, VERSION = "s3prl_ekd.units", 1
TEXTS = ("teacher", "model")
WEIGHTS = "weights"  # in the metadata; not in files of earlier versions
NUMBERS = ("layer", "width", "clusters", "frames", "seed")
EPOCHS = 10  # over all frames; mini-batch k-means converges after a few (ours)
BATCH = 10_000  # frames in a mini-batch, as in HuBERT's scripts


class Units(nn.Module):
    """Centroids of a teacher's layer; a module, so that ``.to(device)`` moves them.

    Args:
        centroids: ``[cluster, dim]``. Not in ``state_dict``: they are read from the units file.
        teacher: the teacher's name in the model config, ``model`` its `model` there.
        layer: index into ``hidden_states``.
        inertia: mean squared distance of the fitted frames to their centroids.
        frames, seed: number of frames, and random seed of the fit.
        weights: digest of the teacher's weights; empty: not known.
    """

    def __init__(
        self,
        centroids: Tensor,
        teacher: str,
        layer: int,
        model: str = "",
        inertia: float = 0.0,
        frames: int = 0,
        seed: int = 0,
        weights: str = "",
    ):
        super().__init__()
        self.centroids: Tensor
        self.register_buffer("centroids", centroids.detach().float(), persistent=False)
        self.teacher, self.layer, self.model = teacher, layer, model
        self.inertia, self.frames, self.seed = inertia, frames, seed
        self.weights = weights

    @property
    def clusters(self) -> int:
        return self.centroids.shape[0]

    @property
    def width(self) -> int:
        return self.centroids.shape[1]

    @torch.no_grad()
    def label(self, hidden: Tensor) -> Tensor:
        """Frames ``[..., dim]`` -> indices of the nearest centroids ``[...]``, int64."""
        if hidden.shape[-1] != self.width:
            raise CheckpointError(
                f"units of {self.teacher}, layer {self.layer}: expected frames of width "
                f"{self.width}, got {hidden.shape[-1]}"
            )
        with torch.autocast(hidden.device.type, enabled=False):
            # |h - c|^2 without the constant |h|^2, which avoids a [..., cluster, dim] tensor
            scores = hidden.float() @ self.centroids.T  # [..., cluster]
            return (self.centroids.square().sum(-1) - 2 * scores).argmin(-1)


def fit_units(
    frames: Tensor,
    clusters: int,
    seed: int,
    *,
    teacher: str,
    layer: int,
    model: str = "",
    weights: str = "",
) -> Units:
    """Fit mini-batch k-means (scikit-learn) to frames ``[frame, dim]``, with a progress bar.

    Raises DataError if there are fewer frames than clusters.
    """
    kmeans_class = require_sklearn()
    count = len(frames)
    if count < clusters:
        raise DataError(f"{count} frames are too few for {clusters} clusters; use more audio")
    kmeans = kmeans_class(clusters, random_state=seed, n_init=1, batch_size=BATCH)
    generator = torch.Generator().manual_seed(seed)
    size = min(max(BATCH, 3 * clusters), count)  # the first batch sets the initial centroids
    # Full batches only: scikit-learn rejects a first batch smaller than the number of clusters.
    # Each epoch is shuffled, so that the remainder differs.
    steps = list(range(count // size)) * EPOCHS
    order = torch.arange(count)
    for i in tqdm(steps, desc="k-means", unit=" batches", dynamic_ncols=True):
        if i == 0:
            order = torch.randperm(count, generator=generator)
        kmeans.partial_fit(frames[order[i * size : (i + 1) * size]].numpy())
    centroids = torch.from_numpy(kmeans.cluster_centers_.copy())
    units = Units(centroids, teacher, layer, model, frames=count, seed=seed, weights=weights)
    for chunk in frames.split(BATCH):
        distances = chunk - units.centroids[units.label(chunk)]
        units.inertia += float(distances.double().square().sum())
    units.inertia /= count
    return units


def require_sklearn() -> type:
    """Import scikit-learn's ``MiniBatchKMeans``. Raises SetupError if it is not installed."""
    try:
        from sklearn.cluster import MiniBatchKMeans
    except ImportError:
        raise SetupError(
            "fitting units needs scikit-learn; type: pip install scikit-learn"
        ) from None
    return MiniBatchKMeans


def collect_frames(states: Iterable[Tensor]) -> Tensor:
    """Concatenate hidden states ``[1, frame, dim]`` of utterances to ``[frame, dim]`` on the CPU.

    Raises DataError if there are no frames, or a value is not finite.
    """
    parts = [state[0].float().cpu() for state in states]
    if not parts:
        raise DataError("no utterance has a frame; use longer audio")
    frames = torch.cat(parts)
    if not frames.isfinite().all():
        raise DataError("the teacher's hidden states are not finite")
    usable = usable_frames(frames[:, None])
    if not usable.all():
        logger.warning("skipped %d of %d frames: huge values", int((~usable).sum()), len(frames))
        frames = frames[usable]
    return frames


def save_units(units: Units, path: str | Path) -> None:
    """Write ``centroids`` and metadata to a safetensors file atomically."""
    path = Path(path)
    metadata = {"format": FORMAT, "version": str(VERSION), "inertia": repr(units.inertia)}
    metadata |= {name: str(getattr(units, name)) for name in (*TEXTS, *NUMBERS, WEIGHTS)}
    make_folder(path.parent, CheckpointError)
    with atomic_file(path) as file:
        write_safetensors(file, {"centroids": units.centroids}, metadata)


def load_units(path: str | Path) -> Units:
    """Read a file written by :func:`save_units`, on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged or not a units file.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no such units file: {path}; create it with: s3prl-ekd fit-units")
    try:
        metadata, tensors = read_safetensors(path, "units file")
        if metadata.get("format") != FORMAT:
            raise CheckpointError(f"{path} is not a file written by s3prl-ekd fit-units")
        check_format_version(int(metadata.get("version", 1)), VERSION, f"the units file {path}")
        centroids = tensors["centroids"]
        layer, width, clusters, frames, seed = (int(metadata[name]) for name in NUMBERS)
        texts = {name: metadata[name] for name in TEXTS}
        texts[WEIGHTS] = metadata.get(WEIGHTS, "")
        inertia = float(metadata["inertia"])
        units = Units(centroids, layer=layer, inertia=inertia, frames=frames, seed=seed, **texts)
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged or not a units file: {error}") from None
    if centroids.shape != (clusters, width) or not centroids.isfinite().all():
        raise CheckpointError(f"{path} is damaged: centroids and metadata do not match")
    if clusters < 1 or layer < 0:
        raise CheckpointError(f"{path} is damaged: {clusters} units of layer {layer}")
    return units


def check_teacher_of_units(units: Units, model: str, upstream: nn.Module, location: str) -> None:
    """Raise ConfigError if units were fitted on another model than a run's teacher.

    Args:
        model: of the teacher, in the config; compared if the file has no digest of the weights.
        upstream: of the teacher.
        location: of the file in the config; starts the message.
    """
    teacher = f"teachers.{units.teacher}.model"
    if units.weights:
        if units.weights != upstream_digest(upstream):
            raise ConfigError(
                f"{location} has units of {units.model} with other weights than those of "
                f"{teacher} ({model}) now; fit units of this model with s3prl-ekd fit-units"
            )
    elif units.model and not may_be_same(units.model, model):
        raise ConfigError(
            f"{location} has units of {units.model}, but {teacher} is {model}; fit units of this "
            "model with s3prl-ekd fit-units, or write the same name if both are one model"
        )


def upstream_digest(upstream: nn.Module) -> str:
    """Digest of a teacher's weights; empty for stored hidden states, to which more are added."""
    return "" if hasattr(upstream, "stated") else weights_digest(upstream)
