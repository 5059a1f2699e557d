"""The plan: it equals brute force, a looser limit never makes the best worse, and where nothing is good it says why."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.metrics.step import STEP_PARTS
from moesim.study import plan as plan_module
from moesim.study import plan_search
from moesim.study.fast import FastStep, Refused
from moesim.study.plan import Plan, plan
from moesim.study.plan_points import Judge, PlanPoint
from moesim.study.plan_question import Limits, Offer, PlanQuestion, without_axes
from moesim.study.plan_reasons import rejections, remedies, why
from moesim.study.plan_search import Paths
from moesim.study.plan_space import INNER, LeastStep, Leaves, StaticBytes, cluster_sizes
from moesim.units import DAY_S, GIGA

KINDS = ("h100-8x-ib400", "a100-8x-ib200")
QUESTION = PlanQuestion(
    base={"model": "olmoe-1b-7b", "train": {"global_batch": 64}},
    tokens=1e12,
    offers=tuple(Offer(name=name) for name in KINDS),
    min_gpus=8,
    max_gpus=32,
    axes={"tp": (1, 2), "pp": (1, 2, 4), "ep": (1, 8, 16), "vpp": (1, 2)},
)


class Formula:
    """A fast path of one line: memory falls with ranks and recomputation and rises with the micro-batch, time too."""

    def __init__(self, base: Any) -> None:
        self.base, self.num_asked = base, 0

    def __call__(self, configurations: Iterable[Leaves]) -> list[FastStep | Refused]:
        return [self._one(leaves) for leaves in configurations]

    def _one(self, leaves: Leaves) -> FastStep | Refused:
        self.num_asked += 1
        again = {"none": 0, "full": 2}.get(leaves["recompute"], 1)
        n, micro, zero = leaves["num_gpus"], leaves["micro_batch"], leaves["zero"]
        lost = 0.2 * (leaves["pp"] - 1) / leaves["vpp"] + 0.1 * (leaves["tp"] - 1) + 0.3 / micro
        travel = {"alltoall": 0.02, "deepep": 0.01}[leaves["dispatcher"]] * leaves["ep"]
        wait = 0.0 if leaves["policy"] == "search" else 0.1
        step_s = 8.0 / n * (1 + lost + travel + wait + 0.15 * again + 0.05 * zero) * (1 + n / 100)
        own = (60 / leaves["ep"] + 12 / leaves["tp"]) / leaves["pp"] / zero + (8 - 3 * again) * micro
        peak, capacity = own * GIGA, self.base.cluster.gpu.memory_bytes.value
        parts = dict.fromkeys(STEP_PARTS, 0.0)
        parts |= {"experts": 8.0 / n, "dispatch": step_s - 8.0 / n}
        return FastStep(
            step_s=step_s,
            tokens_per_s_per_gpu=64 * 4096 / step_s / n,
            exposed_comm_s=0.0,
            bubble_fraction=0.0,
            wait_s=0.0,
            peak_bytes=peak,
            fits=peak <= capacity,
            headroom_bytes=capacity - peak,
            parts=parts,
        )


@pytest.fixture
def _formula(monkeypatch: pytest.MonkeyPatch) -> None:
    _use_formula(monkeypatch)


def _use_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    def confirm(_: PlanQuestion, point: PlanPoint) -> PlanPoint:
        return replace(point, is_confirmed=True)

    monkeypatch.setattr(plan_search, "Paths", Formula)
    monkeypatch.setattr(plan_module, "confirm", confirm)


def _plan(question: PlanQuestion, num_threads: int = 1) -> Plan:
    with ThreadPoolExecutor(num_threads) as executor:
        return plan(question, executor)


def _brute_force(question: PlanQuestion, fast: Any = Formula) -> list[PlanPoint]:
    """Every configuration that divides, without a bound or a staircase."""
    points = []
    for offer in question.offers:
        space = question.on(offer)
        judge = Judge(space.base, question, offer)
        every = [
            choice | dict(zip(INNER, inner, strict=True))
            for family in space.families()
            for choice in (family, *space.others(family))
            for inner in itertools.product(*(space.axes[name] for name in INNER))
            if space.takes_micro_batch(family, inner[1])
        ]
        steps = fast(space.base)(every)
        points += [judge(c, s) for c, s in zip(every, steps, strict=True) if not isinstance(s, Refused)]
    return [point for point in points if not point.misses]


@pytest.mark.usefixtures("_formula")
def test_the_plan_is_that_of_brute_force() -> None:
    for deadline_d, price in ((None, None), (30.0, 2.0), (60.0, 0.5)):
        offers = (Offer(name=KINDS[0], price_per_gpu_hour=price), Offer(name=KINDS[1], price_per_gpu_hour=price))
        limits = Limits(deadline_s=deadline_d * DAY_S if deadline_d else None)
        question = replace(QUESTION, offers=offers, limits=limits)
        all_good, found = _brute_force(question), _plan(question)
        assert found.cheapest is not None
        assert found.fastest is not None
        assert found.cheapest.price == min(point.price for point in all_good)
        assert found.fastest.days == min(point.days for point in all_good)
        front = [(p.price, p.days) for p in plan_module.pareto(all_good)]
        assert [(p.price, p.days) for p in found.pareto] == front
        assert found.num_evaluated < len(all_good) * 2


@pytest.mark.parametrize(("headroom", "needs"), [(0.05, 1), (0.7, 2), (0.86, 3)])
def test_with_the_real_fast_path_a_search_loses_nothing_to_brute_force(
    headroom: float, needs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "confirm", lambda _, point: replace(point, is_confirmed=True))
    small = {"tp": (1, 2), "pp": (1, 2), "ep": (1, 8), "micro_batch": (1, 2), "num_gpus": (16,), "vpp": (1, 2)}
    base = {"model": "olmoe-1b-7b", "train": {"global_batch": 64}}
    limits = Limits(memory_headroom_fraction=headroom)
    question = replace(QUESTION, base=base, offers=QUESTION.offers[:1], axes=small, limits=limits)
    found, every = _plan(question), _brute_force(question, Paths)
    assert found.cheapest is not None
    assert found.fastest is not None
    assert found.cheapest.price == min(point.price for point in every)
    assert found.fastest.days == min(point.days for point in every)
    assert found.cheapest.settings["zero"] >= needs


def test_no_step_is_below_its_bounds() -> None:
    question = replace(QUESTION, axes=QUESTION.axes | {"ep": (8,), "vpp": (1,), "tp": (1, 2)}, max_gpus=8)
    for offer in question.offers:
        space = question.on(offer)
        inner = [{"zero": zero, "micro_batch": 1, "recompute": "none"} for zero in space.axes["zero"]]
        tried = [family | one for family in space.families() for one in inner]
        static, least = StaticBytes(space.base), LeastStep(space.base)
        for leaves, step in zip(tried, Paths(space.base)(tried), strict=True):
            assert isinstance(step, FastStep)
            assert least(leaves) < step.step_s
            assert static(leaves) < step.peak_bytes


@settings(max_examples=15, deadline=None)
@given(days=st.floats(5, 80), looser=st.floats(1.0, 3.0), headroom=st.floats(0.0, 0.6), share=st.floats(0.0, 1.0))
def test_a_looser_limit_never_makes_the_best_worse(days: float, looser: float, headroom: float, share: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        _use_formula(patch)
        tight = Limits(deadline_s=days * DAY_S, memory_headroom_fraction=headroom)
        loose = Limits(deadline_s=days * looser * DAY_S, memory_headroom_fraction=headroom * share)
        found = [_plan(replace(QUESTION, limits=limits)) for limits in (tight, loose)]
    if found[0].cheapest is not None:
        assert found[0].fastest is not None
        assert found[1].cheapest is not None
        assert found[1].fastest is not None
        assert found[1].cheapest.price <= found[0].cheapest.price
        assert found[1].fastest.days <= found[0].fastest.days


@pytest.mark.usefixtures("_formula")
def test_where_no_plan_is_feasible_the_nearest_miss_and_its_remedy_are_told() -> None:
    good = _brute_force(QUESTION)
    least_days = min(point.days for point in good)
    found = _plan(replace(QUESTION, limits=Limits(deadline_s=least_days * 0.9 * DAY_S)))
    assert found.cheapest is None
    assert found.pareto == ()
    assert found.nearest is not None
    assert found.nearest.days == pytest.approx(least_days)
    assert [miss.rule for miss in found.nearest.misses] == ["deadline"]
    assert f"a deadline of {least_days:,.1f} days" in remedies(found)[0]
    again = _plan(replace(QUESTION, limits=Limits(deadline_s=least_days * 1.0001 * DAY_S)))
    assert again.cheapest is not None


@pytest.mark.usefixtures("_formula")
def test_where_nothing_fits_memory_is_told() -> None:
    question = replace(QUESTION, limits=Limits(memory_headroom_fraction=0.99), axes=QUESTION.axes | {"ep": (1,)})
    found = _plan(question)
    assert found.cheapest is None
    assert found.nearest is not None
    assert found.nearest.misses[0].rule == "memory"
    assert "memory" in remedies(found)[0]


@pytest.mark.usefixtures("_formula")
def test_every_other_value_has_its_reason() -> None:
    found = _plan(QUESTION)
    assert found.cheapest is not None
    told = rejections(found)
    assert {one["value_tried"] for one in told if one["axis"] == "ep"} == {1, 8, 16} - {found.cheapest.settings["ep"]}
    for one in told:
        assert one["config"] != {"cluster": found.cheapest.cluster, **found.cheapest.settings}
        if one["rule"] == "dearer":
            assert one["value"] >= one["limit"] == found.cheapest.price
            tells_apart = one["value"] >= 1.01 * one["limit"]
            assert (" beats " if tells_apart else " is as good as ") in one["why"]


@pytest.mark.usefixtures("_formula")
def test_a_reason_tells_what_changes_alone_and_a_tie_is_called_one() -> None:
    found = _plan(QUESTION)
    assert found.cheapest is not None
    rival = next(rival for rival in found.rivals if rival.axis == "ep" and rival.value == 16)
    alone = rival.alone
    assert isinstance(alone, PlanPoint)
    assert alone.settings == found.cheapest.settings | {"ep": 16}
    assert rival.best.nearness <= alone.nearness
    assert "in-node dispatch" not in why(rival)
    tie = why(replace(rival, best=replace(rival.best, gpu_hours=rival.winner.gpu_hours * 1.004)))
    assert tie.startswith("ep=16 is as good as ep=8, as far as can be told: +0.4% GPU-hours")
    refused = "parallel: ep: ep=16 does not divide dp*cp*tp = 8*1*1 = 8; got 16. A hint"
    best = replace(rival.best, settings=rival.best.settings | {"pp": 2})
    told = why(replace(rival, alone=refused, best=best))
    assert "with nothing else changed: ep=16 does not divide dp*cp*tp = 8*1*1 = 8; its best has pp=2" in told


@pytest.mark.usefixtures("_formula")
def test_a_cluster_on_which_nothing_divides_is_told() -> None:
    offers = (*QUESTION.offers, Offer(name="gb200-nvl72"))
    found = _plan(replace(QUESTION, offers=offers, max_gpus=72))
    assert found.untried == ("gb200-nvl72",)
    assert [one["value_tried"] for one in rejections(found) if one["rule"] == "divides"] == ["gb200-nvl72"]


def test_stages_that_make_replicas_of_a_rack_a_power_of_two_are_tried() -> None:
    base = {"model": "olmoe-1b-7b", "train": {"global_batch": 64}}
    question = PlanQuestion(base=base, tokens=1e12, offers=(Offer(name="gb200-nvl72"),), max_gpus=72)
    assert any(family["pp"] == 9 for family in question.on(question.offers[0]).families())


@pytest.mark.usefixtures("_formula")
def test_the_answer_is_the_same_on_any_number_of_workers() -> None:
    texts = []
    for num in (1, 2):
        found = _plan(QUESTION, num)
        assert found.cheapest is not None
        texts.append(json.dumps([found.cheapest.to_dict(), rejections(found), dict(found.num_rejected)]))
    assert texts[0] == texts[1]


def test_at_most_four_finalists_are_run_and_one_that_breaks_a_limit_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def confirm(question: PlanQuestion, point: PlanPoint) -> PlanPoint:
        asked.append(point)
        slower = replace(point, days=point.days * 3, gpu_hours=point.gpu_hours * 3, is_confirmed=True)
        return Judge(question.on(question.offers[0]).base, question, question.offers[0]).judged(slower)

    monkeypatch.setattr(plan_search, "Paths", Formula)
    monkeypatch.setattr(plan_module, "confirm", confirm)
    least_days = min(point.days for point in _brute_force(QUESTION))
    found = _plan(replace(QUESTION, limits=Limits(deadline_s=1.5 * least_days * DAY_S)))
    assert 0 < len(asked) <= 4
    assert found.num_confirmed == len(asked)
    assert all(point.misses for point in found.fallen)
    assert found.cheapest is None
    assert found.nearest is not None
    assert found.nearest.misses


def test_sizes_are_whole_nodes() -> None:
    assert cluster_sizes(72, 1, 600) == (72, 144, 216, 288, 432, 576)
    assert cluster_sizes(8, 1, 4) == ()


def test_what_is_given_is_an_axis_of_one_value() -> None:
    kept, axes = without_axes({"model": "m", "train": {"recompute": "full", "seq_len": 1}, "num_gpus": 64})
    assert kept == {"model": "m", "train": {"seq_len": 1}}
    assert axes == {"num_gpus": (64,), "recompute": ("full",)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": -1.0}, "tokens: must be positive"),
        ({"offers": ()}, "must name at least one cluster"),
        ({"offers": (Offer(name="h100-8x-ib400"),) * 2}, "must not name one twice"),
        ({"axes": {"epp": (1,)}}, "epp: is no setting"),
        ({"min_gpus": 64}, "min_gpus: must not exceed max_gpus"),
        ({"limits": Limits(budget=1.0)}, "budget: needs prices"),
    ],
)
def test_a_wrong_question_is_refused_by_name(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        replace(QUESTION, **change)


@pytest.mark.usefixtures("_formula")
def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(InputError, match="must leave a layout that divides"):
        _plan(replace(QUESTION, axes=QUESTION.axes | {"ep": (7,)}))


def test_where_all_is_refused_the_most_frequent_reason_is_told() -> None:
    axes = QUESTION.axes | {"ep": (8,), "pp": (1,), "tp": (1,), "num_first_stage_layers": (3,)}
    with pytest.raises(InputError, match=r"leave only what is refused, most often: .*needs pp of at least 2"):
        _plan(replace(QUESTION, axes=axes))


@pytest.mark.parametrize(("name", "value"), [("policy", "best"), ("schedule", "2f2b"), ("recompute", "mlp2")])
def test_one_wrong_word_among_an_axis_is_refused_at_once(name: str, value: str) -> None:
    right = {"policy": "search", "schedule": "1f1b", "recompute": "full"}[name]
    with pytest.raises(InputError, match=value):
        _plan(replace(QUESTION, axes={name: (right, value)}))


def test_with_fsdp_only_its_own_stages_are_tried() -> None:
    question = replace(QUESTION, base=dict(QUESTION.base) | {"parallel": {"fsdp": True}})
    assert question.on(question.offers[0]).axes["zero"] == (2, 3)
