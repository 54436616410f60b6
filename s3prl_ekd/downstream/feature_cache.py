"""Cached hidden states in s3prl's downstream Runner.

Each utterance is run through the upstream alone, so that its hidden states do not depend on the
batch: the group norm of s3prl's models includes the padding, which changes the shorter utterances
of a batch. That of a student with ``masked_norm`` does not, and the hidden states of its padded
batches equal the cached ones up to rounding. The run's log has the numbers of cache hits and
misses.
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

import torch
from torch import Tensor, nn

from .. import __version__
from ..compat.replaced import replaced
from ..data.audio_files import SAMPLE_RATE
from ..errors import SetupError
from ..files.atomic import file_sha256
from ..files.states_file import to_storage_dtype, wave_key
from ..files.weights_digest import weights_digest
from ..hidden_states.feature_store import FeatureStore
from ..request import CACHE, CacheOptions
from ..system.devices import module_device
from ..system.random_states import preserve_random_states

logger = logging.getLogger(__name__)

_LINE = re.compile(r"features: (\d+) hits, (\d+) misses, (\d+) excerpts, (\d+) bytes written")

_REMEDY = f"remove {CACHE} (with superb: add --no-cache-features)"

FRAMES = "ekd_frames"  # key of the frame counts in the upstream's output


@dataclass
class CacheCounts:
    """Cache hits, misses, random excerpts (computed without a lookup) and bytes written."""

    hits: int = 0
    misses: int = 0
    excerpts: int = 0
    written: int = 0

    def __str__(self) -> str:
        return (
            f"features: {self.hits} hits, {self.misses} misses, {self.excerpts} excerpts, "
            f"{self.written} bytes written"
        )

    def __add__(self, other: CacheCounts) -> CacheCounts:
        return CacheCounts(*map(sum, zip(astuple(self), astuple(other), strict=True)))


def read_counts(text: str) -> CacheCounts:
    """Sum the counts in the text of a log."""
    counts = (CacheCounts(*map(int, numbers)) for numbers in _LINE.findall(text))
    return sum(counts, start=CacheCounts())


class CachedUpstream(nn.Module):
    """Wraps a frozen upstream with an on-disk feature cache.

    Returns the selected hidden states as a list of ``[batch, frame, width]`` in float32, and each
    utterance's number of frames under :data:`FRAMES`. Cache misses are rounded to the stored dtype
    too, so that the values do not depend on the cache's contents.

    Args:
        upstream: s3prl's upstream; it is not modified.
        selection: the Featurizer's ``-s``.
        store: the cache of this upstream.
        is_excerpt: whether a waveform is a random excerpt. Excerpts hardly ever repeat, so they are
            not cached. They have one length: a GPU computes them as one batch without padding, a
            CPU one by one, which takes 0.7 of the batch's time.
    """

    def __init__(
        self,
        upstream: nn.Module,
        selection: str,
        store: FeatureStore,
        is_excerpt: Callable[[Tensor], bool],
    ):
        super().__init__()
        self.upstream = upstream
        self.counts = CacheCounts()
        self._selection, self._store, self._is_excerpt = selection, store, is_excerpt
        self._shape: tuple[int, int] | None = None  # (layers, width)

    def get_downsample_rates(self, key: str) -> int:
        upstream: Any = self.upstream
        return upstream.get_downsample_rates(key)

    @torch.no_grad()
    def forward(self, waves: list[Tensor]) -> dict[str, Any]:
        """Args: ``waves``, a list of ``[sample]`` at 16 kHz."""
        if self.upstream.training:
            raise SetupError(f"{CACHE} needs a frozen upstream, but this one is trained")
        states: dict[int, Tensor] = {}  # index of the waveform -> [layer, frame, width]
        excerpts = []
        for index, wave in enumerate(waves):
            if self._is_excerpt(wave):
                excerpts.append(index)
            else:
                states[index] = self._cached(wave)
        size = 1 if waves[0].device.type == "cpu" else max(1, len(excerpts))
        for start in range(0, len(excerpts), size):
            indices = excerpts[start : start + size]
            batch = self._compute([waves[index] for index in indices])
            states |= {index: to_storage_dtype(batch[:, i]) for i, index in enumerate(indices)}
        self.counts.excerpts += len(excerpts)
        self.counts.written = self._store.written
        frames = [states[index].shape[1] for index in range(len(waves))]
        layers, _, width = states[0].shape
        padded = torch.zeros(layers, len(waves), max(frames), width, device=waves[0].device)
        for index, hidden in states.items():
            shape = hidden.shape[0], hidden.shape[2]
            self._shape = self._shape or shape
            if self._shape != shape:
                raise SetupError(
                    f"{CACHE}: this upstream returned {self._shape[0]} layers for one utterance "
                    f"and {shape[0]} for another (layer drop?); {_REMEDY}"
                )
            padded[:, index, : hidden.shape[1]] = hidden.to(padded.device)
        return {self._selection: list(padded.unbind(0)), FRAMES: frames}

    def _cached(self, wave: Tensor) -> Tensor:
        """Hidden states ``[layer, frame, width]`` of a waveform, read or computed and stored."""
        key = wave_key(wave)
        hidden = self._store.read(key)
        if hidden is not None:
            self.counts.hits += 1
            return hidden
        self.counts.misses += 1
        hidden = to_storage_dtype(self._compute([wave])[:, 0])
        self._store.write(key, hidden)
        return hidden

    def _compute(self, waves: list[Tensor]) -> Tensor:
        """Waveforms of one length -> ``[layer, batch, frame, width]``."""
        layers = _layers(self.upstream, waves, self._selection)
        if len({layer.shape for layer in layers}) != 1 or layers[0].dim() != 3:
            raise SetupError(
                f"{CACHE} cannot store {self._selection} of this upstream: its layers "
                f"differ in shape ({', '.join(str(tuple(layer.shape)) for layer in layers[:4])}); "
                f"{_REMEDY}"
            )
        return torch.stack(layers).float()


def _layers(upstream: nn.Module, waves: list[Tensor], selection: str) -> list[Tensor]:
    # float32: the cache serves runs with and without fp16
    with torch.autocast(waves[0].device.type, enabled=False):
        states = upstream(waves)[selection]
    states = list(states.values()) if isinstance(states, Mapping) else states
    return [states] if isinstance(states, Tensor) else list(states)


def cut_to_frames(module: nn.Module, args: tuple, output: list[Tensor]) -> list[Tensor]:
    """Forward hook for s3prl's Featurizer that removes padded frames.

    The Featurizer keeps ``round(samples / 320)`` frames, for most lengths one more than HuBERT's
    convolutions produce. In a padded batch this extra frame is computed from padding, except in the
    longest utterance, which lacks it. For utterances computed alone it would be zeros.
    """
    _, features = args
    return [states[:frames] for states, frames in zip(output, features[FRAMES], strict=True)]


def folder_name(args: Namespace, upstream: nn.Module, selection: str) -> str:
    """The cache folder's name: a digest of everything that determines the hidden states.

    It includes the upstream's weights and its output for a test signal, because settings may come
    from files that are not hashed here.

    Args:
        args: the arguments of s3prl's script.
        upstream: as built by s3prl's hub.
        selection: the Featurizer's ``-s``.
    """
    cls = type(upstream)
    config = args.upstream_model_config
    device = module_device(upstream).type
    facts = {
        "format": 2,  # of the store's files; a new format gets a new folder
        "hub": args.upstream,
        "class": f"{cls.__module__}.{cls.__qualname__}",
        "weights": weights_digest(upstream),
        "checkpoint": _file_digests(args.upstream_ckpt),
        "answer": _output_digest(upstream, selection, device),
        "config": _file_digests(config) or config,
        "selection": selection,
        "device": device,
        # an upgrade may change the features
        "packages": [_version(name) for name in ("s3prl", "torch", "torchaudio", "transformers")],
        "s3prl_ekd": __version__ if cls.__module__.startswith("s3prl_ekd") else None,
    }
    if any(getattr(module, "masked_norm", False) for module in upstream.modules()):
        facts["masked_norm"] = True  # not in the weights, nor in the output for one utterance
    return _digest(json.dumps(facts, sort_keys=True, default=str))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@torch.no_grad()
def _output_digest(upstream: nn.Module, selection: str, device: str) -> str:
    """A digest of the layers' output for one second of noise.

    It covers each layer's mean absolute value in two digits, and some hundred values of the last
    layer in tenths of its mean. This detects a different normalisation of the waveform and is
    coarse enough to ignore rounding, which depends on the number of threads. If rounding does
    change the digest, the features are only computed again.
    """
    # neither zero mean nor unit variance, so that a normalisation changes the output
    noise = 0.1 * torch.randn(SAMPLE_RATE, generator=torch.Generator().manual_seed(0)) + 0.02
    upstream.eval()  # CachedUpstream rejects a trained upstream
    with preserve_random_states():  # some upstreams draw numbers for a disabled layer drop
        layers = [x.double().cpu() for x in _layers(upstream, [noise.to(device)], selection)]
    last_layer = layers[-1].flatten()
    mean = float(last_layer.abs().mean())
    sample = last_layer[:: max(1, len(last_layer) // 128)] / (mean or 1.0)
    tenths = [round(10 * value) if math.isfinite(value) else None for value in sample.tolist()]
    means = [f"{float(layer.abs().mean()):.1e}" for layer in layers]
    return _digest(f"{means} {tenths}")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _file_digests(path: str | None) -> list[str]:
    """SHA-256 of a file, or of a Hugging Face folder's JSON files; empty if there is no such path.

    The weights are hashed separately, also those of a URL or a hub's name.
    """
    files = sorted(Path(path).glob("*.json")) if path and Path(path).is_dir() else [path]
    return [file_sha256(file) for file in files if file and Path(file).is_file()]


@contextlib.contextmanager
def cached_features(script: ModuleType, options: CacheOptions) -> Iterator[None]:
    """Cache the hidden states of the script's Runner; log the counts on exit."""
    runner = cached_runner(script.Runner, options)
    try:
        with replaced(script, "Runner", runner):
            yield
    finally:
        if runner.built is not None:
            logger.info("%s", runner.built.upstream.model.counts)


def cached_runner(runner: Any, options: CacheOptions) -> Any:
    """Subclass s3prl's Runner so that its upstream computes each waveform once.

    The upstream is replaced after the Runner is built, when its Featurizer has counted the layers.
    A hook that is added later for noise (:mod:`.noise`) runs before the cache.

    Raises (when instantiated):
        SetupError: the upstream is trained, or there are several processes.
    """

    class CachedRunner(runner):
        built = None  # the latest instance, for its counts

        def __init__(self, args, config):
            if args.upstream_trainable:
                raise SetupError(
                    f"{CACHE} needs a frozen upstream; remove {CACHE} or -f (--upstream_trainable)"
                )
            if torch.distributed.is_initialized():
                raise SetupError(f"{CACHE} works in one process only, not under torchrun")
            super().__init__(args, config)
            selection = self.featurizer.model.feature_selection
            name = folder_name(args, self.upstream.model, selection)
            store = FeatureStore(Path(options.folder), name, options.limit_gb)
            logger.info("caching the hidden states of each utterance in %s", store.folder)
            excerpt = excerpt_length(config)
            self.upstream.model = CachedUpstream(
                self.upstream.model,
                selection,
                store,
                lambda wave: self.downstream.model.training and len(wave) == excerpt,
            ).eval()
            self.featurizer.model.register_forward_hook(cut_to_frames)
            CachedRunner.built = self

    return CachedRunner


def excerpt_length(config: Mapping[str, Any]) -> int | None:
    """Samples of the random excerpts that s3prl's SID dataset takes from long training utterances;
    None for recipes that use full utterances."""
    datarc = config.get("downstream_expert", {}).get("datarc") or {}
    samples = datarc.get("max_timestep")
    return samples if isinstance(samples, int) and samples > 0 else None
