"""Commands and experiments of version 0.1: the old name does the same, with one warning."""

import re

import pytest

from s3prl_ekd import cli

COMMANDS = {
    "lengths": "length-tables",
    "matrix": "sweep",
    "predictions": "predict-zip",
    "layers": "group-layers",
    "units": "fit-units",
}


@pytest.fixture
def run(capsys, caplog):
    """Run a command: exit code, standard output and warnings about names."""

    def call(*argv):
        caplog.clear()
        try:
            code = cli.main(list(argv))
        except SystemExit as stop:
            code = stop.code
        messages = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        return code, capsys.readouterr().out, [text for text in messages if "`" in text]

    return call


def names(warning):
    return re.findall("`([^`]+)`", warning)


@pytest.mark.parametrize("old", COMMANDS)
def test_help_of_an_old_command_is_that_of_the_new_one(old, run):
    code, text, (warning,) = run(old, "-h")
    assert (code, text, []) == run(COMMANDS[old], "-h")
    assert names(warning) == [old, COMMANDS[old]]


@pytest.mark.parametrize("old", COMMANDS)
def test_an_old_command_is_listed_under_the_new_name_only(old, run):
    listed = re.findall(r"^ {4}(\S+)", run("--help")[1], re.M)
    assert COMMANDS[old] in listed and old not in listed


def test_an_old_command_runs_with_one_warning(tmp_path, corpus, run):
    tables = {}
    for command in ("lengths", "length-tables"):
        out = tmp_path / command
        code, _, warnings = run(command, str(corpus / "audio"), "-o", str(out), "--single")
        assert code == 0
        tables[command] = (warnings, {p.name: p.read_bytes() for p in out.glob("*.csv")})
    (warning,), old = tables["lengths"]
    warnings, new = tables["length-tables"]
    assert names(warning) == ["lengths", "length-tables"]
    assert not warnings and old == new and new


@pytest.mark.parametrize(
    "old, new", [("reference", "s3prl_distiller"), ("three_standardised", "three_phi_s")]
)
@pytest.mark.parametrize("size", [[], ["--tiny"]])
def test_old_names_of_experiments(tmp_path, old, new, size, run):
    code, output, (warning,) = run("init", str(tmp_path), "-x", old, *size)
    folder = "tiny" if size else "experiments"
    assert code == 0 and (tmp_path / f"pretrain/ekd/{folder}/{new}.yaml").is_file()
    assert names(warning) == [old, new]
