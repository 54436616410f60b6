"""Saving: the older file is there until the newer one is whole."""

import io

import pytest
import torch

from s3prl_ekd.atomic import atomic_saves


def test_a_save_that_fails_leaves_the_older_file(tmp_path):
    path = tmp_path / "states-1.ckpt"
    torch.save({"step": 1}, path)

    class Unsavable:
        def __reduce__(self):
            raise OSError(28, "No space left on device")

    original = torch.save
    with pytest.raises(OSError, match="No space left"), atomic_saves():
        torch.save({"tensor": torch.zeros(1000), "last": Unsavable()}, path)
    assert torch.save is original
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_paths_and_files(tmp_path):
    buffer = io.BytesIO()
    with atomic_saves():
        torch.save({"a": 1}, str(tmp_path / "a.pt"))
        torch.save({"b": 2}, buffer)
    assert torch.load(tmp_path / "a.pt", weights_only=True) == {"a": 1}
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True) == {"b": 2}
