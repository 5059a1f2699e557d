"""Switch Transformer (arXiv 2101.03961): T5's encoder-decoder with top-1 experts in every n-th feed-forward block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesim.describe.model import Ffn, GroupedQueryAttention, Layer, Model, MoeFfn, Router
from moesim.errors import check

if TYPE_CHECKING:
    from moesim.catalog.hf import Config

MAX_LAYERS = 2000


def switch_model(config: Config, *, name: str) -> Model:
    """The Model of a switch_transformers config: the encoder's layers, then the decoder's with cross-attention."""
    num_heads = config.whole("num_heads")
    attention = GroupedQueryAttention(num_heads=num_heads, num_kv_heads=num_heads, head_dim=config.whole("d_kv"))
    block = Ffn(width=config.whole("d_ff"), gated=config.text("dense_act_fn", "relu").startswith("gated"))
    router = Router(top_k=1, normalise_top_k=False, has_linear_bias=config.flag("router_bias", False))
    moe = MoeFfn(num_experts=config.whole("num_experts"), expert=block, router=router)
    num_encoder = config.whole("num_layers")
    num_decoder = config.whole("num_decoder_layers") if config.has("num_decoder_layers") else num_encoder
    for key, count in (("num_layers", num_encoder), ("num_decoder_layers", num_decoder)):
        check(count <= MAX_LAYERS, config.owner, key, f"must not exceed {MAX_LAYERS}", count)
    encoder_moe = _sparse_layers(num_encoder, config.whole("num_sparse_encoder_layers", least=0))
    decoder_moe = _sparse_layers(num_decoder, config.whole("num_sparse_decoder_layers", least=0))
    encoder = [Layer(attention=attention, ffn=moe if is_moe else block, causal=False) for is_moe in encoder_moe]
    decoder = [
        Layer(attention=attention, ffn=moe if is_moe else block, cross_attention=attention, num_norms=3)
        for is_moe in decoder_moe
    ]
    return Model(
        name=name,
        hidden=config.whole("d_model"),
        vocab=config.whole("vocab_size"),
        layers=tuple(encoder + decoder),
        tie_embeddings=config.flag("tie_word_embeddings", True),
        num_final_norms=2,
        num_extra_parameters=2
        * config.whole("relative_attention_num_buckets")
        * num_heads,  # first layer of each stack
        notes=("encoder-decoder: a token is one position that passes the encoder and the decoder",),
    )


def _sparse_layers(num_layers: int, num_sparse: int) -> list[bool]:
    """Which layers hold experts: every (num_layers // num_sparse)-th, starting with the second (all when 1)."""
    if num_sparse == 0:
        return [False] * num_layers
    step = max(num_layers // num_sparse, 1)
    return [step == 1 or i % step == 1 for i in range(num_layers)]
