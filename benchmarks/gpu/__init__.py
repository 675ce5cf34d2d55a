"""The same cases on a GPU, timed by events in its queue: `python -m benchmarks --device cuda`."""
