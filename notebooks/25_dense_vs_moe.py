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
# # What does each choice of an MoE's design cost?
#
# A mixture of experts (MoE) holds many parameters and uses few of them for a token. How many experts, how many of them
# a token uses, how wide they are, how many layers have them: each choice moves memory, traffic and time. This report
# varies one at a time, the hidden size fixed, and sets each design beside two dense models: one as large as the part
# that a token uses, one as large as all of it.

# %% tags=["parameters"]
# Parameters: what is asked. Each name is a field of the scenario file, except those from axes on.
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
axes: str = ""  # what to try instead of halves and doubles, spelt as under Words
scaling_law: bool = False  # estimate quality by a published law, where it was fitted
price_per_gpu_hour = None  # type: float|None your price; None prices nothing
currency: str = "USD"
out_dir: str = ""  # folder for results.json and results.csv; "" writes none

# %%
from moesim.report import design_figures, design_sentences, design_tables, tables
from moesim.report.design_export import read_axes, write_design
from moesim.report.parameters import read_question
from moesim.report.progress import working
from moesim.study.design_axes import design_study

question = read_question(globals())
scenario = question.scenario
values = read_axes(question.own["axes"])

# %%
with working("Designs") as say:
    study = design_study(
        scenario,
        values=values,
        price_per_gpu_hour=question.own["price_per_gpu_hour"],
        currency=question.own["currency"],
        with_quality=question.own["scaling_law"],
        progress=say,
    )
design_sentences.verdict(study)

# %% [markdown]
# ## What was asked

# %%
tables.question(scenario)

# %% [markdown]
# ## What does size cost?
#
# A dense model uses all its parameters for every token, so its cost grows with its size. An MoE's grows with what a
# token uses, and with what travels between GPUs.

# %%
design_figures.price_of_size(study)

# %%
design_sentences.against_dense(study)

# %% [markdown]
# ## Which choice moves the cost?
#
# One axis a panel, all else as asked. The dense twins of each point are made anew: of as many active parameters, and
# of as many in all. Routing is as uneven (as asked) everywhere; more experts on a GPU even its load out.

# %%
design_figures.over_axes(study)

# %%
design_sentences.about_axes(study)

# %% [markdown]
# ## Where does the time of each design go?

# %%
design_figures.where_time_goes(study)

# %%
design_sentences.about_time(study)

# %% [markdown]
# ## All numbers
#
# *Comm.*: exposed communication, a share of the step. *FLOP*: of training. *Per 1B*: for a thousand million tokens.
# *×*: cost over that of the point's own dense twin of equal active, or equal total, size.

# %%
design_tables.designs(study)

# %%
design_sentences.about_memory(study)

# %% [markdown]
# ## Quality
#
# Nothing here was trained. A published scaling law can estimate the loss of designs like those that it was fitted on,
# and of no others; it is off unless asked for.

# %%
design_sentences.about_quality(study)

# %% [markdown]
# ## Words used here
#
# - **Active parameters**: those that one token uses. **Dense twin**: the same attention, depth and hidden size, with
#   one feed-forward block in place of each layer's experts.
# - **Pieces each expert is cut into**: g times as many experts, g times as many used, each 1/g as wide; parameters and
#   compute stay. **Shared expert**: one that every token uses, here as wide as a routed one.
# - **Every n-th MoE layer kept**: a block of equal active size takes the place of the others.
# - **Capacity factor**: most an expert takes, over its mean load; the rest is dropped.
# - **axes**, the parameter: `num_experts=64,128; capacity_factor=none,1.25`; names as in results.csv.

# %%
written = write_design(study, out_dir)

# %%
moe, active, total = study.asked.cost, study.asked.active, study.asked.total
assert moe.active_parameters <= moe.total_parameters
assert abs(active.total_parameters / moe.active_parameters - 1) < 0.02, "the one twin is as large as the active part"
assert abs(total.total_parameters / moe.total_parameters - 1) < 0.02, "the other as the whole"
assert active.flops_per_token < total.flops_per_token
