"""A machine for typing the commands of the documents: corpora, checkpoints, small configs.

What differs from a reader's machine: the corpora below ``/data`` are a few seconds of noise in a
temporary folder, the checkpoints of s3prl's hub are true to the format but 12 layers of width 48,
already in s3prl's download cache, and configs that ``init`` wrote are reduced to a few updates.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import yaml

from s3prl_ekd.distill.student import Student
from s3prl_ekd.distill.student_settings import StudentSettings
from s3prl_ekd.student_file import LoadedStudent, write_student
from s3prl_ekd.teachers.random_weights import hubert_checkpoint, wavlm_checkpoint

from .conftest import REPO, SIZES, STUDENT, make_sound
from .corpora import (
    SEGMENTS,
    write_audio,
    write_common_voice,
    write_cuts,
    write_fluent_commands,
    write_iemocap,
    write_kaldi,
    write_librispeech,
    write_manifest,
    write_snips,
    write_speech_commands,
    write_voxceleb1,
)
from .hub_server import commit

WORDS = ["A CAT SAT", "THE DOG", "A DOG SAT", "THE CAT SAT"]
TAGS = ["O B-animal O", "O B-animal", "O B-animal O", "O B-animal O"]
LEXICON = "A  AH0\nTHE  DH AH0\nCAT  K AE1 T\nDOG  D AO1 G\nSAT  S AE1 T\n"
SPLITS = ("train-clean-100", "train-clean-360", "train-other-500", "dev-clean", "test-clean")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Snippet:
    """A fenced block of a page: its language, text and line."""

    language: str
    text: str
    line: int


def snippets(page: str) -> Iterator[Snippet]:
    """The fenced blocks of a page of the repository, in order."""
    text = (REPO / page).read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        yield Snippet(match[1], match[2], text.count("\n", 0, match.start()) + 2)


def commands(block: str) -> list[str]:
    """The commands of an ``sh`` block, one a line, continued lines joined, comments removed."""
    joined = re.sub(r"\\\n\s*", "", block)
    lines = (re.sub(r"\s+#.*", "", line).strip() for line in joined.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


class Machine:
    """A working folder, ``/data``, a home folder, and the shell in which commands are typed.

    Args:
        root: an empty folder.
    """

    def __init__(self, root: Path):
        self.root, self.home, self.data = root, root / "home", root / "data"
        self.folder = root / "work"
        self.folder.mkdir()
        write_data(self.data)
        write_hub(self.home / ".cache/s3prl/download")

    def write_student(self) -> None:
        """``student.safetensors`` in the working folder, untrained."""
        torch.manual_seed(0)
        student = LoadedStudent(Student(StudentSettings(**STUDENT)), None, {}, {"step": 1})
        write_student(student, self.folder / "student.safetensors")

    def local(self, text: str) -> str:
        """A text of a page with the paths of this machine."""
        return re.sub(r"(?<![\w.])/data/", f"{self.data}/", text)

    def type(self, command: str, timeout: float = 240) -> str:
        """Run a command in a shell of its own; stdout and stderr. ``cd`` stays in effect.

        Raises:
            AssertionError: its exit code is not 0.
        """
        command = self.local(command)
        if command.startswith("cd "):
            self.folder = self.folder / command.removeprefix("cd ")
            return ""
        environment = {**os.environ, "HOME": str(self.home), "OMP_NUM_THREADS": "1"}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        result = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        output = result.stdout + result.stderr
        assert result.returncode == 0, f"{command} -> {result.returncode}\n{output[-3000:]}"
        assert "Traceback" not in output, f"{command}\n{output[-3000:]}"
        self.reduce()
        return output

    def reduce(self) -> None:
        """Make the configs in the working folder small enough for a test.

        After so few updates no word is right, so s3prl saves no best checkpoint of ASR: the newest
        one takes its name.
        """
        for path in self.folder.glob("result/downstream/*asr*/states-*.ckpt"):
            if not (best := path.with_name("dev-clean-best.ckpt")).exists():
                shutil.copy(path, best)
        for path in self.folder.glob("pretrain/ekd/config_model.yaml"):
            change(path, {"student": STUDENT})
        for path in self.folder.glob("pretrain/ekd/tiny/*.yaml"):
            if path.stem != "three_average":  # one of the experiments
                path.unlink()
        for path in self.folder.glob("pretrain/ekd/*_runner.yaml"):
            runner = {"total_steps": 2, "log_step": 1, "save_step": 1, "precision": "float32"}
            datarc = {"train_batch_size": 2, "num_workers": 0, "sequence_length": 8000}
            change(path, {"runner": runner, "pretrain_expert": {"datarc": datarc}})
        for path in self.folder.glob("downstream/*/*.yaml"):
            runner = {"total_steps": 2, "log_step": 1, "eval_step": 1, "save_step": 1}
            datarc = {"num_workers": 0, "train_batch_size": 4, "eval_batch_size": 4}
            datarc |= {"vad_config": {"min_sec": 6000}}
            change(path, {"runner": runner, "downstream_expert": {"datarc": datarc}})


def change(path: Path, values: dict) -> None:
    """Replace values of keys that a YAML file has, and keys of ``student``."""
    data = yaml.safe_load(path.read_text())

    def merge(target: dict, source: dict) -> None:
        for key, value in source.items():
            if isinstance(value, dict) and key in target and key != "student":
                merge(target[key], value)
            elif key in target or key == "precision":
                target[key] = value

    merge(data, values)
    path.write_text(yaml.safe_dump(data, sort_keys=False))


def write_data(data: Path) -> None:
    """The corpora that the documents name, each a few utterances of noise."""
    write_librispeech(data / "LibriSpeech", dict.fromkeys(SPLITS, WORDS), 0.6)
    (data / "cmudict.dict").write_text(LEXICON)
    rows = []
    for i in range(16):
        split = "train" if i < 8 else "dev" if i < 12 else "test"
        speaker, emotion = ("ann", "bob")[i % 2], ("calm", "angry")[i // 2 % 2]
        intent = (("yes", "no")[i % 2], "turn on", ("light", "heat")[i % 2], "none")
        cells = (f"{i}.wav", speaker, WORDS[i % 4], emotion, split, *intent, TAGS[i % 4])
        rows.append((make_sound(1.2 + 0.05 * i, seed=i), cells))
    columns = ("speaker", "text", "emotion", "split", "word", "action", "object", "location", "iob")
    for task in ("asr", "pr", "sid", "er", "ks", "ic", "sf"):
        write_manifest(data / f"my_corpus/{task}.tsv", columns, rows)
    speakers = {"train": ("ann", "bob"), "test": ("cy", "dan")}
    own = [(split, names[i % 2]) for split, names in speakers.items() for i in range(4)]
    rows = [(rows[i][0], (f"asv{i}.wav", *own[i])) for i in range(len(own))]
    write_manifest(data / "my_corpus/asv.tsv", ("split", "speaker"), rows)
    for i in range(3):
        write_audio(data / f"my_audio/{i}.flac", make_sound(0.7 + 0.1 * i, seed=i))
        write_audio(data / f"noise/{i}.wav", make_sound(1.0, seed=50 + i))
        write_audio(data / f"dev-clean/{i}.flac", make_sound(0.5, seed=i))
    speakers = {"id10001": "dev", "id10002": "dev", "id10270": "test", "id10271": "test"}
    write_voxceleb1(data / "VoxCeleb1", data / "VoxCeleb1/iden_split.txt", speakers, 14000)
    trials = (
        "1 {0}/x-0_y/00000.wav {0}/x-1_y/00001.wav\n0 {0}/x-0_y/00000.wav {1}/x-0_y/00000.wav\n"
    )
    (data / "VoxCeleb1/veri_test2.txt").write_text(trials.format("id10270", "id10271"))
    write_speech_commands(data)
    write_fluent_commands(data / "fluent_speech_commands_dataset")
    write_snips(data / "SNIPS")
    emotions = ("neu", "hap", "ang", "sad")
    write_iemocap(data / "IEMOCAP_full_release", ["F_impro01"], emotions, 12000)
    for i, split in enumerate(("train", "dev", "test")):
        segments = {
            f"{name}{split}": (recording, start + i / 10, end)
            for name, (recording, start, end) in SEGMENTS.items()
        }
        write_kaldi(data / "kaldi" / split, data / "recordings", segments)
        write_common_voice(data / "cv/en", split)
    write_cuts(data / "cuts_train.jsonl.gz", data / "recordings")
    torch.save(wavlm_checkpoint(seed=9, **{**SIZES, "layers": 12}), data / "my_wavlm.pt")


def write_repositories(folder: Path) -> dict[str, dict[str, Path]]:
    """The models of the Hugging Face Hub that the documents name, small, for a stand-in of it."""
    from transformers import WavLMConfig, WavLMModel

    from s3prl_ekd.export.card_data import CardFacts
    from s3prl_ekd.export.huggingface import write_hf_folder

    torch.manual_seed(0)
    config = WavLMConfig(
        hidden_size=48,
        num_hidden_layers=12,
        num_attention_heads=4,
        intermediate_size=64,
        conv_dim=[32] * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    )
    WavLMModel(config).save_pretrained(folder / "wavlm")
    (folder / "student").mkdir()
    student = LoadedStudent(Student(StudentSettings(**STUDENT)), None, {}, {})
    write_hf_folder(student, folder / "student", "my-student", CardFacts())
    return {
        "microsoft/wavlm-base-plus": {commit(1): folder / "wavlm"},
        "my-org/my-student": {commit(2): folder / "student"},
    }


def write_hub(cache: Path) -> None:
    """Checkpoints of s3prl's hub where s3prl looks for downloaded ones."""
    from s3prl.upstream.hubert import hubconf as hubert
    from s3prl.upstream.wavlm import hubconf as wavlm
    from s3prl.util import download

    def address(module, entry: str, loader: str) -> str:
        with mock.patch.object(module, loader, lambda *args, **kwargs: kwargs["ckpt"]):
            return getattr(module, entry)()

    sizes = {**SIZES, "layers": 12}
    checkpoints = {
        address(hubert, "hubert_base", "hubert_custom"): hubert_checkpoint(seed=1, **sizes),
        address(hubert, "hubert_base_robust_mgr", "hubert_custom"): hubert_checkpoint(
            seed=2, **sizes
        ),
        address(wavlm, "wavlm_base_plus", "wavlm_url"): wavlm_checkpoint(seed=3, **sizes),
    }
    cache.mkdir(parents=True)
    with mock.patch.object(download, "_download_dir", cache):
        for url, checkpoint in checkpoints.items():
            torch.save(checkpoint, download._urls_to_filepaths(url, download=False))
