"""Best-of-N: draw N responses, keep the one with the largest reward."""

from transformers.generation.streamers import BaseStreamer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ggro_hf.decoding.base import Request, finish_reason, open_policy
from ggro_hf.decoding.drafts import DraftRules, draw_drafts
from ggro_hf.decoding.drawing import Warped, uniforms
from ggro_hf.decoding.guided import GuidedDecoder, best_index, check_positive
from ggro_hf.results import Candidate, Counters, Generation, Segment, Trace
from ggro_hf.rewards import Reward


class BestOfN(GuidedDecoder):
    """The best of `samples` drawn responses by reward; ties go to the first.

    The prompt is computed once by both models. Responses are drawn side by side, `parallel` at a time (all of them by
    default; fewer take less memory and draw the same). The trace has one segment whose candidates are the samples.

    Raises ValueError for settings out of range; see `GuidedDecoder` for the other arguments.
    """

    def __init__(
        self,
        reward: Reward,
        *,
        samples: int = 8,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        parallel: int | None = None,
        seed: int = 0,
        tokenizer: PreTrainedTokenizerBase | None = None,
        streamer: BaseStreamer | None = None,
    ) -> None:
        super().__init__(reward, tokenizer=tokenizer, streamer=streamer)
        check_positive(samples=samples, parallel=1 if parallel is None else parallel)
        self.samples = samples
        self.parallel = samples if parallel is None else min(parallel, samples)
        self.reader = Warped(temperature, top_k, top_p)
        self.seed = seed

    def _decode(self, request: Request, counters: Counters) -> Generation:
        scoring = self._open_scoring(request, counters)
        policy = open_policy(request, counters, self.reader)
        rules = DraftRules(request.eos_ids, request.max_new_tokens)
        candidates = []
        # Computed in another pass, the same tokens may be rewarded a rounding apart.
        known: dict[tuple[int, ...], float] = {}
        for first in range(0, self.samples, self.parallel):
            draws = range(first, min(first + self.parallel, self.samples))
            numbers = [uniforms(self.seed, request.row, draw) for draw in draws]
            with counters.phase("decode"):
                drafts = draw_drafts(policy, self.reader, numbers, rules)
            with counters.phase("reward"):
                (rewards,) = scoring.score([[draft.token_ids for draft in drafts]])
            candidates += [
                Candidate(
                    tuple(draft.token_ids),
                    tuple(draft.entropies),
                    known.setdefault(tuple(draft.token_ids), reward),
                    draft.token_ids[-1] in request.eos_ids,
                )
                for draft, reward in zip(drafts, rewards, strict=True)
            ]
        chosen = best_index([candidate.reward for candidate in candidates])
        trace = Trace()
        trace.append(Segment(len(request.prompt_ids), 0, tuple(candidates), chosen))
        best = candidates[chosen]
        token_ids = list(best.token_ids)
        self._stream(token_ids)
        reason = finish_reason(token_ids, request)
        return Generation(request.prompt_ids, token_ids, reason, best.reward, trace, counters)
