"""Rejection sampling: whole responses drawn until the reward of one is accepted."""

from transformers.generation.streamers import BaseStreamer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ggro_hf.decoding.base import Request, finish_reason, open_policy
from ggro_hf.decoding.drafts import DraftRules
from ggro_hf.decoding.drawing import Warped
from ggro_hf.decoding.guided import GuidedDecoder
from ggro_hf.decoding.rejection import Acceptance, RejectionSearch, check_reward_threshold
from ggro_hf.results import Counters, Generation, Trace
from ggro_hf.rewards import Reward


class RejectionSampling(GuidedDecoder):
    """Responses drawn from the policy until one is accepted, with probability `min(1, exp((r - r*) / temperature))`.

    After `attempts` rejections the best response is taken, one more draw included. They are drawn up to `parallel` at a
    time and the first accepted is taken, which gives what drawing them one after another gives. `reward_threshold` is
    r*, in the reward's own units; `temperature` is that of drawing and of accepting. The trace has one segment.

    Raises ValueError for settings out of range; see `GuidedDecoder` for the other arguments.

    Source: the baseline in the released code of cascade reward sampling (Li et al., 2024).
    """

    def __init__(
        self,
        reward: Reward,
        *,
        reward_threshold: float,
        temperature: float = 0.7,
        top_k: int | None = 40,
        attempts: int = 20,
        parallel: int = 4,
        seed: int = 0,
        tokenizer: PreTrainedTokenizerBase | None = None,
        streamer: BaseStreamer | None = None,
    ) -> None:
        super().__init__(reward, tokenizer=tokenizer, streamer=streamer)
        check_reward_threshold(reward_threshold)
        self.reward_threshold = reward_threshold
        self.acceptance = Acceptance(temperature, attempts, False, parallel, seed)
        self.reader = Warped(temperature, top_k)

    def _decode(self, request: Request, counters: Counters) -> Generation:
        scoring = self._open_scoring(request, counters)
        policy = open_policy(request, counters, self.reader)
        search = RejectionSearch(request, self.acceptance, self.reader, policy, scoring, counters)
        rules = DraftRules(request.eos_ids, request.max_new_tokens)
        draft, segment = search.next(0, 0, rules, lambda tokens: self.reward_threshold)
        trace = Trace()
        trace.append(segment)
        self._stream(draft.token_ids)
        reason = finish_reason(draft.token_ids, request)
        return Generation(request.prompt_ids, draft.token_ids, reason, segment.chosen.reward, trace, counters)
