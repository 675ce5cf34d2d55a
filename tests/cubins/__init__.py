"""Compiles every Triton kernel for real GPUs, without one: `python -m tests.cubins`."""
