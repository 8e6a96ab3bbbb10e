"""What MindFormers calls the tensors of a Llama, and Hugging Face. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

# Below `model.layers.N.`: MindFormers' module, and Hugging Face's, several where they are fused
# along the rows, in this order.
_LAYER_MODULES: Mapping[str, tuple[str, ...]] = {
    "attention.wq": ("self_attn.q_proj",),
    "attention.wk": ("self_attn.k_proj",),
    "attention.wv": ("self_attn.v_proj",),
    "attention.wo": ("self_attn.o_proj",),
    "attention.w_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "feed_forward.w1": ("mlp.gate_proj",),
    "feed_forward.w2": ("mlp.down_proj",),
    "feed_forward.w3": ("mlp.up_proj",),
    "feed_forward.w_gate_hidden": ("mlp.gate_proj", "mlp.up_proj"),
    "attention_norm": ("input_layernorm",),
    "ffn_norm": ("post_attention_layernorm",),
}
_OUTER_MODULES: Mapping[str, tuple[str, ...]] = {
    "model.tok_embeddings": ("model.embed_tokens",),
    "model.norm_out": ("model.norm",),
    "lm_head": ("lm_head",),
}
_EMBEDDING = ("model.tok_embeddings.embedding_weight", "model.embed_tokens.weight")
_LAYERS = "model.layers."


def hf_modules(module: str) -> tuple[str, ...]:
    """Hugging Face's names of a MindFormers module; () for one that is not MindFormers'.

    `model.layers.0.attention.w_qkv` -> `model.layers.0.self_attn.q_proj`, … `k_proj`, … `v_proj`,
    whose rows follow each other in it. `lm_head` is both's.
    """
    prefix, rest = _split_layer(module)
    table = _LAYER_MODULES if prefix else _OUTER_MODULES
    return tuple(prefix + name for name in table.get(rest, ()))


def hf_names(name: str) -> tuple[str, ...]:
    """Hugging Face's names of a MindFormers weight or bias; () for one that is not MindFormers'."""
    if name == _EMBEDDING[0]:
        return (_EMBEDDING[1],)
    module, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias") or module == "model.tok_embeddings":
        return ()
    return tuple(f"{found}.{kind}" for found in hf_modules(module))


def mindformers_module(module: str) -> str | None:
    """What MindFormers calls a Hugging Face module that it does not fuse; None: it has no such."""
    prefix, rest = _split_layer(module)
    return next(
        (
            prefix + name
            for name, found in (_LAYER_MODULES if prefix else _OUTER_MODULES).items()
            if found == (rest,)
        ),
        None,
    )


def mindformers_name(name: str) -> str | None:
    """What MindFormers calls a Hugging Face weight or bias; None: it has no such."""
    if name == _EMBEDDING[1]:
        return _EMBEDDING[0]
    module, _, kind = name.rpartition(".")
    found = mindformers_module(module)
    return f"{found}.{kind}" if found and kind in ("weight", "bias") else None


def is_mindformers_name(name: str) -> bool:
    """Whether a tensor's name is MindFormers' and not Hugging Face's; `lm_head.weight` is both's."""
    found = hf_names(name)
    return bool(found) and found != (name,)


def by_hf_names(names: Iterable[str]) -> Iterator[str]:
    """The same tensors by Hugging Face's names; a name that is not MindFormers' stays as it is."""
    for name in names:
        yield from hf_names(name) or (name,)


def _split_layer(module: str) -> tuple[str, str]:
    """`model.layers.N.` and the rest; no prefix where it is not in a layer."""
    if not module.startswith(_LAYERS):
        return "", module
    number, _, rest = module.removeprefix(_LAYERS).partition(".")
    return (f"{_LAYERS}{number}.", rest) if number.isdecimal() else ("", module)
