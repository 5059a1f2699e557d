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
# # How fast is this device really, and how well is that known?
#
# `moesim calibrate` times the parts of a mixture-of-experts (MoE) layer on a device and draws curves through them. This
# report shows one such profile: every point that was measured, the curves, how far they miss the points that were kept
# from them, and whether a whole layer takes the sum of its parts.

# %% tags=["parameters"]
# Parameters: what is asked.
profile: str = "cpu-xeon-2-threads"  # a profile that comes with moesim, or the path of one that moesim calibrate wrote
out_dir: str = ""  # folder for results.json and results.csv; "" writes none

# %%
from moesim.cost.profile import load_profile
from moesim.report import calibration_figures, calibration_sentences, calibration_tables
from moesim.report.calibration_export import write_calibration
from moesim.report.parameters import read_values
from moesim.study.calibration import calibration_study

asked = read_values(globals())

# %%
study = calibration_study(load_profile(asked["profile"]))
calibration_sentences.verdict(study)

# %% [markdown]
# ## What was timed

# %%
calibration_tables.made_with(study)

# %% [markdown]
# ## The experts' products
#
# An expert multiplies its tokens with two matrices; all experts of a layer do so in one *grouped product*. Each panel
# is one matrix (inputs to outputs) in one direction; the backward pass makes both gradients. The *roofline* is the time
# that the arithmetic, or the bytes, would take at the best rate and bandwidth of the same run.

# %%
calibration_figures.products(study)

# %%
calibration_sentences.about_skew(study)

# %% [markdown]
# ## Everything else

# %%
calibration_figures.parts(study)

# %%
calibration_sentences.about_exchanges(study)

# %% [markdown]
# ## How far off are the curves?
#
# Every third size was kept from the fit, chosen before anything was measured. Uneven loads and whole layers were never
# fitted at all.

# %%
calibration_figures.residuals(study)

# %%
calibration_sentences.about_errors(study)

# %%
calibration_tables.errors(study)

# %% [markdown]
# ## A whole layer against the sum of its parts

# %%
calibration_figures.layers(study)

# %%
calibration_sentences.about_layers(study)

# %% [markdown]
# ## Words used here
#
# - **Held out**: measured, but kept from the fit, so that the fit can be tested on it.
# - **Noise**: how far the two least disturbed passes over the same point disagree; an error below it says nothing.
# - **Bias**: the median error with its sign; below zero, predictions are too short.
# - **Roofline**: the larger of arithmetic over best rate and bytes over best bandwidth.
# - **Permute, combine**: sorting tokens by expert, and adding the experts' results up again.
# - **All-to-all**: every rank sends rows to every other.

# %%
written = write_calibration(study, asked["out_dir"])

# %%
fitted = [p for p in study.points if not p.point.held_out and p.point.kind == "grouped"]
assert max(abs(p.error_fraction) for p in fitted) < 0.001, "the curves go through the points of the fit"
assert {p.tag for p in fitted} == {"measured"}, "and say so"
assert all(row.num_points > 0 for row in study.profile.errors), "every error is of points that were held out"
