"""Fuzzing: any input gives a valid object or our own one-line error, never another exception.

100 fixed examples for each test. ``make fuzz`` sets FUZZ_EXAMPLES for more, random ones; a failure
prints the lines that reproduce it.
"""

from __future__ import annotations

import datetime
import functools
import io
import json
import os
import tempfile
import zipfile

import numpy as np
import pytest
import soundfile
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

from s3prl_ekd.data.audio import read_audio
from s3prl_ekd.data.audio_files import read_header
from s3prl_ekd.data.manifest import read_manifest
from s3prl_ekd.data.tables import read_table
from s3prl_ekd.distill.aggregation import TargetSpec
from s3prl_ekd.distill.conv_layers import conv_layers_text, parse_conv_layers
from s3prl_ekd.distill.heads import PredictionHeads
from s3prl_ekd.distill.student import Student
from s3prl_ekd.distill.student_settings import StudentSettings
from s3prl_ekd.errors import EkdError
from s3prl_ekd.files.config import apply_overrides, to_plain_data
from s3prl_ekd.pretrain.settings import load_model_config, load_runner_config
from s3prl_ekd.student_file import LoadedStudent, contents, load_student

from .conftest import safetensors_student

_home = tempfile.TemporaryDirectory()  # keeps hypothesis's files out of the repository
set_hypothesis_home_dir(_home.name)
NIGHTLY = "FUZZ_EXAMPLES" in os.environ
fuzz = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "100")),
    derandomize=not NIGHTLY,
    database=None,
    deadline=None,
    print_blob=NIGHTLY,
    suppress_health_check=list(HealthCheck),
)

MODEL = {
    "teachers": {
        "hubert": {"model": "hubert_base", "layers": [4, 8], "weight": 1.0},
        "wavlm": {"model": "w.pt", "groups": [[1, 2], [3]], "final_weight": 0.5},
    },
    "aggregation": "separate",
    "targets": {"weight_steps": 10},
    "student": {
        "extractor_conv_feature_layers": "[(8,10,5)] + [(8,3,2)] * 2",
        "encoder_layers": 2,
        "encoder_embed_dim": 48,
    },
    "init": {"teacher": "hubert", "layers": [0, 6]},
    "loss": {},
    "distortion": {"setup": "clean"},
}
RUNNER = {
    "runner": {
        "n_epochs": -1,
        "total_steps": 6,
        "gradient_clipping": 5.0,
        "gradient_accumulate_steps": 1,
        "log_step": 2,
        "save_step": 3,
        "max_keep": 5,
    },
    "optimizer": {"name": "AdamW_with_schedule", "lr": 1e-3, "betas": [0.9, 0.98]},
    "pretrain_expert": {
        "datarc": {
            "libri_root": "audio",
            "file_path": "tables",
            "sets": ["train"],
            "train_batch_size": 3,
        }
    },
    "scheduler": {"name": "linear_schedule_with_warmup", "num_warmup_steps": 10},
}
HOSTILE = st.sampled_from(
    ["__import__('os').abort()", "\x00", "a\nerror: b", "\ud800", "../../x", "/dev/zero", "~", ""]
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**31, 2**63, 10**4, 10**9, 10**4000, -1, 0])
    | st.floats()
    | st.text(max_size=12)
    | HOSTILE
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=6) | st.integers() | st.booleans(), inner, max_size=3)
    ),
    max_leaves=6,
)


def paths(data, prefix=()):
    """The path (a tuple of keys and indices) of each value in ``data``."""
    yield prefix
    if isinstance(data, dict):
        items = data.items()
    elif isinstance(data, (list, tuple)):
        items = enumerate(data)
    else:
        return
    for key, value in items:
        yield from paths(value, (*prefix, key))


def changed(data, path, change, key, value):
    """A copy of ``data`` with a value replaced, inserted or deleted at ``path``."""
    if path:
        items = dict(data) if isinstance(data, dict) else list(data)
        index, *rest = path
        if change == "delete" and not rest:
            del items[index]
        else:
            items[index] = changed(items[index], rest, change, key, value)
        return items
    if change == "insert" and isinstance(data, dict):
        return {**data, key: value}
    if change == "insert" and isinstance(data, list):
        return [*data, value]
    return value


@st.composite
def mutations(draw, start, values=VALUES):
    """``start`` with one to three values changed."""
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(paths(start))))
        change = draw(st.sampled_from(["replace", "delete", "insert"]))
        key = draw(st.sampled_from([1, None, "extends", "model", "x"]) | st.text(max_size=5))
        start = changed(start, path, change, key, draw(values))
        if not isinstance(start, dict):
            break
    return start


def corrupted(start: bytes):
    """``start`` with some bytes changed, truncated or repeated."""
    edits = st.lists(
        st.tuples(st.integers(0, len(start) - 1), st.integers(0, 255)), min_size=1, max_size=6
    )

    def apply(change):
        pairs, cut, repeated = change
        data = bytearray(start)
        for position, byte in pairs:
            data[position] = byte
        data = data[: len(data) - cut]
        return bytes(data[:repeated] + data)

    size = st.just(0) | st.integers(0, len(start))
    return st.tuples(edits, size, size).map(apply)


def read_or_error(read, *arguments):
    """The result of ``read``, or None if it raises a one-line EkdError."""
    try:
        return read(*arguments)
    except EkdError as error:
        message = str(error)
        assert message and "\n" not in message and len(message) < 5000
        message.encode("utf-8", "surrogateescape")
        return None


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "file"


LOADERS = {"model": (load_model_config, MODEL), "runner": (load_runner_config, RUNNER)}


@pytest.mark.parametrize("kind", LOADERS)
@given(data=st.data())
@fuzz
def test_config_of_any_text(kind, file, data):
    load, valid = LOADERS[kind]
    text = yaml.safe_dump(valid).encode()
    pieces = st.sampled_from(["a: ", "- ", "&a ", "*a", "<<: ", "!!int ", "!!python/name:os ", "?"])
    yaml_like = st.lists(pieces | st.text(max_size=4) | HOSTILE, max_size=12).map("".join)
    yaml_like = yaml_like.map(lambda string: string.encode("utf-8", "surrogatepass"))
    file.write_bytes(data.draw(st.binary(max_size=60) | yaml_like | corrupted(text)))
    read_or_error(load, file)


@pytest.mark.parametrize("kind", LOADERS)
@given(data=st.data())
@fuzz
def test_config_of_any_values(kind, file, data):
    load, valid = LOADERS[kind]
    extra = SCALARS | st.dates() | st.datetimes() | st.binary(max_size=4) | VALUES
    mutated = data.draw(mutations(valid, extra))
    file.write_text(yaml.safe_dump(mutated), encoding="utf-8")
    loaded = read_or_error(load, file)
    if loaded is not None:  # written and read again, it is equal
        file.write_text(yaml.safe_dump(to_plain_data(loaded)), encoding="utf-8")
        assert load(file) == loaded


@given(data=st.data())
@fuzz
def test_config_of_any_values_in_a_checkpoint(data):
    more = VALUES | st.dates() | st.binary(max_size=3)
    read_or_error(load_model_config, data.draw(mutations(MODEL, more) | more))


CELLS = st.sampled_from(["a.flac", "16000", "", "1e400", "nan", '"', "../x.flac", "１２"])
LINES = st.lists(
    st.lists(CELLS | st.text(max_size=6) | HOSTILE, max_size=4), min_size=0, max_size=5
)


def table(header, lines, separator):
    text = "\n".join(separator.join(cells) for cells in [header, *lines])
    return text.encode("utf-8", "surrogatepass")


@given(
    data=st.binary(max_size=80)
    | LINES.map(lambda lines: table(["file_path", "length"], lines, ","))
    | corrupted(b",file_path,length,label\n0,a/b.flac,16000,\n1,c.flac,32000.0,X\n")
)
@fuzz
def test_corpus_table(file, data):
    file.write_bytes(data)
    rows = read_or_error(read_table, file)
    assert rows is None or all(row.path and row.length > 0 for row in rows)


@given(
    data=st.binary(max_size=80)
    | LINES.map(lambda lines: table(["path", "split"], lines, "\t"))
    | corrupted(b"path\tsplit\ttext\na.flac\ttrain\tA B\nb/c.wav\ttest\tC\n")
)
@fuzz
def test_manifest(file, data):
    file.write_bytes(data)
    manifest = read_or_error(read_manifest, file)
    for entry in manifest.entries if manifest else ():
        assert not entry.path.startswith("/") and ".." not in entry.path.split("/")


SCP = b"a /x/a.wav\nb ../b c.flac\nc cat c.wav |\n"
SEGMENTS = b"u a 0 1.5\nv b 0.25 3\n"


@given(scp=corrupted(SCP[:25]) | corrupted(SCP), segments=corrupted(SEGMENTS) | st.none())
@fuzz
def test_kaldi_folder(file, scp, segments):
    folder = file.parent / "kaldi"
    folder.mkdir(exist_ok=True)
    (folder / "wav.scp").write_bytes(scp)
    (folder / "segments").unlink(missing_ok=True)
    if segments is not None:
        (folder / "segments").write_bytes(segments)
    manifest = read_or_error(functools.partial(read_manifest, columns=("path",)), folder)
    for entry in manifest.entries if manifest else ():
        assert not entry.path.startswith("/") and ".." not in entry.path.split("/")
        assert entry.offset is None or (entry.offset >= 0 and entry.length > 0)


@functools.cache
def audio(form, subtype):
    buffer = io.BytesIO()
    wave = 0.1 * np.random.default_rng(0).standard_normal(1000)
    soundfile.write(buffer, wave, 16000, format=form, subtype=subtype)
    return buffer.getvalue()


AUDIO = [("WAV", "PCM_16"), ("WAVEX", "FLOAT"), ("RF64", "PCM_16"), ("W64", "PCM_16")]
AUDIO += [("AIFF", "PCM_16"), ("AU", "PCM_16"), ("NIST", "PCM_16"), ("FLAC", "PCM_16")]
AUDIO += [("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")]


@given(data=st.sampled_from(AUDIO).flatmap(lambda kind: corrupted(audio(*kind))))
@fuzz
def test_audio_file(file, data):
    file.write_bytes(data)
    header = read_or_error(read_header, file)
    wave = read_or_error(read_audio, file)
    if header is None:  # a file that is left out of the length tables is not read either
        assert wave is None
    elif wave is not None:
        assert abs(header.samples - len(wave)) <= 1 and float(wave.abs().max()) <= 20


GRAMMAR = st.sampled_from(list("[](),+*-0123456789 ") + ["(8,10,5)", "[(8,3,2)]", " * 4", "]+["])


@given(text=st.lists(GRAMMAR, max_size=14).map("".join) | st.text(max_size=40) | VALUES)
@fuzz
def test_conv_layers(text):
    layers = read_or_error(parse_conv_layers, text)
    if layers is not None:
        # Independent oracle: the text is Python.
        assert eval(text, {"__builtins__": {}}) == list(layers)  # noqa: S307
        assert parse_conv_layers(conv_layers_text(layers)) == layers


PARTS = st.sampled_from(
    [
        "config",
        "args",
        ".",
        "=",
        ",,",
        "runner",
        "total_steps",
        "7",
        "'x'",
        "[1, 2]",
        "{[]: 1}",
        "(",
    ]
)


@given(text=st.lists(PARTS | st.text(max_size=4) | HOSTILE, max_size=14).map("".join))
@fuzz
def test_overrides(text):
    before = yaml.safe_dump(RUNNER)
    changed_config = read_or_error(apply_overrides, RUNNER, text)
    assert yaml.safe_dump(RUNNER) == before
    assert changed_config is None or isinstance(changed_config, dict)


# The student file

TARGETS = {"a": TargetSpec(1, (4,))}
TINY = StudentSettings(
    extractor_conv_feature_layers="[(4,4,4)]",
    conv_pos=2,
    conv_pos_groups=1,
    encoder_layers=1,
    encoder_embed_dim=4,
    encoder_ffn_embed_dim=4,
    encoder_attention_heads=1,
)


def tiny_student():
    torch.manual_seed(0)
    student = Student(TINY)
    return contents(student, PredictionHeads(4, TARGETS), TARGETS, {"step": 7, "made_by": "me"})


def saved(data, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(data, buffer, **options)
    return buffer.getvalue()


def zipped(pickle: bytes, archive: bytes) -> bytes:
    """``archive`` with its pickle replaced and valid checksums."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as source, zipfile.ZipFile(buffer, "w") as target:
        for member in source.infolist():
            is_pickle = member.filename.endswith("data.pkl")
            target.writestr(member.filename, pickle if is_pickle else source.read(member))
    return buffer.getvalue()


STUDENT = tiny_student()
ARCHIVE = saved(STUDENT)
LEGACY = saved(STUDENT, _use_new_zipfile_serialization=False)
with zipfile.ZipFile(io.BytesIO(ARCHIVE)) as _archive:
    _name = next(name for name in _archive.namelist() if name.endswith("data.pkl"))
    PICKLE = _archive.read(_name)


def check_student(file, data: bytes) -> None:
    """A student that loads can be run."""
    file.write_bytes(data)
    loaded = read_or_error(load_student, file)
    if loaded is not None:
        assert isinstance(loaded, LoadedStudent)
        with torch.no_grad():
            loaded.student(torch.zeros(1, 4000), torch.tensor([4000]))


@given(data=st.binary(max_size=60) | corrupted(ARCHIVE) | corrupted(LEGACY))
@fuzz
def test_student_file_of_any_bytes(file, data):
    check_student(file, data)


SAFE = safetensors_student(STUDENT)
_length = int.from_bytes(SAFE[:8], "little")
HEADER, BODY = SAFE[8 : 8 + _length], SAFE[8 + _length :]


@given(data=corrupted(SAFE))
@fuzz
def test_safetensors_student_file_of_any_bytes(file, data):
    check_student(file.with_name("file.safetensors"), data)


@given(
    data=corrupted(HEADER)
    | mutations(json.loads(HEADER)).map(lambda header: json.dumps(header).encode())
)
@fuzz
def test_safetensors_student_file_of_any_header(file, data):
    whole = len(data).to_bytes(8, "little") + data + BODY
    check_student(file.with_name("file.safetensors"), whole)


@given(data=mutations({key: STUDENT[key] for key in ("settings", "targets", "head_kind", "about")}))
@fuzz
def test_safetensors_student_file_of_any_contents(file, data):
    header = json.loads(HEADER)
    header["__metadata__"]["contents"] = json.dumps(data)
    text = json.dumps(header).encode()
    whole = len(text).to_bytes(8, "little") + text + BODY
    check_student(file.with_name("file.safetensors"), whole)


@given(data=corrupted(PICKLE))
@fuzz
def test_student_file_of_any_pickle(file, data):
    check_student(file, zipped(data, ARCHIVE))


TENSORS = st.sampled_from(
    [
        torch.zeros(0),
        torch.zeros(4, 4),
        torch.full((4,), float("nan")),
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(2, 2, dtype=torch.complex64),
        torch.zeros(1).expand(10**6),
        torch.zeros(2, 2).to_sparse(),
        torch.empty(3, device="meta"),
    ]
)
DAMAGED = st.sampled_from([datetime.date(2026, 1, 1), b"x", {1, 2}, 1j, (1, 2)]) | TENSORS | VALUES


@given(data=mutations(STUDENT, DAMAGED))
@fuzz
def test_student_file_of_any_values(file, data):
    check_student(file, saved(data))
