"""The laws that decoders draw from, by chi-square tests with fixed seeds; each refuses a law that is wrong.

The policy is a Markov chain written down by the test, so every probability is known by enumeration.
"""

from collections import Counter
from collections.abc import Iterable
from itertools import product
from math import exp

import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ggro_hf import ARGS, CARDS, BestOfN, ChunkBeamSearch, RejectionSampling, Sample
from ggro_hf.decoding.base import Request
from tests.ggro_hf.rule_reward import RuleReward
from tests.ggro_hf.small_models import scripted_policy

VOCABULARY, PROMPT = 6, [4]
LOGITS = 1.5 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
NO_EOS = frozenset[int]()
SETTINGS = (
    {},
    {"temperature": 0.6},
    {"temperature": 1.7, "top_k": 4},
    {"top_p": 0.8},
    {"temperature": 1.3, "top_k": 5, "top_p": 0.85},
)
Law = dict[tuple[int, ...], float]


@pytest.fixture(scope="module")
def policy():
    return scripted_policy(LOGITS)


def p_value(draws: Iterable[tuple[int, ...]], law: Law) -> float:
    """Of Pearson's test that draws come from the law; 0 if one is impossible. Rare outcomes are counted together."""
    counts = Counter(draws)
    total = sum(counts.values())
    if any(law.get(outcome, 0.0) == 0.0 for outcome in counts):
        return 0.0
    cells, rare = [], [0.0, 0.0]
    for outcome, probability in law.items():
        if total * probability >= 5:
            cells.append([float(counts[outcome]), total * probability])
        else:
            rare = [rare[0] + counts[outcome], rare[1] + total * probability]
    if rare[1] > 0:
        cells.append(rare)
    statistic = sum((observed - expected) ** 2 / expected for observed, expected in cells)
    freedom = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)).item()


def assert_law(draws: list[tuple[int, ...]], law: Law, *wrong: Law) -> None:
    """The draws fit the law, and none of those that are wrong on purpose."""
    assert sum(law.values()) == pytest.approx(1)
    assert p_value(draws, law) > 1e-3
    for other in wrong:
        assert sum(other.values()) == pytest.approx(1)
        assert p_value(draws, other) < 1e-6


def next_token_law(last: int, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> Law:
    """What transformers' warpers leave of the policy."""
    warpers = LogitsProcessorList()
    if temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(temperature))
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        warpers.append(TopPLogitsWarper(top_p))
    probabilities = warpers(torch.tensor([[last]]), LOGITS[last][None].clone()).softmax(-1)[0].tolist()
    return {(token,): probability for token, probability in enumerate(probabilities) if probability}


def response_law(length: int, eos_ids: frozenset[int] = NO_EOS, **settings) -> Law:
    """Of whole responses, up to the first end of sequence."""
    law: Law = {(): 1.0}
    for _ in range(length):
        grown: Law = {}
        for response, probability in law.items():
            if response and response[-1] in eos_ids:
                grown[response] = probability
                continue
            for token, share in next_token_law((*PROMPT, *response)[-1], **settings).items():
                grown[response + token] = probability * share
        law = grown
    return law


def without(settings: dict, name: str) -> dict:
    return {key: value for key, value in settings.items() if key != name}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_best_of_n_draws_from_the_warped_policy(policy, settings):
    eos_ids = frozenset({2})
    decoder = BestOfN(RuleReward(lambda response: 0.0), samples=4000, seed=1, **settings)
    (segment,) = decoder.respond(Request(policy, PROMPT, 3, eos_ids)).trace.segments
    draws = [candidate.token_ids for candidate in segment.candidates]
    wrong = [response_law(3, eos_ids, **without(settings, name)) for name in settings]
    wrong.append(response_law(3, eos_ids, **settings | {"temperature": settings.get("temperature", 1.0) * 1.35}))
    assert_law(draws, response_law(3, eos_ids, **settings), *wrong)


@pytest.mark.parametrize("settings", SETTINGS[2:], ids=str)
def test_sampling_draws_from_the_warped_policy(policy, settings):
    output = Sample(seed=2, **settings)(policy, torch.tensor([PROMPT] * 1200), max_new_tokens=2)
    draws = [tuple(generation.token_ids[:2]) for generation in output.generations]
    eos_ids = frozenset(policy.generation_config.eos_token_id)
    wrong = response_law(2, eos_ids, **settings | {"temperature": settings.get("temperature", 1.0) * 1.5})
    assert_law(draws, response_law(2, eos_ids, **settings), wrong)


def test_the_first_chunks_of_beams_are_independent_draws(policy):
    decoder = ChunkBeamSearch(RuleReward(lambda response: 0.0), width=40, successors=100, chunk_length=2, top_k=None)
    segment = decoder.respond(Request(policy, PROMPT, 4, NO_EOS)).trace.segments[0]
    draws = [candidate.token_ids for candidate in segment.candidates]
    assert len(draws) == 4000
    assert_law(draws, response_law(2), response_law(2, temperature=1.35))
    # Neighbours, too, have nothing to do with each other.
    pairs = [(first[0], second[0]) for first, second in zip(draws[::2], draws[1::2], strict=True)]
    single = next_token_law(PROMPT[-1])
    assert_law(pairs, {a + b: single[a] * single[b] for a, b in product(single, single)})


def test_args_draws_by_logit_and_reward(policy):
    values = [0.3, -1.0, 0.8, 0.1, -0.4, 1.2]
    weight, temperature, candidates = 1.5, 0.9, 4
    decoder = ARGS(
        RuleReward(lambda response: values[response[-1]]),
        weight=weight,
        temperature=temperature,
        candidates=candidates,
        mode="sample",
        seed=3,
    )

    def law(weight: float, temperature: float) -> Law:
        kept = LOGITS[PROMPT[-1]].topk(candidates).indices.tolist()
        scores = {token: exp((LOGITS[PROMPT[-1], token] + weight * values[token]) / temperature) for token in kept}
        return {(token,): score / sum(scores.values()) for token, score in scores.items()}

    draws = [tuple(decoder.respond(Request(policy, PROMPT, 1, NO_EOS, row)).token_ids) for row in range(1500)]
    assert_law(draws, law(weight, temperature), law(0.0, temperature), law(weight, 1.3), law(2.2, temperature))


TEMPERATURE, THRESHOLD, LENGTH, ATTEMPTS = 0.8, 2.0, 2, 2


def value_of(response: tuple[int, ...]) -> float:
    """Different for every response of two tokens."""
    a, b = response
    return ((7 * a + 5 * b * b + a * b) % 31) / 15 - 0.5 + 1e-3 * (6 * a + b)


def accepted_law(*, hard: bool = False, attempts: int = ATTEMPTS, temperature: float = TEMPERATURE) -> Law:
    """Of the segment that is accepted, or the best of all that were drawn, by enumeration."""
    drawn = response_law(LENGTH, temperature=TEMPERATURE)

    def accepts(response: tuple[int, ...]) -> float:
        short = value_of(response) - THRESHOLD
        return float(short >= 0) if hard else min(1.0, exp(short / temperature))

    accepted = {response: share * accepts(response) for response, share in drawn.items()}
    rejected = {response: share - accepted[response] for response, share in drawn.items()}
    once = sum(rejected.values())
    law = {response: share * sum(once**n for n in range(attempts)) for response, share in accepted.items()}
    # The best of those rejected and of one that was not tested: the difference of two distribution functions.
    below_rejected = below_drawn = reached = 0.0
    for response in sorted(drawn, key=value_of):
        below_rejected += rejected[response]
        below_drawn += drawn[response]
        best = below_rejected**attempts * below_drawn
        law[response] += best - reached
        reached = best
    return law


@pytest.mark.parametrize("parallel", [1, 3])
def test_cards_accepts_by_its_law(policy, parallel):
    assert len({value_of(response) for response in product(range(VOCABULARY), repeat=2)}) == VOCABULARY**2
    decoder = CARDS(
        RuleReward(lambda response: value_of(response) if response else 0.0),
        reward_threshold=THRESHOLD,
        alpha=1.0,
        temperature=TEMPERATURE,
        top_k=None,
        attempts=ATTEMPTS,
        parallel=parallel,
        seed=4,
    )
    draws = [tuple(decoder.respond(Request(policy, PROMPT, LENGTH, NO_EOS, row)).token_ids) for row in range(900)]
    wrong = [
        accepted_law(hard=True),
        accepted_law(attempts=0),
        accepted_law(attempts=8),
        response_law(LENGTH, temperature=TEMPERATURE),
    ]
    assert_law(draws, accepted_law(), *wrong)


def test_rejection_sampling_accepts_by_its_law(policy):
    decoder = RejectionSampling(
        RuleReward(value_of), reward_threshold=THRESHOLD, temperature=TEMPERATURE, top_k=None, attempts=ATTEMPTS, seed=5
    )
    draws = [tuple(decoder.respond(Request(policy, PROMPT, LENGTH, NO_EOS, row)).token_ids) for row in range(900)]
    assert_law(draws, accepted_law(), accepted_law(hard=True), accepted_law(temperature=4.0))


def test_acceptance_has_nothing_to_do_with_what_was_drawn(policy):
    """A threshold that half of all candidates miss leaves the law of equally rewarded ones as it was."""
    decoder = CARDS(
        RuleReward(lambda response: 0.0),
        reward_threshold=0.7,
        alpha=1.0,
        temperature=1.0,
        top_k=None,
        attempts=4,
        parallel=5,
        seed=6,
    )
    generations = [decoder.respond(Request(policy, PROMPT, 1, NO_EOS, row)) for row in range(1500)]
    assert_law([tuple(generation.token_ids) for generation in generations], response_law(1))
    tried = [(len(generation.trace.segments[0].candidates),) for generation in generations]
    accepted = exp(-0.7)
    law = {(n,): accepted * (1 - accepted) ** (n - 1) for n in range(1, 5)}
    assert_law(tried, law | {(5,): (1 - accepted) ** 4})
