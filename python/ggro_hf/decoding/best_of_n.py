"""Best-of-N: draw N responses, keep the one that the reward model likes best."""

from transformers.generation.streamers import BaseStreamer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ggro_hf.decoding.base import Decoder, Request, check_context, open_policy
from ggro_hf.decoding.sample import Warped, draw_response, row_generator
from ggro_hf.results import Candidate, Counters, Generation, Segment, Trace
from ggro_hf.rewards import RewardModel, RewardPrefix


class BestOfN(Decoder):
    """The best of `samples` drawn responses by reward; ties go to the first.

    The prompt is computed once by both models. The trace has one segment whose candidates are the samples.
    """

    def __init__(
        self,
        reward: RewardModel,
        *,
        samples: int = 8,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        tokenizer: PreTrainedTokenizerBase | None = None,
        streamer: BaseStreamer | None = None,
    ) -> None:
        super().__init__(streamer=streamer)
        if samples < 1:
            raise ValueError(f"samples is {samples}, but must be at least 1")
        self.reward = reward
        self.samples = samples
        self.reader = Warped(temperature, top_k, top_p)
        self.seed = seed
        if tokenizer is not None:
            self.check_tokenizer(tokenizer)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.reward.check_tokenizer(tokenizer)

    def _decode(self, request: Request, counters: Counters) -> Generation:
        check_context(self.reward.model, request, "reward model")
        policy = open_policy(request, counters, self.reader)
        opening = policy.position
        prefix = RewardPrefix(self.reward, counters, len(request.prompt_ids) + request.max_new_tokens)
        with counters.phase("reward"):
            prefix.extend(list(request.prompt_ids))
        generator = row_generator(self.seed, request.row)
        candidates = []
        for _ in range(self.samples):
            policy.rewind(len(request.prompt_ids))
            policy.position = opening
            with counters.phase("decode"):
                token_ids, entropies = draw_response(policy, request, generator)
            with counters.phase("reward"):
                reward = prefix.score(token_ids).reward
            candidates.append(Candidate(tuple(token_ids), tuple(entropies), reward, token_ids[-1] in request.eos_ids))
        chosen = best_candidate(candidates)
        segment = Segment(len(request.prompt_ids), 0, tuple(candidates), chosen)
        best = segment.chosen
        self._stream(list(best.token_ids))
        return Generation(
            request.prompt_ids,
            list(best.token_ids),
            "eos" if best.finished else "length",
            best.reward,
            Trace(list(best.entropies), [segment]),
            counters,
        )


def best_candidate(candidates: list[Candidate]) -> int:
    """Index of the largest reward, the first of equals; NaN never wins. Raises FloatingPointError if all are NaN."""
    best, best_reward = None, 0.0
    for index, candidate in enumerate(candidates):
        if candidate.reward == candidate.reward and (best is None or candidate.reward > best_reward):
            best, best_reward = index, candidate.reward
    if best is None:
        raise FloatingPointError("the reward model answers NaN for every candidate; check its weights and its dtype")
    return best
