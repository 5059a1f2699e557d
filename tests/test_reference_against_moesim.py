"""The reference model and the simulator agree on what both define: who is dropped, and which rank serves how much."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from moesim.placement.maps import save_map  # noqa: E402
from moesim.placement.policies import Eplb  # noqa: E402
from moesim.placement.slots import even_slots  # noqa: E402
from moesim.routing.capacity import Limit, megatron_capacity  # noqa: E402
from moesim.routing.drops import keep_choices  # noqa: E402
from reference_model.capacity import capacity_tokens  # noqa: E402
from reference_model.dispatch import plan_dispatch  # noqa: E402
from reference_model.ranks import run_on_ranks  # noqa: E402
from reference_model.routers import GshardTop2, SoftmaxTopK  # noqa: E402
from tests.test_reference_expert_parallel import EXPERTS, in_one_process, on_each_rank  # noqa: E402


def _skewed_choice(num_tokens: int, router: Any) -> Any:
    torch.manual_seed(0)
    return router(torch.randn(num_tokens, EXPERTS) + torch.linspace(0.0, 2.0, EXPERTS))


@pytest.mark.parametrize("factor", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("policy", ["probability", "position", "slot"])
@pytest.mark.parametrize("router", [SoftmaxTopK(top_k=3), GshardTop2()], ids=["softmax", "gshard"])
def test_the_same_copies_stay(router: Any, policy: str, factor: float) -> None:
    choice = _skewed_choice(150, router)
    capacity = capacity_tokens(150, router.top_k, EXPERTS, factor)
    sizes = {"tokens_per_rank": 150, "top_k": router.top_k, "num_experts": EXPERTS}
    assert megatron_capacity(**sizes, capacity_factor=factor) == capacity
    kept = plan_dispatch(choice, num_experts=EXPERTS, capacity=capacity, policy=policy).kept_TK
    served_TK = keep_choices(
        choice.experts_TK.numpy().astype(np.int16),
        Limit(places=capacity, bin_tokens=150, num_bins=1, slot_major=policy == "slot"),
        "probability" if policy == "probability" else "position",
        score_TK=choice.weights_TK.double().numpy(),
    )
    np.testing.assert_array_equal(kept.numpy(), served_TK >= 0)
    assert not kept.all()


def test_a_placement_file_of_the_simulator_spreads_real_tokens_as_it_says(tmp_path: Path) -> None:
    counts, skew = [200, 200], 1.0
    oracle = in_one_process(counts, skew, {})
    load_LE = oracle["wanted"].double().numpy()[None]
    placed = Eplb()(load_LE, even_slots(12, 2), rng=np.random.default_rng(0))
    save_map(tmp_path / "map.json", placed)
    (slots,) = json.loads((tmp_path / "map.json").read_text())["physical_to_logical_map"]
    assert len(slots) == 12
    ranks = [placements[0] for placements in run_on_ranks(on_each_rank, 2, [slots], counts, skew, {})]
    torch.testing.assert_close(torch.cat([rank["output"] for rank in ranks]), oracle["output"], rtol=1e-6, atol=1e-6)
    served_R = sum(rank["load"] for rank in ranks).view(2, -1).sum(1).numpy()
    # Each of two source ranks deals an expert's copies to its slots in turn: at most one copy off the even share.
    assert abs(served_R - placed.rank_loads(load_LE)[0]).max() <= 2 * EXPERTS / 2
    contiguous_R = load_LE[0].reshape(2, -1).sum(1)
    assert served_R.max() < 0.9 * contiguous_R.max(), "the placement must balance what was not"
