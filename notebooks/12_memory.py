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
# # What fits where?
#
# A GPU's memory holds its weights, their gradients, the optimizer's states, what the forward pass keeps for the
# backward pass, and buffers. This report takes one training step and asks: which GPU is fullest, at which moment, what
# do recomputation and offloading trade for time, and what does an uneven load of the experts add?

# %% tags=["parameters"]
# Parameters: what is asked. Each name is a field of the scenario file, except the last two.
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
popularity: str = "lognormal"  # how uneven the experts are
gini: float = 0.25  # of a lognormal popularity; real text: 0.10 to 0.38
recording = None  # type: str|None recorded routing (router replay, or a histogram) instead of popularity and gini
capacity_factor = None  # type: float|None most an expert takes, over its mean load; None drops nothing
drop_policy: str = "probability"  # what a full expert keeps: probability, position, random, or reroute the rest
dispatcher: str = "alltoall"  # deepep sends a token once to each node instead of once for each expert
policy: str = "contiguous"  # placement of the experts
num_slots = None  # type: int|None expert slots of a group; None: one for each expert
map = None  # type: str|None a JSON file of the placement, where policy is map
split: str = "even"  # which replica of an expert a sender takes: even, nearest, least_loaded or uneven
rank_speeds = None  # type: str|None slow GPUs, spelt as moesim simulate --help says
profile: str = "auto"  # where the speed of the arithmetic comes from: auto, datasheet, or a profile's path
fidelity: str = "port"
replicas: int = 4  # of a stage, simulated at most; more are estimated from these
seed: int = 0
ginis: str = ""  # skews of a lognormal popularity to try, such as 0,0.2,0.4
out_dir: str = ""  # folder for results.json and results.csv; "" writes none

# %%
from IPython.display import display

from moesim.report import figures, memory_figures, memory_sentences, tables
from moesim.report.memory_export import read_ginis, write_memory
from moesim.report.parameters import read_question
from moesim.report.progress import working
from moesim.study.memory import memory_study

question = read_question(globals())
scenario = question.scenario
ginis = read_ginis(question.own)

# %%
with working("Weighing") as say:
    study = memory_study(scenario, ginis=ginis, progress=say)
memory_sentences.verdict(scenario, study)

# %% [markdown]
# ## What was asked

# %%
tables.question(scenario)

# %% [markdown]
# ## By stage
#
# Each bar is the fullest GPU of one pipeline stage at its worst moment. The first stages hold more micro-batches at a
# time, the last one the output head.

# %%
figures.memory_by_stage(study.step)

# %%
memory_sentences.about_stages(study)

# %% [markdown]
# ## Over the step
#
# The line is what a GPU holds between operations; the shade what it holds at the worst moment of each operation. With
# every forward it keeps more, with every backward less, in the order that the pipeline's schedule gives.

# %%
memory_figures.timeline(study)

# %%
memory_sentences.about_timeline(study)

# %% [markdown]
# ## Memory for time
#
# Each point is the same step with one setting changed. Lower is less memory, further right a longer step. What lies
# above and to the right of another point is not worth it. Dots without a name save little.

# %%
memory_figures.trades(study)

# %%
memory_sentences.about_trades(study)

# %% [markdown]
# ## Under skew

# %%
if study.over_skew:
    display(memory_figures.over_skew(study), memory_sentences.about_skew(study))

# %% [markdown]
# ## Words used here
#
# - **Activations**: what the forward pass keeps for the backward pass.
# - **Recomputation**: keeping less of them, and making the rest again in the backward pass.
# - **Offloading**: keeping activations or optimizer states in the host's memory, over the link to it.
# - **Stage, micro-batch**: the model is cut into stages, the batch into micro-batches that follow one another.
# - **Gini**: 0 is an even load of the experts, 1 is all load on one.

# %%
written = write_memory(scenario, study, out_dir)

# %%
peaks = [stage["peak_bytes"] for stage in study.step.memory_by_rank]
assert all(abs(line.peak_bytes / peak - 1) < 1e-9 for line, peak in zip(study.timeline, peaks, strict=True)), (
    "the timeline's peak is the step's"
)
assert study.worth_it()[-1].peak_bytes == min(point.peak_bytes for point in study.trades), (
    "the least is always worth it"
)
assert all(point.p50_bytes <= point.p99_bytes for point in study.over_skew), "half of the steps need less"
