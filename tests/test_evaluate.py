"""Reading and plotting the TensorBoard scalars of a run."""

import pytest
from tensorboardX import SummaryWriter

from s3prl_ekd.pretrain.curves import plot_run, read_scalars, teacher_curves


def test_scalars_are_read_by_step(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        for step in (2, 1, 3):
            writer.add_scalar("a/b", step / 4, step)
        writer.add_text("note", "not a scalar", 1)
    assert read_scalars(tmp_path) == {"a/b": {1: 0.25, 2: 0.5, 3: 0.75}}


def test_a_truncated_event_is_skipped(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("a", 1.0, 1)
        writer.add_scalar("a", 2.0, 2)
    (path,) = tmp_path.glob("events.*")
    path.write_bytes(path.read_bytes()[:-7])
    assert read_scalars(tmp_path) == {"a": {1: 1.0}}


def test_curves_and_plot(tmp_path):
    scalars = {
        "ekd/train-loss_mean": {1: 2.0, 2: 1.0},
        "ekd/train-my_one/l1_layer12": {1: 0.5, 2: 0.4},
        "ekd/train-my_one/cosine_layer12": {1: 0.5},
        "ekd/train-l1": {1: 0.5},
    }
    assert teacher_curves(scalars) == {"my_one": {"12": {1: 0.5, 2: 0.4}}}
    pytest.importorskip("matplotlib")
    plot_run(scalars, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
