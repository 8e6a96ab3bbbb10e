"""Memory that the ranks of one host share, and that nothing can leave behind.

A segment has no name: it is a memfd or, where the kernel has none to give, an unnamed temporary
file. The other ranks open it through /proc/<pid>/fd, and it goes with the last process that has it
mapped, however that one ends. A memfd does not count against the size of /dev/shm, which is 64 MB
in many containers. All of it is reserved at once, so that memory that is missing is an error here
and not a SIGBUS in the middle of a run.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from collections.abc import Callable

_SHARED_FOLDER = "/dev/shm"


class SegmentError(RuntimeError):
    """Memory that cannot be shared; says why."""


class Segment:
    """A piece of shared memory, mapped into this process; it starts as zeros.

    Attributes:
        memory: the bytes.
    """

    def __init__(self, fd: int, num_bytes: int) -> None:
        self._fd = fd
        self.memory = mmap.mmap(fd, num_bytes)

    @classmethod
    def create(cls, num_bytes: int) -> Segment:
        """A new segment.

        Raises:
            SegmentError: neither a memfd nor /dev/shm nor the temporary directory can hold it.
        """
        reasons = []
        for name, make in _MAKERS.items():
            try:
                return cls(_reserved(make(), num_bytes), num_bytes)
            except OSError as error:
                reasons.append(f"{name}: {error.strerror}")
        raise SegmentError(f"{num_bytes} bytes cannot be shared ({'; '.join(reasons)})")

    @classmethod
    def attach(cls, path: str, num_bytes: int) -> Segment:
        """Map the segment that another process of this host created.

        Args:
            path: the creator's `path`.

        Raises:
            SegmentError: it cannot be opened, or is of another size.
        """
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise SegmentError(f"{path} cannot be opened: {error.strerror}") from error
        if os.fstat(fd).st_size != num_bytes:
            os.close(fd)
            raise SegmentError(f"{path} is not of {num_bytes} bytes")
        return cls(fd, num_bytes)

    @property
    def path(self) -> str:
        """Where other processes of this host can open it, as long as this one lives."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def forget_path(self) -> None:
        """Close the door behind the last that came; what is mapped stays mapped."""
        os.close(self._fd)


def _reserved(fd: int, num_bytes: int) -> int:
    try:
        os.posix_fallocate(fd, 0, num_bytes)
    except OSError:
        os.close(fd)
        raise
    return fd


def _unnamed_file(folder: str) -> int:
    return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)


def _memory_file() -> int:
    if not hasattr(os, "memfd_create"):  # macOS
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    return os.memfd_create("shardrun")


_MAKERS: dict[str, Callable[[], int]] = {
    "memfd": lambda: _memory_file(),
    _SHARED_FOLDER: lambda: _unnamed_file(_SHARED_FOLDER),
    "the temporary directory": lambda: _unnamed_file(tempfile.gettempdir()),
}
