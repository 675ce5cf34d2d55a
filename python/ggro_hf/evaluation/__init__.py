"""Metrics of responses, and the comparison of decoding methods on the same prompts."""

from ggro_hf.evaluation.comparison import MethodRun, compare, summarize
from ggro_hf.evaluation.metrics import MeanInterval, distinct_n, diversity, mean_interval
from ggro_hf.evaluation.records import RECORD_FIELDS, generation_record

__all__ = [
    "RECORD_FIELDS",
    "MeanInterval",
    "MethodRun",
    "compare",
    "distinct_n",
    "diversity",
    "generation_record",
    "mean_interval",
    "summarize",
]
