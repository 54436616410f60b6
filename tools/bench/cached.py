"""A step that reads its targets, beside those that run teachers."""

from __future__ import annotations

from torch import Tensor

from ..data.settings import DataSettings
from ..distill.batch import DistillBatch
from ..hidden_states.fingerprint import layout_of, make_key
from ..hidden_states.store import Index, TargetReader
from ..pretrain.config_diff import table_digests
from ..pretrain.target_cache.build import begin, build, targets_of
from ..pretrain.target_cache.use import free
from .bench_clock import Clock
from .bench_corpus import SET
from .bench_sides import Ours, Plan, _charged, _update


class Cached(Ours):
    """Ours with a target cache. Its ``teacher forward`` is the reading of the targets.

    Args:
        plan: what is measured; the cache is built into its folder, before anything is.
        dtype: of the numbers.
    """

    def __init__(self, plan: Plan, dtype: str = "float16"):
        super().__init__(plan)
        teachers, folder = self.distiller.teachers, plan.folder / f"targets-{dtype}"
        folder.mkdir(exist_ok=True)
        key = make_key(
            teachers,
            self.distiller.settings,
            aggregated=False,
            tables=table_digests(plan.folder / "tables", [SET]),
            sequence_length=0,
            max_timestep=0,
        )
        rows = [row for batch in self.dataset.batches for row in batch]
        names = tuple(row.path for row in rows)
        index = begin(folder, Index(dtype, layout_of(teachers, None), 0, key, names), False)
        if not index.complete:
            build(
                folder,
                index,
                targets_of(teachers, None, {}),
                rows,
                DataSettings(
                    str(plan.folder / "audio"),
                    str(plan.folder / "tables"),
                    (SET,),
                    1,
                    num_workers=0,
                    sequence_length=0,
                ),
                min_samples=plan.models.student.min_samples,
                device=self.device,
            )
        reader = TargetReader(folder)
        self._apart = self._compared(reader)
        self.dataset.targets = reader
        free(teachers)

    def step(self, index: int, clock: Clock) -> tuple[float, Tensor]:
        distiller = self.distiller
        with (
            _charged(self.dataset, "_distort", "distort", clock),
            _charged(self.dataset.targets, "batch", "teacher forward", clock),
            _charged(distiller.student, "forward", "student forward", clock),
            _charged(distiller.heads, "forward", "student forward", clock),
        ):
            with clock("read and decode"):
                batch = self.dataset[index]
                waves, lengths = batch.waves.to(self.device), batch.lengths.to(self.device)
            with clock("teacher forward"):
                targets = batch.targets.on(self.device)
            with clock("loss"):
                loss, _ = distiller(
                    DistillBatch(waves, lengths, cached_targets=targets), step=index + 1
                )
        _update(loss, self.optimizer, distiller.trainable, clock)
        return float(loss.detach()), batch.lengths

    def difference(self) -> dict[str, float]:
        """Of the stored targets, which are of each utterance alone; see :meth:`Ours.difference`."""
        return self._apart

    def _compared(self, reader: TargetReader) -> dict[str, float]:
        batch, ensemble = self.dataset[0], self.distiller.teachers
        cached = reader.batch(batch.names).on(self.device)
        stored, frames = cached.values, cached.lengths
        largest, sums = 0.0, {name: [0.0, 0.0] for name in ensemble}
        waves = zip(batch.waves, batch.lengths, strict=True)
        for row, (wave, length) in enumerate(waves):
            for name, teacher in ensemble.items():
                theirs = teacher([wave[:length].to(self.device)])[0]  # [target, frame, dim]
                count = min(theirs.shape[1], int(frames[row]))
                apart = (stored[name][row, :, :count] - theirs[:, :count]).abs()
                largest = max(largest, float(apart.max()))
                sums[name][0] += float(apart.sum())
                sums[name][1] += float(theirs[:, :count].abs().sum())
        shares = [apart / size for apart, size in sums.values()]
        return {"largest": largest, "share": sum(shares) / len(shares)}
