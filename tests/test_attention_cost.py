"""Core attention: FLOPs against counting every pair, and its seconds against sliding windows that no fit has seen."""

from __future__ import annotations

import dataclasses
import importlib.util

import numpy as np
import pytest

from moesim.catalog import measured
from moesim.catalog.hardware import load_gpu
from moesim.catalog.models import load_model
from moesim.cost.device import device_cost
from moesim.cost.layer import layer_cost
from moesim.describe.flops import layer_flops
from moesim.describe.model import GroupedQueryAttention, LatentAttention
from moesim.describe.parallel import Parallelism
from moesim.describe.workload import Training
from moesim.door.records import read_parquet_columns

HAS_EXTRA = all(importlib.util.find_spec(name) is not None for name in (measured.MODULE, "pyarrow"))
needs_extra = pytest.mark.skipif(not HAS_EXTRA, reason="needs the extra: pip install 'moesim[measured]'")
LLAMA, DEEPSEEK = load_model("llama-3-8b"), load_model("deepseek-v3")


def with_attention(model, **changes):
    layer = model.layers[-1]
    return dataclasses.replace(layer, attention=dataclasses.replace(layer.attention, **changes))


@pytest.mark.parametrize("window", [None, 1, 16, 100, 256, 1000])
def test_causal_and_windowed_flops_are_those_of_every_pair_but_half_a_window(window):
    length = 256
    query, key = np.mgrid[:length, :length]
    seen = (key <= query) & (key > query - (window or length))
    attention = LLAMA.layers[0].attention
    assert isinstance(attention, GroupedQueryAttention)
    layer = with_attention(LLAMA, sliding_window=window)
    per_token = layer_flops(LLAMA, layer, length).attention_sequence
    pairs = per_token * length / (4 * attention.num_heads * attention.head_dim)
    kept = min(window or length, length)
    assert pairs == pytest.approx(seen.sum() - kept / 2)


def test_key_value_heads_change_projections_and_not_the_products_of_attention():
    few, many = (layer_flops(LLAMA, with_attention(LLAMA, num_kv_heads=heads), 4096) for heads in (1, 32))
    assert few.attention_sequence == many.attention_sequence
    assert few.attention_projections < many.attention_projections


def test_latent_heads_count_query_and_value_sizes_and_their_backward_three_and_two_of_them():
    attention = DEEPSEEK.layers[-1].attention
    assert isinstance(attention, LatentAttention)
    flops = layer_flops(DEEPSEEK, DEEPSEEK.layers[-1], 4096).attention_sequence
    assert flops == 2 * 128 * (192 + 128) * 2048
    device = device_cost(load_gpu("h100-sxm"), "bf16", "datasheet")
    cost = layer_cost(DEEPSEEK, DEEPSEEK.layers[-1], parallel=Parallelism(), train=Training(), device=device)
    ratio = (3 * 192 + 2 * 128) / (192 + 128) / device.attention_backward_share
    assert cost.backward.core_attention_s / cost.forward.core_attention_s == pytest.approx(ratio, rel=0.01)


@pytest.mark.parametrize("gpu", ["a100-80gb", "h100-sxm", "b200"])
def test_a_shorter_window_takes_less_time_but_more_for_each_pair(gpu):
    device = device_cost(load_gpu(gpu), "bf16", "datasheet")
    seconds, rates = [], []
    for window in (None, 2048, 512, 128):
        layer = with_attention(LLAMA, sliding_window=window)
        cost = layer_cost(LLAMA, layer, parallel=Parallelism(), train=Training(seq_len=8192), device=device)
        seconds.append(cost.forward.core_attention_s)
        rates.append(layer_flops(LLAMA, layer, 8192).attention_sequence / seconds[-1])
    assert seconds == sorted(seconds, reverse=True)
    assert rates == sorted(rates, reverse=True)


@needs_extra
@pytest.mark.parametrize("gpu", ["h100-sxm", "b200", "gb300"])
@pytest.mark.parametrize(("window", "head_dim", "limit"), [(128, 64, 0.16), (8192, 128, 0.06)])
def test_sliding_windows_of_the_same_kernels_are_near_the_law_of_whole_attention(gpu, window, head_dim, limit):
    device = device_cost(load_gpu(gpu), "bf16", "datasheet")
    folder = measured.tables() / measured.SYSTEMS[gpu] / "attention" / "sglang" / "0.5.14"
    names = ("batch_size", "isl", "num_heads", "head_dim", "window_size", "attn_dtype", "kv_cache_dtype", "latency")
    errors = []
    for row in read_parquet_columns(folder / "context_attention_perf.parquet", names):
        if row["attn_dtype"] != "bfloat16" or row["kv_cache_dtype"] != "bfloat16" or row["isl"] < 2048:
            continue
        if (row["window_size"], row["head_dim"]) != (window, head_dim) or row["batch_size"] * row["num_heads"] < 64:
            continue
        kept = min(window, row["isl"])
        seen = kept - kept**2 / (2 * row["isl"])
        flops = 4.0 * row["batch_size"] * row["isl"] * row["num_heads"] * head_dim * seen
        seconds = device.attention_s(flops, dims=2 * head_dim, keys_seen=seen, backward=False)
        errors.append(seconds / (row["latency"] * 1e-3) - 1)
    print(gpu, window, len(errors), f"median {np.median(errors):+.1%}")
    assert len(errors) > 50
    assert abs(np.median(errors)) < limit
