"""The published GGRO algorithm, written out step by step: the reference that the engine is tested against.

Nothing here is fast and nothing is shared with the engine. Every pass encodes the whole sequence again, the gradient
comes from autograd on a one-hot leaf, duplicates are generated and scored before they are recognised. With
`released_cost` a pass has the KV cache that the released code has, and does what that code does on top without an
effect on the output: vocabulary-sized tensors that grow by concatenation, a reward pass over the policy's probabilities
that is thrown away, the mean of the bias at every token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import nan
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import StopStringCriteria

END_OF_TURN = "<|eot_id|>"
MASK_OF_CURRENT_TOKEN = 1e-10
FORCING_COEFFICIENT = 1e7
TOKENS_BEFORE_AN_ENTROPY_STOP = 4


class StateRepeats(RuntimeError):
    """The algorithm came back to a state that it had already been in, so it would never end."""


@dataclass(frozen=True)
class Settings:
    """What varies between the released code and the engine's default; the values are those of the released code."""

    max_new_tokens: int
    entropy_threshold: float = 1.5
    refinements: int = 8
    candidates: int = 25
    stop_ids: frozenset[int] = frozenset()
    finish_ids: frozenset[int] = frozenset()
    state: Literal["text", "ids"] = "text"
    insertion_offset: int = 4
    probability_floor: float = 1e-9
    forcing: Literal["bias", "id"] = "bias"
    released_cost: bool = False


@dataclass
class Candidate:
    """One pass: `raw_ids` with the token that was dropped, `ids` without it; entropies belong to `raw_ids`."""

    ids: list[int]
    raw_ids: list[int]
    entropies: list[float]
    reward: float
    finished: bool
    forced: int | None
    duplicate: bool = False
    proposal: int | None = None
    top_ids: list[int] = field(default_factory=list)
    top_scores: list[float] = field(default_factory=list)


@dataclass
class Segment:
    """`start` is the length of the sequence before the segment."""

    start: int
    insertion_offset: int
    prefix_ids: list[int]
    candidates: list[Candidate]
    best: int


@dataclass
class Result:
    """`ids` and `text` are the whole sequence; `generated_ids` is the sequence before its last re-tokenisation."""

    ids: list[int]
    generated_ids: list[int]
    text: str | None
    segments: list[Segment]
    boundaries: list[int]
    reward: float
    policy_tokens: int
    reward_forward_tokens: int
    reward_backward_tokens: int

    @property
    def nudges(self) -> int:
        return sum(segment.best > 0 for segment in self.segments)


@dataclass
class Pass:
    """What one pass leaves: ids with the prefix, and one row of each vocabulary-sized tensor for every position."""

    ids: list[int]
    raw_ids: list[int]
    entropies: list[float]
    finished: bool
    base_logits: Tensor
    probabilities: Tensor
    straight_through: Tensor


class ReleasedGGRO:
    """Runs the algorithm for one prompt at a time; `tokenizer` is needed where the state is text."""

    def __init__(self, policy: nn.Module, reward: nn.Module, tokenizer: Any, settings: Settings) -> None:
        self.policy, self.reward, self.tokenizer, self.settings = policy, reward, tokenizer, settings
        self.policy_tokens = self.reward_forward_tokens = self.reward_backward_tokens = 0
        embedding = policy.get_input_embeddings()
        self.vocabulary = embedding.weight.shape[0]
        self.policy_table = embedding.weight.detach()
        reward_embedding = reward.get_input_embeddings()
        if type(reward_embedding) is nn.Embedding:
            self.reward_table = reward_embedding.weight.detach()
        else:
            # Gemma scales the embedding inside the module, which `inputs_embeds` bypasses.
            self.reward_table = reward_embedding(torch.arange(reward_embedding.weight.shape[0])).detach()
        self.reward_table = self.reward_table[: self.vocabulary]
        self.dtype = torch.promote_types(policy.dtype, torch.float32)
        self.stop_string = StopStringCriteria(tokenizer, END_OF_TURN) if settings.state == "text" else None

    def __call__(self, prompt_ids: Sequence[int]) -> Result:
        """The outer loop."""
        settings = self.settings
        self.policy_tokens = self.reward_forward_tokens = self.reward_backward_tokens = 0
        start, total = len(prompt_ids), len(prompt_ids) + settings.max_new_tokens
        segments: list[Segment] = []
        boundaries: list[int] = []
        states: set[tuple[int, ...]] = set()
        text, ids = None, list(prompt_ids)
        if settings.state == "text":
            text = self.decode(ids)
        while True:
            if text is not None:
                ids = self.encode(text)
            # The first segment is a state of its own: its offset differs.
            if segments:
                if tuple(ids) in states:
                    raise StateRepeats(
                        f"segment {len(segments)} starts with ids that a segment has started with before"
                    )
                states.add(tuple(ids))
            segment = self.segment(ids, total, settings.insertion_offset if not segments else 0)
            segments.append(segment)
            best = segment.candidates[segment.best]
            ids = best.ids
            if text is None:
                boundaries.append(len(ids) - best.finished)
            else:
                text = self.decode(ids)
                boundaries.append(len(self.encode(text.removesuffix(END_OF_TURN))))
            if best.finished or boundaries[-1] - start >= settings.max_new_tokens:
                break
            if text is not None:
                text = text.removesuffix(END_OF_TURN)
        final_ids = ids if text is None else self.encode(text)
        with torch.no_grad():
            reward = self.reward(input_ids=torch.tensor([final_ids])).logits[0, 0].item()
        return Result(
            ids=final_ids,
            generated_ids=ids,
            text=text,
            segments=segments,
            boundaries=boundaries,
            reward=reward,
            policy_tokens=self.policy_tokens,
            reward_forward_tokens=self.reward_forward_tokens,
            reward_backward_tokens=self.reward_backward_tokens,
        )

    def decode(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        # transformers 5 ignores this setting of byte-level tokenizers; the version that the release pins applied it.
        return self.tokenizer.clean_up_tokenization(text) if self.tokenizer.clean_up_tokenization_spaces else text

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def segment(self, prefix: list[int], total: int, offset: int) -> Segment:
        """All refinements of one segment; each nudge comes from the candidate before it, the best of them stays."""
        settings = self.settings
        candidates: list[Candidate] = []
        best, best_reward = None, float("-inf")
        proposals: Tensor | None = None
        for iteration in range(settings.refinements):
            # A candidate that keeps no token at the offset has no bias there: the next pass repeats it.
            forced = int(proposals[offset]) if proposals is not None and len(proposals) > offset else None
            bias = None
            if settings.forcing == "bias":
                bias = self.distance_bias(proposals, len(prefix), total)
            generated = self.decode_pass(prefix, total, offset, forced, bias)
            leaf, reward = self.score(generated)
            candidate = Candidate(
                ids=generated.ids,
                raw_ids=generated.raw_ids[len(prefix) :],
                entropies=generated.entropies,
                reward=float(reward.detach()),
                finished=generated.finished,
                forced=forced,
                duplicate=any(generated.ids == earlier.ids for earlier in candidates),
            )
            candidates.append(candidate)
            if candidate.duplicate:
                break
            if candidate.reward > best_reward:
                best, best_reward = iteration, candidate.reward
            proposals, top_ids, top_scores = self.propose(generated, leaf, reward, len(prefix))
            if len(proposals) > offset:
                candidate.proposal = int(proposals[offset])
                candidate.top_ids, candidate.top_scores = top_ids[offset].tolist(), top_scores[offset].tolist()
        if best is None:
            raise FloatingPointError("no candidate of the segment has a reward")
        return Segment(len(prefix), offset, list(prefix), candidates, best)

    @torch.no_grad()
    def decode_pass(self, prefix: list[int], total: int, offset: int, forced: int | None, bias: Tensor | None) -> Pass:
        """Decode greedily until a stop token, a high entropy or the full length; drop the last token."""
        settings, ids, entropies = self.settings, list(prefix), []
        one_hot = nn.functional.one_hot(torch.tensor(prefix), self.vocabulary).to(self.dtype)
        rows: dict[str, list[Tensor]] = {
            "base": [one_hot],
            "biased": [one_hot],
            "soft": [one_hot],
            "straight": [one_hot],
        }
        cache = None
        while len(ids) < total:
            if settings.released_cost:
                # The released code has a KV cache within a pass, and only there.
                new = ids if cache is None else ids[-1:]
                output = self.policy(
                    input_ids=torch.tensor([new]), past_key_values=cache, use_cache=True, logits_to_keep=1
                )
                cache = output.past_key_values
            else:
                new = ids
                output = self.policy(input_ids=torch.tensor([new]), use_cache=False)
            self.policy_tokens += len(new)
            base = output.logits[0, -1]
            position, biased = len(ids), base
            if bias is not None:
                scale = 1.0
                # The released code tests the mean over the whole bias at every token.
                bias_given = bias.mean().item() != 0 if settings.released_cost else forced is not None
                if bias_given and len(bias) > position:
                    scale = base.norm() / bias[position].norm()
                if forced is not None and position - len(prefix) == offset:
                    biased = base + FORCING_COEFFICIENT * scale * bias[position]
            elif forced is not None and position - len(prefix) == offset:
                biased = torch.full_like(base, float("-inf"))
                biased[forced] = 0.0
            token = int(biased.argmax())
            ids.append(token)

            probabilities = biased.to(self.dtype).softmax(-1)
            chosen = nn.functional.one_hot(torch.tensor(token), self.vocabulary).to(self.dtype)
            straight = chosen - probabilities + probabilities
            for name, row in (("base", base), ("biased", biased), ("soft", probabilities), ("straight", straight)):
                rows[name].append(row.to(self.dtype)[None])
                if settings.released_cost:
                    rows[name] = [torch.cat(rows[name])]

            # The released code looks at the entropy only where it may stop.
            looks = not settings.released_cost or len(entropies) + 1 >= TOKENS_BEFORE_AN_ENTROPY_STOP
            entropies.append(self.entropy(base) if looks else nan)
            if token in settings.stop_ids or len(ids) >= total:
                break
            if self.stop_string is not None and bool(self.stop_string(torch.tensor([ids]), None)):
                break
            if len(entropies) >= TOKENS_BEFORE_AN_ENTROPY_STOP and entropies[-1] >= settings.entropy_threshold:
                break
            if settings.released_cost and self.tokenizer is not None:
                self.tokenizer.decode(token)
        finished = ids[-1] in settings.finish_ids
        kept = len(ids) if finished or len(ids) == total else len(ids) - 1
        return Pass(
            ids=ids[:kept],
            raw_ids=ids,
            entropies=entropies,
            finished=finished,
            base_logits=torch.cat(rows["base"])[:kept],
            probabilities=torch.cat(rows["soft"])[:kept],
            straight_through=torch.cat(rows["straight"])[:kept],
        )

    def entropy(self, logits: Tensor) -> float:
        """Entropy in nats; with a floor, the probabilities are not normalised again."""
        probabilities = logits.to(self.dtype).softmax(-1)
        if self.settings.probability_floor > 0:
            probabilities = probabilities.clamp_min(self.settings.probability_floor)
        return torch.special.entr(probabilities).sum().item()

    def score(self, generated: Pass) -> tuple[Tensor, Tensor]:
        """Reward of the sequence as a function of the one-hot leaf."""
        leaf = generated.straight_through.detach().requires_grad_(True)
        reward = self.reward_of(leaf)
        if self.settings.released_cost:
            self.reward_of(generated.probabilities.detach().requires_grad_(True))
        return leaf, reward

    def reward_of(self, rows: Tensor) -> Tensor:
        embeddings = rows.to(self.reward_table.dtype) @ self.reward_table
        self.reward_forward_tokens += len(rows)
        return self.reward(inputs_embeds=embeddings[None]).logits[0, 0]

    def propose(self, generated: Pass, leaf: Tensor, reward: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """For every kept position: the proposed id, the ids of the policy's likeliest tokens, and their scores."""
        (gradient,) = torch.autograd.grad(-reward, leaf)
        self.reward_backward_tokens += len(leaf)
        current = torch.tensor(generated.ids[start:], dtype=torch.long)
        mask = torch.ones_like(gradient[start:])
        mask[torch.arange(len(current)), current] = MASK_OF_CURRENT_TOKEN
        scores = -(gradient[start:] * mask)
        base_logits = generated.base_logits[start:]
        k = min(self.settings.candidates, self.vocabulary)
        if self.settings.released_cost:
            top_ids = base_logits.topk(k).indices
        else:
            # A stable sort lets the lower id win a tie.
            top_ids = base_logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]
        top_scores = scores.gather(-1, top_ids)
        proposals = top_ids.gather(-1, top_scores.argmax(-1, keepdim=True))[:, 0]
        return proposals, top_ids, top_scores

    @torch.no_grad()
    def distance_bias(self, proposals: Tensor | None, start: int, total: int) -> Tensor:
        """Minus the squared embedding distance to the proposal, at every position of the previous candidate."""
        table = self.policy_table
        if proposals is None:
            return torch.zeros(total if self.settings.released_cost else start, self.vocabulary, dtype=table.dtype)
        proposed = table[proposals]
        distances = (table**2).sum(-1)[None] - 2 * proposed @ table.T + (proposed**2).sum(-1)[:, None]
        return torch.cat([torch.zeros(start, self.vocabulary, dtype=table.dtype), -distances])
