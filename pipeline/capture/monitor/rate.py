"""How fast something counts, over the last while."""

from collections import deque

_MARKS = 12  # per window: how finely its beginning moves


class Rate:
    """A count and its growth per second within the last ``window`` seconds, or since the beginning while that is less.

    Times are seconds on any clock that never goes back.
    """

    def __init__(self, now: float, window: float) -> None:
        self.count = 0
        self._window = window
        self._marks = deque([(now, 0)])

    def add(self, now: float, amount: int) -> None:
        """Count on."""
        self._mark(now)
        self.count += amount

    def per_second(self, now: float) -> float:
        """Growth per second; 0 where no time has passed."""
        self._mark(now)
        began, count = self._marks[0]
        return (self.count - count) / (now - began) if now > began else 0.0

    def _mark(self, now: float) -> None:
        if now - self._marks[-1][0] >= self._window / _MARKS:
            self._marks.append((now, self.count))
        while len(self._marks) > 1 and self._marks[1][0] <= now - self._window:
            self._marks.popleft()
