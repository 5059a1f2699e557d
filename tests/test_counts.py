"""Parameters, FLOPs and bytes: the published totals, closed forms for tiny models, laws that hold for every preset."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moesim
from moesim.catalog.models import MODEL_NAMES, load_model
from moesim.describe.counts import (
    PARTS,
    active_parameters_by_part,
    backward_flops_by_part,
    describe,
    forward_flops_by_part,
    layer_flops,
    layer_parameters,
    mtp_parameters,
    parameters_by_part,
    published_active_parameters,
    stack_parameters,
    total_parameters,
    training_flops_per_token,
)
from moesim.describe.flops import mtp_flops
from moesim.describe.model import Ffn, GroupedQueryAttention, Layer, Model, MoeFfn, Router
from moesim.errors import InputError

B = 1_000_000_000
# Billions as publishers print them, so a match is one within a unit of the last digit (some round, some cut off).
PUBLISHED = {
    "mixtral-8x7b": ("46.70", "12.88"),
    "mixtral-8x22b": ("140.6", "39.16"),
    "deepseek-v2": ("236", "21"),
    "deepseek-v3": ("671.0", "36.62"),
    "qwen3-30b-a3b": ("30.53", "3.35"),
    "qwen3-235b-a22b": ("235", "22"),
    "gpt-oss-120b": ("116.83", "5.13"),
    "olmoe-1b-7b": ("6.9", "1.3"),
    "kimi-k2": ("1026", "31.69"),
    "moonlight-16b-a3b": ("16", "3"),
    "llama-3-8b": ("8.03", "8.03"),
    "llama-3-70b": ("70.55", "70.55"),
    "grok-1": ("316", "84"),
    "switch-c-2048": ("1571", "2"),  # arXiv 2101.03961 table 9
}


def tiny(**changes: object) -> Model:
    """hidden 8, two layers (dense of width 16, MoE of 4 experts of width 6 top-2 with a shared one of 5), vocab 32."""
    attention = GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=3)
    moe = MoeFfn(num_experts=4, expert=Ffn(width=6), router=Router(top_k=2), shared=Ffn(width=5))
    layers = (Layer(attention=attention, ffn=Ffn(width=16)), Layer(attention=attention, ffn=moe))
    return dataclasses.replace(Model(name="tiny", hidden=8, vocab=32, layers=layers), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PUBLISHED)
def test_total_and_active_parameters_are_the_published_ones(name: str) -> None:
    model = load_model(name)
    counted = (total_parameters(model), published_active_parameters(model))
    for count, printed in zip(counted, PUBLISHED[name], strict=True):
        last_digit = 10.0 ** -len(printed.partition(".")[2])
        assert count / B == pytest.approx(float(printed), abs=last_digit)


def test_the_hypothetical_model_is_of_the_class_its_name_says() -> None:
    counted = describe(load_model("hypothetical-1t-a50b"))
    assert counted.hypothetical
    assert counted.total_parameters / B == pytest.approx(1000, rel=0.03)
    assert counted.active_parameters / B == pytest.approx(50, rel=0.03)


def test_deepseek_v3_counts_are_exact_with_and_without_embedding_and_mtp_layer() -> None:
    counted = describe(load_model("deepseek-v3"))
    assert counted.active_parameters / B == pytest.approx(37.55, abs=0.005)
    assert counted.active_parameters_published == counted.active_parameters_no_input_embedding
    # The checkpoint repeats embedding and head in its extra layer: 684.5B in all (its model card says 685B).
    repeated = 2 * 129280 * 7168
    assert (counted.total_parameters_with_mtp + repeated) / B == pytest.approx(684.5, abs=0.1)


def test_parts_of_a_tiny_model_are_what_a_hand_counts() -> None:
    model = tiny()
    attention = 8 * 12 + 2 * 8 * 6 + 12 * 8
    expected = {
        "input_embedding": 32 * 8,
        "attention": 2 * attention,
        "router": 8 * 4,
        "experts": 4 * 3 * 8 * 6,
        "shared_experts": 3 * 8 * 5,
        "dense_ffn": 3 * 8 * 16,
        "norms": 2 * 2 * 8 + 8,
        "head": 32 * 8,
        "extra": 0,
    }
    assert parameters_by_part(model) == expected
    assert active_parameters_by_part(model) == expected | {"experts": 2 * 3 * 8 * 6}


def test_flops_of_a_tiny_model_are_what_a_hand_counts() -> None:
    flops = forward_flops_by_part(tiny(), seq_len=10)
    attention = 8 * 12 + 2 * 8 * 6 + 12 * 8
    assert flops == {
        "attention_projections": 2 * 2 * attention,
        "attention_sequence": 2 * (2 * 4 * (3 + 3) * 5),  # 5 keys on average of 10
        "router": 2 * 8 * 4,
        "experts": 2 * 2 * 3 * 8 * 6,
        "shared_experts": 2 * 3 * 8 * 5,
        "dense_ffn": 2 * 3 * 8 * 16,
        "head": 2 * 8 * 32,
    }


def test_plain_feed_forward_blocks_have_two_matrices() -> None:
    model = tiny(layers=(Layer(attention=tiny().layers[0].attention, ffn=Ffn(width=16, gated=False)),))
    assert parameters_by_part(model)["dense_ffn"] == 2 * 8 * 16
    assert forward_flops_by_part(model, 10)["dense_ffn"] == 2 * 2 * 8 * 16


def test_a_window_shorter_than_the_sequence_cuts_the_sequence_term() -> None:
    def sequence_flops(window: int | None, *, full: bool = False) -> float:
        attention = dataclasses.replace(tiny().layers[0].attention, sliding_window=window)
        model = tiny(layers=(Layer(attention=attention, ffn=Ffn(width=16)),))
        return forward_flops_by_part(model, 100, full_attention=full)["attention_sequence"]

    per_key = 2 * 4 * (3 + 3)
    assert sequence_flops(None) == per_key * 50
    assert sequence_flops(100) == sequence_flops(200) == per_key * 50
    assert sequence_flops(10) == pytest.approx(per_key * (10 - 10 * 10 / 200))
    assert sequence_flops(None, full=True) == per_key * 100
    assert sequence_flops(10, full=True) == per_key * 10


def test_an_encoder_sees_the_whole_sequence_and_cross_attention_too() -> None:
    attention = tiny().layers[0].attention
    assert isinstance(attention, GroupedQueryAttention)
    encoder = Layer(attention=attention, ffn=Ffn(width=16), causal=False)
    decoder = Layer(attention=attention, ffn=Ffn(width=16), cross_attention=attention, num_norms=3)
    causal = Layer(attention=attention, ffn=Ffn(width=16))
    by_kind = [layer_flops(tiny(), layer, 10).attention_sequence for layer in (causal, encoder, decoder)]
    assert by_kind == [by_kind[0], 2 * by_kind[0], 3 * by_kind[0]]


def test_a_tied_table_is_counted_once_and_stays_active_as_the_head() -> None:
    tied, untied = describe(tiny(tie_embeddings=True)), describe(tiny())
    assert untied.total_parameters - tied.total_parameters == 32 * 8
    assert tied.active_parameters_no_input_embedding == tied.active_parameters
    assert untied.active_parameters_no_input_embedding == untied.active_parameters - 32 * 8
    assert tied.flops_by_part["head"] == untied.flops_by_part["head"]


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_parts_add_up_and_active_never_exceeds_total(name: str) -> None:
    model = load_model(name)
    counted = describe(model)
    assert tuple(counted.parameters_by_part) == PARTS
    assert sum(counted.parameters_by_part.values()) == counted.total_parameters
    assert sum(counted.active_parameters_by_part.values()) == counted.active_parameters
    assert counted.active_parameters_no_input_embedding <= counted.active_parameters <= counted.total_parameters
    assert (counted.active_parameters < counted.total_parameters) == model.is_moe
    by_layer = stack_parameters(model, model.layers)
    assert by_layer.total == sum(layer_parameters(model, layer).total for layer in model.layers)
    assert by_layer.experts == counted.parameters_by_part["experts"]


@pytest.mark.parametrize("name", [n for n in MODEL_NAMES if not n.startswith("switch")])
def test_flops_without_the_sequence_term_are_twice_the_active_matrix_parameters(name: str) -> None:
    """Norms, biases and sinks multiply nothing; they are under 0.1 % of any of these models."""
    model = load_model(name)
    forward = forward_flops_by_part(model, 4096)
    without_sequence = sum(forward.values()) - forward["attention_sequence"]
    active = active_parameters_by_part(model)
    embedding = 0 if model.tie_embeddings else active["input_embedding"]
    assert without_sequence == pytest.approx(2 * (sum(active.values()) - embedding), rel=1e-3)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "deepseek-v3", "gpt-oss-120b", "switch-base-128"])
def test_backward_is_twice_forward_and_training_is_their_sum(name: str) -> None:
    model = load_model(name)
    forward, backward = forward_flops_by_part(model, 4096), backward_flops_by_part(model, 4096)
    assert backward == {part: 2 * value for part, value in forward.items()}
    assert training_flops_per_token(model, 4096) == pytest.approx(3 * sum(forward.values()))


def test_mtp_layers_are_counted_apart() -> None:
    model = tiny()
    with_mtp = dataclasses.replace(model, mtp_layers=(model.layers[1],))
    assert total_parameters(with_mtp) == total_parameters(model)
    assert mtp_parameters(with_mtp) == layer_parameters(model, model.layers[1]).total + 2 * 8 * 8 + 3 * 8
    assert mtp_parameters(model) == 0
    plain = training_flops_per_token(with_mtp, 10)
    assert training_flops_per_token(with_mtp, 10, with_mtp=True) - plain == pytest.approx(3 * mtp_flops(with_mtp, 10))
    extra = 2 * 2 * 8 * 8 + 2 * 8 * 32
    assert mtp_flops(with_mtp, 10) == layer_flops(model, model.layers[1], 10).total + extra


@settings(max_examples=40, deadline=None)
@given(
    num_experts=st.integers(1, 64),
    top_k=st.integers(1, 64),
    width=st.integers(1, 50),
    seq_len=st.integers(1, 100_000),
)
def test_more_experts_add_parameters_but_only_router_flops(
    num_experts: int, top_k: int, width: int, seq_len: int
) -> None:
    def model(experts: int) -> Model:
        moe = MoeFfn(num_experts=experts, expert=Ffn(width=width), router=Router(top_k=min(top_k, num_experts)))
        return tiny(layers=(Layer(attention=tiny().layers[0].attention, ffn=moe),))

    small, large = model(num_experts), model(2 * num_experts)
    assert parameters_by_part(large)["experts"] == 2 * parameters_by_part(small)["experts"]
    few, many = forward_flops_by_part(small, seq_len), forward_flops_by_part(large, seq_len)
    assert many["router"] == 2 * few["router"]
    assert {k: v for k, v in many.items() if k != "router"} == {k: v for k, v in few.items() if k != "router"}


def test_weight_bytes_follow_the_precision_except_where_training_keeps_sixteen_bits() -> None:
    wide, narrow = describe(tiny()), describe(tiny(), precision="fp8")
    assert wide.weight_bytes == 2 * wide.total_parameters
    assert narrow.weight_bytes_by_part["experts"] == wide.weight_bytes_by_part["experts"] / 2
    assert narrow.weight_bytes_by_part["router"] == wide.weight_bytes_by_part["router"]
    assert describe(tiny(), precision="float32").weight_bytes == 4 * wide.total_parameters


def test_describe_refuses_by_name() -> None:
    with pytest.raises(InputError, match="describe: seq_len: must be at least 1; got 0"):
        describe(tiny(), 0)
    with pytest.raises(InputError, match=r"describe: seq_len: must be a whole number; got 4096\.0"):
        describe(tiny(), 4096.0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"describe: precision: is not known; got 'fp9'\. Did you mean fp8"):
        describe(tiny(), precision="fp9")


def test_a_description_shows_itself_as_a_table_and_as_plain_values() -> None:
    counted = moesim.describe(load_model("mixtral-8x7b"))
    text = counted._repr_html_()
    assert text.startswith("<table>")
    assert "46.70B" in text
    assert "8 experts, top-2" in text
    values = counted.to_dict()
    assert values["total_parameters"] == 46_702_792_704
    assert values["flops_by_part"]["experts"] == counted.flops_by_part["experts"]


def test_names_are_escaped_in_the_table() -> None:
    assert "<script>" not in describe(tiny(name="<script>"))._repr_html_()
