"""The Fourier spectrum of a table, and the scatter of its residues."""
