"""Greedy decoding: the likeliest token, always."""

from ggro_hf.decoding.base import Decoder, Request, finish_reason, open_policy
from ggro_hf.reading import TopK
from ggro_hf.results import Counters, Generation, Trace


class Greedy(Decoder):
    """The policy's likeliest token at every step; the lowest id of equals. Same as `generate(do_sample=False)`."""

    def _decode(self, request: Request, counters: Counters) -> Generation:
        policy = open_policy(request, counters, TopK(1))
        token_ids: list[int] = []
        entropies: list[float] = []
        with counters.phase("decode"):
            while True:
                token = policy.position.tokens[0]
                token_ids.append(token)
                entropies.append(policy.position.entropy)
                self._stream([token])
                if token in request.eos_ids or len(token_ids) == request.max_new_tokens:
                    break
                policy.extend([token], run_ahead=len(token_ids) + 1 < request.max_new_tokens)
        reason = finish_reason(token_ids, request)
        return Generation(request.prompt_ids, token_ids, reason, None, Trace(entropies), counters)
