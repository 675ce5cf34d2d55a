"""Greedy decoding: the likeliest token, always."""

from ggro_hf.decoding.base import Decoder, Request, finish_reason, open_policy, read_position
from ggro_hf.results import Counters, Generation, Trace


class Greedy(Decoder):
    """The policy's likeliest token at every step; the lowest id of equals. Same as `generate(do_sample=False)`."""

    def _decode(self, request: Request, counters: Counters) -> Generation:
        policy = open_policy(request, counters)
        token_ids: list[int] = []
        entropies: list[float] = []
        with counters.phase("decode"):
            while True:
                position = read_position(policy.logits, 1)
                token = position.tokens[0]
                token_ids.append(token)
                entropies.append(position.entropy)
                self._stream([token])
                if token in request.eos_ids or len(token_ids) == request.max_new_tokens:
                    break
                policy.extend([token])
        reason = finish_reason(token_ids, request)
        return Generation(request.prompt_ids, token_ids, reason, None, Trace(entropies), counters)
