"""CARDS: segments drawn from the policy until their reward is good enough."""

import dataclasses
import math

from transformers.generation.streamers import BaseStreamer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ggro_hf.decoding.base import Request, finish_reason, open_policy
from ggro_hf.decoding.drafts import DraftRules, continue_from
from ggro_hf.decoding.drawing import Warped
from ggro_hf.decoding.guided import GuidedDecoder, check_positive
from ggro_hf.decoding.rejection import Acceptance, RejectionSearch, check_reward_threshold
from ggro_hf.results import Counters, Generation, Trace
from ggro_hf.rewards import Reward, Scoring


class CARDS(GuidedDecoder):
    """Segments that end before a high-entropy token, each drawn again until its reward is accepted.

    A candidate of reward r is accepted with probability `min(1, exp((r - threshold(n)) / temperature))`, n being the
    tokens of the response with it; `threshold(n) = min(r*, r0 + n (r* - r0) / N)`, `r0 = (1 - alpha) r(prompt) + alpha
    r*`, r* the `reward_threshold` and N `max_new_tokens`. Candidates are drawn up to `parallel` at a time and the first
    accepted is taken, which gives what drawing them one after another gives.

    Args:
        reward_threshold: r*, in the reward's own units: every reward model needs another.
        entropy_threshold: nats at which a token ends the segment before it, from its fifth token on.
        alpha: share of r* in the first threshold.
        temperature: of drawing tokens and of accepting segments (beta).
        top_k: draw from the k likeliest tokens only; None for all.
        max_segment: most tokens of a segment.
        attempts: rejections after which the best candidate is taken, one more draw included.
        acceptance: "soft" as above; "hard" accepts where r >= threshold(n).
        parallel: most candidates drawn together: 1 at first, more with every rejection.
        as_released: do not stop at end-of-sequence tokens, nor in the segment that reaches `max_new_tokens`, which the
            response may overshoot, as in the authors' code.

    Raises ValueError for settings out of range; see `GuidedDecoder` for the other arguments.

    Source: Li et al., 2024 (cascade reward sampling); constants of its released code.
    """

    def __init__(
        self,
        reward: Reward,
        *,
        reward_threshold: float,
        entropy_threshold: float = 3.0,
        alpha: float = 0.5,
        temperature: float = 0.7,
        top_k: int | None = 40,
        max_segment: int = 64,
        attempts: int = 20,
        acceptance: str = "soft",
        parallel: int = 4,
        seed: int = 0,
        as_released: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
        streamer: BaseStreamer | None = None,
    ) -> None:
        super().__init__(reward, tokenizer=tokenizer, streamer=streamer)
        check_positive(max_segment=max_segment)
        check_reward_threshold(reward_threshold)
        if math.isnan(entropy_threshold):
            raise ValueError("entropy_threshold is NaN, but must be a number of nats")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is {alpha}, but must be from 0 to 1")
        if acceptance not in ("soft", "hard"):
            raise ValueError(f"acceptance is {acceptance!r}, but must be 'soft' or 'hard'")
        self.reward_threshold = reward_threshold
        self.entropy_threshold = entropy_threshold
        self.alpha = alpha
        self.max_segment = max_segment
        self.as_released = as_released
        self.acceptance = Acceptance(temperature, attempts, acceptance == "hard", parallel, seed)
        self.reader = Warped(temperature, top_k)

    def _decode(self, request: Request, counters: Counters) -> Generation:
        if self.as_released:
            request = dataclasses.replace(request, eos_ids=frozenset())
        scoring = self._open_scoring(request, counters)
        first = self._first_threshold(scoring, counters)

        def threshold(tokens: int) -> float:
            if self.reward_threshold == -math.inf:
                return -math.inf
            return min(self.reward_threshold, first + tokens * (self.reward_threshold - first) / request.max_new_tokens)

        policy = open_policy(request, counters, self.reader)
        search = RejectionSearch(request, self.acceptance, self.reader, policy, scoring, counters)
        token_ids: list[int] = []
        trace = Trace()
        while True:
            room = self.max_segment if self.as_released else request.max_new_tokens - len(token_ids)
            rules = DraftRules(request.eos_ids, min(self.max_segment, room), self.entropy_threshold)
            draft, segment = search.next(len(trace.segments), len(token_ids), rules, threshold)
            trace.append(segment)
            token_ids += draft.token_ids
            self._stream(draft.token_ids)
            if token_ids[-1] in request.eos_ids or len(token_ids) >= request.max_new_tokens:
                break
            with counters.phase("decode"):
                continue_from(policy, draft)
        reason = finish_reason(token_ids, request)
        return Generation(request.prompt_ids, token_ids, reason, segment.chosen.reward, trace, counters)

    def _first_threshold(self, scoring: Scoring, counters: Counters) -> float:
        if self.alpha == 1 or self.reward_threshold == -math.inf:
            return self.reward_threshold
        with counters.phase("reward"):
            ((of_prompt,),) = scoring.score([[[]]])
        if math.isnan(of_prompt):
            raise FloatingPointError("the reward of the prompt is NaN; check the reward model's weights and its dtype")
        return (1 - self.alpha) * of_prompt + self.alpha * self.reward_threshold
