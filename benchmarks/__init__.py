"""Benchmarks of the kernels (`python -m benchmarks`) and of decoding (`python benchmarks/decoding.py`)."""
