"""s3prl's downstream ``Runner`` with kept hidden states between the upstream and the Featurizer."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import SetupError
from ..hidden_states.feature_store import FeatureStore
from .arguments import OPTION, CacheOptions
from .feature_cache import CachedUpstream, cut_to_frames, folder_name

logger = logging.getLogger(__name__)


def cached(runner: type, options: CacheOptions) -> type:
    """A Runner whose upstream is asked once for each waveform.

    The upstream is replaced once the Runner is built: its Featurizer has counted the layers by
    then. Noise that is added afterwards (:mod:`.noisy_run`) comes before the store.

    Raises (when built):
        SetupError: the upstream is trained, or there are several processes.
    """

    class CachedRunner(runner):
        built = None  # the last one, for its counts

        def __init__(self, args, config):
            if args.upstream_trainable:
                raise SetupError(
                    f"{OPTION} is for a frozen upstream; leave it out, or leave out -f "
                    "(--upstream_trainable)"
                )
            if torch.distributed.is_initialized():
                raise SetupError(f"{OPTION} is for one process and not for torchrun")
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

        @staticmethod
        def say_counts() -> None:
            if CachedRunner.built is not None:
                logger.info("%s", CachedRunner.built.upstream.model.counts)

    return CachedRunner


def excerpt_length(config: Mapping[str, Any]) -> int | None:
    """Samples of the random excerpts that s3prl's dataset of SID takes of longer training
    utterances; None for recipes that take utterances whole."""
    datarc = config.get("downstream_expert", {}).get("datarc") or {}
    found = datarc.get("max_timestep")
    return found if isinstance(found, int) and found > 0 else None
