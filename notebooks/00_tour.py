# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A tour: what moesim answers
#
# moesim plans clusters for mixture-of-experts (MoE) models: models in which each token uses a few of many *experts*,
# spread over GPUs that exchange tokens all the time. Give it a model, a cluster and a way to cut the one over the
# other; it simulates a training step and tells what to expect. This page takes one such plan and asks seven questions,
# one sentence each; every section names the notebook that goes deeper.

# %% tags=["parameters"]
# Parameters: what is asked. Each name is a field of the scenario file, except those from tokens_to_train on.
model: str = "qwen3-30b-a3b"  # a preset, a Hugging Face config.json, or a design YAML
cluster: str = "h100-8x-ib400"  # a preset, or a cluster YAML
num_gpus: int = 64
tp: int = 1  # GPUs that share each layer
pp: int = 2  # pipeline stages
vpp: int = 1  # pieces of the pipeline per GPU
cp: int = 1  # GPUs that share each sequence
ep: int = 32  # GPUs that share the experts
etp: int = 1  # GPUs that share each expert
zero: int = 1  # ZeRO stage: what replicas share out
fsdp: bool = False  # ZeRO 3, or 2, layer by layer as FSDP2
replicate: int = 1  # groups of replicas that each hold all shards
cp_kind: str = "ring"  # how the GPUs of a sequence reach each other's keys and values
layout = None  # type: str|None what each virtual stage holds; None shares the layers out
num_first_stage_layers = None  # type: int|None of the first pipeline rank; the others share the rest
num_last_stage_layers = None  # type: int|None
embedding_as_layer: bool = False  # takes a layer's place on its stage
loss_as_layer: bool = False
seq_len: int = 4096
micro_batch: int = 1
global_batch: int = 512
precision: str = "bf16"  # bf16, fp8 (by blocks), fp8_tensor, mxfp8 or nvfp4
recompute: str = "full"  # none or full
schedule: str = "1f1b"  # 1f1b, gpipe, zb-h1 or dualpipe
overlap: str = "none"  # none, or what runs beside computing, such as grad_reduce,tensor_parallel
cuda_graphs: str = "none"  # none, full, or modules whose operations the host issues as one
software: str = "megatron"  # whose losses beside the kernels: megatron, deepseek, or kernels (none: a bound)
offload: str = "none"  # optimizer, activations, or both as optimizer,activations
gradients: str = "fp32"  # fp32 or bf16
main_weights: str = "fp32"  # fp32, remainder, bf16 or none
moments: str = "fp32"  # fp32, bf16 or fp8
weights: str = "bf16"  # bf16, or narrow where the products are
average: str = "none"  # none, gpu or host; a moving average of the weights
attention_output: str = "bf16"  # bf16, e5m6 or fp8; as it is kept
activation_input: str = "bf16"  # bf16 or fp8; as it is kept
documents = None  # type: str|None packed into sequences; a histogram file, or a median length in tokens
fused_loss: bool = False
mtp: bool = False  # train the multi-token-prediction layers too
popularity: str = "lognormal"  # how uneven the experts are
gini: float = 0.25  # of a lognormal popularity; real text: 0.10 to 0.38
recording = None  # type: str|None recorded routing (router replay, or a histogram) instead of popularity and gini
capacity_factor = None  # type: float|None most an expert takes, over its mean load; None drops nothing
drop_policy: str = "probability"  # what a full expert keeps: probability, position, random, or reroute the rest
dispatcher: str = "alltoall"  # deepep sends a token once to each node instead of once for each expert
policy: str = "contiguous"  # the placement of today, which the others are compared with
num_slots = None  # type: int|None expert slots of a group, for today and for all policies; None: one for each expert
map = None  # type: str|None a JSON file of today's placement, where policy is map
split: str = "even"  # which replica of an expert a sender takes: even, nearest, least_loaded or uneven
rank_speeds = None  # type: str|None slow GPUs, spelt as moesim simulate --help says
profile: str = "auto"  # where the speed of the arithmetic comes from: auto, datasheet, or a profile's path
fidelity: str = "port"
replicas: int = 4  # of a stage, simulated at most; more are estimated from these
seed: int = 0
tokens_to_train: float = 1e12
price_per_gpu_hour = None  # type: float|None your price; None prices nothing
out_dir: str = ""  # folder for results.json and results.csv; "" writes none

# %%
from IPython.display import display

from moesim.report import alltoall_figures, figures, goodput_figures, load_figures, tour
from moesim.report.parameters import read_question
from moesim.report.progress import working

question = read_question(globals())
scenario = question.scenario

# %%
with working("Tour") as say:
    found = tour.take_tour(scenario, question.own["tokens_to_train"], question.own["price_per_gpu_hour"], progress=say)
tour.first_page(found)

# %% [markdown]
# ## How fast is a step?
#
# One update of the weights, part by part. Deeper: [10_planning_report](10_planning_report.ipynb), and what a design's
# choices cost: [25_dense_vs_moe](25_dense_vs_moe.ipynb).

# %%
display(figures.step_time(found.step))
tour.about_step(found)

# %% [markdown]
# ## Does it fit?
#
# Memory of the fullest GPU of each pipeline stage. Deeper: [12_memory](12_memory.ipynb).

# %%
display(figures.memory_by_stage(found.step))
tour.about_memory(found)

# %% [markdown]
# ## How uneven is the routing?
#
# Some experts are more popular than others. Deeper: [20_routing_and_drops](20_routing_and_drops.ipynb).

# %%
display(load_figures.load_curve(found.step))
tour.about_routing(found)

# %% [markdown]
# ## Where does an all-to-all's time go?
#
# Twice in each MoE layer, GPUs send tokens to the GPUs that hold their experts. The fullest port sets the pace. Deeper:
# [35_all_to_all](35_all_to_all.ipynb).

# %%
display(alltoall_figures.ports(found.exchange))
tour.about_exchange(found)

# %% [markdown]
# ## What would better placement gain?
#
# Popular experts apart from each other, so that no GPU is late. Deeper:
# [30_expert_placement](30_expert_placement.ipynb).

# %%
tour.about_placement(found)

# %% [markdown]
# ## How long, and for how much?
#
# Machines fail, and a run goes back to its last checkpoint. Deeper:
# [45_goodput_and_cost](45_goodput_and_cost.ipynb).

# %%
display(goodput_figures.progress(found.run))
tour.about_run(found)

# %% [markdown]
# ## How sure is this?
#
# Predictions were scored on measured runs: `docs/accuracy.md`, `moesim accuracy`. Which speeds were measured and
# which assumed: [15_calibration](15_calibration.ipynb).

# %%
tour.how_sure(found)

# %%
written = tour.write_tour(found, out_dir)

# %%
assert found.step.fits == (found.step.headroom_bytes >= 0)
assert found.run.days.p10 <= found.run.days.p50 <= found.run.days.p90
