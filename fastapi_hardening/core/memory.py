"""How much of the memory that the container may have is in use, as its control group says (version 2 or 1)."""

from pathlib import Path

ROOT = Path("/sys/fs/cgroup")

# Version 1 says "no limit" by a number that no machine has.
_NO_LIMIT = 1 << 60


class Memory:
    """The memory of the control group that this process is in.

    What could be given back at once (files that were read) does not count, as with Kubernetes.

    Args:
        root: Where control groups are mounted.
    """

    def __init__(self, root: Path = ROOT) -> None:
        new = (root / "memory.max").is_file()
        self._limit = root / ("memory.max" if new else "memory/memory.limit_in_bytes")
        self._usage = root / ("memory.current" if new else "memory/memory.usage_in_bytes")
        self._stat = root / ("memory.stat" if new else "memory/memory.stat")
        self._reclaimable = "inactive_file " if new else "total_inactive_file "

    def ratio(self) -> float | None:
        """The share that is in use; ``None`` where there is no limit, or no control group."""
        try:
            limit = self._limit.read_text(encoding="ascii").strip()
            if limit == "max" or int(limit) >= _NO_LIMIT:
                return None
            used = int(self._usage.read_text(encoding="ascii"))
            lines = self._stat.read_text(encoding="ascii").splitlines()
        except (OSError, ValueError):
            return None
        given_back = sum(int(line.split()[1]) for line in lines if line.startswith(self._reclaimable))
        return max(0, used - given_back) / max(1, int(limit))
