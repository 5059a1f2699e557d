"""A real Mixture-of-Experts layer in torch, timed to calibrate moesim. Needs only torch, numpy and the standard library.

``python -m reference_model.calibrate`` writes a profile of the local device; see ``reference_model.profile_schema``.
"""
