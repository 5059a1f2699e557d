"""A real Mixture-of-Experts model in torch, timed to calibrate moesim and trained to see what it routes.

Needs torch and numpy only. ``python -m reference_model.calibrate`` writes a profile of the local device (see
``reference_model.profile_schema``), ``python -m reference_model.train`` trains the small model.

The layer, in the order of its reading: ``routers``, ``capacity``, ``dispatch``, ``experts``, ``layer``, ``losses``;
a model of it: ``attention``, ``latent_attention``, ``transformer``, ``discard`` (recomputation), ``train``; over
several ranks: ``expert_parallel``, ``ranks``; what it costs: ``flops``, ``saved``.
"""
