"""The parts of a result that have a source, in words: for the report's and the command line's tables."""

from __future__ import annotations

STEP_CONSTANTS = {  # of catalog.step.NAMES
    "product_fraction": "products in a step, over the best product's rate",
    "attention_fraction": "attention in a step, over the best kernel's rate",
    "stream_fraction": "bytes fused kernels would move, over those moved",
    "issue_s": "host time to issue one operation",
    "step_s": "time once a step: clipping, the optimizer's host time",
}


def part_in_words(part: str) -> str:
    """A number's name for a reader: a derate is the share of a line's rate that a collective reaches.

    >>> part_in_words("derate nvlink_alltoall")
    'share of the NVLink rate reached, alltoall'
    """
    if part.startswith("step: "):
        return STEP_CONSTANTS[part.removeprefix("step: ")]
    if not part.startswith("derate "):
        return part
    link, _, collective = part.removeprefix("derate ").partition("_")
    of = {"nvlink": "the NVLink rate", "nic": "the NIC rate", "spine": "the leaves' up-links"}[link]
    return f"share of {of} reached, {collective.replace('_', ' ')}"
