"""Record which experts every token takes, in the reference layer or a Hugging Face model, as a router-replay array.

Legend: T tokens, L MoE layers, K experts per token, E experts.

The file is what ``moesim route`` reads: ``routed_experts`` (T, L, K), ids before any replication, the most weighted
first, and beside it num_experts, layers, steps and tokens_of_step. Hooks watch forward passes; nothing of the model
changes. Ids are kept in memory, 2 bytes each.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from reference_model.expert_parallel import ExpertParallelMoe
from reference_model.layer import LayerResult, MoeLayer

_ROUTER_NAMES = ("gate", "router")


class RoutingRecorder:
    """Collects a step's choices layer by layer; ``end_step`` after each forward pass closes the step.

    layers: numbers of the MoE layers in the model, rising; num_experts and top_k are those of all of them.
    """

    def __init__(self, *, layers: Sequence[int], num_experts: int, top_k: int) -> None:
        self.layers, self.num_experts, self.top_k = tuple(layers), num_experts, top_k
        self.steps: list[NDArray[Any]] = []
        self._open: dict[int, NDArray[Any]] = {}

    def note(self, layer: int, experts_TK: Tensor) -> None:
        """Note a layer's choice for the open step. Raises ValueError when it was noted already, or k is another."""
        if layer in self._open:
            raise ValueError(f"layer {layer} ran twice in a step: call end_step() after each forward pass")
        if experts_TK.shape[-1] != self.top_k:
            raise ValueError(f"layer {layer} chose {experts_TK.shape[-1]} experts per token, not {self.top_k}")
        if bool((experts_TK < 0).any()):
            raise ValueError(
                f"layer {layer} gave some tokens fewer than {self.top_k} experts, which a replay array cannot hold: "
                "record GShard's router in eval mode; expert choice has none"
            )
        dtype = torch.int16 if self.num_experts <= torch.iinfo(torch.int16).max else torch.int32
        self._open[layer] = experts_TK.detach().reshape(-1, self.top_k).to(device="cpu", dtype=dtype).numpy()

    def end_step(self, keep: Tensor | None = None) -> NDArray[Any]:
        """Close the step; returns its ids (T, L, K). keep: true for tokens to keep (an attention mask), any shape.

        Raises ValueError when a layer did not run, or saw another number of tokens.
        """
        missing = [layer for layer in self.layers if layer not in self._open]
        if missing:
            raise ValueError(f"layers {missing} did not run in this step")
        sizes = {len(experts_TK) for experts_TK in self._open.values()}
        if len(sizes) > 1:
            raise ValueError(f"layers saw different numbers of tokens in a step: {sorted(sizes)}")
        experts_TLK = np.stack([self._open[layer] for layer in self.layers], axis=1)
        self._open.clear()
        if keep is not None:
            kept_T = keep.detach().reshape(-1).to(device="cpu", dtype=torch.bool).numpy()
            if kept_T.shape != experts_TLK.shape[:1]:
                raise ValueError(f"keep has {kept_T.size} entries for {len(experts_TLK)} tokens")
            experts_TLK = experts_TLK[kept_T]
        self.steps.append(experts_TLK)
        return experts_TLK

    @property
    def experts_TLK(self) -> NDArray[Any]:
        """All closed steps, one after the other."""
        return np.concatenate(self.steps) if self.steps else np.empty((0, len(self.layers), self.top_k), np.int16)

    def write(self, path: Path | str) -> None:
        """Write a .npz (with steps and sizes) or a .npy (ids only), whole or not at all."""
        target = Path(path)
        if target.suffix not in (".npz", ".npy"):
            raise ValueError(f"a recording ends in .npz or .npy; got {target.name}")
        beside = target.with_name(f".{target.name}.part")
        try:
            with beside.open("wb") as file:
                if target.suffix == ".npy":
                    np.save(file, self.experts_TLK, allow_pickle=False)
                else:
                    sizes = np.array([len(step) for step in self.steps], dtype=np.int64)
                    np.savez(
                        file,
                        routed_experts=self.experts_TLK,
                        num_experts=np.int64(self.num_experts),
                        layers=np.array(self.layers, dtype=np.int64),
                        steps=np.arange(len(sizes)),
                        tokens_of_step=sizes,
                    )
            os.replace(beside, target)
        finally:
            beside.unlink(missing_ok=True)


@contextlib.contextmanager
def record_layers(model: nn.Module) -> Iterator[RoutingRecorder]:
    """Record every ``MoeLayer`` inside a module (or the module itself) while the block lasts.

    Layers are numbered in the order of ``model.modules()``. Choices are recorded as made, before any capacity drops
    copies; of a layer over several ranks (``ExpertParallelMoe``) each rank records its own tokens. Raises ValueError
    without such layers, or where their sizes differ.

    >>> layer = MoeLayer(hidden=8, width=16, num_experts=4, router=SoftmaxTopK(top_k=2))
    >>> with record_layers(layer) as recorder:
    ...     _ = layer(torch.zeros(3, 8)); recorder.end_step().shape
    (3, 1, 2)
    """
    shared_out = {module.layer: module for module in model.modules() if isinstance(module, ExpertParallelMoe)}
    layers = [module for module in model.modules() if isinstance(module, MoeLayer)]
    found = [shared_out.get(layer, layer) for layer in layers]  # the module whose forward runs
    sizes = {(layer.num_experts, layer.router.top_k) for layer in layers}
    recorder = _recorder(range(len(found)), sizes)

    def hook(number: int) -> Callable[..., None]:
        def note(_module: nn.Module, _inputs: Any, result: LayerResult) -> None:
            recorder.note(number, result.choice.experts_TK)

        return note

    with _hooks([(module, hook(i)) for i, module in enumerate(found)]):
        yield recorder


@contextlib.contextmanager
def record_transformers(model: Any) -> Iterator[RoutingRecorder]:
    """Record every router of a Hugging Face MoE model while the block lasts; layers keep the model's numbers.

    A router is the child ``gate`` or ``router`` of a module that also has ``experts``. Where it returns the chosen ids
    (transformers 5) they are taken, ordered by weight; where it returns logits (4.57) their top k are, which is right
    for softmax routers only: a router with a bias or groups must return ids. Raises ValueError without routers.

    >>> with record_transformers(model) as recorder:  # doctest: +SKIP
    ...     model(input_ids, attention_mask=mask); recorder.end_step(keep=mask)
    """
    config = getattr(model.config, "text_config", None) or model.config
    top_k = int(_first_of(config, ("num_experts_per_tok", "moe_topk", "num_selected_experts")))
    num_experts = int(_first_of(config, ("num_local_experts", "num_experts", "n_routed_experts")))
    routers: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        children = dict(module.named_children())
        router = next((children[child] for child in _ROUTER_NAMES if child in children), None)
        if "experts" in children and router is not None:
            number = re.search(r"\.(\d+)\.", f".{name}.")
            routers[int(number[1]) if number else len(routers)] = router
    recorder = _recorder(sorted(routers), {(num_experts, top_k)} if routers else set())

    def hook(number: int) -> Callable[..., None]:
        def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
            recorder.note(number, chosen_experts(output, num_experts=num_experts, top_k=top_k))

        return note

    with _hooks([(routers[number], hook(number)) for number in recorder.layers]):
        yield recorder


def chosen_experts(output: Any, *, num_experts: int, top_k: int) -> Tensor:
    """(T, K) ids, the most weighted first, out of what a router returned: logits (T, E), or a tuple with ids (T, K).

    Also for ``output_router_logits=True``: call it on each layer's logits. Raises ValueError for anything else.

    >>> chosen_experts(torch.tensor([[0.0, 3.0, 1.0]]), num_experts=3, top_k=2).tolist()
    [[1, 2]]
    """
    if isinstance(output, Tensor):
        if not output.is_floating_point() or output.shape[-1] != num_experts:
            raise ValueError(f"a router's logits are (tokens, {num_experts}); got {tuple(output.shape)} {output.dtype}")
        return output.reshape(-1, num_experts).float().topk(top_k, dim=-1).indices
    parts = [part for part in output if isinstance(part, Tensor)]
    ids = [part for part in parts if not part.is_floating_point() and part.shape[-1] == top_k]
    if len(ids) != 1:
        shapes = [(tuple(part.shape), str(part.dtype)) for part in parts]
        raise ValueError(f"a router returns logits, or one tensor of ids (tokens, {top_k}); got {shapes}")
    weights = [part for part in parts if part.is_floating_point() and part.shape == ids[0].shape]
    # With E = k, logits have the shape of weights and come first: the last of them are the weights.
    return ids[0].gather(-1, weights[-1].argsort(dim=-1, descending=True, stable=True)) if weights else ids[0]


def _first_of(config: Any, names: Sequence[str]) -> Any:
    for name in names:
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    raise ValueError(f"the model's config has none of {', '.join(names)}: not a Mixture-of-Experts model")


def _recorder(layers: Sequence[int], sizes: set[tuple[int, int]]) -> RoutingRecorder:
    if len(sizes) != 1:
        what = "no MoE layer" if not sizes else f"layers of different sizes (experts, k): {sorted(sizes)}"
        raise ValueError(f"nothing to record: the model has {what}")
    ((num_experts, top_k),) = sizes
    return RoutingRecorder(layers=layers, num_experts=num_experts, top_k=top_k)


@contextlib.contextmanager
def _hooks(pairs: Sequence[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
