"""SF: its layout against s3prl's encoder, wrong corpora, its metrics, and runs."""

from __future__ import annotations

import csv
import json
import random
import re
import shutil
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import s3prl
import torch
import yaml
from s3prl.downstream.ctc import metric as s3prl_metric
from s3prl.downstream.ctc.data import load_dataset
from s3prl.downstream.ctc.text import load_text_encoder

from s3prl_ekd.downstream.metrics.slots import count_slots
from s3prl_ekd.downstream.requirements import provide_ctc_corpus
from s3prl_ekd.downstream.snips import SnipsDataset
from s3prl_ekd.downstream.tasks import TASKS
from s3prl_ekd.downstream.tasks.corpus_check import check_corpus
from s3prl_ekd.errors import ConfigError, DataError
from s3prl_ekd.files.run_checkpoints import read_checkpoint
from s3prl_ekd.prepare.asr import LETTERS
from s3prl_ekd.prepare.sf import FOLDERS, SPEAKERS

from .conftest import REPO, command
from .corpora import tone, write_manifest, write_noise, write_snips
from .preparing import fails, prepare

SF = TASKS["sf"]
VOCABULARY = REPO / "downstream_recipes/ctc/vocab/character.txt"
PITCH = {"go": 300, "so": 600, "al": 1000, "bo di": 1500, "ra": 2200, "up": 3000}
TEXTS = {  # with tags
    "go al": "O B-artist",
    "go Bo Di up": "O B-artist I-artist O",
    "go so ra": "O O genre",
    "ra up": "B-genre O",
    "go up": "O O",
    "al ra": "artist genre",
}
SPLITS = {"train": 6, "dev": 2, "test": 2}  # utterances of each text


def write_slots(folder: Path) -> Path:
    """A manifest of sentences whose words have a pitch each."""
    rng, rows = np.random.default_rng(0), []
    for split, count in SPLITS.items():
        for n, (text, iob) in enumerate(TEXTS.items()):
            for i in range(count):
                words = re.findall("|".join(PITCH), text.lower())
                wave = np.concatenate([tone(rng, PITCH[w], 3200 + 200 * i) for w in words])
                rows.append((wave, (f"{split}-{n}-{i}.flac", split, text, iob)))
    return write_manifest(folder / "sf.tsv", ("split", "text", "iob"), rows)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A working folder with the corpus in data/sf; and s3prl has its corpus module, or ours."""
    folder = tmp_path_factory.mktemp("work")
    provide_ctc_corpus(folder)
    command("init", folder / "work", cwd=folder)
    assert prepare("sf", write_slots(folder / "corpus"), "-o", folder / "work/data/sf") == 0
    return folder / "work"


def recipe(work: Path, path: str = SF.tiny) -> dict:
    config = yaml.safe_load((work / path).read_text())
    config["downstream_expert"]["corpus"]["path"] = str(work / "data/sf")
    config["downstream_expert"]["text"]["slots_file"] = str(work / "data/sf/slots.txt")
    return config


def encoder(corpus: Path):
    return load_text_encoder("character-slot", str(VOCABULARY), str(corpus / "slots.txt"))


# --- layout


def test_s3prl_reads_the_texts_with_their_slots(work):
    text = encoder(work / "data/sf")
    assert text.vocab_size == 3 + 1 + len(LETTERS) + 4  # <pad> <eos> <unk>, space, two slots
    expected = {
        "go al": "GO B-artist AL E-artist",
        "go Bo Di up": "GO B-artist BO DI E-artist UP",
        "go so ra": "GO SO B-genre RA E-genre",
        "ra up": "B-genre RA E-genre UP",
        "go up": "GO UP",
        "al ra": "B-artist AL E-artist B-genre RA E-genre",
    }
    originals = {}
    for line in (work / "data/sf/prepared.tsv").read_text().splitlines()[1:]:
        name, path, split, samples = line.split("\t")
        originals[name] = (split, list(TEXTS)[int(path.split("-")[1])], int(samples))
    corpus = recipe(work)["downstream_expert"]["corpus"]
    for split, count in SPLITS.items():
        read = []
        for waves, labels, names in load_dataset(split, text, {**corpus, "bucketing": False}):
            for wave, label, name in zip(waves, labels, names, strict=True):
                own, source, samples = originals[name]
                assert (own, samples) == (split, len(wave))
                assert text.unk_idx not in label
                assert text.decode(label.tolist()) == expected[source]
                read.append(source)
        assert Counter(read) == dict.fromkeys(TEXTS, count)


def test_items_are_sorted_and_in_buckets(work, caplog, tmp_path):
    settings = recipe(work)["downstream_expert"]["corpus"]
    text = encoder(work / "data/sf")

    def dataset(bucket_size, **changes):
        return SnipsDataset(["train"], text, bucket_size, **{**settings, **changes})

    single = dataset(1)
    lengths = [len(tokens) for _, tokens in (single[i] for i in range(len(single)))]
    assert lengths == sorted(lengths, reverse=True) and len(single) == 36
    assert dataset(8)[30] == [single[i] for i in range(28, 36)]
    assert len(dataset(100)[5]) == 36
    with pytest.raises(DataError, match="Ann"):
        dataset(1, train_speakers=["Ann"])
    shutil.copytree(work / "data/sf", tmp_path / "sf")
    write_noise(tmp_path / "sf/train/other.wav", 1000)
    for _ in range(2):
        assert len(dataset(1, path=str(tmp_path / "sf"))) == 36
    assert [m for m in caplog.messages if "1 audio file" in m] == caplog.messages[-1:]


def test_same_as_the_corpus_module_of_a_checkout(work):
    path = Path(s3prl.__file__).parent / "downstream/ctc/corpus/snips.py"
    if not path.is_file():
        pytest.skip("s3prl from PyPI has no downstream/ctc/corpus; a checkout has")
    namespace: dict = {}
    exec(path.read_text(), namespace)
    settings, text = recipe(work)["downstream_expert"]["corpus"], encoder(work / "data/sf")
    for folder in FOLDERS.values():
        ours = SnipsDataset([folder], text, 1, **settings)
        theirs = namespace["SnipsDataset"]([folder], text, 1, **settings)
        assert dict(zip(map(str, ours.file_list), ours.text, strict=True)) == dict(
            zip(map(str, theirs.file_list), theirs.text, strict=True)
        )


def test_audio_snips_is_checked_and_linked(work, tmp_path, capsys):
    source, out = write_snips(tmp_path / "SNIPS"), tmp_path / "snips"
    write_noise(source / "test/Amy-snips-test-9.wav", 4000)
    assert prepare("snips", source, "-o", out) == 0
    printed = capsys.readouterr().out
    for line in ("train: 16 utterances", "dev: 8 utterances", "test: 8 utterances"):
        assert line in printed
    assert re.search("note: 1 audio file", printed) and re.search("note: 32 .*<unk>", printed)
    config = yaml.safe_load((REPO / "downstream_recipes/ctc/snips.yaml").read_text())
    corpus = {**config["downstream_expert"]["corpus"], "path": str(out), "num_workers": 0}
    text = encoder(out)
    for split in FOLDERS:
        (names,) = {
            tuple(
                sorted(
                    {
                        n.split("-")[0]
                        for _, _, b in load_dataset(split, text, dict(corpus))
                        for n in b
                    }
                )
            )
        }
        assert list(names) == sorted(SPEAKERS[split])


@pytest.mark.parametrize(
    "file, old, new, part",
    [
        ("slots.txt", "O\n", "", "line 1"),
        ("slots.txt", "genre", "city", "genre"),
        ("slots.txt", "genre", "gen:re", "line 3"),
        ("all.iob.snips.txt", "EOS\tO", "EOS O", "Ivy-snips-train-0"),
        ("all.iob.snips.txt", " O Music", " Music", "tags"),
        ("all.iob.snips.txt", "PLAY B&B", "!", "no words"),
        ("all.iob.snips.txt", "Brian", "Ann", "test/NAME.wav"),
    ],
)
def test_damaged_lists_of_audio_snips(file, old, new, part, tmp_path, capsys):
    source = write_snips(tmp_path / "SNIPS")
    (source / file).write_text((source / file).read_text().replace(old, new))
    for speaker in ("Emma", "Raveena", "Russell") if old == "Brian" else ():
        text = (source / file).read_text()
        (source / file).write_text(text.replace(speaker, new))
    message = fails(capsys, "snips", source, "-o", tmp_path / "out")
    assert part in message and not (tmp_path / "out").exists()


def test_a_folder_that_is_not_audio_snips(tmp_path, capsys):
    write_snips(tmp_path / "SNIPS")
    assert "all.iob.snips.txt" in fails(capsys, "snips", tmp_path, "-o", tmp_path / "out")


@pytest.mark.parametrize(
    "old, new, parts",
    [
        ("\tO B-artist\n", "\tO\n", ("2 words", "1 tags")),
        ("\tO O genre", "\tO O B-", ("B-",)),
        ("\tO O genre", "\tO O a:b", ("a:b",)),
        ("go so", "go 7", ("7",)),
        ("go so", "go, so", (",", "--strip-punctuation")),
        ("\tdev\t", "\ttest\t", ("dev",)),
        ("\tiob", "\ttags", ("iob",)),
    ],
)
def test_invalid_manifests(old, new, parts, tmp_path, capsys):
    manifest = write_slots(tmp_path / "corpus")
    manifest.write_text(manifest.read_text().replace(old, new))
    message = fails(capsys, "sf", manifest, "-o", tmp_path / "out")
    assert all(part in message for part in parts) and not (tmp_path / "out").exists()


def test_punctuation_and_hyphens(tmp_path):
    rows = [
        (
            np.zeros(4000),
            (f"{split}.flac", split, "Play “Rock-Pop” – it's Bob’s !", "O B-x O O B-y O"),
        )
        for split in SPLITS
    ]
    manifest = write_manifest(tmp_path / "sf.tsv", ("split", "text", "iob"), rows)
    out = tmp_path / "out"
    assert prepare("sf", manifest, "-o", out, "--strip-punctuation") == 0
    line = (out / "all.iob.snips.txt").read_text().splitlines()[0].partition(" ")[2]
    assert (
        encoder(out).decode(encoder(out).encode(line)) == "PLAY B-x ROCK POP E-x IT'S B-y BOB'S E-y"
    )


# --- the check before a run


@pytest.mark.parametrize(
    "key, value, part",
    [
        ("corpus.path", "data", "'data/sf'"),
        ("corpus.path", "data/none", "data/none"),
        ("text.slots_file", "data/sf/none.txt", "none.txt"),
        ("text.slots_file", "data/sf/prepared.tsv", "line 1"),
        ("text.mode", "character", "character-slot"),
        ("text.vocab_file", "colon.txt", "':'"),
        ("corpus.valid_speakers", None, "valid_speakers"),
        ("corpus.valid_speakers", ["Ann"], "valid/NAME.wav"),
        ("corpus.train_speakers", "train", "train_speakers"),
        ("corpus.dev", ["none"], "none_speakers"),
    ],
)
def test_a_wrong_recipe_is_a_sentence_before_training(key, value, part, work):
    config = yaml.safe_load((work / SF.tiny).read_text())
    check_corpus("ctc", config, "recipe.yaml", folder=work)
    (work / "colon.txt").write_text("A\n:\n")
    section, name = key.split(".")
    config["downstream_expert"][section][name] = value
    with pytest.raises(ConfigError, match=re.escape(part)) as raised:
        check_corpus("ctc", config, "recipe.yaml", folder=work)
    assert str(raised.value).startswith("recipe.yaml: ") and "\n" not in str(raised.value)


def test_a_test_set_without_slots_is_refused(work, tmp_path):
    """s3prl would divide by zero."""
    shutil.copytree(work / "data/sf", tmp_path / "sf")
    texts = tmp_path / "sf/all.iob.snips.txt"
    lines = texts.read_text().splitlines(keepends=True)
    texts.write_text(
        "".join(re.sub("artist|genre", "O", x) if x.startswith("test") else x for x in lines)
    )
    config = recipe(work)
    config["downstream_expert"]["corpus"]["path"] = str(tmp_path / "sf")
    check_corpus("ctc", config, "recipe.yaml", folder=work)  # trains and evaluates on dev
    with pytest.raises(ConfigError, match="no slots for .*/test"):
        check_corpus("ctc", config, "recipe.yaml", "test", folder=work)
    with pytest.raises(ZeroDivisionError):
        s3prl_metric.slot_value_cer([""], ["PLAY"])


def test_recipes(work):
    full, tiny = recipe(work, SF.full), recipe(work)
    for config in (full, tiny):
        assert config["runner"]["total_steps"] % config["runner"]["eval_step"] == 0
        assert config["downstream_expert"]["metric"][0] == "slot_type_f1"
        assert SF.is_task_of("ctc", config) and not TASKS["pr"].is_task_of("ctc", config)
    corpus = full["downstream_expert"]["corpus"]
    assert {split: corpus[f"{FOLDERS[split]}_speakers"] for split in FOLDERS} == SPEAKERS
    assert full["optimizer"]["lr"] == 1e-4 and full["runner"]["total_steps"] == 200_000
    assert VOCABULARY.read_text().split("\n") == [" ", *LETTERS, ""]


# --- metrics


def test_metrics_by_hand():
    pairs = [
        ("a", "PLAY B-artist ADELE E-artist", "PLAY B-artist ADELE E-artist NOW"),
        # one type of three missing, and one too many; 2 edits of KATE, 4 of JAZZ missing
        ("b", "B-artist KAT E-artist B-x Y E-x", "B-artist KATES E-artist B-genre JAZZ E-genre"),
        ("c", "PLAY", "PLAY NOW"),  # no slots in both
        ("d", "B-x A E-x", "NOW"),
    ]
    f1, cer = count_slots(pairs)
    assert f1.value == pytest.approx(100 * (1 + 1 / 2 + 1 + 0) / 4)
    assert cer.value == pytest.approx(100 * (0 + 2 + 4) / (5 + 5 + 4))
    assert cer.lengths.tolist() == [5, 9, 0, 0]
    weights = np.array([[0, 2, 0, 1.0], [1, 0, 0, 1]])  # b b d, and a d
    assert f1.values(weights) == pytest.approx([100 / 3, 50])
    assert cer.values(weights) == pytest.approx([100 * 12 / 18, 0])
    pairs[2] = ("c", "PLAY", "SING NOW")  # other labels: another test set
    for sample, other in zip((f1, cer), count_slots(pairs), strict=True):
        assert other.reference != sample.reference


def test_metrics_equal_s3prls_on_random_texts():
    """With marks that are nested, unfinished, or begin like others; and with long values."""
    rng, cers = random.Random(0), 0
    tokens = [
        "A",
        "BC",
        *(f"{m}-{s}" for m in "BE" for s in ("a", "ab", "x", "")),
        "<unk>",
        "O'" * 90,
    ]
    for _ in range(3000):
        texts = [
            [" ".join(rng.choices(["", *tokens], k=rng.randint(0, 12))).strip() for _ in range(n)]
            for n in [rng.randint(1, 4)] * 2
        ]
        f1, cer = count_slots([(str(i), h, r) for i, (h, r) in enumerate(zip(*texts, strict=True))])
        assert f1.value == pytest.approx(100 * s3prl_metric.slot_type_f1(*texts), abs=1e-9)
        if cer.lengths.sum():
            cers += 1
            assert cer.value == pytest.approx(100 * s3prl_metric.slot_value_cer(*texts), abs=1e-9)
    assert cers > 500


# --- runs


@pytest.fixture
def downstream(work, monkeypatch, capfd):
    """Run ``run_downstream.py ARGUMENTS`` in this process; return its output."""
    from s3prl_ekd.launch import run_downstream

    monkeypatch.chdir(work)

    def run(*argv: str) -> str:
        monkeypatch.setattr(sys, "argv", ["run_downstream.py", *argv, "--device", "cpu"])
        capfd.readouterr()
        assert run_downstream() == 0
        return capfd.readouterr().out

    return run


def train_argv(name: str, *options: str) -> list[str]:
    steps = {"total_steps": 12, "log_step": 6, "eval_step": 6, "save_step": 6, "max_keep": 9}
    override = ",,".join(f"config.runner.{key}={value}" for key, value in steps.items())
    argv = ["-m", "train", "-u", "fbank_no_cmvn", "-d", "ctc", "-c", SF.tiny, "-p", name]
    return [*argv, "-o", override, *options]


def test_an_interrupted_cached_run_resumes_exactly(downstream, work):
    """In the middle of an epoch; features from the cache are the upstream's, rounded."""
    downstream(*train_argv("full", "--cache-features", "features"))
    (work / "resumed").mkdir()
    shutil.copy(work / "full/states-6.ckpt", work / "resumed")
    argv = ("-m", "train", "-e", "resumed/states-6.ckpt", "-o", "args.expdir='resumed'")
    downstream(*argv, "--cache-features", "features")
    full, resumed = (
        read_checkpoint(work / name / "states-12.ckpt") for name in ("full", "resumed")
    )
    assert full["Step"] == resumed["Step"] == 12 and resumed["Epoch"] == 0
    for part in ("Featurizer", "Downstream"):
        for key, value in full[part].items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(resumed[part][key], value), key
    test = ("-m", "evaluate", "-t", "test", "-e", "full/states-12.ckpt")
    losses = [
        float(re.findall(r"^test loss: (\S+)$", downstream(*test, *options), re.MULTILINE)[0])
        for options in ((), ("--cache-features", "features"))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.fixture(scope="module")
def superb(work) -> Path:
    """The folder of a finished run of `superb`, tested also under noise."""
    for i in range(2):
        write_noise(work / f"noise/{i}.wav", 9000 + i)
    argv = ["superb", "fbank_no_cmvn", "--tasks", "sf", "--recipes", "tiny", "-o", "out"]
    command(*argv, "--steps", "200", "--noise", "noise", "--snr", "0", cwd=work)
    (folder,) = (work / "out/fbank_no_cmvn/sf").iterdir()
    assert json.loads((folder / "superb.json").read_text())["finished"]
    return folder


def test_the_report_has_s3prls_values(work, superb):
    command("report", "out", cwd=work)
    rows = list(csv.DictReader((work / "out/report/report.csv").open()))
    values = {(row["metric"], row["condition"]): float(row["value"]) for row in rows}
    log = (superb / "log.txt").read_text()
    for metric, name in (("f1", "slot_type_f1"), ("cer", "slot_value_cer")):
        printed = re.findall(rf"^test {name}: (\S+)$", log, re.MULTILINE)
        own = [values[metric, condition] for condition in ("clean", "noise_snr0")]
        assert own == pytest.approx([100 * float(value) for value in printed], abs=1e-3)
    assert values["f1", "clean"] > 20  # 16.7: no slots at all, which is right in a sixth


def test_the_archive(work, superb):
    command("predict-zip", "out", "-o", "p.zip", "--partial", cwd=work)
    with zipfile.ZipFile(work / "p.zip") as archive:
        (name,) = [name for name in archive.namelist() if not name.endswith("/")]
        assert name == "predict/sf_public/predict.ark"
        assert archive.read(name) == (superb / "test-hyp.ark").read_bytes()
