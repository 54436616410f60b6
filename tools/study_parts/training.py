"""Short training runs from cached targets, as commands of this package in one folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from s3prl_ekd.system.jobs import child_environment

from .probes import Corpus

EXCERPT = 32_000  # samples of an utterance in training, 2 s


class TrainingFolder:
    """A working folder (`s3prl-ekd init`) with length tables, a target cache and runs.

    Args:
        folder: created if it is missing.
        corpus: its table ``unlabeled`` has the columns path, duration and split (train or dev).
    """

    def __init__(self, folder: Path, corpus: Path):
        self.folder, self.corpus = folder.resolve(), Corpus(corpus.resolve())
        (self.folder / "results").mkdir(parents=True, exist_ok=True)

    def command(self, *argv: str, log: str = "log") -> None:
        """Run a command of this package in the folder; its output goes to ``log``.txt."""
        self.run_logged(["-m", "s3prl_ekd", *argv], log)

    def run_logged(self, argv: list[str], log: str) -> None:
        """Run Python with these arguments in the folder; its output goes to ``log``.txt."""
        with (self.folder / f"{log}.txt").open("a", encoding="utf-8") as output:
            print("$", *argv, file=output, flush=True)
            done = subprocess.run(
                [sys.executable, *argv],
                cwd=self.folder,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=child_environment(),  # it ends with this process
            )
        if done.returncode:
            raise SystemExit(f"failed: {' '.join(argv)}; see {self.folder / f'{log}.txt'}")

    def set_up(self, model: dict[str, Any], *options: str) -> None:
        """Write the working folder, length tables and the target cache of a model config.

        Args:
            options: of ``s3prl-ekd cache``.
        """
        if not (self.folder / "pretrain").exists():
            self.command("init", ".")
        self.write_tables()
        self.write("cache.yaml", model)
        self.write("cache_runner.yaml", runner_config(self.data(cached=False), 2, 1e-3))
        configs = ["-c", "cache_runner.yaml", "-g", "cache.yaml"]
        self.command("cache", *configs, "-o", "targets", *options)

    def write_tables(self) -> None:
        """Write the length tables of the corpus."""
        tables = self.folder / "tables"
        tables.mkdir(exist_ok=True)
        for split in ("train", "dev"):
            rows = [row for row in self.corpus.table("unlabeled") if row["split"] == split]
            lengths = {row["path"]: round(float(row["duration"]) * 16_000) for row in rows}
            paths = sorted(lengths, key=lambda path: -lengths[path])
            lines = [f"{i},{path},{lengths[path]}," for i, path in enumerate(paths)]
            text = "\n".join([",file_path,length,label", *lines]) + "\n"
            (tables / f"{split}.csv").write_text(text, encoding="utf-8")

    def data(self, cached: bool = True) -> dict[str, Any]:
        """``pretrain_expert.datarc``; the paths of tables and cache are relative to the folder."""
        data = {
            "libri_root": str(self.corpus.folder),
            "file_path": "tables",
            "sets": ["train"],
            "dev_sets": ["dev"],
            "train_batch_size": 8,
            "num_workers": 1,
            "sequence_length": EXCERPT,
        }
        return {**data, "target_cache": "targets"} if cached else data

    def write(self, name: str, config: dict[str, Any]) -> None:
        (self.folder / name).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")

    def train(
        self,
        name: str,
        model: dict[str, Any],
        steps: int,
        rate: float,
        warmup: float,
        seed: int,
        log: str = "log",
    ) -> Path:
        """Train a run, unless it is there; return its last checkpoint."""
        last = self.folder / "result/pretrain" / name / "last.ckpt"
        if not (last.parent / f"states-{steps}.ckpt").exists():
            self.write(f"{name}.yaml", model)
            self.write(f"{name}_runner.yaml", runner_config(self.data(), steps, rate, warmup))
            configs = ["-c", f"{name}_runner.yaml", "-g", f"{name}.yaml"]
            resume = ["-a"] if last.exists() else []
            argv = ["run_pretrain.py", "-u", "ekd", "-n", name, *configs, "--seed", str(seed)]
            self.command(*argv, *resume, log=log)
        return last

    def untrained(self, student: dict[str, Any], seed: int) -> Path:
        """Write a student with random weights."""
        import torch

        from s3prl_ekd.distill.student import Student
        from s3prl_ekd.distill.student_settings import StudentSettings
        from s3prl_ekd.student_file import LoadedStudent, write_student

        torch.manual_seed(seed)
        module = Student(StudentSettings(**student))
        path = self.folder / f"none_{seed}.pt"
        write_student(LoadedStudent(module, None, {}, {}), path, keep_heads=False)
        return path

    def expert(self, model: dict[str, Any], checkpoint: Path | None = None) -> Any:
        """The pretraining expert of a model config, with its first weights or those of a
        checkpoint."""
        from s3prl_ekd.files.run_checkpoints import read_checkpoint
        from s3prl_ekd.pretrain.expert import UpstreamPretrainExpert

        datarc = {**self.data(), "file_path": str(self.folder / "tables"), "num_workers": 0}
        datarc["target_cache"] = str(self.folder / "targets")
        expert = UpstreamPretrainExpert(datarc, model, device="cpu")
        if checkpoint is not None:
            expert.load_model(read_checkpoint(checkpoint))
        return expert

    def dev_loss(self, model: dict[str, Any], steps: int, checkpoint: Path | None) -> float:
        """Loss on the dev set, with the weights of the config or of a checkpoint."""
        from s3prl_ekd.pretrain.trainer import dev_loss

        expert = self.expert(model, checkpoint)
        assert expert.dev_dataloader is not None
        total, samples = dev_loss(expert, expert.dev_dataloader, steps, "cpu")
        expert.close()
        return total / samples


def runner_config(
    data: dict[str, Any], steps: int, rate: float, warmup: float = 0.1
) -> dict[str, Any]:
    """The runner config of a run; ``warmup``: share of the steps."""
    return {
        "runner": {
            "n_epochs": -1,
            "total_steps": steps,
            "gradient_clipping": 10.0,
            "gradient_accumulate_steps": 1,
            "log_step": 1 if steps == 2 else 10,
            "save_step": steps - 1,
            "max_keep": 1,
            "precision": "float32",
        },
        "optimizer": {
            "name": "FusedAdamW",
            "lr": rate,
            "warmup_proportion": warmup,
            "betas": [0.9, 0.98],
            "eps": 1e-8,
            "weight_decay": 0,
        },
        "pretrain_expert": {"datarc": data},
    }
