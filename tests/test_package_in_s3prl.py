"""s3prl's downstream Runner trains four recipes on a hidden-set package.

With ``args.from_hf_hub``, the Runner downloads a repository, adds its folder to ``sys.path`` and
imports ``UpstreamExpert`` from ``expert``. Only the download is replaced here, by a local folder.
"""

from __future__ import annotations

import builtins
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub
import pytest
import torch
from s3prl.downstream import runner as s3prl_runner
from s3prl_ekd.upstream.expert import UpstreamExpert

from s3prl_ekd import cli, launch
from s3prl_ekd.distill.aggregation import TargetSpec
from s3prl_ekd.distill.heads import PredictionHeads
from s3prl_ekd.distill.student import Student
from s3prl_ekd.distill.student_settings import StudentSettings
from s3prl_ekd.files.run_checkpoints import read_checkpoint
from s3prl_ekd.student_file import LoadedStudent, write_student
from s3prl_ekd.workspace import write_workspace

from .conftest import STUDENT, make_sound
from .corpora import write_manifest
from .preparing import prepare

REPOSITORY = "somebody/my_package"
HIDDEN_STATES = 1 + 2 + 2  # projected features, two layers, two layers predicted by the head
LEXICON = "A  AH0\nCAT  K AE1 T\nDOG  D AO1 G\n"
TEXTS = ("A CAT", "A DOG", "DOG CAT")
STEPS = {"total_steps": 2, "log_step": 2, "eval_step": 1000, "save_step": 2}
# Task -> downstream (-d), YAML, and settings of downstream_expert to make smaller.
RECIPES = {
    "pr": ("ctc", "ctc/tiny.yaml", {"corpus.batch_size": 2, "model.RNNs.dim": [16]}),
    "sid": ("voxceleb1", "voxceleb1/tiny.yaml", {"datarc.train_batch_size": 4}),
    "er": ("emotion", "emotion/tiny.yaml", {"datarc.train_batch_size": 3}),
    "asr": ("asr", "asr/tiny.yaml", {"datarc.batch_size": 4, "modelrc.RNNs.dim": [16]}),
}


@dataclass
class RunRecording:
    """A run's Runner, the package's weights before training, and the outputs of each step."""

    runner: s3prl_runner.Runner | None = None
    initial_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    batches: list[tuple[list, list]] = field(default_factory=list)  # waveforms, hidden states
    losses: list[float] = field(default_factory=list)
    downloads: list[tuple] = field(default_factory=list)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A working folder with recipes, the corpora of the four tasks, a student and its package.

    Runs share this process, so that s3prl is imported once.
    """
    folder = tmp_path_factory.mktemp("package")
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    original = builtins.isinstance  # s3prl's script replaces it and does not restore it
    write_workspace(folder)
    write_corpora(folder)
    torch.manual_seed(3)
    student = Student(StudentSettings(**STUDENT))
    targets = {"hubert": TargetSpec(2, (48,))}
    heads = PredictionHeads(student.width, targets)
    write_student(LoadedStudent(student, heads, targets, {"step": 1}), folder / "student.pt")
    assert cli.main(["export", "superb", "student.pt", "-o", "package"]) == 0
    yield folder
    builtins.isinstance = original
    patch.undo()


def write_corpora(folder: Path) -> None:
    """Write a manifest of 16 utterances of noise and prepare it for each task."""
    rows = []
    for i in range(16):
        split = "train" if i < 10 else "dev" if i < 13 else "test"
        speaker, mood = ("ann", "bob")[i % 2], ("calm", "wild")[i // 2 % 2]
        cells = (f"{i}.wav", speaker, TEXTS[i % 3], mood, split)
        rows.append((make_sound(0.6 + 0.03 * i, seed=i), cells))
    columns = ("speaker", "text", "emotion", "split")
    manifest = write_manifest(folder / "corpus/all.tsv", columns, rows)
    (folder / "lexicon.txt").write_text(LEXICON)
    lexicon = ("--lexicon", folder / "lexicon.txt")
    outputs = {"pr": "corpus_pr", "sid": "sid", "er": "er", "asr": "corpus"}
    for task, output in outputs.items():
        options = lexicon if task == "pr" else ()
        assert prepare(task, manifest, "-o", folder / "data" / output, *options) == 0


@pytest.fixture
def train(workspace, monkeypatch):
    """Trains two steps of a recipe on the package; returns the recording and the checkpoint."""

    def train(task: str, *options: str) -> tuple[RunRecording, dict]:
        recording = RunRecording()
        downstream, config, smaller = RECIPES[task]
        changes = {f"config.runner.{key}": value for key, value in STEPS.items()}
        changes |= {f"config.downstream_expert.{key}": value for key, value in smaller.items()}
        changes |= {"args.from_hf_hub": True, "args.upstream": REPOSITORY}
        override = ",,".join(f"{key}={value!r}" for key, value in changes.items())
        name = "-".join((task, *options))
        argv = ["run_downstream.py", "-m", "train", "-d", downstream, "-n", name]
        argv += ["-c", f"downstream/{config}", "-o", override, "--device", "cpu", *options]

        def download(*args, **kwargs):
            recording.downloads.append(args)
            return str(workspace / "package")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download, raising=False)
        monkeypatch.setattr(s3prl_runner.Runner, "train", record_training(recording))
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(sys, "path", list(sys.path))
        try:
            assert launch.run_downstream() == 0
        finally:
            sys.modules.pop("expert", None)
        return recording, read_checkpoint(
            workspace / "result" / "downstream" / name / "states-2.ckpt"
        )

    return train


def record_training(recording: RunRecording):
    """A ``Runner.train`` that also records inputs and outputs of upstream and downstream."""
    original = s3prl_runner.Runner.train

    def train(self):
        recording.runner = self
        model = self.upstream.model
        recording.initial_weights = {
            name: value.clone() for name, value in model.state_dict().items()
        }

        def record_upstream(module, args, out):
            states = [state.detach().clone() for state in out["hidden_states"]]
            recording.batches.append(([wave.clone() for wave in args[0]], states))

        def record_downstream(module, args, loss):
            recording.losses.append(loss.item())

        model.register_forward_hook(record_upstream)
        self.downstream.model.register_forward_hook(record_downstream)
        return original(self)

    return train


def largest_difference(first, second) -> float:
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


@pytest.mark.parametrize("task", RECIPES)
def test_two_training_steps_of_each_recipe(train, workspace, task):
    recording, checkpoint = train(task)
    model = recording.runner.upstream.model
    assert recording.downloads == [(REPOSITORY, None)]
    assert type(model).__module__ == "expert"
    assert Path(type(model).__init__.__code__.co_filename) == workspace / "package" / "expert.py"

    assert checkpoint["Step"] == 2 and checkpoint["Args"].downstream == RECIPES[task][0]
    assert {int(entry["step"]) for entry in checkpoint["Optimizer"]["state"].values()} == {2}
    assert len(recording.losses) == 2 and all(map(math.isfinite, recording.losses))

    weights = checkpoint["Featurizer"]["weights"]
    assert weights.shape == (HIDDEN_STATES,)
    assert weights.abs().min() > 0  # they start at 0, so each hidden state got a gradient
    assert "Upstream" not in checkpoint
    assert largest_difference(recording.initial_weights, model.state_dict()) == 0
    saved = torch.load(workspace / "package" / "model.pt", weights_only=True)["weights"]
    assert (
        largest_difference(
            {f"model.{name}": value for name, value in saved.items()}, recording.initial_weights
        )
        == 0
    )

    assert len(recording.batches) == 2
    student = UpstreamExpert(workspace / "student.pt").eval()
    for waves, states in recording.batches:
        assert len({len(wave) for wave in waves}) > 1  # so the batch has padding
        with torch.no_grad():
            expected = student(waves)["hidden_states_and_heads"]
        assert len(states) == len(expected) == HIDDEN_STATES
        for state, reference in zip(states, expected, strict=True):
            torch.testing.assert_close(state, reference, atol=1e-5, rtol=0)


def test_fine_tuning_trains_the_package(train):
    """With -f every weight is trained, and the number of hidden states stays the same."""
    recording, checkpoint = train("er", "-f")
    assert all(map(math.isfinite, recording.losses)) and len(recording.losses) == 2
    assert checkpoint["Upstream"].keys() == recording.initial_weights.keys()
    unchanged = [
        name
        for name, value in recording.initial_weights.items()
        if torch.equal(checkpoint["Upstream"][name], value)
    ]
    assert unchanged == []
    assert {len(states) for _, states in recording.batches} == {HIDDEN_STATES}
