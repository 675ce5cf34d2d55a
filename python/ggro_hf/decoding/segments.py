"""What decoders share whose response grows by segments, each the best of candidates that a reward model scores."""

import math
from abc import abstractmethod

from transformers.generation.streamers import BaseStreamer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ggro_hf.decoding.base import Request, check_candidates, finish_reason
from ggro_hf.decoding.batch import BatchDecoder
from ggro_hf.decoding.candidates import EndRules
from ggro_hf.decoding.guided import GuidedDecoder, check_positive
from ggro_hf.decoding.segment_decoding import SegmentDecoding
from ggro_hf.decoding.work import Decoding
from ggro_hf.models import check_room, context_length
from ggro_hf.policy_lane import PolicyLane
from ggro_hf.reading import Position, TopK
from ggro_hf.results import Counters, Generation, Trace
from ggro_hf.rewards import RewardModel, RewardPrefix


class SegmentDecoder(BatchDecoder, GuidedDecoder):
    """Greedy decoding in segments that end before a high-entropy token, of which a reward model chooses each."""

    def __init__(
        self,
        reward: RewardModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None,
        entropy_threshold: float,
        candidates: int,
        check_every: int,
        insertion_offset: int,
        streamer: BaseStreamer | None,
    ) -> None:
        if not isinstance(reward, RewardModel):
            raise TypeError(
                f"reward is a {type(reward).__name__}, but {type(self).__name__} needs a RewardModel, which reads the "
                "policy's token ids and has gradients; ARGS, ChunkBeamSearch, CARDS and BestOfN do without"
            )
        super().__init__(reward, tokenizer=tokenizer, streamer=streamer)
        check_positive(candidates=candidates, check_every=check_every)
        if math.isnan(entropy_threshold):
            raise ValueError("entropy_threshold is NaN, but must be a number of nats")
        self.reward: RewardModel = reward
        self.entropy_threshold = entropy_threshold
        self.candidates = candidates
        self.check_every = check_every
        self.insertion_offset = insertion_offset

    def _check(self, request: Request) -> None:
        check_candidates(request.model, self.candidates)
        check_room("reward model", context_length(self.reward.model), len(request.prompt_ids), request.max_new_tokens)

    def _reader(self) -> TopK:
        return TopK(self.candidates)

    def _decoding(
        self, request: Request, lane: PolicyLane, opening: Position, counters: Counters
    ) -> Decoding[Generation]:
        """One response, from the policy's position after the prompt on."""
        rules = EndRules(request.eos_ids, lambda token_ids: token_ids[-1] in request.eos_ids)
        search = self._open_search(request, lane, opening, counters, rules)
        trace = Trace()
        token_ids: list[int] = []
        while not search.complete:
            segment = yield from search.refine(0 if trace.segments else self.insertion_offset)
            trace.append(segment)
            token_ids += segment.chosen.token_ids
            self._stream(list(segment.chosen.token_ids))
        return Generation(
            request.prompt_ids, token_ids, finish_reason(token_ids, request), search.reward, trace, counters
        )

    @abstractmethod
    def _open_search(
        self, request: Request, lane: PolicyLane, opening: Position, counters: Counters, rules: EndRules
    ) -> SegmentDecoding:
        """A search whose models hold the prompt."""

    def _open_prefix(self, request: Request, counters: Counters) -> RewardPrefix:
        """The reward model with the prompt in its cache, and room for the response."""
        prefix = RewardPrefix(self.reward, counters, capacity=request.total)
        with counters.phase("reward"):
            prefix.extend(list(request.prompt_ids))
        return prefix
