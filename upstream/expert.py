"""The s3prl upstream ``ekd_student``: hidden states from unpadded waveforms."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from s3prl.upstream.interfaces import UpstreamBase
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from s3prl_ekd.distill.student_forward import StudentOutput
from s3prl_ekd.errors import CheckpointError
from s3prl_ekd.student_file import heads_problem
from s3prl_ekd.teachers.student_source import find_student

logger = logging.getLogger(__name__)

WITH_HEADS = "hidden_states_and_heads"


class UpstreamExpert(UpstreamBase):
    """A distilled student for s3prl's downstream tasks.

    Fine-tuning trains every parameter of the student, with gradients of one scale, as transformers
    does with the folder of ``s3prl-ekd export hf``: ``feature_grad_mult``, ``train_extractor`` and
    layer dropout are settings of the distillation.

    A student with gates, as in a checkpoint of a pruning run, has fixed gates in eval mode, and is
    refused in training mode.

    Args:
        ckpt: a student file, a checkpoint of ``run_pretrain.py -u ekd`` or the folder of such a
            run, a Hugging Face folder, or an id on the Hugging Face Hub.

    Raises:
        CheckpointError: it is missing, damaged or of another kind, or its pickle contains code.
    """

    def __init__(self, ckpt: str | Path, model_config: object = None, **kwargs: Any):
        super().__init__(**kwargs)
        loaded = find_student(ckpt).load()
        self.student = loaded.student
        self.heads = loaded.heads
        self.targets = loaded.targets
        self.about = loaded.about
        # Layerdrop would change the number of hidden states during fine-tuning (-f).
        self.model.encoder.layerdrop = 0.0
        self.model.feature_grad_mult = 1.0
        self.model.feature_extractor.requires_grad_(True)
        problem = heads_problem(loaded)
        if problem:
            self.heads = None
            logger.info("%s: %s is not available: %s", ckpt, WITH_HEADS, problem)

    @property
    def model(self) -> Any:
        """The student's network, under the name that it has in s3prl's upstreams.

        ESPnet sets its ``feature_grad_mult``. A property, so that it is in ``state_dict`` once.
        """
        return self.student.backbone

    def get_downsample_rates(self, key: str) -> int:
        """Samples per frame: 320 (20 ms at 16 kHz) for the default conv extractor."""
        return self.student.settings.stride

    def forward(self, wavs: list[Tensor]) -> dict[str, Tensor | list[Tensor]]:
        """Run the student on unpadded waveforms ``[sample]`` at 16 kHz, of any lengths.

        Returns:
            ``hidden_states``: those of :class:`s3prl_ekd.distill.student_forward.StudentOutput`, a
            list of ``[batch, frame, dim]``. ``hidden_states_and_heads``: the same, followed by the
            layers that each head predicts, if the file has heads of the student's width.
            ``last_hidden_state``: the last of ``hidden_states``. Under ``torch.no_grad`` the heads
            are computed when ``hidden_states_and_heads`` is read.
        """
        if self.student.training and not self.student.is_cut:
            raise CheckpointError(
                "the student has gates, which would be drawn at random in fine-tuning (-f); cut it "
                "first: s3prl-ekd prune CKPT -o pruned.pt"
            )
        lengths = torch.tensor([len(wav) for wav in wavs])
        waves = pad_sequence(wavs, batch_first=True)
        min_samples = self.student.settings.min_samples
        if waves.shape[1] < min_samples:  # shorter than one frame
            waves = torch.nn.functional.pad(waves, (0, min_samples - waves.shape[1]))
        out = self.student(waves, lengths.clamp(min=min_samples))
        result: dict[str, Tensor | list[Tensor]] = {
            "hidden_states": out.hidden_states,
            "last_hidden_state": out.hidden_states[-1],
        }
        if self.heads is None:
            return result
        if not torch.is_grad_enabled():
            kind = (
                waves.device.type
            )  # heads run under this forward's autocast, wherever they are read
            enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

            def compute() -> list[Tensor]:
                with torch.no_grad(), torch.autocast(kind, dtype, enabled=enabled):
                    return self._with_heads(out)

            return ComputedWhenRead(result, WITH_HEADS, compute)
        # DistributedDataParallel, for -f, finds the tensors of a plain dict only
        return {**result, WITH_HEADS: self._with_heads(out)}

    def _with_heads(self, out: StudentOutput) -> list[Tensor]:
        """The hidden states and the layers that the heads predict, ``[batch, frame, dim]`` each."""
        assert self.heads is not None  # loaded
        states = list(out.hidden_states)
        for name, prediction in self.heads(out).items():
            # [batch, layer, frame, width] -> slices [batch, frame, dim] of the student's width
            for layer in prediction.unbind(1):
                states += layer.split(self.targets[name].parts, dim=-1)
        return states


class ComputedWhenRead(dict):
    """A dict in which the value of one key is computed, without gradients, when it is first read.

    s3prl's Featurizer reads one key of an upstream's outputs, and needs a dict.
    """

    def __init__(self, values: dict[str, Any], key: str, compute: Callable[[], Any]):
        super().__init__(values)
        self[key], self._key, self._compute = None, key, compute

    def __getitem__(self, key: str) -> Any:
        if key == self._key and super().__getitem__(key) is None:
            self[key] = self._compute()
        return super().__getitem__(key)

    def __reduce__(self) -> Any:  # a copy is a plain dict
        return dict, (dict(self),)

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default

    def pop(self, key: str, *default: Any) -> Any:
        if key in self:
            self[key] = self[key]
        return super().pop(key, *default)

    def __iter__(self) -> Iterator[str]:  # makes dict(x) and {**x} call __getitem__
        return super().__iter__()

    def values(self) -> Any:
        return [self[key] for key in self]

    def items(self) -> Any:
        return [(key, self[key]) for key in self]
