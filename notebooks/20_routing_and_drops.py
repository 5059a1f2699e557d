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
# # How uneven is the load, what does it drop, what does that cost?
#
# A router sends each token to a few experts, and some experts are more popular than others. The GPU that holds the
# popular ones keeps its group waiting and needs the most memory; or, where a capacity factor limits what an expert
# takes, tokens are dropped. This report routes one training step, counts what every expert got, and simulates what the
# skew costs.

# %% tags=["parameters"]
# Parameters: what is asked. Each name is a field of the scenario file, except the last six.
model: str = "qwen3-30b-a3b"  # a preset, a Hugging Face config.json, or a design YAML
cluster: str = "h100-8x-ib400"  # a preset, or a cluster YAML
num_gpus: int = 64
tp: int = 1  # GPUs that share each layer
pp: int = 2  # pipeline stages
vpp: int = 1  # pieces of the pipeline per GPU
cp: int = 1  # GPUs that share each sequence
ep: int = 16  # GPUs that share the experts
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
micro_batch: int = 2
global_batch: int = 512
precision: str = "bf16"  # bf16, fp8 (by blocks), fp8_tensor, mxfp8 or nvfp4
recompute: str = "none"  # none, full, or modules such as moe_act,layernorm
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
popularity: str = (
    "lognormal"  # how uneven the experts are: balanced, multinomial, lognormal, dirichlet, zipf, power_law
)
gini: float = 0.25  # of the load; real text: 0.10 to 0.38
recording = None  # type: str|None recorded routing (router replay, or a histogram) instead of popularity and gini
capacity_factor = 1.25  # type: float|None most an expert takes, over its mean load; None drops nothing
drop_policy: str = "probability"  # what a full expert keeps: probability, position, random, or reroute the rest
dispatcher: str = "alltoall"
policy: str = "contiguous"  # placement of the experts
num_slots = None  # type: int|None slots for experts and replicas; None: one for each expert
map = None  # type: str|None a placement of one's own, for policy: map
split: str = "even"  # which replica of an expert a sender takes: even, nearest, least_loaded or uneven
rank_speeds = None  # type: str|None slow GPUs, spelt as moesim simulate --help says
profile: str = "auto"  # where the speed of the arithmetic comes from: auto, datasheet, or a profile's path
fidelity: str = "port"
replicas: int = 4  # of a stage, simulated at most; more are estimated from these
seed: int = 0
wanted_drop: float = 0.01  # share of assignments that may be dropped
num_steps: int = 32  # steps drawn for the distribution of memory
training_steps: int = 10000  # of balancing over training; 0 leaves it out
learning_rate: float = 3e-4  # of that training
histogram_every: int = 1000  # steps of that training between two histograms of expert usage (written with out_dir)
out_dir: str = ""  # folder for results.json, results.csv and histogram.csv; "" writes none

# %%
from IPython.display import display

from moesim.report import load_figures, routing_figures, routing_sentences, routing_tables, tables
from moesim.report.parameters import read_question
from moesim.report.progress import working
from moesim.report.routing_export import write_routing
from moesim.study.routing import routing_study

question = read_question(globals())
scenario = question.scenario

# %%
with working() as say:
    study = routing_study(
        scenario,
        wanted_drop_fraction=wanted_drop,
        num_steps=num_steps,
        training_steps=training_steps,
        learning_rate=learning_rate,
        histogram_every=histogram_every,
        progress=say,
    )
routing_sentences.verdict(study)

# %% [markdown]
# ## What was asked

# %%
tables.question(scenario)

# %% [markdown]
# ## The load: every expert of every layer
#
# Counted after the router has drawn a whole step. A square is an expert with over three times the mean of its layer.

# %%
load_figures.load_map(study.load, study.load.layers)

# %%
load_figures.load_curve(study.load)

# %%
routing_sentences.about_load(study)

# %%
routing_tables.layers(study)

# %% [markdown]
# ## The busiest experts

# %%
routing_tables.crowded(study)

# %% [markdown]
# ## What was recorded

# %%
routing_sentences.about_recording(study)

# %% [markdown]
# ## Drops against the capacity factor and the skew
#
# A capacity factor limits what an expert takes, over its mean load. Less room drops tokens; more room, where buffers
# are padded to it, is reserved and stays empty.

# %%
routing_figures.drop_family(study)

# %%
routing_sentences.about_drops(study)

# %%
routing_tables.needed(study)

# %%
routing_sentences.about_needed(study)

# %% [markdown]
# ## Where tokens are lost

# %%
if study.load.drop_fraction:
    display(routing_figures.drops_where(study))

# %%
routing_sentences.about_where(study)

# %% [markdown]
# ## What skew costs in time and in memory
#
# The same step under other skews, once without a limit and once with the capacity factor asked. A limit makes a skewed
# step quicker because it leaves work undone.

# %%
routing_figures.cost_over_skew(study)

# %%
routing_sentences.about_skew(study)

# %%
routing_tables.over_skew(study)

# %% [markdown]
# ## What a capacity buys

# %%
routing_figures.cost_over_capacity(study)

# %%
routing_sentences.about_capacity(study)

# %% [markdown]
# ## Memory over many steps
#
# Routing differs from step to step: a little by chance, and more once other experts become the popular ones, which
# nobody knows beforehand.

# %%
routing_figures.memory_over_steps(study)

# %%
routing_sentences.about_memory(study)

# %% [markdown]
# ## Balance over training
#
# How the skew of this report would fare under four policies: no balancing, an auxiliary loss (weight 0.01), a bias on
# the router's scores that moves by 0.001 a step towards the mean load, and noise on the router's logits beside the
# auxiliary loss. Their dynamics are fitted on one published training run of a 1B model; on another they are a guess.

# %%
if study.balancing:
    display(routing_figures.balancing(study.balancing))

# %%
routing_sentences.about_balancing(study)

# %% [markdown]
# ## Where the numbers came from

# %%
tables.provenance(study.step)

# %% [markdown]
# ## What is not modelled

# %%
tables.not_modelled(study.step)

# %% [markdown]
# ## Words used here
#
# - **Assignment**: one token sent to one expert. A token that uses k experts makes k assignments in every MoE layer.
# - **Gini coefficient**: 0 when all experts get the same load, towards 1 when one gets everything.
# - **Entropy**: how evenly the load is spread, as a share of the largest possible; 100% is even.
# - **MaxVio**: the busiest expert's load over the mean, less 1.
# - **Capacity factor**: the places an expert has for each source GPU's tokens, over its mean load from them. What does
#   not fit is dropped: the token goes on without that expert.
# - **Padding**: filling every expert's buffer up to its capacity, so that all products have the same shape.
# - **P99**: what 99 of 100 steps stay under.
# - **Expert-parallel size (ep)**: how many GPUs share one set of experts.
# - **GiB**: 2 to the power of 30 bytes.

# %%
written = write_routing(study, out_dir)

# %%
load = study.load
assert all(abs(shares.sum() - 1) < 1e-6 for shares in load.load_LE), "each layer's loads sum to one"
assert load.kept_LE.sum() <= load.assigned_LE.sum() * (1 + 1e-6), "no more is kept than was sent"
assert scenario.routing.capacity_factor or load.drop_fraction == 0, "nothing is dropped without a capacity factor"
assert study.needed.drop_fraction <= max(wanted_drop, 2e-6), "the needed capacity drops no more than was wanted"
assert study.over_capacity[-1].drop_fraction == 0, "the last capacity has no limit"
assert all(memory.p99_bytes >= memory.p50_bytes for memory in study.memory), "P99 is not below the median"
