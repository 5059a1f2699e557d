"""What a calibration times: a list of cases, and for each how to set one up on cold data.

Legend: T tokens, K experts per token, E experts, P rows, H hidden, W expert width, I inputs and O outputs of a product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from reference_model.dispatch import combine, permute, plan_dispatch
from reference_model.experts import activate, grouped_product, has_grouped_path, looped_product, row_alignment
from reference_model.fit import is_held_out, work
from reference_model.layer import MoeLayer
from reference_model.routers import Choice, SoftmaxTopK, router_logits
from reference_model.shapes import LayerShapes
from reference_model.timing import Arena, Call

Prepare = Callable[[], Call]
Setup = Callable[
    [], tuple[Callable[[], Tensor], tuple[Tensor, ...]]
]  # a forward call and what its backward differentiates
DIRECTIONS = ("forward", "backward")
_COPY_BYTES = (2**16, 2**28)  # smallest and largest copy, read and written bytes together


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to time; the fields are those of a profile's point (``profile_schema.POINT_FIELDS``)."""

    kind: str
    direction: str = "forward"
    size: int = 1
    width_in: int = 0
    width_out: int = 0
    num_active: int = 1
    top_k: int = 0
    tokens_per_expert: tuple[int, ...] | None = None
    held_out: bool = False

    @property
    def key(self) -> str:
        """A name that no other case of the same run has."""
        skew = "" if self.tokens_per_expert is None else "/" + ",".join(map(str, self.tokens_per_expert))
        shape = f"{self.width_in}x{self.width_out}/k{self.top_k}/a{self.num_active}/{self.size}"
        return f"{self.kind}/{self.direction}/{shape}{skew}"

    def num_bytes(self, element_bytes: int) -> int:
        """Bytes that one sample touches, roughly: what the arena must hold."""
        if self.kind == "layer":
            return (
                3 * self.num_active * self.width_in * self.width_out * element_bytes
                + 2 * self.size * self.width_in * element_bytes
            )
        sizes = self.tokens_per_expert or (self.size,) * self.num_active
        _, moved = work(self.kind, self.direction, np.array(sizes), self.width_in, self.width_out, element_bytes)
        return int(moved.sum())


def all_cases(shapes: tuple[LayerShapes, ...], *, quick: bool = False) -> list[Case]:
    """Every case of these models, each once; quick drops columns and most layers, not sizes: between columns a fit
    interpolates well, between sizes a factor of four apart it does not."""
    cases: dict[str, Case] = {}
    for shape in shapes:
        for case in _cases_of(shape, quick):
            cases.setdefault(case.key, case)
    return list(cases.values())


def _cases_of(shape: LayerShapes, quick: bool) -> Iterator[Case]:
    columns = sorted(set(shape.active_experts if not quick else (shape.active_experts[0], shape.active_experts[-1])))
    for width_in, width_out in shape.products:
        grouped = Case(kind="grouped", width_in=width_in, width_out=width_out)
        for column, num_active in enumerate(columns):
            sizes = half_steps(1, min(shape.max_tokens, shape.max_rows // num_active))
            yield from _grid(replace(grouped, num_active=num_active), sizes, column)
        yield from _skewed(replace(grouped, kind="grouped_skewed"), columns[-1], shape.max_rows)
    for column, (width_in, width_out) in enumerate(shape.dense_products[: 1 if quick else None]):
        yield from _grid(
            Case(kind="dense", width_in=width_in, width_out=width_out), half_steps(1, shape.max_rows), column
        )
    tokens = half_steps(16, max(16, shape.max_rows // shape.top_k))
    router = Case(kind="router", width_in=shape.hidden, top_k=shape.top_k)
    for width in {shape.num_experts: None, shape.layer_experts: None}:  # the model's, and that of the layer timed below
        yield from _grid(replace(router, width_out=width), tokens, 0)
    for top_k in {shape.top_k: None, 1: None}:  # of a rank's own tokens; of rows that it received, one expert each
        for kind in ("permute", "combine"):
            yield from _grid(replace(router, kind=kind, width_out=top_k, top_k=top_k), tokens, 1)
    yield from _grid(Case(kind="activation", width_in=shape.expert_width), half_steps(16, shape.max_rows), 2)
    most_bytes = min(_COPY_BYTES[1], max(_COPY_BYTES[0], 32 * shape.max_rows * shape.hidden))
    yield from _grid(Case(kind="copy"), half_steps(_COPY_BYTES[0], most_bytes), 0, directions=("forward",))
    layer = Case(kind="layer", width_in=shape.hidden, width_out=shape.expert_width, num_active=shape.layer_experts)
    for size in powers(tokens[0], tokens[-1])[:: -3 if quick else -1]:
        for direction in DIRECTIONS:
            yield replace(layer, direction=direction, size=size, top_k=shape.top_k, held_out=True)


def powers(first: int, last: int) -> list[int]:
    """first, 2*first, 4*first, ... up to last."""
    return [first << i for i in range(64) if first << i <= last]


def half_steps(first: int, last: int) -> list[int]:
    """The powers, and between two of them the middle: first, 2, 3, 4, 6, 8, 12, ... times first, up to last."""
    whole = powers(first, last)
    return sorted(whole + [size + size // 2 for size in whole[1:] if size + size // 2 <= last])


def _grid(case: Case, sizes: list[int], column: int, directions: tuple[str, ...] = DIRECTIONS) -> Iterator[Case]:
    for direction in directions:
        for i, size in enumerate(sizes):
            yield replace(case, direction=direction, size=size, held_out=is_held_out(i, len(sizes), column))


def _skewed(case: Case, num_experts: int, max_rows: int) -> Iterator[Case]:
    """Uneven loads, never part of the fit: two lognormal draws (one seed for all machines), and one hot expert."""
    if num_experts < 2:
        return
    draws = np.random.default_rng(20240501)
    top = max_rows // 2
    for rows in (max(num_experts, top // 16), max(num_experts, top)):
        shares = [draws.lognormal(0.0, sigma, num_experts) for sigma in (0.5, 1.0)]
        shares.append(np.where(np.arange(num_experts) == 0, num_experts - 1.0, 1.0))
        for share_E in shares:
            load_E = np.floor(rows * share_E / share_E.sum()).astype(int)
            load_E[0] += rows - load_E.sum()
            uneven = replace(
                case, size=rows, num_active=int((load_E > 0).sum()), tokens_per_expert=tuple(load_E.tolist())
            )
            for direction in DIRECTIONS:
                yield replace(uneven, direction=direction, held_out=True)


def prepare_case(case: Case, arena: Arena) -> Prepare:
    """What gives, each time, the next call of this case on cold data; a backward call makes every gradient."""
    by_kind: dict[str, Callable[[Case, Arena], Setup]] = {
        "grouped": _grouped,
        "grouped_skewed": _grouped,
        "dense": _dense,
        "router": _router,
        "permute": _permute,
        "combine": _combine,
        "activation": _activation,
        "copy": _copy,
        "layer": _layer,
        "launch": _launch,
    }
    setup = by_kind[case.kind](case, arena)
    return lambda: _next_call(setup, arena, backward=case.direction == "backward")


def _next_call(setup: Setup, arena: Arena, *, backward: bool) -> Call:
    forward, leaves = setup()
    if not backward:
        return torch.no_grad()(forward)
    for leaf in leaves:
        leaf.requires_grad_()
    output = forward()
    grad = arena.take(*output.shape).to(output.dtype)
    return lambda: torch.autograd.grad(output, leaves, grad)


def _grouped(case: Case, arena: Arena) -> Setup:
    loads = case.tokens_per_expert or (case.size,) * case.num_active
    align = row_alignment(arena.device, arena.dtype)
    padded_E = -(-torch.tensor(loads) // align) * align
    ends_E = padded_E.cumsum(0).to(torch.int32).to(arena.device)
    num_rows = int(padded_E.sum())
    fast = has_grouped_path(arena.device, arena.dtype, case.width_in, case.width_out)
    product = grouped_product if fast else looped_product

    def setup() -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
        x_PI = arena.take(num_rows, case.width_in)
        weight_EOI = arena.take(len(loads), case.width_out, case.width_in)
        return lambda: product(x_PI, weight_EOI, ends_E), (x_PI, weight_EOI)

    return setup


def _dense(case: Case, arena: Arena) -> Setup:
    def setup() -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
        x_TI, weight_OI = arena.take(case.size, case.width_in), arena.take(case.width_out, case.width_in)
        return lambda: functional.linear(x_TI, weight_OI), (x_TI, weight_OI)

    return setup


def _router(case: Case, arena: Arena) -> Setup:
    router = SoftmaxTopK(top_k=case.top_k)
    weight_EH = torch.randn(case.width_out, case.width_in, device=arena.device) * case.width_in**-0.5

    def setup() -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
        x_TH, leaf_EH = arena.take(case.size, case.width_in), weight_EH.detach()
        return lambda: router(router_logits(x_TH, leaf_EH)).weights_TK, (x_TH, leaf_EH)

    return setup


def _random_choice(case: Case, arena: Arena) -> tuple[Choice, int]:
    """A random top_k of 4*top_k experts per token: how many there are changes a permutation's time little."""
    num_experts = 4 * case.top_k
    scores_TE = torch.rand(case.size, num_experts, generator=torch.Generator().manual_seed(case.size)).to(arena.device)
    return SoftmaxTopK(top_k=case.top_k)(scores_TE), num_experts


def _permute(case: Case, arena: Arena) -> Setup:
    choice, num_experts = _random_choice(case, arena)
    align = row_alignment(arena.device, arena.dtype)

    def setup() -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
        x_TH = arena.take(case.size, case.width_in)
        return lambda: permute(x_TH, plan_dispatch(choice, num_experts=num_experts, alignment=align)), (x_TH,)

    return setup


def _combine(case: Case, arena: Arena) -> Setup:
    choice, num_experts = _random_choice(case, arena)
    plan = plan_dispatch(choice, num_experts=num_experts, alignment=row_alignment(arena.device, arena.dtype))

    def setup() -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
        y_PH = arena.take(plan.token_P.shape[0], case.width_in)
        return lambda: combine(y_PH, plan), (y_PH,)

    return setup


def _activation(case: Case, arena: Arena) -> Setup:
    def setup() -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
        inner, weight = arena.take(case.size, 2 * case.width_in), torch.ones(case.size, device=arena.device)
        return lambda: activate(inner, "swiglu", weight), (inner, weight)  # with the router's weights, as in the layer

    return setup


def _copy(case: Case, arena: Arena) -> Setup:
    count = max(1, case.size // 2 // arena.dtype.itemsize)  # half of the bytes are read, half written

    def setup() -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
        source, target = arena.take(count), arena.take(count)
        return lambda: target.copy_(source), ()

    return setup


def _launch(case: Case, arena: Arena) -> Setup:  # noqa: ARG001
    tiny = torch.zeros(1, device=arena.device)
    return lambda: (tiny.zero_, ())


def _layer(case: Case, arena: Arena) -> Setup:
    layer = MoeLayer(
        hidden=case.width_in,
        width=case.width_out,
        num_experts=case.num_active,
        router=SoftmaxTopK(top_k=case.top_k),
        device=arena.device,
        dtype=arena.dtype,
    )

    def setup() -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
        experts = layer.experts
        experts.w_in = torch.nn.Parameter(arena.take(*experts.w_in.shape))
        experts.w_out = torch.nn.Parameter(arena.take(*experts.w_out.shape))
        x_TH = arena.take(case.size, case.width_in)
        return lambda: layer(x_TH).output_TH, (x_TH, *layer.parameters())

    return setup
