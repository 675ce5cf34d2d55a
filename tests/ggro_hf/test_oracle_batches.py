"""Traces of the released GGRO code of one configuration, reproduced as one batch of their prompts."""

from collections import defaultdict

import pytest

from ggro_hf import GGRO
from ggro_hf.decoding.base import Request, end_of_sequence_ids
from tests.ggro_hf.batches import watching_steps
from tests.ggro_hf.oracle import SUITES, policy, reward_model, tokenizer, traces
from tests.ggro_hf.test_oracle_ggro import assert_replayed

MOST_PROMPTS = 5


def batches(suite: str) -> list[list[dict]]:
    """The prompts of two configurations with refinements, one for either kind of prompt."""
    by_configuration = defaultdict(list)
    for trace in traces("ggro", suite):
        if trace["config"]["num_refinement_steps"] > 1:
            by_configuration[tuple(sorted(trace["config"].items()))].append(trace)
    return [
        max((own for own in by_configuration.values() if own[0]["config"]["prefill_attack"] == prefill), key=len)[
            :MOST_PROMPTS
        ]
        for prefill in (False, True)
    ]


@pytest.mark.parametrize("suite", SUITES)
def test_released_traces_are_reproduced_in_a_batch(suite):
    model = policy(suite)
    replayed = 0
    for own in batches(suite):
        config = own[0]["config"]
        decoder = GGRO(
            reward_model(),
            tokenizer=tokenizer(suite),
            entropy_threshold=config["entropy_threshold"],
            refinements=config["num_refinement_steps"],
            candidates=config["nudge_top_k"],
            as_released=True,
            insertion_offset=0 if config["prefill_attack"] else None,
        )
        eos_ids = end_of_sequence_ids(model)
        requests = [
            Request(model, trace["prompt_ids"], config["max_new_tokens"], eos_ids, row) for row, trace in enumerate(own)
        ]
        with watching_steps() as served:
            found = list(decoder.respond_all(requests, 100_000))
        assert max(served) == len(own) > 1
        for trace, generation in zip(own, found, strict=True):
            assert_replayed(suite, trace, generation)
            replayed += 1
    assert replayed >= 4
