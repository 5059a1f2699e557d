"""The verb ``alltoall``: one exchange of given bytes between ranks, timed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.cli.app import app
from moesim.cli.call import Call, verb
from moesim.cli.output import Answer, Table, fields_table, working
from moesim.errors import InputError, check, near_match

if TYPE_CHECKING:
    from moesim.fabric.algorithms import Algorithm
    from moesim.study.alltoall import TimedExchange

FIDELITIES = ("exact", "port")
MAX_RANKS = 4096  # of a matrix: links and messages are held at once
EXAMPLES = (
    "Examples:",
    "moesim alltoall --bytes sizes.npy --cluster h100-8x-ib400 --json",
    "moesim alltoall --bytes sizes.npy --cluster my-cluster.yaml --algorithm hierarchical --fidelity port",
    "moesim alltoall --bytes sizes.npy --set cross_rail=spine --set oversubscription=2 --slow 3=0.5",
    "moesim alltoall --bytes sizes.npy --cluster h100-8x-roce400 --set num_paths=8 --set derates.spine_alltoall=1",
    "moesim alltoall --bytes sizes.npy --starts starts.npy --finish finish.npy",
    "Sizes: a .npy of ranks x ranks [bytes], rounded down; the diagonal stays local, zero is no message. Starts and "
    "finishes: ranks x ranks [s], NaN where there is no message.",
)


@app.command(epilog="\n\n".join(EXAMPLES))
@verb()
def alltoall(
    call: Call,
    sizes: Annotated[
        Path | None,
        typer.Option("--bytes", metavar="M.npy", help="What rank i sends rank j [bytes].", show_default=False),
    ] = None,
    cluster: Annotated[str, typer.Option(metavar="NAME|FILE", help="Preset or cluster YAML.")] = "h800-8x-ib400",
    algorithm: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="direct, pairwise, hierarchical, two_step, low_latency, allgather or hybrid."
        ),
    ] = "direct",
    fidelity: Annotated[
        str, typer.Option(metavar="exact|port", help="exact: max-min fair sharing; port: a fast estimate of it.")
    ] = "exact",
    starts: Annotated[
        Path | None,
        typer.Option(metavar="S.npy", help="When each message is handed over [s].", show_default=False),
    ] = None,
    finish: Annotated[
        Path | None,
        typer.Option(metavar="F.npy", help="Write when each message has arrived [s].", show_default=False),
    ] = None,
    num_sms: Annotated[
        int | None,
        typer.Option(metavar="N", help="SMs of a hierarchical kernel, which bound its NVLink rate.", min=1),
    ] = None,
    line_rate: Annotated[bool, typer.Option("--line-rate", help="Leave out the cluster's derates.")] = False,
    slow: Annotated[
        list[str],
        typer.Option(metavar="RANK=SHARE", help="A rank's ports reach only this share of their rate. Repeatable."),
    ] = [],  # noqa: B006 - typer's way of an option that may be repeated
    rate_jitter: Annotated[
        float, typer.Option(metavar="X", help="Spread of the links' rates (they only fall short).", min=0.0)
    ] = 0.0,
    latency_jitter: Annotated[
        str, typer.Option(metavar="TIME", help="Mean extra latency of each rank, such as 3us.")
    ] = "0us",
    settings: Annotated[
        list[str],
        typer.Option("--set", metavar="KEY=VALUE", help="Set a field of the cluster file. Repeatable."),
    ] = [],  # noqa: B006
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of hashed paths and of jitter.", min=0)] = 0,
) -> Answer:
    """Time one all-to-all of given bytes: when it is over, what bounds it, which links are busy."""
    check(sizes is not None, "--bytes", "", "is required: a .npy of ranks x ranks", None)
    check(fidelity in FIDELITIES, "--fidelity", "", "must be exact or port", fidelity, near_match(fidelity, FIDELITIES))
    check(finish is None or finish.suffix == ".npy", "--finish", "", "must end in .npy", str(finish))
    assert sizes is not None
    inputs: dict[str, Any] = {
        "bytes": str(sizes),
        "cluster": cluster,
        "algorithm": algorithm,
        "fidelity": fidelity,
        "starts": str(starts) if starts else None,
        "finish": str(finish) if finish else None,
        "num_sms": num_sms,
        "line_rate": line_rate,
        "slow": slow,
        "rate_jitter": rate_jitter,
        "latency_jitter": latency_jitter,
        "settings": settings,
        "seed": seed,
    }
    return _timed(call, inputs, *_matrices(sizes, starts), finish)


def _timed(call: Call, inputs: dict[str, Any], bytes_RR: Any, starts_RR: Any, finish: Path | None) -> Answer:
    """The exchange of a call's inputs, timed."""
    from moesim.catalog.hardware import load_cluster
    from moesim.study.alltoall import fabric_of, stated_derates, time_exchange

    policy, line_rate = _policy(inputs["algorithm"], inputs["num_sms"]), inputs["line_rate"]
    described = load_cluster(inputs["cluster"], changes=inputs["settings"])
    fabric = fabric_of(
        described,
        len(bytes_RR),
        line_rate=line_rate,
        slow=_slow(inputs["slow"]),
        rate_spread=inputs["rate_jitter"],
        latency_spread_s=_seconds(inputs["latency_jitter"]),
        seed=inputs["seed"],
    )
    with working(call, f"Timing {len(bytes_RR)} ranks"):
        timed = time_exchange(bytes_RR, fabric, algorithm=policy, fidelity=inputs["fidelity"], starts=starts_RR)
    if finish is not None:
        from moesim.door.arrays import write_array

        found = timed.completed.finish_RR
        write_array(finish, [found], name="finish_s", shape=found.shape, dtype=found.dtype)
        call.note(f"wrote {finish}")
    derates = {} if line_rate else stated_derates(described)
    return Answer(
        inputs=inputs,
        result=timed.to_dict(),
        tables=_tables(timed, inputs["algorithm"], len(bytes_RR)),
        provenance=_provenance(described, derates),
        warnings=[] if derates or line_rate else ["the cluster's file has no derates: links run at line rate"],
    )


def _policy(algorithm: str, num_sms: int | None) -> Algorithm:
    """The algorithm of a name; num_sms goes with the hierarchical one."""
    from moesim.fabric.algorithms import Hierarchical, algorithm_of

    policy = algorithm_of(algorithm)
    if num_sms is None:
        return policy
    check(isinstance(policy, Hierarchical), "--num-sms", "", "goes with --algorithm hierarchical", algorithm)
    return Hierarchical(num_sms=num_sms)


def _matrices(sizes: Path, starts: Path | None) -> tuple[Any, Any]:
    """(bytes_RR, starts_RR or None) of a call's files."""
    from moesim.door import read_npy

    bytes_RR = read_npy(sizes, num_dimensions=2)
    square = bytes_RR.shape[0] == bytes_RR.shape[1]
    check(square, str(sizes), "shape", "must have as many rows as columns, one for each rank", bytes_RR.shape)
    check(0 < len(bytes_RR) <= MAX_RANKS, str(sizes), "shape", f"must be 1 to {MAX_RANKS} ranks", bytes_RR.shape)
    if starts is None:
        return bytes_RR, None
    starts_RR = read_npy(starts, num_dimensions=2, allow_nan=True)
    same = starts_RR.shape == bytes_RR.shape
    check(same, str(starts), "shape", f"must be that of the bytes, {bytes_RR.shape}", starts_RR.shape)
    return bytes_RR, starts_RR


def _slow(texts: list[str]) -> dict[int, float]:
    """Shares by rank of texts such as ``3=0.5``."""
    found: dict[int, float] = {}
    for text in texts:
        rank, equals, share = text.partition("=")
        try:
            whole, value = int(rank), float(share)
        except ValueError:
            equals, whole, value = "", 0, 0.0
        check(bool(equals), "--slow", "", "must be a rank and a share, such as 3=0.5", text)
        found[whole] = value
    return found


def _seconds(text: str) -> float:
    from moesim.units import parse_quantity

    try:
        return parse_quantity(text, "s")
    except ValueError as error:
        raise InputError("--latency-jitter", "", f"must be {error}", text) from None


def _provenance(cluster: Any, derates: dict[str, float]) -> list[dict[str, str]]:
    numbers = {
        "NVLink rate": cluster.nvlink_bytes_per_s,
        "NIC rate": cluster.nic_bytes_per_s,
        "latency inside a node": cluster.latency_intra_s,
        "latency between nodes": cluster.latency_inter_s,
        **{f"derate {name}": cluster.derates[name] for name in derates},
    }
    return [{"part": name, "kind": number.kind, "source": number.source} for name, number in numbers.items()]


def _tables(timed: TimedExchange, algorithm: str, num_ranks: int) -> list[Table]:
    from moesim.units import format_bytes, format_seconds

    done = timed.completed
    over = done.completion_s / timed.lower_bound_s - 1 if timed.lower_bound_s else 0.0
    rows = [
        ("Over after", format_seconds(done.completion_s)),
        ("No schedule can beat", f"{format_seconds(timed.lower_bound_s)} on the wire (this takes {over:.1%} longer)"),
        ("Busiest link", timed.bottleneck or "none"),
        ("Messages", f"{timed.num_messages:,}, {format_bytes(timed.total_bytes)} in all"),
        (
            "First and last rank done",
            " and ".join(format_seconds(s) for s in (done.finish_R.min(), done.finish_R.max())),
        ),
        ("Longest wait for the last rank", format_seconds(float(done.wait_R.max(initial=0.0)))),
    ]
    links = [(load.link, format_bytes(load.carried_bytes), format_seconds(load.busy_s)) for load in timed.busiest]
    title = f"{num_ranks} ranks, {algorithm}, {timed.fidelity}"
    return [
        fields_table(title, rows),
        Table(title="Busiest links", columns=("Link", "Carries", "Busy"), rows=links, right=("Carries", "Busy")),
    ]
