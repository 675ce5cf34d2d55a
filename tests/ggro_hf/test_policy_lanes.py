"""Lanes of the policy against separate forwards of the plain model, and what one lane leaves of the others."""

import numpy as np
import pytest
import torch

from ggro_hf.cache import RewindableCache
from ggro_hf.lanes import _ROOM, _STEP, LaneCache
from ggro_hf.policy_lanes import Lane, PolicyLanes, lent_lane, takes_lanes
from ggro_hf.reading import TopK
from ggro_hf.results import Counters
from tests.ggro_hf.batches import VOCABULARY, policy, prompts
from tests.ggro_hf.small_models import FAMILIES, small_policy

K = 6
EVERY_FAMILY = pytest.mark.parametrize("family", [*FAMILIES, "gpt2", "opt"])


def opened(model, rows, *lengths, capacity=None, lanes=None):
    """Lanes with prompts of these lengths."""
    made = PolicyLanes(model, TopK(K), lanes or len(lengths), capacity or max(lengths) + 40, rows)
    return made, [made.open(prompt, Counters())[0] for prompt in prompts(*lengths)]


@torch.no_grad()
def assert_position(position, model, sequence):
    """The position after a sequence is what one plain forward of it says."""
    logits = model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0, -1].float()
    top = logits.topk(K)
    tolerance = 2e-5 * max(1.0, float(logits.abs().max()))
    assert position.logits == pytest.approx(top.values.tolist(), abs=tolerance, rel=0)
    assert position.logits == pytest.approx(logits[position.tokens].tolist(), abs=tolerance, rel=0)
    assert position.logsumexp == pytest.approx(float(logits.logsumexp(0)), abs=tolerance, rel=0)
    probabilities = logits.softmax(0)
    entropy = -(probabilities * probabilities.clamp_min(1e-30).log()).sum()
    assert position.entropy == pytest.approx(float(entropy), abs=1e-4, rel=0)


def contents(lanes, lane):
    """Copies of all that is in a lane."""
    return [buffer[lane.index].clone() for buffers in lanes.cache.layers for buffer in buffers]


def assert_unchanged(lanes, lane, before):
    for buffer, expected in zip(contents(lanes, lane), before, strict=True):
        assert torch.equal(buffer, expected)


def sees(lanes, lane):
    """Copies of what a lane's rows see: its prefix and what they have added."""
    length, room = len(lane.token_ids), lanes.cache.room
    found = []
    for buffers in lanes.cache.layers:
        found += [buffer[lane.index, :, :length].clone() for buffer in buffers[:2]]
        for row in range(lane.rows):
            start, end = (row * room + offset for offset in lane._spans[row])
            found += [buffer[lane.index, start:end].clone() for buffer in buffers[2:]]
    return found


class Expected:
    """What a lane should hold, by a second bookkeeping: the sequence, and what each row has added."""

    def __init__(self, lane: Lane) -> None:
        self.lane, self.sequence = lane, list(lane.token_ids)
        self.rows: list[list[int]] = [[] for _ in range(lane.rows)]

    def clear_all(self):
        self.rows = [[] for _ in self.rows]


@EVERY_FAMILY
@pytest.mark.parametrize("rows", [1, 3])
def test_whatever_is_done_to_lanes_every_position_is_that_of_a_plain_forward(family, rows):
    """Growing past windows and room, committing, saving, putting back, moving, opening and closing, at random."""
    model = policy(family)
    assert takes_lanes(model)
    random = np.random.default_rng(rows)
    lanes, own = opened(model, rows, 1, _STEP - 2, 6, capacity=32)
    expected = [Expected(lane) for lane in own]
    for round_ in range(90):
        working = [one for one in expected if random.random() < 0.7] or expected[:1]
        works = []
        for one in working:
            chosen = sorted(random.choice(rows, random.integers(1, rows + 1), replace=False).tolist())
            works.append((one, {row: int(random.integers(4, VOCABULARY)) for row in chosen}))
        answers = lanes.step([(one.lane, tokens) for one, tokens in works])
        for (one, tokens), positions in zip(works, answers, strict=True):
            for (row, token), position in zip(tokens.items(), positions, strict=True):
                one.rows[row].append(token)
                if round_ % 3 == 0:
                    assert_position(position, model, one.sequence + one.rows[row])
        for one in list(expected):
            row = int(random.integers(rows))
            match random.integers(50):
                case 0:
                    one.lane.clear(row)
                    one.rows[row] = []
                case 1 if one.rows[row]:
                    count = int(random.integers(len(one.rows[row]) + 1))
                    one.lane.commit(row, count)
                    one.sequence += one.rows[row][:count]
                    kept = one.rows[row][count:]
                    one.clear_all()
                    one.rows[row] = kept
                case 2 if one.rows[row]:
                    branch = one.lane.save(row)
                    assert branch.token_ids == one.rows[row]
                    # Others grow over its place before it comes back.
                    one.lane.clear(row)
                    lanes.step([(one.lane, {row: 7})])
                    one.lane.append(branch)
                    one.sequence += branch.token_ids
                    one.clear_all()
                case 3:
                    sequence = [*one.sequence[: random.integers(1, len(one.sequence) + 1)], 9, 8]
                    assert_position(one.lane.move_to(sequence), model, sequence)
                    one.sequence = sequence
                    one.clear_all()
                case 4 if len(expected) > 1:
                    lanes.close(one.lane)
                    expected.remove(one)
                case 5 if len(expected) < 4:
                    if len(expected) == lanes.cache.lanes:
                        lanes.resize(len(expected) + 1, lanes.cache.capacity)
                    (prompt,) = prompts(int(random.integers(1, 30)))
                    lane, position = lanes.open(prompt, Counters())
                    assert_position(position, model, prompt)
                    expected.append(Expected(lane))
                case _:
                    pass
        assert [one.lane.token_ids for one in expected] == [one.sequence for one in expected]
        assert sorted(one.lane.index for one in expected) == list(range(len(expected)))
    assert lanes.cache.room > _ROOM
    assert lanes.cache.capacity > _STEP


@pytest.mark.parametrize("rows", [1, 3])
def test_work_in_one_lane_leaves_the_others_bitwise_as_they_were(rows):
    model = policy()
    lanes, (first, second, third) = opened(model, rows, 5, 9, 7)
    everybody = [(lane, dict.fromkeys(range(rows), 11)) for lane in (first, second, third)]
    for _ in range(4):
        lanes.step(everybody)
    before = {lane: sees(lanes, lane) for lane in (first, third)}

    def others_are_unchanged():
        for lane, expected in before.items():
            for now, then in zip(sees(lanes, lane), expected, strict=True):
                assert torch.equal(now, then)

    lanes.step([(second, {0: 20})])
    others_are_unchanged()
    whole = {lane: contents(lanes, lane) for lane in (first, third)}
    second.clear(0)
    branch = second.save(rows - 1)
    second.commit(rows - 1, 2)
    second.append(branch)
    second.move_to([5, 6, 7])
    for lane, expected in whole.items():
        assert_unchanged(lanes, lane, expected)
    second.move_to([5] * (lanes.cache.capacity + 10))
    others_are_unchanged()
    lanes.cache.widen()
    others_are_unchanged()
    lanes.close(second)
    assert [first.index, third.index] == [0, 1]
    others_are_unchanged()
    fourth, _ = lanes.open([8, 9], Counters())
    assert fourth.index == 2
    others_are_unchanged()


def test_a_rewound_row_leaves_the_other_rows_bitwise_as_they_were():
    lanes, (lane, _) = opened(policy(), 3, 5, 9)
    for token in (11, 12, 13):
        lanes.step([(lane, {0: token, 1: token + 1, 2: token + 2})])
    before = [lane.save(row) for row in range(3)]
    lane.clear(1)
    lanes.step([(lane, {1: 30})])
    for row in (0, 2):
        after = lane.save(row)
        assert after.token_ids == before[row].token_ids
        for (keys, values), (other_keys, other_values) in zip(after.layers, before[row].layers, strict=True):
            assert torch.equal(keys, other_keys) and torch.equal(values, other_values)
    assert lane.save(1).token_ids == [30]


@torch.inference_mode()
def test_what_a_closed_lane_leaves_is_not_seen():
    """NaN included: a mask that multiplies by zero would let it through."""
    model = policy()
    lanes, (first, second) = opened(model, 2, 5, 9)
    for buffers in lanes.cache.layers:
        for buffer in buffers:
            buffer[second.index] = torch.nan
    lanes.close(second)
    lane, position = lanes.open([5, 6, 7], Counters())
    assert_position(position, model, [5, 6, 7])
    for index in range(3):
        found, other = lanes.step([(lane, {0: 10 + index, 1: 20 + index}), (first, {0: 30 + index})])
        sequence = [5, 6, 7, *range(10, 11 + index)]
        assert_position(found[0], model, sequence)
        assert_position(found[1], model, [5, 6, 7, *range(20, 21 + index)])
        assert_position(other[0], model, first.token_ids + list(range(30, 31 + index)))


def test_rows_that_are_nan_fail_alone():
    model = small_policy(seed=1, vocabulary=VOCABULARY, gain=3.0, dtype=torch.float32)
    model.get_input_embeddings().weight[60] = torch.nan
    model.get_output_embeddings().weight[60] = 0.0
    lanes = PolicyLanes(model, TopK(K), 2, 20, 1)
    first, second = (lanes.open(prompt, Counters())[0] for prompt in ([4, 5, 6], [7, 8]))
    (failed,), positions = lanes.step([(first, {0: 60}), (second, {0: 9})])
    assert isinstance(failed, FloatingPointError)
    assert_position(positions[0], model, [7, 8, 9])
    (failed,) = first.step({0: 10})
    assert "NaN" in str(failed)
    # A prompt that cannot be read takes no lane.
    with pytest.raises(FloatingPointError, match="NaN"):
        PolicyLanes(model, TopK(K), 1, 20, 1).open([5, 60], Counters())
    lanes.close(first)
    with pytest.raises(FloatingPointError, match="NaN"):
        lanes.open([5, 60], Counters())
    assert lanes.lanes == [second]
    third, _ = lanes.open([4, 5], Counters())
    assert (third.index, second.index) == (1, 0)
    assert_position(third.step({0: 6})[0], model, [4, 5, 6])


@torch.inference_mode()
@pytest.mark.parametrize(("lanes", "capacity"), [(1, 1), (2, 64), (4, 65), (3, 200)])
def test_resized_buffers_keep_what_fits(lanes, capacity):
    cache = LaneCache(policy(), 3, 128, 2)
    for buffers in cache.layers:
        for buffer in buffers:
            buffer.normal_()
    before = [[buffer.clone() for buffer in buffers] for buffers in cache.layers]
    cache.widen()
    cache.resize(lanes, capacity)
    assert (cache.lanes, cache.capacity) == (lanes, -(-capacity // _STEP) * _STEP)
    kept, tokens = min(lanes, 3), min(cache.capacity, 128)
    for buffers, old in zip(cache.layers, before, strict=True):
        for now, then in zip(buffers[:2], old[:2], strict=True):
            assert now.shape[0] == lanes and now.shape[2] == cache.capacity
            assert torch.equal(now[:kept, :, :tokens], then[:kept, :, :tokens])
        for now, then in zip(buffers[2:], old[2:], strict=True):
            assert now.shape[:2] == (lanes, cache.columns)
            for row in range(2):
                start = row * cache.room
                own = then[:kept, row * _ROOM : (row + 1) * _ROOM]
                assert torch.equal(now[:kept, start : start + _ROOM], own)


def test_no_lane_is_cut_short():
    lanes, (lane,) = opened(policy(), 1, 100)
    lanes.resize(1, 0)
    assert lanes.cache.capacity >= 100
    assert_position(lane.step({0: 5})[0], policy(), [*lane.token_ids, 5])


def test_counters_count_what_was_read():
    lanes, (first, second) = opened(policy(), 2, 5, 9)
    assert (first.counters.policy_tokens, second.counters.policy_tokens) == (5, 9)
    lanes.step([(first, {0: 5, 1: 6}), (second, {1: 7})])
    assert (first.counters.policy_tokens, second.counters.policy_tokens) == (7, 10)
    first.move_to([*first.token_ids[:3], 1, 2])
    assert first.counters.policy_tokens == 9


def test_a_single_lane_is_lent_again():
    model = policy()
    with lent_lane(model, TopK(K), 50, 2) as lanes:
        lane, _ = lanes.open(prompts(7)[0], Counters())
        lane.step({0: 5, 1: 6})
    with lent_lane(model, TopK(K), 300, 2) as again:
        assert again is lanes
        assert again.lanes == []
        assert again.cache.capacity >= 300
        prompt = prompts(250)[0]
        lane, position = again.open(prompt, Counters())
        assert_position(position, model, prompt)
        with lent_lane(model, TopK(K), 300, 2) as other:
            assert other is not again


def test_the_prefix_of_a_lane_is_a_cache():
    lanes, (lane,) = opened(policy(), 1, 9)
    cache = lanes.cache.prefix(lane.index, 9)
    assert isinstance(cache, RewindableCache)
    assert cache.get_seq_length() == 9
