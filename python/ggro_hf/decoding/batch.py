"""Several responses at once: each is a state machine of its own, and what they ask of the models is done together.

A finished response makes room for the next prompt. What a response is does not depend on which others are decoded with
it: rows of a forward pass do not see each other.
"""

import itertools
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, TypeVar

import torch

from ggro_hf.decoding.base import Decoder, Request, check_request, completed, open_policy
from ggro_hf.decoding.work import Decoding, Score, Step, Work, run_alone
from ggro_hf.policy_lane import PolicyLane, SoloLane
from ggro_hf.policy_lanes import Lane, PolicyLanes, lent_lane, takes_lanes
from ggro_hf.reading import Position, TopK
from ggro_hf.results import Counters, Generation
from ggro_hf.rewards import score_segments

_logger = logging.getLogger(__name__)

_W = TypeVar("_W", Score, Step)


class BatchDecoder(Decoder, ABC):
    """A decoder whose responses say what they need of the models, so that several can be decoded at once."""

    def respond_all(self, requests: Iterable[Request], max_batch_tokens: int) -> Iterator[Generation]:
        requests = _Ahead(requests)
        first = requests.look(2)
        models = [request.model for request in first if isinstance(request, Request)]
        # A streamer shows one response after the other.
        if len(first) < 2 or self.streamer is not None or not models or not takes_lanes(models[0]):
            return map(self.respond, requests)
        return Batch(self, requests, max_batch_tokens)

    def _decode(self, request: Request, counters: Counters) -> Generation:
        self._check(request)
        rows = self._rows(alone=True)
        if rows == 1 or not takes_lanes(request.model):
            policy = open_policy(request, counters, self._reader())
            solo = SoloLane(policy)
            decoding = self._decoding(request, solo, policy.position, counters)
            return run_alone(decoding, lambda work: solo.step(work.tokens, run_ahead=work.run_ahead), counters)
        with lent_lane(request.model, self._reader(), request.total, rows) as lanes:
            with counters.phase("prefill"):
                lane, opening = lanes.open(request.prompt_ids, counters)
            decoding = self._decoding(request, lane, opening, counters)
            return run_alone(decoding, lambda work: lane.step(work.tokens), counters)

    def _rows(self, *, alone: bool) -> int:
        """Candidates of a response that are decoded side by side at most, others beside it or `alone`."""
        return 1

    @abstractmethod
    def _reader(self) -> TopK:
        """How it reads the policy's logits."""

    @abstractmethod
    def _check(self, request: Request) -> None:
        """Raise ValueError for a request that the method cannot serve."""

    @abstractmethod
    def _decoding(
        self, request: Request, lane: PolicyLane, opening: Position, counters: Counters
    ) -> Decoding[Generation]:
        """One response; `opening` is the policy's position after the prompt, which is in the lane."""


class _Ahead(Iterator[Request]):
    """Requests that can be looked at ahead; what taking one raises is raised in its turn."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self._requests = iter(requests)
        self._taken: deque[Request | Exception] = deque()

    def look(self, count: int) -> list[Request | Exception]:
        """The next ones, or why there are none; fewer where there are no more."""
        while len(self._taken) < count:
            try:
                self._taken.append(next(self._requests))
            except StopIteration:
                break
            except Exception as error:
                self._taken.append(error)
        return list(itertools.islice(self._taken, count))

    def __next__(self) -> Request:
        following = self._taken.popleft() if self._taken else next(self._requests)
        if isinstance(following, Exception):
            raise following
        return following


@dataclass(eq=False, slots=True)
class _Response:
    """One that is being decoded, and what it waits for."""

    number: int
    request: Request
    lane: Lane
    counters: Counters
    decoding: Decoding[Generation]
    # None where it ran out of memory, and must begin again.
    work: Work | None


class Batch(Iterator[Generation]):
    """Decodes requests in as many lanes as fit `max_batch_tokens` tokens (see `respond_all`); one always does.

    The responses come in the order of the requests. What decoding one raises is raised in its turn; those after it can
    still be had. Out of memory, it goes on with half as many, and decodes the others again later.
    """

    def __init__(self, decoder: BatchDecoder, requests: Iterable[Request], max_batch_tokens: int) -> None:
        self._decoder = decoder
        self._requests = iter(requests)
        self._waiting: deque[tuple[int, Request]] = deque()
        self._max_batch_tokens = max_batch_tokens
        self._most: int | None = None
        self._active: list[_Response] = []
        # How many were active, or about to be, in the pass that is running.
        self._at_once = 0
        self._finished: dict[int, Generation | Exception] = {}
        self._taken = self._returned = 0
        self._lanes: PolicyLanes | None = None

    def __next__(self) -> Generation:
        while self._returned not in self._finished:
            if not self._active and self._peek() is None and self._returned not in self._finished:
                raise StopIteration
            # Tensors made in inference mode cannot take part in the reward's backward pass, even as constants.
            with torch.inference_mode(False), torch.no_grad():
                self._tick()
        result = self._finished.pop(self._returned)
        self._returned += 1
        if isinstance(result, Exception):
            raise result
        return result

    def _tick(self) -> None:
        """Admit what fits, then one reward call and one policy step for all that need one."""
        short = _out_of_memory(self._advance)
        if short is not None:
            self._halve(short)

    def _advance(self) -> None:
        self._admit()
        self._at_once = len(self._active)
        if scores := [(one, one.work) for one in self._active if isinstance(one.work, Score)]:
            self._answer(scores, self._together(self._score, scores))
        if steps := [(one, one.work) for one in self._active if isinstance(one.work, Step)]:
            self._answer(steps, self._together(self._step, steps))

    def _admit(self) -> None:
        while (following := self._peek()) is not None:
            number, request = following
            capacity = max([request.total, *(one.request.total for one in self._active)])
            lanes = len(self._active) + 1
            if lanes > 1 and lanes > min(self._affordable(capacity), self._most or lanes):
                return
            self._at_once = lanes
            try:
                response = self._open(number, request, capacity)
            except Exception as error:
                if _is_out_of_memory(error):
                    if self._active:
                        raise
                    self._lanes = None
                self._fail(number, request, error)
            else:
                self._active.append(response)
            self._waiting.popleft()

    def _affordable(self, capacity: int) -> int:
        """How many lanes of that many tokens there may be, with the columns of the candidates that they have."""
        assert self._lanes is not None
        return self._max_batch_tokens // (capacity + self._lanes.cache.columns)

    def _peek(self) -> tuple[int, Request] | None:
        """The request to begin with next."""
        while not self._waiting:
            try:
                self._waiting.append((self._taken, next(self._requests)))
            except StopIteration:
                return None
            except Exception as error:
                self._finished[self._taken] = error
            self._taken += 1
        return self._waiting[0]

    def _open(self, number: int, request: Request, capacity: int) -> _Response:
        """Begin a response."""
        check_request(request)
        self._decoder._check(request)
        counters = Counters()
        lanes = self._make_lanes(request, capacity)
        with counters.phase("prefill"):
            lane, opening = lanes.open(request.prompt_ids, counters)
        try:
            decoding = self._decoder._decoding(request, lane, opening, counters)
            response = _Response(number, request, lane, counters, decoding, next(decoding))
        except BaseException:
            lanes.close(lane)
            raise
        return response

    def _make_lanes(self, request: Request, capacity: int) -> PolicyLanes:
        used = len(self._active)
        if self._lanes is None:
            self._lanes = PolicyLanes(
                request.model, self._decoder._reader(), 1, capacity, self._decoder._rows(alone=False)
            )
        elif used == self._lanes.cache.lanes or capacity > self._lanes.cache.capacity:
            most = max(used + 1, self._affordable(capacity))
            self._lanes.resize(min(most, self._most or most, max(2 * used, used + 1)), capacity)
        return self._lanes

    def _together(
        self, serve: Callable[[Sequence[tuple[_Response, _W]]], list[Any]], works: Sequence[tuple[_Response, _W]]
    ) -> list[Any]:
        """The answers of a pass; where it fails, each response's own, or why there is none."""
        try:
            return serve(works)
        except Exception as error:
            if _is_out_of_memory(error):
                raise
            if len(works) == 1:
                return [error]
        return [answer for work in works for answer in self._together(serve, [work])]

    def _score(self, scores: Sequence[tuple[_Response, Score]]) -> list[Any]:
        wanted = [work.gradient_tokens for _, work in scores]
        start = perf_counter()
        answers = score_segments([(work.prefix, work.segments) for _, work in scores], wanted)
        self._share(scores, start)
        return answers

    def _step(self, steps: Sequence[tuple[_Response, Step]]) -> list[Any]:
        assert self._lanes is not None
        start = perf_counter()
        positions = self._lanes.step([(one.lane, work.tokens) for one, work in steps])
        self._share(steps, start)
        return positions

    @staticmethod
    def _share(served: Sequence[tuple[_Response, Work]], start: float) -> None:
        """Divide the time of a pass among the responses that it served."""
        each = (perf_counter() - start) / len(served)
        for one, work in served:
            one.counters.add_seconds(work.phase, each)

    def _answer(self, served: Sequence[tuple[_Response, Work]], answers: list[Any]) -> None:
        short: Exception | None = None
        for (one, _), answer in zip(served, answers, strict=True):
            try:
                if isinstance(answer, Exception):
                    one.work = one.decoding.throw(answer)
                else:
                    one.work = one.decoding.send(answer)
            except StopIteration as finished:
                self._finished[one.number] = completed(finished.value, one.request)
                self._close(one)
            except Exception as error:
                if _is_out_of_memory(error):
                    one.work, short = None, error
                else:
                    self._fail(one.number, one.request, error)
                    self._close(one)
        if short is not None:
            raise short

    def _fail(self, number: int, request: Request, error: Exception) -> None:
        error.add_note(f"while decoding row {request.row}")
        self._finished[number] = error

    def _close(self, response: _Response) -> None:
        assert self._lanes is not None
        self._active.remove(response)
        self._lanes.close(response.lane)

    def _halve(self, error: Exception) -> None:
        """Go on with half of the responses; the others begin again when there is room. A single one fails."""
        if self._at_once == 1:
            (only,) = self._active
            self._fail(only.number, only.request, error)
            self._close(only)
            self._lanes = None
            return
        assert self._lanes is not None
        self._most = self._at_once // 2
        _logger.warning("out of memory with %d responses at once; going on with %d", self._at_once, self._most)
        kept = [one for one in self._active if one.work is not None][: self._most]
        self._begin_again([one for one in self._active if one not in kept])
        capacity = max((one.request.total for one in kept), default=0)
        # Even that takes memory, since lanes are copied.
        if _out_of_memory(partial(self._lanes.resize, self._most, capacity)) is not None:
            self._begin_again(kept)
            self._lanes = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _begin_again(self, responses: list[_Response]) -> None:
        """Drop what was decoded of responses; they wait for room."""
        for response in responses:
            response.decoding.close()
            self._close(response)
            self._waiting.append((response.number, response.request))
        self._waiting = deque(sorted(self._waiting, key=lambda waiting: waiting[0]))


def _out_of_memory(work: Callable[[], None]) -> Exception | None:
    """Run something; return what says that memory ran out, without what the failed pass holds on to."""
    try:
        work()
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        return error.with_traceback(None)
    return None


def _is_out_of_memory(error: Exception) -> bool:
    # A CPU's allocator says it in words only.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
