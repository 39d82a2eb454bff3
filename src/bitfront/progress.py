"""How far a command is: on a terminal a line that moves at least once a second, whatever takes its time, and is gone
when that is done; in a log file, of what has steps, a line every half minute.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

from tqdm import tqdm

from bitfront.processes import rank

TICK, LINE = 0.4, 30.0  # seconds between two pictures on a terminal, and between two lines in a log file
POSITION = "TQDM_POSITION"  # the line of this process among those beside it; tqdm reads it only when it is imported
SPINNER = "|/-\\"


class Bar(tqdm):
    """A progress bar on standard error.

    Of bars that are open at once, the one opened last has the line: training gives it to validation and takes it back.

    Args:
        arguments, options: of tqdm.
    """

    monitor_interval = 0  # tqdm's own thread, which looks every ten seconds
    _open: ClassVar[list[Bar]] = []  # those on the terminal, the outermost first

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.terminal, self._closed = sys.stderr.isatty(), threading.Event()
        usual: dict[str, Any] = {"leave": False, "file": sys.stderr, "dynamic_ncols": True, "disable": rank() > 0}
        usual |= {"position": int(os.environ.get(POSITION, 0))}
        usual |= {"miniters": 1}  # look at the clock after each step: the next ones may be slower
        usual |= {"mininterval": 0.1} if self.terminal else {"mininterval": LINE, "delay": LINE}
        if Bar._open:
            Bar._open[-1].clear()
        super().__init__(*arguments, **usual | options)
        if self.terminal and not self.disable:
            Bar._open.append(self)
            self.refresh()
            threading.Thread(target=self._tick, daemon=True).start()

    @property
    def format_dict(self) -> dict[str, Any]:
        return super().format_dict | {"spinner": SPINNER[int(time.monotonic() / TICK) % len(SPINNER)]}

    def display(self, *arguments: Any, **options: Any) -> Any:
        if not self.terminal or (Bar._open and Bar._open[-1] is self):
            return super().display(*arguments, **options)
        return False

    def close(self) -> None:
        self._closed.set()
        super().close()
        Bar._open[:] = [bar for bar in Bar._open if bar is not self]  # tqdm's are equal where they have one place

    def _tick(self) -> None:
        while not self._closed.wait(TICK):
            self.refresh()


Bar.set_lock(threading.RLock())  # tqdm's own is also for processes, and a killed one leaves its part of that behind


@contextmanager
def phase(about: str) -> Iterator[None]:
    """What is going on, and for how long, on a terminal, where there are no steps to count."""
    layout = "{spinner} {desc} {elapsed}"
    with Bar(desc=about, bar_format=layout) if sys.stderr.isatty() else nullcontext():
        yield


def clear() -> None:
    """Take all bars off the terminal, of what has ended in an error."""
    for bar in reversed(Bar._open.copy()):
        bar.close()
