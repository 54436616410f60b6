"""`s3prl-ekd validate`: a whole package passes, and each broken one fails where it is broken."""

import json
import pickle
import shutil

import pytest
import torch
from s3prl_ekd.upstream.expert import UpstreamExpert

from s3prl_ekd.distill.aggregation import TargetSpec
from s3prl_ekd.distill.heads import PredictionHeads
from s3prl_ekd.distill.student import Student
from s3prl_ekd.export.student_file import LoadedStudent, write_student

from .conftest import command

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
    from s3prl_ekd.distill.settings import StudentSettings

    from .conftest import STUDENT

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
    command("export", "superb", student_file, "-o", folder, cwd=student_file.parent)
    return folder


def validate(folder) -> dict[str, str]:
    """Status of each check, by name, and the exit code under ``code``."""
    out = folder.parent / f"{folder.name}.json"
    done = command("validate", folder, "--json", out, cwd=folder.parent, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    checks = json.loads(out.read_text())["checks"]
    return {**{check["name"]: check["status"] for check in checks}, "code": done.returncode}


def test_a_good_one_passes_and_equals_the_student(good, student_file, waves):
    found = validate(good)
    assert found["code"] == 0 and "fail" not in found.values()
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("package_expert", good / "expert.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    package = module.UpstreamExpert(str(good / "model.pt"), model_config=None, refresh=False).eval()
    ours = UpstreamExpert(student_file).eval()
    with torch.no_grad():
        theirs, mine = package(waves)["hidden_states"], ours(waves)["hidden_states_and_heads"]
    assert len(theirs) == len(mine) == 3 + 2
    for one, other in zip(theirs, mine, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


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
    found = validate(folder)
    assert found["code"] == 1 and found[check] == "fail", found


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
