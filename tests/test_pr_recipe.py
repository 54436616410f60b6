"""Phone recognition: vocabulary, lexicon, preparation, and both commands over a tiny corpus."""

import errno
import re
from pathlib import Path

import editdistance
import pytest
import s3prl
import yaml

from s3prl_ekd.errors import DataError
from s3prl_ekd.files.run_checkpoints import read_checkpoint
from s3prl_ekd.prepare.lexicon import PHONES, read_lexicon, write_lexicon

from .conftest import REPO, command, recipe
from .phone_corpus import (
    RECIPE,
    TOKENIZER,
    VOCABULARY,
    dataset,
    make_layout,
    make_manifest,
    prepare_argv,
)
from .preparing import check_message, fails, prepare

SPEECH = REPO.parent / "shared" / "speech"
HOST = Path(s3prl.__file__).parent / "downstream" / "ctc"


@pytest.fixture
def manifest(tmp_path):
    return make_manifest(tmp_path)


@pytest.fixture
def layout(manifest):
    return make_layout(manifest)


def prepare_fails(capsys, manifest, out, *options):
    error = fails(capsys, *prepare_argv(manifest, out, *options))
    assert not out.exists()
    return error


# --- vocabulary and configurations


def test_the_vocabulary_has_two_silences_and_all_phones():
    assert VOCABULARY.read_text(encoding="utf-8").split() == ["SIL", "SPN", *sorted(PHONES)]
    assert len(PHONES) == 24 + 3 * 15
    assert len({phone.rstrip("012") for phone in PHONES}) == 39


def test_s3prl_encodes_and_decodes_every_phone():
    assert TOKENIZER.vocab_size == 74
    indices = TOKENIZER.encode(" ".join(sorted(PHONES)))
    assert TOKENIZER.unk_idx not in indices and len(set(indices)) == len(PHONES) + 1
    assert indices[-1] == TOKENIZER.eos_idx and min(indices[:-1]) == 5  # after SIL and SPN
    assert TOKENIZER.decode(indices).split() == sorted(PHONES)


@pytest.mark.parametrize("name", ["libriphone.yaml", "tiny.yaml"])
def test_total_steps_is_a_multiple_of_the_other_steps(name):
    config = recipe(f"ctc/{name}")
    for key in ("log_step", "eval_step", "save_step"):
        assert config["runner"]["total_steps"] % config["runner"][key] == 0, key
    splits = config["downstream_expert"]["corpus"].keys()
    assert {*config["runner"]["eval_dataloaders"], "train", "dev", "test"} <= splits
    assert (RECIPE / name).read_text(encoding="utf-8").startswith("# PR")


def test_the_full_recipe_has_superbs_numbers():
    config = recipe("ctc/libriphone.yaml")
    assert config["runner"]["total_steps"] == 100_000
    assert config["runner"]["gradient_accumulate_steps"] == 2
    assert config["optimizer"] == {"name": "TorchOptim", "torch_optim_name": "Adam", "lr": 1e-2}
    assert config["downstream_expert"]["corpus"]["batch_size"] == 16
    assert config["downstream_expert"]["model"]["select"] == "FrameLevel"
    assert config["downstream_expert"]["model"]["project_dim"] == 256


def test_vocabulary_and_full_recipe_equal_those_of_a_checkout():
    if not (HOST / "libriphone.yaml").is_file():
        pytest.skip("s3prl from PyPI has no downstream/ctc/libriphone.yaml; a checkout has")
    assert (HOST / "vocab/phoneme.txt").read_text().split() == VOCABULARY.read_text().split()
    expected = yaml.safe_load((HOST / "libriphone.yaml").read_text())
    recipe_config = recipe("ctc/libriphone.yaml")
    for config in (recipe_config, expected):
        for key in ("path", "lexicon", "num_workers", "skip_unknown_words"):
            config["downstream_expert"]["corpus"].pop(key, None)
    assert recipe_config == expected


# --- lexicon


def test_read_lexicon_returns_first_pronunciations(manifest, tmp_path):
    words = {"A", "CAT", "DOG", "EMU"}
    first = read_lexicon([tmp_path / "cmudict.txt"], words)
    assert first == {"A": ("AH0",), "CAT": ("K", "AE1", "T"), "DOG": ("D", "AO1", "G")}
    write_lexicon(tmp_path / "short.txt", first)
    assert (tmp_path / "short.txt").read_text() == "A\tAH0\nCAT\tK AE1 T\nDOG\tD AO1 G\n"
    (tmp_path / "more.txt").write_bytes(b"A  EY1\nEMU  IY1 M Y UW0\nD\xc9J\xc0  D EY1\n")
    both = read_lexicon([tmp_path / "short.txt", tmp_path / "more.txt"], words | {"DÉJÀ"})
    assert both == {**first, "EMU": ("IY1", "M", "Y", "UW0"), "DÉJÀ": ("D", "EY1")}


@pytest.mark.parametrize("line, part", [("CAT", "CAT"), ("CAT K AE T", "'AE'")])
def test_errors_of_a_lexicon_name_the_line(tmp_path, line, part):
    (tmp_path / "l.txt").write_text(line + "\n")
    assert read_lexicon([tmp_path / "l.txt"], {"DOG"}) == {}
    with pytest.raises(DataError) as raised:
        read_lexicon([tmp_path / "l.txt"], {"CAT"})
    check_message(str(raised.value), str(tmp_path / "l.txt"), 1, part)
    with pytest.raises(DataError, match="none.txt"):
        read_lexicon([tmp_path / "none.txt"], {"CAT"})


# --- prepare pr


def test_prepare_writes_layout_and_lexicon(layout):
    assert (layout / "lexicon.txt").read_text() == (
        "A\tAH0\nCAT\tK AE1 T\nCAT'S\tK AE1 T S\nDOG\tD AO1 G\nITS\tIH1 T S\n"
    )
    assert (layout / "dev-clean/ann/2/ann-2.trans.txt").read_text() == (
        "ann-2-0000 A CAT\nann-2-0001 A DOG\nann-2-0002 A CAT'S DOG\nann-2-0003 ITS A CAT\n"
    )
    assert (layout / "train-clean/ann/1/ann-1-0005.flac").is_file()


def test_prepare_lists_words_without_a_pronunciation(manifest, tmp_path, capsys):
    manifest.write_text(manifest.read_text().replace("A CAT'S DOG", "2 CATS DOG"))
    error = prepare_fails(capsys, manifest, tmp_path / "out")
    check_message(error, 2, "2, CATS", "--drop-bad", str(tmp_path / "cmudict.txt"))
    assert prepare(*prepare_argv(manifest, tmp_path / "out", "--drop-bad")) == 0
    printed = capsys.readouterr().out
    assert re.search("^2 lines", printed, re.MULTILINE)
    assert re.search("^2 words.* 2, CATS", printed, re.MULTILINE)
    assert "CAT'S" not in (tmp_path / "out/lexicon.txt").read_text()


def test_prepare_rejects_phones_that_the_vocabulary_lacks(manifest, tmp_path, capsys):
    manifest.write_text(manifest.read_text().replace("DOG DOG", "ODD DOG"))
    check_message(prepare_fails(capsys, manifest, tmp_path / "out"), "cmudict.txt", 9, "'XX'")


# --- the commands


def test_train_and_evaluate(layout, tmp_path):
    command("init", ".", cwd=tmp_path)
    overrides = {
        "runner.total_steps": 4,
        "runner.log_step": 2,
        "runner.eval_step": 4,
        "runner.save_step": 4,
        "downstream_expert.corpus.path": str(layout),
        "downstream_expert.corpus.lexicon": [str(layout / "lexicon.txt")],
    }
    override = ",,".join(f"config.{key}={value!r}" for key, value in overrides.items())
    recipe = ("-u", "fbank", "-d", "ctc", "-c", "downstream/ctc/tiny.yaml")
    argv = ("run_downstream.py", "-m", "train", *recipe, "-n", "pr", "-o", override)
    process = command(*argv, cwd=tmp_path)
    assert len(re.findall(r"train per: \d", process.stdout)) == 2
    folder = tmp_path / "result/downstream/pr"
    assert printed_per(process.stdout, "dev") == pytest.approx(per(folder, "dev"))
    best = str(folder / "dev-best.ckpt")
    process = command("run_downstream.py", "-m", "evaluate", "-t", "test", "-e", best, cwd=tmp_path)
    assert printed_per(process.stdout, "test") == pytest.approx(per(folder, "test"))
    # s3prl removes it, and would start 12 workers in later epochs and evaluations
    assert read_checkpoint(best)["Config"]["downstream_expert"]["corpus"]["num_workers"] == 0
    refs = (folder / "test-ref.ark").read_text().splitlines()
    assert sorted(refs)[0] == "ann-3-0000 D AO1 G D AO1 G" and len(refs) == 4


def printed_per(log, split):
    (value,) = re.findall(rf"^{split} per: ([\d.e-]+)$", log, re.MULTILINE)
    return float(value)


def per(folder, split):
    """Compute the phone error rate from the prediction files of a run."""
    hyp, ref = (
        dict(line.split(" ", 1) for line in (folder / f"{split}-{kind}.ark").open())
        for kind in ("hyp", "ref")
    )
    errors = sum(editdistance.eval(hyp[name].split(), ref[name].split()) for name in ref)
    return errors / sum(len(text.split()) for text in ref.values())


@pytest.mark.skipif(not SPEECH.is_dir(), reason="the speech corpus beside the repository is absent")
def test_real_speech(tmp_path):
    out = tmp_path / "out"
    argv = ("pr", SPEECH / "pr.tsv", "-o", out, "--lexicon", SPEECH / "lexicon.txt")
    assert prepare(*argv) == 0
    lines = (SPEECH / "pr.tsv").read_text(encoding="utf-8").splitlines()
    header = lines[0].split("\t")
    rows = [dict(zip(header, line.split("\t"), strict=True)) for line in lines[1:]]
    data = dataset(out, split="test-clean")
    phones = sorted(TOKENIZER.decode(text) for text in data.text)
    assert phones == sorted(row["phones"] for row in rows if row["split"] == "test")


def test_the_folder_appears_with_its_lexicon(tmp_path, monkeypatch, capsys):
    def full_disk(path, pronunciations):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("s3prl_ekd.prepare.pr.write_lexicon", full_disk)
    assert "No space left" in prepare_fails(capsys, make_manifest(tmp_path), tmp_path / "out")
