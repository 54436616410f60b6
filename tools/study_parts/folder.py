"""The folder of the study: inputs, teachers, cached targets, runs.

OUT/audio/speech, voices   links to the corpora; paths in tables are relative to OUT/audio
OUT/voices                 synthesised speech, as in the teachers' training data
OUT/zoo, zoo_NAME          the teachers that the package lacks
OUT/more_voices            more of it, for one of them
OUT/noise, test_noise      recordings of ESC-10: folds 1 and 2, fold 3
OUT/audio/*.tsv            manifests of the probes
OUT/phone_labels           alignments of other utterances, for the training of ``phones``
OUT/tables, targets        training utterances; their targets of all teachers
OUT/units_NAME.safetensors k-means of a teacher's middle target layer
OUT/start.pt, none_SEED.pt students before training
OUT/result/pretrain/RUN    one student
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from s3prl_ekd.errors import SetupError

from .rows import (
    LAYERS,
    PLAIN,
    SINGLES,
    START,
    START_FILE,
    STUDENT,
    THIRD,
    Row,
    model_config,
    teacher_config,
    units_file,
)
from .training import TrainingFolder, runner_config

MANIFESTS = ("unlabeled", "pr", "sid", "er")
VOICES = {"voices": "48", "utterances": "1200", "seed": "8"}
MORE_VOICES = {"voices": "200", "utterances": "2400", "seed": "9"}  # of ``hubert_3_voices``
SIBLING_SEED = 2  # of the training of ``sibling``
EXCERPT = 64_000  # samples of an utterance in training, 4 s
BATCH, BATCH_SECONDS = 8, 8  # utterances and seconds of a batch, at most
UNIT_OPTIONS = ("--clusters", "100", "--utterances", "300")
# 1.4 M parameters; the shapes of the tiny teachers
START_STUDENT = {
    "extractor_conv_feature_layers": "[(128,10,5)] + [(128,3,2)] * 4 + [(128,2,2)] * 2",
    "feature_grad_mult": 1.0,
    "encoder_layers": 2,
    "encoder_embed_dim": 192,
    "encoder_ffn_embed_dim": 768,
    "encoder_attention_heads": 4,
}
TOOLS = Path(__file__).parent.parent


class StudyFolder(TrainingFolder):
    """Paths and commands in OUT.

    Args:
        folder: OUT.
        speech: folder with the manifests unlabeled, pr, sid and er, alignments.tsv, and audio.
        teachers: which are used.
    """

    def __init__(self, folder: Path, speech: Path, teachers: tuple[str, ...] = SINGLES):
        super().__init__(folder, speech)
        self.speech, self.teachers = speech.resolve(), teachers

    @cached_property
    def files(self) -> dict[str, str]:
        """``teachers.NAME.model`` of each teacher."""
        zoo = self.folder / "zoo"
        third = {name: str(self.folder / f"zoo_{name}/tiny_hubert_3.pt") for name in THIRD}
        return {
            **third,
            "hubert": "tiny_hubert",
            "wavlm": "tiny_wavlm",
            "robust": "tiny_robust_hubert",
            "sibling": str(self.folder / "zoo_sibling/tiny_hubert.pt"),
            "phones": str(self.folder / "zoo_phones/tiny_phones.pt"),
            "speaker": str(zoo / "tiny_speaker.pt"),
            "prosody": str(zoo / "tiny_prosody.pt"),
            "resemblyzer": str(self.folder / "resemblyzer"),  # stored hidden states
        }

    @property
    def audio(self) -> Path:
        return self.folder / "audio"

    @property
    def noise(self) -> Path:
        """Recordings for the students' input."""
        return self.folder / "noise"

    @property
    def test_noise(self) -> Path:
        """Other recordings, of the same ten classes, for the tests."""
        return self.folder / "test_noise"

    def prepare(self) -> None:
        """Make the inputs, train the teachers that are missing, and cache the targets."""
        self.prepare_inputs()
        self.train_teachers()
        if "resemblyzer" in self.teachers:
            self.store_resemblyzer()
        if not (self.folder / "targets/index.json").exists():
            everything = {
                "teachers": {name: teacher_config(name, self.files) for name in self.teachers},
                "aggregation": "separate",
                "teacher_precision": "float32",
                "student": STUDENT,
            }
            self.set_up(everything)
        if set(PLAIN) <= set(self.teachers):
            self.fit_units()
        if START in self.teachers:
            self.write_start()

    def fit_units(self) -> None:
        """Fit the units of the plain teachers, each on the middle one of its target layers."""
        data = ["--data", "tables/train.csv", "--audio-root", str(self.audio)]
        for name in PLAIN:
            file = self.folder / units_file(name)
            if not file.exists():
                options = ["--teacher", name, "--layer", str(LAYERS[1]), *UNIT_OPTIONS]
                self.command("fit-units", "cache.yaml", *options, *data, "-o", file.name)

    def write_start(self) -> None:
        """Write the first weights of the students that begin as the first layers of a teacher."""
        path = self.folder / START_FILE
        if path.exists():
            return
        from s3prl_ekd import compat
        from s3prl_ekd.distill.initialisation import initialise
        from s3prl_ekd.distill.student import Student
        from s3prl_ekd.distill.student_settings import StudentSettings
        from s3prl_ekd.student_file import LoadedStudent, write_student
        from s3prl_ekd.teachers import load_upstream

        compat.apply()
        student = Student(StudentSettings(**START_STUDENT))
        initialise(
            student, [load_upstream(self.files[START], START).model], conv=True, encoder=True
        )
        write_student(LoadedStudent(student, None, {}, {}), path, keep_heads=False)

    def first_weights(self, row: Row, seed: int) -> Path:
        """File of the student of a row and seed before training."""
        return self.folder / START_FILE if row.start else self.untrained(STUDENT, seed)

    def prepare_inputs(self) -> None:
        """Synthesise the voices, link the audio, and write noises and manifests."""
        inputs = (*(f"{name}.tsv" for name in MANIFESTS), "alignments.tsv", "esc10")
        for name in (*inputs, *(["lexicon.txt"] if "phones" in self.teachers else [])):
            if not (self.speech / name).exists():
                raise SetupError(f"{self.speech} has no {name}; see the README of the corpus")
        self.make_voices("voices", VOICES)
        if "hubert_3_voices" in self.teachers:
            self.make_voices("more_voices", MORE_VOICES)
        self.audio.mkdir(exist_ok=True)
        links = {"speech": self.speech, "voices": self.folder / "voices/train-clean"}
        for name, target in links.items():
            if not (self.audio / name).is_symlink():
                (self.audio / name).symlink_to(target)
        for folder, folds in ((self.noise, "12"), (self.test_noise, "3")):
            folder.mkdir(exist_ok=True)
            for clip in sorted((self.speech / "esc10").glob(f"*/[{folds}]-*.flac")):
                if not (folder / clip.name).exists():
                    shutil.copyfile(clip, folder / clip.name)
        self._write_labels()

    def make_voices(self, name: str, settings: dict[str, str]) -> None:
        """Synthesise speech into OUT/``name``."""
        options = [part for key, value in settings.items() for part in (f"--{key}", value)]
        self.script("make_voices.py", name, *options)

    def sample_waves(self, count: int) -> Iterator[Any]:
        """Waveforms of some utterances of the phone probe, evenly spaced."""
        from s3prl_ekd.data.audio import read_audio
        from s3prl_ekd.probe.labels import read_labels

        utterances = read_labels(self.label_path("phones"))
        for i in range(0, len(utterances), max(1, len(utterances) // count)):
            yield read_audio(utterances[i].path)

    def _write_labels(self) -> None:
        segments = {row["path"]: row["segments"] for row in self.corpus.table("alignments")}
        aligned = [row for row in self.corpus.table("pr") if row["path"] in segments]
        tables = {
            "phones": [{**row, "segments": segments[row["path"]]} for row in aligned],
            "speaker": self.corpus.table("sid"),
            "emotion": self.corpus.table("er"),
        }
        columns = {
            "phones": ("speaker", "segments"),
            "speaker": ("speaker",),
            "emotion": ("speaker", "emotion"),
        }
        for name, rows in tables.items():
            lines = ["\t".join(["path", "split", *columns[name]])]
            for row in rows:
                cells = [f"speech/{row['path']}", row["split"], *(row[c] for c in columns[name])]
                lines.append("\t".join(cells))
            text = "\n".join(lines) + "\n"
            self.label_path(name).write_text(text, encoding="utf-8")

    def label_path(self, name: str) -> Path:
        """Manifest of ``phones``, ``speaker`` or ``emotion``, next to the links to the audio."""
        return self.audio / f"{name}.tsv"

    def train_teachers(self) -> None:
        """Train the teachers that the package lacks."""
        if "phones" in self.teachers and not Path(self.files["phones"]).exists():
            table = self.align_unprobed()
            options = [str(table.parent), "-o", "zoo_phones", "--manifest", str(table)]
            self.script("train_tiny_teachers.py", *options, "--teacher", "phones")
        inputs = [str(self.speech), str(self.folder / "voices/train-clean")]
        manifest = ["--manifest", str(self.speech / "unlabeled.tsv")]
        extra = {
            "prosody": ["-o", "zoo", "--teacher", "prosody"],
            "speaker": ["-o", "zoo", "--teacher", "speaker", "--noise", str(self.noise)],
            "sibling": ["-o", "zoo_sibling", "--teacher", "hubert", "--seed", str(SIBLING_SEED)],
        }
        long = ["--steps", "1500", "--batch-seconds", "16"]
        for name, options in zip(THIRD, (["--steps", "3000"], long, long), strict=True):
            extra[name] = ["-o", f"zoo_{name}", "--teacher", "hubert_3", *options]
        for name, options in extra.items():
            if name in self.teachers and not Path(self.files[name]).exists():
                voices = name == "hubert_3_voices"
                more = [str(self.folder / "more_voices/train-clean")] if voices else []
                self.script("train_tiny_teachers.py", *inputs, *more, *manifest, *options)

    def align_unprobed(self) -> Path:
        """Align the utterances that are not for the phone probe; return their manifest.

        They are the train and dev utterances of pr.tsv without a line in alignments.tsv. Their
        sentences are other ones, most of their speakers are not.
        """
        table = self.folder / "phone_labels/aligned.tsv"
        if not table.exists():
            probed = {row["path"] for row in self.corpus.table("alignments")}
            columns = ("path", "split", "speaker", "text")
            lines = ["\t".join(columns)] + [
                "\t".join(row[column] for column in columns)
                for row in self.corpus.table("pr")
                if row["path"] not in probed and row["split"] != "test"
            ]
            (self.folder / "unprobed.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
            lexicon = ["--lexicon", str(self.speech / "lexicon.txt")]
            roots = ["--audio-root", str(self.speech), "-o", "phone_labels"]
            self.command("prepare", "alignments", "unprobed.tsv", *roots, *lexicon)
        return table

    @property
    def wheel(self) -> Path:
        """The wheel of Resemblyzer."""
        return next((self.folder / "wheels").glob("*.whl"), self.folder / "wheels/none")

    def store_resemblyzer(self) -> None:
        """Download Resemblyzer's wheel, and store its hidden states of the training utterances."""
        if not self.wheel.exists():
            options = ["resemblyzer==0.1.4", "--no-deps", "-q", "-d", "wheels"]
            self.run_logged(["-m", "pip", "download", *options], "log")
        self.write_tables()
        self.write("cache_runner.yaml", runner_config(self.data(cached=False), 2, 1e-3))
        options = [str(self.wheel), "-c", "cache_runner.yaml", "-o", "resemblyzer"]
        self.script("resemblyzer_features.py", *options)

    def script(self, name: str, *argv: str) -> None:
        """Run a script of tools/ in OUT."""
        self.run_logged([str(TOOLS / name), *argv], "log")

    def write_tables(self) -> None:
        """Write the length tables: real and synthesised speech for training, real for dev."""
        from s3prl_ekd.data.audio_files import find_audio, read_headers
        from s3prl_ekd.data.lengths import write_table
        from s3prl_ekd.data.tables import Utterance

        rows: dict[str, list[str]] = {"train": [], "dev": []}
        for row in self.corpus.table("unlabeled"):
            rows[row["split"]].append(f"speech/{row['path']}")
        voices = find_audio(self.folder / "voices/train-clean")
        rows["train"] += [f"voices/{name}" for name in voices]
        (self.folder / "tables").mkdir(exist_ok=True)
        for split, names in rows.items():
            headers = read_headers(self.audio, names)
            lengths = [Utterance(n, h.samples) for n, h in zip(names, headers, strict=True)]  # type: ignore[union-attr]
            write_table(self.folder / f"tables/{split}.csv", lengths)

    def data(self, cached: bool = True) -> dict[str, Any]:
        data = super().data(cached)
        batch = {"train_batch_size": BATCH, "max_seconds": BATCH_SECONDS}
        return {**data, **batch, "libri_root": str(self.audio), "sequence_length": EXCERPT}

    def model(self, row: Row) -> dict[str, Any]:
        """The model config of a row."""
        return model_config(row, self.files, str(self.noise), str(self.folder))

    def teacher_digests(self, names: tuple[str, ...]) -> dict[str, str]:
        """The start of the SHA-256 of each teacher's file."""
        from s3prl_ekd.files.atomic import file_sha256
        from s3prl_ekd.teachers.zoo import NAMES, checkpoint_path

        digests = {}
        for name in names:
            model = self.files[name]
            path = checkpoint_path(model) if model in NAMES else Path(model)
            if name == "resemblyzer":
                path = self.wheel
            digests[name] = file_sha256(path)[:12]
        return digests
