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
# # How long does the run take, and what does it cost?
#
# A step is seconds; a run is weeks, and machines fail. This report trains a model to a number of tokens many times
# over: each run draws its step time, its failures and their kinds; it saves, is thrown back, waits for a spare server,
# restarts, and at last is done. Days, money and energy come with their ranges.

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
fleet: str = "unknown"  # whose machines fail alike: unknown, rsc-1-a100, meta-32k-h100 or llama-3-16k-h100
inspected: bool = False  # machines are watched, so that failures are known within a minute or so
num_spares = None  # type: int|None servers of 8 in reserve; None: one of a hundred
checkpoint_interval_min = None  # type: float|None of training between checkpoints; None: the best
checkpoint_gb_per_s = None  # type: float|None what storage takes from the whole job; None: 57, as published once
checkpoint_async: bool = True  # training stands still only while its state is copied to host memory
ramp_tokens: float = 0.0  # over which the batch grows
ramp_batch = None  # type: int|None sequences of the first steps of that ramp
price_per_gpu_hour = None  # type: float|None your price; None prices nothing
currency: str = "USD"
pue: float = 1.25  # what the building draws over what its machines draw
num_runs: int = 32  # that ranges are over
out_dir: str = ""  # folder for results.json and results.csv; "" writes none

# %%
from moesim.catalog.failures import sources
from moesim.report import goodput_figures, goodput_sentences, tables
from moesim.report.goodput_export import plan_of, write_goodput
from moesim.report.parameters import read_question
from moesim.report.progress import working
from moesim.study.goodput import goodput_study

question = read_question(globals())
scenario = question.scenario
plan = plan_of(question.own)

# %%
with working("Training") as say:
    study = goodput_study(scenario, plan, say)
goodput_sentences.verdict(study)

# %% [markdown]
# ## What was asked

# %%
tables.question(scenario)

# %% [markdown]
# ## How runs advance
#
# Each line is one run: it climbs while it trains and falls back to its last checkpoint where it fails. Lines fan out
# because step times are uncertain, too.

# %%
goodput_figures.progress(study)

# %%
goodput_sentences.how_long(study)

# %% [markdown]
# ## Where time is lost

# %%
goodput_figures.lost_time(study)

# %%
goodput_sentences.about_losses(study)

# %% [markdown]
# ## How often to save
#
# Saving seldom loses more work at each failure; saving often stands still more often, where training stands still for
# it. The dashed line is the closed formula, the band what the runs came to.

# %%
goodput_figures.interval(study)

# %%
goodput_sentences.about_interval(study)

# %% [markdown]
# ## Money and energy

# %%
goodput_sentences.costs(study)

# %% [markdown]
# ## Where the numbers come from

# %%
tables.sources(sources())

# %% [markdown]
# ## Words used here
#
# - **Goodput**: training time that was kept, over all time.
# - **Interruption**: a failure that stops the whole job. **Detection**: until somebody knows.
# - **Spare**: a server in reserve, paid for as the others. **PUE**: a building's power over that of its machines.
# - **P10, P90**: one run of ten is below, one of ten above.

# %%
written = write_goodput(study, out_dir)

# %%
assert study.days.p10 <= study.days.p50 <= study.days.p90
assert all(abs(sum(run.seconds.values()) / run.total_s - 1) < 1e-9 for run in study.runs), "all time is accounted for"
assert all(run.goodput_fraction <= 1 for run in study.runs)
