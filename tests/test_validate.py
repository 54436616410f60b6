"""`s3prl-ekd validate`: a correct package passes, a broken one fails the check for its fault."""

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
from s3prl_ekd.distill.settings import HeadSettings
from s3prl_ekd.distill.student import Student
from s3prl_ekd.distill.student_settings import StudentSettings
from s3prl_ekd.export.hidden_set import sandbox
from s3prl_ekd.export.hidden_set.package import package_contents, write_package
from s3prl_ekd.export.hidden_set.runtime_checks import distance
from s3prl_ekd.student_file import LoadedStudent, load_student, write_student

from .conftest import STUDENT, command

# Appended to a correct expert.py: a subclass that breaks one thing.
SUBCLASS = """

_Good = UpstreamExpert


class UpstreamExpert(_Good):
    def forward(self, wavs):
        out = _Good.forward(self, wavs)
        states = out["hidden_states"]
        {}
"""
# Fault -> the check that must fail, and the end of forward.
BROKEN_FORWARD = {
    "a tuple": ("lists", 'return {"hidden_states": tuple(states)}'),
    "a list instead of a dict": ("forward", "return states"),
    "a tensor instead of a list": ("lists", 'return {"hidden_states": states[-1]}'),
    "a tensor for a task": ("lists", 'return {"hidden_states": states, "PR": states[-1]}'),
    "different shapes": ("lists", 'return {"hidden_states": states + [states[0][:, :-1]]}'),
    "two dimensions": ("lists", 'return {"hidden_states": [s[0] for s in states]}'),
    "too few frames": ("frames", 'return {"hidden_states": [s[:, :-9] for s in states]}'),
    "NaN": ("values", 'return {"hidden_states": [s * float("nan") for s in states]}'),
    "infinite": ("values", 'return {"hidden_states": [s / 0 for s in states]}'),
    "half precision": ("values", 'return {"hidden_states": [s.half() for s in states]}'),
    "randomness": ("repeat", 'return {"hidden_states": [s + torch.rand_like(s) for s in states]}'),
    "fewer layers in train mode": (
        "modes",
        'return {"hidden_states": states[1:] if self.training else states}',
    ),
    "output depends on the order": (
        "order",
        'return {"hidden_states": [s + torch.arange(len(wavs))[:, None, None] for s in states]}',
    ),
    "long waveforms fail": (
        "35 s",
        'assert max(map(len, wavs)) < 300000\n        return {"hidden_states": states}',
    ),
    "short waveforms fail": (
        "0.05 s",
        'assert min(map(len, wavs)) > 900\n        return {"hidden_states": states}',
    ),
}
# Fault -> the check that must fail, and a function that changes expert.py.
BROKEN_SOURCE = {
    "an s3prl import": ("import", lambda text: f"import s3prl\n{text}"),
    "a fairseq import": ("import", lambda text: f"import fairseq\n{text}"),
    "no keyword arguments": (
        "keywords",
        lambda text: text + SUBCLASS.format("return out").replace(
            "    def forward",
            "    def __init__(self, ckpt, upstream_feature_selection='hidden_states'):\n"
            "        _Good.__init__(self, ckpt)\n\n    def forward",
        ),
    ),
    "a float as rate": (
        "rates",
        lambda text: text + SUBCLASS.format("return out")
        + "\n    def get_downsample_rates(self, key):\n        return 320.0\n",
    ),
    "syntax of Python 3.10": (
        "syntax",
        lambda text: text + "\n\ndef kind(x):\n    match x:\n        case _:\n            pass\n",
    ),
    "a syntax error": ("syntax", lambda text: text + "\n\ndef broken(:\n"),
}  # fmt: skip


@pytest.fixture(scope="module")
def student_file(tmp_path_factory):
    torch.manual_seed(7)
    student = Student(StudentSettings(**STUDENT))
    targets = {"hubert": TargetSpec(2, (48,))}
    heads = PredictionHeads(student.width, targets)
    path = tmp_path_factory.mktemp("student") / "student.pt"
    write_student(LoadedStudent(student.eval(), heads.eval(), targets, {"step": 1}), path)
    return path


@pytest.fixture(scope="module")
def package(student_file):
    folder = student_file.parent / "package"
    argv = [student_file, "-o", folder, "--data", "my own speech"]
    command("export", "superb", *argv, cwd=student_file.parent)
    assert "- data: my own speech\n" in (folder / "README.md").read_text()
    return folder


def validate(folder) -> dict[str, str]:
    """Run the command; return the status of each check by name, and the exit code as ``code``."""
    out = folder.parent / f"{folder.name}.json"
    code = cli.main(["validate", str(folder), "--json", str(out)])
    checks = json.loads(out.read_text())["checks"]
    return {**{check["name"]: check["status"] for check in checks}, "code": code}


def statuses(folder) -> dict[str, str]:
    """Status of each check by name; MACs are counted over one utterance to save time."""
    outcomes, _ = sandbox.validate(folder, {"short": [16_000]})
    return {outcome.name: outcome.status for outcome in outcomes}


def load_package(folder):
    """The package's model, without adding its module to ``sys.modules``."""
    spec = spec_from_file_location("package_expert", folder / "expert.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.UpstreamExpert(str(folder / "model.pt"), model_config=None, refresh=False).eval()


def test_a_package_passes_and_equals_the_student(package, student_file, waves):
    results = validate(package)
    assert results["code"] == 0 and "fail" not in results.values()
    expert, upstream = load_package(package), UpstreamExpert(student_file).eval()
    with torch.no_grad():
        states = expert(waves)["hidden_states"]
        expected = upstream(waves)["hidden_states_and_heads"]
    assert len(states) == len(expected) == 3 + 2
    for state, reference in zip(states, expected, strict=True):
        torch.testing.assert_close(state, reference, atol=1e-5, rtol=0)


def test_a_package_contains_the_code_of_student_forward(package):
    code = inspect.getsource(student_forward).partition("import annotations\n")[2]
    source = (package / "expert.py").read_text()
    assert code.strip() in source and "s3prl_ekd import" not in source and "from ." not in source


@pytest.mark.parametrize("fault", [*BROKEN_FORWARD, *BROKEN_SOURCE])
def test_a_broken_package_fails_the_check_for_its_fault(package, tmp_path, fault):
    folder = tmp_path / "package"
    shutil.copytree(package, folder)
    source = (folder / "expert.py").read_text()
    if fault in BROKEN_FORWARD:
        check, line = BROKEN_FORWARD[fault]
        source += SUBCLASS.format(line)
    else:
        check, change = BROKEN_SOURCE[fault]
        source = change(source)
    (folder / "expert.py").write_text(source)
    results = statuses(folder)
    assert results[check] == "fail", results


def test_code_in_model_pt_is_not_run(package, tmp_path):
    class Code:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    folder = tmp_path / "package"
    shutil.copytree(package, folder)
    torch.save({"weights": Code()}, folder / "model.pt", pickle_module=pickle)
    results = validate(folder)
    assert results["code"] == 1 and results["weights"] == "fail"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("missing", ["model.pt", "expert.py"])
def test_a_missing_file(package, tmp_path, missing):
    folder = tmp_path / "package"
    shutil.copytree(package, folder)
    (folder / missing).unlink()
    results = validate(folder)
    assert results["code"] == 1 and results["files"] == "fail"


def test_a_missing_folder_is_an_error(tmp_path):
    process = command("validate", tmp_path / "missing", cwd=tmp_path, check=False)
    assert process.returncode == 2 and process.stderr.count("error: ") == 1
    assert str(tmp_path / "missing") in process.stderr


# Name -> settings of the student, layers and widths of the head (or None), kind of the head.
STUDENTS = {
    "layer norm in the extractor": ({"extractor_mode": "layer_norm"}, (2, (48,)), "split"),
    "layer norm first": ({"layer_norm_first": True}, (2, (48,)), "split"),
    "layer norm first, no heads": ({"layer_norm_first": True}, None, "split"),
    "layer norms, linear head": (
        {"extractor_mode": "layer_norm", "layer_norm_first": True, "activation_fn": "relu"},
        (3, (48, 48)),
        "linear",
    ),
    "a single target layer": ({"conv_pos": 15}, (1, (48,)), "split"),
    "a single target layer, linear head": ({}, (1, (48,)), "linear"),
    "two teachers in one head": ({"encoder_layers": 1}, (2, (48, 48)), "split"),
    "no projection": (
        {"extractor_conv_feature_layers": "[(48,10,5)] + [(48,3,2)] * 4"},
        None,
        "split",
    ),
}


def make_student(path, name: str) -> int:
    """Write a student file; return the number of hidden states of its package.

    All weights get noise, so that every norm and bias affects the output.
    """
    changes, target, head_kind = STUDENTS[name]
    torch.manual_seed(len(name))
    student = Student(StudentSettings(**{**STUDENT, **changes}))
    targets = {"hubert": TargetSpec(*target)} if target else {}
    heads = (
        PredictionHeads(student.width, targets, HeadSettings(kind=head_kind)) if target else None
    )
    with torch.no_grad():
        for module in filter(None, (student, heads)):
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    write_student(LoadedStudent(student, heads, targets, {"step": 1}), path)
    layers, parts = target or (0, ())
    return student.settings.encoder_layers + 1 + layers * len(parts)


def make_package(folder, name: str) -> int:
    """Write ``student.pt`` and ``package/``; return the number of hidden states."""
    count = make_student(folder / "student.pt", name)
    loaded = load_student(folder / "student.pt")
    contents = package_contents(loaded, keep_heads=loaded.heads is not None)
    (folder / "package").mkdir()
    write_package(contents, "a card", folder / "package")
    return count


@pytest.mark.parametrize("name", STUDENTS)
def test_packages_of_other_students_equal_the_student(tmp_path, waves, name):
    count = make_package(tmp_path, name)
    with torch.no_grad():
        states = load_package(tmp_path / "package")(waves)["hidden_states"]
        outputs = UpstreamExpert(tmp_path / "student.pt").eval()(waves)
    expected = outputs.get("hidden_states_and_heads", outputs["hidden_states"])
    assert len(states) == len(expected) == count
    for state, reference in zip(states, expected, strict=True):
        scale = max(1.0, reference.abs().max().item())
        torch.testing.assert_close(state, reference, atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize("name", ["layer norms, linear head", "layer norm first, no heads"])
def test_packages_of_other_students_are_valid(tmp_path, name):
    make_package(tmp_path, name)
    outcomes, cost = sandbox.validate(tmp_path / "package", {"short": [16_000]})
    results = {outcome.name: outcome for outcome in outcomes}
    assert {outcome.status for outcome in outcomes} <= {"pass", "skip"}, outcomes
    assert [check for check in results if results[check].status == "skip"] in (["gpu"], [])
    assert cost["unused"] == 0 and f"{cost['parameters']:,}" in results["parameters"].reason
    numbers = [
        float(number)
        for number in re.findall(r"\d[\d.]*(?:e[-+]?\d+)?", results["batching"].reason)
    ]
    if name == "layer norms, linear head":  # no normalisation over time
        assert len(numbers) == 1 and numbers[0] < 1e-3
    else:
        maximum, mean = numbers
        assert 0 < mean < maximum


def test_distance():
    first, second = torch.tensor([-2.0, 2.0]), torch.tensor([-2.0, 5.0])  # first.std() is 2
    assert distance(first, second) == 1.5 and distance(first, second, torch.mean) == 0.75
    assert distance(first, second[:1]) == distance(first, first * float("nan")) == float("inf")


def test_a_package_that_hangs_is_killed(package, tmp_path, capsys):
    """The check in which it hangs fails, later ones are skipped, and its process is gone."""
    folder = tmp_path / "package"
    shutil.copytree(package, folder)
    hang = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(__import__('os').getpid()))"
    hang += "\n        __import__('time').sleep(1000)"
    with open(folder / "expert.py", "a") as file:
        file.write(SUBCLASS.format(hang))
    start = time.monotonic()
    out = tmp_path / "report.json"
    assert cli.main(["validate", str(folder), "--timeout", "5", "--json", str(out)]) == 1
    assert time.monotonic() - start < 300
    report = capsys.readouterr().out
    (failed,) = [line for line in report.splitlines() if line.startswith("FAIL")]
    assert failed.split()[:3] == ["FAIL", "*", "forward"] and re.search(r"\b5 s\b", failed)
    assert re.search(r"\b1 failed\b.*\bforward$", report, re.MULTILINE)
    results = {check["name"]: check for check in json.loads(out.read_text())["checks"]}
    assert results["keywords"]["status"] == "pass" and results["macs"]["status"] == "skip"
    assert results["lists"]["status"] == "skip" and "forward" in results["lists"]["reason"]
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize(
    ("options", "part"),
    [(("--timeout", "0"), "--timeout"), (("--timeout", "nan"), "nan"), (("--json", "/"), " /: ")],
)
def test_invalid_options_are_an_error(package, capsys, options, part):
    with pytest.raises(SystemExit) as stop:
        cli.main(["validate", str(package), *options])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert part in error


def test_the_card_names_data_and_teachers(finished_pretraining, corpus, tmp_path):
    """They come from the run's checkpoint or a student file exported from it, without folders."""
    run = finished_pretraining / "result/pretrain/x"
    assert cli.main(["export", "superb", str(run), "-o", str(tmp_path / "package")]) == 0
    card = (tmp_path / "package" / "README.md").read_text()
    assert "- data: train (batches of 3 utterances)\n" in card
    for name, file in (("hubert", "hubert"), ("robust", "robust"), ("wavlm", "wavlm")):
        assert f"- teacher `{name}`: `{file}.pt`, layers [2, 4]\n" in card
    assert "- aggregation of the teachers: separate\n" in card and "- updates: 6\n" in card
    for folder in (corpus.parent, finished_pretraining, tmp_path):
        assert str(folder) not in card
    file, second = tmp_path / "student.pt", tmp_path / "second"
    assert cli.main(["export", "student", str(run), "-o", str(file)]) == 0
    assert cli.main(["export", "superb", str(file), "-o", str(second)]) == 0
    assert (second / "README.md").read_text() == card.replace("# package", "# second")
    argv = ["--force", "--data", "mine, 3 hours"]
    assert cli.main(["export", "superb", str(file), "-o", str(second), *argv]) == 0
    card = (second / "README.md").read_text()
    assert card.count("- data: ") == 1 and "- data: mine, 3 hours\n" in card
    assert cli.main(["export", "hf", str(file), "-o", str(tmp_path / "hf")]) == 0
    assert "- data: train (batches of 3 utterances)\n" in (tmp_path / "hf/README.md").read_text()
