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
# # Is this design sound?
#
# Before anything is trained, a design passes gates: does it fit and keep fitting, how much is dropped, exposed, idle,
# what does the run cost, and was moesim ever checked on anything like it? Each gate passes, warns or fails, with its
# evidence and the cheapest change that would pass it. A design is a file that a team reviews; `moesim validate` runs
# the same gates in CI.

# %% tags=["parameters"]
# Parameters: the design's file, and where results go.
design: str = "70_validate_design/design.yaml"  # a design file, or one beside the notebooks' parameter files
out_dir: str = ""  # folder for results.json, results.csv and junit.xml; "" writes none

# %%
from moesim.report import tables, validate_figures
from moesim.report.parameters import read_values
from moesim.report.progress import working
from moesim.report.validate_export import design_of, write_validation
from moesim.study.validate import validate

asked = design_of(read_values(globals()))

# %%
with working("Validating") as say:
    found = validate(asked, say)
validate_figures.verdict(found)

# %% [markdown]
# ## What was asked

# %%
tables.question(asked.scenario)

# %% [markdown]
# ## Every gate

# %%
validate_figures.gates(found)

# %% [markdown]
# ## Where the numbers come from

# %%
tables.provenance(found.step)

# %% [markdown]
# ## Words used here
#
# - **Gate**: a number of the design with a limit. Limits that the file does not set are moesim's own judgement.
# - **Fix**: of the single changes that were tried, the one that passes the gate with the most tokens per second.
# - **Exposed communication**: what no computing hides. **Bubble**: a pipeline's fill and drain.
# - **MFU**: the model's floating-point operations over what the GPUs could do. **Goodput**: time that was kept.

# %%
written = write_validation(found, out_dir)

# %%
assert all((gate.fix == "") or gate.status in ("warn", "fail") for gate in found.gates)
assert found.status == ("fail" if any(gate.status == "fail" for gate in found.gates) else found.status)
