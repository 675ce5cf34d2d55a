"""Benchmarks of the kernels (`python -m benchmarks`) and of decoding (`python -m benchmarks.decoding`,
`python -m benchmarks.guided_search`)."""
