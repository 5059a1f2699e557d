"""A real Mixture-of-Experts layer in torch, timed to calibrate moesim. Needs torch and numpy only.

``python -m reference_model.calibrate`` writes a profile of the local device; see ``reference_model.profile_schema``.
"""
