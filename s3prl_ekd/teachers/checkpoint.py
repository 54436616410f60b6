"""Load a teacher from a checkpoint file after detecting its format."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from .. import compat
from ..compat import no_eval
from ..distill.conv_layers import parse_conv_layers
from ..errors import CheckpointError, TeacherError, first_line
from ..files.config import value_at
from ..files.safetensors_file import is_safetensors
from ..files.text import first_keys
from ..files.torch_load import build_limit, safe_load
from ..files.torch_scan import ForbiddenName
from ..student_file import FORMAT, RUN_KEY, is_student, load_student

logger = logging.getLogger(__name__)

KINDS = {
    "hubert": "s3prl's converted HuBERT (RobustHuBERT, contentvec, ...)",
    "wavlm": "WavLM as Microsoft and s3prl publish it",
    "unispeech_sat": "UniSpeech-SAT as Microsoft and s3prl publish it",
    "wav2vec2": "s3prl's converted wav2vec 2.0",
    "data2vec": "s3prl's converted data2vec-audio",
    "distiller": "s3prl's DistilHuBERT",
    "ekd_student": "a student file or checkpoint of run_pretrain.py -u ekd",
}
_CONVERTED = {"task_cfg", "model_cfg", "model_weight"}
# Settings that fairseq's data2vec has and its wav2vec 2.0 lacks.
_DATA2VEC_ONLY = {"average_top_k_layers", "ema_decay", "ema_end_decay"}


def load_file(path: Path, location: str) -> nn.Module:
    """Load an upstream from a checkpoint of one of :data:`KINDS`; ``location`` starts messages.

    Raises:
        TeacherError: a fairseq checkpoint, or the weights file of a Hugging Face folder.
        CheckpointError: the file is damaged, of another kind, or its pickle contains code.
        ConfigError: its conv layers are not a list of number triples.
    """
    if is_safetensors(path):
        if not is_student(path):
            raise TeacherError(
                f"{location}: {path} has weights but no settings; give the folder that contains it "
                "and config.json"
            )
        return _load_student(path, location)
    try:
        states = safe_load(path, "teacher checkpoint", allow=compat.checkpoint_globals())
    except CheckpointError as error:
        refused = error.__cause__
        if isinstance(refused, ForbiddenName) and re.match(r"(fairseq|omegaconf)\.", refused.name):
            raise _fairseq(path) from None
        raise
    no_eval.block_eval()
    family, config = identify(states, path)
    if family == "ekd_student":
        return _load_student(path, location)
    logger.info("%s: %s is a %s checkpoint: %s", location, path, family, KINDS[family])
    if family != "distiller":  # its builder checks all settings
        check_conv_layers(config, f"{location}: ", f" in {path}")
    try:
        with build_limit(path):
            if family == "distiller":
                from .distilhubert import build_distilhubert

                return build_distilhubert(states)
            del states
            hubconf = importlib.import_module(f"s3prl.upstream.{family}.hubconf")
            return getattr(hubconf, f"{family}_local")(str(path))
    except CheckpointError:
        raise
    except Exception as error:  # s3prl and torch raise various classes for a damaged file
        raise CheckpointError(
            f"{location}: cannot load {path} as a {family} checkpoint: {first_line(error)}"
        ) from None


def _load_student(path: Path, location: str) -> nn.Module:
    from ..upstream.expert import UpstreamExpert

    logger.info("%s: %s is an ekd_student checkpoint: %s", location, path, KINDS["ekd_student"])
    return UpstreamExpert(str(path))


def check_upstream_file(path: Path, upstream: str) -> None:
    """Check that a checkpoint is safe for s3prl to load as the upstream of this hub name.

    Raises:
        CheckpointError: it is damaged, or its pickle contains code.
        ConfigError: its conv layers are not a list of number triples.
    """
    if upstream.startswith("ekd_student"):
        load_student(path)
        return
    states = safe_load(path, "upstream checkpoint", allow=compat.checkpoint_globals())
    keys = ("cfg", "model_cfg", "cfg.model", "Config.distiller")
    for config in (states, *(value_at(states, key) for key in keys)):
        if isinstance(config, dict):
            check_conv_layers(config, "", f" in {path}")


def check_conv_layers(config: Mapping, prefix: str, suffix: str) -> None:
    """Reject conv layers other than a list of number triples: s3prl passes the text to ``eval``.

    ``prefix`` and ``suffix`` surround the setting's name in the message of the ConfigError.
    """
    for key in ("conv_feature_layers", "extractor_conv_feature_layers"):
        if config.get(key) is not None:
            parse_conv_layers(config[key], f"{prefix}{key}{suffix}")


def identify(states: Mapping, path: Path) -> tuple[str, Mapping]:
    """The kind of a checkpoint, one of :data:`KINDS`, and the model's settings.

    WavLM and UniSpeech-SAT share one format and one class of s3prl; a checkpoint without relative
    positions counts as UniSpeech-SAT.

    Raises:
        TeacherError: a fairseq checkpoint.
        CheckpointError: any other kind.
    """
    if states.get("format") == FORMAT or isinstance(states.get(RUN_KEY), dict):
        return "ekd_student", {}
    if "Distiller" in states and isinstance(value_at(states, "Config.distiller"), dict):
        return "distiller", states["Config"]["distiller"]
    has_weights = isinstance(states.get("model_weight"), dict)
    if _CONVERTED <= states.keys() and isinstance(states["model_cfg"], dict) and has_weights:
        config, weights = states["model_cfg"], states["model_weight"]
        if "dictionaries_symbols" in states:
            return "hubert", config
        is_data2vec = "data2vec" in str(config.get("_name", ""))
        if is_data2vec or _DATA2VEC_ONLY & config.keys() or "_ema" in weights:
            return "data2vec", config
        return "wav2vec2", config
    if "model" in states and ("cfg" in states or "args" in states):
        cfg = states.get("cfg")
        if not isinstance(cfg, dict) or "conv_feature_layers" not in cfg:
            raise _fairseq(path, str(value_at(states, "cfg.model._name") or ""))
        relative = cfg.get("relative_position_embedding")
        return ("wavlm" if relative else "unispeech_sat"), cfg
    raise CheckpointError(
        f"{path}: unknown checkpoint format; expected s3prl's HuBERT, WavLM, wav2vec2, data2vec, "
        "UniSpeech-SAT or DistilHuBERT format, or a student file; got the keys "
        f"{first_keys(states)}"
    )


def _fairseq(path: Path, name: str = "") -> TeacherError:
    """The error for a fairseq checkpoint, which pickles fairseq's classes and is never loaded."""
    families = {"wav2vec": "wav2vec2", "data2vec": "data2vec", "hubert": "hubert"}
    family = next((family for part, family in families.items() if part in name), None)
    alternatives = "" if family else " (wav2vec2 or data2vec instead of hubert for those models)"
    return TeacherError(
        f"{path} is a fairseq checkpoint, which is not supported; convert it in an environment "
        f"with fairseq: python -m s3prl.upstream.{family or 'hubert'}.convert {path} "
        f"--output_dir DIR{alternatives}, and give the converted file"
    )
