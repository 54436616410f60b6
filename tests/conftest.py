"""Shared fixtures and helpers: tiny teachers, a small synthetic corpus, running commands."""

from __future__ import annotations

import functools
import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile
import torch
import yaml

from s3prl_ekd import cli, compat
from s3prl_ekd.data.settings import DataSettings
from s3prl_ekd.distill.student import Student
from s3prl_ekd.distill.student_settings import StudentSettings
from s3prl_ekd.files.run_checkpoints import newest_checkpoint, read_checkpoint
from s3prl_ekd.student_file import LoadedStudent, write_student
from s3prl_ekd.teachers.random_weights import hubert_checkpoint, wavlm_checkpoint
from s3prl_ekd.workspace import write_workspace

REPO = Path(__file__).parent.parent
# A shell script starts background processes with SIGINT ignored, and their children inherit this.
# Tests send SIGINT, so restore the default handler.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
CONV = "[(32,10,5)] + [(32,3,2)] * 4 + [(32,2,2)] * 2"
SIZES = {
    "conv_layers": CONV,
    "layers": 4,
    "embed_dim": 48,
    "ffn_dim": 64,
    "heads": 4,
    "conv_pos": 16,
    "conv_pos_groups": 4,
}
STUDENT = {
    "extractor_conv_feature_layers": CONV,
    "conv_pos": 16,
    "conv_pos_groups": 4,
    "encoder_layers": 2,
    "encoder_embed_dim": 48,
    "encoder_ffn_embed_dim": 64,
    "encoder_attention_heads": 4,
}
# Without dropout, the forward of a student in training is deterministic.
NO_DROPOUT = {**STUDENT, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}


compat.apply()  # before a test module imports s3prl
torch.set_num_threads(1)  # with tiny models, threads are slower


def safetensors_student(data: dict) -> bytes:
    """Serialise contents of a student file, valid or not, as safetensors."""
    from s3prl_ekd.student_file import _write_safetensors

    file = io.BytesIO()
    _write_safetensors(data, file)
    return file.getvalue()


@pytest.fixture(scope="session")
def teachers(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints in the original formats: hubert, robust, wavlm (width 48), wide (width 64)."""
    return write_teachers(tmp_path_factory.mktemp("teachers"))


def write_teachers(folder: Path) -> dict[str, Path]:
    states = {
        "hubert": hubert_checkpoint(seed=1, **SIZES),
        "robust": hubert_checkpoint(seed=2, **SIZES),
        "wavlm": wavlm_checkpoint(seed=3, **SIZES),
        "wide": hubert_checkpoint(seed=4, **{**SIZES, "embed_dim": 64}),
    }
    paths = {}
    for name, state in states.items():
        paths[name] = folder / f"{name}.pt"
        torch.save(state, paths[name])
    return paths


@pytest.fixture
def student_settings() -> StudentSettings:
    """A tiny student without dropout."""
    return StudentSettings(**NO_DROPOUT)


@pytest.fixture
def waves() -> list[torch.Tensor]:
    """Three waveforms of different lengths, in samples at 16 kHz."""
    generator = torch.Generator().manual_seed(5)
    return [0.1 * torch.randn(n, generator=generator) for n in (16000, 12345, 7000)]


class CreatesFolder:
    """An object whose pickle creates a folder when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def make_sound(seconds: float, rate: int = 16000, channels: int = 1, seed: int = 0) -> np.ndarray:
    """Noise with a slow envelope, ``[sample]`` or ``[sample, channel]``, float32."""
    rng = np.random.default_rng(seed)
    count = int(seconds * rate)
    envelope = 0.2 * (1 + np.sin(np.linspace(0, 6 * np.pi * seconds, count)))
    wave = (envelope[:, None] * rng.standard_normal((count, channels)) * 0.2).clip(-1, 1)
    return wave.astype(np.float32) if channels > 1 else wave[:, 0].astype(np.float32)


@pytest.fixture(scope="session")
def student_file(tmp_path_factory) -> Path:
    """``student.pt``: a tiny student without heads, in a folder with a space in its name."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("a folder") / "student.pt"
    write_student(LoadedStudent(Student(StudentSettings(**NO_DROPOUT)), None, {}, {}), path)
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """``audio/`` with 12 utterances of 0.5 to 1.6 s, and their table ``tables/train.csv``."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def write_corpus(root: Path) -> Path:
    (root / "audio").mkdir()
    (root / "tables").mkdir()
    lines = [",file_path,length,label"]
    for i in range(12):
        wave = make_sound(0.5 + 0.1 * i, seed=i)
        soundfile.write(root / "audio" / f"u{i}.flac", wave, 16000)
        lines.append(f"{i},u{i}.flac,{len(wave)},")
    (root / "tables" / "train.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="session")
def noise_folder(tmp_path_factory) -> Path:
    """Four noises: shorter and longer than an utterance, stereo at 44.1 kHz, silent."""
    folder = tmp_path_factory.mktemp("data") / "street"
    (folder / "more").mkdir(parents=True)
    soundfile.write(folder / "a.wav", make_sound(0.2, seed=11), 16000)
    soundfile.write(folder / "b.flac", make_sound(1.2, seed=12), 16000)
    soundfile.write(folder / "more/c.wav", make_sound(0.7, 44100, channels=2, seed=13), 44100)
    soundfile.write(folder / "silent.wav", np.zeros(9000), 16000)
    return folder


@pytest.fixture(scope="session")
def distortion_sources(tmp_path_factory) -> dict[str, list[str]]:
    from .distortions import write_sources

    return write_sources(tmp_path_factory.mktemp("sources"))


def data_settings(root: Path, batch_size: int, tables: Path | str = ".", **changes) -> DataSettings:
    """Settings for full utterances below ``root``, without worker processes."""
    options = {"sequence_length": 0, "num_workers": 0, **changes}
    return DataSettings(str(root), str(tables), ("train",), batch_size, **options)


def recipe(path: str) -> dict:
    """One of ``downstream_recipes``."""
    return yaml.safe_load((REPO / "downstream_recipes" / path).read_text(encoding="utf-8"))


HOLD = """
import sys, time
from s3prl_ekd.system.lock import FolderLock
with FolderLock(*sys.argv[1:]):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def lock_holder():
    """Lock a folder in another process until the test ends: ``lock_holder(folder, lock_name)``."""
    processes = []

    def hold(*argv):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, *map(str, argv)], stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in processes:
        process.kill()
        process.wait()


def write_librispeech_names(folder: Path, *splits: str) -> None:
    """Write an empty utterance per split in LibriSpeech's layout, and its length table."""
    for name in splits:
        chapter = folder / name / "1/2"
        chapter.mkdir(parents=True)
        for file in ("1-2-0.flac", "1-2.trans.txt"):
            (chapter / file).touch()
        (folder / f"{name}.csv").write_text(f"file_path,length\n{name}/1/2/1-2-0.flac,1\n")


def write_configs(folder: Path, teachers: dict[str, Path], corpus: Path, **model) -> None:
    """Write ``model.yaml`` and ``runner.yaml`` for 6 small steps with three teachers."""
    models = {name: teachers[name] for name in ("hubert", "robust", "wavlm")}
    settings = {
        "teachers": {n: {"model": str(p), "layers": [2, 4]} for n, p in models.items()},
        "aggregation": "separate",
        "student": STUDENT,
        "init": {"teacher": "hubert"},
        "teacher_precision": "float32",
        **model,
    }
    runner = {
        "runner": {
            "n_epochs": -1,
            "total_steps": 6,
            "gradient_clipping": 5.0,
            "gradient_accumulate_steps": 1,
            "log_step": 2,
            "save_step": 3,
            "max_keep": 5,
            "precision": "float32",
        },
        "optimizer": {"name": "AdamW_with_schedule", "lr": 1e-3, "warmup_proportion": 0.1},
        "pretrain_expert": {
            "datarc": {
                "libri_root": str(corpus / "audio"),
                "file_path": str(corpus / "tables"),
                "sets": ["train"],
                "train_batch_size": 3,
                "num_workers": 0,
                "sequence_length": 8000,
            }
        },
    }
    (folder / "model.yaml").write_text(yaml.safe_dump(settings))
    (folder / "runner.yaml").write_text(yaml.safe_dump(runner))


@contextmanager
def edit_yaml(path: Path | str) -> Iterator[dict]:
    """Change the contents of a YAML file; they are written when the block ends."""
    contents = yaml.safe_load(Path(path).read_text())
    yield contents
    Path(path).write_text(yaml.safe_dump(contents, sort_keys=False))


@pytest.fixture
def pretrain_folder(tmp_path, teachers, corpus, monkeypatch) -> Path:
    """A working folder with the configs of a pretraining of 6 steps, which saves at 3 and 6."""
    write_workspace(tmp_path)
    write_configs(tmp_path, teachers, corpus)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def finished_pretraining(tmp_path_factory, teachers, corpus) -> Path:
    """A working folder with a run of 6 steps, started with -o, and its output in ``log.txt``.

    Tests do not change it; ``copied_pretraining`` is a copy to work in.
    """
    folder = tmp_path_factory.mktemp("finished")
    command("init", ".", cwd=folder)
    write_configs(folder, teachers, corpus)
    argv = ("-u", "ekd", "-n", "x", "-c", "runner.yaml", "-g", "model.yaml")
    more = ("-o", "config.runner.log_step=1", "--device", "cpu")
    run = command("run_pretrain.py", *argv, *more, cwd=folder)
    (folder / "log.txt").write_text(run.stdout + run.stderr)
    return folder


@pytest.fixture
def copied_pretraining(finished_pretraining, tmp_path, monkeypatch) -> Path:
    """A copy of that folder to work in."""
    shutil.copytree(finished_pretraining, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def cached_targets(tmp_path_factory, teachers, corpus) -> Path:
    """The target caches ``float16``, ``bfloat16`` and ``int8``; tests change copies only."""
    from .cache_cases import make_caches

    return make_caches(tmp_path_factory.mktemp("cached"), teachers, corpus)


@pytest.fixture
def cache_folder(pretrain_folder, teachers, corpus) -> Path:
    """``pretrain_folder`` without excerpts and dropout, as for a target cache."""
    from .cache_cases import configs

    configs(pretrain_folder, teachers, corpus)
    return pretrain_folder


@pytest.fixture(scope="session")
def superb_workspace(tmp_path_factory) -> Path:
    """A working folder with data of SID and ER; tests write their runs elsewhere."""
    from .superb_workspace import make_workspace

    return make_workspace(tmp_path_factory.mktemp("superb"))


@pytest.fixture
def in_superb_workspace(superb_workspace, monkeypatch) -> Path:
    monkeypatch.chdir(superb_workspace)
    return superb_workspace


@pytest.fixture
def pretrain(pretrain_script):
    """Run ``run_pretrain.py -u ekd ARGV`` in this process; return (code, stdout + stderr)."""
    return functools.partial(pretrain_script, "-u", "ekd")


@pytest.fixture
def pretrain_with(pretrain_folder, pretrain):
    """Pretrain in that folder with changes to the runner config; returns (exit code, output)."""

    def run(name, *argv, **changes):
        with edit_yaml(pretrain_folder / "runner.yaml") as config:
            for key, value in changes.items():
                part = config["runner"]
                if key in ("dev_sets", "num_workers", "sequence_length"):
                    part = config["pretrain_expert"]["datarc"]
                elif key in ("optimizer", "scheduler"):
                    part = config
                part[key] = value
        files = ("-c", "runner.yaml", "-g", "model.yaml")
        return pretrain(*files, "-n", name, "--device", "cpu", *argv)

    return run


def saved_states(name: str, file: str | None = None) -> dict:
    """The newest checkpoint of the run ``name``, or one of its files."""
    folder = f"result/pretrain/{name}"
    return read_checkpoint(f"{folder}/{file}" if file else newest_checkpoint(folder))


@pytest.fixture
def pretrain_script(monkeypatch, capfd):
    """Run ``run_pretrain.py ARGV`` in this process; return (code, stdout + stderr)."""
    from s3prl_ekd.launch import run_pretrain

    def run(*argv):
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["run_pretrain.py", *argv])
        try:
            code = run_pretrain()
        except SystemExit as stop:
            code = stop.code
        output = capfd.readouterr()
        return code, output.out + output.err

    return run


def error_of(capsys, *argv: object) -> str:
    """Run ``s3prl-ekd ARGV``, which must end with exit code 2 and one line; return that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in argv])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return error


def command(
    *argv: str, cwd: Path, check: bool = True, timeout: float = 300, **env: str
) -> subprocess.CompletedProcess:
    """Run ``python -m s3prl_ekd ARGV`` as a user would, in ``cwd``, for at most ``timeout`` s."""
    process = subprocess.run(
        [sys.executable, "-m", "s3prl_ekd", *map(str, argv)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )
    if check:
        output = f"{process.stdout}\n{process.stderr}"
        assert process.returncode == 0, f"{argv} -> {process.returncode}\n{output}"
    return process


@pytest.fixture
def complete(monkeypatch) -> dict[str, ModuleType]:
    """Stubs of packages of old versions, which have all names that s3prl uses."""
    stubs = {
        name: ModuleType(name)
        for name in (
            "torchaudio",
            "torchaudio.sox_effects",
            "huggingface_hub",
            "distutils",
            "distutils.util",
        )
    }
    for name in ("load", "save", "info", "set_audio_backend"):
        setattr(stubs["torchaudio"], name, lambda *args: None)
    stubs["huggingface_hub"].HfFolder = stubs["huggingface_hub"].Repository = object
    for name, module in stubs.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # the default of torch 2.5
    monkeypatch.setattr(compat, "_fired", [])
    return stubs


def run_python(code: str, *args: str) -> str:
    """Run ``code`` in a new interpreter; return the last line that it prints."""
    path = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
    process = subprocess.run(
        [sys.executable, "-c", code, *args],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.strip().splitlines()[-1]


def run_downstream_here(monkeypatch, *argv: str) -> None:
    """Run ``run_downstream.py ARGUMENTS`` on the CPU, in this process and its working folder."""
    from s3prl_ekd.launch import run_downstream

    monkeypatch.setattr(sys, "argv", ["run_downstream.py", *argv, "--device", "cpu"])
    assert run_downstream() == 0
