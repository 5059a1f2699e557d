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
# # Where should experts live, and how many copies?
#
# A mixture-of-experts (MoE) model sends each token to a few of its experts, and some experts are more popular than
# others. The GPU that holds the popular ones keeps its whole group waiting. Two things help: choosing which experts
# share a GPU (*placement*), and holding popular experts more than once (*replicas*). This report places the experts in
# several ways, says how even each makes the load, how far that is from the best there can be, and what it costs in
# memory, in traffic between nodes, and in moving when the load drifts.

# %% tags=["parameters"]
# Parameters: what is asked. Each name is a field of the scenario file, except the last three.
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
recompute: str = "full"  # none, full, or modules such as moe_act,layernorm
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
policies: str = ""  # to compare, such as contiguous,eplb,search; "": all that the GPUs allow
slots: str = ""  # numbers of slots to try, such as 256,320; "": up to four more on each GPU
out_dir: str = ""  # folder for results.json, results.csv and physical_to_logical.json; "" writes none

# %%
from IPython.display import display

from moesim.report import placement_figures, placement_sentences, placement_tables, tables
from moesim.report.parameters import read_question
from moesim.report.placement_export import read_lists, write_placement
from moesim.report.progress import working
from moesim.study.placement import placement_study

question = read_question(globals())
scenario = question.scenario
lists = read_lists(question.own)

# %%
with working("Placing") as say:
    study = placement_study(scenario, policies=lists.policies, slots=lists.slots, progress=say)
placement_sentences.verdict(study)

# %% [markdown]
# ## What was asked

# %%
tables.question(scenario)

# %% [markdown]
# ## Before and after, GPU by GPU
#
# Each row is a layer, each column a GPU of the group that shares the experts. Red GPUs are the ones others wait for.

# %%
placement_figures.before_after(study)

# %%
placement_sentences.about_before_after(study)

# %% [markdown]
# ## Policies against each other, and against the bound
#
# The bound is what no layout of so many slots can beat, whatever the policy: it knows that an expert is whole or shared
# evenly among its copies, and how many slots a GPU has.

# %%
placement_figures.policies(study)

# %%
placement_sentences.about_policies(study)

# %%
placement_tables.policies(study)

# %% [markdown]
# ## How many copies: balance, memory, step time

# %%
placement_figures.redundancy(study)

# %%
placement_sentences.about_slots(study)

# %% [markdown]
# ## Traffic between nodes against balance
#
# Experts that serve the same token from one node need one copy of it there. Evening out the load tears such experts
# apart; keeping them together leaves the load less even.

# %%
if study.num_nodes > 1:
    display(placement_figures.front(study))

# %%
placement_sentences.about_front(study)

# %% [markdown]
# ## Moving, and how long a placement lasts
#
# A new placement moves experts, with their optimizer states, while training waits. And the load it was made for
# drifts.

# %%
placement_tables.moves(study)

# %%
placement_sentences.about_moves(study)

# %%
placement_figures.ageing(study)

# %%
placement_sentences.about_ageing(study)

# %% [markdown]
# ## Words used here
#
# - **Expert-parallel group**: the GPUs that share one set of experts. Tokens travel among them twice in each MoE layer.
# - **Slot**: room for one expert's weights in one layer on one GPU. More slots than experts means copies (*replicas*),
#   which share their expert's tokens.
# - **Contiguous**: the first experts on the first GPU, the next on the second, and so on. **Striped**: dealt out in
#   turn. **Random**: shuffled. **by_load**: copies for the heaviest, then the heaviest to the least loaded GPU.
# - **EPLB**: DeepSeek's public balancer, which keeps the router's expert groups on one node where it can.
# - **search**: by_load improved by swapping slots until nothing helps or the bound is met. **search_hierarchical**: the
#   same inside nodes. **node_aware**: search, then slots traded so that fewer copies of a token cross nodes.
# - **Busiest GPU**: its load over the mean GPU's, in a layer. 1 is even; a layer takes as long as its busiest GPU.
# - **Stall**: the fullest link's bytes over its rate; a real migration takes longer.
# - **GiB**: 2 to the power of 30 bytes.

# %%
written = write_placement(study, out_dir)

# %%
for point in study.points:
    assert (point.placed.max_mean_L >= point.placed.lower_bound_L).all(), "no layout beats the bound"
    assert abs(point.placed.rank_loads_LR.sum() - point.placed.load_LE.sum()) < 1e-6 * point.placed.load_LE.sum(), (
        "loads"
    )
assert study.best.max_mean <= study.base.max_mean, "the best policy is no worse than contiguous placement"
balance = [point.max_mean for point in study.by_slots]
assert balance[-1] <= balance[0] * 1.01, "more slots never cost balance"
assert all(later.replica_bytes.total_bytes > 0 for later in study.by_slots[1:]), "copies take memory"
