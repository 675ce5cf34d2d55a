"""The kernel benchmarks, run by `python -m benchmarks` or `pytest -s benchmarks/suite.py`."""

from typing import Any

import pytest


def test_turn(turn: Any, contests: Any, benchmark: Any) -> None:
    contest = contests.enter(turn.case, turn.threads)
    if not contest.plays(turn.round):
        pytest.skip("the time of this case is up")
    provider = turn.provider.name
    timings, calls = contest.turn(provider)
    benchmark.extra_info.update(case=turn.case.name, threads=turn.threads, provider=provider)
    benchmark.pedantic(contest.calls[provider], rounds=timings, iterations=calls)
    contest.times[provider] += benchmark.stats.stats.data
