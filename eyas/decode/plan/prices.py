"""What a pass costs: its seconds by its number of rows, timed once or assumed, and then moved by every pass that is served.

Prices between two timed numbers of rows lie on a line, which goes on beyond the last. Knows rows and seconds; knows nothing of models.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping

PRICE_STEP = 0.05  # how far one served pass moves a price: by (seconds / price) ** PRICE_STEP
LARGEST_NEWS = 1.5  # the largest ratio of a pass's seconds to its price that is believed: a stalled pass moves prices no further
LARGEST_ERROR = 8.0  # how many times too high a price may be that was assumed, until as many passes have told as a timed price is worth


class Prices:
    def __init__(self, seconds: Mapping[int, float], assumed: bool = False) -> None:
        """`seconds`: rows of a pass -> its seconds; at least one entry. `assumed`: they were not timed, so the first passes count most."""
        self.told = 0 if assumed else round(1 / PRICE_STEP)  # passes that have told
        self.rows = sorted(seconds)
        self.seconds = [seconds[rows] for rows in self.rows]

    def of(self, rows: int) -> float:
        """Seconds of a pass of `rows` rows; a pass of none costs nothing."""
        if rows <= 0:
            return 0.0
        if len(self.rows) == 1:
            return self.seconds[0]
        above = min(max(bisect_left(self.rows, rows), 1), len(self.rows) - 1)
        (left, right), (low, high) = self.rows[above - 1 : above + 1], self.seconds[above - 1 : above + 1]
        return max(low + (high - low) * (rows - left) / (right - left), min(self.seconds))

    def record(self, rows: int, seconds: float) -> None:
        """Learn from a pass of `rows` rows. Half of the change moves all prices, as the machine may be faster or slower; half moves the
        nearest timed price alone."""
        self.told += 1
        step, least = max(PRICE_STEP, 1 / self.told), 1 / (LARGEST_NEWS if self.told * PRICE_STEP > 1 else LARGEST_ERROR)
        news = min(max(seconds / self.of(rows), least), LARGEST_NEWS)
        above = min(bisect_left(self.rows, rows), len(self.rows) - 1)
        at = above - 1 if above and rows - self.rows[above - 1] <= self.rows[above] - rows else above
        half = news ** (step / 2)
        self.seconds = [price * half for price in self.seconds]
        self.seconds[at] *= half

    def table(self) -> dict[int, float]:
        return dict(zip(self.rows, self.seconds, strict=True))
