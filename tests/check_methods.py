"""Compare GPTQ and AWQ with llm-compressor's on the demo model; a script, not a test of the suite.

    python -m venv peers && peers/bin/pip install llmcompressor sentencepiece protobuf
    PYTHONPATH=. peers/bin/python tests/check_methods.py

Prints one line for each linear of the first decoder layers:

    same Hessian   both round one weight by one Hessian and one scale: share of equal integers
    whole layer    the integers of two whole calibrations on the same tokens
    error          of the output of the product on the calibration inputs, ours over theirs

and for AWQ the largest relative difference of the scales that were folded into each norm.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from sentencepiece import SentencePieceProcessor
from transformers import AutoModelForCausalLM

from parallel.calibration.forward import LayerForward
from parallel.calibration.read import embed, read_layer
from parallel.calibration.result import MODULES
from parallel.calibration.walk import Calibration, calibrate
from parallel.checkpoint.open import open_checkpoint
from parallel.group import LoneGroup
from quant.calibrate import Hessian
from quant.inputs import INPUTS
from quant.methods.awq import awq_scales
from quant.methods.gptq import GPTQArguments, factor, round_rows
from quant.methods.ptq import Recipe
from quant.numeric import Grid
from quant.rounding import quantize

DEMO = Path(__file__).parents[1] / "launcher" / "demo"
GRID = Grid(4, 32)
DTYPE = torch.float32


def calibration_tokens(count: int, length: int) -> list[list[int]]:
    """The beginning of the demo's held-out text, in samples of one length."""
    text = (DEMO / "held_out.txt").read_text(encoding="utf-8")
    ids = SentencePieceProcessor(model_file=str(DEMO / "tokenizer.model")).encode(text)
    return [ids[start : start + length] for start in range(0, count * length, length)]


def peer_model(samples: list[list[int]], modifiers: list) -> torch.nn.Module:
    """The demo model after llm-compressor."""
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=DTYPE)
    data = Dataset.from_dict(
        {"input_ids": samples, "attention_mask": [[1] * len(ids) for ids in samples]}
    )
    oneshot(
        model=model, dataset=data, recipe=modifiers, pipeline="sequential",
        max_seq_length=len(samples[0]), num_calibration_samples=len(samples),
        shuffle_calibration_samples=False,
    )  # fmt: skip
    return model


def scheme() -> dict[str, QuantizationScheme]:
    weights = QuantizationArgs(num_bits=4, strategy="group", group_size=32, symmetric=True)
    return {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}


def ours(samples: list[list[int]], **how) -> list:
    checkpoint = open_checkpoint(DEMO)
    recipe = Recipe(DTYPE, dict.fromkeys(MODULES, GRID), **how)
    work = Calibration(checkpoint.config, checkpoint.source, samples, lambda _: recipe, DTYPE)
    return list(calibrate(work, LoneGroup()))


def inputs_of(samples: list[list[int]]) -> tuple:
    """The first decoder layer, and all inputs of each of its products."""
    checkpoint = open_checkpoint(DEMO)
    layer = read_layer(checkpoint.source, checkpoint.config, 0)
    forward = LayerForward(checkpoint.config, DTYPE, len(samples[0]))
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in INPUTS}
    for hidden in embed(checkpoint.source, dict(enumerate(samples)), DTYPE).values():
        forward.run(layer, hidden, lambda name, x: seen.get(name, []).append(x.clone()))
    return layer, {name: torch.cat(parts) for name, parts in seen.items()}


def integers(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (weight.float() / scale.float().repeat_interleave(32, dim=1)).round().to(torch.int8)


def compare_gptq(samples: list[list[int]]) -> None:
    peer = peer_model(
        samples, [GPTQModifier(config_groups=scheme(), ignore=["lm_head"], actorder=None)]
    )
    arguments = GPTQArguments(static_groups=True)  # as theirs
    layers = ours(samples, gptq=arguments)
    first, inputs = inputs_of(samples)
    args = scheme()["group_0"].weights
    print(f"{'linear':42}{'same Hessian':>14}{'whole layer':>14}{'error':>8}")
    for index in range(2):
        for name, module in MODULES.items():
            theirs = peer.get_submodule(f"model.layers.{index}.{module}")
            mine = layers[index].rounded[name]
            values = integers(theirs.weight.detach(), theirs.weight_scale)
            whole = (values == mine.values_NK).float().mean().item()
            same, error = float("nan"), float("nan")
            if index == 0:
                x = inputs[next(key for key, names in INPUTS.items() if name in names)]
                weight = first.products[name].weight.float()
                same = same_hessian(weight, x, arguments, args)
                wanted = x @ weight.T
                errors = [
                    ((x @ w.T - wanted).norm() / wanted.norm()).item()
                    for w in (mine.rows(slice(None), DTYPE), theirs.weight.detach())
                ]
                error = errors[0] / errors[1]
            print(f"layers.{index}.{module:33}{same:14.4%}{whole:14.4%}{error:8.3f}")


def same_hessian(weight, x, arguments, args) -> float:
    """Both algorithms on one weight, Hessian and scale: the share of equal integers."""
    observer = Hessian(x.shape[1])
    observer.update(x)
    hessian = observer.hessian_KK.tril() + observer.hessian_KK.tril(-1).T
    _, scale = quantize(weight, GRID)
    theirs, _, _ = quantize_weight(
        weight.clone()[None], hessian.clone()[None], scale[None], torch.zeros_like(scale)[None],
        None, args, percdamp=arguments.damp_percent,
    )  # fmt: skip
    mine = round_rows(weight, factor(hessian, arguments), GRID, DTYPE, arguments)
    return (integers(theirs[0], scale) == mine.values_NK).float().mean().item()


def compare_awq(samples: list[list[int]]) -> None:
    """Their candidates are no scale and i / (n - 2); n = 22 gives ours, and one of ratio 1 more."""
    peer = peer_model(
        samples,
        [AWQModifier(duo_scaling=True, n_grid=22),
         QuantizationModifier(config_groups=scheme(), ignore=["lm_head"])],
    )  # fmt: skip
    layers = ours(samples, suppression="awq", folds=tuple(INPUTS))
    stored = AutoModelForCausalLM.from_pretrained(DEMO, dtype=DTYPE)
    first, inputs = inputs_of(samples)
    print(
        f"\n{'AWQ scale of':42}{'difference':>12}{'ratio: ours, theirs (distance from the formula)':>50}"
    )
    for index, layer in enumerate(layers):
        for name, read in (
            ("input_layernorm", "qkv_proj"),
            ("post_attention_layernorm", "gate_up_proj"),
        ):
            path = f"model.layers.{index}.{name}"
            before = stored.get_submodule(path).weight.detach()
            theirs = before / peer.get_submodule(path).weight.detach()
            mine = before / layer.floats[f"{name}.weight"]
            line = f"layers.{index}.{name:33}{largest_difference(mine, theirs):12.2e}"
            if index == 0:
                candidates = awq_scales(first, read, inputs[read].abs().mean(dim=0), GRID)
                line += "".join(
                    f"{nearest_ratio(scale, candidates):>25}" for scale in (mine, theirs)
                )
            print(line)


def largest_difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted) / wanted).abs().max().item()


def nearest_ratio(scale: torch.Tensor, candidates: list[torch.Tensor]) -> str:
    """Which of our candidates a scale is, and how far it is from that."""
    differences = [largest_difference(scale, candidate) for candidate in candidates]
    best = differences.index(min(differences))
    return f"{'none' if best == 0 else (best - 1) / 20} ({differences[best]:.1e})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if not torch.cuda.is_available():  # llm-compressor's AWQ pins its samples' memory for a GPU
        torch.Tensor.pin_memory = lambda self: self
    samples = calibration_tokens(given.samples, given.length)
    print(f"{len(samples)} samples of {given.length} tokens; int4, groups of 32")
    compare_gptq(samples)
    compare_awq(samples)


if __name__ == "__main__":
    main()
