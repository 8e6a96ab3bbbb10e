"""Which device and dtype a rank computes with. Importing it does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.failures import ConfigError

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "float16", "bfloat16")


def check_names(device: str, dtype: str) -> None:
    """Raises ConfigError for a name that is none of ours; needs no torch to have looked at a GPU."""
    for key, value, known in (("device", device, DEVICES), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise ConfigError(f"`{key}` must be one of {', '.join(known)}, but is {value!r}.")


def remedy(num_gpus: int) -> str:
    """What helps where there are fewer GPUs than ranks."""
    return "write device=cpu, or fewer ranks" if num_gpus else "write device=cpu"


def resolve_device(name: str, local_rank: int) -> torch.device:
    """This rank's device; auto takes a GPU where there is one.

    Raises:
        ConfigError: cuda is asked for and there is no GPU for this rank.
    """

    import torch

    num_gpus = torch.cuda.device_count() if name != "cpu" and torch.cuda.is_available() else 0
    if name == "auto" and num_gpus == 0:
        return torch.device("cpu")
    if name == "cpu":
        return torch.device("cpu")
    if local_rank >= num_gpus:
        raise ConfigError(
            f"`device` is {name}, but this host has {num_gpus} GPUs for local rank {local_rank}; "
            f"{remedy(num_gpus)}."
        )
    return torch.device("cuda", local_rank)


def resolve_dtype(name: str, checkpoint_dtype: str, device: torch.device) -> torch.dtype:
    """The compute dtype.

    auto is the checkpoint's; a CPU does not multiply float16, so there it becomes bfloat16 where
    the processor multiplies that natively, else float32.
    """

    import torch

    chosen = checkpoint_dtype if name == "auto" else name
    if name == "auto" and chosen == "float16" and device.type == "cpu":
        chosen = "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"
    dtype = getattr(torch, chosen)
    assert isinstance(dtype, torch.dtype)
    return dtype
