"""The processes of a run, one or those that torchrun has started, and DistributedDataParallel."""

from __future__ import annotations

import contextlib
import logging
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..data.batches import Batch
from ..distill.batch import DistillBatch
from ..distill.distiller import EnsembleDistiller
from ..errors import SetupError
from ..system import torchrun

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Processes:
    """``rank`` of this process among ``count``.

    One process writes: checkpoints, TensorBoard, the lock, the progress bar. Positions in the data
    are counted in batches of all processes together, so that a run may go on with another number
    of them; each has random numbers of its own.

    The methods that ask the others must be called by all of them, in the same order. What they ask
    is small and goes through the CPU (gloo); gradients are DistributedDataParallel's affair.
    """

    rank: int = 0
    count: int = 1

    @property
    def writer(self) -> bool:
        return self.rank == 0

    def any(self, mine: bool) -> bool:
        """Whether it is so in any process: a signal reaches one of them, and all must stop."""
        if self.count == 1:
            return bool(mine)
        flag = torch.tensor(float(mine))
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def sum(self, *mine: float) -> list[float]:
        """The sums over all processes."""
        if self.count == 1:
            return list(mine)
        total = torch.tensor(mine, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, mine: Any) -> list:
        """What each process has, by rank: plain data and tensors."""
        if self.count == 1:
            return [mine]
        found: list = [None] * self.count
        dist.all_gather_object(found, mine)
        return found

    def first(self, mine: Any) -> Any:
        """What the first process has that has something; None where none has."""
        return next((each for each in self.gather(mine) if each is not None), None)

    def own_random_numbers(self, seed: int) -> None:
        """Let each process draw its own: the same dropout everywhere would waste the batch's width.

        The first one keeps those it has, so that a run of one process does not know of this.
        """
        if self.rank:
            random.seed(seed + self.rank)
            np.random.seed((seed + self.rank) % 2**32)
            torch.manual_seed(seed + self.rank)


def join(device: str) -> Processes:
    """Join the processes that torchrun has started; alone, there is nothing to do.

    Args:
        device: of the run, ``cpu`` or ``cuda``; each process takes the GPU of its local rank.

    Raises:
        SetupError: there are more processes than GPUs on this machine, or they do not find each
            other.
    """
    if not torchrun.several():
        return Processes()
    try:
        on_cuda = device.startswith("cuda")
        if on_cuda and device != "cuda":
            raise SetupError(
                f"--device {device} is one GPU, and under torchrun each process takes its own: put "
                "--device cuda, or leave it out"
            )
        if on_cuda:
            local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if local >= there:
                raise SetupError(
                    f"torchrun has started more processes than the {there} GPUs of this machine; "
                    f"give it --nproc_per_node={there}"
                )
            torch.cuda.set_device(local)
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
    except (KeyError, ValueError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SetupError(
            f"the processes of this run do not find each other: {first}; start them with torchrun"
        ) from None
    return Processes(dist.get_rank(), dist.get_world_size())


def leave() -> None:
    """Take leave of the others at the end; after an error they find out for themselves."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(torch.zeros(1))  # who leaves first could take a connection with it
        dist.destroy_process_group()


def mean_records(every: Sequence[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Scalars by name and step: the mean over the processes that have them."""
    names = dict.fromkeys(name for records in every for name in records)
    means = {}
    for name in names:
        lists = [records[name] for records in every if name in records]
        length = max(map(len, lists))
        columns = [[each[i] for each in lists if i < len(each)] for i in range(length)]
        means[name] = [sum(column) / len(column) for column in columns]
    return means


def lost_another(error: BaseException) -> bool:
    """Whether an error says that another process is not there any more."""
    if isinstance(error, getattr(dist, "DistError", ())):
        return True
    signs = ("Connection closed", "Connection reset", "Broken pipe", "gloo", "NCCL", "ProcessGroup")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


class OneStep(nn.Module):
    """The distiller, called with a batch on its device.

    A process may be left without an utterance where others have some (bad audio). It takes part all
    the same, or they would wait for it: its loss is 0, and so are its gradients.
    """

    def __init__(self, distiller: EnsembleDistiller):
        super().__init__()
        self.distiller = distiller

    def forward(
        self, batch: DistillBatch, step: int, detail: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if len(batch.lengths):
            return self.distiller(batch, step=step, detail=detail)
        self.distiller.empty_step()
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
        teacher_waves = batch.teacher_waves
        if teacher_waves is not None:
            teacher_waves = teacher_waves.to(device, non_blocking=True)
        call = self.plain
        if self.shared is not None and torch.is_grad_enabled():
            call = self.shared
        on_device = DistillBatch(
            batch.waves.to(device, non_blocking=True),
            batch.lengths.to(device, non_blocking=True),
            teacher_waves,
            None if batch.targets is None else batch.targets.on(device),
        )
        return call(on_device, step, detail)
