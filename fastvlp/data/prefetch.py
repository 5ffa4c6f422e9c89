"""Iterators that work ahead in a thread of their own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import closing
from typing import TypeVar

T = TypeVar("T")
_END = object()


def ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """The items of a generator, made up to ``depth`` ahead by a thread.

    An exception of the generator is raised here, after the items before it. Closing this generator
    ends the thread and closes the one it works on.
    """
    made: queue.Queue = queue.Queue(depth)
    stop = threading.Event()

    def put(item: object) -> bool:
        while not stop.is_set():
            try:
                made.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            with closing(items):
                for item in items:
                    if not put((item, None)):
                        return
        except BaseException as error:  # whatever it is, it belongs to the consumer
            put((None, error))
            return
        put((_END, None))

    thread = threading.Thread(target=work, name="fastvlp-loader", daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        stop.set()
        thread.join()
