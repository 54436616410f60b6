"""tools/step_digests.py: the values it records of a run, and the difference it reports."""

import hashlib
import json
import shutil

import pytest
import step_digests as tool
import torch

from s3prl_ekd.teachers.random_weights import hubert_checkpoint, wavlm_checkpoint

from .conftest import SIZES

pytestmark = pytest.mark.slow  # of the developers' tools


@pytest.fixture(scope="module")
def written(tmp_path_factory, corpus):
    """The file of one case, with random teachers of 12 layers and a corpus of noise."""
    folder = tmp_path_factory.mktemp("digests")
    sizes = {**SIZES, "layers": 12}
    states = {"hubert": hubert_checkpoint(seed=1, **sizes), "wavlm": wavlm_checkpoint(**sizes)}
    states["robust_hubert"] = states["hubert"]
    for name, state in states.items():
        torch.save(state, folder / f"{name}.pt")
    shutil.copytree(corpus / "audio", folder / "audio")
    paths = [f"audio/u{i}.flac" for i in range(12)]
    (folder / "unlabeled.tsv").write_text(
        "\n".join(["path\tsplit", *(f"{path}\ttrain" for path in paths)]) + "\n"
    )
    (folder / "noise.tsv").write_text("\n".join(["path", *paths]) + "\n")
    argv = ["--corpus", str(folder), "--teachers", str(folder), "--only", "more/pre_norm"]
    assert tool.main(["write", str(folder / "one.json"), *argv]) == 0
    return folder / "one.json"


def test_the_values_of_a_run(written):
    cases = json.loads(written.read_text())
    assert set(cases) == {"inputs", "more/pre_norm"}
    audio = written.parent / "audio/u3.flac"
    assert cases["inputs"]["audio/audio/u3.flac"] == hashlib.sha256(audio.read_bytes()).hexdigest()
    values = cases["more/pre_norm"]
    for step in (1, 2, 3):
        assert values[f"step {step}: ekd/train-loss"] == values[f"loss {step}"]
        assert float.fromhex(values[f"loss {step}"]) > 0
    weights = [
        {value for key, value in values.items() if key.startswith(prefix)}
        for prefix in ("update 1: weight", "update 2: weight", "update 3: weight", "weight at")
    ]
    assert all(len(group) > 40 for group in weights)
    assert weights[0] != weights[1] != weights[2] != weights[3]
    unchanged = weights[0] & weights[3]  # feature_grad_mult 0 freezes the extractor
    assert {f"[32, {i}, {k}]" for i, k in ((1, 10), (32, 3), (32, 2))} <= {
        value.partition("] ")[0] + "]" for value in unchanged
    }
    gradients = [key for key in values if key.startswith("update 2: gradient")]
    count = len([key for key in values if key.startswith("update 2: weight")])
    assert len(gradients) == count


def test_the_first_difference_is_printed(written, tmp_path, capsys):
    cases = json.loads(written.read_text())
    total = sum(map(len, cases.values()))
    assert tool.main(["compare", str(written), str(written)]) == 0
    assert capsys.readouterr().out.startswith(f"{total} ")
    other = tmp_path / "other.json"
    for change in ("changed", "missing"):
        cases = json.loads(written.read_text())
        if change == "changed":
            cases["more/pre_norm"]["loss 2"] = (1.0).hex()
        else:
            del cases["more/pre_norm"]["loss 2"]
        other.write_text(json.dumps(cases))
        assert tool.main(["compare", str(written), str(other)]) == 1
        assert "more/pre_norm: loss 2: " in capsys.readouterr().out


def test_an_unknown_case_lists_the_cases(tmp_path, written, capsys):
    folder = str(written.parent)
    argv = ["--corpus", folder, "--teachers", folder, "--only", "nothing"]
    assert tool.main(["write", str(tmp_path / "x.json"), *argv]) == 2
    assert "more/units" in capsys.readouterr().err
