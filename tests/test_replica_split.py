"""Which replica a sender takes reaches the step: loads, the bytes of every port, time."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from moesim.errors import InputError
from moesim.fabric.senders import SenderWeights, combine_ports_by_sender, dispatch_ports_by_sender
from moesim.fabric.traffic import Copies, combine_ports, dispatch_ports, rails
from moesim.metrics.summary import summarise
from moesim.placement.policies import POLICIES
from moesim.routing.sampler import draw_choices
from moesim.routing.visits import visit_probabilities
from moesim.scenario import Scenario
from moesim.seeds import stream
from moesim.timeline.load import step_load
from moesim.timeline.placed import SPLITS, placed_experts, scenario_ranks, sender_weights
from moesim.timeline.step import run_step

ASKED = {"model": "qwen3-30b-a3b", "cluster": "h100-8x-ib400", "num_gpus": 32, "ep": 32, "global_batch": 64}
ASKED |= {"gini": 0.4, "policy": "eplb_global", "num_slots": 192}
PORTS = ("nvlink_out", "nvlink_in", "nic_out", "nic_in")
NODES = {"even": [0, 0, 0, 1, 1, 1], "ragged": [0, 0, 0, 0, 1, 1], "three": [0, 0, 1, 1, 2, 2]}


def scenario(**changes: object) -> Scenario:
    return Scenario.make(**ASKED | changes)


def copies_on(nodes: list[int], rng: np.random.Generator) -> Copies:
    shape = (2, 3, 2)
    return Copies(
        assignments_GMLR=rng.uniform(1.0, 9.0, (*shape, len(nodes))).astype(np.float32),
        visits_GMLR=rng.uniform(1.0, 5.0, (*shape, len(nodes))).astype(np.float32),
        node_visits_GMLN=rng.uniform(1.0, 5.0, (*shape, max(nodes) + 1)).astype(np.float32),
        node_of_rank_R=np.array(nodes),
    )


def weights_on(nodes: list[int], rng: np.random.Generator | None) -> SenderWeights:
    """Of 2 layers; without a rng all senders are alike."""

    def drawn(width: int) -> np.ndarray:
        values = np.ones((2, len(nodes), width)) if rng is None else rng.uniform(0.0, 3.0, (2, len(nodes), width))
        return values / values.mean(axis=1, keepdims=True)

    wide = len(nodes)
    return SenderWeights(assignments_LRR=drawn(wide), visits_LRR=drawn(wide), node_visits_LRN=drawn(max(nodes) + 1))


@pytest.mark.parametrize("nodes", NODES.values(), ids=NODES)
@pytest.mark.parametrize("cross_rail", ["pxn", "direct", "spine"])
@pytest.mark.parametrize("dedup", ["none", "rank", "node"])
def test_alike_senders_load_ports_as_the_closed_form_does(dedup: str, cross_rail: str, nodes: list[int]) -> None:
    copies = copies_on(nodes, np.random.default_rng(1))
    options = {"token_bytes": 7.0, "dedup": dedup, "cross_rail": cross_rail}
    pairs = ((dispatch_ports, dispatch_ports_by_sender), (combine_ports, combine_ports_by_sender))
    for closed, by_sender in pairs:
        wanted, found = closed(copies, **options), by_sender(copies, weights_on(nodes, None), **options)
        for port in PORTS:
            assert getattr(found, port) == pytest.approx(getattr(wanted, port), rel=1e-5), port


@pytest.mark.parametrize("nodes", NODES.values(), ids=NODES)
@pytest.mark.parametrize("cross_rail", ["pxn", "direct"])
def test_unlike_senders_load_ports_as_their_messages_one_by_one(cross_rail: str, nodes: list[int]) -> None:
    rng = np.random.default_rng(2)
    copies, weights = copies_on(nodes, rng), weights_on(nodes, rng)
    rail = rails(np.array(nodes))
    ranks = range(len(nodes))
    wanted = {port: np.zeros(len(nodes)) for port in PORTS}
    for a in ranks:
        for b in ranks:
            amount = float(copies.visits_GMLR[1, 2, 0, b] * weights.visits_LRR[0, a, b])
            if a == b:
                continue
            if nodes[a] == nodes[b]:
                wanted["nvlink_out"][a] += amount
                wanted["nvlink_in"][b] += amount
                continue
            on_rail = [r for r in ranks if nodes[r] == nodes[a] and rail[r] == rail[b]]
            hop = on_rail[0] if cross_rail == "pxn" and on_rail else a
            if hop != a:
                wanted["nvlink_out"][a] += amount
                wanted["nvlink_in"][hop] += amount
            wanted["nic_out"][hop] += amount
            wanted["nic_in"][b] += amount
    found = dispatch_ports_by_sender(copies, weights, token_bytes=1.0, dedup="rank", cross_rail=cross_rail)
    for port in PORTS:
        assert getattr(found, port)[1, 2, 0] == pytest.approx(wanted[port], rel=1e-5), port


def test_what_all_send_is_what_all_receive_and_goes_back() -> None:
    rng = np.random.default_rng(3)
    copies, weights = copies_on(NODES["three"], rng), weights_on(NODES["three"], rng)
    for dedup in ("none", "rank", "node"):
        out = dispatch_ports_by_sender(copies, weights, token_bytes=2.0, dedup=dedup)
        back = combine_ports_by_sender(copies, weights, token_bytes=2.0, dedup=dedup)
        for wire in ("nvlink", "nic"):
            sums = [getattr(ports, f"{wire}_{way}").sum(axis=-1) for ports in (out, back) for way in ("out", "in")]
            assert sums[0] == pytest.approx(sums[1], rel=1e-5), (dedup, wire)
            assert sums[2] == pytest.approx(sums[3], rel=1e-5), (dedup, wire)
        nic_back = back.nic_out.sum(axis=-1)
        assert nic_back == pytest.approx(out.nic_in.sum(axis=-1), rel=1e-5), "the same crosses both ways"


@pytest.mark.parametrize("split", SPLITS)
def test_slots_share_their_experts_load_as_the_split_says(split: str) -> None:
    drawn = step_load(scenario(split=split))
    placed, layers = drawn.placed, drawn.placed.layers
    load_LE = step_load(scenario()).popularities.inclusion_LE
    rank_share = SPLITS[split](layers, load_LE)
    load_LR = placed.rank_of_slot.rank_loads(placed.of_slots(load_LE))
    assert load_LR == pytest.approx(layers.rank_loads(load_LE, share_LER=rank_share), rel=1e-9)
    kept = drawn.kept_GMLS.sum(axis=-1)
    assert kept == pytest.approx(drawn.load.kept_GMLE.sum(axis=-1), rel=1e-5), "no assignment is lost or doubled"


def test_a_split_by_load_evens_ranks_out_and_the_nearest_replica_spares_the_network() -> None:
    found = {split: summarise(run_step(scenario(split=split))) for split in SPLITS}
    ports = {split: _nic_bytes(scenario(split=split)) for split in ("even", "nearest")}
    assert found["uneven"].wait_s < found["even"].wait_s
    assert ports["nearest"] < 0.97 * ports["even"]
    assert len({result.step_s for result in found.values()}) == 4


def _nic_bytes(asked: Scenario) -> float:
    """Over the NICs of all ranks in one dispatch, mean over layers, at the expected load, one byte a token."""
    drawn = step_load(asked)
    placed, nodes = drawn.placed, drawn.placed.layers.ranks.node_of_rank_R
    visits = visit_probabilities(placed.popularities, placed.rank_of_slot, nodes)
    copies = Copies(
        assignments_GMLR=np.ones((1, 1, *visits.rank_visits_LR.shape), dtype=np.float32),
        visits_GMLR=visits.rank_visits_LR[None, None].astype(np.float32),
        node_visits_GMLN=visits.node_visits_LN[None, None].astype(np.float32),
        node_of_rank_R=nodes,
    )
    if not placed.is_by_sender:
        return float(dispatch_ports(copies, token_bytes=1.0).nic_out.sum())
    return float(dispatch_ports_by_sender(copies, sender_weights(placed, visits), token_bytes=1.0).nic_out.sum())


def test_the_visits_of_nearest_senders_are_those_of_drawn_tokens() -> None:
    """20,000 tokens of each of 32 ranks through one layer, each taking the nearest replica: copies counted."""
    asked = scenario(split="nearest")
    base = step_load(scenario(num_slots=128, policy="contiguous")).popularities
    layers = POLICIES["eplb_global"](base.inclusion_LE, scenario_ranks(asked, 192), rng=stream(0, "placement"))
    placed = placed_experts(layers, base, "nearest")
    nodes, rank_S = layers.ranks.node_of_rank_R, layers.ranks.rank_of_slot_S
    visits = visit_probabilities(placed.popularities, placed.rank_of_slot, nodes)
    expected = visits.rank_visits_LR[0] * sender_weights(placed, visits).visits_LRR[0]
    rng = np.random.default_rng(4)
    slots_of = [np.array(slots) for slots in layers.slots_of(0)]
    counted = np.zeros((32, 32))
    for sender in range(32):
        chosen_TK = draw_choices(base.log_weights_LE[0], base.router, 4000, rng)
        slot_TK = np.empty_like(chosen_TK)
        for expert in range(128):
            slots = slots_of[expert]
            own = slots[rank_S[slots] == sender]
            near = slots[nodes[rank_S[slots]] == nodes[sender]]
            taken = own if own.size else near if near.size else slots
            at = chosen_TK == expert
            slot_TK[at] = rng.choice(taken, size=int(at.sum()))
        rank_TK = rank_S[slot_TK]
        counted[sender] = [(rank_TK == rank).any(axis=1).mean() for rank in range(32)]
    # Twice the chance error of 4,000 tokens, and 4 % for taking a token's choices as independent.
    assert np.abs(expected - counted).max() < 2 * np.sqrt(0.25 / 4000) + 0.04
    assert np.abs(expected - counted).mean() < 0.008
    assert expected.sum() == pytest.approx(counted.sum(), rel=0.02)


@pytest.mark.parametrize("split", SPLITS)
def test_without_replicas_there_is_nothing_to_choose(split: str) -> None:
    one, other = (summarise(run_step(scenario(num_slots=None, split=name))) for name in ("even", split))
    assert dataclasses.replace(one, scenario={}).step_s == dataclasses.replace(other, scenario={}).step_s


def test_domains_and_consecutive_tokens_follow_their_experts_into_slots() -> None:
    raw = scenario(num_slots=None, policy="random").to_dict()
    domains = [{"name": "code", "share": 0.4}, {"name": "prose", "share": 0.6}]
    raw["routing"]["popularity"] = {"kind": "domains", "gini": 0.4, "domains": domains, "run_tokens": 512}
    placed = step_load(Scenario.from_mapping(raw)).placed
    parts = placed.popularities.domains
    mixed = np.tensordot(parts.share_D, parts.inclusion_DLE, axes=1)
    assert mixed == pytest.approx(placed.popularities.inclusion_LE, rel=1e-6)


def test_an_unknown_split_gets_its_near_match() -> None:
    with pytest.raises(InputError, match=r"split: must be even or nearest.*got 'nearst'"):
        scenario(split="nearst")
