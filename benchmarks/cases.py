"""The shapes that the kernel benchmarks run."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class EntropyTopKCase:
    rows: int
    vocab: int
    dtype: torch.dtype
    k: int = 25

    @property
    def bytes_read(self) -> int:
        return self.rows * self.vocab * self.dtype.itemsize


@dataclass(frozen=True)
class CandidateScoresCase:
    positions: int
    width: int
    vocab: int = 32000
    dtype: torch.dtype = torch.float32
    k: int = 25

    @property
    def bytes_read(self) -> int:
        return self.positions * (self.k + 1) * self.width * self.dtype.itemsize


ENTROPY_TOPK = [
    EntropyTopKCase(rows, vocab, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for vocab in (32000, 128256)
    for rows in (1, 4, 16, 64)
]
CANDIDATE_SCORES = [CandidateScoresCase(positions, width) for width in (1024, 4096) for positions in (1, 20, 256)]

QUICK_ENTROPY_TOPK = [EntropyTopKCase(1, 128256, torch.float32), EntropyTopKCase(16, 128256, torch.bfloat16)]
QUICK_CANDIDATE_SCORES = [CandidateScoresCase(20, 1024)]
