"""Who says how the weights of a directory are quantized, or are to be. Needs no torch.

A quantization_config says one thing of two: beside Golden Stick's integers, how they are to be read;
beside float weights, how to quantize them.
"""

from __future__ import annotations

from pathlib import Path

from parallel.checkpoint.config_values import CONFIG
from parallel.checkpoint.mindformers.directory import (
    ModelFile,
    find_model_file,
    is_model_file,
    read_model_file,
)
from parallel.checkpoint.readers.golden_stick.names import is_quantized_name
from parallel.checkpoint.readers.mindformers.files import has_weights, is_mindformers, open_ranks
from parallel.checkpoint.source import FLOAT_DTYPES
from quant.scheme import QuantScheme


def find_statement(path: Path) -> ModelFile | None:
    """The YAML of a directory that says a scheme, whatever its weights are; None: none does.

    Beside a config.json a YAML may be anything, and is looked at only if it is the one and theirs.
    """
    if (path / CONFIG).exists() and not is_model_file(path):
        return None
    found = find_model_file(path)
    said = read_model_file(found) if found else None
    return said if said and said.scheme and said.scheme.quant_method else None


def find_quantization(path: Path, asked: QuantScheme | None = None) -> ModelFile | None:
    """What says how the weights of a directory were quantized; None: they were not.

    Args:
        asked: the scheme that the user says, for a directory that has no YAML.

    Raises:
        CheckpointError: the YAML that stands in for a config.json is not read.
    """
    said = find_statement(path)
    if said is not None:
        return None if _holds_floats(path) else said
    if asked is None or asked.quant_method is None:
        return None
    if is_mindformers(path) and _is_quantized(path):
        return ModelFile(Path("`quant`"), {}, asked)
    return None


def wished_scheme(path: Path) -> ModelFile | None:
    """The YAML that says how to quantize the float weights of a directory; None: none does."""
    said = find_statement(path)
    return said if said is not None and _holds_floats(path) else None


def _holds_floats(path: Path) -> bool:
    """Whether there are weights, and none of them is quantized."""
    if any(path.glob("pytorch_model*.bin")) and not any(path.glob("*.safetensors")):
        return True
    return has_weights(path) and not _is_quantized(path)


def _is_quantized(path: Path) -> bool:
    """Whether the files hold integers, or a part that only Golden Stick's have."""
    return any(
        info.dtype not in FLOAT_DTYPES or is_quantized_name(name)
        for rank in open_ranks(path)[:1]
        for file in rank.files.values()
        for name, info in file.tensors.items()
    )
