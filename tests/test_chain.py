"""From an empty folder to exports and scores of four tasks, with s3prl or ESPnet's."""

from __future__ import annotations

import pytest

from s3prl_ekd.student_file import load_student
from s3prl_ekd.system.s3prl_distribution import installation

from .documented import Machine

DATA = "config.pretrain_expert.datarc"
CORPUS = f"{DATA}.libri_root='/data/my_corpus',,{DATA}.sets=['train']"
CHAIN = [
    "s3prl-ekd doctor",
    "s3prl-ekd init .",
    "s3prl-ekd length-tables /data/my_corpus -o data/len_for_bucket --name train",
    "s3prl-ekd prepare asr /data/my_corpus/asr.tsv -o data/corpus",
    "s3prl-ekd prepare pr /data/my_corpus/pr.tsv -o data/corpus_pr --lexicon /data/cmudict.dict",
    "s3prl-ekd prepare sid /data/my_corpus/sid.tsv -o data/sid --test-seconds 1",
    "s3prl-ekd prepare er /data/my_corpus/er.tsv -o data/er",
    f'run_pretrain.py -u ekd -n my_student -o "{CORPUS}"',
    f'run_pretrain.py -u ekd -n my_student -a -o "{CORPUS},,config.runner.total_steps=4"',
    "s3prl-ekd export student result/pretrain/my_student -o student.safetensors",
    "s3prl-ekd superb student.safetensors --recipes tiny --tasks pr sid er asr",
    "s3prl-ekd report result/superb",
    "run_downstream.py -m train -u ekd_student -k student.safetensors -f -n tuned -d emotion "
    "-c downstream/emotion/tiny.yaml",
    "s3prl-ekd export hf student.safetensors -o my_student_hf",
    "s3prl-ekd export onnx student.safetensors -o student.onnx",
    "s3prl-ekd export superb student.safetensors -o my_package",
    "s3prl-ekd validate my_package",
    "s3prl-ekd features student.safetensors /data/my_audio -o features.safetensors",
]

USES_NO_S3PRL = tuple(
    f"s3prl-ekd {name}" for name in ("init", "length-tables", "prepare", "report", "validate")
)


@pytest.mark.slow
@pytest.mark.espnet
def test_chain(tmp_path):
    pytest.importorskip("onnxruntime")
    machine = Machine(tmp_path)
    host = str(installation())
    for line in CHAIN:
        output = machine.type(line, timeout=900)
        if not line.startswith(USES_NO_S3PRL):
            assert host in output, line
    assert load_student(machine.folder / "student.safetensors").about["step"] == 4
    report = (machine.folder / "result/superb/report/report.csv").read_text()
    assert all(f",{task}," in report for task in ("pr", "sid", "er", "asr"))
