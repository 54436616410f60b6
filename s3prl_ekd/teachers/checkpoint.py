"""Teachers from one checkpoint file: which kind it is, and its loader."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .. import compat
from ..compat import no_eval
from ..distill.conv_layers import parse_conv_layers
from ..errors import CheckpointError, EkdError, TeacherError, first_line
from ..files.safetensors_file import is_safetensors
from ..files.text import first_keys
from ..files.torch_load import build_limit, safe_load
from ..student_file import FORMAT, RUN_KEY, is_student, load_student

logger = logging.getLogger(__name__)

KINDS = {
    "hubert": "s3prl's converted HuBERT (RobustHuBERT, contentvec, ...)",
    "wavlm": "WavLM as Microsoft and s3prl publish it",
    "unispeech_sat": "UniSpeech-SAT as Microsoft and s3prl publish it",
    "wav2vec2": "s3prl's converted wav2vec 2.0",
    "data2vec": "s3prl's converted data2vec-audio",
    "distiller": "s3prl's DistilHuBERT",
    "ekd_student": "a student file or a run's checkpoint of ours",
}
_CONVERTED = {"task_cfg", "model_cfg", "model_weight"}
# Settings that fairseq's data2vec has over its wav2vec 2.0.
_DATA2VEC_ONLY = {"average_top_k_layers", "ema_decay", "ema_end_decay"}


def load_file(path: Path, where: str) -> nn.Module:
    """Load an upstream from a checkpoint of one of :data:`KINDS`.

    Raises:
        TeacherError: a fairseq checkpoint, or a file that belongs into a Hugging Face folder.
        CheckpointError: the file is damaged, of another kind, or asks for code.
        ConfigError: its conv layers are not a list of number triples.
    """
    if is_safetensors(path):
        if not is_student(path):
            raise TeacherError(
                f"{where}: {path} holds weights alone; give the folder that has it and its "
                "config.json"
            )
        from ..upstream.expert import UpstreamExpert

        logger.info("%s: %s is %s", where, path, KINDS["ekd_student"])
        return UpstreamExpert(str(path))
    try:
        states = safe_load(path, "teacher checkpoint", allow=compat.checkpoint_globals())
    except CheckpointError as error:
        if re.search(r" asks for (fairseq|omegaconf)\.", str(error)):
            raise _fairseq(path) from None
        raise
    no_eval.guard()
    family, config = identify(states, path)
    logger.info("%s: %s is a %s checkpoint: %s", where, path, family, KINDS[family])
    if family == "distiller":
        from .distilhubert import build_distilhubert

        return build_distilhubert(states, path)
    check_conv_layers(config, f"{where}: ", f" in {path}")
    del states
    if family == "ekd_student":
        from ..upstream.expert import UpstreamExpert

        return UpstreamExpert(str(path))
    hubconf = importlib.import_module(f"s3prl.upstream.{family}.hubconf")
    try:
        with build_limit(path):
            return getattr(hubconf, f"{family}_local")(str(path))
    except EkdError:
        raise
    except Exception as error:  # s3prl raises whatever the settings in the file lead to
        raise CheckpointError(
            f"{where}: {path} does not load as a {family} checkpoint: {first_line(error)}"
        ) from None


def check_upstream_file(path: Path, upstream: str) -> None:
    """Look at a checkpoint before s3prl loads it as an upstream of any kind.

    Args:
        path: the file.
        upstream: the name of the hub that will load it.

    Raises:
        CheckpointError: it is damaged or asks for code.
        ConfigError: the conv layers in it are not a list of number triples.
    """
    if upstream.startswith("ekd_student"):
        load_student(path)
        return
    states = safe_load(path, "upstream checkpoint", allow=compat.checkpoint_globals())
    for keys in ((), ("cfg",), ("model_cfg",), ("cfg", "model"), ("Config", "distiller")):
        config = _entry(states, *keys)
        if isinstance(config, dict):
            check_conv_layers(config, "", f" in {path}")


def check_conv_layers(config: Mapping, before: str, behind: str) -> None:
    """Let only a list of number triples pass where s3prl evaluates a text of the file.

    Args:
        config: the model's settings in a checkpoint.
        before, behind: what a message says before and behind the setting's name.

    Raises:
        ConfigError: it is something else.
    """
    for key in ("conv_feature_layers", "extractor_conv_feature_layers"):
        if config.get(key) is not None:
            parse_conv_layers(config[key], f"{before}{key}{behind}")


def identify(states: Mapping, path: Path) -> tuple[str, Mapping]:
    """The kind of a checkpoint, one of :data:`KINDS`, from its keys, and its model configuration.

    WavLM and UniSpeech-SAT share one format and one class of s3prl; a checkpoint without WavLM's
    relative positions is called UniSpeech-SAT.

    Raises:
        TeacherError: a fairseq checkpoint.
        CheckpointError: a kind that is not known here.
    """
    if states.get("format") == FORMAT:
        return "ekd_student", {}
    if isinstance(states.get(RUN_KEY), dict):
        return "ekd_student", {}
    if "Distiller" in states and isinstance(_entry(states, "Config", "distiller"), dict):
        return "distiller", states["Config"]["distiller"]
    plain = isinstance(states.get("model_weight"), dict)
    if _CONVERTED <= states.keys() and isinstance(states["model_cfg"], dict) and plain:
        config, weights = states["model_cfg"], states["model_weight"]
        if "dictionaries_symbols" in states:
            return "hubert", config
        named = "data2vec" in str(config.get("_name", ""))
        if named or _DATA2VEC_ONLY & config.keys() or "_ema" in weights:
            return "data2vec", config
        return "wav2vec2", config
    if "model" in states and ("cfg" in states or "args" in states):
        cfg = states.get("cfg")
        if not isinstance(cfg, dict) or "conv_feature_layers" not in cfg:
            raise _fairseq(path, str(_entry(states, "cfg", "model", "_name") or ""))
        relative = cfg.get("relative_position_embedding")
        return ("wavlm" if relative else "unispeech_sat"), cfg
    raise CheckpointError(
        f"{path} is no teacher checkpoint that is known here (s3prl's HuBERT, WavLM, wav2vec2, "
        "data2vec, UniSpeech-SAT or DistilHuBERT format, or a student of ours); its keys are: "
        f"{first_keys(states)}"
    )


def _entry(states: Mapping, *path: str) -> Any:
    """``states[a][b][c]``, or None where there is no such thing."""
    value: Any = states
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _fairseq(path: Path, name: str = "") -> TeacherError:
    """fairseq pickles classes of its own: such a file is never loaded here, only told about."""
    known = {"wav2vec": "wav2vec2", "data2vec": "data2vec", "hubert": "hubert"}
    family = next((family for part, family in known.items() if part in name), None)
    others = "" if family else " (or wav2vec2, data2vec in the place of hubert)"
    return TeacherError(
        f"{path} is a fairseq checkpoint; convert it where fairseq is installed with "
        f"python -m s3prl.upstream.{family or 'hubert'}.convert {path} --output_dir DIR{others} "
        "and give the file that this writes"
    )
