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
# # How many GPUs, of which kind?
#
# One model, one run of so many tokens, on several kinds of GPU and several numbers of them: how long it takes, what it
# costs, whether it fits, and what binds. Each step is simulated; how far it may be off comes with it as a range.

# %% tags=["parameters"]
# Parameters: what is asked. Each name is a field of the scenario file, except those from tokens_to_train on.
model: str = "deepseek-v3"  # a preset, a Hugging Face config.json, or a design YAML
cluster: str = "h800-8x-ib400"  # a preset, or a cluster YAML
num_gpus: int = 2048
tp: int = 1  # GPUs that share each layer
pp: int = 16  # pipeline stages
vpp: int = 1  # pieces of the pipeline per GPU
cp: int = 1  # GPUs that share each sequence
ep: int = 64  # GPUs that share the experts
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
global_batch: int = 15360
precision: str = "fp8"  # bf16, fp8 (by blocks), fp8_tensor, mxfp8 or nvfp4
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
tokens_to_train: float = 14.8e12
clusters: str = ""  # kinds besides the scenario's, such as h200-8x-ib400,b200-8x-ib400; "" takes those two, "none" none
sizes: str = ""  # numbers of GPUs, such as 512,1024; "" takes half, once and twice the scenario's
prices: str = ""  # yours, of a GPU for an hour, such as h800:1.5..2,b200:4
currency: str = "USD"
deadline_days = None  # type: float|None when the run must be over, in nine of ten draws
gini_is_known: bool = False  # False: the skew lies anywhere from 0.10 to 0.38, as on real text
out_dir: str = ""  # folder for results.json and results.csv; "" writes none

# %%
from moesim.report import sizing_figures, sizing_sentences, tables
from moesim.report.parameters import read_question
from moesim.report.progress import working
from moesim.report.sizing_export import read_kinds, write_sizing
from moesim.study.goodput import RunPlan
from moesim.study.sizing import sizing_study

question = read_question(globals())
scenario = question.scenario
kinds = read_kinds(question.own)
run = RunPlan(tokens=tokens_to_train, currency=currency)

# %%
with working("Sizing") as say:
    study = sizing_study(
        scenario,
        run,
        clusters=kinds.clusters,
        sizes=kinds.sizes,
        prices=kinds.prices,
        deadline_days=deadline_days,
        gini_is_known=gini_is_known,
        progress=say,
    )
sizing_sentences.verdict(study)

# %% [markdown]
# ## What was asked

# %%
tables.question(scenario)

# %% [markdown]
# ## Days
#
# Each point is one kind of GPU and one number of them; its bar runs from P10 to P90. Twice the GPUs would halve the
# days if nothing were lost.

# %%
sizing_figures.days(study)

# %%
sizing_sentences.how_long(study)

# %% [markdown]
# ## What it takes
#
# GPU-hours, or money where all kinds are priced. More GPUs are done sooner, but each of them does less.

# %%
sizing_figures.spent(study)

# %%
sizing_sentences.what_it_takes(study)

# %% [markdown]
# ## What binds at each size

# %%
sizing_figures.shares(study)

# %%
sizing_sentences.what_binds(study)

# %% [markdown]
# ## Memory

# %%
sizing_figures.memory(study)

# %%
sizing_sentences.what_fits(study)

# %% [markdown]
# ## All numbers

# %%
sizing_figures.table(study)

# %% [markdown]
# ## Words used here
#
# - **P10, P90**: one draw of ten is below, one of ten above. Drawn are how far moesim was off on measured steps, the
#   skew of the experts' load, the rate of NICs, and how often machines fail.
# - **GPU-hours**: GPUs times hours, lost time included, spare servers not.
# - **Bubble**: a stage of the pipeline has nothing to do yet, or nothing more.

# %%
written = write_sizing(study, out_dir)

# %%
assert study.points, "something was asked for"
assert all(p.days is None or p.days.p10 <= p.days.p50 <= p.days.p90 for p in study.points)
assert study.cheapest is None or study.cheapest.fits, "nothing is chosen that does not fit"
