"""The processes of a run, one or those that torchrun has started, and DistributedDataParallel."""

from __future__ import annotations

import contextlib
import logging
import os
import random
from collections.abc import Sequence
from contextlib import AbstractContextManager
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
from ..errors import SetupError, first_line
from ..system import torchrun

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Processes:
    """``rank`` of this process among ``count``.

    One process writes: checkpoints, TensorBoard, the lock, the progress bar. Positions in the data
    are counted in batches of all processes together, so that a run may be resumed with another
    number of them; each has its own random numbers.

    The methods communicate: all processes must call them, in the same order. What they exchange is
    small and goes through the CPU (gloo); gradients are left to DistributedDataParallel.
    """

    rank: int = 0
    count: int = 1

    @property
    def writer(self) -> bool:
        return self.rank == 0

    def any(self, value: bool) -> bool:
        """Whether a value is true in any process: a signal reaches one, and all must stop."""
        if self.count == 1:
            return bool(value)
        flag = torch.tensor(float(value))
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def sum(self, *values: float) -> list[float]:
        """The sums over all processes."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def all_gather(self, value: Any) -> list:
        """The values of all processes, by rank: plain data and tensors."""
        if self.count == 1:
            return [value]
        values: list = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def first(self, value: Any) -> Any:
        """The first of the processes' values, by rank, that is not None."""
        return next((value for value in self.all_gather(value) if value is not None), None)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.count > 1:
            dist.all_reduce(torch.zeros(1))  # dist.barrier() would take the GPU

    def seed_by_rank(self, seed: int) -> None:
        """Give each process its own random numbers: dropout that is the same in all of them would
        waste the batch's width.

        The first one keeps those it has, as in a run of one process.
        """
        if self.rank:
            random.seed(seed + self.rank)
            np.random.seed((seed + self.rank) % 2**32)
            torch.manual_seed(seed + self.rank)


def join(device: str) -> Processes:
    """Join the processes that torchrun has started, if there are several.

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
            local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if local >= gpus:
                raise SetupError(
                    f"torchrun has started more processes than the {gpus} GPUs of this machine; "
                    f"give it --nproc_per_node={gpus}"
                )
            torch.cuda.set_device(local)
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
    except (KeyError, ValueError, RuntimeError) as error:
        first = first_line(error)
        raise SetupError(
            f"the processes of this run do not find each other: {first}; start them with torchrun"
        ) from None
    return Processes(dist.get_rank(), dist.get_world_size())


def leave() -> None:
    """Leave the process group at the end; after an error the other processes see it lost."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(torch.zeros(1))  # a barrier: who leaves first could close a connection
        dist.destroy_process_group()


def mean_records(by_process: Sequence[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Scalars by name and step: the mean over the processes that have them."""
    names = dict.fromkeys(name for records in by_process for name in records)
    means = {}
    for name in names:
        lists = [records[name] for records in by_process if name in records]
        length = max(map(len, lists))
        columns = [[values[i] for values in lists if i < len(values)] for i in range(length)]
        means[name] = [sum(column) / len(column) for column in columns]
    return means


def is_lost_process(error: BaseException) -> bool:
    """Whether an error means that another process has ended."""
    if isinstance(error, getattr(dist, "DistError", ())):
        return True
    signs = ("Connection closed", "Connection reset", "Broken pipe", "gloo", "NCCL", "ProcessGroup")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def distiller_batch(batch: Batch, device: str) -> DistillBatch:
    """The distiller's part of a batch, on the device."""
    teacher_waves = batch.teacher_waves
    if teacher_waves is not None:
        teacher_waves = teacher_waves.to(device, non_blocking=True)
    return DistillBatch(
        batch.waves.to(device, non_blocking=True),
        batch.lengths.to(device, non_blocking=True),
        teacher_waves,
        None if batch.targets is None else batch.targets.on(device),
    )


class DistributedStep(nn.Module):
    """The distiller's forward for DistributedDataParallel, with batches that may be empty.

    A process may be left without an utterance where others have some (bad audio). It takes part all
    the same, or they would wait for it.
    """

    def __init__(self, distiller: EnsembleDistiller):
        super().__init__()
        self.distiller = distiller

    def forward(
        self, batch: DistillBatch, step: int, detail: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if len(batch.lengths):
            return self.distiller(batch, step=step, detail=detail)
        return empty_step(self.distiller), {}


def empty_step(distiller: EnsembleDistiller) -> Tensor:
    """The loss of a batch without an utterance: 0, with gradients of 0."""
    distiller.empty_step()
    return torch.stack([(weight * 0).sum() for weight in distiller.trainable.parameters()]).sum()


def distribute(distiller: EnsembleDistiller, device: str) -> DistributedDataParallel:
    """The distiller's forward with gradients averaged over all processes, whose weights become
    those of the first.

    The teachers are the same everywhere and have no gradients: DistributedDataParallel ignores
    them.

    Args:
        distiller: teachers, student, heads, loss.
        device: of the run.
    """
    step = DistributedStep(distiller)
    teachers = [
        f"distiller.teachers.{name}"
        for tensors in (distiller.teachers.named_parameters(), distiller.teachers.named_buffers())
        for name, _ in tensors
    ]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(step, teachers)
    on_cuda = device.startswith("cuda")
    return DistributedDataParallel(
        step,
        device_ids=[torch.cuda.current_device()] if on_cuda else None,
        broadcast_buffers=False,  # the statistics of the targets agree already
        # Layers that this process's layer drop has left out get no gradient here.
        find_unused_parameters=distiller.student.settings.encoder_layerdrop > 0,
    )


def no_sync(module: nn.Module) -> AbstractContextManager[None]:
    """Within it, gradients stay with their process: all but the last batch of a step."""
    if isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return contextlib.nullcontext()
