"""What the CUDA kernels use, against what they may: `python -m tests.cuda_budget`."""
