"""tools/frozen_study.py: configs of its rows, and its table."""

import dataclasses

import pytest

from s3prl_ekd.files.config import from_plain_data
from s3prl_ekd.pretrain.settings import ModelFile
from tools.frozen_study import ROWS, model_config, table

pytestmark = pytest.mark.slow  # of tools/


def test_the_rows_differ_in_the_extractor_only():
    read = {row: from_plain_data(ModelFile, model_config(row), row) for row in ROWS}
    trained, frozen = read["trained"], read["frozen"]
    assert trained.student.train_extractor and trained.student.feature_grad_mult == 0.1
    assert not frozen.student.train_extractor and frozen.init.teacher == "hubert"
    assert dataclasses.replace(trained, student=frozen.student) == frozen


def test_the_table_has_mean_and_deviation_over_seeds():
    def result(row, seed, loss):
        probes = {"phones": 50.0, "speakers": 60.0, "noisy_speakers": 40.0}
        return {"row": row, "seed": seed, "dev_loss": loss, "cpu_seconds": 20, **probes}

    results = [result("trained", 0, 1.0), result("trained", 1, 1.2), result("frozen", 0, 1.3)]
    _, _, trained, frozen = table(results).splitlines()
    assert trained.startswith("| trained | 2 | 1.100 ± 0.141 | 50.0 ± 0.0 |")
    assert frozen.startswith("| frozen | 1 | 1.300 | 50.0 |")
