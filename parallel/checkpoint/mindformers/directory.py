"""The YAML of a checkpoint's directory: its model as config.json would say it, and its scheme."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.checkpoint.mindformers.file import ReadFile
from parallel.checkpoint.mindformers.quantization import take_quantization
from parallel.checkpoint.mindformers.shape import present, take_shape
from parallel.checkpoint.mindformers.yaml_file import read_yaml_mapping
from parallel.errors import CheckpointError
from parallel.model.families import as_config_json
from quant.errors import QuantError
from quant.scheme import QuantScheme

_SUFFIXES = ("*.yaml", "*.yml")
# What MindFormers' LlamaConfig takes where its file is silent, and ModelConfig would not.
_DEFAULTS: Mapping[str, Any] = {
    "multiple_of": 256, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "compute_dtype": "float16", "seq_length": 2048,
}  # fmt: skip


SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class ModelFile:
    """What one YAML says.

    Attributes:
        config: the values of a config.json.
        scheme: of its `quantization_config`; None: it has none.
    """

    path: Path
    config: Mapping[str, Any]
    scheme: QuantScheme | None


def find_model_file(directory: Path) -> Path | None:
    """The one YAML of a directory; None: there is none, or there are several."""
    found = yaml_files(directory)
    return found[0] if len(found) == 1 else None


def yaml_files(directory: Path) -> list[Path]:
    """All YAML files of a directory, by name."""
    return sorted(path for suffix in _SUFFIXES for path in directory.glob(suffix))


def is_model_file(directory: Path) -> bool:
    """Whether a directory has one YAML, and that is MindFormers'."""
    found = find_model_file(directory)
    if found is None:
        return False
    try:
        model = read_yaml_mapping(found).get("model")
    except CheckpointError:
        return False
    return isinstance(model, dict) and "model_config" in model


def read_model_file(path: Path) -> ModelFile:
    """Read a MindFormers YAML that lies beside weights.

    Raises:
        CheckpointError: it is no YAML of theirs, or says what cannot be honoured.
    """
    file = ReadFile(str(path))
    model = file.mapping("model", read_yaml_mapping(path).get("model"))
    config = file.mapping("model.model_config", model.get("model_config"))
    if not config:
        raise file.refusal("model.model_config", "must say the model's shape", None, "add it")
    values = describe_model(file, model, config)
    block = config.get("quantization_config")
    take_quantization(file, block)
    return ModelFile(path, values, _scheme(file) if file.mapping("", block) else None)


def describe_model(
    file: ReadFile, model: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any]:
    """The values of a config.json, by its names, with MindFormers' defaults where the file is silent.

    Args:
        model: the whole of `model`.
        config: its `model_config`.

    Raises:
        file.error: it says what cannot be honoured.
    """
    given = {**_DEFAULTS, **present(config)}
    take_shape(file, model, given)
    shape = {
        key.removeprefix("model."): value
        for key, value in file.values.items()
        if key.startswith("model.")
    }
    shape.setdefault("max_position_embeddings", given["seq_length"])
    return as_config_json({**shape, **{key: given[key] for key in SPECIAL_TOKENS}})


def _scheme(file: ReadFile) -> QuantScheme:
    values = {
        key.removeprefix("quant."): value
        for key, value in file.values.items()
        if key.startswith("quant.")
    }
    try:
        return QuantScheme.from_dict(values)
    except QuantError as error:
        raise CheckpointError(f"{file.source}: quantization_config: {error}") from error
