"""Teachers from a Hugging Face folder: ``config.json`` and ``model.safetensors``, nothing else.

The model is transformers' own; its parts are called one by one, so that a padded batch gets the
frame mask that s3prl would give it, and the hidden states are taken where s3prl takes them.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..errors import CheckpointError, EkdError, SetupError, TeacherError, first_line
from ..files.text import check_regular, download_problem, read_json
from ..files.torch_load import build_limit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# model_type -> transformers' class. Naming it leaves a folder's own classes (auto_map) out of play.
MODEL_TYPES = {
    "hubert": "HubertModel",
    "wavlm": "WavLMModel",
    "wav2vec2": "Wav2Vec2Model",
    "data2vec-audio": "Data2VecAudioModel",
}
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_SAMPLE_RATE = 16_000  # Hz
_MAX_HEADER = 8 << 20  # bytes of names and shapes; 1000 tensors take 100,000


def check_folder(folder: Path, where: str) -> str:
    """The ``model_type`` of a folder that can be loaded.

    Raises:
        TeacherError: no Hugging Face folder, a model that is not known, weights as a pickle or not
            downloaded, or another sample rate.
    """
    if not (folder / "config.json").is_file():
        raise TeacherError(
            f"{where}: {folder} is a folder without a config.json; name a checkpoint file in it, "
            "or a Hugging Face folder (config.json and model.safetensors)"
        )
    kind = _json(folder / "config.json", where).get("model_type")
    if kind not in MODEL_TYPES:
        raise TeacherError(
            f"{where}: {folder} has a model of type {kind!r}; known are {', '.join(MODEL_TYPES)}"
        )
    if (folder / "adapter_config.json").exists():  # transformers would load another model too
        raise TeacherError(f"{where}: {folder} has an adapter; merge it into the weights first")
    if not any((folder / name).is_file() for name in _WEIGHTS):
        pickles = (folder / "pytorch_model.bin").is_file()
        raise TeacherError(
            f"{where}: {folder} has no model.safetensors"
            + (
                "; pytorch_model.bin is a pickle and is not loaded: convert it with transformers' "
                "model.save_pretrained(FOLDER)"
                if pickles
                else ""
            )
        )
    for weights in sorted(folder.glob("*.safetensors")):
        if problem := download_problem(weights):
            raise TeacherError(f"{where}: {weights} {problem}")
    path, settings = _audio_settings(folder, where)
    rate = settings.get("sampling_rate", _SAMPLE_RATE)
    if rate != _SAMPLE_RATE:
        raise TeacherError(f"{where}: {path} wants {rate!r} Hz; teachers get {_SAMPLE_RATE} Hz")
    return kind


def load_folder(folder: Path, where: str) -> HuggingFaceUpstream:
    """Load a local Hugging Face folder; nothing is fetched, and no code of the folder is run.

    Raises:
        TeacherError: see :func:`check_folder`.
        CheckpointError: the weights do not fit ``config.json``, or some are missing.
        SetupError: transformers is not installed.
    """
    kind = check_folder(folder, where)
    for weights in folder.glob("*.safetensors"):
        _check_header(weights, where)
    try:
        import transformers
    except ImportError:
        raise SetupError(
            f"{where}: a Hugging Face folder needs transformers; type: pip install transformers"
        ) from None
    try:
        with _quiet_transformers():
            kind_of_model = getattr(transformers, MODEL_TYPES[kind])
            fused = getattr(kind_of_model, "_supports_sdpa", False)
            with build_limit(folder):
                model, info = kind_of_model.from_pretrained(
                    str(folder),
                    local_files_only=True,
                    use_safetensors=True,
                    # Both give the same; a config must not choose another, which may be fetched.
                    attn_implementation="sdpa" if fused else "eager",
                    output_loading_info=True,
                )
    except EkdError:
        raise
    except Exception as error:  # transformers raises whatever the settings in the folder lead to
        raise CheckpointError(
            f"{where}: {folder} does not load with transformers: {first_line(error)}"
        ) from None
    # transformers fills what is missing with random numbers; only the mask embedding is unused.
    missing = sorted(str(k) for k in info["missing_keys"] if "masked_spec_embed" not in str(k))
    if missing:
        raise CheckpointError(
            f"{where}: the weights in {folder} lack {len(missing)} of the model's tensors, "
            f"{missing[0]} among them"
        )
    _, settings = _audio_settings(folder, where)
    normalize = settings.get("do_normalize")
    if not isinstance(normalize, bool):
        # Published models with layer norm in the conv extractor were trained on normalised
        # waveforms.
        normalize = model.config.feat_extract_norm == "layer"
    logger.info(
        "%s: %s is a Hugging Face %s model; waveforms are %s",
        where,
        folder,
        kind,
        "normalised" if normalize else "taken as they are",
    )
    return HuggingFaceUpstream(model.float(), normalize)


class HuggingFaceUpstream(nn.Module):
    """A model of transformers as an s3prl upstream.

    Args:
        network: HuBERT, WavLM, wav2vec 2.0 or data2vec-audio, without a task's head.
        normalize: bring each waveform to zero mean and unit variance, as s3prl does.
    """

    def __init__(self, network: PreTrainedModel, normalize: bool):
        super().__init__()
        self.network = network
        self.normalize = normalize
        network.config.layerdrop = 0.0  # a dropped layer would be a missing hidden state
        config = network.config
        self._conv = list(zip(config.conv_kernel, config.conv_stride, strict=True))
        # mHuBERT; in training mode it would make its mean and variance those of the batch
        self._batch_norm = getattr(network.encoder.pos_conv_embed, "batch_norm", None)
        # s3prl's HuBERT and WavLM reckon a frame's padding otherwise than the two others; of
        # mHuBERT it has none, and a frame too many would leave something of the batch norm.
        self._blocks = config.model_type in ("hubert", "wavlm") and self._batch_norm is None

    def train(self, mode: bool = True) -> HuggingFaceUpstream:
        super().train(mode)
        if self._batch_norm is not None:
            self._batch_norm.eval()
        return self

    def get_downsample_rates(self, key: str) -> int:
        """Samples a frame."""
        return math.prod(stride for _, stride in self._conv)

    def fairseq_layout(self, where: str) -> nn.Module:
        """A copy of the weights under fairseq's names. Raises ConfigError where that cannot be."""
        from .hf_names import fairseq_model

        return fairseq_model(self.network, where)

    def forward(self, wavs: list[Tensor]) -> dict[str, list[Tensor]]:
        """Unpadded waveforms ``[sample]`` at 16 kHz -> ``hidden_states``.

        ``hidden_states`` is a list of ``[batch, frame, dim]``: the input of the first transformer
        layer (behind the positional convolution and, unless the layers normalise first, the layer
        norm), then each layer's output; the last is behind the encoder's final layer norm where
        the layers normalise first.
        """
        if self.normalize:
            wavs = [F.layer_norm(wav, wav.shape) for wav in wavs]
        lengths = torch.tensor([len(wav) for wav in wavs], device=wavs[0].device)
        waves = pad_sequence(list(wavs), batch_first=True)  # [batch, sample]
        features = self.network.feature_extractor(waves).transpose(1, 2)  # [batch, frame, channel]
        projected = self.network.feature_projection(features)
        if isinstance(projected, tuple):  # all but HuBERT return the unprojected features too
            projected = projected[0]
        mask = self._frame_mask(lengths, waves.shape[1], features.shape[1])
        states: list[Tensor] = []

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states.append(args[0] if args else kwargs["hidden_states"])

        hooks = [
            layer.register_forward_pre_hook(keep, with_kwargs=True)
            for layer in self.network.encoder.layers
        ]
        if self._batch_norm is not None and mask is not None:
            # It makes something else of the zeros behind a shorter utterance, which the positional
            # convolution would take into its last frames; alone it has zeros there.
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

    def _frame_mask(self, lengths: Tensor, samples: int, frames: int) -> Tensor | None:
        """Which frames are valid, ``[batch, frame]``, as the family's s3prl expert has it."""
        if bool((lengths == samples).all()):
            return None
        index = torch.arange(frames, device=lengths.device)[None]  # [1, frame]
        if self._blocks:
            # The samples are cut into as many equal blocks; a block with any sound is valid.
            return index * (samples // frames) < lengths[:, None]
        for kernel, stride in self._conv:
            lengths = torch.div(lengths - kernel, stride, rounding_mode="floor") + 1
        return index < lengths[:, None]


def _audio_settings(folder: Path, where: str) -> tuple[Path, dict]:
    """What the model's waveforms were like in its training, and the file that says so.

    transformers 5 saves a processor's settings in one file, the feature extractor's as a part of
    it; where both files are there, it takes this part, and so do we. An empty mapping: no file says
    anything.
    """
    path = folder / "processor_config.json"
    if path.is_file():
        settings = _json(path, where)
        for part in ("feature_extractor", "audio_processor"):
            if part in settings:
                if not isinstance(settings[part], dict):
                    raise TeacherError(f"{where}: {path}: {part} is {settings[part]!r:.40}")
                return path, settings[part]
    path = folder / "preprocessor_config.json"
    return path, _json(path, where) if path.is_file() else {}


def _check_header(path: Path, where: str) -> None:
    check_regular(path, "weights", CheckpointError)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > _MAX_HEADER:
        raise CheckpointError(
            f"{where}: {path} does not load with transformers: its header has {length:,} bytes"
        )


def _json(path: Path, where: str) -> dict:
    try:
        return read_json(path, "file", TeacherError)
    except TeacherError as error:
        raise TeacherError(f"{where}: {error}") from None


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its reports on unused heads and its progress bar: what matters is checked above."""
    from transformers.utils import logging as theirs

    level, bar = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bar:
            theirs.enable_progress_bar()
