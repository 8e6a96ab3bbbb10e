"""The checksum that MindSpore leaves in its files where `crc_check=True` asked for one."""

from __future__ import annotations

import zlib
from collections.abc import Callable

from parallel.checkpoint.readers.mindspore.file import MindSporeFile
from parallel.checkpoint.readers.safetensors_file import SafetensorsFile
from parallel.checkpoint.source import TensorFile
from parallel.errors import CheckpointError

_KEY = "crc_num"


def has_right_sum(file: TensorFile, on_bytes: Callable[[int], object] = lambda _: None) -> bool:
    """Compare a file with its checksum, which takes reading all of it.

    Returns:
        False where there is none: then nothing is known of the tensors' bytes.

    Raises:
        CheckpointError: the file is not what its writer wrote.
    """
    if isinstance(file, MindSporeFile):
        return file.check_sum(on_bytes)
    if not isinstance(file, SafetensorsFile) or _KEY not in file.metadata:
        return False
    found, expected = _crc32(file, on_bytes), file.metadata[_KEY]
    if str(found) != expected:
        raise CheckpointError(
            f"{file.path} must have the {_KEY} {expected!r:.40}, which stands in its header, but has "
            f"{found}; copy it again."
        )
    return True


def _crc32(file: SafetensorsFile, on_bytes: Callable[[int], object]) -> int:
    """Over each tensor's name and bytes, by name, as MindSpore writes them."""
    from parallel.checkpoint.planned_file import tensor_bytes  # which needs torch

    found = 0
    for name in sorted(file.tensors):
        tensor = file.read(name, tuple(slice(0, length) for length in file.tensors[name].shape))
        found = zlib.crc32(name.encode(), found)
        if tensor.numel():
            found = zlib.crc32(tensor_bytes(tensor.reshape(-1)), found)
        on_bytes(tensor.nbytes)
    return found
