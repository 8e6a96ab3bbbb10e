"""Golden Stick's quantized checkpoints, written down apart from the product's reader.

The integers and scales are those that `prepare` made; only their names and forms are Golden Stick's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from tests.mindspore_checkpoints import write_ckpt

WORDS = {
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm", "model.norm.": "model.norm_out.",
    "embed_tokens.weight": "tok_embeddings.embedding_weight",
}  # fmt: skip
Parts = dict[str, Tensor]
CACHE = "attention.infer_attention.paged_attention_mgr."


def their_name(name: str) -> str:
    for ours, theirs in WORDS.items():
        name = name.replace(ours, theirs)
    return name


def bits_of(scale: Tensor) -> Tensor:
    """As `trans_fp32_to_i64` of theirs."""
    return scale.float().view(torch.int32).to(torch.int64)


def added(values: Tensor, zero_point: int) -> Tensor:
    """int32: what a zero point of the input adds to the sums of rows."""
    return (zero_point * values.int().sum(dim=1)).int()


def rtn_06(values: Tensor, scale: Tensor, input_scale: Tensor | None, zero_point: int) -> Parts:
    assert input_scale is None
    scale = scale[:, 0]
    zeros = -torch.zeros_like(scale)
    return {"weight": values, "_weight_quantizer.scale": scale, "_weight_quantizer.zp_neg": zeros}


def ptq_06(values: Tensor, scale: Tensor, input_scale: Tensor | None, zero_point: int) -> Parts:
    scale = scale[:, 0]
    if input_scale is None:
        zeros = -torch.zeros_like(scale)
        return {"weight": values, "matmul.t_scale": scale, "matmul.t_zp_neg": zeros}
    columns = values.shape[1]
    return {
        "weight": values,
        "matmul.dequant_scale": bits_of(scale.float() * input_scale),
        "input_scale": input_scale.half().repeat(columns),
        "input_zp": torch.full((columns,), zero_point, dtype=torch.int8),
        "weight_bias": (-added(values, zero_point) * (scale.double() * input_scale)).half(),
    }


def ptq_1(values: Tensor, scale: Tensor, input_scale: Tensor | None, zero_point: int) -> Parts:
    """A scale a channel is a vector, and of groups [groups, out]."""
    scale = scale[:, 0] if scale.shape[1] == 1 else scale.T.contiguous()
    if input_scale is None:
        zeros = -torch.zeros_like(scale)
        return {
            "_layer.weight": values,
            "_layer.matmul.weight_scale": scale,
            "_layer.matmul.weight_zp": zeros,
        }
    return {
        "_layer.weight": values,
        "_layer.matmul.dequant_scale": scale.float() * input_scale,
        "_layer.matmul.quant_bias": -added(values, zero_point),
        "quant_op.input_scale": input_scale.half(),
        "quant_op.input_zp": torch.tensor([zero_point], dtype=torch.int8),
    }


def ptq_1_dynamic(
    values: Tensor, scale: Tensor, input_scale: Tensor | None, zero_point: int
) -> Parts:
    assert input_scale is None
    return {"_layer.weight": values, "_layer.matmul.weight_scale": scale[:, 0].float()}


def packed(values: Tensor) -> Tensor:
    """int4 as theirs: transposed, two output channels a byte, the even one low."""
    nibbles = values.T.to(torch.int16) & 15
    return (nibbles[:, ::2] | nibbles[:, 1::2] << 4).to(torch.uint8)


Write = Callable[[Tensor, Tensor, Tensor | None, int], Parts]


def their_tensors(tensors: Mapping[str, Tensor], write: Write, bits: int = 8) -> dict[str, Tensor]:
    """A prepared checkpoint's tensors, merged, by the names and in the forms of Golden Stick."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module = name.rpartition(".")[0]
        if name.endswith((".input_zero_point", "_scale")):
            if name.endswith((".k_scale", ".v_scale")):
                prefix = module.replace("self_attn", CACHE)
                word = "key" if name.endswith(".k_scale") else "value"
                found[f"{prefix}{word}_t_scale"] = tensor.half()
                found[f"{prefix}{word}_t_zp"] = torch.zeros(len(tensor), dtype=torch.float16)
            continue
        scale = tensors.get(f"{name}_scale")
        if scale is None:
            found[their_name(name)] = tensor
            continue
        values = unpacked(tensor) if bits == 4 else tensor
        zero_point = int(tensors.get(f"{module}.input_zero_point", 0))
        parts = write(values, scale, tensors.get(f"{module}.input_scale"), zero_point)
        for part, value in parts.items():
            is_packed = bits == 4 and part.endswith("weight")
            found[f"{their_name(module)}.{part}"] = packed(value) if is_packed else value
    return found


def unpacked(stored: Tensor) -> Tensor:
    """int8 of our two values a byte, even columns low."""
    pairs = torch.stack([stored & 15, stored >> 4], dim=2).flatten(1).to(torch.int8)
    return torch.where(pairs > 7, pairs - 16, pairs)


def rank_tensors(tensors: Mapping[str, Tensor], rank: int, size: int) -> dict[str, Tensor]:
    """What one rank of theirs saves; the embedding and lm_head are whole."""
    return {name: cut(name, tensor, rank, size) for name, tensor in tensors.items()}


def cut(name: str, tensor: Tensor, rank: int, size: int) -> Tensor:
    leaf = name.rpartition(".")[2]
    is_input = leaf in ("input_scale", "input_zp", "smooth_scale", "perm")
    is_packed = tensor.dtype == torch.uint8
    is_grouped = leaf in ("weight_scale", "weight_zp") and tensor.dim() == 2
    axis = None
    if any(f".{word}." in name for word in ("wq", "wk", "wv", "w1", "w3")) or CACHE in name:
        axis = None if is_input else int(is_packed or is_grouped)
    elif any(f".{word}." in name for word in ("wo", "w2")):
        axis = {1: 0 if is_input else None, 2: 0 if is_packed or is_grouped else 1}[tensor.dim()]
    if axis is None or tensor.shape[axis] == 1:
        return tensor
    return tensor.chunk(size, axis)[rank].contiguous()


def fused(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One rank's tensors with q, k, v and gate, up as one linear each."""
    found: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        for word in ("wq", "wk", "wv"):
            name = name.replace(f".{word}.", ".w_qkv.")
        for word in ("w1", "w3"):
            name = name.replace(f".{word}.", ".w_gate_hidden.")
        found.setdefault(name, []).append(tensor)
    return {name: joined(name, parts) for name, parts in found.items()}


def joined(name: str, parts: list[Tensor]) -> Tensor:
    """Along the output channels; what belongs to the input is the same in all."""
    if name.endswith(("input_scale", "input_zp")):
        return parts[0]
    is_transposed = parts[0].dtype == torch.uint8 or ".matmul." in name
    return torch.cat(parts, parts[0].dim() - 1 if is_transposed else 0)


def write_directory(
    path: Path,
    tensors: Mapping[str, Tensor],
    shape: Mapping[str, object],
    block: Mapping[str, object] | None,
    *,
    size: int = 1,
    suffix: str = ".ckpt",
) -> Path:
    """The files of `size` ranks, or of the whole model, and the YAML."""
    path.mkdir(parents=True, exist_ok=True)
    for rank in range(size):
        folder = path / f"rank_{rank}" if size > 1 else path
        folder.mkdir(exist_ok=True)
        held = rank_tensors(tensors, rank, size) if size > 1 else dict(tensors)
        if suffix == ".ckpt":
            write_ckpt(folder / "rtn-a16w8.ckpt", held)
        else:
            save_file({n: t.contiguous() for n, t in held.items()}, folder / "ptq.safetensors")
    config = {**shape, **({"quantization_config": dict(block)} if block else {})}
    model = {"model_config": config, "arch": {"type": "LlamaForCausalLM"}}
    (path / "predict.yaml").write_text(yaml.safe_dump({"model": model}))
    return path
