"""Runs an iterator ahead of its consumer, in a thread, by a bounded number of items."""

import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
JOIN_S = 10.0


class Ahead(Generic[T], Iterator[T]):
    """Yields what ``source()`` yields; a thread makes at most ``depth`` items before they are asked for.

    An exception of the source is raised where its item would have come. The thread ends with the source, with
    :meth:`close`, and when this iterator is no longer referenced.
    """

    def __init__(self, source: Callable[[], Iterator[T]], depth: int) -> None:
        self._channel: _Channel[T] = _Channel(queue.SimpleQueue(), threading.Semaphore(depth), threading.Event())
        self._done = False
        thread = threading.Thread(target=_produce, args=(source, self._channel), name="thresher-ahead", daemon=True)
        thread.start()
        self._finish = weakref.finalize(self, _stop, self._channel, thread)

    def __next__(self) -> T:
        if self._done:
            raise StopIteration
        item, error = self._channel.items.get()
        self._channel.room.release()
        if error is not None:
            self._done = True
            raise error
        return item  # type: ignore[return-value]  # an item comes wherever no error does

    def close(self) -> None:
        """Ends the thread and waits for it; nothing more is yielded."""
        self._done = True
        self._finish()


@dataclass(frozen=True)
class _Channel(Generic[T]):
    items: "queue.SimpleQueue[tuple[T | None, BaseException | None]]"
    room: threading.Semaphore
    stop: threading.Event


def _produce(source: Callable[[], Iterator[T]], channel: _Channel[T]) -> None:
    """Knows the channel only, so that the consumer's end can be collected while this runs."""
    items: Iterator[T] | None = None
    try:
        items = source()
        while True:
            channel.room.acquire()
            if channel.stop.is_set():
                return
            channel.items.put((next(items), None))
    except BaseException as error:  # whatever it is, the consumer must see it
        channel.items.put((None, error))
    finally:
        items = None  # the error's traceback holds this frame, which must not hold a source that runs threads


def _stop(channel: _Channel[T], thread: threading.Thread) -> None:
    channel.stop.set()
    channel.room.release()
    channel.items.put((None, StopIteration()))
    if thread is not threading.current_thread():
        thread.join(JOIN_S)
