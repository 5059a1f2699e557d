"""Training of the small transformer: a loop that any moment may kill, with its metrics as CSV.

Every draw of step s is a function of the seed and s, so a step can be repeated. A checkpoint holds the weights, the
optimizer and how long the files were: what a killed run wrote after it is cut off and written again, the same.

    python -m reference_model.train --folder out/run --steps 200

leaves in the folder: metrics.csv (a row every log_every steps), heldout.csv (every evaluate_every), histogram.csv
[step, layer, expert, tokens] (tokens of the last histogram_every steps that chose each expert; ``moesim route
--recorded`` reads it), routing-STEP.npz (held-out tokens' experts), run.json (what ran, where), checkpoint.pt.

Legend: B sequences, S tokens of a sequence, T tokens, E experts, H hidden, K experts per token.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from reference_model.capacity import expert_counts
from reference_model.devices import find_device
from reference_model.layer import LayerResult, MoeLayer
from reference_model.losses import BALANCE_WEIGHT, Z_WEIGHT, balance_loss, router_z_loss, token_loss, update_bias_
from reference_model.recorder import RoutingRecorder
from reference_model.routers import SoftmaxTopK
from reference_model.runs import RUN, TABLES, append_rows, cut_tables, table_sizes, write_atomically
from reference_model.text import DOMAINS, VOCAB, Batch, Corpus, build_corpus, heldout_batch, train_batch
from reference_model.transformer import (
    MoeConfig,
    Transformer,
    TransformerConfig,
    active_parameters,
    build,
    equal_flops_width,
    forward_flops_per_token,
    parameters_by_part,
)

Precision = Literal["float32", "bfloat16", "float16"]

CHECKPOINT = "checkpoint.pt"
_NOISE_STREAM = 3


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run but for its seed. Weights are multiplied into the loss; 0 leaves a term out.

    precision: of the products, under autocast, with float32 weights and optimizer; loss_scale: for float16 gradients.
    bias_rate: of loss-free balancing, for routers with a bias. balance_weight counts per layer, 1 when even.
    routing_every: steps between recordings of held-out tokens' experts; 0 for none.
    """

    model: TransformerConfig
    num_steps: int
    num_sequences: int = 9
    seq_len: int = 128
    learning_rate: float = 1e-2
    warmup_steps: int = 50
    last_rate_fraction: float = 0.1
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    balance_weight: float = 0.0
    z_weight: float = 0.0
    bias_rate: float = 0.0
    precision: Precision = "float32"
    loss_scale: float = 1.0
    log_every: int = 10
    evaluate_every: int = 100
    histogram_every: int = 20
    routing_every: int = 0
    checkpoint_every: int = 1
    heldout_per_domain: int = 32

    def written(self) -> dict[str, Any]:
        """As a run's folder has it: plain values, an attention that is not latent left out, as in runs from before."""
        values = asdict(self)
        if self.model.latent is None:
            del values["model"]["latent"]
        return values

    def rate(self, step: int) -> float:
        """The learning rate: a linear warm-up, then half a cosine down to last_rate_fraction of the peak."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        done = max(0.0, step - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps)
        low = self.last_rate_fraction
        return self.learning_rate * warm * (low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * done)))


@dataclass(kw_only=True)
class _State:
    """All that a checkpoint holds: step counts finished steps, counts_LE tokens since the last histogram."""

    model: Transformer
    optimizer: torch.optim.Optimizer
    step: int
    counts_LE: Tensor  # on the host
    wall_s: float

    @property
    def device(self) -> torch.device:
        return self.model.head.weight.device


def train(
    config: TrainConfig,
    folder: Path | str,
    *,
    seed: int = 0,
    device: str = "cpu",
    corpus: Corpus | None = None,
    stop_after: int | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Path:
    """Train, or go on where a killed run stopped; returns the folder.

    stop_after: finished steps after which to stop for now; progress: called with each finished step and its loss.
    device: auto, cpu or cuda; a run may go on on another one, with other roundings. Raises ValueError where the folder
    holds another run (another configuration, seed or text), and for a device that is not there.

    >>> train(small_config(num_steps=2), "out/run")  # doctest: +SKIP
    """
    place = find_device(device)
    target, text = Path(folder), corpus or build_corpus()
    target.mkdir(parents=True, exist_ok=True)
    asked = {"config": config.written(), "seed": seed, "text": text.fingerprint}
    state = _start_or_resume(config, seed, target, asked, place)
    heldout = heldout_batch(text, sequences_per_domain=config.heldout_per_domain, seq_len=config.seq_len)
    last = min(config.num_steps, stop_after or config.num_steps)
    started = time.perf_counter() - state.wall_s
    if state.step == 0:
        _evaluate(state, config, target, heldout)
    while state.step < last:
        batch = train_batch(
            text, seed=seed, step=state.step, num_sequences=config.num_sequences, seq_len=config.seq_len
        )
        loss = _one_step(state, config, target, batch, seed)
        if state.step % config.evaluate_every == 0 or state.step == config.num_steps:
            _evaluate(state, config, target, heldout)
        if state.step % config.checkpoint_every == 0 or state.step == last:
            state.wall_s = time.perf_counter() - started
            _save(state, target, asked)
        if progress is not None:
            progress(state.step, loss)
    write_atomically(target / RUN, json.dumps(_facts(state, config, asked), indent=1).encode() + b"\n")
    return target


def _one_step(state: _State, config: TrainConfig, folder: Path, batch: Batch, seed: int) -> float:
    """Forward, losses, backward, update, and what the step leaves in the tables; returns the loss [nats per token]."""
    model, step = state.model, state.step
    tokens_BS = torch.from_numpy(batch.tokens_BS).to(state.device)
    model.train()
    with _draws_of_step(seed, step), _autocast(config, state.device):
        result = model(tokens_BS[:, :-1])
    nats_BS = _nats(result.logits_BSV, tokens_BS)
    loss = nats_BS.mean()
    layers = list(result.moe.values())
    balance = sum((balance_loss(layer.choice, per_choice=True) for layer in layers), loss.new_zeros(()))
    z = sum((router_z_loss(layer.logits_TE) for layer in layers), loss.new_zeros(()))
    total = loss + config.balance_weight * balance + config.z_weight * z

    rate = config.rate(step)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.zero_grad()
    (total * config.loss_scale).backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad /= config.loss_scale
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
    is_finite = bool(torch.isfinite(total) & torch.isfinite(norm))
    if is_finite:  # else the update is skipped, as a gradient scaler would
        state.optimizer.step()

    counts_LE = _counts(model, layers)
    state.counts_LE += counts_LE
    for layer, counts_E in zip(model.moe_layers().values(), counts_LE, strict=True):
        if config.bias_rate and layer.router_bias is not None:
            update_bias_(layer.router_bias, counts_E.to(state.device), rate=config.bias_rate)
    state.step += 1
    if state.step % config.log_every == 0 or state.step == 1 or not is_finite:
        row = {
            "step": state.step,
            "learning_rate": rate,
            "gradient_norm": float(norm),
            "overflowed": int(not is_finite),
        }
        row |= {"loss": loss.item()} | _by_domain(nats_BS, batch)
        row |= {"balance_loss": balance.item(), "z_loss": z.item()}
        row |= _layer_metrics(model, layers, counts_LE)
        append_rows(folder / "metrics.csv", [row])
    if state.step % config.histogram_every == 0 and len(counts_LE):
        append_rows(folder / "histogram.csv", _histogram_rows(state))
        state.counts_LE.zero_()
    return loss.item()


def _nats(logits_BSV: Tensor, tokens_BS: Tensor) -> Tensor:
    """Cross entropy of each next token [nats], in float32: (B, S)."""
    targets_BS = tokens_BS[:, 1:]
    return token_loss(logits_BSV.flatten(0, 1), targets_BS.flatten()).view_as(targets_BS)


def _by_domain(nats_BS: Tensor, batch: Batch) -> dict[str, float]:
    """Mean loss of each domain's sequences; NaN where the batch has none."""
    mean_B = nats_BS.detach().mean(dim=1).cpu().numpy()
    chosen = {name: mean_B[batch.domain_B == i] for i, name in enumerate(DOMAINS)}
    return {f"loss_{name}": float(losses.mean()) if losses.size else math.nan for name, losses in chosen.items()}


def _counts(model: Transformer, layers: Sequence[LayerResult]) -> Tensor:
    """Tokens that chose each expert, before drops: (L, E), on the host."""
    num_experts = model.config.moe.num_experts if model.config.moe else 0
    rows = [expert_counts(layer.choice.experts_TK, num_experts).cpu() for layer in layers]
    return torch.stack(rows) if rows else torch.zeros(0, num_experts, dtype=torch.int64)


def _layer_metrics(model: Transformer, layers: Sequence[LayerResult], counts_LE: Tensor) -> dict[str, float]:
    """MaxVio, dropped share of the chosen copies, largest absolute logit of each MoE layer, under its number."""
    row: dict[str, float] = {}
    for number, layer, counts_E in zip(model.config.moe_layers, layers, counts_LE.double(), strict=True):
        row[f"max_vio_{number}"] = float(counts_E.max() / counts_E.mean() - 1.0)
        row[f"dropped_{number}"] = 1.0 - float(layer.plan.load_E.sum() / counts_E.sum())
        row[f"largest_logit_{number}"] = float(layer.logits_TE.detach().abs().max())
    return row


def _histogram_rows(state: _State) -> list[dict[str, float]]:
    return [
        {"step": state.step, "layer": number, "expert": expert, "tokens": tokens}
        for number, counts_E in zip(state.model.config.moe_layers, state.counts_LE.tolist(), strict=True)
        for expert, tokens in enumerate(counts_E)
    ]


@torch.no_grad()
def _evaluate(state: _State, config: TrainConfig, folder: Path, heldout: Batch) -> None:
    """Held-out loss by domain, and how many tokens' experts the router's precision flips, as a row of heldout.csv."""
    model, tokens_BS = state.model, torch.from_numpy(heldout.tokens_BS).to(state.device)
    model.eval()
    with _inputs_of(model.moe_layers()) as inputs, _autocast(config, state.device):
        result = model(tokens_BS[:, :-1])
    nats_BS = _nats(result.logits_BSV, tokens_BS)
    row: dict[str, float] = {"step": state.step, "loss": nats_BS.mean().item()} | _by_domain(nats_BS, heldout)
    for number, layer in model.moe_layers().items():
        logits_TE = result.moe[number].logits_TE
        row[f"flipped_{number}"] = flipped_share(inputs[number], layer.router_weight, logits_TE, layer.router.top_k)
    append_rows(folder / "heldout.csv", [row])
    if config.routing_every and state.step % config.routing_every == 0:
        _record_routing(model, {i: result.moe[i].choice.experts_TK for i in result.moe}, folder, state.step)


def flipped_share(x_TH: Tensor, weight_EH: Tensor, logits_TE: Tensor, top_k: int) -> float:
    """Share of tokens whose top_k set by these logits is not that of the same product in float64.

    >>> x, weight = torch.tensor([[1.0]]), torch.tensor([[1.0], [2.0]])
    >>> flipped_share(x, weight, torch.tensor([[1.0, 2.0]]), 1), flipped_share(x, weight, torch.tensor([[2.0, 1.0]]), 1)
    (0.0, 1.0)
    """
    exact_TK = functional.linear(x_TH.double(), weight_EH.double()).topk(top_k, dim=-1).indices.sort(dim=-1).values
    chosen_TK = logits_TE.topk(top_k, dim=-1).indices.sort(dim=-1).values
    return float((exact_TK != chosen_TK).any(dim=-1).double().mean())


@contextlib.contextmanager
def _inputs_of(layers: dict[int, MoeLayer]) -> Iterator[dict[int, Tensor]]:
    """What goes into each layer while the block lasts."""
    inputs: dict[int, Tensor] = {}

    def keep(number: int) -> Callable[..., None]:
        def note(_module: Any, args: tuple[Tensor, ...]) -> None:
            inputs[number] = args[0]

        return note

    handles = [layer.register_forward_pre_hook(keep(number)) for number, layer in layers.items()]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def _record_routing(model: Transformer, experts: dict[int, Tensor], folder: Path, step: int) -> None:
    """A part of the held-out tokens' experts, as many of each domain, in the order of the domains."""
    moe = model.config.moe
    assert moe is not None, "routing_every is for models with MoE layers"
    recorder = RoutingRecorder(layers=tuple(experts), num_experts=moe.num_experts, top_k=moe.router.top_k)
    for number, experts_TK in experts.items():
        recorder.note(number, experts_TK.unflatten(0, (len(DOMAINS), -1))[:, :RECORDED_TOKENS].flatten(0, 1))
    recorder.end_step()
    recorder.write(folder / f"routing-{step:05d}.npz")


RECORDED_TOKENS = 512  # of each domain


@contextlib.contextmanager
def _draws_of_step(seed: int, step: int) -> Iterator[None]:
    """Random routers draw from torch's default generator: here it is a function of seed and step."""
    with torch.random.fork_rng():
        torch.manual_seed(int(np.random.SeedSequence([seed, _NOISE_STREAM, step]).generate_state(1)[0]))
        yield


def _autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    dtype = getattr(torch, config.precision)
    return torch.autocast(
        device.type, dtype=torch.bfloat16 if dtype == torch.float32 else dtype, enabled=dtype != torch.float32
    )


def _start_or_resume(
    config: TrainConfig, seed: int, folder: Path, asked: dict[str, Any], device: torch.device
) -> _State:
    model = build(config.model, seed=seed).to(device)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True
    )
    state = _State(model=model, optimizer=optimizer, step=0, counts_LE=_counts(model, ()), wall_s=0.0)
    if config.model.moe is not None:
        state.counts_LE = torch.zeros(len(config.model.moe_layers), config.model.moe.num_experts, dtype=torch.int64)
    sizes = dict.fromkeys(TABLES, 0)
    if (folder / CHECKPOINT).exists():
        saved = torch.load(folder / CHECKPOINT, weights_only=True, map_location="cpu")
        kept, wanted = json.loads(saved["asked"]), json.loads(json.dumps(asked))
        differing = [name for name in wanted if kept.get(name) != wanted[name]]
        if differing:
            raise ValueError(f"{folder} holds another run: its {' and '.join(differing)} differ; take another folder")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        state.step, state.counts_LE, state.wall_s = saved["step"], saved["counts_LE"], saved["wall_s"]
        sizes = saved["sizes"]
    cut_tables(folder, sizes)
    return state


def _save(state: _State, folder: Path, asked: dict[str, Any]) -> None:
    content = io.BytesIO()
    saved = {
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "step": state.step,
        "counts_LE": state.counts_LE,
        "wall_s": state.wall_s,
        "sizes": table_sizes(folder),
        "asked": json.dumps(asked),
    }
    torch.save(saved, content)
    write_atomically(folder / CHECKPOINT, content.getvalue())


def _facts(state: _State, config: TrainConfig, asked: dict[str, Any]) -> dict[str, Any]:
    """What ran and where, for run.json."""
    return asked | {
        "steps_done": state.step,
        "parameters_by_part": parameters_by_part(state.model),
        "active_parameters": active_parameters(config.model),
        "forward_flops_per_token": forward_flops_per_token(config.model, config.seq_len),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": torch.cuda.get_device_name(state.device)
        if state.device.type == "cuda"
        else f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "wall_s": round(state.wall_s, 1),
    }


def small_config(*, num_steps: int, dense: bool = False, **changes: Any) -> TrainConfig:
    """The small model of the experiments: 4 layers, 2 of them with 24 experts of which a token takes 2.

    dense: without experts, every layer's width such that a token costs exactly as many FLOPs.
    """
    moe = MoeConfig(num_experts=24, width=64, router=SoftmaxTopK(top_k=2))
    model = TransformerConfig(
        hidden=32,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        dense_width=equal_flops_width(moe),
        vocab=VOCAB,
        moe=None if dense else moe,
    )
    values: dict[str, Any] = {"model": model, "num_steps": num_steps}
    if not dense:
        values |= {"balance_weight": BALANCE_WEIGHT, "z_weight": Z_WEIGHT}
    return TrainConfig(**(values | changes))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: trains the small model, or goes on with a run that was killed."""
    parser = argparse.ArgumentParser(prog="python -m reference_model.train", description=main.__doc__)
    parser.add_argument("--folder", required=True, help="where the run is written, and resumed from")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dense", action="store_true", help="no experts, as many FLOPs per token")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--checkpoint-every", type=int, default=1, metavar="STEPS", help="1 loses at most one step")
    asked = parser.parse_args(arguments)
    config = small_config(
        num_steps=asked.steps, dense=asked.dense, precision=asked.precision, checkpoint_every=asked.checkpoint_every
    )
    print(train(config, asked.folder, seed=asked.seed, device=asked.device, progress=_print_progress))


def _print_progress(step: int, loss: float) -> None:
    if step % 50 == 0 or step == 1:
        print(f"step {step:5d}  loss {loss:.3f} nats per byte", flush=True)


if __name__ == "__main__":
    main()
