"""Gradient-guided reward optimisation: at high-entropy positions, the token that the reward's gradient prefers."""

from transformers.generation.streamers import BaseStreamer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ggro_hf.decoding.base import Request
from ggro_hf.decoding.candidates import EndRules
from ggro_hf.decoding.guided import check_positive
from ggro_hf.decoding.released import ClampedTopK, decode_as_released, released_rules
from ggro_hf.decoding.segment_search import SearchSettings, SegmentSearch
from ggro_hf.decoding.segments import SegmentDecoder
from ggro_hf.decoding.speculation import MOST_ROWS, Speculation
from ggro_hf.decoding.work import Decoding
from ggro_hf.policy_lane import PolicyLane
from ggro_hf.prompts import Prompt, released_prompt
from ggro_hf.reading import Position, TopK
from ggro_hf.results import Counters, Generation
from ggro_hf.rewards import RewardModel


class GGRO(SegmentDecoder):
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
        speculate: candidates decoded side by side where a response is decoded by itself, those that the next
            interventions will probably ask for beside the one asked for; 1 for none. `None` chooses by what a batch
            costs, measured on the first response. The response does not depend on it.

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
        speculate: int | None = None,
        streamer: BaseStreamer | None = None,
    ) -> None:
        super().__init__(
            reward,
            tokenizer=tokenizer,
            entropy_threshold=entropy_threshold,
            candidates=candidates,
            check_every=check_every,
            insertion_offset=insertion_offset if insertion_offset is not None else (4 if as_released else 0),
            streamer=streamer,
        )
        check_positive(refinements=refinements, nudge_tokens=nudge_tokens)
        if perplexity_ratio is not None and not perplexity_ratio >= 1:
            raise ValueError(f"perplexity_ratio is {perplexity_ratio}, but must be at least 1 (or None for no limit)")
        if as_released and tokenizer is None:
            raise ValueError("as_released keeps its state as text and needs tokenizer=")
        if speculate is not None:
            check_positive(speculate=speculate)
        self.refinements = refinements
        self.nudge_tokens = nudge_tokens
        self.perplexity_ratio = perplexity_ratio
        self.as_released = as_released
        self.speculate = speculate

    def encode_prompt(self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
        if self.as_released:
            return released_prompt(tokenizer, prompt, prefill_attack=self.insertion_offset == 0)
        return super().encode_prompt(tokenizer, prompt)

    def _rows(self, *, alone: bool) -> int:
        # Several responses fill a pass by themselves; without a second refinement there is nothing to speculate about.
        if not alone or self.refinements <= 2 or self.nudge_tokens > 1:
            return 1
        return min(MOST_ROWS if self.speculate is None else self.speculate, self.candidates)

    def _reader(self) -> TopK:
        return ClampedTopK(self.candidates) if self.as_released else super()._reader()

    def _decoding(
        self, request: Request, lane: PolicyLane, opening: Position, counters: Counters
    ) -> Decoding[Generation]:
        if not self.as_released:
            return (yield from super()._decoding(request, lane, opening, counters))
        assert self.tokenizer is not None
        rules = released_rules(self.tokenizer, request.eos_ids)
        search = self._open_search(request, lane, opening, counters, rules)
        return (yield from decode_as_released(request, self.tokenizer, search, self.insertion_offset, self._stream))

    def _open_search(
        self, request: Request, lane: PolicyLane, opening: Position, counters: Counters, rules: EndRules
    ) -> SegmentSearch:
        settings = SearchSettings(
            entropy_threshold=self.entropy_threshold,
            refinements=self.refinements,
            check_every=self.check_every,
            nudge_tokens=self.nudge_tokens,
            perplexity_ratio=self.perplexity_ratio,
            total=request.total,
        )
        prefix = self._open_prefix(request, counters)
        return SegmentSearch(
            settings, rules, lane, opening, prefix, counters, Speculation(lane, prefix, self.speculate)
        )
