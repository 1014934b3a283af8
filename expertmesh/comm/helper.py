"""A thread that moves the bytes of a transport while the rank computes."""

import os
import selectors
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any


class Helper:
    """Serves a selector while it is resumed. It is started when it is needed first.

    failed: what `move` has raised, if anything; the thread has ended then. `pause` and `resume` raise it, in the rank's
    own thread.
    """

    def __init__(
        self, selector: selectors.BaseSelector, lock: threading.Condition, move: Callable[[Any], None]
    ) -> None:
        """move: does what the selector's events say, called with the lock held. To wait for the selector needs no
        lock: what other threads register meanwhile counts."""
        self.active = False
        self.failed: BaseException | None = None
        self._selector, self._lock, self._move = selector, lock, move
        self._thread: threading.Thread | None = None
        self._wanted, self._parked = threading.Event(), threading.Event()
        self._parked.set()
        self._bell = -1
        self._closed = False

    def resume(self) -> None:
        """From now on the thread serves the selector, and nobody else may."""
        if self.failed:
            raise self.failed
        if self._thread is None:
            self._bell = os.eventfd(0, os.EFD_NONBLOCK)
            self._selector.register(self._bell, selectors.EVENT_READ, None)
            self._thread = threading.Thread(target=self._run, name="helper", daemon=True)
            self._thread.start()
        self.active = True
        self._wanted.set()

    def pause(self) -> None:
        """Returns when the thread has left the selector."""
        self._wanted.clear()
        os.eventfd_write(self._bell, 1)
        self._parked.wait()
        with suppress(BlockingIOError):  # it has heard the bell
            os.eventfd_read(self._bell)
        self.active = False
        if self.failed:
            raise self.failed

    def close(self) -> None:
        self._closed = True
        if self._thread is not None:
            os.eventfd_write(self._bell, 1)
            self._wanted.set()
            self._thread.join()
            self._selector.unregister(self._bell)
            os.close(self._bell)

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            self.failed = error
            self._parked.set()
            with self._lock:  # for who waits for what will not come any more
                self._lock.notify_all()

    def _serve(self) -> None:
        while not self._closed:
            self._wanted.wait()
            # In this order, so that a pause that has not seen it yet is seen by the loop.
            self._parked.clear()
            while self._wanted.is_set() and not self._closed:
                events = self._selector.select()
                with self._lock:
                    self._move(events)
            self._parked.set()
