"""tools/defaults_study.py: the two rows differ in what they compare, and its table."""

import json

import defaults_study as tool
import pytest

from s3prl_ekd.workspace import write_workspace

pytestmark = pytest.mark.slow  # of the developers' tools


@pytest.fixture
def study(tmp_path):
    write_workspace(tmp_path / "study")
    return tool.Study(tmp_path / "study", tmp_path)


def test_the_rows_differ_in_optimizer_precision_and_forward_only(study):
    old, new = (study.runner(row, 50) for row in ("s3prl", "default"))
    assert (old["optimizer"].pop("name"), new["optimizer"].pop("name")) == (
        "AdamW_with_schedule",
        "FusedAdamW",
    )
    precisions = [config["runner"].pop("precision") for config in (old, new)]
    assert precisions == ["float32", "auto"] and old == new
    assert old["runner"]["total_steps"] == 50 and old["optimizer"]["lr"] == 1e-3
    old, new = study.model("s3prl"), study.model("default")
    assert old.pop("student_backend") == "s3prl" and new.pop("student_backend", "ours") == "ours"
    assert old == new


def test_the_table(study):
    for row, losses in {"s3prl": (0.5, 0.75), "default": (0.25,)}.items():
        for seed, loss in enumerate(losses):
            result = {"row": row, "seed": seed, "steps": 9, "dev_loss": loss}
            (study.folder / f"results/{row}_{seed}.json").write_text(json.dumps(result))
    lines = tool.report(study).splitlines()[2:]
    assert lines[0] == "| s3prl | 9 | 0.6250 ± 0.1768 | 0.5000, 0.7500 |"
    assert lines[1] == "| default | 9 | 0.2500 | 0.2500 |"
