"""What would make a run fit: options come from the memory model itself."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.cost.fit_options import FitOption, hot_share, what_to_change, worst_stage
from moesim.describe.model import Ffn, GroupedQueryAttention, Layer, Model, MoeFfn, Router
from moesim.describe.parallel import Parallelism
from moesim.describe.workload import Training
from moesim.errors import InputError

ATTENTION = GroupedQueryAttention(num_heads=32, num_kv_heads=8, head_dim=128)
MOE = Layer(attention=ATTENTION, ffn=MoeFfn(num_experts=32, expert=Ffn(width=2048), router=Router(top_k=4)))
MODEL = Model(name="model", hidden=4096, vocab=64000, layers=(MOE,) * 16)
PARALLEL = Parallelism(ep=8, pp=2, zero=0)
TRAIN = Training(seq_len=4096, micro_batch=2, global_batch=128)
RECEIVED = [np.full((1, 8, 8, 8), 2 * 4096 * 4 * 1.5)] * 2


def options(capacity_bytes: float) -> list[FitOption]:
    return what_to_change(MODEL, PARALLEL, 16, TRAIN, received_by_stage=RECEIVED, capacity_bytes=capacity_bytes)


def test_the_hottest_ranks_share_is_recovered() -> None:
    assert hot_share(MODEL, PARALLEL, TRAIN, RECEIVED) == pytest.approx(1.5)


def test_every_option_saves_memory_and_its_saving_is_what_the_model_says() -> None:
    now = worst_stage(MODEL, PARALLEL, TRAIN, 16, skew=1.5).peak_bytes
    for option in options(80e9):
        assert option.saved_bytes > 0
        assert option.peak_bytes + option.saved_bytes == pytest.approx(now)
        assert option.fits == (option.peak_bytes <= 80e9)


def test_options_come_cheapest_first_and_name_scenario_leaves() -> None:
    # pp=4 would leave 4 ranks per stage for ep=8, ep=16 likewise 8: both are left out
    changes = [dict(option.changes) for option in options(1e15)]
    assert changes == [
        {"zero": 1},
        {"micro_batch": 1},
        {"recompute": "full"},
        {"tp": 2},
        {"zero": 2},
        {"zero": 3},
    ]


def test_when_no_single_change_fits_they_are_joined() -> None:
    found = options(12e9)
    assert not any(option.fits for option in found[:-1])
    assert found[-1].text.count(";") >= 1
    assert found[-1].peak_bytes < min(option.peak_bytes for option in found[:-1])


def test_experts_that_do_not_divide_are_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"parallel: ep: must divide the 32 experts; got 5"):
        worst_stage(MODEL, Parallelism(ep=5), Training(global_batch=40), 5)
