"""The step of ``run_pretrain.py -u ekd`` by its own Trainer, on batches read in advance."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from s3prl_ekd import compat

from .inputs import RATE
from .variants import CLIPPING, UNLIMITED, BenchPlan, bench_config, build_cache


class TrainerStep:
    """Forward, backward and update with FusedAdamW; no audio is read and no checkpoint written.

    Batches are copied to a GPU within the step; a run copies the next one during it.

    Args:
        plan: inputs.
        precision: ``float32``, ``tf32`` or ``bfloat16``, of student and teachers.
        cache: number format of cached targets; None: the teachers run.
        runner: further keys of ``runner``.
        student: further keys of ``student``.
        model: further keys of the model config.

    Attributes:
        trainer: see :class:`~s3prl_ekd.pretrain.trainer.Trainer`.
        batches: those of an epoch, in pinned memory on a machine with CUDA.
    """

    def __init__(
        self,
        plan: BenchPlan,
        precision: str = "float32",
        cache: str | None = None,
        runner: Mapping[str, Any] | None = None,
        student: Mapping[str, Any] | None = None,
        **model: Any,
    ):
        compat.apply()
        from s3prl_ekd.pretrain.expert import UpstreamPretrainExpert
        from s3prl_ekd.pretrain.trainer import Trainer

        base, data = bench_config(plan)
        config = {
            **base,
            "student": {**plan.models.student, **(student or {})},
            "teacher_precision": "bfloat16" if precision == "bfloat16" else "float32",
            **model,
        }
        if cache is not None:
            data["target_cache"] = str(build_cache(plan, config, data, cache))
        path = plan.folder / "trainer_model.yaml"
        path.write_text(json.dumps(config))  # JSON is YAML
        run = {"n_epochs": -1, "total_steps": UNLIMITED, "log_step": 20, "save_step": 1000}
        run |= {"max_keep": 1, "gradient_accumulate_steps": 1, "gradient_clipping": CLIPPING}
        settings = {
            "runner": {**run, "precision": precision, **(runner or {})},
            "optimizer": {"name": "FusedAdamW", "lr": 2e-4, "warmup_proportion": 0.07},
            "pretrain_expert": {"datarc": data},
        }
        args = argparse.Namespace(
            device=plan.device, upstream="ekd", upstream_config=str(path), seed=0, init_ckpt=None,
            expname="bench", expdir=str(plan.folder / "run"),
        )  # fmt: skip
        Path(args.expdir).mkdir(exist_ok=True)
        torch.manual_seed(0)
        # s3prl's Runner does this, and imports the expert from the working folder.
        host = SimpleNamespace(
            _get_upstream=lambda trainer: UpstreamPretrainExpert(
                data, trainer.args.upstream_config, plan.device
            ).to(plan.device)
        )
        self.trainer = Trainer(args, settings, host)
        self.trainer.upstream.train()
        self.batches = list(self.trainer.upstream.get_train_dataloader())

    def step(self, index: int) -> float:
        """Take a step; return its seconds of audio. A GPU may still be computing."""
        batch = self.batches[index % len(self.batches)]
        self.trainer.record_step(self.trainer.train_step(iter([batch])))
        self.trainer.snapshot()
        return float(batch.lengths.sum()) / RATE

    def read(self) -> list[Any]:
        """Wait for the device and return the results of the steps since the last call."""
        return self.trainer.read_steps()
