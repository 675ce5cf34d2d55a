"""Exhaustive search against a literal transcription on plain HuggingFace models, and its edges."""

import random
from dataclasses import dataclass, field
from math import inf, isnan, nan

import pytest
import torch

from ggro_hf import GGRO, ExhaustiveSearch, Generation, RewardModel
from ggro_hf.policy_lanes import takes_lanes
from tests.ggro_hf.rule_reward import RuleReward
from tests.ggro_hf.small_models import END_OF_TURN, PAD, scripted_policy, scripted_reward, small_policy, small_reward

VOCABULARY = 90


@dataclass
class PlainSearch:
    """The algorithm by whole forward passes over whole sequences: no cache, no batch."""

    policy: torch.nn.Module
    reward: torch.nn.Module
    entropy_threshold: float
    candidates: int
    check_every: int = 1
    insertion_offset: int = 0
    prune: int | None = None
    # Of every segment the token ids and rewards of all candidates, and which was chosen.
    segments: list[tuple[list[list[int]], list[float], int]] = field(default_factory=list)

    def __call__(self, prompt: list[int], max_new_tokens: int) -> list[int]:
        sequence, total = list(prompt), len(prompt) + max_new_tokens
        offset, complete = self.insertion_offset, False
        while not complete:
            options = [self._greedy(sequence, total)]
            base = options[0][0]
            if len(base) > offset:
                head = sequence + base[:offset]
                tokens = self._logits(head).sort(descending=True, stable=True).indices[: self.candidates].tolist()
                assert tokens[0] == base[offset]
                for token in self._pruned(sequence, base, offset, tokens):
                    options.append(self._greedy(sequence, total, [*base[:offset], token]))
            rewards = [self._reward(sequence + kept) for kept, _ in options]
            best = max((index for index, one in enumerate(rewards) if not isnan(one)), key=rewards.__getitem__)
            self.segments.append(([kept for kept, _ in options], rewards, best))
            kept, complete = options[best]
            sequence, offset = sequence + kept, 0
        return sequence[len(prompt) :]

    def _logits(self, sequence: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return self.policy(torch.tensor([sequence])).logits[0, -1]

    def _reward(self, sequence: list[int]) -> float:
        with torch.no_grad():
            # Given ids, it would read the reward before padding at the end, which the policy may well write.
            inputs = self.reward.get_input_embeddings()(torch.tensor([sequence]))
            return self.reward(inputs_embeds=inputs).logits[0, 0].item()

    def _greedy(self, sequence: list[int], total: int, forced: list[int] | None = None) -> tuple[list[int], bool]:
        """The segment's kept tokens, and whether it ends the response."""
        added: list[int] = []
        while True:
            logits = self._logits(sequence + added)
            step = len(added)
            added.append(forced[step] if forced and step < len(forced) else int(logits.argmax()))
            if added[-1] in self.policy.generation_config.eos_token_id or len(sequence) + len(added) >= total:
                return added, True
            entropy = torch.distributions.Categorical(logits=logits).entropy().item()
            if len(added) >= 4 and len(added) % self.check_every == 0 and entropy >= self.entropy_threshold:
                return added[:-1], False

    def _pruned(self, sequence: list[int], base: list[int], offset: int, tokens: list[int]) -> list[int]:
        others = tokens[1:]
        if self.prune is None:
            return others
        table = self.reward.get_input_embeddings().weight
        inputs = self.reward.get_input_embeddings()(torch.tensor([sequence + base])).detach().requires_grad_(True)
        self.reward(inputs_embeds=inputs).logits[0, 0].backward()
        scores = {token: (inputs.grad[0, len(sequence) + offset] @ table[token]).item() for token in others}
        best = sorted(others, key=lambda token: -scores[token])[: self.prune]
        return [token for token in others if token in best]


def models(seed: int, *, gain: float = 3.0, eos: tuple[int, ...] = (END_OF_TURN,)):
    policy = small_policy(seed=seed, vocabulary=VOCABULARY, gain=gain, hidden=24, eos_token_ids=eos)
    return policy, small_reward(seed=seed + 1, vocabulary=VOCABULARY, hidden=16)


def run(policy, reward, prompt: list[int], max_new_tokens: int = 16, **settings: object) -> Generation:
    decoder = ExhaustiveSearch(RewardModel(reward), **settings)
    return decoder(policy, torch.tensor([prompt]), max_new_tokens=max_new_tokens).generations[0]


def assert_same(generation: Generation, expected: PlainSearch, token_ids: list[int]) -> None:
    assert generation.token_ids == token_ids
    assert len(generation.trace.segments) == len(expected.segments)
    for segment, (kept, rewards, best) in zip(generation.trace.segments, expected.segments, strict=True):
        assert [list(candidate.token_ids) for candidate in segment.candidates] == kept
        assert [candidate.reward for candidate in segment.candidates] == pytest.approx(rewards, abs=1e-9, nan_ok=True)
        assert segment.chosen_index == best
    assert generation.reward == pytest.approx(expected.segments[-1][1][expected.segments[-1][2]], abs=1e-9)


def assert_equal(generation: Generation, other: Generation) -> None:
    """The same candidates and choices, rewards but for rounding in fp64."""
    assert generation.token_ids == other.token_ids
    for mine, theirs in zip(generation.trace.segments, other.trace.segments, strict=True):
        assert [one.token_ids for one in mine.candidates] == [one.token_ids for one in theirs.candidates]
        assert mine.chosen_index == theirs.chosen_index
        rewards = [candidate.reward for candidate in theirs.candidates]
        assert [candidate.reward for candidate in mine.candidates] == pytest.approx(rewards, abs=1e-12)


@pytest.mark.parametrize("seed", range(16))
def test_the_transcription_agrees(seed):
    draw = random.Random(seed)
    eos = (END_OF_TURN, *draw.sample(range(PAD + 1, VOCABULARY), draw.choice([0, 0, 4])))
    policy, reward = models(seed, gain=draw.choice([1.5, 3.0, 5.0]), eos=eos)
    settings = {
        "entropy_threshold": draw.choice([0.0, 1.0, 2.0, inf]),
        "candidates": draw.choice([1, 2, 7, 25, 40]),
        "check_every": draw.choice([1, 1, 3]),
        "insertion_offset": draw.choice([0, 0, 2, 5]),
        "prune": draw.choice([None, None, 1, 6]),
    }
    prompt = [draw.randrange(PAD + 1, VOCABULARY) for _ in range(draw.randrange(1, 9))]
    max_new_tokens = draw.choice([1, 2, 5, 12])
    expected = PlainSearch(policy, reward, **settings)
    token_ids = expected(prompt, max_new_tokens)
    assert_same(run(policy, reward, prompt, max_new_tokens, **settings), expected, token_ids)


@pytest.mark.parametrize("prune", [None, 5])
def test_one_row_at_a_time_gives_the_same(prune, monkeypatch):
    policy, reward = models(3)
    assert takes_lanes(policy)
    side_by_side = run(policy, reward, [5, 9, 33], entropy_threshold=1.0, prune=prune)
    monkeypatch.setattr("ggro_hf.decoding.batch.takes_lanes", lambda model: False)
    one_by_one = run(policy, reward, [5, 9, 33], entropy_threshold=1.0, prune=prune)
    assert_equal(one_by_one, side_by_side)
    assert side_by_side.trace.nudges > 0


def test_more_candidates_than_rows_of_a_pass(monkeypatch):
    policy, reward = models(4)
    together = run(policy, reward, [5, 9, 33], entropy_threshold=1.0)
    monkeypatch.setattr("ggro_hf.decoding.exhaustive._MOST_ROWS", 4)
    monkeypatch.setattr("ggro_hf.decoding.exhaustive._SCORED_TOGETHER", 7)
    divided = run(policy, reward, [5, 9, 33], entropy_threshold=1.0)
    assert_equal(divided, together)


def test_pruned_to_all_is_exhaustive():
    policy, reward = models(5)
    everything = run(policy, reward, [5, 9], entropy_threshold=1.0, candidates=25)
    assert_equal(run(policy, reward, [5, 9], entropy_threshold=1.0, candidates=25, prune=24), everything)
    nearly = run(policy, reward, [5, 9], entropy_threshold=1.0, candidates=25, prune=23)
    assert all(len(segment.candidates) == 24 for segment in nearly.trace.segments)


@pytest.mark.parametrize("seed", range(20, 28))
def test_the_first_segment_is_never_rewarded_less_than_that_of_ggro(seed):
    policy, reward = models(seed)
    settings = {"entropy_threshold": 1.0, "candidates": 25, "insertion_offset": seed % 3}
    mine = run(policy, reward, [5, 9, 33], **settings).trace.segments[0]
    ggro = GGRO(RewardModel(reward), **settings)(policy, torch.tensor([[5, 9, 33]]), max_new_tokens=16)
    theirs = ggro.generations[0].trace.segments[0]
    assert mine.base.token_ids == theirs.base.token_ids
    assert mine.chosen.reward >= theirs.chosen.reward - 1e-12
    tried = {candidate.token_ids for candidate in mine.candidates}
    assert {candidate.token_ids for candidate in theirs.candidates} <= tried


@pytest.mark.parametrize("prune", [None, 4])
def test_batches_equal_single_runs(prune):
    policy, reward = models(6)
    decoder = ExhaustiveSearch(RewardModel(reward), entropy_threshold=1.0, candidates=9, prune=prune)
    rows = [[5, 9, 33, 7, 12], [44, 45], [7, 8, 9, 10, 11, 12, 13]]
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    together = decoder(policy, ids, attention_mask=mask, max_new_tokens=16).generations
    for row, generation in zip(rows, together, strict=True):
        (alone,) = decoder(policy, torch.tensor([row]), max_new_tokens=16).generations
        assert_equal(generation, alone)
        assert generation.counters.policy_tokens == alone.counters.policy_tokens


# A scripted policy reads its last token alone.
K, M, P, Q = 10, 11, 12, 13


def script(following: dict[int, list[int]]) -> torch.Tensor:
    """After each key the ids given, in this order, are a little likelier than the rest."""
    table = -1e-3 * torch.arange(VOCABULARY, dtype=torch.float64).repeat(VOCABULARY, 1) - 5.0
    for previous, order in following.items():
        for rank, token in enumerate(order):
            table[previous, token] = 1.0 - 0.1 * rank
    return table


def test_of_equal_rewards_the_likelier_token_wins():
    policy = scripted_policy(script({K: [M, P, Q]}))
    worth = torch.zeros(VOCABULARY, dtype=torch.float64)
    worth[P] = worth[Q] = 1.0
    generation = run(policy, scripted_reward(worth), [K], 1, candidates=3)
    segment = generation.trace.segments[0]
    assert [candidate.token_ids for candidate in segment.candidates] == [(M,), (P,), (Q,)]
    assert segment.candidates[1].reward == segment.candidates[2].reward > segment.candidates[0].reward
    assert generation.token_ids == [P]


def test_a_candidate_may_end_the_response():
    policy = scripted_policy(script({K: [M, END_OF_TURN], M: [P], P: [Q], Q: [M]}))
    worth = torch.zeros(VOCABULARY, dtype=torch.float64)
    worth[END_OF_TURN] = 3.0
    generation = run(policy, scripted_reward(worth), [K], 9, candidates=2, entropy_threshold=inf)
    assert generation.token_ids == [END_OF_TURN] and generation.finish_reason == "eos"
    assert generation.trace.segments[0].chosen.finished


@pytest.mark.parametrize("prune", [None, 2])
def test_nan_never_wins(prune):
    policy = scripted_policy(script({K: [M, P, Q, 14]}))
    worth = torch.zeros(VOCABULARY, dtype=torch.float64)
    worth[M], worth[P], worth[Q] = 0.5, 1.0, 2.0
    model = scripted_reward(worth)
    decoder, ids = ExhaustiveSearch(RewardModel(model), candidates=4, prune=prune), torch.tensor([[K]])
    with torch.no_grad():
        model.get_input_embeddings().weight[Q] = nan
    (generation,) = decoder(policy, ids, max_new_tokens=1).generations
    (segment,) = generation.trace.segments
    assert [one.token_ids for one in segment.candidates if isnan(one.reward)] == [(Q,)]
    assert generation.token_ids == [P]
    with torch.no_grad():
        model.score.weight.fill_(nan)
    with pytest.raises(FloatingPointError, match="NaN for every candidate"):
        decoder(policy, ids, max_new_tokens=1)


def test_what_cannot_be_served_is_refused():
    policy, reward = models(1)
    with pytest.raises(ValueError, match=f"candidates is 91, but the policy's vocabulary has {VOCABULARY} tokens"):
        run(policy, reward, [5], candidates=VOCABULARY + 1)
    with pytest.raises(TypeError, match="ExhaustiveSearch needs a RewardModel"):
        ExhaustiveSearch(RuleReward(lambda ids: 0.0))
    for wrong in ({"prune": 0}, {"candidates": 0}, {"insertion_offset": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
            ExhaustiveSearch(RewardModel(reward), **wrong)
