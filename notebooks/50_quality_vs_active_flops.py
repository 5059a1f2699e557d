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
# # Is a mixture of experts better for the same arithmetic, and what do its experts do?
#
# A mixture-of-experts (MoE) layer holds many feed-forward blocks, the experts, and sends each token to a few of them.
# This report trains a small one beside a dense model whose tokens cost exactly as many floating-point operations
# (FLOPs), on text that needs no download: program sources, manuals and licences, tables of numbers. It then looks at
# what the router learned: whether experts specialise, whether routing is steady, whether the load stays even with and
# without balancing, and what half precision does to it. Most runs were recorded beforehand; the last part trains here
# and now. These are models of a few hundred thousand parameters: differences, not absolute numbers, carry over.

# %% tags=["parameters"]
# Parameters: what is asked.
live_steps: int = 300  # steps to train here and now, under 0.1 s each for both models together; 0 leaves it out
live_seed: int = 0  # of the live runs; 0, 1 and 2 were recorded
runs_dir: str = ""  # folder of recorded runs by experiment; "": those that come with moesim
out_dir: str = ""  # folder for results.json and results.csv; "" writes none

# %%
import tempfile

from IPython.display import display

from moesim.report import training_figures, training_sentences, training_tables
from moesim.report.parameters import read_values
from moesim.report.progress import working
from moesim.report.training_export import write_training
from moesim.study.training import DENSE, MOE, training_study
from reference_model.runs import NAMES, RECORDED, read_runs

asked = read_values(globals())
runs = {name: read_runs(name, runs_dir or RECORDED) for name in NAMES}

# %%
study = training_study(**runs)
training_sentences.verdict(study)

# %% [markdown]
# ## What was trained

# %%
training_tables.made_with(study)

# %% [markdown]
# ## Dense against MoE at equal active FLOPs
#
# Both models see the same batches. The dense model's layers are as wide as makes a token cost the same, router
# included; the MoE holds more parameters, of which a token uses as many as the dense model has. The learning rate was
# the best of three for either model, tried with another seed; the size was chosen small enough that the dense model is
# short of parameters (`docs/decisions/small-training-runs.md` says what else was tried).

# %%
training_figures.quality(study)

# %%
training_sentences.about_quality(study)

# %%
training_tables.variants(study)

# %% [markdown]
# ## Do experts specialise by kind of text?
#
# Held-out tokens of the last step: whose tokens does each expert take?

# %%
training_figures.specialisation(study)

# %%
training_sentences.about_specialisation(study)

# %% [markdown]
# ## Is routing steady?
#
# The same held-out tokens, routed by the model as it was at several steps: how many of a token's experts are already
# those of the end?

# %%
training_figures.consistency(study)

# %%
training_sentences.about_consistency(study)

# %% [markdown]
# ## The load over training, with and without balancing
#
# Four ways, all else equal: no balancing; an auxiliary loss (weight 0.01); a bias on the router's scores that moves by
# 0.001 a step towards the mean load, without a loss; and noise on the logits, of a width that the router learns (the
# noise alone, without the importance loss that it was published with; the product that gives its width is not counted
# among the FLOPs).

# %%
training_figures.balance(study)

# %%
training_sentences.about_balance(study)

# %%
training_figures.usage(study)

# %% [markdown]
# ## Do experts collapse?
#
# The setting where it is feared most: one expert per token (Switch), nothing that balances, no loss on the logits'
# size; beside it the same with the auxiliary loss. Collapsed is an expert that over half of all tokens choose; lost is
# one under 1% of its layer's mean load.

# %%
training_figures.collapse(study)

# %%
training_sentences.about_collapse(study)

# %% [markdown]
# ## Half precision
#
# Products in bfloat16 or float16, weights in float32. The router's product is either done in float32 or in half
# precision like the rest, with and without the z-loss that keeps its logits small (weight 0.001). For each held-out
# token, the chosen experts are compared with those of the same product in float64.

# %%
training_figures.precision(study)

# %%
training_sentences.about_precision(study)

# %%
training_tables.precision(study)

# %% [markdown]
# ## Here and now
#
# The first steps of both models once more, on this machine's text.

# %%
live = {}
if live_steps:
    from reference_model.experiments import run_live  # which needs torch; what was recorded does not

    with tempfile.TemporaryDirectory() as folder, working("Training") as say:
        live = run_live(
            folder, num_steps=live_steps, seed=live_seed, progress=lambda name, step: say(f"{name}, step {step}")
        )
    display(training_figures.live(live, study), training_sentences.about_live(live, study))

# %% [markdown]
# ## Words used here
#
# - **Active FLOPs**: the floating-point operations of one token's forward pass; of the experts, only those it takes.
# - **Held-out loss**: the mean negative logarithm of the probability given to the next byte, on documents never trained
#   on [nats per byte]; lower is better.
# - **Top-k**: how many experts a token takes.
# - **MaxVio**: the busiest expert's load over the mean, less 1; 0 is even.
# - **Auxiliary loss**: a term in the loss that is smallest when all experts get the same load.
# - **Loss-free bias**: a number per expert that counts in the choice of experts only, moved against the load.
# - **z-loss**: a term in the loss that keeps the router's logits small.
# - **Seed**: what the initial weights and the order of the text are drawn from.

# %%
written = write_training(study, out_dir)

# %%
by_variant = {curve.variant: curve for curve in study.curves}
assert by_variant[DENSE].flops_per_token == by_variant[MOE].flops_per_token, "both cost a token as many FLOPs"
assert by_variant[DENSE].active_parameters == by_variant[MOE].active_parameters, "and use as many parameters"
assert by_variant[DENSE].total_parameters < by_variant[MOE].total_parameters, "of which the MoE holds more"
assert all((curve.loss_NS[:, -1] < curve.loss_NS[:, 0]).all() for curve in study.curves), "every run learned"
assert study.gain.difference.low <= study.gain.difference.mean <= study.gain.difference.high, (
    "the spread holds the mean"
)
assert all(run.heldout["loss"][-1] < run.heldout["loss"][0] for run in live.values()), "live runs learn as well"
