"""How far the rows that are asked are from those of training: `raylway drift` over a sliding window of a sample.

At most `SAMPLE_ROWS` rows of each `INTERVAL_S` seconds are looked at, so a busy server spends well under a hundredth of
its time on them and a quiet one looks at every row. Two windows run half a window apart, and the older one is told: it
holds the last `WINDOW_ROWS` / 2 to `WINDOW_ROWS` rows of the sample, in memory that does not grow with them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raylway.bundle.contents import BundleRecord
from raylway.bundle.rows import Rows, joined
from raylway.features.counted import Counts
from raylway.features.profile import Profile
from raylway.features.shift import Shift

INTERVAL_S = 60.0
SAMPLE_ROWS = 1_000
WINDOW_ROWS = 20_000


@dataclass(frozen=True)
class Report:
    """Of the window that is told."""

    rows: int
    shifts: list[Shift]
    out_of_range: dict[str, float]
    """By input of type number the share of rows outside the range of the training rows."""


class _Window:
    def __init__(self, record: BundleRecord, profile: Profile) -> None:
        self.counts = Counts(profile, record.transform, record.signature)
        self._numbers = profile.numbers
        self._low = np.array([each.minimum for each in profile.numbers])
        self._high = np.array([each.maximum for each in profile.numbers])
        self._outside = np.zeros(len(profile.numbers), np.int64)
        self._signature = record.signature

    def add(self, rows: Rows) -> None:
        self._outside += ((rows.numbers < self._low) | (rows.numbers > self._high)).sum(axis=0)
        self.counts.add(rows.table(self._signature))

    def report(self) -> Report:
        shares = (self._outside / max(1, self.counts.rows)).tolist()
        names = [each.name for each in self._numbers]
        return Report(self.counts.rows, self.counts.shifts(), dict(zip(names, shares, strict=True)))


class Drift:
    """`add` and `take` belong to the event loop, `count` to one thread."""

    def __init__(self, record: BundleRecord, profile: Profile) -> None:
        self._record, self._profile = record, profile
        self._windows = [self._window()]
        self._sample: list[Rows] = []
        self._room = SAMPLE_ROWS

    def add(self, rows: Rows) -> None:
        """Keep rows until the next count, as long as there is room for them."""
        if self._room and len(rows):
            part = rows if len(rows) <= self._room else rows.part(0, self._room)
            self._sample.append(part)
            self._room -= len(part)

    def take(self) -> list[Rows]:
        """The rows that are kept, for `count`."""
        taken, self._sample, self._room = self._sample, [], SAMPLE_ROWS
        return taken

    def count(self, sample: list[Rows]) -> Report:
        """Count rows and tell how far those of the window are from training."""
        rows = joined(sample)
        for window in self._windows:
            window.add(rows)
        report = self._windows[0].report()
        if self._windows[0].counts.rows >= WINDOW_ROWS:
            self._windows.pop(0)
        if self._windows[-1].counts.rows >= WINDOW_ROWS // 2:
            self._windows.append(self._window())
        return report

    def _window(self) -> _Window:
        return _Window(self._record, self._profile)
