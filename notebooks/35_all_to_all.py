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
# # Where does an all-to-all's time go?
#
# In each mixture-of-experts (MoE) layer, GPUs send their tokens to the GPUs that hold the chosen experts, and wait
# until the last one has its tokens. This report takes one such exchange, the *dispatch* of one micro-batch in the layer
# whose busiest GPU receives most, and asks: which port is full, when is each GPU done, which way of sending is fastest,
# and what do message size and skew change?

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
tokens: str = ""  # tokens per GPU to try, such as 16,128,4096
ginis: str = ""  # skews of a lognormal popularity to try, such as 0,0.2,0.4
out_dir: str = ""  # folder for results.json and results.csv; "" writes none

# %%
from moesim.report import alltoall_figures, alltoall_sentences, tables
from moesim.report.alltoall_export import read_lists, write_exchange
from moesim.report.parameters import read_question
from moesim.report.progress import working
from moesim.study.exchange import ALGORITHMS, exchange_study

question = read_question(globals())
scenario = question.scenario
lists = read_lists(question.own)

# %%
with working("Exchanging") as say:
    study = exchange_study(scenario, tokens=lists.tokens, ginis=lists.ginis, progress=say)
alltoall_sentences.verdict(study)

# %% [markdown]
# ## What was asked

# %%
tables.question(scenario)

# %% [markdown]
# ## Which ports are busy
#
# A GPU has four ports: NVLink out and in, inside its node; NIC out and in, between nodes. Each line sorts one port over
# all GPUs. An exchange takes at least as long as its busiest port.

# %%
alltoall_figures.ports(study)

# %%
alltoall_sentences.about_ports(study)

# %% [markdown]
# ## When each GPU is done
#
# A GPU with little to move still waits for what it sends into a busy port of another. *exact* shares every link fairly
# among all messages at every moment; *port* is the estimate that a simulated step uses.

# %%
alltoall_figures.finishes(study)

# %%
alltoall_sentences.about_finishes(study)

# %% [markdown]
# ## Three ways of sending, over message size
#
# *Direct*: a token once for each of its experts. *Hierarchical*: once over the network to each node, from there by
# NVLink. *Low latency*: as direct, but straight from the sender's NIC; nobody forwards. Solid lines count the kernel's
# own start: of NCCL for direct, of DeepEP's two kinds of kernel (as measured on H200) for the others.

# %%
alltoall_figures.over_size(study)

# %%
alltoall_sentences.about_size(study)

# %% [markdown]
# ## Over skew

# %%
alltoall_figures.over_skew(study)

# %%
alltoall_sentences.about_skew(study)

# %% [markdown]
# ## Words used here
#
# - **Dispatch**: tokens travel to their experts. **Combine**: results travel back, the same way reversed.
# - **NVLink**: links between the GPUs of a node. **NIC**: a GPU's port to other nodes.
# - **Busiest port**: its bytes over its rate; no schedule can be faster.
# - **Max-min fair**: no message could go faster without slowing one that is no faster.
# - **Gini**: 0 is even, 1 is all load on one expert.
# - **Kernel's start**: what a communication kernel takes before its first byte moves; counted over message size and
#   over skew, not in the ports and finishes above. Waiting for GPUs that come late is in no figure.

# %%
written = write_exchange(study, out_dir)

# %%
for name in ALGORITHMS:
    timed = study.exact[name]
    assert timed.completed.completion_s >= timed.lower_bound_s * (1 - 1e-9), "nothing beats the busiest port"
    estimate = study.port[name].completed.completion_s
    assert abs(estimate / timed.completed.completion_s - 1) < 0.1, "port is near exact"
seconds = {(point.algorithm, point.x): point.done_s for point in study.over_size}
assert all(seconds[name, lists.tokens[0]] <= seconds[name, lists.tokens[-1]] for name in ALGORITHMS), (
    "more takes longer"
)
