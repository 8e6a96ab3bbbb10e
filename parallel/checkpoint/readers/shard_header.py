"""What a shard says of itself in its header, so that it is known without the manifest beside it.

The strings of safetensors' `__metadata__`, of which the first are always the same:

    {"format": "pt", "shardrun": "1", "rank": "0", "tp": "2", "vocab_emb_dp": "false", "scheme": "{…}"}

Needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from parallel.checkpoint.regular_file import reason
from parallel.errors import CheckpointError
from quant.errors import QuantError
from quant.scheme import QuantScheme

# Of manifests and shards.
FORMAT_VERSION = 1
# How every shard begins, behind the eight bytes of its header's length.
_BEGINNING = b'{"__metadata__":{"format":"pt","shardrun":'
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class ShardHeader:
    """Which part of what model a shard is.

    Attributes:
        rank: whose it is, of `size`.
        vocab_emb_dp: whether every rank has the whole embedding.
    """

    rank: int
    size: int
    scheme: QuantScheme
    vocab_emb_dp: bool

    def to_metadata(self) -> dict[str, str]:
        """Equal headers give equal bytes."""
        return {
            "shardrun": str(FORMAT_VERSION),
            "rank": str(self.rank),
            "tp": str(self.size),
            "vocab_emb_dp": json.dumps(self.vocab_emb_dp),
            "scheme": json.dumps(self.scheme.to_dict(), separators=(",", ":")),
        }

    @classmethod
    def from_metadata(cls, values: Mapping[str, str], path: Path) -> ShardHeader:
        """Read what `to_metadata` gave.

        Args:
            path: the file that holds it.

        Raises:
            CheckpointError: another version's, or damaged.
        """
        if values.get("shardrun") != str(FORMAT_VERSION):
            raise CheckpointError(
                f"{path} is not a shard of version {FORMAT_VERSION}; prepare the checkpoint again."
            )
        try:
            vocab_emb_dp = {"true": True, "false": False}[values["vocab_emb_dp"]]
            scheme = QuantScheme.from_dict(json.loads(values["scheme"]))
            rank, size = (_number(values[key]) for key in ("rank", "tp"))
            if rank >= size:
                raise ValueError(f"rank {rank} of {size}")
        except (
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            RecursionError,
            QuantError,
        ) as error:
            raise CheckpointError(
                f"{path} has a damaged header ({error!r}); copy it again."
            ) from error
        return cls(rank, size, scheme, vocab_emb_dp)


def is_shard(path: Path) -> bool:
    """Whether a file begins as shards do, whatever it is called; nothing of it is checked."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return file.read(_LENGTH_BYTES + len(_BEGINNING))[_LENGTH_BYTES:] == _BEGINNING
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({reason(error)}); copy it again.") from error


def _number(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 7):
        raise ValueError(f"{text!r} is no number of ranks")
    return int(text)
