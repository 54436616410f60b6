"""The next command that is printed can be typed, for any path."""

import shlex
import shutil

import pytest

from s3prl_ekd import cli
from s3prl_ekd.commands.init import _next_steps
from s3prl_ekd.downstream.requirements import init_command
from s3prl_ekd.workspace import CorpusPaths, Experiment, experiments

from .conftest import write_librispeech_names
from .documented import Machine

AWKWARD = "it's lr=1e-4; $HOME"


def next_argv(capsys) -> list[str]:
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next: ")]
    (line,) = lines
    return shlex.split(line.removeprefix("next: "))


@pytest.mark.parametrize("kind", ["student", "superb"])
def test_after_an_export(student_file, tmp_path, capsys, kind):
    out = tmp_path / AWKWARD
    assert cli.main(["export", kind, str(student_file), "-o", str(out)]) == 0
    assert str(out) in next_argv(capsys)


def test_after_init(tmp_path):
    folder = tmp_path / AWKWARD
    cd = _next_steps(folder, CorpusPaths(None, None, None, [])).partition(", then")[0]
    assert shlex.split(cd.removeprefix("next: ")) == ["cd", str(folder)]
    assert shlex.split(init_command(folder))[-1] == str(folder)


def test_only_what_can_run_is_printed_after_init(tmp_path):
    corpora = {"librispeech": tmp_path, "voxceleb1": tmp_path / "v", "iemocap": tmp_path}
    (tmp_path / "v").mkdir()
    (tmp_path / "v/iden_split.txt").touch()

    def superb(**paths):
        *_, last = printed(_next_steps(tmp_path, CorpusPaths(**paths)))
        return last if last.startswith("s3prl-ekd superb ") else None

    assert superb(**corpora, lexicon=[tmp_path]) == "s3prl-ekd superb student.safetensors"
    assert superb(**corpora).endswith(" --tasks sid er asr")
    assert superb(librispeech=tmp_path).endswith(" --tasks asr")
    text = _next_steps(tmp_path, CorpusPaths(**corpora))
    assert f" {tmp_path}/v/iden_split.txt " in text
    (line,) = [x for x in printed(text) if "librispeech" in x and "prepare" in x]
    assert "--lexicon" not in line  # a file that may not be there


def test_after_init_the_chosen_experiments_are_run(tmp_path, capsys):
    """Each config of the printed commands is in the folder."""
    write_librispeech_names(tmp_path / "corpus", "train-clean-100", "dev-clean", "test-clean")
    folder, names = tmp_path / "work", ("three_average", "s3prl_distiller", "dp_hubert")
    options = [option for name in names for option in ("-x", name)]
    options += ["--librispeech", str(tmp_path / "corpus")]
    assert cli.main(["init", str(folder), *options]) == 0
    commands = [shlex.split(line) for line in printed(capsys.readouterr().out)]
    runs = [argv for argv in commands if argv[0] == "run_pretrain.py"]
    assert [argv[argv.index("-n") + 1] for argv in runs] == [*names]
    for argv, name in zip(runs, names, strict=True):
        assert argv[argv.index("-g") + 1] == f"pretrain/ekd/experiments/{name}.yaml"
        for path in (argv[i + 1] for i, option in enumerate(argv) if option in ("-c", "-g")):
            assert (folder / path).is_file(), path
    assert ["-c" in argv for argv in runs] == [False, True, True]
    assert [argv[1] for argv in commands if argv[1] in ("export", "prune")] == [
        "export", "export", "prune",
    ]  # fmt: skip
    assert commands[-1][1:4] == [
        "superb",
        "three_average.safetensors",
        "s3prl_distiller.safetensors",
    ]


@pytest.mark.parametrize("name, text", experiments().items(), ids=list(experiments()))
def test_the_first_lines_of_an_experiment_have_its_command(name, text):
    """Those of the full experiments are written by hand."""
    head = text.partition("\n\n")[0].splitlines()
    command = " ".join(line.lstrip("# ").rstrip("\\ ") for line in head)
    assert " ".join(Experiment(name, text).run()) in command


def printed(output: str) -> list[str]:
    """The commands after ``next:``, on its line or on the indented lines after it."""
    commands, listing = [], False
    for line in output.splitlines():
        if "next: " in line and not line.endswith(":"):
            commands.append(line.partition("next: ")[2])
        listing = line.endswith(("next:", "type:")) or (listing and line.startswith("  "))
        if listing and line.startswith("  "):
            commands.append(line.strip())
    return commands


def test_commands_after_next():
    lines = "kept a\n\nnext: cd x, then type:\n  one two\n  three\n\n  no\nok; next: four\n"
    assert printed(lines) == ["one two", "three", "four"]


@pytest.mark.slow
def test_printed_commands_run_as_typed(tmp_path):
    """Each command that a command prints after ``next:`` is typed, from ``init`` to scores."""
    machine, typed = Machine(tmp_path), []
    corpus = "/data/LibriSpeech"
    open_commands = [
        f"s3prl-ekd init . --librispeech {corpus}",
        "s3prl-ekd merge student.safetensors student.safetensors --assume-same-start -o m.pt",
        f"s3prl-ekd group-layers pretrain/ekd/config_model.yaml --data {corpus} -o grouped.yaml",
    ]
    while open_commands:
        command = open_commands.pop(0)
        if command in typed:
            continue
        typed.append(command)
        for root in ("pretrain/my_student", "downstream/my_asr"):  # of the same name before
            if f"-n {root.partition('/')[2]}" in command:
                shutil.rmtree(machine.folder / "result" / root, ignore_errors=True)
        dry = " --dry-run" if command.startswith("s3prl-ekd superb") else ""
        open_commands = printed(machine.type(command + dry)) + open_commands
    scripts = [command.split()[0] for command in typed]
    assert scripts.count("run_pretrain.py") == 2 and scripts.count("run_downstream.py") == 2
    assert len(typed) == 10, typed
