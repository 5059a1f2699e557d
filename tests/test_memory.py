"""Memory of a rank: laws and closed forms. The measured B200 runs are in test_memory_b200.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.catalog.models import load_model
from moesim.cost.activations import layer_tensors, placeholder_gradient_bytes, weight_shapes, workspace_bytes
from moesim.cost.memory import RankMemory, StageProfile, stage_memory, stage_profile
from moesim.cost.static import StaticMemory, outer_parameters, rank_parameters, static_memory
from moesim.describe.model import Ffn, GroupedQueryAttention, LatentAttention, Layer, Model, MoeFfn, Router
from moesim.describe.parallel import Parallelism
from moesim.describe.parameters import mtp_parameters, total_parameters
from moesim.describe.pipeline import stage_chunks
from moesim.describe.workload import Optimizer, Training

ATTENTION = GroupedQueryAttention(num_heads=16, num_kv_heads=4, head_dim=64)
DENSE = Layer(attention=ATTENTION, ffn=Ffn(width=4096))
MOE = Layer(attention=ATTENTION, ffn=MoeFfn(num_experts=16, expert=Ffn(width=512), router=Router(top_k=4)))
MODEL = Model(name="small", hidden=1024, vocab=32000, layers=(DENSE, *(MOE,) * 7))
TRAIN = Training(seq_len=1024, global_batch=64)


def peak(
    parallel: Parallelism, train: Training = TRAIN, *, num_gpus: int = 16, stage: int = 0, skew: float = 1.0
) -> RankMemory:
    """Memory of a stage with every rank receiving its balanced share, the last one ``skew`` times as much."""
    layout = parallel.rank_layout(num_gpus)
    tokens = train.micro_batch * train.seq_len / parallel.cp / parallel.tp * parallel.etp
    num_moe = sum(item.layer.is_moe for chunk in stage_chunks(MODEL, parallel, train, stage) for item in chunk)
    shape = (layout.edp * parallel.etp, train.num_micro_batches(layout.dp), num_moe, parallel.ep)
    received = np.full(shape, tokens * 4)
    received[..., -1] *= skew
    return stage_memory(MODEL, parallel, layout, train, stage=stage, received_GMLR=received)


def test_a_hotter_rank_needs_more_memory_and_is_the_one_reported() -> None:
    even, skewed = peak(Parallelism(ep=8)), peak(Parallelism(ep=8), skew=3.0)
    assert skewed.rank % 8 == 7
    assert skewed.activations_bytes > even.activations_bytes
    assert skewed.dispatch_bytes > 1.5 * even.dispatch_bytes


def test_expert_parallelism_does_not_divide_the_routed_activations_of_a_rank() -> None:
    small, large = peak(Parallelism(ep=2)), peak(Parallelism(ep=16))
    assert small.activations_bytes == pytest.approx(large.activations_bytes)
    assert small.dispatch_bytes == pytest.approx(large.dispatch_bytes)
    assert small.weights_bytes > large.weights_bytes


@pytest.mark.parametrize(
    ("schedule", "vpp", "most"),
    [("1f1b", 1, [4, 3, 2, 1]), ("1f1b", 2, [11, 9, 7, 5]), ("gpipe", 1, [8] * 4), ("zb-h1", 1, [4] * 4)],
)
def test_a_stage_holds_as_many_chunks_as_its_schedule_has_in_flight(schedule: str, vpp: int, most: list[int]) -> None:
    model = replace(MODEL, layers=(DENSE,) * 8)
    parallel, pp = Parallelism(pp=4, vpp=vpp), 4
    layout, train = parallel.rank_layout(pp), replace(TRAIN, global_batch=8, schedule=schedule)
    chunk = 8 // pp // vpp * TRAIN.seq_len * sum(tensor.bytes for tensor in layer_tensors(model, DENSE, parallel))
    for stage in range(pp):
        profile = stage_profile(model, parallel, layout, train, stage=stage, received_GMLR=None)
        assert profile.live_KGRP.sum(axis=-1).max() == pytest.approx(most[stage] * chunk)
        assert profile.live_KGRP[0].sum() == 0.0


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("pp", [1, 4])
@pytest.mark.parametrize("mtp", [False, True])
def test_all_ranks_of_a_replica_together_hold_every_parameter_once_but_the_embedding_where_two_stages_need_it(
    pp: int, tied: bool, mtp: bool
) -> None:
    model = replace(MODEL, tie_embeddings=tied, mtp_layers=(MOE,))
    parallel = Parallelism(pp=pp, zero=0)
    train = replace(TRAIN, mtp=mtp)
    held = sum(
        static_memory(model, parallel, parallel.rank_layout(pp), train, stage=stage).weights_bytes
        for stage in range(pp)
    )
    copy = model.vocab * model.hidden if (tied or mtp) and pp > 1 else 0
    assert held == 2 * (total_parameters(model) + mtp * mtp_parameters(model) + copy)
    assert outer_parameters(replace(model, mtp_layers=()), parallel, train, pp - 1) == outer_parameters(
        model, parallel, replace(train, mtp=False), pp - 1
    )


PRESETS = ("mixtral-8x7b", "deepseek-v3", "qwen3-30b-a3b", "gpt-oss-120b", "kimi-k2", "switch-base-128", "llama-3-8b")


@pytest.mark.parametrize("name", PRESETS)
def test_one_rank_alone_holds_the_models_total_to_the_last_parameter(name: str) -> None:
    model, whole = load_model(name), Parallelism()
    (chunk,) = stage_chunks(model, whole, TRAIN, 0)
    held = sum(sum(rank_parameters(model, placed, whole)) for placed in chunk)
    assert held + outer_parameters(model, whole, TRAIN, 0) == total_parameters(model)


@pytest.mark.parametrize("tp", [1, 4, 16])
@pytest.mark.parametrize("name", PRESETS)
def test_a_ranks_parameters_are_its_weight_products_but_for_norms_and_biases(name: str, tp: int) -> None:
    # Left out of the products: biases, norms (of queries and keys too) and sinks, together below 1 in 200.
    model, parallel = load_model(name), Parallelism(tp=tp)
    for layer in set(model.layers):
        alike = replace(layer, ffn=Ffn(width=8192))  # products of experts stand once there, not per expert
        (chunk,) = stage_chunks(replace(model, layers=(alike,)), parallel, TRAIN, 0)
        products = sum(rows * columns for rows, columns in weight_shapes(model.hidden, alike, parallel))
        dense, experts = rank_parameters(model, chunk[0], parallel)
        assert experts == 0
        assert products <= dense < 1.005 * products


def test_experts_are_divided_by_ep_and_etp_and_the_rest_by_tp() -> None:
    chunk = stage_chunks(MODEL, Parallelism(), TRAIN, 0)[0]
    dense_one, experts_one = rank_parameters(MODEL, chunk[1], Parallelism())
    dense_four, experts_split = rank_parameters(MODEL, chunk[1], Parallelism(tp=4, ep=8, etp=2))
    whole = 16 * 1024 + 2 * 1024  # router and norms
    assert experts_split == experts_one / 16
    assert dense_four == (dense_one - whole) / 4 + whole
    assert outer_parameters(MODEL, Parallelism(pp=2), TRAIN, 0) == 32000 * 1024


def test_a_key_value_head_is_never_cut_by_tensor_parallelism() -> None:
    def held(tp: int, layer: Layer) -> tuple[float, float, float]:
        """Attention's dense parameters, its weight products' elements, keys and values kept per token."""
        parallel = Parallelism(tp=tp)
        placed = stage_chunks(replace(MODEL, layers=(layer,)), parallel, TRAIN, 0)[0][0]
        kept = {tensor.name: tensor.elements for tensor in layer_tensors(MODEL, layer, parallel)}
        qkv_rows = weight_shapes(MODEL.hidden, layer, parallel)[0][0]
        return rank_parameters(MODEL, placed, parallel)[0], qkv_rows, kept["keys"] + kept["values"]

    four, eight, sixteen = (held(tp, DENSE) for tp in (4, 8, 16))
    assert (four[1], eight[1], sixteen[1]) == ((4 + 2) * 64, (2 + 2) * 64, (1 + 2) * 64)
    assert four[2] == eight[2] == sixteen[2] == 2 * 64
    norms = 2 * 1024
    whole = four[0] - norms - 2 * 64 * 1024  # what four ranks divide, without the head of each
    assert sixteen[0] == pytest.approx(whole / 4 + norms + 2 * 64 * 1024)
    biased = replace(DENSE, attention=replace(ATTENTION, qkv_bias=True))
    assert held(16, biased)[0] - sixteen[0] == pytest.approx((1 + 2) * 64)


def test_static_bytes_per_parameter_are_2_of_weight_4_of_gradient_and_12_of_optimizer() -> None:
    parallel = Parallelism(ep=16, zero=0)
    static = static_memory(MODEL, parallel, parallel.rank_layout(16), TRAIN, stage=0)
    assert static.gradients_bytes == 2 * static.weights_bytes
    assert static.optimizer_bytes == 6 * static.weights_bytes


def test_number_formats_of_the_optimizer_scale_gradients_and_states() -> None:
    def static(optimizer: Optimizer, offload: str = "none") -> StaticMemory:
        train = replace(TRAIN, optimizer=optimizer, offload=offload)
        parallel = Parallelism(zero=0)
        return static_memory(MODEL, parallel, parallel.rank_layout(1), train, stage=0)

    full, lean = static(Optimizer()), static(Optimizer(gradients="bf16", main_weights="remainder", moments="bf16"))
    assert lean.gradients_bytes == full.gradients_bytes / 2
    assert lean.optimizer_bytes == full.optimizer_bytes / 2
    assert static(Optimizer(), offload="optimizer") == replace(full, optimizer_bytes=0.0)
    experts = 7 * 16 * 3 * 1024 * 512  # one optimizer's; dense parameters have their own
    assert full.update_bytes == 0.0
    assert lean.update_bytes == 2 * 4 * experts
    assert static(Optimizer(main_weights="bf16")).update_bytes == 4 * experts


def test_bf16_moments_make_the_optimizer_step_the_peak_where_little_is_kept() -> None:
    short = replace(TRAIN, seq_len=16, optimizer=Optimizer(gradients="bf16", main_weights="remainder", moments="bf16"))
    memory = peak(Parallelism(ep=8, zero=1), short)
    assert memory.moment == "optimizer step"
    longer = peak(Parallelism(ep=8, zero=1), replace(short, seq_len=16384))
    assert longer.moment != "optimizer step"
    assert longer.optimizer_bytes < memory.optimizer_bytes


@pytest.mark.parametrize("recompute", ["none", "moe_act", "full"])
def test_activations_in_the_hosts_memory_leave_two_layers_of_a_chunk_on_the_gpu(recompute: str) -> None:
    train = replace(TRAIN, recompute=recompute)
    keep = peak(Parallelism(pp=2), train)
    away = peak(Parallelism(pp=2), replace(train, offload="activations"))
    assert away.activations_bytes < keep.activations_bytes
    assert away.weights_bytes == keep.weights_bytes


def test_zero_1_shards_dense_states_over_dp_and_those_of_experts_over_edp() -> None:
    def optimizer_bytes(zero: int) -> float:
        parallel = Parallelism(ep=4, zero=zero)
        return static_memory(MODEL, parallel, parallel.rank_layout(16), TRAIN, stage=0).optimizer_bytes

    experts = 12 * 7 * 4 * 3 * 1024 * 512
    assert optimizer_bytes(1) == pytest.approx((optimizer_bytes(0) - experts) / 16 + experts / 4)


sizes = st.sampled_from([1, 2, 4])


@settings(max_examples=40, deadline=None)
@given(
    pp=sizes, ep=sizes, tp=sizes, micro_batch=sizes, seq=st.sampled_from([256, 512, 2048]), vpp=st.sampled_from([1, 2])
)
def test_memory_grows_with_micro_batch_and_sequence(
    pp: int, ep: int, tp: int, micro_batch: int, seq: int, vpp: int
) -> None:
    parallel = Parallelism(pp=pp, ep=ep, tp=tp, vpp=vpp)
    num_micro_batches = 8
    dp = parallel.rank_layout(16).dp

    def at(batch: int, seq_len: int) -> float:
        train = Training(seq_len=seq_len, micro_batch=batch, global_batch=batch * dp * num_micro_batches)
        return peak(parallel, train).peak_bytes

    assert at(micro_batch, seq) < at(2 * micro_batch, seq)
    assert at(micro_batch, seq) < at(micro_batch, 2 * seq)
    assert at(2 * micro_batch, seq) == pytest.approx(at(micro_batch, 2 * seq))


@settings(max_examples=30, deadline=None)
@given(
    pp=sizes,
    ep=sizes,
    tp=sizes,
    cp=sizes,
    moments=st.sampled_from(["fp32", "bf16"]),
    precision=st.sampled_from(["bf16", "fp8"]),
)
def test_each_zero_stage_needs_no_more_than_the_one_before(
    pp: int, ep: int, tp: int, cp: int, moments: str, precision: str
) -> None:
    train = replace(TRAIN, optimizer=Optimizer(moments=moments), precision=precision)
    for stage in range(pp):
        peaks = [
            peak(Parallelism(pp=pp, ep=ep, tp=tp, cp=cp, zero=zero), train, num_gpus=64, stage=stage).peak_bytes
            for zero in range(4)
        ]
        assert peaks == sorted(peaks, reverse=True)


@settings(max_examples=30, deadline=None)
@given(
    ep=sizes,
    skew=st.floats(1.0, 4.0),
    schedule=st.sampled_from(["gpipe", "1f1b", "zb-h1"]),
    recompute=st.sampled_from(["none", "moe_act", "moe", "full"]),
    offload=st.sampled_from(["none", "optimizer", "activations", "optimizer,activations"]),
)
def test_whatever_is_recomputed_or_offloaded_a_larger_micro_batch_needs_more(
    ep: int, skew: float, schedule: str, recompute: str, offload: str
) -> None:
    parallel = Parallelism(pp=4, ep=ep)
    train = replace(TRAIN, schedule=schedule, recompute=recompute, offload=offload)
    for stage in range(4):
        peaks = [
            peak(parallel, replace(train, micro_batch=size, global_batch=32 * size), stage=stage, skew=skew).peak_bytes
            for size in (1, 2, 4)
        ]
        assert peaks == sorted(set(peaks))


@settings(max_examples=30, deadline=None)
@given(pp=sizes, ep=sizes, skew=st.floats(1.0, 4.0), vpp=st.sampled_from([1, 2]))
def test_full_recomputation_lowers_activations_and_touches_nothing_else(
    pp: int, ep: int, skew: float, vpp: int
) -> None:
    parallel = Parallelism(pp=pp, ep=ep, vpp=vpp)
    for stage in range(pp):
        keep = peak(parallel, stage=stage, skew=skew)
        again = peak(parallel, replace(TRAIN, recompute="full"), stage=stage, skew=skew)
        assert again.activations_bytes + again.dispatch_bytes < keep.activations_bytes + keep.dispatch_bytes
        assert again.weights_bytes == keep.weights_bytes


def test_the_worst_window_of_micro_batches_in_flight_counts_not_the_mean() -> None:
    parallel, train = Parallelism(pp=4, ep=4), Training(seq_len=1024, global_batch=32)
    layout = parallel.rank_layout(16)
    calm = np.full((1, 8, 1, 4), 4096.0)
    burst = calm.copy()
    burst[0, 3:7, 0, 2] = 3 * 4096.0  # four micro-batches in a row: all in flight together on the first stage
    spread = calm.copy()
    spread[0, ::2, 0, 2] = 3 * 4096.0

    def at(received: np.ndarray) -> RankMemory:
        return stage_memory(MODEL, parallel, layout, train, stage=0, received_GMLR=received)

    assert at(burst).dispatch_bytes > at(spread).dispatch_bytes > at(calm).dispatch_bytes
    assert at(burst).rank == 2


def test_the_rank_named_is_that_of_the_hot_group_and_stage() -> None:
    parallel = Parallelism(pp=2, ep=4)
    layout = parallel.rank_layout(16)
    received = np.full((2, 8, 4, 4), 4096.0)
    received[1, :, :, 3] *= 2
    memory = stage_memory(MODEL, parallel, layout, Training(global_batch=64), stage=1, received_GMLR=received)
    assert memory.rank == 8 + 4 + 3


def test_zero_2_keeps_one_layers_gradients_whole_and_zero_3_two_layers_weights() -> None:
    dense = replace(MODEL, layers=(DENSE,) * 4, tie_embeddings=True)
    layer = 1024 * (16 + 8) * 64 + 1024 * 1024 + 3 * 1024 * 4096 + 2 * 1024
    outer = 32000 * 1024 + 1024

    def static(zero: int) -> StaticMemory:
        parallel = Parallelism(zero=zero)
        return static_memory(dense, parallel, parallel.rank_layout(8), TRAIN, stage=0)

    assert static(2).gradients_bytes == pytest.approx(4 * ((outer + 4 * layer) / 8 + layer * 7 / 8))
    assert static(3).weights_bytes == pytest.approx(2 * ((outer + 4 * layer) / 8 + 2 * layer * 7 / 8))


def test_the_down_projections_of_latent_attention_are_whole_on_every_tensor_parallel_rank() -> None:
    latent = LatentAttention(
        num_heads=16, q_lora_rank=256, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64
    )
    model = replace(MODEL, layers=(replace(DENSE, attention=latent),))
    placed = stage_chunks(model, Parallelism(), TRAIN, 0)[0][0]
    one, four = (rank_parameters(model, placed, Parallelism(tp=tp))[0] for tp in (1, 4))
    whole = 1024 * (256 + 128 + 32) + 2 * 1024
    assert four - whole == pytest.approx((one - whole) / 4)


def test_with_short_sequences_the_first_stage_peaks_at_the_gradient_of_the_embedding() -> None:
    model = replace(MODEL, layers=(DENSE,) * 2)
    parallel = Parallelism(pp=2)
    train = Training(seq_len=16, global_batch=1)
    memory = stage_memory(model, parallel, parallel.rank_layout(2), train, stage=0, received_GMLR=None)
    assert memory.moment == "gradient of the embedding"
    standing = placeholder_gradient_bytes(model, (DENSE,), parallel) + workspace_bytes((DENSE,))
    assert memory.activations_bytes == standing + 2 * 32000 * 1024


def test_a_layer_before_the_last_peaks_after_the_layers_behind_it_are_freed() -> None:
    wide = replace(DENSE, ffn=Ffn(width=65536))
    model = replace(MODEL, vocab=128, layers=(wide, DENSE, DENSE, DENSE))
    parallel = Parallelism(pp=2)
    memory = stage_memory(model, parallel, parallel.rank_layout(2), TRAIN, stage=0, received_GMLR=None)
    assert memory.moment == "backward of layer 1 of 2: activation"

    def layer_bytes(layer: Layer) -> float:
        return 1024 * sum(tensor.bytes for tensor in layer_tensors(model, layer, parallel))

    standing = placeholder_gradient_bytes(model, (wide, DENSE), parallel) + workspace_bytes((wide, DENSE))
    in_flight = 2 * layer_bytes(wide) + layer_bytes(DENSE)  # of the older micro-batch the second layer is gone
    working = 1024 * 2 * (1024 + 2 * 65536)  # gradients of the layer's output and of the activation's input
    assert memory.activations_bytes == pytest.approx(standing + in_flight + working)


def test_a_narrow_format_keeps_less_of_the_activations_and_copies_of_the_layers_weights() -> None:
    wide, narrow = (peak(Parallelism(ep=8), replace(TRAIN, precision=precision)) for precision in ("bf16", "mxfp8"))
    assert narrow.activations_bytes < wide.activations_bytes
    parallel = Parallelism(ep=8)
    held = [sum(rank_parameters(MODEL, item, parallel)) for item in stage_chunks(MODEL, parallel, TRAIN, 0)[0]]
    assert narrow.weights_bytes - wide.weights_bytes == pytest.approx(2 * (1 + 1 / 32) * sum(held))


def profile(parallel: Parallelism, train: Training, layers: tuple[Layer, ...], *, num_gpus: int = 8) -> StageProfile:
    """The first stage's, every rank receiving its own tokens' share; rows of one rank and micro-batch: ROWS."""
    layout = parallel.rank_layout(num_gpus)
    model = replace(MODEL, vocab=128, layers=layers)
    chunks = stage_chunks(model, parallel, train, 0)
    num_moe = sum(item.layer.is_moe for chunk in chunks for item in chunk)
    received = np.full((1, train.num_micro_batches(layout.dp), num_moe, parallel.ep), float(ROWS)) if num_moe else None
    return stage_profile(model, parallel, layout, train, stage=0, received_GMLR=received)


ROWS = TRAIN.seq_len * 4
COPY = ROWS * 1024 * 2  # of the rows that a rank lays out, or receives


@pytest.mark.parametrize("recompute", ["none", "moe"])
def test_a_moe_layers_forward_holds_five_copies_of_its_rows_and_so_does_its_being_made_again(recompute: str) -> None:
    # laid out, received, the experts' input and output sorted back, and home again
    train = replace(TRAIN, global_batch=16, recompute=recompute)
    found = profile(Parallelism(pp=2, ep=4), train, (MOE, DENSE))
    forward, backward = found.peak_KGRP[0, 0, 0, 1], found.peak_KGRP[-1, 0, 0, 1]
    assert found.operations[0].way == "forward"
    assert forward == pytest.approx(5 * COPY)
    assert found.at(0, 0, 0).moment == "forward of layer 1 of 1: combine"
    if recompute == "moe":
        assert backward == pytest.approx(5 * COPY)
        assert found.at(len(found.operations) - 1, 0, 0).moment == "backward of layer 1 of 1 again: combine"
        assert found.live_KGRP[-1, 0, 0, 1] == 0.0  # nothing of it is kept


def test_a_forward_beside_a_backward_adds_what_it_holds_for_a_moment() -> None:
    train = replace(TRAIN, global_batch=32, overlap="forward_backward")
    found = profile(Parallelism(pp=2, ep=4), train, (MOE, DENSE))
    pairs = [k for k, op in enumerate(found.operations) if op.beside is not None]
    assert pairs
    for k in pairs:
        alone = found.live_KGRP[k + 1, 0, 0, 1] + found.worst_K[k + 1].excess_GMRP[0, 0, 0, 1]
        assert found.peak_KGRP[k + 1, 0, 0, 1] - alone == pytest.approx(4 * COPY)  # its input is kept in any case


def test_offloaded_activations_come_back_while_the_layer_behind_is_at_work() -> None:
    wide = replace(DENSE, ffn=Ffn(width=65536))
    layers = (wide, wide, DENSE, DENSE, DENSE, DENSE, DENSE, DENSE)
    train = replace(TRAIN, global_batch=1, offload="activations")
    found = profile(Parallelism(pp=2), train, layers, num_gpus=2)
    model, parallel = replace(MODEL, layers=layers), Parallelism(pp=2)
    kept = TRAIN.seq_len * sum(tensor.bytes for tensor in layer_tensors(model, wide, parallel))
    moment = TRAIN.seq_len * 2 * (1024 + 2 * 65536)
    assert found.peak_KGRP[-1, 0, 0, 0] == pytest.approx(2 * kept + moment)
    assert found.at(1, 0, 0).moment == "backward of layer 2 of 4: activation"
