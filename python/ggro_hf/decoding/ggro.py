"""Gradient-guided reward optimisation: at high-entropy positions, the token that the reward's gradient prefers."""

import math

from transformers.generation.streamers import BaseStreamer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ggro_hf.decoding.base import Request, check_candidates, finish_reason, open_policy
from ggro_hf.decoding.guided import GuidedDecoder, check_positive
from ggro_hf.decoding.released import ClampedTopK, decode_as_released, released_rules
from ggro_hf.decoding.segment_search import EndRules, SearchSettings, SegmentSearch
from ggro_hf.models import check_room, context_length
from ggro_hf.prompts import Prompt, released_prompt
from ggro_hf.reading import Position, Reader, TopK
from ggro_hf.results import Counters, Generation, Trace
from ggro_hf.rewards import RewardModel, RewardPrefix


class GGRO(GuidedDecoder):
    """Greedy decoding in segments that end before a high-entropy token, each refined by single-token interventions.

    A segment is first decoded greedily. While refinements remain, the reward's gradient at the segment's first token
    (at `insertion_offset` in the first segment) ranks the policy's `candidates` likeliest tokens there; the best one
    is forced and the segment decoded again. The candidate with the largest reward becomes part of the response.
    Published by the GGRO authors; the semantics are those of their released code with its defects mended, or
    reproduced with `as_released=True`.

    Args:
        reward: reward model that reads the policy's token ids.
        tokenizer: the policy's; checks that the vocabularies agree. Required by `as_released`.
        entropy_threshold: nats at which a token ends the segment before it.
        refinements: passes per segment, the un-nudged one included.
        candidates: number of likeliest tokens that compete for a position.
        check_every: only every n-th token of a segment may end it.
        nudge_tokens: most consecutive tokens that one intervention replaces.
        perplexity_ratio: largest perplexity of a candidate relative to the un-nudged one that may still win.
        as_released: the released code's behaviour token for token: state kept as text between segments, entropy with
            clamped probabilities, every end-of-sequence id stops but only the tokenizer's finishes.
        insertion_offset: offset of the first segment's nudged token; `None` is 4 as released (the assistant's header),
            else 0.

    Raises ValueError for settings out of range; see `Decoder` for the ways to call it.
    """

    def __init__(
        self,
        reward: RewardModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        entropy_threshold: float = 1.5,
        refinements: int = 8,
        candidates: int = 25,
        check_every: int = 1,
        nudge_tokens: int = 1,
        perplexity_ratio: float | None = None,
        as_released: bool = False,
        insertion_offset: int | None = None,
        streamer: BaseStreamer | None = None,
    ) -> None:
        if not isinstance(reward, RewardModel):
            raise TypeError(
                f"reward is a {type(reward).__name__}, but GGRO needs the gradients of a RewardModel, which reads the "
                "policy's token ids; ARGS, ChunkBeamSearch, CARDS and BestOfN do without"
            )
        super().__init__(reward, tokenizer=tokenizer, streamer=streamer)
        check_positive(
            refinements=refinements, candidates=candidates, check_every=check_every, nudge_tokens=nudge_tokens
        )
        if math.isnan(entropy_threshold):
            raise ValueError("entropy_threshold is NaN, but must be a number of nats")
        if perplexity_ratio is not None and not perplexity_ratio >= 1:
            raise ValueError(f"perplexity_ratio is {perplexity_ratio}, but must be at least 1 (or None for no limit)")
        if as_released and tokenizer is None:
            raise ValueError("as_released keeps its state as text and needs tokenizer=")
        self.reward: RewardModel = reward
        self.entropy_threshold = entropy_threshold
        self.refinements = refinements
        self.candidates = candidates
        self.check_every = check_every
        self.nudge_tokens = nudge_tokens
        self.perplexity_ratio = perplexity_ratio
        self.as_released = as_released
        self.insertion_offset = insertion_offset if insertion_offset is not None else (4 if as_released else 0)

    def encode_prompt(self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
        if self.as_released:
            return released_prompt(tokenizer, prompt, prefill_attack=self.insertion_offset == 0)
        return super().encode_prompt(tokenizer, prompt)

    def _decode(self, request: Request, counters: Counters) -> Generation:
        check_candidates(request.model, self.candidates)
        check_room("reward model", context_length(self.reward.model), len(request.prompt_ids), request.max_new_tokens)
        if self.as_released:
            assert self.tokenizer is not None
            rules = released_rules(self.tokenizer, request.eos_ids)
            search = self._open_search(request, counters, rules, ClampedTopK(self.candidates))
            return decode_as_released(request, self.tokenizer, search, self.insertion_offset, self._stream)
        rules = EndRules(request.eos_ids, lambda token_ids: token_ids[-1] in request.eos_ids)
        search = self._open_search(request, counters, rules, TopK(self.candidates))
        trace = Trace()
        token_ids: list[int] = []
        while not search.complete:
            segment = search.refine(0 if trace.segments else self.insertion_offset)
            trace.append(segment)
            token_ids += segment.chosen.token_ids
            self._stream(list(segment.chosen.token_ids))
        return Generation(
            request.prompt_ids, token_ids, finish_reason(token_ids, request), search.reward, trace, counters
        )

    def _open_search(
        self, request: Request, counters: Counters, rules: EndRules, reader: Reader[Position]
    ) -> SegmentSearch:
        """A search whose models hold the prompt."""
        settings = SearchSettings(
            entropy_threshold=self.entropy_threshold,
            refinements=self.refinements,
            check_every=self.check_every,
            nudge_tokens=self.nudge_tokens,
            perplexity_ratio=self.perplexity_ratio,
            total=len(request.prompt_ids) + request.max_new_tokens,
        )
        policy = open_policy(request, counters, reader)
        prefix = RewardPrefix(self.reward, counters, capacity=settings.total)
        with counters.phase("reward"):
            prefix.extend(list(request.prompt_ids))
        return SegmentSearch(settings, rules, policy, prefix, counters)
