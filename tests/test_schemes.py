"""What `quant.*` may say: resolved for each module, or refused with the reason."""

from __future__ import annotations

import pytest

from launcher.config import compose
from launcher.resolve import DEMO
from parallel.checkpoint.open import open_checkpoint
from parallel.errors import ModelError
from quant.errors import QuantError
from quant.scheme import LinearScheme, QuantScheme
from tests.checkpoints import write_checkpoint

LAYER = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]
MODULES = [*(f"model.layers.{layer}.{name}" for layer in (0, 1) for name in LAYER), "lm_head"]
DOWN = "model.layers.{}.mlp.down_proj"
W8, W4 = LinearScheme("int8"), LinearScheme("int4", 128)
GROUPED = {
    "quant_method": "rtn", "weight_dtype": "int4", "weight_quant_granularity": "per_group",
    "group_size": 128,
}  # fmt: skip
AWQ = {"quant_method": "ptq", "outliers_suppression": "awq"}


def with_policies(*policies, **fields):
    return QuantScheme.from_dict({**GROUPED, "layer_policies": list(policies), **fields})


@pytest.mark.parametrize(
    ("fields", "label"),
    [
        ({"weight_dtype": "int8"}, "w8a16"),
        ({"weight_dtype": "int8", "activation_dtype": "int8"}, "w8a8"),
        ({"weight_dtype": "int4"}, "w4a16"),
        ({**GROUPED, "group_size": 32}, "w4a16 g32"),
        ({**GROUPED, "activation_dtype": "int8"}, "w4a8 g128"),
        ({**GROUPED, "weight_dtype": "int8", "group_size": 64}, "w8a16 g64"),
        ({"quant_method": None}, "none"),
    ],
)
def test_scheme_is_called_as_the_field_writes_it(fields, label):
    scheme = QuantScheme(**{"quant_method": "rtn", **fields})
    assert scheme.label == label
    assert QuantScheme.from_dict(scheme.to_dict()) == scheme
    found = {item.label for item in scheme.for_modules(MODULES).values() if item}
    assert found == ({label} - {"none"})


def test_every_module_has_its_scheme_and_lm_head_none():
    schemes = QuantScheme(**GROUPED).for_modules(MODULES)
    assert list(schemes) == MODULES
    assert schemes.pop("lm_head") is None
    assert set(schemes.values()) == {W4}


def test_first_policy_that_matches_wins_and_the_rest_inherit():
    scheme = with_policies(
        {"pattern": DOWN.format(0), "group_size": 32},
        {"pattern": "w2", "weight_dtype": "int8", "weight_quant_granularity": "per_channel"},
        {"pattern": "*.1.self_attn.*", "weight_dtype": None},
    )
    schemes = scheme.for_modules(MODULES)
    assert schemes[DOWN.format(0)] == LinearScheme("int4", 32)
    assert schemes[DOWN.format(1)] == W8
    assert schemes["model.layers.1.self_attn.o_proj"] is None
    assert schemes["model.layers.0.self_attn.o_proj"] == W4
    assert scheme.label == "w4a16 g128 mixed"
    assert QuantScheme.from_dict(scheme.to_dict()) == scheme


def test_policies_may_quantize_what_the_scheme_leaves_alone():
    policy = {"pattern": "down_proj", "weight_dtype": "int8", "activation_dtype": "int8"}
    scheme = QuantScheme(quant_method="rtn", layer_policies=(policy,))
    found = {name for name, item in scheme.for_modules(MODULES).items() if item}
    assert found == {DOWN.format(0), DOWN.format(1)}
    assert scheme.label == "mixed"


def test_policy_may_put_activations_back():
    scheme = with_policies({"pattern": "o_proj", "activation_dtype": None}, activation_dtype="int8")
    schemes = scheme.for_modules(MODULES)
    assert schemes["model.layers.0.self_attn.o_proj"] == W4
    assert schemes[DOWN.format(0)] == LinearScheme("int4", 128, "int8")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"weight_dtype": "int5"}, "must be one of null, int8, int4"),
        ({"weight_dtype": "int-4"}, r"'int-4'; did you mean int4\?$"),
        ({"weight_dtype": ["int4"]}, "must be one of null, int8, int4"),
        ({"group_size": 48}, "one of 32, 64, 128, but is 48"),
        ({"group_size": 128.0}, "but is 128.0"),
        ({"group_size": True}, "but is True"),
        ({"group_size": None}, "per_group, but quant.group_size is null"),
        ({"weight_quant_granularity": "per_channel"}, "no effect while .* is per_channel"),
        ({"weight_quant_granularity": "group"}, r"did you mean per_group\?"),
        ({"weight_dtype": None}, "nothing would be quantized"),
        ({"activation_dtype": "int4"}, "must be one of null, int8"),
        ({"act_quant_granularity": "per_tensor"}, "no effect while quant.activation_dtype is null"),
        (
            {"activation_dtype": "int8", "act_quant_granularity": "per_tensor"},
            "must be per_token beside int4 weights",
        ),
        (
            {"kvcache_quant_granularity": "per_channel"},
            "no effect while quant.kvcache_dtype is null",
        ),
        ({"quant_method": "smooth_quant"}, "write int8 for both"),
        (
            {
                "quant_method": "smooth_quant",
                "weight_dtype": "int8",
                "weight_quant_granularity": "per_channel",
                "group_size": None,
                "activation_dtype": "int8",
                "precision_recovery": "gptq",
            },
            "they are null and gptq; write quant=smooth_quant",
        ),
        ({"outliers_suppression": "awq"}, "no effect while quant.quant_method is rtn"),
        ({"precision_recovery": "gptq"}, "no effect while quant.quant_method is rtn"),
        ({"algorithm_args": {"alpha": 0.5}}, "no effect without smooth"),
        ({"weight_dtyp": "int8"}, r"not a key; did you mean weight_dtype\?$"),
        ({"layer_policies": "down_proj"}, "must be a list"),
        ({"algorithm_args": None}, "must be a mapping"),
        *(
            ({**AWQ, "algorithm_args": {"folds": folds}}, "folds` must be a list of .*at most once")
            for folds in ("down_proj", [], ["w2"], [["o_proj"]], ["o_proj", "o_proj"])
        ),
    ],
)
def test_malformed_scheme_is_refused_with_the_reason(fields, says):
    with pytest.raises(QuantError, match=says):
        QuantScheme.from_dict({**GROUPED, **fields})


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ("down_proj", "a list of mappings with a pattern"),
        ({"weight_dtype": "int8"}, "a list of mappings with a pattern"),
        ({"pattern": 3, "weight_dtype": "int8"}, "a list of mappings with a pattern"),
        ({"pattern": "o_proj"}, "says nothing"),
        ({"pattern": "o_proj", "weight_dtyp": "int8"}, r"did you mean weight_dtype\?$"),
        ({"pattern": "o_proj", "kvcache_dtype": "int8"}, "no key of a policy"),
        ({"pattern": "o_proj", 3: "int8"}, "3 is no key of a policy"),
        ({"pattern": "o_proj", "weight_dtype": "int3"}, "'int3'"),
        ({"pattern": "o_proj", "group_size": 48}, "but is 48"),
        ({"pattern": "o_proj", "group_size": None}, "group_size is null"),
        ({"pattern": "o_proj", "weight_dtype": None, "group_size": 64}, "group_size has no effect"),
        (
            {
                "pattern": "o_proj",
                "activation_dtype": "int8",
                "act_quant_granularity": "per_tensor",
            },
            "must be per_token beside int4",
        ),
    ],
)
def test_malformed_policy_is_refused_when_it_is_read(policy, says):
    with pytest.raises(QuantError, match=rf"layer_policies`.*{says}"):
        with_policies(policy)


@pytest.mark.parametrize(
    ("patterns", "says"),
    [
        (["w9"], "'w9', which matches no module"),
        (["lm_head"], "modules_to_not_convert leaves unquantized"),
        (["*.o_proj", "wo"], r"layer_policies\[1\].*an earlier policy takes"),
    ],
)
def test_policy_that_decides_of_nothing_is_refused(patterns, says):
    scheme = with_policies(*({"pattern": item, "weight_dtype": "int8"} for item in patterns))
    with pytest.raises(QuantError, match=says):
        scheme.for_modules(MODULES)


def test_static_activations_of_a_policy_need_calibration_as_those_of_the_scheme_do():
    static = {"activation_dtype": "int8", "act_quant_granularity": "per_tensor"}
    policy = {"pattern": "*.0.*", "weight_dtype": "int8", **static}
    assert with_policies({**policy, "weight_quant_granularity": "per_channel"}).needs_calibration
    assert not with_policies({"pattern": "*.0.*", "weight_dtype": None}).needs_calibration


def test_policies_that_leave_nothing_quantized_are_refused():
    scheme = with_policies({"pattern": "*", "weight_dtype": None}, weight_dtype="int4")
    with pytest.raises(QuantError, match="leave every module unquantized"):
        scheme.for_modules(MODULES)


@pytest.mark.parametrize(
    ("policy", "left_out", "says"),
    [
        ({"pattern": "k_proj", "group_size": 32}, [], "q_proj w4a16 g128, k_proj w4a16 g32"),
        ({"pattern": "w1", "weight_dtype": None}, [], "gate_proj unquantized, up_proj w4a16 g128"),
        ({"pattern": "w2", "weight_dtype": "int8"}, ["w3"], "up_proj unquantized"),
    ],
)
def test_mixture_inside_one_product_is_refused_by_name(policy, left_out, says):
    scheme = with_policies(policy, modules_to_not_convert=["lm_head", *left_out])
    with pytest.raises(QuantError, match=f"model.layers.0.*{says}.*name all of them"):
        open_checkpoint(DEMO).layout(scheme)


def test_whole_products_may_differ():
    scheme = with_policies({"pattern": "[qkv]_proj", "group_size": 32})
    assert set(open_checkpoint(DEMO).layout(scheme).labels) == {"w4a16 g32", "w4a16 g128"}


def test_exact_sums_of_groups_are_refused_and_those_of_channels_are_not():
    checkpoint = open_checkpoint(DEMO)
    with pytest.raises(QuantError, match=r"exact_sums.*scale for each group"):
        checkpoint.layout(QuantScheme(**GROUPED)).check_exact_sums(True)
    checkpoint.layout(QuantScheme(**GROUPED)).check_exact_sums(None)
    per_channel = QuantScheme(quant_method="rtn", weight_dtype="int4")
    checkpoint.layout(per_channel).check_exact_sums(True)


def test_size_at_which_a_rank_would_get_nothing_is_refused_with_the_valid_ones(tmp_path):
    """3 groups of 128 neurons, the last one short, are for 2 ranks at most."""
    path = write_checkpoint(tmp_path / "small", intermediate_size=272)
    layout = open_checkpoint(path).layout(QuantScheme(**GROUPED))
    layout.check_tp(2)
    with pytest.raises(ModelError, match=r"at most 3, .* but is 4; valid sizes: 1, 2\."):
        layout.check_tp(4)


def test_preset_of_the_command_is_int4_in_groups_of_128():
    scheme = compose(["quant=rtn_a16w4"]).quant.scheme()
    assert scheme == QuantScheme(**GROUPED)


def test_policies_of_the_command_line_reach_the_scheme():
    words = "quant.layer_policies=[{pattern:'*.down_proj',group_size:32},{pattern:wo,weight_dtype:null}]"
    schemes = compose(["quant=rtn_a16w4", words]).quant.scheme().for_modules(MODULES)
    assert schemes[DOWN.format(0)] == LinearScheme("int4", 32)
    assert schemes["model.layers.0.self_attn.o_proj"] is None
