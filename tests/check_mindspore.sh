#!/bin/bash
# What the real MindSpore saves, read by shardrun: values, chunks, checksums, strategies, and text.
#
#   PYTHON=… MINDSPORE_PYTHON=DIRECTORY/bin/python CHECKPOINT=… EXPECTED=… bash tests/check_mindspore.sh
#
# Outside of CI: needs `pip install mindspore` (about 1 GB), best in an environment of its own, 5 GB of
# memory and 3 GB of disk. Settings: tests/check_reference.sh; CHECKPOINT is a Hugging Face directory of
# one safetensors file, float32 where the numpy beside MindSpore has no bfloat16. Exit 77: no mindspore.

here=$(cd "$(dirname "$0")" && pwd)
MINDSPORE_PYTHON=${MINDSPORE_PYTHON:-python3}
"$MINDSPORE_PYTHON" -c 'import mindspore' 2>/dev/null ||
    { echo "check_mindspore: no mindspore; set MINDSPORE_PYTHON"; exit 77; }
. "$here/check_reference.sh"
CHECKPOINT=${CHECKPOINT:-$here/../launcher/demo}
export WORK PYTHONPATH="$here/..:$PYTHONPATH"

cat >"$WORK/save.py" <<'P'
"""Saves tensors of every dtype, and what is to be refused."""
import sys

import mindspore as ms
import numpy as np
from mindspore import Tensor

folder = sys.argv[1]
draw = np.random.default_rng(0)
DTYPES = {
    "float32": ms.float32, "float16": ms.float16, "bfloat16": ms.bfloat16, "float64": ms.float64,
    "int8": ms.int8, "uint8": ms.uint8, "int32": ms.int32, "int64": ms.int64, "bool": ms.bool_,
}
values = {name: draw.integers(0, 2 if name == "bool" else 100, (33, 7)) for name in DTYPES}
values["scalar"] = np.array(7)
DTYPES["scalar"] = ms.float32
entries = [
    {"name": name, "data": Tensor(values[name].astype(np.float32), DTYPES[name])} for name in DTYPES
]
ms.save_checkpoint(entries, f"{folder}/plain.ckpt")
ms.save_checkpoint(entries, f"{folder}/crc.ckpt", crc_check=True)
# Of what shardrun reads in safetensors; MindSpore's bfloat16 needs the numpy that it was built with.
known = ("float32", "float16", "int8", "uint8", "int32", "int64", "scalar")
others = [entry for entry in entries if entry["name"] in known]
ms.save_checkpoint(others, f"{folder}/crc.safetensors", crc_check=True, format="safetensors")
ms.save_checkpoint(entries, f"{folder}/encrypted.ckpt", enc_key=b"0123456789ABCDEF")
ms.save_checkpoint(entries, f"{folder}/string.ckpt", append_dict={"net": "llama"})
ms.save_checkpoint(entries, f"{folder}/epoch.ckpt", append_dict={"epoch_num": 3})
nothing = {"name": "nothing", "data": Tensor(np.zeros((0, 3)), ms.float32)}
ms.save_checkpoint([nothing, entries[0]], f"{folder}/nothing.ckpt")
int4 = Tensor(values["int8"].astype(np.int8), dtype=ms.qint4x2)
ms.save_checkpoint([{"name": "int4", "data": int4}], f"{folder}/int4.ckpt")
# Of 1.1 GB, which is three slices; rows of 300,003 bytes, so that slices end inside one.
large = draw.integers(-100, 100, (3700, 300003), dtype=np.int8)
values["large"], values["weight"] = large, values["float32"]
pair = [{"name": "large", "data": Tensor(large)}, entries[0]]
ms.save_checkpoint(pair, f"{folder}/large.ckpt", crc_check=True)
np.savez(f"{folder}/values.npz", **values)
P

cat >"$WORK/convert.py" <<'P'
"""A Hugging Face checkpoint as MindFormers' users have it: whole, fused, by rank, with a strategy."""
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor
from mindspore.train import node_strategy_pb2

source, target = Path(sys.argv[1]), Path(sys.argv[2])
NAMES = [
    ("embed_tokens.weight", "tok_embeddings.embedding_weight"), ("self_attn.q_proj", "attention.wq"),
    ("self_attn.k_proj", "attention.wk"), ("self_attn.v_proj", "attention.wv"),
    ("self_attn.o_proj", "attention.wo"), ("mlp.gate_proj", "feed_forward.w1"),
    ("mlp.down_proj", "feed_forward.w2"), ("mlp.up_proj", "feed_forward.w3"),
    ("input_layernorm", "attention_norm"), ("post_attention_layernorm", "ffn_norm"),
    ("model.norm.", "model.norm_out."),
]


def renamed(name):
    for theirs, ours in NAMES:
        name = name.replace(theirs, ours)
    return name


def save(weights, path, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = [
        {"name": name, "data": Tensor(value, dtype)} for name, (value, dtype) in weights.items()
    ]
    ms.save_checkpoint(entries, str(path), **how)


def part(name, value, rank, size):
    if any(f".{word}." in name for word in ("wq", "wk", "wv", "w1", "w3")):
        return np.split(value, size)[rank]
    if any(f".{word}." in name for word in ("wo", "w2")):
        return np.split(value, size, axis=1)[rank]
    return value


def fused(weights):
    done = dict(weights)
    for name in weights:
        for words, together in ((("wq", "wk", "wv"), "w_qkv"), (("w1", "w3"), "w_gate_hidden")):
            if f".{words[0]}." in name:
                parts = [done.pop(name.replace(f".{words[0]}.", f".{word}.")) for word in words]
                joined = np.concatenate([value for value, _ in parts])
                done[name.replace(f".{words[0]}.", f".{together}.")] = (joined, parts[0][1])
    return done


loaded = ms.load_checkpoint(str(next(source.glob("*.safetensors"))), format="safetensors")
weights = {
    renamed(name): (value.astype(ms.float32).asnumpy(), value.dtype) for name, value in loaded.items()
}
save(weights, target / "whole" / "llama.ckpt", crc_check=True)
save(fused(weights), target / "fused" / "llama.ckpt")
save(weights, target / "safetensors" / "model.safetensors", format="safetensors", crc_check=True)
for rank in range(2):
    mine = {name: (part(name, value, rank, 2), dtype) for name, (value, dtype) in weights.items()}
    save(fused(mine), target / "ranks" / f"rank_{rank}" / f"checkpoint_{rank}.ckpt")
    save(mine, target / "strategy" / f"rank_{rank}" / f"checkpoint_{rank}.ckpt")
message = node_strategy_pb2.ParallelStrategyMap(current_stage=1)
for name, (value, _) in weights.items():
    item = message.parallel_strategy_item.add(node_name=f"MatMul_{name}")
    item.parallel_strategys.stage = 0
    item.parallel_strategys.parallel_strategy.add(dim=[1, 2])
    layout = message.parallel_layout_item.add(param_name=name).parallel_layouts
    layout.dev_matrix.add(dim=[2])
    cut = [0 if a != b else -1 for a, b in zip(value.shape, part(name, value, 0, 2).shape)]
    layout.tensor_map.add(dim=cut)
    layout.param_split_shape.add()
    layout.indices_offset.add()
    layout.field = layout.opt_weight_shard_step = layout.opt_weight_shard_size = 0
for rank in range(2):
    path = target / "strategy" / "strategy" / f"ckpt_strategy_rank_{rank}.ckpt"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(message.SerializeToString())
P

cat >"$WORK/read.py" <<'P'
"""Compares what shardrun reads with what was saved."""
import sys
import time
from pathlib import Path

import numpy as np
import torch

from parallel.checkpoint.readers.mindspore.file import MindSporeFile
from parallel.checkpoint.readers.mindspore.sums import has_right_sum
from parallel.checkpoint.readers.safetensors_file import SafetensorsFile
from parallel.errors import CheckpointError

folder = Path(sys.argv[1])
values = np.load(folder / "values.npz")


def whole(file, name):
    return file.read(name, tuple(slice(0, length) for length in file.tensors[name].shape))


for name in ("plain.ckpt", "crc.ckpt"):
    file = MindSporeFile(folder / name)
    for tensor, info in file.tensors.items():
        assert info.dtype == ("float32" if tensor == "scalar" else tensor), (tensor, info)
        assert np.array_equal(whole(file, tensor).double().numpy(), values[tensor]), tensor
    assert len(file.tensors) == 10
    assert has_right_sum(file) == (name == "crc.ckpt")
assert MindSporeFile(folder / "nothing.ckpt").tensors.keys() == {"float32"}
assert MindSporeFile(folder / "epoch.ckpt").tensors["epoch_num"].shape == ()
int4 = MindSporeFile(folder / "int4.ckpt")
assert int4.int4 == {"int4"} and np.array_equal(whole(int4, "int4").numpy(), values["int8"])
for name in ("encrypted.ckpt", "string.ckpt"):
    try:
        MindSporeFile(folder / name)
        sys.exit(f"{name} was not refused")
    except CheckpointError as error:
        print(error)
start = time.perf_counter()
large = MindSporeFile(folder / "large.ckpt")
opened = time.perf_counter()
print(f"large.ckpt: {(folder / 'large.ckpt').stat().st_size:,} bytes, "
      f"{len(large._stored['large'].chunks)} slices, opened in {(opened - start) * 1e3:.2f} ms")
assert len(large._stored["large"].chunks) > 2
for rows in (slice(0, 3), slice(1230, 1240), slice(1780, 1800), slice(3000, 3700)):
    for columns in (slice(0, 300003), slice(7, 11), slice(299999, 300003)):
        found = large.read("large", (rows, columns)).numpy()
        assert np.array_equal(found, values["large"][rows, columns]), (rows, columns)
assert np.array_equal(whole(large, "large").numpy(), values["large"])
assert large.check_sum() is True
assert has_right_sum(SafetensorsFile(folder / "crc.safetensors")) is True
P

mkdir "$WORK/values" "$WORK/forms"
timeout 300 "$MINDSPORE_PYTHON" "$WORK/save.py" "$WORK/values" >"$WORK/out" 2>"$WORK/err"
verdict "MindSpore saves" $?
timeout 300 "$PYTHON" "$WORK/read.py" "$WORK/values" >"$WORK/out" 2>"$WORK/err"
verdict "every dtype, slice and checksum" $? "$(sed 's/^/\n     /' "$WORK/out")"
rm -rf "$WORK/values"
timeout 300 "$MINDSPORE_PYTHON" "$WORK/convert.py" "$CHECKPOINT" "$WORK/forms" \
    >"$WORK/out" 2>"$WORK/err"
verdict "MindSpore saves a model" $?
for form in whole fused safetensors ranks strategy; do
    find "$CHECKPOINT" -maxdepth 1 -type f ! -name '*safetensors*' -exec cp {} "$WORK/forms/$form" \;
    for size in 1 2 4; do
        check "$form, $size ranks" "$PYTHON" "${TEXT[@]}" checkpoint="$WORK/forms/$form" parallel.tp=$size
    done
done
check "prepared from ranks" bash -c '
    "$PYTHON" -m launcher prepare checkpoint="$WORK/forms/ranks" output="$WORK/prepared" quant=none \
        parallel.tp=2 run_root="$WORK/outputs" && "$PYTHON" "$@" checkpoint="$WORK/prepared"' _ "${TEXT[@]}"
finish
