"""The plan of `s3prl-ekd superb`, and its errors."""

import argparse
import json
import pickle
import re
import shlex
import shutil

import pytest
import soundfile
import torch
from s3prl.utility.helper import override

from s3prl_ekd import cli
from s3prl_ekd.commands import superb as superb_command
from s3prl_ekd.downstream.tasks import choose_tasks
from s3prl_ekd.errors import ConfigError, DataError, SetupError
from s3prl_ekd.request import DownstreamRequest
from s3prl_ekd.superb import plan as superb_plan
from s3prl_ekd.superb import run as superb
from s3prl_ekd.superb.cost import check_outputs
from s3prl_ekd.superb.plan import (
    PlannedRun,
    Upstream,
    noise_conditions,
    noise_digest,
    parse_upstream,
    steps_overrides,
)

from .conftest import error_of, make_sound
from .superb_workspace import plan_runs


def write_record(run, folder=None, **changes):
    """Write the record of a finished run."""
    folder = folder or run.folder
    folder.mkdir(parents=True, exist_ok=True)
    record = vars(run.new_record()) | {"finished": True, "tested": {"clean": "."}}
    record["dev"] = {"metric": run.task.dev.name, "value": 1.0, "checkpoint": "dev-best.ckpt"}
    (folder / superb.RECORD).write_text(json.dumps(record | changes))


def test_parse_upstream(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "student.pt").touch()
    assert parse_upstream("fbank") == Upstream("fbank", "fbank")
    assert parse_upstream("student.pt") == Upstream("student", "ekd_student", "student.pt")
    assert parse_upstream("a=student.pt") == Upstream("a", "ekd_student", "student.pt")
    hubert = parse_upstream("teacher=hubert_local:student.pt")
    assert hubert == Upstream("teacher", "hubert_local", "student.pt")
    named = parse_upstream("a=ekd_student:student.pt", "hidden_states_and_heads")
    assert named == Upstream("a", "ekd_student", "student.pt", "hidden_states_and_heads")
    assert parse_upstream("x=hubert_local:student.pt", "hidden_states_and_heads").selection == (
        "hidden_states"
    )
    heads = parse_upstream("student.pt", "hidden_states_and_heads")
    assert heads.selection == "hidden_states_and_heads"
    wrong = ("nothing.pt", "a=hubert_local:nothing.pt", "../x=student.pt", ".x=student.pt")
    for text in (*wrong, "fbnk", "ekd_student"):
        with pytest.raises(SetupError, match=re.escape(text)):
            parse_upstream(text)


@pytest.mark.parametrize("path", ["runs/lr=1e-4/student.pt", "epoch=3.ckpt", "a=b=c d.pt"])
def test_paths_with_equals_signs(tmp_path, monkeypatch, path):
    """An existing file is a path without a name, also if it contains =."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).touch()
    name = parse_upstream(path).name
    assert "=" not in name and parse_upstream(path) == Upstream(name, "ekd_student", path)
    assert parse_upstream(f"name={path}") == Upstream("name", "ekd_student", path)
    assert parse_upstream(f"hubert_local:{path}").checkpoint == path
    teacher = parse_upstream(f"teacher=hubert_local:{path}")
    assert teacher == Upstream("teacher", "hubert_local", path)
    with pytest.raises(SetupError, match="epoch=4.ckpt"):
        parse_upstream("epoch=4.ckpt")


def test_commands_with_equals_signs(in_superb_workspace, student_file, tmp_path, capsys):
    """`run_downstream.py` parses the printed commands correctly."""
    folder = tmp_path / "lr=1e-4 x"
    folder.mkdir()
    shutil.copy(student_file, folder / "student.pt")
    recipe = folder / "tiny.yaml"
    recipe.write_text((in_superb_workspace / "downstream/voxceleb1/tiny.yaml").read_text())
    options = [str(folder / "student.pt"), "--tasks", "sid", "--recipe", str(recipe), "--dry-run"]
    options += ["--override", "config.a='b=c'", "-o", str(folder / "out")]
    assert cli.main(["superb", *options]) == 0
    train = shlex.split(capsys.readouterr().out.splitlines()[0])
    assert train[train.index("-k") + 1] == str(folder / "student.pt")
    assert train[train.index("-c") + 1] == str(recipe)
    assert train[train.index("-p") + 1].startswith(str(folder / "out"))
    argv = DownstreamRequest.parse(train[1:]).argv()
    config = {}
    override(argv[argv.index("-o") + 1], None, config)
    assert config["a"] == "b=c" and config["optimizer"]["lr"]


def test_identity_depends_on_the_contents_of_a_checkpoint(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"one")
    (tmp_path / "b.pt").write_bytes(b"one")
    (tmp_path / "c.pt").write_bytes(b"two")
    a, b, c = (Upstream(n, "ekd_student", str(tmp_path / f"{n}.pt")).identity for n in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    "steps, total, interval", [(400, 400, 100), (10, 10, 2), (3, 3, 1), (7, 7, 1)]
)
def test_the_last_step_is_evaluated(steps, total, interval):
    assert f"config.runner.total_steps={total}," in steps_overrides(steps)
    assert f"config.runner.eval_step={interval}" in steps_overrides(steps)
    assert total % interval == 0


def test_tasks_have_the_order_of_superb():
    assert [task.name for task in choose_tasks(["asr", "pr"])] == ["pr", "asr"]
    names = "pr sid er asr ks ic sf asv sd qbe".split()
    assert [task.name for task in choose_tasks(["all"])] == names
    with pytest.raises(SetupError, match=r"\bxx\b.*pr, sid, er, asr"):
        choose_tasks(["xx"])


def test_learning_rates_of_a_search(in_superb_workspace, tmp_path):
    runs = plan_runs(tmp_path, "fbank", lr=["search"])
    # the recipes' own rates are 3e-3 and 1e-3; exact, so that --lr can name them in a later command
    assert [r.lr for r in runs if r.task.name == "sid"] == [3e-4, 3e-3, 3e-2]
    assert sorted({r.lr for r in runs if r.task.name == "er"}) == [1e-4, 1e-3, 1e-2]
    full = "sid=config.downstream_expert.datarc.file_path='data/sid/audio',,"
    full += "config.downstream_expert.datarc.meta_data='data/sid/split.txt'"
    runs = plan_runs(
        tmp_path, "fbank", tasks=["sid"], recipes="full", lr=["search"], override=[full]
    )
    assert [r.lr for r in runs] == pytest.approx([1e-5, 1e-4, 1e-3, 5e-3])
    runs = plan_runs(tmp_path, "fbank", lr=["er=search", "sid=0.5"])
    assert [run.lr for run in runs if run.task.name == "sid"] == [0.5]
    override = ["sid=config.optimizer={'name':'Adam'}"]
    with pytest.raises(SetupError, match=r"tiny\.yaml: optimizer\.lr"):
        plan_runs(tmp_path, "fbank", tasks=["sid"], lr=["search"], override=override)
    with pytest.raises(SetupError, match="--lr .*1e-3,0.001"):  # two runs in one folder
        plan_runs(tmp_path, "fbank", tasks=["sid"], lr=["1e-3,0.001"])
    for option, text in (("lr", "asr=1e-3"), ("steps", "asr=4"), ("override", "asr=config.a=1")):
        with pytest.raises(SetupError, match=rf"--{option} asr=.*--tasks"):
            plan_runs(tmp_path, "fbank", tasks=["sid"], **{option: [text]})
    with pytest.raises(ConfigError, match="did you mean total_steps"):
        override = ["config.runner.totl_steps=5"]
        plan_runs(tmp_path, "fbank", tasks=["sid"], override=override)
    for option in ("lr", "steps"):
        with pytest.raises(SetupError, match=rf"--{option} qbe=3\b.*qbe"):
            plan_runs(tmp_path, "fbank", **{option: ["qbe=3"]})


@pytest.mark.parametrize(
    "best, hint", [(3e-4, "--lr sid=3e-05"), (3e-3, None), (3e-2, "--lr sid=0.3")]
)
def test_the_chosen_learning_rate_is_printed(in_superb_workspace, tmp_path, best, hint):
    runs = plan_runs(tmp_path, "fbank", tasks=["sid"], lr=["search"])
    for run in runs:
        value = 60.0 if run.lr == pytest.approx(best) else 50.0
        dev = {"metric": "acc", "value": value, "checkpoint": "a.ckpt"}
        write_record(run, dev=dev)
    (line,) = superb.chosen_learning_rates(runs)
    assert re.match(rf"fbank, sid: .*\b{best:g} \(ACC 60\.00 %\)", line)
    assert (hint in line) if hint else ("--lr" not in line)
    assert superb.chosen_learning_rates(runs[:1]) == []  # nothing to choose


def test_the_plan_is_a_product(in_superb_workspace, tmp_path):
    runs = plan_runs(tmp_path, "fbank", "mfcc", lr=["sid=1e-3,5e-3"], seeds=[1, 2])
    sid = [run for run in runs if run.task.name == "sid"]
    assert len(sid) == 2 * 2 * 2
    assert {run.name for run in sid} == {
        "lr0.001-seed1", "lr0.001-seed2", "lr0.005-seed1", "lr0.005-seed2"
    }  # fmt: skip
    assert len({run.digest for run in runs}) == len(runs)
    assert len({run.folder for run in runs}) == len(runs)
    folds = len(list((in_superb_workspace / "data/er/meta_data").glob("Session*")))
    er = [run for run in runs if run.task.name == "er"]
    assert len(er) == 2 * 2 * folds and {run.lr for run in er} == {1e-3}  # the recipe's
    assert all("test_fold='fold1'" in run.overrides for run in er if run.fold == "fold1")


def test_a_run_as_json(in_superb_workspace, tmp_path):
    """For a process: the same run, as plain data; nothing else is accepted."""
    (tmp_path / "rain").mkdir()
    make_noise = {"noise": [str(tmp_path / "rain")], "snr": [0.1, 5.0]}
    soundfile.write(tmp_path / "rain/a.wav", make_sound(1.0), 16000)
    runs = plan_runs(tmp_path, "fbank", tasks=["sid", "er"], cache_features="", **make_noise)
    runs += plan_runs(tmp_path / "\udcff", "fbank", tasks=["sid"], lrs=[0.1 + 0.2])
    assert {run.fold for run in runs} == {None, "fold1"}
    for run in runs:
        copy = PlannedRun.from_json(run.to_json())
        assert copy == run and copy.noises == run.noises and copy.task is run.task
        assert superb.commands(copy) == superb.commands(run)
    for data in (b"", b"[]", b"{}", pickle.dumps(runs[0]), b'{"recipe": 1, "features": 2}'):
        with pytest.raises(SetupError, match="s3prl-ekd superb"):
            PlannedRun.from_json(data)


def test_the_digest_of_a_run_covers_what_determines_its_result(in_superb_workspace, tmp_path):
    (first,) = plan_runs(tmp_path, "fbank", tasks=["sid"])
    (same,) = plan_runs(tmp_path / "elsewhere", "fbank", tasks=["sid"])
    (other,) = plan_runs(tmp_path, "fbank", tasks=["sid"], steps=["sid=8"])
    assert first.digest == same.digest != other.digest
    first.folder.mkdir(parents=True)
    write_record(other, first.folder)
    with pytest.raises(SetupError, match=rf"{first.folder} .*NAME=CHECKPOINT.* -o"):
        superb.check_records([first])
    (first.folder / superb.RECORD).write_text("[]")
    with pytest.raises(DataError, match=str(first.folder / superb.RECORD)):
        superb.check_records([first])


def parsed_runs(*options):
    """The runs that a command plans."""
    parser = argparse.ArgumentParser()
    superb_command.configure(parser)
    return superb_plan.plan_runs(parser.parse_args(["fbank", "--recipes", "tiny", *options]))


def test_repeated_options(in_superb_workspace, tmp_path, capsys):
    """None is dropped, and a value with a task's name replaces a general one."""
    options = "--tasks sid --tasks er --seeds 1 --seeds 2 --lr sid=0.1 --lr 0.2 --lr sid=0.3"
    options += " --override sid=config.a=1 --override config.a=2,,config.b=2"
    options += " --override sid=config.c=3 --steps sid=8 --steps 4"
    runs = parsed_runs(*options.split())
    assert {(r.task.name, r.lr, r.seed) for r in runs} == {
        (task, lr, seed)
        for task, lrs in (("sid", (0.1, 0.3)), ("er", (0.2,)))
        for lr in lrs
        for seed in (1, 2)
    }
    config = {run.task.name: run.config for run in runs}
    assert [config["sid"][key] for key in "abc"] == [1, 2, 3] and config["er"]["a"] == 2
    assert [config[name]["runner"]["total_steps"] for name in ("sid", "er")] == [8, 4]
    for name in ("hum", "rain"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.flac").touch()
    hum, rain = (("--noise", str(tmp_path / name)) for name in ("hum", "rain"))
    (run,) = parsed_runs("--tasks", "sid", *hum, *rain, "--snr", "5", "--snr", "0")
    assert run.noises.keys() == {"hum_snr5", "hum_snr0", "rain_snr5", "rain_snr0"}


@pytest.mark.parametrize(
    "option, values",
    [
        ("--steps", ("sid=8", "sid=4")),
        ("--steps", ("8", "4")),
        ("--recipe", ("sid=a.yaml", "sid=b.yaml")),
        ("--lr", ("sid=search", "sid=0.1")),
        ("--lr", ("sid=0.1", "sid=1e-1")),
    ],
)
def test_repeated_options_that_exclude_each_other(in_superb_workspace, option, values):
    with pytest.raises(SetupError, match=f"^{option}"):
        parsed_runs("--tasks", "sid", option, values[0], option, values[1])


def test_noise_and_snr_are_given_together(tmp_path):
    (tmp_path / "babble").mkdir()
    (tmp_path / "babble" / "a.flac").touch()
    folder = str(tmp_path / "babble")
    assert noise_conditions([folder], [5, -2.5]) == {
        "babble_snr5": (folder, 5.0),
        "babble_snr-2.5": (folder, -2.5),
    }
    assert noise_conditions([], []) == {}
    for folders, snrs in (([folder], []), ([], [5.0])):
        with pytest.raises(SetupError, match="--noise FOLDER --snr 10 5 0"):
            noise_conditions(folders, snrs)


def test_noise_conditions_of_the_same_name_are_an_error(tmp_path, monkeypatch):
    """Both would be tested into one folder, so the second would be skipped as finished."""
    for name in ("a", "b"):
        (tmp_path / name / "rain").mkdir(parents=True)
        (tmp_path / name / "rain" / "1.flac").touch()
    a, b = str(tmp_path / "a/rain"), str(tmp_path / "b/rain")
    with pytest.raises(SetupError, match=r"a/rain .*b/rain .*rain_snr5"):
        noise_conditions([a, b], [5.0])
    with pytest.raises(SetupError, match="rain_snr5"):
        noise_conditions([a], [5.0, 5.0])
    for snr in (float("nan"), float("inf")):
        with pytest.raises(SetupError, match=rf"--snr.*{snr}"):
            noise_conditions([a], [snr])
    monkeypatch.chdir(a)
    assert list(noise_conditions(["."], [5.0])) == ["rain_snr5"]
    assert noise_digest(a) == noise_digest(b)
    (tmp_path / "b/rain/2.flac").touch()
    noise_digest.cache_clear()
    assert noise_digest(a) != noise_digest(b)


def test_a_condition_tested_with_different_noises_is_an_error(in_superb_workspace, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "rain").mkdir(parents=True)
        (tmp_path / name / "rain" / f"{name}.flac").touch()
    a, b = str(tmp_path / "a/rain"), str(tmp_path / "b/rain")
    options = {"tasks": ["sid"], "snr": [5.0]}
    (run,) = plan_runs(tmp_path, "fbank", noise=[a], **options)
    tested = {"clean": ".", "rain_snr5": "noisy/rain_snr5"}
    write_record(run, noises={"rain_snr5": noise_digest(a)}, tested=tested)
    predictions = run.folder / "noisy/rain_snr5"
    predictions.mkdir(parents=True)
    superb.check_records([run])
    same, seed, task = (
        plan_runs(tmp_path, "fbank", noise=[b], snr=[5.0], **changes)
        for changes in ({"tasks": ["sid"]}, {"tasks": ["sid"], "seeds": [2]}, {"tasks": ["er"]})
    )
    for runs in (same, seed, task):
        with pytest.raises(SetupError, match=f"{predictions} .*{b}"):
            superb.check_records(runs)
    predictions.rmdir()
    superb.check_records(same)  # it will be tested again


def test_another_model_under_the_same_name_is_an_error(in_superb_workspace, tmp_path):
    """Also if it has runs of another task only: the report would show both as one upstream."""
    (tmp_path / "s.pt").write_bytes(b"one")
    sid, er, *_ = plan_runs(tmp_path, str(tmp_path / "s.pt"))
    write_record(sid)
    superb.check_records([er])
    (tmp_path / "s.pt").write_bytes(b"two, exported later")
    superb_plan._sha256.cache_clear()
    with pytest.raises(SetupError, match=f"{sid.folder} .*model.*{sid.root / 's'} "):
        superb.check_records([er])


def test_a_run_with_other_settings_of_the_recipe_is_an_error(in_superb_workspace, tmp_path):
    """Before it is trained: `report` would not average it with the runs that are there."""
    (first,) = plan_runs(tmp_path, "fbank", tasks=["sid"], seeds=[1])
    write_record(first)
    superb.check_records(plan_runs(tmp_path, "fbank", seeds=[2], lr=["sid=0.1"]))
    superb.check_records(plan_runs(tmp_path, "mfcc", seeds=[2], steps=["8"]))
    pooling = "sid=args.upstream_layer_selection=1"  # not in the config
    for changes in ({"steps": ["8"]}, {"override": [pooling]}):
        runs = plan_runs(tmp_path, "fbank", tasks=["sid"], seeds=[2], **changes)
        with pytest.raises(SetupError, match=f"{first.folder} .*--override.*{first.folder.parent}"):
            superb.check_records(runs)
        assert runs[0].digest != plan_runs(tmp_path, "fbank", tasks=["sid"], seeds=[2])[0].digest
    write_record(first, recipe_digest=None)  # of an old version
    superb.check_records(runs)


def test_the_record_names_all_folds(in_superb_workspace, tmp_path):
    runs = plan_runs(tmp_path, "fbank")
    er = [run for run in runs if run.task.name == "er"]
    assert {tuple(run.new_record().folds) for run in er} == {tuple(run.fold for run in er)}
    (sid,) = (run for run in runs if run.task.name == "sid")
    assert sid.new_record().folds is None


def test_an_unfinished_record_of_an_old_version_is_completed(in_superb_workspace, tmp_path):
    (run,) = plan_runs(tmp_path, "fbank", tasks=["er"])
    write_record(run, recipe_digest=None, folds=None, finished=False, seconds=1.0)
    superb.train(run, lambda request: None)
    record, new = superb.read_record(run.folder), run.new_record()
    assert (record.recipe_digest, record.folds) == (new.recipe_digest, ["fold1"])


def test_what_the_digest_of_a_recipe_covers(in_superb_workspace, tmp_path):
    options = {"lr": ["0.1,0.2"], "seeds": [1, 2]}
    runs = plan_runs(tmp_path, "fbank", "mfcc", **options)
    records = [run.new_record() for run in runs]
    for task in ("sid", "er"):
        assert len({r.recipe_digest for r in records if r.task == task}) == 1
    lr = "config.optimizer.lr=0.3"
    (same,) = plan_runs(tmp_path, "fbank", tasks=["sid"], override=[lr])
    (other,) = plan_runs(tmp_path, "fbank", tasks=["sid"], override=[f"{lr},,config.a=1"])
    digests = {r.recipe_digest for r in records if r.task == "sid"}
    assert {same.new_record().recipe_digest} == digests != {other.new_record().recipe_digest}
    table = in_superb_workspace / "data/sid/prepared.tsv"
    text = table.read_text()
    try:
        table.write_text(text.replace("\t", "\t ", 1))
        assert {same.new_record().recipe_digest} != digests
    finally:
        table.write_text(text)


def test_the_digest_of_a_run_covers_the_corpus(in_superb_workspace, tmp_path):
    """A corpus prepared with other options may have the same file names."""
    (run,) = plan_runs(tmp_path, "fbank", tasks=["sid"])
    before, table = run.digest, in_superb_workspace / "data/sid/prepared.tsv"
    text = table.read_text()
    try:
        table.write_text(text.replace("\t", "\t ", 1))
        assert run.digest != before
    finally:
        table.write_text(text)
    assert run.digest == before


def test_a_run_in_a_locked_folder_fails(in_superb_workspace, tmp_path, lock_holder):
    (run,) = plan_runs(tmp_path, "fbank", tasks=["sid"])
    run.folder.mkdir(parents=True)
    holder = lock_holder(run.folder)
    with pytest.raises(SetupError, match=rf"{run.folder} .*\b{holder.pid}\b"):
        superb.run_plan([run])
    assert not (run.folder / superb.RECORD).exists()


def test_missing_noises_are_an_error_before_training(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "no_split.tsv").write_text("path\ta.flac\n")
    (tmp_path / "no_test.tsv").write_text("path\tsplit\na.flac\ttrain\n")
    for name, pattern in (
        ("nowhere", "nowhere"),
        ("empty", "empty"),
        ("no_split.tsv", "no_split.tsv.*split"),
        ("no_test.tsv", "no_test.tsv.* test"),
    ):
        with pytest.raises(DataError, match=pattern):
            noise_conditions([str(tmp_path / name)], [5.0])


def test_dry_run_prints_the_commands(in_superb_workspace, tmp_path, capsys):
    cli.main(["superb", "fbank", "--tasks", "sid", "--recipes", "tiny", "--dry-run", "--gpus", "4"])
    train, test = map(shlex.split, capsys.readouterr().out.splitlines())
    assert train[:3] == ["torchrun", "--standalone", "--nproc_per_node=4"]
    assert train[3:6] == ["-m", "s3prl_ekd", "run_downstream.py"] and "-a" in train
    assert test[:5] == ["run_downstream.py", "-m", "evaluate", "-t", "test"]
    assert test[-1].endswith("lr0.003-seed1337/dev-best.ckpt")


def test_dry_run_takes_the_folders_that_a_run_takes(in_superb_workspace, tmp_path, capsys):
    """Also of wav2vec 2.0, which is no student."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    sizes |= {"num_attention_heads": 2, "conv_dim": (8,) * 7, "num_conv_pos_embeddings": 4}
    config = transformers.Wav2Vec2Config(**sizes, num_conv_pos_embedding_groups=2)
    transformers.Wav2Vec2Model(config).save_pretrained(tmp_path / "folder")
    argv = ["superb", f"mine={tmp_path / 'folder'}", "--tasks", "sid", "--recipes", "tiny"]
    assert cli.main([*argv, "--dry-run"]) == 0
    assert str(tmp_path / "folder") in capsys.readouterr().out


def test_dry_run_looks_into_students(in_superb_workspace, tmp_path, capsys):
    path = tmp_path / "text.safetensors"
    path.write_text("no tensors")
    argv = ["superb", f"mine={path}", "--tasks", "sid", "--recipes", "tiny", "--dry-run"]
    assert str(path) in error_of(capsys, *argv)


@pytest.mark.parametrize(
    "argv, pattern",
    [
        (["fbank", "--tasks", "xx"], r"\bxx\b.*pr, sid, er, asr"),
        (["fbank", "fbank", "--tasks", "sid"], r"\bfbank\b.*NAME=CHECKPOINT"),
        (["nothing.pt"], r"nothing\.pt.*NAME=HUB:CHECKPOINT"),
        (["fbank", "--tasks", "asr"], r"asr/tiny\.yaml.*libri_root.*data/corpus"),
        (["fbank", "--tasks", "sid", "--lr", "sid=fast"], "--lr.*fast"),
        (["fbank", "--tasks", "sid", "--lr", "sdi=1"], "--lr sdi=1.*pr, sid, er, asr"),
        (["fbank", "--tasks", "sid", "--seeds", "1", "1"], "--seeds"),
        (["fbank", "--tasks", "sid", "--jobs", "0"], r"--jobs .*\b0 and 1\b"),
        (["fbank", "--tasks", "sid", "--gpus", "0"], r"--gpus .*\b1 and 0\b"),
        (["fbank", "--tasks", "sid", "--gpus", "2", "--jobs", "3"], r"--gpus .*\b3 and 2\b"),
        (["fbank", "--tasks", "sid", "--snr", "5"], "--noise FOLDER --snr"),
        (["no_such_model", "--tasks", "sid"], "no_such_model.*run_downstream.py -h"),
        (["fbank", "--tasks", "sid", "--recipe", "sid=x.yaml"], r"x\.yaml.*s3prl-ekd init"),
        (
            ["fbank", "--tasks", "sid", "--no-cache-features", "--keep-features"],
            "--keep-features.*--cache-features",
        ),
        (["fbank", "--cache-features", "--gpus", "2"], "--cache-features.*--gpus 1"),
        (["fbank", "--cache-features", "audio/all.tsv"], r"audio/all\.tsv"),
        (["fbank", "--cache-features", "--cache-features-gb", "x"], r"--cache-features-gb.*\bx\b"),
    ],
)
def test_errors(in_superb_workspace, capsys, argv, pattern, tmp_path):
    error = error_of(capsys, "superb", *argv, "--recipes", "tiny", "-o", tmp_path / "out")
    assert re.search(pattern, error), error


def test_check_outputs():
    state = torch.zeros(2, 49, 8)
    check_outputs({"hidden_states": [state, state]}, "hidden_states", "x")
    check_outputs({"hidden_states": (state, state)}, "hidden_states", "x")  # s3prl's own HuBERT
    for outputs, pattern in (
        ((state, state), r"\bx\b.* dict .*tuple"),
        ({"last": state}, r"\bx\b.*hidden_states.* last$"),
        ({"hidden_states": {"a": state}}, r"\bx\b.*hidden_states.* dict$"),
        ({"hidden_states": [state, state[:, :3]]}, r"\bx\b.*\(2, 3, 8\).*\(2, 49, 8\)"),
        ({"hidden_states": [state[0]]}, r"\bx\b.*\(49, 8\)"),
        ({"hidden_states": [state / 0]}, r"\bx\b.*finite"),
    ):
        with pytest.raises(SetupError, match=pattern):
            check_outputs(outputs, "hidden_states", "x")
