"""A bounded dictionary that forgets what is asked for least: S3-FIFO, by entries and by bytes.

Three queues, as in "FIFO queues are all you need for cache eviction" (Yang, Zhang, Qiu, Yue and Rashmi, SOSP 2023). A
newcomer waits in a small queue, a tenth of the room; only if it is asked for there, or comes back soon after it was
dropped, does it reach the main one. So somebody who walks through a million keys pushes out nothing that others use, as
he does from an LRU. A hit moves nothing: it counts up to three.

Example:
    >>> pages = S3Fifo(max_entries=2, max_bytes=1_000)
    >>> [pages.put(name, name.upper(), size=10) for name in ("a", "b")], pages.get("a")
    ([True, True], 'A')
    >>> pages.put("c", "C", size=10), pages.get("a"), pages.get("b")
    (True, 'A', None)
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

V = TypeVar("V")

# What an entry costs beside its value, roughly: the node, the key, its places in the dictionaries.
OVERHEAD_BYTES = 400

_MOST_COUNTED = 3
_SMALL_SHARE = 10
# One value may take a quarter of the room; a larger one would only push out everything else.
_LARGEST_SHARE = 4


class _Node(Generic[V]):
    __slots__ = ("hits", "size", "value")

    def __init__(self, value: V, size: int) -> None:
        self.value = value
        self.size = size
        self.hits = 0


class S3Fifo(Generic[V]):
    """Values by key, at most so many and so large together.

    Args:
        max_entries: The number of entries; 0 keeps nothing.
        max_bytes: What they may take together, by the sizes that are given with them.
        on_evicted: Called for each entry that is dropped for want of room.

    Attributes:
        bytes: What all entries take.
    """

    def __init__(self, max_entries: int, max_bytes: int, on_evicted: Callable[[], None] | None = None) -> None:
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._on_evicted = on_evicted or (lambda: None)
        self._small: OrderedDict[str, _Node[V]] = OrderedDict()
        self._main: OrderedDict[str, _Node[V]] = OrderedDict()
        self._ghosts: OrderedDict[int, None] = OrderedDict()
        self._small_bytes = 0
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    def get(self, key: str) -> V | None:
        """The value, or ``None``; counts as a use."""
        node = self._main.get(key) or self._small.get(key)
        if node is None:
            return None
        if node.hits < _MOST_COUNTED:
            node.hits += 1
        return node.value

    def put(self, key: str, value: V, size: int) -> bool:
        """Stores a value; ``False`` where it is too large to be kept, and then nothing is kept under the key."""
        if self._max_entries < 1 or size > self._max_bytes // _LARGEST_SHARE:
            self.pop(key)
            return False
        known = self._main.get(key) or self._small.get(key)
        if known is not None:
            self._weigh(size - known.size, small=key in self._small)
            known.value, known.size = value, size
        else:
            # Room is made before the newcomer is there, or it would be its own victim.
            self._make_room(size, 1)
            small = self._ghosts.pop(hash(key), self) is self
            (self._small if small else self._main)[key] = _Node(value, size)
            self._weigh(size, small=small)
        self._make_room(0, 0)
        return self.get_quietly(key) is value

    def get_quietly(self, key: str) -> V | None:
        """The value, or ``None``; does not count as a use."""
        node = self._main.get(key) or self._small.get(key)
        return None if node is None else node.value

    def pop(self, key: str) -> None:
        """Forgets a key."""
        small = self._small.pop(key, None)
        node = small or self._main.pop(key, None)
        if node is not None:
            self._weigh(-node.size, small=small is not None)

    def clear(self) -> None:
        """Forgets everything."""
        self._small.clear()
        self._main.clear()
        self._ghosts.clear()
        self.bytes = self._small_bytes = 0

    def _weigh(self, size: int, *, small: bool) -> None:
        self.bytes += size
        if small:
            self._small_bytes += size

    def _make_room(self, size: int, entries: int) -> None:
        while self.bytes + size > self._max_bytes or len(self) + entries > self._max_entries:
            crowded = self._small_bytes * _SMALL_SHARE >= self.bytes or len(self._small) * _SMALL_SHARE >= len(self)
            if self._small and (crowded or not self._main):
                self._leave_small()
            else:
                self._leave_main()

    def _leave_small(self) -> None:
        """The oldest newcomer goes on to the main queue if it was used, else it leaves, and is remembered."""
        key, node = self._small.popitem(last=False)
        self._small_bytes -= node.size
        if node.hits:
            self._main[key] = node
            return
        self.bytes -= node.size
        self._ghosts[hash(key)] = None
        if len(self._ghosts) > self._max_entries:
            self._ghosts.popitem(last=False)
        self._on_evicted()

    def _leave_main(self) -> None:
        """The oldest of the main queue has as many more rounds as it was used, then leaves."""
        key, node = self._main.popitem(last=False)
        if node.hits:
            node.hits -= 1
            self._main[key] = node
            return
        self.bytes -= node.size
        self._on_evicted()
