"""Context parallelism: what the ranks that share a sequence exchange for attention, and what they hold meanwhile.

ring: keys and values go from rank to rank, each hop behind the attention over those just received. alltoall: sequence
for heads before attention, heads for sequence after it (DeepSpeed-Ulysses, arXiv 2309.14509). allgather: all keys and
values first. See docs/model.md#context-parallelism.
"""

from __future__ import annotations

from moesim.describe.model import Attention, GroupedQueryAttention, Model
from moesim.describe.parallel import Parallelism
from moesim.describe.workload import Training
from moesim.errors import check
from moesim.units import BYTES_PER_ELEMENT

ACTIVATION_BYTES = BYTES_PER_ELEMENT["bf16"]


def key_value_bytes(attention: Attention, tp: int) -> float:
    """Keys and values of one token on one tensor-parallel rank; a key-value head is never cut."""
    if isinstance(attention, GroupedQueryAttention):
        return 2 * max(attention.num_kv_heads / tp, 1.0) * attention.head_dim * ACTIVATION_BYTES
    dims = attention.qk_nope_head_dim + attention.qk_rope_head_dim + attention.v_head_dim
    return attention.num_heads / tp * dims * ACTIVATION_BYTES


def query_bytes(attention: Attention, tp: int) -> float:
    """Queries of one token on one tensor-parallel rank."""
    if isinstance(attention, GroupedQueryAttention):
        return attention.num_heads / tp * attention.head_dim * ACTIVATION_BYTES
    return attention.num_heads / tp * (attention.qk_nope_head_dim + attention.qk_rope_head_dim) * ACTIVATION_BYTES


def output_bytes(attention: Attention, tp: int) -> float:
    """The attention's output of one token on one tensor-parallel rank."""
    dims = attention.head_dim if isinstance(attention, GroupedQueryAttention) else attention.v_head_dim
    return attention.num_heads / tp * dims * ACTIVATION_BYTES


def buffer_bytes(attention: Attention, parallel: Parallelism) -> float:
    """What the backward of attention holds for its exchange, of one of the rank's own tokens.

    ring: two sets of keys and values and two of their gradients, one computed with, one on its way. allgather: those of
    the whole sequence and their gradients. alltoall: gradients of queries, keys and values before and after.
    """
    pairs = key_value_bytes(attention, parallel.tp)
    if parallel.cp == 1:
        return 0.0
    if parallel.cp_kind == "ring":
        return 4 * pairs
    if parallel.cp_kind == "allgather":
        return 2 * parallel.cp * pairs
    return 2 * (pairs + query_bytes(attention, parallel.tp))


def check_context(model: Model, parallel: Parallelism, train: Training) -> None:
    """Refuse, by name, a context-parallel size that the sequence or the heads do not divide into."""
    if parallel.cp == 1:
        return
    rule = f"must be a multiple of 2*cp = {2 * parallel.cp}: each rank takes a piece from both ends"
    check(train.seq_len % (2 * parallel.cp) == 0, "scenario.train", "seq_len", rule, train.seq_len)
    if parallel.cp_kind != "alltoall":
        return
    for attention in {layer.attention for layer in model.layers}:
        heads = attention.num_kv_heads if isinstance(attention, GroupedQueryAttention) else attention.num_heads
        own = max(heads // parallel.tp, 1)
        rule = f"must divide the {own} key-value heads of a tensor-parallel rank, since alltoall exchanges heads"
        hint = "Take cp_kind: ring."
        check(own % parallel.cp == 0, "scenario.parallel", "cp", rule, parallel.cp, hint)
