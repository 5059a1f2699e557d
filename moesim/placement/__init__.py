"""Where experts live: layouts with replicas, policies that make them, what they cost, how far from the best they are.

Light on purpose: search and its numba kernels load when a policy is called.
"""

from moesim.placement.experts import Placement, contiguous

__all__ = ["Placement", "contiguous"]
