"""Ancestral sampling with temperature, top-k and top-p."""

from transformers.generation.streamers import BaseStreamer

from ggro_hf.decoding.base import Decoder, Request, finish_reason, open_policy
from ggro_hf.decoding.drawing import Warped, uniforms
from ggro_hf.results import Counters, Generation, Trace


class Sample(Decoder):
    """Tokens drawn from the policy: temperature, then top-k, then top-p.

    The draws of a row depend on `seed` and the row's number alone, not on the batch or the device. Raises ValueError
    for settings out of range.
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        streamer: BaseStreamer | None = None,
    ) -> None:
        super().__init__(streamer=streamer)
        self.reader = Warped(temperature, top_k, top_p)
        self.seed = seed

    def _decode(self, request: Request, counters: Counters) -> Generation:
        policy = open_policy(request, counters, self.reader)
        numbers = uniforms(self.seed, request.row)
        token_ids: list[int] = []
        trace = Trace()
        with counters.phase("decode"):
            while True:
                (token,), entropy = policy.position.draw(numbers.random(1))
                token_ids.append(token)
                trace.entropies += entropy
                self._stream([token])
                if token in request.eos_ids or len(token_ids) == request.max_new_tokens:
                    break
                policy.extend([token])
        return Generation(request.prompt_ids, token_ids, finish_reason(token_ids, request), None, trace, counters)
