"""What no measurement stands behind: vectors by hand of ring context parallelism, packed documents, offloading."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.catalog.models import load_model
from moesim.cost.context import buffer_bytes
from moesim.cost.device import device_cost
from moesim.cost.documents import shares
from moesim.cost.layer import layer_cost
from moesim.cost.offload import chunk_offload, optimizer_transfer_s
from moesim.describe.parallel import Parallelism
from moesim.describe.pipeline import stage_chunks
from moesim.describe.workload import Optimizer, Training
from moesim.fabric.collectives import send_s
from moesim.metrics.summary import summarise
from moesim.scenario import Scenario
from moesim.timeline.attention_group import context_s
from moesim.timeline.step import run_step

LLAMA = load_model("llama-3-8b")  # 32 heads and 8 key-value heads of 128, hidden 4096, width 14336
RING = {"model": "llama-3-8b", "cluster": "h100-8x-ib400", "num_gpus": 8, "cp": 4, "global_batch": 2, "seq_len": 8192}


def test_a_ring_of_four_makes_three_hops_of_a_ranks_keys_and_values_behind_a_quarter_of_its_attention() -> None:
    scenario = Scenario.make(**RING)
    device = device_cost(scenario.cluster.gpu, "bf16")
    cost = layer_cost(LLAMA, LLAMA.layers[0], parallel=scenario.parallel, train=scenario.train, device=device)
    hop_bytes = 8192 / 4 * (2 * 8 * 128 * 2)  # 2,048 tokens of the rank, keys and values of 8 heads, bf16
    hop_s = float(send_s(hop_bytes, True, scenario.cluster))
    assert float(context_s(scenario, cost, 0.0, is_backward=False)) == pytest.approx(3 * hop_s)
    assert float(context_s(scenario, cost, 2 * hop_s, is_backward=False)) == pytest.approx(3 * (hop_s - hop_s / 2))
    assert float(context_s(scenario, cost, 4 * hop_s, is_backward=False)) == 0.0
    twice_s = float(send_s(2 * hop_bytes, True, scenario.cluster))  # and their gradients
    assert float(context_s(scenario, cost, 0.0, is_backward=True)) == pytest.approx(3 * twice_s)
    # Two sets of keys and values and two of their gradients, a token.
    assert buffer_bytes(LLAMA.layers[0].attention, scenario.parallel) == 4 * 2 * 8 * 128 * 2


def test_a_sequence_of_3_and_5_tokens_needs_34_of_64_parts_of_its_attention() -> None:
    pieces, sequences = np.array([3, 5, 8, 1, 1, 6]), np.array([0, 0, 1, 2, 2, 2])
    assert shares(pieces, sequences, 3, 8) * 64 == pytest.approx([9 + 25, 64, 1 + 1 + 36])
    # A window of 4 leaves of a square of n tokens 2 * 4 * n - 4 * 4: 24 of 5, 48 of 8; 3 tokens are whole.
    assert shares(np.array([5, 3]), np.array([0, 0]), 1, 8, window=4) == pytest.approx([(24 + 9) / 48])


def test_offloaded_bytes_are_what_all_but_two_layers_keep_and_twelve_bytes_a_parameter() -> None:
    parallel, train = Parallelism(), Training(offload="optimizer,activations", seq_len=1024, global_batch=1)
    (chunk,) = stage_chunks(LLAMA, parallel, train, 0)
    sent = chunk_offload(LLAMA, parallel, train, chunk)
    # Two norms' inputs and outputs, queries and output, keys and values, logsumexp; gate, up and their product.
    token = 2 * (4 * 4096 + 2 * 4096 + 2 * 1024) + 4 * 32 + 2 * 3 * 14336
    assert [layer.token_bytes for layer in sent] == [token] * 30
    assert optimizer_transfer_s(1e9, train, 63e9) == pytest.approx(12 / 63)
    lean = Training(offload="optimizer", optimizer=Optimizer(main_weights="remainder", moments="bf16"))
    assert optimizer_transfer_s(1e9, lean, 63e9) == pytest.approx(6 / 63)


@pytest.mark.parametrize(
    ("leaves", "said"),
    [
        ({}, "ring"),
        ({"cp": 1, "global_batch": 8, "documents": 800}, "Packed documents"),
        ({"cp": 1, "global_batch": 8, "offload": "optimizer"}, "Offloading"),
        ({"cp": 1, "global_batch": 8, "zero": 3, "fsdp": True}, "FSDP"),
    ],
)
def test_a_result_says_what_no_measured_run_tests(leaves: dict[str, object], said: str) -> None:
    told = summarise(run_step(Scenario.make(**RING | {"seq_len": 2048} | leaves)))
    reasons = [reason for reason in told.envelope["reasons"] if said in reason]
    assert len(reasons) == 1
    assert "no measured run" in reasons[0]
