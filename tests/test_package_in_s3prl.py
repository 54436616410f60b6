"""The hidden-set package in s3prl: its downstream Runner trains the four recipes on it.

A submission reaches the Runner by ``args.from_hf_hub``: a repository is downloaded, its folder is
put on the path, and ``from expert import UpstreamExpert`` follows. The door is s3prl's own here;
only the download is replaced, by one that has the package in a folder already.
"""

from __future__ import annotations

import builtins
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub
import pytest
import soundfile
import torch
from s3prl.downstream import runner as s3prl_runner
from s3prl_ekd.upstream.expert import UpstreamExpert

from s3prl_ekd import cli, launch
from s3prl_ekd.distill.aggregation import TargetSpec
from s3prl_ekd.distill.heads import PredictionHeads
from s3prl_ekd.distill.settings import StudentSettings
from s3prl_ekd.distill.student import Student
from s3prl_ekd.files.run_checkpoints import read_run
from s3prl_ekd.student_file import LoadedStudent, write_student
from s3prl_ekd.workspace import write_workspace

from .conftest import STUDENT, make_sound
from .preparing import prepare

REPOSITORY = "somebody/my_package"
HIDDEN_STATES = 1 + 2 + 2  # projected features, two layers, the two layers that the head predicts
LEXICON = "A  AH0\nCAT  K AE1 T\nDOG  D AO1 G\n"
TEXTS = ("A CAT", "A DOG", "DOG CAT")
STEPS = {"total_steps": 2, "log_step": 2, "eval_step": 1000, "save_step": 2}
# Task -> the name after -d, the YAML, and what of its downstream_expert is smaller here.
RECIPES = {
    "pr": ("ctc", "ctc/tiny.yaml", {"corpus.batch_size": 2, "model.RNNs.dim": [16]}),
    "sid": ("voxceleb1", "voxceleb1/tiny.yaml", {"datarc.train_batch_size": 4}),
    "er": ("emotion", "emotion/tiny.yaml", {"datarc.train_batch_size": 3}),
    "asr": ("asr", "asr/tiny.yaml", {"datarc.batch_size": 4, "modelrc.RNNs.dim": [16]}),
}


@dataclass
class Seen:
    """What a run showed: its Runner, the package's weights at the start, and what it computed."""

    runner: s3prl_runner.Runner | None = None
    before: dict[str, torch.Tensor] = field(default_factory=dict)
    batches: list[tuple[list, list]] = field(default_factory=list)  # waveforms, hidden states
    losses: list[float] = field(default_factory=list)
    downloads: list[tuple] = field(default_factory=list)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A working folder with recipes, the corpora of the four tasks, a student and its package.
    Runs are in this process: s3prl's imports are paid for once."""
    folder = tmp_path_factory.mktemp("package")
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    before = builtins.isinstance  # s3prl's script replaces it for good
    write_workspace(folder)
    write_corpora(folder)
    torch.manual_seed(3)
    student = Student(StudentSettings(**STUDENT))
    targets = {"hubert": TargetSpec(2, (48,))}
    heads = PredictionHeads(student.width, targets)
    write_student(LoadedStudent(student, heads, targets, {"step": 1}), folder / "student.pt")
    assert cli.main(["export", "superb", "student.pt", "-o", "package"]) == 0
    yield folder
    builtins.isinstance = before
    patch.undo()


def write_corpora(folder: Path) -> None:
    """One manifest of 16 utterances of noise, prepared for each task where its recipe looks."""
    lines = ["path\tspeaker\ttext\temotion\tsplit\n"]
    (folder / "corpus").mkdir()
    for i in range(16):
        split = "train" if i < 10 else "dev" if i < 13 else "test"
        sound = make_sound(0.6 + 0.03 * i, seed=i)
        soundfile.write(folder / "corpus" / f"{i}.wav", sound, 16_000)
        speaker, mood = ("ann", "bob")[i % 2], ("calm", "wild")[i // 2 % 2]
        lines.append(f"{i}.wav\t{speaker}\t{TEXTS[i % 3]}\t{mood}\t{split}\n")
    manifest = folder / "corpus" / "all.tsv"
    manifest.write_text("".join(lines))
    (folder / "lexicon.txt").write_text(LEXICON)
    lexicon = ("--lexicon", folder / "lexicon.txt")
    places = {"pr": "corpus_pr", "sid": "sid", "er": "er", "asr": "corpus"}
    for task, place in places.items():
        words = lexicon if task == "pr" else ()
        assert prepare(task, manifest, "-o", folder / "data" / place, *words) == 0


@pytest.fixture
def train(here, monkeypatch):
    """Train two steps of a recipe on the package; what was seen of it, and the checkpoint."""

    def train(task: str, *words: str) -> tuple[Seen, dict]:
        seen = Seen()
        downstream, config, smaller = RECIPES[task]
        changes = {f"config.runner.{key}": value for key, value in STEPS.items()}
        changes |= {f"config.downstream_expert.{key}": value for key, value in smaller.items()}
        changes |= {"args.from_hf_hub": True, "args.upstream": REPOSITORY}
        override = ",,".join(f"{key}={value!r}" for key, value in changes.items())
        name = "-".join((task, *words))
        argv = ["run_downstream.py", "-m", "train", "-d", downstream, "-n", name]
        argv += ["-c", f"downstream/{config}", "-o", override, "--device", "cpu", *words]

        def download(*args, **kwargs):
            seen.downloads.append(args)
            return str(here / "package")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download, raising=False)
        monkeypatch.setattr(s3prl_runner.Runner, "train", watched(seen))
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(sys, "path", list(sys.path))
        try:
            assert launch.run_downstream() == 0
        finally:
            sys.modules.pop("expert", None)
        return seen, read_run(here / "result" / "downstream" / name / "states-2.ckpt")

    return train


def watched(seen: Seen):
    """``Runner.train`` that writes down what goes in and out of upstream and downstream."""
    original = s3prl_runner.Runner.train

    def train(self):
        seen.runner = self
        model = self.upstream.model
        seen.before = {name: value.clone() for name, value in model.state_dict().items()}

        def upstream_ran(module, args, out):
            states = [state.detach().clone() for state in out["hidden_states"]]
            seen.batches.append(([wave.clone() for wave in args[0]], states))

        def downstream_ran(module, args, loss):
            seen.losses.append(loss.item())

        model.register_forward_hook(upstream_ran)
        self.downstream.model.register_forward_hook(downstream_ran)
        return original(self)

    return train


def difference(before, after) -> float:
    assert before.keys() == after.keys()
    return max((before[name] - after[name]).abs().max().item() for name in before)


@pytest.mark.parametrize("task", RECIPES)
def test_two_steps_of_each_recipe(train, here, task):
    seen, states = train(task)
    model = seen.runner.upstream.model
    assert seen.downloads == [(REPOSITORY, None)]
    assert type(model).__module__ == "expert"
    assert Path(type(model).__init__.__code__.co_filename) == here / "package" / "expert.py"

    assert states["Step"] == 2 and states["Args"].downstream == RECIPES[task][0]
    assert {int(entry["step"]) for entry in states["Optimizer"]["state"].values()} == {2}
    assert len(seen.losses) == 2 and all(map(math.isfinite, seen.losses))

    weights = states["Featurizer"]["weights"]
    assert weights.shape == (HIDDEN_STATES,)
    assert weights.abs().min() > 0  # they start at 0: each hidden state got a gradient
    assert "Upstream" not in states
    assert difference(seen.before, model.state_dict()) == 0
    saved = torch.load(here / "package" / "model.pt", weights_only=True)["weights"]
    assert difference({f"model.{name}": value for name, value in saved.items()}, seen.before) == 0

    assert len(seen.batches) == 2
    student = UpstreamExpert(here / "student.pt").eval()
    for waves, found in seen.batches:
        assert len({len(wave) for wave in waves}) > 1  # so there is padding
        with torch.no_grad():
            expected = student(waves)["hidden_states_and_heads"]
        assert len(found) == len(expected) == HIDDEN_STATES
        for ours, theirs in zip(expected, found, strict=True):
            torch.testing.assert_close(theirs, ours, atol=1e-6, rtol=0)


def test_fine_tuning_trains_the_package(train):
    """With -f each of its weights learns, and the Featurizer gets as many hidden states."""
    seen, states = train("er", "-f")
    assert all(map(math.isfinite, seen.losses)) and len(seen.losses) == 2
    assert states["Upstream"].keys() == seen.before.keys()
    still = [
        name for name, old in seen.before.items() if torch.equal(states["Upstream"][name], old)
    ]
    assert still == []
    assert {len(found) for _, found in seen.batches} == {HIDDEN_STATES}
