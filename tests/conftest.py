"""Shared pieces: tiny teachers on disk, a small corpus of made-up sound, a student's size."""

from __future__ import annotations

import functools
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile
import torch
import yaml

from s3prl_ekd import compat
from s3prl_ekd.data.settings import DataSettings
from s3prl_ekd.distill.settings import StudentSettings
from s3prl_ekd.teachers.random_weights import hubert_checkpoint, wavlm_checkpoint

REPO = Path(__file__).parent.parent
# Ctrl-C is ignored by what a script begins in the background, and by all that this starts; the
# tests send it.
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


compat.apply()  # before a test module imports s3prl
torch.set_num_threads(1)  # the models are tiny: threads cost more than they bring


def safetensors_student(data: dict) -> bytes:
    """What ``student_file.contents`` gives, good or not, as a safetensors file."""
    from s3prl_ekd.student_file import _write_safetensors

    file = io.BytesIO()
    _write_safetensors(data, file)
    return file.getvalue()


@pytest.fixture(scope="session")
def teachers(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints of the true formats: hubert, robust, wavlm (width 48) and wide (width 64)."""
    folder = tmp_path_factory.mktemp("teachers")
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
    """A tiny student without dropout: two forwards give the same."""
    none = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    return StudentSettings(**STUDENT, **none)


@pytest.fixture
def waves() -> list[torch.Tensor]:
    """Three waveforms of different lengths, in samples at 16 kHz."""
    generator = torch.Generator().manual_seed(5)
    return [0.1 * torch.randn(n, generator=generator) for n in (16000, 12345, 7000)]


def make_sound(seconds: float, rate: int = 16000, channels: int = 1, seed: int = 0) -> np.ndarray:
    """Noise with a slow envelope, ``[sample]`` or ``[sample, channel]``, float32."""
    rng = np.random.default_rng(seed)
    count = int(seconds * rate)
    envelope = 0.2 * (1 + np.sin(np.linspace(0, 6 * np.pi * seconds, count)))
    sound = (envelope[:, None] * rng.standard_normal((count, channels)) * 0.2).clip(-1, 1)
    return sound.astype(np.float32) if channels > 1 else sound[:, 0].astype(np.float32)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """``audio/`` with 12 utterances of 0.5 to 1.6 s and ``tables/train.csv`` over them."""
    root = tmp_path_factory.mktemp("corpus")
    (root / "audio").mkdir()
    (root / "tables").mkdir()
    lines = [",file_path,length,label"]
    for i in range(12):
        sound = make_sound(0.5 + 0.1 * i, seed=i)
        soundfile.write(root / "audio" / f"u{i}.flac", sound, 16000)
        lines.append(f"{i},u{i}.flac,{len(sound)},")
    (root / "tables" / "train.csv").write_text("\n".join(lines) + "\n")
    return root


def data_settings(root: Path, batch_size: int, tables: Path | str = ".", **changes) -> DataSettings:
    """Settings of whole utterances below ``root``, read in this process."""
    options = {"sequence_length": 0, "num_workers": 0, **changes}
    return DataSettings(str(root), str(tables), ("train",), batch_size, **options)


HOLD = """
import sys, time
from s3prl_ekd.system.lock import FolderLock
with FolderLock(*sys.argv[1:]):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def lock_holder():
    """Hold a folder in another process until the test ends: ``lock_holder(folder, lock_name)``."""
    processes = []

    def hold(*words):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, *map(str, words)], stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in processes:
        process.kill()
        process.wait()


def write_librispeech_names(folder: Path, *splits: str) -> None:
    """One empty utterance a split in LibriSpeech's layout, and its table: a corpus for checks."""
    for name in splits:
        chapter = folder / name / "1/2"
        chapter.mkdir(parents=True)
        for file in ("1-2-0.flac", "1-2.trans.txt"):
            (chapter / file).touch()
        (folder / f"{name}.csv").write_text(f"file_path,length\n{name}/1/2/1-2-0.flac,1\n")


def write_configs(folder: Path, teachers: dict[str, Path], corpus: Path, **model) -> None:
    """``model.yaml`` and ``runner.yaml`` of a run of 6 tiny steps over the three teachers."""
    chosen = {name: teachers[name] for name in ("hubert", "robust", "wavlm")}
    settings = {
        "teachers": {n: {"model": str(p), "layers": [2, 4]} for n, p in chosen.items()},
        "aggregation": "separate",
        "student": STUDENT,
        "init": {"teacher": "hubert"},
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
            "fp16": False,
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


@pytest.fixture
def pretrain(pretrain_script):
    """``run_pretrain.py -u ekd WORDS`` in this process; gives (code, stdout + stderr)."""
    return functools.partial(pretrain_script, "-u", "ekd")


@pytest.fixture
def pretrain_script(monkeypatch, capfd):
    """``run_pretrain.py WORDS`` in this process; gives (code, stdout + stderr)."""
    from s3prl_ekd.launch import run_pretrain

    def run(*words):
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["run_pretrain.py", *words])
        try:
            code = run_pretrain()
        except SystemExit as left:
            code = left.code
        out = capfd.readouterr()
        return code, out.out + out.err

    return run


def command(
    *words: str, cwd: Path, check: bool = True, timeout: float = 300, **env: str
) -> subprocess.CompletedProcess:
    """Run ``python -m s3prl_ekd WORDS`` as a user would, in ``cwd``, for ``timeout`` seconds."""
    done = subprocess.run(
        [sys.executable, "-m", "s3prl_ekd", *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )
    if check:
        assert done.returncode == 0, f"{words} -> {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture
def complete(monkeypatch) -> dict[str, ModuleType]:
    """Stand-ins of packages old enough to have all that s3prl asks for."""
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
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # what torch 2.5 did by itself
    monkeypatch.setattr(compat, "_fired", [])
    return stubs


def run_python(code: str, *args: str) -> str:
    """The last line that ``code`` prints in an interpreter of its own."""
    path = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]
