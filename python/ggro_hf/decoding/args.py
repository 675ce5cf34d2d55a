"""ARGS: at every token, the policy's logit plus a weighted reward."""

import dataclasses

from transformers.generation.streamers import BaseStreamer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ggro_hf.decoding.base import Request, check_candidates, finish_reason, open_policy
from ggro_hf.decoding.drawing import draw_by_score, uniforms
from ggro_hf.decoding.guided import GuidedDecoder, best_index, check_positive, check_temperature, check_weight
from ggro_hf.reading import TopK
from ggro_hf.results import Candidate, Counters, Generation, Segment, Trace
from ggro_hf.rewards import Reward


class ARGS(GuidedDecoder):
    """The candidate with the largest `logit + weight * reward` among the policy's likeliest tokens, at every step.

    All candidates of a step are scored in one pass behind the cached prefix where the reward can; the chosen one is
    not computed again. The end-of-sequence token is a candidate like others. Ties go to the higher logit, then to the
    lower id. The trace has one segment a token.

    Args:
        weight: of the reward against raw logits (w).
        candidates: number of likeliest tokens that compete (k).
        mode: "greedy" takes the largest score, "sample" draws from `softmax(score / temperature)`.
        temperature: of that draw; "greedy" has no use for it.
        as_released: do not stop at end-of-sequence tokens, as in the authors' code.

    Raises ValueError for settings out of range; see `GuidedDecoder` for the other arguments.

    Source: Khanov et al., 2024 (ARGS-greedy and ARGS-stochastic).
    """

    def __init__(
        self,
        reward: Reward,
        *,
        weight: float = 1.5,
        candidates: int = 10,
        mode: str = "greedy",
        temperature: float = 0.7,
        seed: int = 0,
        as_released: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
        streamer: BaseStreamer | None = None,
    ) -> None:
        super().__init__(reward, tokenizer=tokenizer, streamer=streamer)
        check_positive(candidates=candidates)
        check_weight(weight)
        if mode not in ("greedy", "sample"):
            raise ValueError(f"mode is {mode!r}, but must be 'greedy' or 'sample'")
        check_temperature(temperature)
        self.weight = weight
        self.candidates = candidates
        self.mode = mode
        self.temperature = temperature
        self.seed = seed
        self.as_released = as_released

    def _decode(self, request: Request, counters: Counters) -> Generation:
        check_candidates(request.model, self.candidates)
        if self.as_released:
            request = dataclasses.replace(request, eos_ids=frozenset())
        scoring = self._open_scoring(request, counters)
        policy = open_policy(request, counters, TopK(self.candidates))
        numbers = uniforms(self.seed, request.row)
        trace = Trace()
        token_ids: list[int] = []
        while True:
            position = policy.position
            with counters.phase("reward"):
                (rewards,) = scoring.score([[[token] for token in position.tokens]])
            scores = [logit + self.weight * reward for logit, reward in zip(position.logits, rewards, strict=True)]
            if self.mode == "greedy":
                chosen = best_index(scores)
            else:
                chosen = draw_by_score(scores, self.temperature, numbers.random())
            candidates = tuple(
                Candidate((token,), (position.entropy,), reward, token in request.eos_ids, score=score)
                for token, reward, score in zip(position.tokens, rewards, scores, strict=True)
            )
            trace.append(Segment(len(request.prompt_ids) + len(token_ids), 0, candidates, chosen))
            token = position.tokens[chosen]
            token_ids.append(token)
            self._stream([token])
            if token in request.eos_ids or len(token_ids) == request.max_new_tokens:
                break
            with counters.phase("reward"):
                scoring.keep([(0, chosen)])
            with counters.phase("decode"):
                policy.extend([token])
        reason = finish_reason(token_ids, request)
        return Generation(request.prompt_ids, token_ids, reason, rewards[chosen], trace, counters)
