"""tools/padding_differences.py on a small corpus of noise."""

from __future__ import annotations

import pytest
import soundfile
import torch

from tools import padding_differences

pytestmark = pytest.mark.slow


def test_only_masked_norms_do_not_depend_on_padding(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(padding_differences, "LENGTHS", (0.5, 1.0))
    rows = ["path\tduration"]
    for name, samples in (("a.wav", 8_000), ("b.wav", 16_000), ("c.wav", 40_000)):
        noise = 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(samples))
        soundfile.write(tmp_path / name, noise.numpy(), 16_000)
        rows.append(f"{name}\t{samples / 16_000}")
    (tmp_path / "unlabeled.tsv").write_text("\n".join(rows) + "\n")
    assert padding_differences.main(["--corpus", str(tmp_path)]) == 0
    lines = [line.strip("| \n").split("|") for line in capsys.readouterr().out.splitlines()]
    table = {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}
    assert table["1.0 s"] == ["0%", "0.0 %", "0.0 %", "0.0 %"]  # the longest has no padding
    assert all(float(cell.split()[0]) > 1 for cell in table["0.5 s"][1:])
    assert all(float(cell) < 1e-5 for cell in table["with masked norm, largest"][1:])
