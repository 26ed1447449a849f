"""Readers of layers: CSARP_layer files, SRED, Koenig's tables and npz, and what is written back."""
