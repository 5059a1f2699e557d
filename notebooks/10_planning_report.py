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
# # Does this model fit on this cluster, how fast does it train, and what binds?
#
# A mixture-of-experts (MoE) model keeps many experts in memory and sends each token to a few of them. That buys a
# large model for the arithmetic of a small one, and pays for it with memory, with traffic between GPUs, and with
# waiting for the GPU whose experts are the most popular. This report simulates one training step and says what it
# comes to.

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
popularity: str = "lognormal"  # how uneven the experts are: balanced, multinomial or lognormal
gini: float = 0.25  # of a lognormal popularity; real text: 0.10 to 0.38
recording = None  # type: str|None recorded routing (router replay, or a histogram) instead of popularity and gini
capacity_factor = None  # type: float|None most an expert takes, over its mean load; None drops nothing
drop_policy: str = "probability"  # what a full expert keeps: probability, position, random, or reroute the rest
dispatcher: str = "alltoall"
policy: str = "contiguous"  # placement of the experts: contiguous, striped, random, by_load, eplb, search, map, ...
num_slots = None  # type: int|None
map = None  # type: str|None
split: str = "even"  # which replica of an expert a sender takes: even, nearest, least_loaded or uneven
rank_speeds = None  # type: str|None slow GPUs, spelt as moesim simulate --help says
profile: str = "auto"  # where the speed of the arithmetic comes from: auto, datasheet, or a profile's path
fidelity: str = "port"
replicas: int = 4  # of a stage, simulated at most; more are estimated from these
seed: int = 0
tokens_to_train: float = 14.8e12  # of the whole training run
out_dir: str = ""  # folder for results.json, results.csv and trace.json; "" writes none

# %%
from IPython.display import display

from moesim.report import figures, gap_figures, load_figures, sentences, tables
from moesim.report.export import write_results
from moesim.report.parameters import read_question
from moesim.report.progress import working
from moesim.study.advice import changes
from moesim.study.planning import planning_study

question = read_question(globals())
scenario = question.scenario

# %%
with working() as say:
    study = planning_study(scenario, question.own["tokens_to_train"], say)
    options = changes(scenario, say)
sentences.verdict(study, options)

# %% [markdown]
# ## What was asked

# %%
tables.question(scenario)

# %% [markdown]
# ## The numbers in one table
#
# Beside the model stand its *dense twins*: the same attention, depth and width, with one feed-forward block in place
# of each layer's experts. One twin is as large as the part of the model that a token uses, the other as large as all
# of it. They are simulated on the same cluster with the same batch; a twin that would not fit is cut further, and the
# report says how.

# %%
tables.headline(study.step, study.twins)

# %% [markdown]
# ## Memory against compute: all parameters and those a token uses

# %%
figures.parameters(study.description)

# %%
sentences.about_parameters(study)

# %% [markdown]
# ## Against dense models on the same cluster

# %%
if study.twins:
    display(figures.twins(study.twins))

# %%
sentences.about_twins(study)

# %%
if study.break_even:
    display(figures.break_even(study.break_even))

# %%
sentences.about_break_even(study)

# %% [markdown]
# ## Memory: what fills a GPU
#
# Weights, gradients and optimizer states stay; activations are kept from the forward to the backward pass; dispatch
# buffers hold the tokens that arrive at the busiest GPU's experts.

# %%
figures.memory_over_ep(study.memory_over_ep, capacity=figures.capacity_bytes(study.step), asked_ep=scenario.parallel.ep)

# %%
sentences.about_memory(study)

# %%
figures.memory_by_stage(study.step)

# %% [markdown]
# ## What to change
#
# Single settings changed one at a time. Of those that fit, the likeliest to help are simulated, and the fastest comes
# first.

# %%
tables.changes(options, study.step)

# %%
sentences.about_changes(study, options)

# %% [markdown]
# ## Time: where a step goes

# %%
figures.step_time(study.step)

# %%
sentences.about_step(study)

# %%
gap_figures.waterfall(study.gap)

# %%
gap_figures.about_gap(study.gap)

# %% [markdown]
# ## Expert load: how uneven it is
#
# A router sends more tokens to some experts than to others, and the GPU that holds the popular ones keeps its group
# waiting.

# %%
if scenario.model.is_moe:
    display(load_figures.load_map(study.step, study.load_layers))

# %%
if scenario.model.is_moe:
    display(load_figures.load_curve(study.step))

# %%
sentences.about_load(study)

# %% [markdown]
# ## Dropped tokens against the capacity factor
#
# A capacity factor limits what an expert takes, over its mean load. Less room drops tokens; more room reserves memory
# that stays empty.

# %%
if study.drop_curve:
    display(load_figures.drop_curve(study.drop_curve, asked=scenario.routing.capacity_factor))

# %%
sentences.about_drops(study)

# %% [markdown]
# ## Cluster sizes: GPUs, days, and whether it fits

# %%
tables.sizes(study.cluster_sizes, study.tokens_to_train, scenario.cluster.num_gpus)

# %%
sentences.about_sizes(study)

# %% [markdown]
# ## Where the numbers came from
#
# *Measured* numbers were timed on a device, by us or by the source named; *spec* ones stand in a maker's data sheet;
# *assumed* ones are carried over or chosen for lack of a measurement.

# %%
tables.provenance(study.step)

# %% [markdown]
# ## What is not modelled

# %%
tables.not_modelled(study.step)

# %% [markdown]
# ## Words used here
#
# - **Step**: one update of the weights, from one global batch of sequences.
# - **Micro-batch**: the sequences that one replica pushes through the pipeline at a time.
# - **Rank**: one GPU and the process that drives it.
# - **Pipeline stage**: the GPUs that hold the same consecutive layers. While the pipeline fills and drains, stages
#   idle; that idle time is the pipeline *bubble*.
# - **Expert-parallel size (ep)**: how many GPUs share one set of experts. Tokens travel among them twice in each MoE
#   layer: *dispatch* sends them to their experts, *combine* brings the results back. Both are all-to-all exchanges.
# - **1F1B**: each pipeline stage alternates one micro-batch forward and one backward.
# - **Data-parallel replicas**: copies of the model on different data; their gradients are added up at the end of a
#   step.
# - **ZeRO stage**: what replicas share out instead of each holding a copy (1: optimizer states, 2: gradients, 3:
#   weights).
# - **Recomputation**: keep fewer activations and compute them again in the backward pass.
# - **MFU**: the share of the GPUs' peak that goes into the model's own arithmetic, recomputation not counted.
# - **Gini coefficient**: 0 when all experts get the same load, towards 1 when one gets everything.
# - **GiB**: 2 to the power of 30 bytes; **GB/s**: a thousand million bytes per second, in one direction.

# %%
written = write_results(study, options, out_dir)

# %%
step = study.step
assert abs(sum(step.step_parts_s.values()) - step.step_s) < 1e-6 * step.step_s, "the parts of a step sum to the step"
assert step.fits == (step.memory["peak_bytes"] <= scenario.cluster.gpu.memory_bytes.value), "fits follows from memory"
assert all(abs(shares.sum() - 1) < 1e-6 for shares in step.load_LE), "each layer's expert loads sum to one"
assert scenario.parallel.ep in [point.ep for point in study.memory_over_ep], "the asked size is among those compared"
assert scenario.cluster.num_gpus in [point.num_gpus for point in study.cluster_sizes], "and so is the asked cluster"
