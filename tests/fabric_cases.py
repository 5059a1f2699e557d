"""Seeded exchanges of many kinds on many fabrics, and how far ``port`` is from ``exact`` on them.

Legend: R ranks.
"""
