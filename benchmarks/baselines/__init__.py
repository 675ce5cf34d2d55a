"""Reward-guided search as it is usually written on transformers, to measure ours against.

Each file is one method, after the published descriptions. None looks at end-of-sequence: a benchmark lets every method
decode the same number of tokens. Reward models are sequence classifiers that read the policy's token ids.
"""
