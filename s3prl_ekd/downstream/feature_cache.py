"""Cached features in s3prl's downstream Runner: read, or computed utterance by utterance.

Each utterance is computed alone, so that its hidden states depend on nothing else: in a padded
batch s3prl's group norm goes over the padding too, and a short utterance changes with its
neighbours. How many were read and computed stands in the run's log.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import re
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import __version__
from ..compat.replaced import replaced
from ..data.audio_files import SAMPLE_RATE
from ..errors import SetupError
from ..files.atomic import file_sha256
from ..hidden_states.feature_store import FeatureStore, key_of, rounded
from ..hidden_states.fingerprint import weights_digest
from ..request import CACHE, CacheOptions

logger = logging.getLogger(__name__)


_LINE = re.compile(r"features: (\d+) hits, (\d+) misses, (\d+) excerpts, (\d+) bytes written")

FRAMES = "ekd_frames"  # beside the hidden states: how many frames each utterance has


@dataclass
class Counts:
    """Utterances read, computed and (random excerpts) computed without asking; bytes written."""

    hits: int = 0
    misses: int = 0
    excerpts: int = 0
    written: int = 0

    def __str__(self) -> str:
        return (
            f"features: {self.hits} hits, {self.misses} misses, {self.excerpts} excerpts, "
            f"{self.written} bytes written"
        )

    def __add__(self, other: Counts) -> Counts:
        return Counts(*map(sum, zip(astuple(self), astuple(other), strict=True)))


def read_counts(text: str) -> Counts:
    """The sum of all that a log says."""
    total = Counts()
    for numbers in _LINE.findall(text):
        total += Counts(*map(int, numbers))
    return total


class CachedUpstream(nn.Module):
    """A frozen upstream before a store.

    What a Featurizer selects is given as a list of ``[batch, frame, width]`` in float32, and under
    :data:`FRAMES` each utterance's own frames. A value is rounded to what the store would keep
    whether it was read or computed, so that a run does not depend on what was there before it.

    Args:
        upstream: s3prl's; stays as it is.
        selection: ``-s``, as the Featurizer took it.
        store: of this upstream.
        excerpt: samples of a random excerpt; None where the recipe draws none.
        training: says whether excerpts are being drawn. They are hardly ever the same again, so
            they are neither looked for nor kept. As they are all of one length, they need no
            padding and are computed together.
    """

    def __init__(
        self,
        upstream: nn.Module,
        selection: str,
        store: FeatureStore,
        excerpt: int | None = None,
        training: Callable[[], bool] = lambda: False,
    ):
        super().__init__()
        self.upstream = upstream
        self.counts = Counts()
        self._selection, self._store = selection, store
        self._excerpt, self._drawing = excerpt, training
        self._layers: tuple[int, int] | None = None  # how many, and how wide

    def get_downsample_rates(self, key: str) -> int:
        upstream: Any = self.upstream
        return upstream.get_downsample_rates(key)

    @torch.no_grad()
    def forward(self, waves: list[Tensor]) -> dict[str, Any]:
        """Args: ``waves``, a list of ``[sample]`` at 16 kHz."""
        if self.upstream.training:
            raise SetupError("--cache-features needs a frozen upstream, and this one is trained")
        device = waves[0].device
        states: dict[int, Tensor] = {}  # by the wave's index, [layer, frame, width]
        passing = []
        for index, wave in enumerate(waves):
            if self._excerpt is not None and len(wave) == self._excerpt and self._drawing():
                passing.append(index)
                continue
            key = key_of(wave)
            found = self._store.read(key)
            if found is None:
                self.counts.misses += 1
                found = rounded(self._compute([wave])[:, 0])
                self._store.write(key, found)
            else:
                self.counts.hits += 1
            states[index] = found
        if passing:
            together = self._compute([waves[index] for index in passing])
            self.counts.excerpts += len(passing)
            for place, index in enumerate(passing):
                states[index] = rounded(together[:, place])
        self.counts.written = self._store.written
        frames = [states[index].shape[1] for index in range(len(waves))]
        layers, _, width = states[0].shape
        padded = torch.zeros(layers, len(waves), max(frames), width, device=device)
        for index, each in states.items():
            self._check(each)
            padded[:, index, : each.shape[1]] = each.to(device)
        return {self._selection: list(padded.unbind(0)), FRAMES: frames}

    def _compute(self, waves: list[Tensor]) -> Tensor:
        """``[layer, batch, frame, width]`` of waveforms of one length."""
        layers = _layers(self.upstream, waves, self._selection)
        if len({layer.shape for layer in layers}) != 1 or layers[0].dim() != 3:
            raise SetupError(
                f"--cache-features cannot keep {self._selection} of this upstream: its layers "
                f"differ in shape ({', '.join(str(tuple(layer.shape)) for layer in layers[:4])})"
            )
        return torch.stack(layers).float()

    def _check(self, states: Tensor) -> None:
        layers, _, width = states.shape
        self._layers = self._layers or (layers, width)
        if self._layers != (layers, width):
            raise SetupError(
                f"--cache-features: this upstream gave {self._layers[0]} layers for one utterance "
                f"and {layers} for another (layer drop?); leave the option out"
            )


def _layers(upstream: nn.Module, waves: list[Tensor], selection: str) -> list[Tensor]:
    # what is kept serves runs with fp16 and without
    with torch.autocast(waves[0].device.type, enabled=False):
        found = upstream(waves)[selection]
    found = list(found.values()) if isinstance(found, Mapping) else found
    return [found] if isinstance(found, Tensor) else list(found)


def cut_to_frames(module: nn.Module, args: tuple, output: list[Tensor]) -> list[Tensor]:
    """A forward hook for s3prl's Featurizer: each utterance's own frames and no padding.

    The Featurizer keeps ``round(samples / 320)`` frames, which is one more than HuBERT's
    convolutions give for most lengths. In a batch of s3prl's that one is made of padding for all
    but the longest utterance, which lacks it; an utterance alone never has it. Without this hook
    it would be zeros here.
    """
    _, features = args
    return [each[:frames] for each, frames in zip(output, features[FRAMES], strict=True)]


def folder_name(args: Namespace, upstream: nn.Module, selection: str) -> str:
    """The name of an upstream's folder: a digest of all that decides its hidden states.

    Args:
        args: of s3prl's script.
        upstream: as the hub built it; its weights count, wherever they came from, and so does what
            it answers: not all that decides it need be in files that are known here.
        selection: ``-s``, as the Featurizer took it.
    """
    kind = type(upstream)
    config = args.upstream_model_config
    device = next((p.device.type for p in upstream.parameters()), "cpu")
    facts = {
        "format": 1,  # of the store's files; another one is another folder, never read here
        "hub": args.upstream,
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "weights": weights_digest(upstream),
        "checkpoint": _sha256(args.upstream_ckpt),
        "folder": _json_digest(args.upstream_ckpt),
        "answer": _answer(upstream, selection, device),
        "config": _sha256(config) or config,
        "selection": selection,
        "device": device,
        "packages": _versions(),
        "s3prl_ekd": __version__ if kind.__module__.startswith("s3prl_ekd") else None,
    }
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@torch.no_grad()
def _answer(upstream: nn.Module, selection: str, device: str) -> str:
    """A digest of the layers for a second of noise.

    Of each one's mean absolute value in two digits, and of some hundred values of the last in
    tenths of that: enough to see another normalisation of the waveform, and so coarse that the last
    bits, which depend on the number of threads, hardly ever count. Where they do, all is computed
    anew: no harm else.
    """
    # not centred and not of unit variance, so that a normalisation shows
    noise = 0.1 * torch.randn(SAMPLE_RATE, generator=torch.Generator().manual_seed(0)) + 0.02
    upstream.eval()  # frozen; CachedUpstream refuses any other
    before = np.random.get_state()  # some upstreams draw for a layer drop that is off
    try:
        layers = [x.double().cpu() for x in _layers(upstream, [noise.to(device)], selection)]
    finally:
        np.random.set_state(before)
    last = layers[-1].flatten()
    size = float(last.abs().mean())
    some = last[:: max(1, len(last) // 128)] / (size or 1.0)
    tenths = [round(10 * value) if math.isfinite(value) else None for value in some.tolist()]
    sizes = [f"{float(layer.abs().mean()):.1e}" for layer in layers]
    return hashlib.blake2b(f"{sizes} {tenths}".encode(), digest_size=16).hexdigest()


def _versions() -> dict[str, str | None]:
    """Of the packages that compute; a folder that is kept may outlive an upgrade."""
    found: dict[str, str | None] = {}
    for name in ("s3prl", "torch", "torchaudio", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _json_digest(folder: str | None) -> str | None:
    """Of the names and contents of a Hugging Face folder's settings; None for what is none."""
    if not folder or not Path(folder).is_dir():
        return None
    files = {path.name: _sha256(str(path)) for path in sorted(Path(folder).glob("*.json"))}
    return hashlib.blake2b(json.dumps(files).encode(), digest_size=16).hexdigest()


def _sha256(path: str | None) -> str | None:
    """Of a file's contents; None for what is no file: then the weights must do."""
    return file_sha256(path) if path and Path(path).is_file() else None


@contextlib.contextmanager
def cached_features(script: ModuleType, options: CacheOptions) -> Iterator[None]:
    """Within it the script's Runner asks its upstream once for each waveform; see :func:`cached`.
    On exit the log says how often."""
    runner = cached(script.Runner, options)
    try:
        with replaced(script, "Runner", runner):
            yield
    finally:
        if runner.built is not None:
            logger.info("%s", runner.built.upstream.model.counts)


def cached(runner: Any, options: CacheOptions) -> Any:
    """A Runner whose upstream is asked once for each waveform.

    The upstream is replaced once the Runner is built: its Featurizer has counted the layers by
    then. Noise that is added afterwards (:mod:`.noise`) comes before the store.

    Raises (when built):
        SetupError: the upstream is trained, or there are several processes.
    """

    class CachedRunner(runner):
        built = None  # the last one, for its counts

        def __init__(self, args, config):
            if args.upstream_trainable:
                raise SetupError(
                    f"{CACHE} is for a frozen upstream; leave it out, or leave out -f "
                    "(--upstream_trainable)"
                )
            if torch.distributed.is_initialized():
                raise SetupError(f"{CACHE} is for one process and not for torchrun")
            super().__init__(args, config)
            selection = self.featurizer.model.feature_selection
            name = folder_name(args, self.upstream.model, selection)
            store = FeatureStore(Path(options.folder), name, options.limit_gb)
            logger.info("hidden states of each utterance alone, kept in %s", store.folder)
            self.upstream.model = CachedUpstream(
                self.upstream.model,
                selection,
                store,
                excerpt_length(config),
                lambda: self.downstream.model.training,
            ).eval()
            self.featurizer.model.register_forward_hook(cut_to_frames)
            CachedRunner.built = self

    return CachedRunner


def excerpt_length(config: Mapping[str, Any]) -> int | None:
    """Samples of the random excerpts that s3prl's dataset of SID takes of longer training
    utterances; None for recipes that take utterances whole."""
    datarc = config.get("downstream_expert", {}).get("datarc") or {}
    found = datarc.get("max_timestep")
    return found if isinstance(found, int) and found > 0 else None
