"""`s3prl-ekd superb`: what it plans, and what it refuses."""

import json
import shlex
import subprocess
import sys

import pytest
import torch
from s3prl.utility.helper import override

from s3prl_ekd import cli
from s3prl_ekd.downstream.tasks import choose_tasks
from s3prl_ekd.errors import DataError, SetupError
from s3prl_ekd.request import DownstreamRequest
from s3prl_ekd.superb import plan as superb_plan
from s3prl_ekd.superb import run as superb
from s3prl_ekd.superb.cost import check_outputs
from s3prl_ekd.superb.plan import (
    Upstream,
    noise_conditions,
    noise_digest,
    parse_upstream,
    steps_overrides,
)

from .superb_workspace import make_workspace, plan


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("superb"))


@pytest.fixture
def here(prepared, monkeypatch):
    monkeypatch.chdir(prepared)
    return prepared


def fails(capsys, *words) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(["superb", *map(str, words)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("error: ") == 1, error
    return error


def test_the_names_of_upstreams(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "student.pt").touch()
    assert parse_upstream("fbank") == Upstream("fbank", "fbank")
    assert parse_upstream("student.pt") == Upstream("student", "ekd_student", "student.pt")
    assert parse_upstream("a=student.pt") == Upstream("a", "ekd_student", "student.pt")
    hubert = parse_upstream("teacher=hubert_local:student.pt")
    assert hubert == Upstream("teacher", "hubert_local", "student.pt")
    heads = parse_upstream("student.pt", "hidden_states_and_heads")
    assert heads.selection == "hidden_states_and_heads"
    for wrong in ("nothing.pt", "a=hubert_local:nothing.pt", "../x=student.pt", ".x=student.pt"):
        with pytest.raises(SetupError):
            parse_upstream(wrong)


@pytest.mark.parametrize("path", ["runs/lr=1e-4/student.pt", "epoch=3.ckpt", "a=b=c d.pt"])
def test_paths_with_equals_signs(tmp_path, monkeypatch, path):
    """A file that is there is meant whole, and the first sign ends a name only if there is one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).touch()
    name = parse_upstream(path).name
    assert "=" not in name and parse_upstream(path) == Upstream(name, "ekd_student", path)
    assert parse_upstream(f"mine={path}") == Upstream("mine", "ekd_student", path)
    assert parse_upstream(f"hubert_local:{path}").checkpoint == path
    teacher = parse_upstream(f"teacher=hubert_local:{path}")
    assert teacher == Upstream("teacher", "hubert_local", path)
    with pytest.raises(SetupError, match="epoch=4.ckpt"):
        parse_upstream("epoch=4.ckpt")


def test_commands_with_equals_signs(here, tmp_path, capsys):
    """What is printed can be typed, and `run_downstream.py` reads it as it was meant."""
    folder = tmp_path / "lr=1e-4 x"
    folder.mkdir()
    (folder / "student.pt").touch()
    recipe = folder / "tiny.yaml"
    recipe.write_text((here / "downstream/voxceleb1/tiny.yaml").read_text())
    words = [str(folder / "student.pt"), "--tasks", "sid", "--recipe", str(recipe), "--dry-run"]
    words += ["--override", "config.a='b=c'", "-o", str(folder / "out")]
    assert cli.main(["superb", *words]) == 0
    train = shlex.split(capsys.readouterr().out.splitlines()[0])
    assert train[train.index("-k") + 1] == str(folder / "student.pt")
    assert train[train.index("-c") + 1] == str(recipe)
    assert train[train.index("-p") + 1].startswith(str(folder / "out"))
    argv = DownstreamRequest.parse(train[1:]).argv()
    config = {}
    override(argv[argv.index("-o") + 1], None, config)
    assert config["a"] == "b=c" and config["optimizer"]["lr"]


def test_a_checkpoint_counts_by_its_contents(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"one")
    (tmp_path / "b.pt").write_bytes(b"one")
    (tmp_path / "c.pt").write_bytes(b"two")
    a, b, c = (Upstream(n, "ekd_student", str(tmp_path / f"{n}.pt")).identity for n in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    "steps, total, every", [(400, 400, 100), (10, 10, 2), (3, 3, 1), (7, 7, 1)]
)
def test_no_step_is_lost_at_the_end(steps, total, every):
    assert f"config.runner.total_steps={total}," in steps_overrides(steps)
    assert f"config.runner.eval_step={every}" in steps_overrides(steps)
    assert total % every == 0


def test_tasks_come_in_the_order_of_superb():
    assert [task.name for task in choose_tasks(["asr", "pr"])] == ["pr", "asr"]
    with pytest.raises(SetupError, match="unknown task 'ks'; known: pr, sid, er, asr"):
        choose_tasks(["ks"])


def test_the_plan_is_the_product_of_all(here, tmp_path):
    runs = plan(tmp_path, "fbank", "mfcc", lr=["sid=1e-3,5e-3"], seeds=[1, 2])
    sid = [run for run in runs if run.task.name == "sid"]
    assert len(sid) == 2 * 2 * 2
    assert {run.name for run in sid} == {
        "lr0.001-seed1", "lr0.001-seed2", "lr0.005-seed1", "lr0.005-seed2"
    }  # fmt: skip
    assert len({run.digest for run in runs}) == len(runs)
    assert len({run.folder for run in runs}) == len(runs)
    folds = len(list((here / "data/er/meta_data").glob("Session*")))
    er = [run for run in runs if run.task.name == "er"]
    assert len(er) == 2 * 2 * folds and {run.lr for run in er} == {1e-3}  # the recipe's
    assert all("test_fold='fold1'" in run.overrides for run in er if run.fold == "fold1")


def test_a_run_is_known_by_what_decides_its_result(here, tmp_path):
    (first,) = plan(tmp_path, "fbank", tasks=["sid"])
    (same,) = plan(tmp_path / "elsewhere", "fbank", tasks=["sid"])
    (other,) = plan(tmp_path, "fbank", tasks=["sid"], steps=["sid=8"])
    assert first.digest == same.digest != other.digest
    first.folder.mkdir(parents=True)
    record = {"format": superb.FORMAT, "digest": other.digest}
    (first.folder / superb.RECORD).write_text(json.dumps(record))
    with pytest.raises(SetupError, match="holds a run of another checkpoint, recipe, setting or"):
        superb.check_records([first])
    (first.folder / superb.RECORD).write_text("[]")
    with pytest.raises(SetupError, match="is damaged; remove"):
        superb.check_records([first])


def test_noise_and_snr_belong_together(tmp_path):
    (tmp_path / "babble").mkdir()
    (tmp_path / "babble" / "a.flac").touch()
    folder = str(tmp_path / "babble")
    assert noise_conditions([folder], [5, -2.5]) == {
        "babble_snr5": (folder, 5.0),
        "babble_snr-2.5": (folder, -2.5),
    }
    assert noise_conditions([], []) == {}
    for folders, snrs in (([folder], []), ([], [5.0])):
        with pytest.raises(SetupError, match="--noise and --snr go together"):
            noise_conditions(folders, snrs)


def test_two_noises_of_one_name_are_refused(tmp_path, monkeypatch):
    """Their tests would lie in one folder: the second would be taken for done."""
    for name in ("a", "b"):
        (tmp_path / name / "rain").mkdir(parents=True)
        (tmp_path / name / "rain" / "1.flac").touch()
    a, b = str(tmp_path / "a/rain"), str(tmp_path / "b/rain")
    with pytest.raises(SetupError, match=r"b/rain at 5 dB have one name, rain_snr5; rename"):
        noise_conditions([a, b], [5.0])
    with pytest.raises(SetupError, match="rain_snr5"):
        noise_conditions([a], [5.0, 5.0])
    for snr in (float("nan"), float("inf")):
        with pytest.raises(SetupError, match="a number of dB is needed"):
            noise_conditions([a], [snr])
    monkeypatch.chdir(a)
    assert list(noise_conditions(["."], [5.0])) == ["rain_snr5"]  # as its folder will be called
    assert noise_digest(a) == noise_digest(b)
    (tmp_path / "b/rain/2.flac").touch()
    noise_digest.cache_clear()
    assert noise_digest(a) != noise_digest(b)


def record_of(run, **changes):
    """As a finished run leaves it."""
    run.folder.mkdir(parents=True, exist_ok=True)
    record = {"format": superb.FORMAT, "digest": run.digest, "model": run.upstream.digest}
    record |= {"finished": True, "tested": {"clean": "."}, "noises": {}}
    (run.folder / superb.RECORD).write_text(json.dumps(record | changes))


def test_a_test_under_other_noises_of_that_name_is_not_kept(here, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "rain").mkdir(parents=True)
        (tmp_path / name / "rain" / f"{name}.flac").touch()
    a, b = str(tmp_path / "a/rain"), str(tmp_path / "b/rain")
    words = {"tasks": ["sid"], "snr": [5.0]}
    (run,) = plan(tmp_path, "fbank", noise=[a], **words)
    record_of(run, noises={"rain_snr5": noise_digest(a)})
    superb.check_records([run])
    (run,) = plan(tmp_path, "fbank", noise=[b], **words)
    with pytest.raises(SetupError, match="tested under rain_snr5 with other noises than those"):
        superb.check_records([run])


def test_another_model_under_the_same_name_is_refused(here, tmp_path):
    """Of another task, too: the report would show the two as one."""
    (tmp_path / "s.pt").write_bytes(b"one")
    sid, er, *_ = plan(tmp_path, str(tmp_path / "s.pt"))
    record_of(sid)
    superb.check_records([er])
    (tmp_path / "s.pt").write_bytes(b"two, exported later")
    superb_plan._sha256.cache_clear()
    with pytest.raises(SetupError, match="is of another model than s is now; move"):
        superb.check_records([er])


def test_a_corpus_prepared_anew_makes_another_run(here, tmp_path):
    """Its files may have the same names: whole utterances, or a second of each."""
    (run,) = plan(tmp_path, "fbank", tasks=["sid"])
    before, table = run.digest, here / "data/sid/prepared.tsv"
    text = table.read_text()
    try:
        table.write_text(text.replace("\t", "\t ", 1))
        assert run.digest != before
    finally:
        table.write_text(text)
    assert run.digest == before


def test_a_second_process_in_a_runs_folder_is_told(here, tmp_path):
    (run,) = plan(tmp_path, "fbank", tasks=["sid"])
    run.folder.mkdir(parents=True)
    code = "import sys; from s3prl_ekd.system.lock import FolderLock\n"
    code += f"with FolderLock({str(run.folder)!r}): print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        ((failed, reason),) = superb.run_all([run])
        assert failed is run and "is in use: process" in reason
        assert not (run.folder / superb.RECORD).exists()
    finally:
        holder.communicate()


def test_what_is_no_noise_is_said_before_any_training(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "no_split.tsv").write_text("path\ta.flac\n")
    (tmp_path / "no_test.tsv").write_text("path\tsplit\na.flac\ttrain\n")
    for name, said in (
        ("nowhere", "there is no such folder of noises"),
        ("empty", "has no audio"),
        ("no_split.tsv", "split"),
        ("no_test.tsv", "has no line in the split test"),
    ):
        with pytest.raises(DataError, match=said):
            noise_conditions([str(tmp_path / name)], [5.0])


def test_the_commands_can_be_given_to_a_queue(here, tmp_path, capsys):
    cli.main(["superb", "fbank", "--tasks", "sid", "--recipes", "tiny", "--dry-run", "--gpus", "4"])
    train, test = map(shlex.split, capsys.readouterr().out.splitlines())
    assert train[:3] == ["torchrun", "--standalone", "--nproc_per_node=4"]
    assert train[3:6] == ["-m", "s3prl_ekd", "run_downstream.py"] and "-a" in train
    assert test[:5] == ["run_downstream.py", "-m", "evaluate", "-t", "test"]
    assert test[-1].endswith("lr0.003-seed1337/dev-best.ckpt")


@pytest.mark.parametrize(
    "words, said",
    [
        (["fbank", "--tasks", "ks"], "unknown task 'ks'"),
        (["fbank", "fbank", "--tasks", "sid"], "two upstreams are called fbank"),
        (["nothing.pt"], "nothing.pt: there is no such file"),
        (["fbank", "--tasks", "asr"], "libri_root is ./data/corpus, which is not there"),
        (["fbank", "--tasks", "sid", "--lr", "sid=fast"], "--lr fast: a number above 0"),
        (["fbank", "--tasks", "sid", "--lr", "sdi=1"], "--lr sdi=1: unknown task 'sdi'"),
        (["fbank", "--tasks", "sid", "--seeds", "1", "1"], "--seeds names a seed twice"),
        (["fbank", "--tasks", "sid", "--jobs", "0"], "--jobs and --gpus must be 1 or more"),
        (["fbank", "--tasks", "sid", "--snr", "5"], "--noise and --snr go together"),
        (["no_such_model", "--tasks", "sid"], "s3prl has no such upstream"),
        (["fbank", "--tasks", "sid", "--recipe", "sid=x.yaml"], "there is no recipe x.yaml"),
        (["fbank", "--tasks", "sid", "--keep-features"], "goes with --cache-features"),
        (["fbank", "--cache-features", "--gpus", "2"], "--cache-features is for --gpus 1"),
        (["fbank", "--cache-features", "audio/all.tsv"], "audio/all.tsv: this is a file; a folder"),
        (
            ["fbank", "--cache-features", "--cache-features-gb", "x"],
            "--cache-features-gb x: a number of gigabytes above 0",
        ),
    ],
)
def test_mistakes_are_a_sentence(here, capsys, words, said, tmp_path):
    assert said in fails(capsys, *words, "--recipes", "tiny", "-o", tmp_path / "out")


def test_an_upstream_that_the_recipes_cannot_use_is_named():
    state = torch.zeros(2, 49, 8)
    check_outputs({"hidden_states": [state, state]}, "hidden_states", "x")
    check_outputs({"hidden_states": (state, state)}, "hidden_states", "x")  # s3prl's own HuBERT
    for outputs, said in (
        ((state, state), "x returns a tuple; its forward must return a dict"),
        ({"last": state}, "gives no hidden_states; it gives: last"),
        ({"hidden_states": {"a": state}}, "as a dict"),
        ({"hidden_states": [state, state[:, :3]]}, "all must be tensors"),
        ({"hidden_states": [state[0]]}, "all must be tensors"),
        ({"hidden_states": [state / 0]}, "not finite"),
    ):
        with pytest.raises(SetupError, match=said):
            check_outputs(outputs, "hidden_states", "x")
