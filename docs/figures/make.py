"""Draw the README's figure: ``.venv/bin/python docs/figures/make.py``. A test holds it to the engine's numbers."""

from pathlib import Path

from moesim import Scenario, simulate
from moesim.report import figures

FIGURE = Path(__file__).parent / "step-time-deepseek-v3.svg"
# DeepSeek-V3 as its authors cut it over 2,048 H800 (arXiv 2412.19437 section 3); recomputing makes it fit.
QUESTION = Scenario.make(
    model="deepseek-v3",
    cluster="h800-8x-ib400",
    num_gpus=2048,
    pp=16,
    ep=64,
    global_batch=15360,
    precision="fp8",
    recompute="full",
)

if __name__ == "__main__":
    picture = figures.step_time(simulate(QUESTION))
    text = picture.svg.replace("<svg ", '<svg style="background:white" ', 1)
    FIGURE.write_text(text + "\n", encoding="utf-8")
