"""What is computed again in the backward pass: per module, the tensors that are not kept and the operations done twice.

Modules are Megatron-LM's names for ``--recompute-modules``. What a module takes in is kept in any case: by itself or as
what the operation before keeps. Norms that are fused into the product behind them (before grouped-query attention and
dense blocks) belong to that product: ``layernorm`` does not reach them, ``mlp`` computes one again. A module inside a
recomputed one (``moe_act`` and ``shared_experts`` in ``moe``) is computed again with it, once. See
docs/model.md#recomputation.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, get_args

from moesim.cost.activations import BF16_BYTES, SavedTensor
from moesim.describe.model import LatentAttention, Layer, Model, MoeFfn
from moesim.describe.workload import MODULES, Module, Training

AttentionOperation = Literal["attention norm", "up projections", "core attention"]
FfnOperation = Literal["ffn norm", "routed experts", "shared experts", "dense ffn"]  # routed: router to combine
Operation = AttentionOperation | Literal["expert activation"] | FfnOperation
ATTENTION_OPERATIONS: tuple[Operation, ...] = get_args(AttentionOperation)
FFN_OPERATIONS: tuple[Operation, ...] = get_args(FfnOperation)  # done again before the backward of the feed-forward
INSIDE: tuple[Module, ...] = ("moe_act", "shared_experts")  # moe, each a module of its own
OPERATIONS: tuple[Operation, ...] = (*ATTENTION_OPERATIONS, *FFN_OPERATIONS, "expert activation")


@dataclass(frozen=True, kw_only=True)
class Again:
    """What one module of a layer makes again: saved tensors by name or by part, and the operations that do it."""

    operations: tuple[Operation, ...] = ()
    names: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    gathered: tuple[SavedTensor, ...] = ()  # inputs kept instead, where tp > 1 gathers them first

    def makes(self, tensor: SavedTensor) -> bool:
        return tensor.name in self.names or tensor.part in self.parts


def made_again(layer: Layer, module: Module) -> Again:
    """The table: what a module keeps no longer and does twice in this layer; nothing where the layer has no such.

    Source: Megatron-LM core/transformer: transformer_config.py (``recompute_modules``), multi_latent_attention.py,
    transformer_layer.py, moe/.
    """
    latent, moe = isinstance(layer.attention, LatentAttention), isinstance(layer.ffn, MoeFfn)
    shared: tuple[Operation, ...] = ()
    if isinstance(layer.ffn, MoeFfn) and layer.ffn.shared is not None:
        shared = ("shared experts",)
    match module:
        case "core_attn":  # its output stays: the output projection takes it in
            return Again(operations=("core attention",), names=("logsumexp", "attention output before its all-to-all"))
        case "mla_up_proj" if latent:
            assert isinstance(layer.attention, LatentAttention)
            rotary_key = SavedTensor(
                name="rotary key of all tokens",
                part="attention",
                per="token",
                elements=layer.attention.qk_rope_head_dim,
                element_bytes=BF16_BYTES,
                why="gathered over sequence parallelism before the up-projections that are computed again",
            )
            latents = ("query latent normalised", "key-value latent normalised")  # by the norms fused into the products
            made = (*latents, "queries", "keys", "values")
            return Again(operations=("up projections",), names=made, gathered=(rotary_key,))
        case "mlp" if not moe:
            names = ("ffn norm output", "ffn activation input", "ffn activation output")
            return Again(operations=("ffn norm", "dense ffn"), names=names)
        case "moe" if moe:
            return Again(operations=("routed experts", *shared), parts=("router", "dispatch", "experts", "shared"))
        case "moe_act" if moe:
            return Again(operations=("expert activation",), names=("expert activation output",))
        case "shared_experts" if shared:
            return Again(operations=shared, parts=("shared",))
        case "layernorm":
            before_attention = Again(operations=("attention norm",), names=("attention norm output",))
            before_ffn = Again(operations=("ffn norm",), names=("ffn norm output", "shared input"))
            reached = [again for again, alone in ((before_attention, latent), (before_ffn, moe)) if alone]
            return Again(
                operations=tuple(operation for again in reached for operation in again.operations),
                names=tuple(name for again in reached for name in again.names),
            )
    return Again()


def kept_tensors(tensors: tuple[SavedTensor, ...], layer: Layer, train: Training, tp: int) -> tuple[SavedTensor, ...]:
    """Those of a layer's saved tensors that are kept from forward to backward, and what is kept instead of others."""
    if train.recompute == "full":
        return tensors[:1]  # the layer's input
    again = [made_again(layer, module) for module in train.recomputed_modules]
    instead = [tensor for one in again for tensor in one.gathered if tp > 1]
    return (*(tensor for tensor in tensors if not any(one.makes(tensor) for one in again)), *instead)


def made_inside(again: tuple[SavedTensor, ...], layer: Layer, train: Training) -> tuple[SavedTensor, ...]:
    """Of what is made again those tensors that a module inside a recomputed one leaves out once more."""
    inner = [made_again(layer, module) for module in INSIDE if module in train.recomputed_modules]
    return tuple(tensor for tensor in again if any(one.makes(tensor) for one in inner))


def operations_again(layer: Layer, train: Training) -> tuple[Operation, ...]:
    """What the backward of a layer computes again, each once, in the order of OPERATIONS; not for ``full``."""
    asked = {operation for module in train.recomputed_modules for operation in made_again(layer, module).operations}
    if "routed experts" in asked:
        asked.discard("expert activation")
    return tuple(operation for operation in OPERATIONS if operation in asked)


def useful_modules(model: Model) -> tuple[Module, ...]:
    """The modules that some layer of the model has.

    >>> from moesim.catalog.models import load_model
    >>> useful_modules(load_model("llama-3-8b"))
    ('core_attn', 'mlp')
    """
    return _useful((*model.kinds, *model.mtp_layers))


@functools.cache
def _useful(layers: tuple[Layer, ...]) -> tuple[Module, ...]:
    return tuple(module for module in MODULES if any(made_again(layer, module).operations for layer in layers))
