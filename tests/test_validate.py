"""`s3prl-ekd validate`: a whole package passes, and each broken one fails where it is broken."""

import inspect
import json
import os
import pickle
import re
import shutil
import time
from importlib.util import module_from_spec, spec_from_file_location

import pytest
import torch
from s3prl_ekd.upstream.expert import UpstreamExpert

from s3prl_ekd import cli
from s3prl_ekd.distill import student_forward
from s3prl_ekd.distill.aggregation import TargetSpec
from s3prl_ekd.distill.heads import PredictionHeads
from s3prl_ekd.distill.settings import StudentSettings
from s3prl_ekd.distill.student import Student
from s3prl_ekd.export.hidden_set import sandbox as process
from s3prl_ekd.export.hidden_set.package import package_contents, write_package
from s3prl_ekd.export.hidden_set.runtime_checks import distance
from s3prl_ekd.student_file import LoadedStudent, load_student, write_student

from .conftest import STUDENT, command, write_configs

# Put behind a good expert.py: a subclass of the expert that spoils one thing.
SPOILT = """

_Good = UpstreamExpert


class UpstreamExpert(_Good):
    def forward(self, wavs):
        out = _Good.forward(self, wavs)
        states = out["hidden_states"]
        {}
"""
BROKEN = {
    "a tuple": ("lists", 'return {"hidden_states": tuple(states)}'),
    "no dict": ("forward", "return states"),
    "one tensor": ("lists", 'return {"hidden_states": states[-1]}'),
    "a nested task": ("lists", 'return {"hidden_states": states, "PR": states[-1]}'),
    "another shape": ("lists", 'return {"hidden_states": states + [states[0][:, :-1]]}'),
    "two dimensions": ("lists", 'return {"hidden_states": [s[0] for s in states]}'),
    "too few frames": ("frames", 'return {"hidden_states": [s[:, :-9] for s in states]}'),
    "not a number": ("values", 'return {"hidden_states": [s * float("nan") for s in states]}'),
    "infinite": ("values", 'return {"hidden_states": [s / 0 for s in states]}'),
    "half precision": ("values", 'return {"hidden_states": [s.half() for s in states]}'),
    "chance": ("repeat", 'return {"hidden_states": [s + torch.rand_like(s) for s in states]}'),
    "fewer layers in train mode": (
        "modes",
        'return {"hidden_states": states[1:] if self.training else states}',
    ),
    "order": (
        "order",
        'return {"hidden_states": [s + torch.arange(len(wavs))[:, None, None] for s in states]}',
    ),
    "only short ones": (
        "35 s",
        'assert max(map(len, wavs)) < 300000\n        return {"hidden_states": states}',
    ),
    "only long ones": (
        "0.05 s",
        'assert min(map(len, wavs)) > 900\n        return {"hidden_states": states}',
    ),
}
SOURCE = {
    "an s3prl import": ("import", lambda text: f"import s3prl\n{text}"),
    "a fairseq import": ("import", lambda text: f"import fairseq\n{text}"),
    "no keywords": (
        "keywords",
        lambda text: text + SPOILT.format("return out").replace(
            "    def forward",
            "    def __init__(self, ckpt, upstream_feature_selection='hidden_states'):\n"
            "        _Good.__init__(self, ckpt)\n\n    def forward",
        ),
    ),
    "a rate that is no integer": (
        "rates",
        lambda text: text + SPOILT.format("return out")
        + "\n    def get_downsample_rates(self, key):\n        return 320.0\n",
    ),
    "new syntax": (
        "syntax",
        lambda text: text + "\n\ndef kind(x):\n    match x:\n        case _:\n            pass\n",
    ),
    "a mistake": ("syntax", lambda text: text + "\n\ndef broken(:\n"),
}  # fmt: skip


@pytest.fixture(scope="module")
def student_file(tmp_path_factory):
    torch.manual_seed(7)
    student = Student(StudentSettings(**STUDENT))
    targets = {"hubert": TargetSpec(2, (48,))}
    heads = PredictionHeads(student.width, targets, "split")
    path = tmp_path_factory.mktemp("student") / "student.pt"
    write_student(LoadedStudent(student.eval(), heads.eval(), targets, {"step": 1}), path)
    return path


@pytest.fixture(scope="module")
def good(student_file):
    folder = student_file.parent / "good"
    words = [student_file, "-o", folder, "--data", "my own speech"]
    command("export", "superb", *words, cwd=student_file.parent)
    assert "- data: my own speech\n" in (folder / "README.md").read_text()
    return folder


def validate(folder) -> dict[str, str]:
    """Status of each check, by name, and the exit code under ``code``."""
    out = folder.parent / f"{folder.name}.json"
    code = cli.main(["validate", str(folder), "--json", str(out)])
    checks = json.loads(out.read_text())["checks"]
    return {**{check["name"]: check["status"] for check in checks}, "code": code}


def statuses(folder) -> dict[str, str]:
    """Status of each check, by name; MACs are counted over one utterance, to save time."""
    outcomes, _ = process.validate(folder, {"short": [16_000]})
    return {outcome.name: outcome.status for outcome in outcomes}


def load_package(folder):
    """The package's model, its module not left behind."""
    spec = spec_from_file_location("package_expert", folder / "expert.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.UpstreamExpert(str(folder / "model.pt"), model_config=None, refresh=False).eval()


def test_a_good_one_passes_and_equals_the_student(good, student_file, waves):
    found = validate(good)
    assert found["code"] == 0 and "fail" not in found.values()
    package = load_package(good)
    ours = UpstreamExpert(student_file).eval()
    with torch.no_grad():
        theirs, mine = package(waves)["hidden_states"], ours(waves)["hidden_states_and_heads"]
    assert len(theirs) == len(mine) == 3 + 2
    for one, other in zip(theirs, mine, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


AS_WIDE = "[(48,10,5)] + [(48,3,2)] * 4 + [(48,2,2)] * 2"
OTHER_SIZES = {
    "norm first": {"layer_norm_first": True, "activation_fn": "relu"},
    "layer norm": {"extractor_mode": "layer_norm", "conv_pos": 15, "encoder_layers": 1},
    "no projection": {"extractor_conv_feature_layers": AS_WIDE},
}


@pytest.mark.parametrize("heads", ["split", "linear", None])
@pytest.mark.parametrize("kind", OTHER_SIZES)
def test_packages_of_other_students_equal_them(tmp_path, waves, kind, heads):
    student = Student(StudentSettings(**{**STUDENT, **OTHER_SIZES[kind]})).eval()
    targets = {"hubert": TargetSpec(2, (48,))} if heads else {}
    head = PredictionHeads(student.width, targets, heads).eval() if heads else None
    loaded = LoadedStudent(student, head, targets, {})
    write_student(loaded, tmp_path / "student.pt")
    write_package(package_contents(loaded, heads is not None), "", tmp_path)
    ours = UpstreamExpert(tmp_path / "student.pt").eval()
    with torch.no_grad():
        theirs = load_package(tmp_path)(waves)["hidden_states"]
        mine = ours(waves)["hidden_states_and_heads" if heads else "hidden_states"]
    assert len(theirs) == len(mine)
    for one, other in zip(theirs, mine, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_a_package_has_the_code_of_the_students_forward(good):
    code = inspect.getsource(student_forward).partition("import annotations\n")[2]
    source = (good / "expert.py").read_text()
    assert code.strip() in source and "s3prl_ekd import" not in source and "from ." not in source


@pytest.mark.parametrize("name", [*BROKEN, *SOURCE])
def test_a_broken_one_fails_where_it_is_broken(good, tmp_path, name):
    folder = tmp_path / "package"
    shutil.copytree(good, folder)
    source = (folder / "expert.py").read_text()
    if name in BROKEN:
        check, line = BROKEN[name]
        source += SPOILT.format(line)
    else:
        check, change = SOURCE[name]
        source = change(source)
    (folder / "expert.py").write_text(source)
    found = statuses(folder)
    assert found[check] == "fail", found


def test_code_in_the_weights_is_never_run(good, tmp_path):
    class Code:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    folder = tmp_path / "package"
    shutil.copytree(good, folder)
    torch.save({"weights": Code()}, folder / "model.pt", pickle_module=pickle)
    found = validate(folder)
    assert found["code"] == 1 and found["weights"] == "fail"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("missing", ["model.pt", "expert.py"])
def test_a_missing_file(good, tmp_path, missing):
    folder = tmp_path / "package"
    shutil.copytree(good, folder)
    (folder / missing).unlink()
    found = validate(folder)
    assert found["code"] == 1 and found["files"] == "fail"


def test_no_folder_is_a_sentence(tmp_path):
    done = command("validate", tmp_path / "nothing", cwd=tmp_path, check=False)
    assert done.returncode == 2 and done.stderr.count("error: ") == 1


# Students of other kinds: their settings, the layers and widths of a head, and its kind.
KINDS = {
    "layer norm in the extractor": ({"extractor_mode": "layer_norm"}, (2, (48,)), "split"),
    "layer norm first": ({"layer_norm_first": True}, (2, (48,)), "split"),
    "layer norm first, no heads": ({"layer_norm_first": True}, None, "split"),
    "both": (
        {"extractor_mode": "layer_norm", "layer_norm_first": True, "activation_fn": "relu"},
        (3, (48, 48)),
        "linear",
    ),
    "a single layer": ({"conv_pos": 15}, (1, (48,)), "split"),
    "a single layer, linear": ({}, (1, (48,)), "linear"),
    "two teachers in one": ({"encoder_layers": 1}, (2, (48, 48)), "split"),
    "no projection": (
        {"extractor_conv_feature_layers": "[(48,10,5)] + [(48,3,2)] * 4"},
        None,
        "split",
    ),
}


def make_student(path, kind: str) -> int:
    """A student file, its weights all shaken so that no norm or bias is without effect; returns how
    many hidden states its package gives."""
    changes, target, head_kind = KINDS[kind]
    torch.manual_seed(len(kind))
    student = Student(StudentSettings(**{**STUDENT, **changes}))
    targets = {"hubert": TargetSpec(*target)} if target else {}
    heads = PredictionHeads(student.width, targets, head_kind) if target else None
    with torch.no_grad():
        for module in filter(None, (student, heads)):
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    write_student(LoadedStudent(student, heads, targets, {"step": 1}), path)
    layers, parts = target or (0, ())
    return student.settings.encoder_layers + 1 + layers * len(parts)


def make_package(folder, kind: str) -> int:
    """``student.pt`` and ``package/`` of a kind; returns how many hidden states it gives."""
    count = make_student(folder / "student.pt", kind)
    loaded = load_student(folder / "student.pt")
    contents = package_contents(loaded, keep_heads=loaded.heads is not None)
    (folder / "package").mkdir()
    write_package(contents, "a card", folder / "package")
    return count


@pytest.mark.parametrize("kind", KINDS)
def test_other_students_packages_equal_them(tmp_path, waves, kind):
    count = make_package(tmp_path, kind)
    with torch.no_grad():
        theirs = load_package(tmp_path / "package")(waves)["hidden_states"]
        mine = UpstreamExpert(tmp_path / "student.pt").eval()(waves)
    mine = mine.get("hidden_states_and_heads", mine["hidden_states"])
    assert len(theirs) == len(mine) == count
    for one, other in zip(theirs, mine, strict=True):
        scale = max(1.0, other.abs().max().item())
        torch.testing.assert_close(one, other, atol=1e-6 * scale, rtol=0)


@pytest.mark.parametrize("kind", ["both", "layer norm first, no heads"])
def test_other_students_packages_are_valid(tmp_path, kind):
    make_package(tmp_path, kind)
    outcomes, cost = process.validate(tmp_path / "package", {"short": [16_000]})
    found = {outcome.name: outcome for outcome in outcomes}
    assert {outcome.status for outcome in outcomes} <= {"pass", "skip"}, outcomes
    assert [name for name in found if found[name].status == "skip"] in (["gpu"], [])
    assert cost["unused"] == 0 and found["parameters"].reason.endswith("all of them used")
    padding = found["batching"].reason
    if kind == "both":  # no normalisation over time
        assert "the same, to" in padding
    else:
        numbers = re.search(r"up to (\S+) deviations, (\S+) on average", padding).groups()
        assert 0 < float(numbers[1]) < float(numbers[0])


def test_differences_by_hand():
    first, second = torch.tensor([-2.0, 2.0]), torch.tensor([-2.0, 5.0])  # the deviation is 2
    assert distance(first, second) == 1.5 and distance(first, second, torch.mean) == 0.75
    assert distance(first, second[:1]) == distance(first, first * float("nan")) == float("inf")


def test_a_package_that_hangs_is_ended(good, tmp_path, capsys):
    """The check that it hangs in fails, the later ones are skipped, and no process is left."""
    folder = tmp_path / "package"
    shutil.copytree(good, folder)
    hang = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(__import__('os').getpid()))"
    hang += "\n        __import__('time').sleep(1000)"
    with open(folder / "expert.py", "a") as file:
        file.write(SPOILT.format(hang))
    start = time.monotonic()
    out = tmp_path / "report.json"
    assert cli.main(["validate", str(folder), "--timeout", "2", "--json", str(out)]) == 1
    assert time.monotonic() - start < 300
    said = capsys.readouterr().out
    assert said.count("FAIL") == 1 and "failed: forward" in said
    assert "FAIL * forward       it was not done within 2 s and was ended\n" in said
    found = {check["name"]: check for check in json.loads(out.read_text())["checks"]}
    assert found["keywords"]["status"] == "pass" and found["macs"]["status"] == "skip"
    assert found["lists"]["reason"] == "the process did not come to it: see forward"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize("words", [("--timeout", "0"), ("--timeout", "nan"), ("--json", ".")])
def test_mistakes_are_sentences(good, capsys, words):
    with pytest.raises(SystemExit) as stop:
        cli.main(["validate", str(good), *words])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1


def test_the_card_of_a_run_says_what_it_learned_from(tmp_path, teachers, corpus):
    """Data and teachers stand in the run's checkpoint, and in a student file that is made of it;
    folders of the machine are left out."""
    write_configs(tmp_path, teachers, corpus)
    command("init", ".", cwd=tmp_path)
    words = ["-u", "ekd", "-n", "run", "-g", "model.yaml", "-c", "runner.yaml", "--device", "cpu"]
    command("run_pretrain.py", *words, cwd=tmp_path)
    run = tmp_path / "result" / "pretrain" / "run"
    assert cli.main(["export", "superb", str(run), "-o", str(tmp_path / "package")]) == 0
    card = (tmp_path / "package" / "README.md").read_text()
    assert "- data: train (batches of 3 utterances)\n" in card
    for name, file in (("hubert", "hubert"), ("robust", "robust"), ("wavlm", "wavlm")):
        assert f"- teacher `{name}`: `{file}.pt`, layers [2, 4]\n" in card
    assert "- aggregation of the teachers: separate\n" in card and "- updates: 6\n" in card
    assert str(corpus.parent) not in card and str(tmp_path) not in card
    file, again = tmp_path / "student.pt", tmp_path / "again"
    assert cli.main(["export", "student", str(run), "-o", str(file)]) == 0
    assert cli.main(["export", "superb", str(file), "-o", str(again)]) == 0
    assert (again / "README.md").read_text() == card.replace("# package", "# again")
    words = ["--force", "--data", "mine, 3 hours"]
    assert cli.main(["export", "superb", str(file), "-o", str(again), *words]) == 0
    card = (again / "README.md").read_text()
    assert card.count("- data: ") == 1 and "- data: mine, 3 hours\n" in card
    assert cli.main(["export", "hf", str(file), "-o", str(tmp_path / "hf")]) == 0
    assert "- data: train (batches of 3 utterances)\n" in (tmp_path / "hf/README.md").read_text()
