"""Start-up: what commands, checks of mistakes and ``s3prl.hub`` import; facts read from source."""

from __future__ import annotations

import argparse
import importlib
import json

import pytest
import torch

from s3prl_ekd.analysis.layers import LINKAGES, SIMILARITIES
from s3prl_ekd.cli import COMMANDS
from s3prl_ekd.commands import group_layers
from s3prl_ekd.compat import source
from s3prl_ekd.errors import SetupError
from s3prl_ekd.registration import ENTRIES, register
from s3prl_ekd.request import DownstreamRequest, check_passthrough
from s3prl_ekd.teachers.names import FAMILIES, names_by_family
from tools.bench import startup

from .conftest import run_python

# Runs commands one after another; prints for each its exit code, the heavy modules imported since
# the previous one, and the last line of stderr.
IN_TURN = """
import contextlib, io, json, os, sys
from s3prl_ekd.__main__ import main

os.chdir(sys.argv[1])
results, heavy = [], {"torch", "s3prl", "transformers", "scipy"}
for text in sys.argv[2:]:
    sys.argv, before, code = ["s3prl-ekd", *text.split()], set(sys.modules), None
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main()
        except SystemExit as stop:
            code = stop.code
    lines = err.getvalue().strip().splitlines()
    results.append((code, sorted(heavy & set(sys.modules) - before), (lines or [""])[-1]))
print(json.dumps(results))
"""
# Words of the messages about some of the mistakes.
EXPECTED = {
    "cost -u hubrt_base": "hubrt_base",
    "features missing.pt . -o features.safetensors": "missing.pt: no such file",
    "run_pretrain.py -u ekd -n x --sed 1": "--seed",
    "run_pretrain.py -u ekdd -n x": "-u ekdd: no such folder in pretrain/: use ekd",
    "run_pretrain.py -u ekd -n x -g unknown_teacher.yaml": "did you mean hubert_base",
    "run_pretrain.py -u ekd -n x": "libri_root: no such folder",
    "run_downstream.py -m trian -u ekd_student -d ctc -n x": "-m trian",
    "run_downstream.py -m train -u ekd_studnet -d emotion -c recipe.yaml -n x": "mean ekd_student",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("startup") / "folder"
    startup.prepare_folder(startup.sys.executable, path)
    return path


def test_help_and_mistakes_import_neither_torch_nor_s3prl(folder):
    helps = [f"{name} --help" for name in COMMANDS]
    results = json.loads(run_python(IN_TURN, str(folder), *helps, *startup.MISTAKES))
    for text, (code, imported, message) in zip([*helps, *startup.MISTAKES], results, strict=True):
        assert imported == [], text
        assert code == (2 if text in startup.MISTAKES else 0), (text, message)
        assert EXPECTED.get(text, "") in message, text


def test_missing_tables_upstream_and_student_are_found_before_torch_is_imported(folder, tmp_path):
    (tmp_path / "audio").mkdir()
    corpus = f"-o config.pretrain_expert.datarc.libri_root='{tmp_path}/audio'"
    emotion = "run_downstream.py -m train -d emotion -n x -c emotion.yaml"
    (folder / "emotion.yaml").write_text("downstream_expert: {datarc: {root: .}}")
    mistakes = {
        f"run_pretrain.py -u ekd -n x {corpus}": "length table",
        emotion: "add -u ekd_student",
        f"{emotion} -u ekd_student": "add -k STUDENT",
    }
    results = json.loads(run_python(IN_TURN, str(folder), *mistakes))
    for (code, imported, message), words in zip(results, mistakes.values(), strict=True):
        assert (code, imported) == (2, []) and words in message


HUGGING_FACE = """
import json, sys
import torch
from s3prl_ekd.registration import register

register()
from s3prl import hub

report = {"registered": "transformers" in sys.modules, "options": hub.options()}
wave = torch.linspace(-1, 1, 4000).sin()
for kind in ("hubert", "wav2vec2"):
    upstream = getattr(hub, f"hf_{kind}_custom")(sys.argv[1] + kind)
    import transformers

    expert = sys.modules[f"s3prl.upstream.hf_{kind}.expert"]
    name = {"hubert": "HubertModel", "wav2vec2": "Wav2Vec2Model"}[kind]
    model = getattr(transformers, name).from_pretrained(sys.argv[1] + kind).eval()
    with torch.no_grad():
        states = upstream.eval()([wave])["hidden_states"]
        wanted = model(((wave - wave.mean()) / (wave.var(correction=0) + 1e-7).sqrt())[None],
                       output_hidden_states=True).hidden_states
    report[kind] = [
        type(upstream) is expert.UpstreamExpert and type(upstream.model) is type(model),
        max((a - b).abs().max().item() for a, b in zip(states, wanted, strict=True)),
        len(states),
    ]
print(json.dumps(report))
"""


def test_the_hub_imports_transformers_when_a_hugging_face_upstream_is_built(tmp_path):
    from transformers import (
        HubertConfig,
        HubertModel,
        Wav2Vec2Config,
        Wav2Vec2FeatureExtractor,
        Wav2Vec2Model,
    )

    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "conv_dim": [8] * 7,
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
    }
    torch.manual_seed(0)
    for model in (HubertModel(HubertConfig(**sizes)), Wav2Vec2Model(Wav2Vec2Config(**sizes))):
        path = tmp_path / model.config.model_type
        model.save_pretrained(path)
        Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(path)
    report = json.loads(run_python(HUGGING_FACE, f"{tmp_path}/"))
    assert report["registered"] is False
    assert {"hf_hubert_custom", "hf_wav2vec2_custom"} <= set(report["options"])
    for kind in ("hubert", "wav2vec2"):
        real, difference, count = report[kind]
        assert real and difference < 1e-4 and count == 3


def test_names_read_from_source_are_those_that_imports_give():
    register()
    from s3prl import hub

    assert source.own_upstream_names() == set(ENTRIES)
    assert all(source.may_be_upstream(name) for name in hub.options())
    assert not source.may_be_upstream("hubrt_base") and not source.may_be_upstream("ubert")
    for family in FAMILIES:
        module = importlib.import_module(f"s3prl.upstream.{family}.hubconf")
        functions = {
            name
            for name, value in vars(module).items()
            if callable(value) and value.__module__ == module.__name__ and name[0] != "_"
        }
        assert source.upstream_names(family) == functions and functions
        paths = ("_local", "_url", "_custom", "_gdriveid")
        assert set(names_by_family()[family]) == {n for n in functions if not n.endswith(paths)}


@pytest.mark.parametrize("script", ["run_pretrain", "run_downstream"])
def test_options_read_from_a_script_are_those_of_its_parser(script, folder, monkeypatch):
    class Parsed(Exception):
        pass

    def parse_args(parser):
        raise Parsed({text for action in parser._actions for text in action.option_strings})

    from s3prl_ekd.launch import import_script

    monkeypatch.chdir(folder)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(Parsed) as parsed:
        getattr(import_script(script), f"get_{script.removeprefix('run_')}_args")()
    assert source.script_options(f"{script}.py") == parsed.value.args[0] - {"-h", "--help"}


@pytest.mark.parametrize(
    "argv", [["--verbose"], ["--upstream_m"], ["-l", "-1"], ["-f", "-r"], ["--hub=torch"]]
)
def test_options_of_s3prl_are_passed_on(argv):
    request = DownstreamRequest.parse(argv)
    check_passthrough(request)
    assert request.argv() == argv


@pytest.mark.parametrize(("argv", "parsed"), [("-l1", ["-l", "1"]), ("-rf", ["-f", "-r"])])
def test_options_in_one_word(argv, parsed):
    assert DownstreamRequest.parse([argv]).argv() == parsed


@pytest.mark.parametrize(
    ("argument", "guess"),
    [
        ("--verbos1", "--verbose"),
        ("--nois=x", "--noise"),
        ("-z", "-h"),
        ("--trust-cheque", "--trust-checkpoint"),
    ],
)
def test_unknown_options_are_refused(argument, guess):
    with pytest.raises(SetupError) as raised:
        check_passthrough(DownstreamRequest.parse([argument]))
    assert guess in str(raised.value)


def test_group_layers_offers_what_the_analysis_has():
    parser = argparse.ArgumentParser()
    group_layers.configure(parser)
    choices = {action.dest: action.choices for action in parser._actions}
    assert set(choices["similarity"]) == set(SIMILARITIES) and choices["linkage"] == LINKAGES


@pytest.mark.slow
def test_table_of_the_startup(capsys):
    argv = ["--only", "demmo", "--turns", "2", "--against", startup.sys.executable]
    assert startup.main(argv) == 0
    row = capsys.readouterr().out.splitlines()[-1]
    name, seconds, megabytes, before, _, ratio = [c.strip() for c in row.strip("|").split("|")]
    assert name == "`s3prl-ekd demmo`" and 0 < float(seconds) < 2 and float(megabytes) > 5
    assert float(before) > 0 and 0.2 < float(ratio.split()[0]) < 5
