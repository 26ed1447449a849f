"""Benchmarks: what the engine costs beside a plain loop, Flower, and itself.

``python -m benchmarks`` from the repository's root runs all; tables go to ``benchmarks/results``.
"""
