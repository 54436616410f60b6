"""What a resumed run takes from where: weights from the checkpoint, the rest as typed."""

import functools
import os
import shutil

import pytest
import torch
import yaml

from s3prl_ekd.compat.no_eval import check_names
from s3prl_ekd.errors import ConfigError
from s3prl_ekd.files.run_checkpoints import newest, read_run
from s3prl_ekd.pretrain.settings import load_model_config
from s3prl_ekd.pretrain.tensorboard import read_scalars

from .conftest import command, write_configs

RUN = ("run_pretrain.py", "-u", "ekd", "-n", "x", "-c", "runner.yaml", "-g", "model.yaml")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, teachers, corpus):
    """A run of 6 steps, started with -o."""
    folder = tmp_path_factory.mktemp("finished")
    command("init", ".", cwd=folder)
    write_configs(folder, teachers, corpus)
    command(*RUN, "-o", "config.runner.log_step=1", cwd=folder)
    return folder


@pytest.fixture
def run(finished, tmp_path, monkeypatch, pretrain_script):
    """Type something in a copy of that folder, in this process; returns (code, stdout + stderr)."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)

    return functools.partial(pretrain_script, "--device", "cpu")


def latest():
    return read_run(newest("result/pretrain/x"))


def test_a_longer_run_has_the_learning_rate_of_its_length(run):
    more = "config.runner.total_steps=12,,config.optimizer.lr=5.e-3"
    code, said = run("-u", "ekd", "-n", "x", "-a", "-o", more)
    assert code == 0 and latest()["Step"] == 12
    rates = read_scalars("result/pretrain/x")["ekd/train-lr"]
    # s3prl's schedule by hand: linear from lr at 10 % of the steps to 0 at the end
    for step in (8, 10):
        assert rates[step] == pytest.approx(5e-3 * (1 - step / 12) / 0.9, rel=1e-4)
    # and what was typed once does not come back, nor is it lost
    code, said = run("-u", "ekd", "-n", "x", "-a")
    assert code == 0 and "Training for 12 steps" in said


def test_a_folder_in_use_is_not_written_into(run):
    before = {path.name for path in newest("result/pretrain/x").parent.iterdir()}
    code, said = run("-u", "ekd", "-n", "x", "-c", "runner.yaml", "-g", "model.yaml")
    assert code == 2 and "holds a run already: add -a to go on with it" in said
    assert {path.name for path in newest("result/pretrain/x").parent.iterdir()} == before


def test_the_config_of_a_resumed_run_is_checked(run):
    code, said = run("-u", "ekd", "-n", "x", "-a", "-o", "config.runner.save_step=0")
    assert code == 2 and "save_step is 0; 1 or more is allowed" in said


@pytest.mark.parametrize("where", ["override", "optimizer", "scheduler"])
def test_a_checkpoint_of_plain_data_runs_no_code(run, tmp_path, where):
    """s3prl would evaluate each of these texts."""
    evil = "__import__('os').mkdir('hacked')"
    path = newest("result/pretrain/x")
    states = read_run(path)
    if where == "override":
        states["Args"].override = f"config.runner.fp16={evil}"
    else:
        states["Config"][where] = {"name": f"{evil} or Adam", "lr": 0.1}
    torch.save(states, "new.ckpt")  # not in place: the tensors are still in the file
    os.replace("new.ckpt", path)
    code, said = run("-u", "ekd", "-n", "x", "-a")
    assert not (tmp_path / "hacked").exists()
    assert code == (0 if where == "override" else 2)
    if where != "override":
        assert f"{where}.name is" in said and "would run as code" in said


def test_the_run_keeps_its_whole_config(run, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "small.yaml").write_text("extends: ../model.yaml\naggregation: average\n")
    words = ("-u", "ekd", "-n", "y", "-c", "runner.yaml", "-g", "sub/small.yaml")
    code, said = run(*words)
    assert code == 0
    kept = load_model_config("result/pretrain/y/config_model.yaml")
    assert kept == load_model_config("sub/small.yaml") and kept.aggregation == "average"


def test_a_device_that_is_not_there(run):
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    code, said = run("-u", "ekd", "-n", "x", "-a", "--device", "cuda:9")
    assert code == 2 and "--device cuda:9 cannot be used here" in said


@pytest.mark.parametrize(
    "config",
    [
        {"optimizer": {"name": "Adam(print(1))"}},
        {"scheduler": {"name": "x()"}},
        {"downstream_expert": {"modelrc": {"select": "RNNs if 1 else 2"}}},
        {"downstream_expert": {"corpus": {"metric": ["per", "__import__('os')"]}}},
        {"downstream_expert": {"datarc": {"decoder_args": {"unk_weight": "exit()"}}}},
        {"downstream_expert": {"modelrc": {"a": [{"pooling": "a.b"}]}}},
    ],
)
def test_what_s3prl_evaluates_must_be_a_name(config):
    with pytest.raises(ConfigError, match="must be a plain name"):
        check_names(config, "x.yaml")


def test_names_and_other_texts_pass():
    from .conftest import REPO

    for path in (REPO / "downstream_recipes").rglob("*.yaml"):
        check_names(yaml.safe_load(path.read_text()), path.name)
    check_names({"corpus": {"name": "a b"}, "x": {"unk_weight": "-math.inf"}}, "x.yaml")


def only_error(said):
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert "Traceback" not in said
    return line


def test_the_command_typed_again_goes_on(run):
    """-c and -g are the run's own, and so is the -o that it was started with."""
    same = ("-c", "runner.yaml", "-g", "model.yaml", "-o", "config.runner.log_step=1")
    code, said = run("-u", "ekd", "-n", "x", "-a", *same)
    assert code == 0 and latest()["Step"] == 6


def test_a_runner_config_that_differs(run, tmp_path):
    config = yaml.safe_load((tmp_path / "runner.yaml").read_text())
    config["runner"]["total_steps"] = 12
    config["pretrain_expert"]["datarc"]["train_batch_size"] = 2
    (tmp_path / "runner.yaml").write_text(yaml.safe_dump(config))
    code, said = run("-u", "ekd", "-n", "x", "-a", "-c", "runner.yaml")
    error = only_error(said)
    assert code == 2 and "-c runner.yaml differs from the config in result/pretrain/x/" in error
    assert "runner.total_steps 6 -> 12" in error and "runner.log_step 1 -> 2" in error
    assert "pretrain_expert.datarc.train_batch_size 3 -> 2" in error
    assert '-o "config.KEY=VALUE"' in error and latest()["Step"] == 6


def test_a_model_config_that_differs(run, tmp_path):
    model = yaml.safe_load((tmp_path / "model.yaml").read_text())
    model["student"]["encoder_layers"] = 1
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(model))
    code, said = run("-u", "ekd", "-n", "x", "-a", "-g", "model.yaml")
    assert code == 2 and "student.encoder_layers 2 -> 1" in only_error(said)


def test_another_optimizer(run):
    code, said = run("-u", "ekd", "-n", "x", "-a", "-o", "config.optimizer.name='AdamW'")
    error = only_error(said)
    assert code == 2 and "optimizer.name 'AdamW_with_schedule' -> 'AdamW'" in error


def changed_checkpoint(change):
    """Change what the newest checkpoint holds."""
    path = newest("result/pretrain/x")
    states = read_run(path)
    change(states)
    torch.save(states, "new.ckpt")
    for name in (path, path.with_name("last.ckpt")):
        shutil.copy("new.ckpt", name)


@pytest.mark.parametrize(
    ("change", "said_of_it"),
    [
        (
            lambda states: states["EKD"]["settings"].update(encoder_ffn_embed_dim=32),
            "a student of another size: encoder_ffn_embed_dim 32 -> 64 (checkpoint -> this run)",
        ),
        (lambda states: states["EKD"].pop("heads"), "does not fit this run: 'heads'"),
        (lambda states: states.pop("Optimizer"), "does not fit this run: 'Optimizer'"),
        (lambda states: states["EKD_Run"].update(epoch=-3), "is damaged: its run state"),
        (
            lambda states: states["EKD_Run"]["random"][0].update(torch=torch.zeros(3)),
            "is damaged: no states of random number generators",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit(run, change, said_of_it):
    changed_checkpoint(change)
    code, said = run("-u", "ekd", "-n", "x", "-a", "-o", "config.runner.total_steps=9")
    assert code == 2 and said_of_it in only_error(said)


def test_a_checkpoint_of_s3prls_runner_goes_on(run, caplog):
    changed_checkpoint(lambda states: states.pop("EKD_Run"))
    code, said = run("-u", "ekd", "-n", "x", "-a", "-o", "config.runner.total_steps=9")
    assert code == 0 and "is of s3prl's own Runner: random numbers begin anew" in caplog.text
    # 6 updates of a batch each were 1 pass of 4 batches and 2 batches; now there are 9.
    place = latest()["EKD_Run"]
    assert (place["epoch"], place["batch"], latest()["Step"]) == (2, 1, 9)


def test_a_corpus_table_that_has_changed(run, tmp_path, corpus, caplog):
    """By its contents: a new date is no change."""
    shutil.copytree(corpus / "tables", "tables")
    here = (
        f"config.runner.total_steps=9,,config.pretrain_expert.datarc.file_path='{tmp_path}/tables'"
    )
    table = tmp_path / "tables" / "train.csv"
    os.utime(table)
    assert run("-u", "ekd", "-n", "x", "-a", "-o", here)[0] == 0
    table.write_text(table.read_text().rsplit("\n", 4)[0] + "\n")
    more = here.replace("=9", "=12")
    code, said = run("-u", "ekd", "-n", "x", "-a", "-o", more)
    error = only_error(said)
    assert code == 2 and f"have changed since the checkpoint was written: {table}" in error
    sets = "config.pretrain_expert.datarc.sets=['train']"
    assert f'-o "{sets}"' in error and latest()["Step"] == 9
    code, said = run("-u", "ekd", "-n", "x", "-a", "-o", f"{more},,{sets}")
    assert code == 0 and "beginning a new pass over them" in caplog.text
    place = latest()["EKD_Run"]
    assert (place["epoch"], place["batch"], place["batches"]) == (4, 0, 3)


@pytest.mark.parametrize("how", ["bit", "half", "nothing"])
def test_a_damaged_newest_checkpoint_is_passed_over(run, how, caplog, tmp_path):
    caplog.set_level("INFO")
    path = newest("result/pretrain/x")
    assert path.name == "states-6.ckpt"
    data = bytearray(path.read_bytes())
    if how == "bit":
        weights = read_run(path)["EKD"]["student"]["backbone.encoder.layers.0.fc1.weight"]
        data[data.index(weights.numpy().tobytes()) + 100] ^= 1
    else:
        del data[len(data) // 2 if how == "half" else 0 :]
    for name in ("states-6.ckpt", "last.ckpt"):
        (path.parent / name).write_bytes(bytes(data))
    code, said = run("-u", "ekd", "-n", "x", "-a")
    assert code == 0 and latest()["Step"] == 6
    assert "passed over: the checkpoint result/pretrain/x/states-6.ckpt is damaged" in caplog.text
    assert "resume from result/pretrain/x/states-3.ckpt at step 3" in caplog.text
    # named, it is refused
    (path.parent / "states-6.ckpt").write_bytes(bytes(data))
    code, said = run("-e", str(path))
    assert code == 2 and "is damaged" in only_error(said)


def test_nothing_but_damaged_checkpoints(run):
    for path in newest("result/pretrain/x").parent.glob("*.ckpt"):
        path.write_bytes(path.read_bytes()[:-1000])
    code, said = run("-u", "ekd", "-n", "x", "-a")
    assert code == 2 and "none of the 3 checkpoints in result/pretrain/x can be read" in said


def test_going_back_sets_aside_what_came_later(run):
    folder = newest("result/pretrain/x").parent
    (folder / "states-5.ckpt.123.tmp").write_bytes(b"half")  # of a run that was killed
    more = "config.runner.total_steps=5,,config.runner.save_step=4"
    code, said = run("-e", str(folder / "states-3.ckpt"), "-o", more)
    assert code == 0 and latest()["Step"] == 5
    names = {path.name for path in folder.glob("*.ckpt*")}
    assert names == {
        *("states-3.ckpt", "states-4.ckpt", "states-5.ckpt", "last.ckpt"),
        *("states-6.ckpt.old", "last.ckpt.old"),
    }


def test_a_run_that_was_moved_goes_on_where_it_is(run, tmp_path):
    shutil.move("result/pretrain/x", tmp_path / "moved")
    more = "config.runner.total_steps=8"
    code, said = run("-u", "ekd", "-p", str(tmp_path / "moved"), "-a", "-o", more)
    assert code == 0 and read_run(newest(tmp_path / "moved"))["Step"] == 8
    assert not os.path.exists("result/pretrain/x")
    code, said = run("-u", "ekd", "-p", "moved", "-a")  # the same by another name
    assert code == 0
