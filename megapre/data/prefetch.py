"""An iterator that runs ahead of its consumer, in a thread, by a bounded number of items."""

import threading
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class _Channel(Generic[Item]):
    """What the thread and the consumer share. The thread must not hold the Prefetch, or it would never be collected."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.items: deque[Item] = deque()
        self.changed = threading.Condition()
        self.closed = False  # by the consumer: nobody will ask again
        self.ended = False  # by the producer: nothing will come again
        self.error: BaseException | None = None

    def run(self, source: Iterator[Item]) -> None:
        try:
            while self._wait_for_room():
                item = next(source)
                with self.changed:
                    self.items.append(item)
                    self.changed.notify_all()
        except StopIteration:
            pass
        except BaseException as error:  # whatever it is, it belongs to the consumer
            self.error = error
        finally:
            with self.changed:
                self.ended = True
                self.changed.notify_all()

    def _wait_for_room(self) -> bool:
        with self.changed:
            self.changed.wait_for(lambda: self.closed or len(self.items) < self.room)
            return not self.closed

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.items.clear()
            self.changed.notify_all()


class Prefetch(Generic[Item]):
    """The items of `source` in their order, up to `ahead` of them made before they are asked for.

    An exception of the source is raised by `next` after the items before it. `close`, or dropping the object, ends the
    thread; it is a daemon, so that it never holds up the end of the process.
    """

    def __init__(self, source: Iterator[Item], ahead: int) -> None:
        if ahead < 1:
            raise ValueError(f"prefetch of {ahead} items; at least 1 is needed")
        self._channel: _Channel[Item] = _Channel(ahead)
        self._thread = threading.Thread(target=self._channel.run, args=(source,), name="prefetch", daemon=True)
        self._finalizer = weakref.finalize(self, self._channel.close)
        self._thread.start()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        channel = self._channel
        with channel.changed:
            channel.changed.wait_for(lambda: channel.items or channel.ended or channel.closed)
            if channel.items:
                item = channel.items.popleft()
                channel.changed.notify_all()
                return item
        if channel.error is not None:
            raise channel.error
        raise StopIteration

    def close(self) -> None:
        """End the thread and wait for it. Further items are not given."""
        self._finalizer()
        self._thread.join()
