"""``moesim models``, ``gpus``, ``clusters`` and ``describe``: what the catalog holds, and what a model counts."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from moesim.cli.app import app, examples
from moesim.cli.call import Call, verb
from moesim.cli.output import Answer, Table, fields_table


@app.command(epilog=examples("moesim models", "moesim models --json"))
@verb()
def models(_: Call) -> Answer:
    """List the model presets with their sizes."""
    from moesim.catalog.models import MODEL_NAMES, load_model
    from moesim.describe.counts import describe as describe_model
    from moesim.units import format_count

    found, rows = [], []
    for name in MODEL_NAMES:
        model = load_model(name)
        counted = describe_model(model, 4096)
        experts = "dense"
        if model.is_moe:
            moe: Any = model.layers[model.moe_layers[0]].ffn
            experts = f"{moe.num_experts} top-{moe.router.top_k}" + (" + shared" if moe.shared else "")
        found.append(
            {
                "name": name,
                "total_parameters": counted.total_parameters,
                "active_parameters": counted.active_parameters,
                "active_parameters_no_input_embedding": counted.active_parameters_no_input_embedding,
                "active_parameters_published": counted.active_parameters_published,
                "num_layers": len(model.layers),
                "num_moe_layers": len(model.moe_layers),
                "experts": experts,
                "hypothetical": model.hypothetical,
                "source": model.source,
            }
        )
        label = name + (" *" if model.hypothetical else "")
        rows.append(
            (
                label,
                format_count(counted.total_parameters),
                format_count(counted.active_parameters_published),
                str(len(model.layers)),
                experts,
            )
        )
    table = Table(
        title="Models",
        columns=("Name", "Parameters", "Active", "Layers", "Experts"),
        rows=rows,
        right=("Parameters", "Active", "Layers"),
        note="Active follows each publisher's convention (with or without the input embedding). * hypothetical design.",
    )
    return Answer(inputs={}, result={"models": found}, tables=[table])


@app.command(epilog=examples("moesim gpus", "moesim gpus --json"))
@verb()
def gpus(_: Call) -> Answer:
    """List the GPUs: memory, peaks, links. Every number's source stands in --json."""
    from moesim.catalog.hardware import GPU_NAMES, load_gpu
    from moesim.units import GIB, GIGA, TERA

    known = [load_gpu(name) for name in GPU_NAMES]
    rows = [
        (
            gpu.name,
            f"{gpu.memory_bytes.value / GIB:.0f}",
            f"{gpu.memory_bytes_per_s.value / TERA:.2f}",
            f"{gpu.peak_flops_per_s['bf16'].value / TERA:,.0f}",
            f"{gpu.peak_flops_per_s['fp8'].value / TERA:,.0f}" if "fp8" in gpu.peak_flops_per_s else "-",
            f"{gpu.nvlink_bytes_per_s.value / GIGA:.0f}",
            f"{gpu.tdp_w.value:.0f}",
        )
        for gpu in known
    ]
    columns = ("Name", "GiB", "TB/s", "bf16 TFLOP/s", "fp8 TFLOP/s", "NVLink GB/s", "TDP W")
    note = "Dense peaks (no sparsity); NVLink per GPU and direction."
    table = Table(title="GPUs", columns=columns, rows=rows, right=columns[1:], note=note)
    return Answer(inputs={}, result={"gpus": known}, tables=[table])


@app.command(epilog=examples("moesim clusters", "moesim clusters --json"))
@verb()
def clusters(_: Call) -> Answer:
    """List the clusters: GPUs, NVLink domain, NIC. Every number's source stands in --json."""
    from moesim.catalog.hardware import CLUSTER_NAMES, load_cluster
    from moesim.units import GIGA, MICRO

    known = [load_cluster(name) for name in CLUSTER_NAMES]
    rows = [
        (
            cluster.name,
            cluster.gpu.name,
            f"{cluster.num_gpus:,}",
            str(cluster.ranks_per_node),
            f"{cluster.nvlink_bytes_per_s.value / GIGA:.0f}",
            f"{cluster.nic_bytes_per_s.value / GIGA:.0f}",
            f"{cluster.latency_inter_s.value / MICRO:.1f}",
        )
        for cluster in known
    ]
    columns = ("Name", "GPU", "GPUs", "Domain", "NVLink GB/s", "NIC GB/s", "Latency us")
    note = "GPUs: the default (--num-gpus). Domain: GPUs joined by NVLink. Links per GPU and direction."
    table = Table(title="Clusters", columns=columns, rows=rows, right=columns[2:], note=note)
    return Answer(inputs={}, result={"clusters": known}, tables=[table])


@app.command(epilog=examples("moesim describe mixtral-8x7b", "moesim describe my-design.yaml --seq-len 8192 --json"))
@verb()
def describe(
    _: Call,
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Preset, Hugging Face config.json, or design YAML.", show_default=False),
    ],
    seq_len: Annotated[
        int, typer.Option(metavar="TOKENS", help="Sequence length of the attention's FLOPs.", min=1)
    ] = 4096,
) -> Answer:
    """Count a model's parameters, FLOPs per token and weight bytes, part by part."""
    from moesim.catalog.models import load_model
    from moesim.describe.counts import describe as describe_model
    from moesim.units import format_bytes, format_count

    described = load_model(model)
    counted = describe_model(described, seq_len)
    headline = [
        ("Parameters", f"{counted.total_parameters:,} ({format_count(counted.total_parameters)})"),
        ("Active per token", f"{counted.active_parameters:,} ({format_count(counted.active_parameters)})"),
        ("Active, no input embedding", format_count(counted.active_parameters_no_input_embedding)),
        ("Forward FLOPs per token", f"{format_count(counted.flops_per_token_forward)} at {seq_len:,} tokens"),
        ("Weights in bf16", format_bytes(counted.weight_bytes)),
    ]
    columns = ("Part", "Parameters", "Active", "Forward FLOPs/token", "Weights")
    parts = Table(title="By part", columns=columns, rows=counted.rows(), right=columns[1:])
    title = described.name + (" (hypothetical)" if described.hypothetical else "")
    return Answer(
        inputs={"model": model, "seq_len": seq_len},
        result=counted.to_dict(),
        tables=[fields_table(title, headline), parts],
        provenance=[{"part": "model", "kind": "spec", "source": described.source}],
        warnings=described.notes,
    )
