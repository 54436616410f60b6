"""Discrete units: the nearest of some centroids for each frame of a teacher's layer.

k-means units as targets are HuBERT's idea (Hsu et al. 2021, arXiv 2106.07447); here they come from
a finished teacher. Fitting needs scikit-learn, labelling torch alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..distill.target_norm import usable_frames
from ..errors import CheckpointError, DataError, SetupError
from ..files.atomic import whole_file
from ..files.formats import refuse_newer
from ..files.safetensors_file import read_safetensors, write_safetensors

logger = logging.getLogger(__name__)

FORMAT, VERSION = "s3prl_ekd.units", 1
TEXTS = ("teacher", "model")
NUMBERS = {"layer": int, "width": int, "clusters": int, "frames": int, "seed": int}
PASSES = 10  # over all frames; mini-batch k-means hardly moves after a few (ours)
BATCH = 10_000  # frames a mini-batch, as HuBERT's scripts


class Units(nn.Module):
    """Centroids of one teacher's layer, a module so that they move with the model they serve.

    Args:
        centroids: ``[cluster, dim]``. Kept out of ``state_dict``: the units file holds them.
        teacher: its name in the model config.
        layer: index into ``hidden_states``.
        model: what the config loads that teacher from.
        inertia: mean squared distance of a frame to its centroid, when they were fitted.
        frames: how many frames they were fitted on.
        seed: of the fit.
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
    ):
        super().__init__()
        self.centroids: Tensor
        self.register_buffer("centroids", centroids.detach().float(), persistent=False)
        self.teacher, self.layer, self.model = teacher, layer, model
        self.inertia, self.frames, self.seed = inertia, frames, seed

    @property
    def clusters(self) -> int:
        return self.centroids.shape[0]

    @property
    def width(self) -> int:
        return self.centroids.shape[1]

    @torch.no_grad()
    def label(self, hidden: Tensor) -> Tensor:
        """Frames ``[..., dim]`` -> the index of the nearest centroid ``[...]``, int64.

        Raises:
            CheckpointError: the frames have another width than the centroids.
        """
        if hidden.shape[-1] != self.width:
            raise CheckpointError(
                f"the units of {self.teacher}, layer {self.layer}, are for width {self.width}; "
                f"these frames have {hidden.shape[-1]}"
            )
        with torch.autocast(hidden.device.type, enabled=False):
            # |h - c|^2 without |h|^2, the same for every centroid: no [..., cluster, dim] in memory
            scores = hidden.float() @ self.centroids.T  # [..., cluster]
            return (self.centroids.square().sum(-1) - 2 * scores).argmin(-1)


def fit_units(
    frames: Tensor, clusters: int, seed: int, *, teacher: str, layer: int, model: str = ""
) -> Units:
    """Mini-batch k-means (scikit-learn) over frames ``[frame, dim]``; shows a progress bar.

    Raises:
        SetupError: scikit-learn is not installed.
        DataError: there are fewer frames than clusters.
    """
    kmeans_class = require_sklearn()
    count = len(frames)
    if count < clusters:
        raise DataError(f"{count} frames are too few for {clusters} clusters; use more audio")
    kmeans = kmeans_class(clusters, random_state=seed, n_init=1, batch_size=BATCH)
    generator = torch.Generator().manual_seed(seed)
    size = min(max(BATCH, 3 * clusters), count)  # the first batch places the centroids
    # A rest smaller than the clusters would be refused as a first batch: whole batches only, and
    # each pass in a new order, so that no frame is left out for good.
    steps = list(range(count // size)) * PASSES
    order = torch.arange(count)
    for i in tqdm(steps, desc="k-means", unit=" batches", dynamic_ncols=True):
        if i == 0:
            order = torch.randperm(count, generator=generator)
        kmeans.partial_fit(frames[order[i * size : (i + 1) * size]].numpy())
    centroids = torch.from_numpy(kmeans.cluster_centers_.copy())
    units = Units(centroids, teacher, layer, model, frames=count, seed=seed)
    total = 0.0
    for chunk in frames.split(BATCH):
        total += float((chunk - units.centroids[units.label(chunk)]).double().square().sum())
    units.inertia = total / count
    return units


def require_sklearn() -> type:
    """scikit-learn's ``MiniBatchKMeans``. Raises SetupError where it is not installed."""
    try:
        from sklearn.cluster import MiniBatchKMeans
    except ImportError:
        raise SetupError(
            "fitting units needs scikit-learn; type: pip install 's3prl_ekd[units]'"
        ) from None
    return MiniBatchKMeans


def collect_frames(states: Iterable[Tensor]) -> Tensor:
    """Hidden states ``[1, frame, dim]``, one utterance each, as ``[frame, dim]`` on the CPU.

    Raises:
        DataError: there is nothing, or a value that is not finite.
    """
    parts = [state[0].float().cpu() for state in states]
    if not parts:
        raise DataError("no utterance gave a frame; use longer audio")
    frames = torch.cat(parts)
    if not frames.isfinite().all():
        raise DataError("the teacher's frames hold values that are not finite")
    usable = usable_frames(frames[:, None])
    if not usable.all():
        logger.warning("left out %d of %d frames: huge values", int((~usable).sum()), len(frames))
        frames = frames[usable]
    return frames


def save_units(units: Units, path: str | Path) -> None:
    """Write a safetensors file with ``centroids`` and metadata, whole or not at all.

    Raises:
        CheckpointError: the file cannot be written.
    """
    path = Path(path)
    metadata = {"format": FORMAT, "version": str(VERSION), "inertia": repr(units.inertia)}
    metadata |= {name: str(getattr(units, name)) for name in (*TEXTS, *NUMBERS)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            write_safetensors(file, {"centroids": units.centroids}, metadata)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from None


def load_units(path: str | Path) -> Units:
    """Read a file of :func:`save_units`, on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"cannot read the units {path}: there is no such file; make it with: s3prl-ekd units"
        )
    try:
        metadata, tensors = read_safetensors(path, "units file")
        if metadata.get("format") != FORMAT:
            raise CheckpointError(f"{path} is no units file of s3prl-ekd units")
        refuse_newer(int(metadata.get("version", 1)), VERSION, f"the units file {path}")
        centroids = tensors["centroids"]
        numbers = {name: kind(metadata[name]) for name, kind in NUMBERS.items()}
        units = Units(
            centroids,
            metadata["teacher"],
            numbers["layer"],
            metadata["model"],
            float(metadata["inertia"]),
            numbers["frames"],
            numbers["seed"],
        )
        fits = centroids.shape == (numbers["clusters"], numbers["width"])
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged or no units file: {error}") from None
    if not fits or not centroids.isfinite().all():
        raise CheckpointError(f"{path} is damaged: its centroids do not fit its metadata")
    return units
