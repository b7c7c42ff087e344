"""Where the time goes: seconds by part of a piece of work, whose functions are wrapped from outside."""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any


class Parts:
    """Seconds by part; what an inner part takes is not counted in the outer one."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]

    def timed(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed_work(*arguments: Any, **named: Any) -> Any:
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return work(*arguments, **named)
            finally:
                elapsed = time.perf_counter() - start
                self.seconds[part] += elapsed - self._inner.pop()
                self._inner[-1] += elapsed

        return timed_work

    def wrap(self, part: str, owner: object, *names: str) -> None:
        """Time functions of a module or an object, or methods of a class, of whatever kind."""
        for name in names:
            found = vars(owner)[name] if isinstance(owner, type) else getattr(owner, name)
            kind = type(found) if isinstance(found, classmethod | staticmethod) else None
            timed = self.timed(part, found.__func__ if kind else found)
            setattr(owner, name, kind(timed) if kind else timed)

    def of(self, seconds: float) -> dict[str, float]:
        """All parts of a piece of work that took so long, with what no part explains as `rest`; begins anew."""
        parts = dict(self.seconds)
        self.seconds.clear()
        return parts | {"rest": seconds - sum(parts.values())}
