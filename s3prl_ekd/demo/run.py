"""The demo: the commands of the README in order, on data and teachers made on the spot."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..checkpoints import newest, read_run
from ..errors import SetupError
from ..evaluate.asr import ErrorRates, error_rates
from ..evaluate.curves import plot_run, teacher_curves
from ..evaluate.scalars import read_scalars
from ..workspace import write_workspace
from .corpus import make_corpus
from .tiny_teachers import make_teachers

NAME = "demo"


@dataclass
class Demo:
    """One demo in one folder. Each step may be repeated: what is finished is kept.

    Args:
        folder: the workspace; everything is written below it.
        steps: steps of distillation.
        asr_steps: steps of the downstream ASR model.
        utterances: training utterances of the synthetic corpus.
    """

    folder: Path
    steps: int = 300
    asr_steps: int = 600
    utterances: int = 400
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self) -> None:
        """Do all of it and print the summary.

        Raises:
            SetupError: a command of the way failed; it has said why.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for title, step in (
            ("synthesise a speech corpus", self._corpus),
            ("make three tiny teachers", self._teachers),
            ("set up the working folder", self._workspace),
            ("distil the teachers into one student", self._distil),
            ("export the student", self._export),
            ("train ASR on the student", self._train_asr),
            ("evaluate ASR", self._evaluate_asr),
        ):
            number = len(self.seconds) + 1
            print(f"\n== {number}/7 {title}", flush=True)
            start = time.monotonic()
            step()
            self.seconds[title] = time.monotonic() - start
        self._summary()

    # The steps

    def _corpus(self) -> None:
        record = make_corpus(
            self.folder / "data" / "corpus",
            utterances={"train-clean": self.utterances, "dev-clean": 40, "test-clean": 40},
        )
        for split, facts in record["splits"].items():
            minutes = facts["seconds"] / 60
            print(
                f"{split}: {facts['utterances']} utterances, {minutes:.1f} min, "
                f"{len(facts['speakers'])} voices"
            )

    def _teachers(self) -> None:
        for name, path in make_teachers(self.folder / "teachers").items():
            print(f"{name}: {path} (random weights, true architecture)")

    def _workspace(self) -> None:
        states = [state for state, _ in write_workspace(self.folder)]
        print(f"{states.count('created')} files created, {states.count('kept')} kept")

    def _distil(self) -> None:
        every = max(1, self.steps // 3)
        if self._step(self.pretrain) >= self.steps:
            print(f"kept: {self.pretrain} is at step {self.steps} already")
            return
        self._command(
            "run_pretrain.py -u ekd -a",
            f"-n {NAME} -c pretrain/ekd/tiny_runner.yaml -g pretrain/ekd/tiny_model.yaml",
            f"-o config.runner.total_steps={self.steps},,config.runner.save_step={every}"
            f",,config.runner.log_step={max(1, self.steps // 30)}",
        )

    @staticmethod
    def _step(folder: Path) -> int:
        """The step of the newest checkpoint in a run's folder; 0 where there is none."""
        latest = newest(folder) if folder.is_dir() else None
        return 0 if latest is None else read_run(latest)["Step"]

    def _export(self) -> None:
        self._command(f"export student result/pretrain/{NAME} -o student.pt --force")

    def _train_asr(self) -> None:
        every = max(1, self.asr_steps // 4)
        if self._step(self.downstream) >= every * (self.asr_steps // every):
            print(f"kept: {self.downstream}")
            return
        self._command(
            "run_downstream.py -m train -a -u ekd_student -k student.pt",
            f"-d asr -c downstream/asr/tiny.yaml -n {NAME}_asr",
            f"-o config.runner.total_steps={self.asr_steps},,config.runner.log_step={every}"
            f",,config.runner.eval_step={every},,config.runner.save_step={every}",
        )

    def _evaluate_asr(self) -> None:
        best = self.downstream / "dev-clean-best.ckpt"  # s3prl writes it once WER is below 100
        chosen = best if best.is_file() else newest(self.downstream)
        path = chosen.relative_to(self.folder)
        self._command(f"run_downstream.py -m evaluate -t test-clean -e {path}")

    # The rest

    @property
    def pretrain(self) -> Path:
        return self.folder / "result" / "pretrain" / NAME

    @property
    def downstream(self) -> Path:
        return self.folder / "result" / "downstream" / f"{NAME}_asr"

    def _command(self, *parts: str) -> None:
        """Run one of our commands in the folder, shown as a user would type it."""
        text = " ".join(parts)
        shown = text if text.startswith("run_") else f"s3prl-ekd {text}"
        print(f"$ {shown}", flush=True)
        words = [word for part in parts for word in part.split()]
        done = subprocess.run([sys.executable, "-m", "s3prl_ekd", *words], cwd=self.folder)
        if done.returncode:
            raise SetupError(
                f"the command above ended with exit code {done.returncode}; mend what it says and "
                "start the demo again: finished steps are kept"
            )

    def _summary(self) -> None:
        scalars = read_scalars(self.pretrain)
        plot = self.folder / "distillation.png"
        loss = list(scalars["ekd/train-loss_mean"].values())
        rows = [("loss", loss[0], loss[-1])]
        for teacher, layers in teacher_curves(scalars).items():
            for layer, points in layers.items():
                values = list(points.values())
                rows.append((f"L1 to {teacher}, layer {layer}", values[0], values[-1]))
        print("\n== done")
        _table(("distillation", "first", "last"), rows, "{:.4f}".format)
        rates: dict[str, ErrorRates] = {
            split: error_rates(self.downstream, split) for split in ("dev-clean", "test-clean")
        }
        print()
        _table(
            ("ASR on the student", "WER %", "CER %"),
            [(f"{s} ({r.utterances} utterances)", r.wer, r.cer) for s, r in rates.items()],
            "{:.1f}".format,
        )
        print()
        _table(("time", "s"), list(self.seconds.items()), "{:.0f}".format)
        try:
            plot_run(scalars, plot)
            drawn = f"  {plot}    the curves of the distillation\n"
        except SetupError as error:
            drawn = f"  (no plot: {error})\n"
        print(
            f"\nThe teachers have random weights, so the scores only show that the way is whole."
            f"\n\nwhere things are:\n{drawn}"
            f"  {self.folder / 'student.pt'}    the student: plain tensors, for -u ekd_student\n"
            f"  {self.pretrain}    checkpoints and TensorBoard of the distillation\n"
            f"  {self.downstream}    the ASR model and its predictions\n"
            f"  {self.folder / 'pretrain' / 'ekd'}    the configs: yours to change\n"
            f"\nnext, with your own teachers and corpus:\n"
            f"  s3prl-ekd init my_work && cd my_work\n"
            f"  s3prl-ekd lengths AUDIO_FOLDER -o data/len_for_bucket\n"
            f"  (edit pretrain/ekd/config_model.yaml and config_runner.yaml)\n"
            f"  run_pretrain.py -u ekd -n my_student"
        )


def _table(head: tuple[str, ...], rows: list[tuple], number: Callable[[float], str]) -> None:
    cells = [head, *((row[0], *map(number, row[1:])) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    for row in cells:
        first, *others = row
        line = first.ljust(widths[0])
        print(line + "".join(f"  {c:>{w}}" for c, w in zip(others, widths[1:], strict=True)))
