"""The process group of a run, and DistributedDataParallel for the distiller."""

from __future__ import annotations

import contextlib
import itertools
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

from ..data.batch import Batch
from ..distill.batch import DistillBatch
from ..distill.distiller import EnsembleDistiller
from ..distill.frame_counts import FrameCounts
from ..distill.student_settings import PrunedSettings
from ..errors import SetupError, first_line
from ..system import torchrun


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that train together: one, or those that torchrun has started.

    Rank 0 writes checkpoints, TensorBoard and the lock, and shows the progress bar. Positions in
    the data count the batches of all processes, so a run can be resumed with another number of
    processes. Each process has its own random states.

    ``any``, ``sum``, ``minimum``, ``all_gather``, ``first_not_none`` and ``barrier`` are
    collective: all processes must call them, in the same order. They exchange little data, over the
    CPU (gloo) except ``minimum``. DistributedDataParallel averages the gradients.
    """

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def any(self, value: bool) -> bool:
        """Whether ``value`` is true in any process; a signal, for example, reaches only one."""
        if self.world_size == 1:
            return bool(value)
        flag = torch.tensor(float(value))
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def minimum(self, value: Tensor) -> Tensor:
        """The minimum over all processes, on the tensor's device: a GPU is not waited for."""
        if self.world_size > 1:
            dist.all_reduce(value, dist.ReduceOp.MIN)
        return value

    def sum(self, *values: float) -> list[float]:
        """Sum each value over all processes."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def all_gather(self, value: Any) -> list:
        """The values of all processes, by rank; plain data or tensors."""
        if self.world_size == 1:
            return [value]
        values: list = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def first_not_none(self, value: Any) -> Any:
        """The value of the lowest rank whose value is not None; None if there is no such rank."""
        return next((value for value in self.all_gather(value) if value is not None), None)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.all_reduce(torch.zeros(1))  # dist.barrier() would use the GPU

    def seed_by_rank(self, seed: int) -> None:
        """Seed each rank but 0 differently, so that dropout differs between processes.

        Rank 0 keeps its random states, as in a run of one process.
        """
        if self.rank:
            random.seed(seed + self.rank)
            np.random.seed((seed + self.rank) % 2**32)
            torch.manual_seed(seed + self.rank)


def join_process_group(device: str) -> ProcessGroup:
    """Initialise torch.distributed, if torchrun has started several processes.

    On ``cuda`` each process uses the GPU of its local rank.

    Raises:
        SetupError: there are more processes than GPUs on this machine, or they cannot connect.
    """
    if not torchrun.is_distributed():
        return ProcessGroup()
    on_cuda = device.startswith("cuda")
    if on_cuda and device != "cuda":
        raise SetupError(
            f"--device {device} is a single GPU, but torchrun has started several processes; "
            "use --device cuda, or leave it out"
        )
    try:
        if on_cuda:
            local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if local >= gpus:
                raise SetupError(
                    f"torchrun has started more processes than this machine has GPUs ({gpus}); "
                    f"use --nproc_per_node={gpus}"
                )
            torch.cuda.set_device(local)
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
    except (KeyError, ValueError, RuntimeError) as error:
        problem = f"the processes of this run cannot connect: {first_line(error)}"
        raise SetupError(f"{problem}; start them with torchrun") from None
    return ProcessGroup(dist.get_rank(), dist.get_world_size())


def leave_process_group() -> None:
    """Destroy the process group at the end of a run.

    Not called after an error: the other processes then see a lost connection.
    """
    if dist.is_available() and dist.is_initialized():
        # The first to leave could close a connection that others still use.
        ProcessGroup(world_size=dist.get_world_size()).barrier()
        dist.destroy_process_group()


def mean_records(by_process: Sequence[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Average records (name -> one value a step) over the processes that have the value."""
    means = {}
    for name in dict.fromkeys(itertools.chain(*by_process)):
        columns = itertools.zip_longest(*(records.get(name, ()) for records in by_process))
        known = [[value for value in column if value is not None] for column in columns]
        means[name] = [sum(values) / len(values) for values in known]
    return means


def is_lost_process(error: BaseException) -> bool:
    """Whether an error means that another process has ended."""
    texts = ("Connection closed", "Connection reset", "Broken pipe", "gloo", "NCCL", "ProcessGroup")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )


def distiller_batch(batch: Batch, device: str) -> DistillBatch:
    """The distiller's input for a batch, on the device."""
    teacher_waves = batch.teacher_waves
    if teacher_waves is not None:
        teacher_waves = teacher_waves.to(device, non_blocking=True)
    return DistillBatch(
        batch.waves.to(device, non_blocking=True),
        batch.lengths,
        teacher_waves,
        None if batch.targets is None else batch.targets.on(device),
        None if batch.spans is None else batch.spans.to(device, non_blocking=True),
    )


class DistributedStep(nn.Module):
    """The distiller's forward for DistributedDataParallel, which also accepts an empty batch.

    Bad audio can leave one process without an utterance. It still runs a step, because the other
    processes would wait for it.
    """

    def __init__(self, distiller: EnsembleDistiller):
        super().__init__()
        self.distiller = distiller

    def forward(
        self, batch: DistillBatch, step: int, detail: bool, counts: FrameCounts | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if len(batch.lengths):
            return self.distiller(batch, step=step, detail=detail, counts=counts)
        return empty_step(self.distiller), {}


def empty_step(distiller: EnsembleDistiller) -> Tensor:
    """The loss of an empty batch: 0, with gradients of 0."""
    distiller.empty_step()
    return torch.stack([(weight * 0).sum() for weight in distiller.trainable.parameters()]).sum()


def wrap_ddp(distiller: EnsembleDistiller, device: str) -> DistributedDataParallel:
    """Wrap the distiller in DistributedDataParallel, which copies rank 0's weights to all ranks.

    It ignores the teachers: they have no gradients and are equal in all processes.
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
        broadcast_buffers=False,  # the target statistics are equal already
        find_unused_parameters=has_unused_layers(distiller),
    )


def has_unused_layers(distiller: EnsembleDistiller) -> bool:
    """Whether a step can leave layers of the student without a gradient.

    Layer drop does, different ones in each process. Layer-to-layer heads and relations do not use
    the layers above the highest target. In a pre-norm student of ``kind: distil`` they do not use
    the encoder's last layer norm either.
    """
    settings = distiller.student.settings
    if settings.encoder_layerdrop > 0:
        return True
    if (highest := distiller.highest_layer) is None:
        return False
    is_highest_used = highest == settings.encoder_layers
    is_copy = isinstance(settings, PrunedSettings)
    return not is_highest_used or (settings.layer_norm_first and not is_copy)


def no_sync(module: nn.Module) -> AbstractContextManager[None]:
    """Context without gradient averaging, for all but the last batch of a step."""
    if isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return contextlib.nullcontext()
