"""One batch through the distiller, in one process or in several that share their gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..data.batches import Batch
from ..distill.distiller import EnsembleDistiller


class OneStep(nn.Module):
    """The distiller, called with a batch's tensors.

    A process may be left without an utterance where others have some (bad audio). It takes part all
    the same, or they would wait for it: its loss is 0, and so are its gradients.
    """

    def __init__(self, distiller: EnsembleDistiller):
        super().__init__()
        self.distiller = distiller

    def forward(
        self,
        waves: Tensor,
        lengths: Tensor,
        teacher_waves: Tensor | None,
        step: int,
        detail: bool,
        known: Mapping[str, Tensor] | None,
        known_frames: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if len(lengths):
            return self.distiller(
                waves,
                lengths,
                teacher_waves,
                step=step,
                detail=detail,
                known=known,
                known_frames=known_frames,
            )
        self.distiller.learn_nothing()
        return sum((weight * 0).sum() for weight in self.distiller.trainable.parameters()), {}


class Steps:
    """How the adapter calls the distiller; not a module, so nothing is registered twice.

    Args:
        distiller: teachers, student, heads, loss.
    """

    def __init__(self, distiller: EnsembleDistiller):
        self.plain = OneStep(distiller)
        self.shared: DistributedDataParallel | None = None

    def share(self, device: str) -> None:
        """Average the gradients of all processes from now on; they start from the first one's
        weights.

        The teachers are the same everywhere and have no gradients: they are left alone.

        Args:
            device: of the run.
        """
        distiller = self.plain.distiller
        teachers = [
            f"distiller.teachers.{name}"
            for part in (distiller.teachers.named_parameters(), distiller.teachers.named_buffers())
            for name, _ in part
        ]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.plain, teachers)
        # A layer that this process's layer drop has left out gets no gradient here.
        dropping = distiller.student.settings.encoder_layerdrop > 0
        on_cuda = device.startswith("cuda")
        self.shared = DistributedDataParallel(
            self.plain,
            device_ids=[torch.cuda.current_device()] if on_cuda else None,
            broadcast_buffers=False,  # the statistics of the targets agree already
            find_unused_parameters=dropping,
        )

    @contextlib.contextmanager
    def own_gradients(self) -> Iterator[None]:
        """Within it, gradients stay with their process: all but the last batch of an update."""
        with self.shared.no_sync() if self.shared is not None else contextlib.nullcontext():
            yield

    def __call__(
        self, batch: Batch, device: str, step: int, detail: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and scalars of a batch; see :meth:`EnsembleDistiller.forward`."""
        heard = batch.teacher_waves
        stored = (None, None) if batch.targets is None else batch.targets.on(device)
        call = self.plain
        if self.shared is not None and torch.is_grad_enabled():
            call = self.shared
        return call(
            batch.waves.to(device, non_blocking=True),
            batch.lengths.to(device, non_blocking=True),
            None if heard is None else heard.to(device, non_blocking=True),
            step,
            detail,
            *stored,
        )
