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
# # How far off are the predictions?
#
# moesim carries measurements that others published: whole training steps, single mixture-of-experts (MoE) layers,
# exchanges alone, peaks of memory, and one trace of DeepSeek-V3. This report predicts each of them from its
# configuration and sets both side by side. A table of your own runs, with the same columns, is scored in the same way.

# %% tags=["parameters"]
# Parameters: what is asked.
kind: str = "training"  # what was measured: training, layer, dispatch, memory or trace
cases: str = ""  # a CSV of measurements with the columns of that kind; "" takes those that moesim carries
out_dir: str = ""  # folder for results.json, accuracy.md and its figure; "" writes none

# %%
from moesim.report import accuracy_figures, accuracy_sentences, accuracy_tables
from moesim.report.accuracy_export import write_accuracy
from moesim.report.parameters import read_values
from moesim.study.accuracy import asked_cases, score

asked = read_values(globals())

# %%
found = score(asked["kind"], asked_cases(asked["cases"], asked["kind"]), asked["cases"] or "carried rows")
accuracy_sentences.verdict(found)

# %% [markdown]
# ## Predicted against measured
#
# On the line a prediction is right; above it the real run was faster. Hollow points took part in fitting moesim's few
# constants, so only the full ones test it.

# %%
accuracy_figures.predicted_measured(found)

# %%
accuracy_sentences.about_errors(found)

# %% [markdown]
# ## Release by release
#
# The same software on the same GPUs shares its errors. Crosses show what a row's error would be had no row of its
# release been known when the constants were fitted.

# %%
accuracy_figures.by_release(found)

# %%
accuracy_sentences.about_left_out(found)

# %%
accuracy_tables.groups(found)

# %% [markdown]
# ## The worst rows, and what their predictions are made of

# %%
accuracy_figures.made_of(found)

# %%
accuracy_sentences.about_parts(found)

# %%
accuracy_tables.worst(found)

# %% [markdown]
# ## Rows without a prediction
#
# A row that leaves out what a prediction needs, or a model that moesim does not know, is listed and never dropped.

# %%
accuracy_tables.not_expressed(found)

# %% [markdown]
# ## Words used here
#
# - **Error**: predicted over measured, less one; below zero the prediction is too short (or too small).
# - **Bias**: the mean error with its sign.
# - **Envelope**: configurations of which moesim models all that they did. It depends on the configuration alone.
# - **Part in a fit**: the row was used to find one of moesim's constants, so it cannot test them.
# - **Release**: the software that ran, by its version.
# - **Host**: the CPU that issues every operation; where it is slower than the GPU, the GPU waits.

# %%
written = write_accuracy(found, asked["out_dir"])

# %%
errors = [abs(row.error_fraction) for row in found.rows]
assert errors == sorted(errors, reverse=True), "the worst row comes first"
assert all(bool(row.reasons) != row.inside_envelope for row in found.rows), "a row outside the envelope says why"
assert all(row.reason for row in found.not_expressed), "and one without a prediction too"
