"""Load a teacher from a Hugging Face folder: ``config.json``, and weights in safetensors files or
in torch's (``pytorch_model.bin``), which are scanned before they are loaded.

The model is transformers' own. Its modules are called one by one, so that a padded batch gets
s3prl's frame mask, and the hidden states are those that s3prl returns.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..errors import CheckpointError, EkdError, SetupError, TeacherError, first_line
from ..files.hf_weights import weight_files
from ..files.safetensors_file import SUFFIX, check_header
from ..files.text import download_problem, read_json
from ..files.torch_load import build_limit, safe_load
from .fast.encoder import padded_frames

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# model_type -> transformers' class. A class that the folder names itself (auto_map) is not used.
MODEL_TYPES = {
    "hubert": "HubertModel",
    "wavlm": "WavLMModel",
    "wav2vec2": "Wav2Vec2Model",
    "data2vec-audio": "Data2VecAudioModel",
}
_SAMPLE_RATE = 16_000  # Hz


def check_hf_folder(folder: Path, location: str) -> str:
    """Check that a folder can be loaded, and return its ``model_type``.

    Raises:
        TeacherError: not a Hugging Face folder, an unsupported model, weights that are missing or
            not downloaded, or another sample rate.
    """
    if not (folder / "config.json").is_file():
        raise TeacherError(
            f"{location}: no config.json in folder {folder}; give a checkpoint file, or a Hugging "
            "Face folder with config.json and model.safetensors or pytorch_model.bin"
        )
    kind = _json(folder / "config.json", location).get("model_type")
    if kind not in MODEL_TYPES:
        raise TeacherError(
            f"{location}: {folder / 'config.json'}: model_type must be one of "
            f"{', '.join(MODEL_TYPES)}; got {kind!r}"
        )
    if (folder / "adapter_config.json").exists():  # transformers would load a second model
        raise TeacherError(
            f"{location}: {folder} has an adapter (adapter_config.json), which is not supported; "
            "merge it into the weights"
        )
    for weights in _weight_files(folder, location):
        if problem := download_problem(weights):
            raise TeacherError(f"{location}: {weights} {problem}")
    path, settings = _audio_settings(folder, location)
    rate = settings.get("sampling_rate", _SAMPLE_RATE)
    if rate != _SAMPLE_RATE:
        raise TeacherError(
            f"{location}: {path}: sampling_rate must be {_SAMPLE_RATE} Hz, got {rate!r}"
        )
    return kind


def load_folder(folder: Path, location: str) -> HuggingFaceUpstream:
    """Load a local Hugging Face folder, without downloads and without running code of the folder.

    Raises:
        TeacherError: see :func:`check_hf_folder`.
        CheckpointError: the weights do not fit ``config.json``, or some are missing.
        SetupError: transformers is not installed.
    """
    kind = check_hf_folder(folder, location)
    files = _weight_files(folder, location)
    try:
        import transformers
    except ImportError:
        raise SetupError(
            f"{location}: a Hugging Face folder needs transformers; type: pip install transformers"
        ) from None
    states = _torch_weights(files, location)
    try:
        model_class = getattr(transformers, MODEL_TYPES[kind])
        fused = getattr(model_class, "_supports_sdpa", False)
        options = {
            # Both compute the same. Set here, because the config could name another
            # implementation, which transformers may download.
            "attn_implementation": "sdpa" if fused else "eager",
            "output_loading_info": True,
        }
        with quiet_transformers(), build_limit(files):
            if states is None:
                options |= {"local_files_only": True, "use_safetensors": True}
                model, info = model_class.from_pretrained(str(folder), **options)
            else:
                config = model_class.config_class.from_json_file(folder / "config.json")
                model, info = model_class.from_pretrained(
                    None, config=config, state_dict=states, **options
                )
    except EkdError:
        raise
    except Exception as error:  # transformers raises various classes for invalid settings
        reason = first_line(error)
        if "mismatched_sizes" in reason:  # transformers has printed a table of them
            reason = "the shapes of its weights differ from those that its config.json describes"
        raise CheckpointError(
            f"{location}: cannot load {folder} with transformers: {reason}"
        ) from None
    # transformers initialises missing tensors at random; the mask embedding alone is never used.
    missing = sorted(str(k) for k in info["missing_keys"] if "masked_spec_embed" not in str(k))
    if missing:
        raise CheckpointError(
            f"{location}: the weights in {folder} lack {len(missing)} tensors of the model: "
            f"{missing[0]}{', ...' if len(missing) > 1 else ''}"
        )
    _, settings = _audio_settings(folder, location)
    normalize = settings.get("do_normalize")
    if not isinstance(normalize, bool):
        # Published models with layer norm in the conv extractor were trained on normalised
        # waveforms.
        normalize = model.config.feat_extract_norm == "layer"
    logger.info(
        "%s: %s is a Hugging Face %s model; waveforms are %s",
        location,
        folder,
        kind,
        "normalised" if normalize else "not normalised",
    )
    return HuggingFaceUpstream(model.float(), normalize)


def _weight_files(folder: Path, location: str) -> list[Path]:
    try:
        files = weight_files(folder, TeacherError)
    except TeacherError as error:
        raise TeacherError(f"{location}: {error}") from None
    if not files:
        raise TeacherError(f"{location}: no model.safetensors or pytorch_model.bin in {folder}")
    return files


def _torch_weights(files: Sequence[Path], location: str) -> dict[str, Tensor] | None:
    """The tensors of torch files, loaded without running code; None for safetensors files, of which
    only the headers are checked, since transformers reads them.

    Raises:
        CheckpointError: a file is damaged, contains anything but tensors, or code.
    """
    states: dict[str, Tensor] = {}
    try:
        for file in files:
            if file.suffix == SUFFIX:
                check_header(file, "weights file")
                continue
            for name, tensor in safe_load(file, "weights file").items():
                if not isinstance(name, str) or not isinstance(tensor, Tensor):
                    raise CheckpointError(
                        f"the weights file {file} must contain tensors only, got {name!r:.60} of "
                        f"type {type(tensor).__name__}"
                    )
                states[name] = tensor
    except CheckpointError as error:
        raise CheckpointError(f"{location}: {error}") from None
    return states or None


class HuggingFaceUpstream(nn.Module):
    """A transformers model without a task head as an s3prl upstream.

    ``normalize``: normalise each waveform to zero mean and unit variance, as s3prl does.
    """

    def __init__(self, network: PreTrainedModel, normalize: bool):
        super().__init__()
        self.network = network
        self.normalize = normalize
        network.config.layerdrop = 0.0  # layerdrop would remove hidden states
        config = network.config
        self._conv = list(zip(config.conv_kernel, config.conv_stride, strict=True))
        # mHuBERT has one; in training mode it would use the batch's mean and variance
        self._batch_norm = getattr(network.encoder.pos_conv_embed, "batch_norm", None)
        # s3prl's HuBERT and WavLM count a waveform's valid frames differently from the other two
        # families. mHuBERT is not in s3prl. It uses the exact count: its batch norm changes zeros,
        # so no padding frame may count as valid.
        self._counts_blocks = config.model_type in ("hubert", "wavlm") and self._batch_norm is None

    def train(self, mode: bool = True) -> HuggingFaceUpstream:
        super().train(mode)
        if self._batch_norm is not None:
            self._batch_norm.eval()
        return self

    def get_downsample_rates(self, key: str) -> int:
        """Samples per frame."""
        return math.prod(stride for _, stride in self._conv)

    def fairseq_layout(self, location: str) -> nn.Module:
        """Copy the weights into fairseq's layout. Raises ConfigError if that is not possible."""
        from .hf_names import fairseq_model

        return fairseq_model(self.network, location)

    def forward(self, wavs: list[Tensor]) -> dict[str, list[Tensor]]:
        """Compute ``hidden_states`` from unpadded waveforms ``[sample]`` at 16 kHz.

        ``hidden_states`` is a list of ``[batch, frame, dim]``: the input of the first transformer
        layer, then each layer's output. The first is taken after the positional convolution and,
        in a post-norm model, the layer norm. In a pre-norm model the last is taken after the
        encoder's final layer norm.
        """
        if self.normalize:
            wavs = [F.layer_norm(wav, wav.shape) for wav in wavs]
        waves = pad_sequence(list(wavs), batch_first=True)  # [batch, sample]
        features = self.network.feature_extractor(waves).transpose(1, 2)  # [batch, frame, channel]
        projected = self.network.feature_projection(features)
        if isinstance(projected, tuple):  # all but HuBERT return the unprojected features too
            projected = projected[0]
        mask = self._frame_mask([len(wav) for wav in wavs], features)
        states: list[Tensor] = []

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states.append(args[0] if args else kwargs["hidden_states"])

        hooks = [
            layer.register_forward_pre_hook(record, with_kwargs=True)
            for layer in self.network.encoder.layers
        ]
        if self._batch_norm is not None and mask is not None:
            # The batch norm turns the zeros after a shorter utterance into other values, which the
            # positional convolution would mix into its last frames. An utterance processed alone
            # has zeros there.
            hooks.append(
                self._batch_norm.register_forward_hook(
                    lambda module, args, normalised: normalised * mask[:, None]
                )
            )
        try:
            out = self.network.encoder(projected, attention_mask=mask)
        finally:
            for hook in hooks:
                hook.remove()
        return {"hidden_states": [*states, out[0]]}

    def _frame_mask(self, lengths: list[int], features: Tensor) -> Tensor | None:
        """Mask of the valid frames ``[batch, frame]``, computed as in the family's s3prl expert;
        None if all waveforms have the same length."""
        conv = None if self._counts_blocks else self._conv
        valid = padded_frames(lengths, max(lengths), features.shape[1], conv)
        if valid is None:
            return None
        index = torch.arange(features.shape[1], device=features.device)
        return index < torch.tensor(valid, device=features.device)[:, None]


def _audio_settings(folder: Path, location: str) -> tuple[Path, dict]:
    """The feature extractor's settings (sample rate, normalisation; empty without a file), and the
    file they are from.

    transformers 5 saves all settings of a processor in one file, with the feature extractor's as
    a section, and prefers it to the older file.
    """
    path = folder / "processor_config.json"
    if path.is_file():
        settings = _json(path, location)
        for part in ("feature_extractor", "audio_processor"):
            if part in settings:
                if not isinstance(settings[part], dict):
                    raise TeacherError(
                        f"{location}: {path}: {part} must be a mapping, got {settings[part]!r:.40}"
                    )
                return path, settings[part]
    path = folder / "preprocessor_config.json"
    return path, _json(path, location) if path.is_file() else {}


def _json(path: Path, location: str) -> dict:
    try:
        return read_json(path, "file", TeacherError)
    except TeacherError as error:
        raise TeacherError(f"{location}: {error}") from None


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' warnings on unused heads and its progress bar.

    :func:`load_folder` checks for missing weights itself.
    """
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    progress_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if progress_bar:
            transformers_logging.enable_progress_bar()
