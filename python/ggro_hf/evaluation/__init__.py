"""Metrics of responses, the comparison of decoding methods on the same prompts, and agreement of reward models."""

from ggro_hf.evaluation.agreement import (
    AgreementRow,
    agreement_by_length,
    agreement_records,
    format_agreement,
)
from ggro_hf.evaluation.comparison import MethodRun, compare, summarize
from ggro_hf.evaluation.judges import (
    ChatJudge,
    Judge,
    TextComparison,
    judge_preferences,
    preferences_from_rewards,
    read_preference_file,
)
from ggro_hf.evaluation.metrics import MeanInterval, distinct_n, diversity, mean_interval
from ggro_hf.evaluation.records import RECORD_FIELDS, generation_record

__all__ = [
    "RECORD_FIELDS",
    "AgreementRow",
    "ChatJudge",
    "Judge",
    "MeanInterval",
    "MethodRun",
    "TextComparison",
    "agreement_by_length",
    "agreement_records",
    "compare",
    "distinct_n",
    "diversity",
    "format_agreement",
    "generation_record",
    "judge_preferences",
    "mean_interval",
    "preferences_from_rewards",
    "read_preference_file",
    "summarize",
]
