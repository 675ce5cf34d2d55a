"""The method options of the command line, and the models and decoder that they ask for."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch

from ggro_hf import demo_models
from ggro_hf.cli.errors import CommandError, one_line
from ggro_hf.cli.models import (
    DTYPES,
    LoadedPolicy,
    check_device,
    default_device,
    load_policy,
    load_reward,
    load_reward_model,
)
from ggro_hf.decoding import (
    ARGS,
    CARDS,
    GGRO,
    PRESETS,
    BestOfN,
    ChunkBeamSearch,
    Decoder,
    ExhaustiveSearch,
    Greedy,
    RejectionSampling,
    Sample,
)
from ggro_hf.decoding.base import MAX_BATCH_TOKENS, check_candidates
from ggro_hf.decoding.batch import BatchDecoder
from ggro_hf.decoding.guided import GuidedDecoder
from ggro_hf.decoding.segments import SegmentDecoder
from ggro_hf.generation import generate_iter
from ggro_hf.jsonl import PromptLine
from ggro_hf.results import Generation
from ggro_hf.rewards import Conversation, Reward

EMBEDDED = "embedded"

_DEFAULT_MAX_NEW_TOKENS = 128


@dataclass(frozen=True, slots=True)
class _Method:
    """A decoder, what is fixed of it, and the options that it reads: any other given is an error, never ignored."""

    decoder: type[Decoder]
    options: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def guided(self) -> bool:
        """Whether it needs a reward."""
        return issubclass(self.decoder, GuidedDecoder)

    @property
    def searches_segments(self) -> bool:
        """Whether it is GGRO or of its kind: the policy's entropy ends segments, which a `RewardModel` chooses."""
        return issubclass(self.decoder, SegmentDecoder)


_DRAWS = ("temperature", "top_k", "top_p", "seed")
_BEAMS = ("preset", "width", "successors", *_DRAWS, "as_released")
_ACCEPTS = ("preset", "reward_threshold", "attempts", "parallel", "temperature", "top_k", "seed")
METHODS = {
    "ggro": _Method(
        GGRO,
        (
            "preset",
            "entropy_threshold",
            "refinements",
            "candidates",
            "check_every",
            "nudge_tokens",
            "perplexity_ratio",
            "as_released",
        ),
    ),
    "exhaustive": _Method(ExhaustiveSearch, ("entropy_threshold", "candidates", "prune", "check_every")),
    "greedy": _Method(Greedy),
    "sample": _Method(Sample, _DRAWS),
    "best-of-n": _Method(BestOfN, ("preset", "samples", "parallel", *_DRAWS)),
    "rejection-sampling": _Method(RejectionSampling, _ACCEPTS),
    "args": _Method(ARGS, ("preset", "weight", "candidates", "mode", "temperature", "seed", "as_released")),
    "tbs": _Method(ChunkBeamSearch, _BEAMS, {"chunk_length": 1}),
    "cbs": _Method(ChunkBeamSearch, ("chunk_length", *_BEAMS)),
    "cards": _Method(CARDS, ("entropy_threshold", "alpha", "max_segment", "acceptance", "as_released", *_ACCEPTS)),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of models and methods."""
    models = parser.add_argument_group("models")
    models.add_argument(
        "--policy", metavar="DIR_OR_ID", default=EMBEDDED, help="causal language model (default: the embedded one)"
    )
    models.add_argument("--reward", metavar="DIR_OR_ID", help="reward model (default: the embedded one)")
    models.add_argument(
        "--dtype", choices=DTYPES, help="default: float32 for the embedded models, else the checkpoint's"
    )
    models.add_argument("--device", default=default_device(), help="default: cuda where available, else cpu")
    method = parser.add_argument_group("method")
    method.add_argument("--method", choices=METHODS, default="ggro")
    method.add_argument("--max-new-tokens", type=positive, metavar="N", help="default: the preset's, else 128")
    method.add_argument(
        "--max-batch-tokens",
        type=positive,
        metavar="N",
        help=f"ggro: tokens of prompts, responses and candidates that are decoded at once ({MAX_BATCH_TOKENS})",
    )
    method.add_argument(
        "--preset", choices=PRESETS, metavar="NAME", help=f"settings of a method by name: {', '.join(PRESETS)}"
    )
    method.add_argument("--as-released", action="store_true", default=None, help="the released code's behaviour")
    method.add_argument("--seed", type=int, help="of random draws (0)")
    ggro = parser.add_argument_group("ggro, exhaustive, args and cards")
    ggro.add_argument("--candidates", type=positive, metavar="K", help="likeliest tokens that compete (25, args: 10)")
    ggro.add_argument(
        "--entropy-threshold",
        type=float,
        metavar="NATS",
        help="a token at or above it opens a new segment (1.5, cards: 3.0)",
    )
    ggro.add_argument(
        "--refinements", type=positive, metavar="N", help="ggro: passes per segment, the policy's own included (8)"
    )
    ggro.add_argument(
        "--prune",
        type=positive,
        metavar="M",
        help="exhaustive: try only as many tokens beside the policy's own, those that the gradient likes best (all)",
    )
    ggro.add_argument(
        "--check-every", type=positive, metavar="N", help="ggro, exhaustive: only every n-th token opens one (1)"
    )
    ggro.add_argument(
        "--nudge-tokens", type=positive, metavar="N", help="ggro: most tokens that one intervention replaces (1)"
    )
    ggro.add_argument(
        "--perplexity-ratio",
        type=float,
        metavar="R",
        help="ggro: limit of a candidate's perplexity to the policy's own",
    )
    ggro.add_argument("--weight", type=float, metavar="W", help="args: of the reward against the logits (1.5)")
    ggro.add_argument("--mode", choices=("greedy", "sample"), help="args: take the best candidate or draw one (greedy)")
    sampling = parser.add_argument_group("methods that draw")
    sampling.add_argument("--temperature", type=float, metavar="T", help="divides the logits")
    sampling.add_argument("--top-k", type=positive, metavar="K", help="draw from the K likeliest tokens only")
    sampling.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the smallest set of tokens of probability P only"
    )
    sampling.add_argument("--samples", type=positive, metavar="N", help="best-of-n: responses drawn (8)")
    sampling.add_argument("--width", type=positive, metavar="W", help="cbs, tbs: beams (8)")
    sampling.add_argument("--successors", type=positive, metavar="K", help="cbs, tbs: drawn for each beam (8)")
    sampling.add_argument("--chunk-length", type=positive, metavar="L", help="cbs: tokens of a chunk (30)")
    sampling.add_argument(
        "--reward-threshold",
        type=float,
        metavar="R",
        help="cards, rejection-sampling: reward that is good enough; every reward model needs another",
    )
    sampling.add_argument(
        "--attempts", type=int, metavar="N", help="cards, rejection-sampling: rejections at most (20)"
    )
    sampling.add_argument("--parallel", type=positive, metavar="N", help="draws decoded together")
    sampling.add_argument("--alpha", type=float, help="cards: share of the threshold at the beginning (0.5)")
    sampling.add_argument("--max-segment", type=positive, metavar="N", help="cards: most tokens of a segment (64)")
    sampling.add_argument("--acceptance", choices=("soft", "hard"), help="cards: by chance or by the threshold (soft)")


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


@dataclass(frozen=True, slots=True)
class MethodSettings:
    """The method and models that a command line asks for."""

    policy: str
    reward: str | None
    dtype: str
    device: str
    method: str
    max_new_tokens: int
    max_batch_tokens: int
    options: dict[str, Any]

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> "MethodSettings":
        """Check what `add_arguments` parsed; raises CommandError for options that do not go together."""
        method = METHODS[args.method]
        given = {name: getattr(args, name) for other in METHODS.values() for name in other.options}
        given = {name: value for name, value in given.items() if value is not None}
        foreign = sorted(given.keys() - set(method.options))
        if foreign:
            raise CommandError(
                f"--{foreign[0].replace('_', '-')} has no meaning for --method {args.method}; leave it out"
            )
        if args.max_batch_tokens and not issubclass(method.decoder, BatchDecoder):
            raise CommandError(
                f"--max-batch-tokens has no meaning for --method {args.method}, which decodes one prompt after the "
                "other; leave it out"
            )
        reward = args.reward or (EMBEDDED if args.policy == EMBEDDED else None)
        if reward is None and method.guided:
            raise CommandError(f"--method {args.method} with another --policy needs its --reward; name a reward model")
        if args.preset and PRESETS[args.preset].method != method.decoder.__name__:
            raise CommandError(
                f"--preset {args.preset} is one of {PRESETS[args.preset].method}, not of --method {args.method}"
            )
        if "reward_threshold" in method.options and not given.keys() & {"reward_threshold", "preset"}:
            raise CommandError(
                f"--method {args.method} needs --reward-threshold, in the units of the reward model; "
                "best-of-n shows which rewards its responses have"
            )
        dtype = args.dtype or ("float32" if args.policy == EMBEDDED else "auto")
        of_preset = PRESETS[args.preset].max_new_tokens if args.preset else None
        max_new_tokens = args.max_new_tokens or of_preset or _DEFAULT_MAX_NEW_TOKENS
        max_batch_tokens = args.max_batch_tokens or MAX_BATCH_TOKENS
        return cls(args.policy, reward, dtype, args.device, args.method, max_new_tokens, max_batch_tokens, given)

    @property
    def policy_path(self) -> str:
        """Directory or hub id of the policy."""
        return str(demo_models.POLICY) if self.policy == EMBEDDED else self.policy

    @property
    def entropy_threshold(self) -> float | None:
        """Nats at which GGRO or exhaustive search opens a segment; None for other methods."""
        method = METHODS[self.method]
        if not method.searches_segments:
            return None
        preset = self.options.get("preset")
        settings = PRESETS[preset].settings if preset else {}
        of_method = signature(method.decoder).parameters["entropy_threshold"].default
        default = settings.get("entropy_threshold", of_method)
        return self.options.get("entropy_threshold", default)

    def record(self) -> dict[str, Any]:
        """What decides the output, as plain values: rows made with another record do not belong in the same file."""
        return {
            "policy": self.policy,
            "reward": self.reward,
            "dtype": self.dtype,
            "method": self.method,
            "max_new_tokens": self.max_new_tokens,
            **self.options,
        }


class Session:
    """Loaded models and a decoder that answer one line after another; raises CommandError where they cannot be had."""

    def __init__(self, settings: MethodSettings) -> None:
        check_device(settings.device)
        dtype = DTYPES[settings.dtype]
        self.policy = load_policy(settings.policy_path, dtype, settings.device)
        reward_path = str(demo_models.REWARD) if settings.reward == EMBEDDED else settings.reward
        self.reward = self._load_reward(reward_path, settings, dtype) if reward_path else None
        self._settings = settings
        try:
            self.decoder = _decoder(settings, self.policy, self.reward)
            if self.reward is not None:
                self.reward.check_tokenizer(self.policy.tokenizer)
        except ValueError as error:
            raise CommandError(one_line(error)) from error

    def _load_reward(self, path: str, settings: MethodSettings, dtype: torch.dtype | None) -> Reward:
        if METHODS[settings.method].searches_segments:
            return load_reward_model(path, dtype, settings.device)
        return load_reward(path, self.policy.tokenizer, dtype, settings.device)

    def responses(self, lines: Sequence[PromptLine]) -> Iterator[Generation]:
        """Decode lines; what is raised for one is raised in its turn, and those after it can still be had.

        The random draws of a line depend on its number alone, whichever others are decoded in this run.
        """
        generations = generate_iter(
            self.policy.model,
            self.policy.tokenizer,
            (line.prompt for line in lines),
            self.decoder,
            max_new_tokens=self._settings.max_new_tokens,
            max_batch_tokens=self._settings.max_batch_tokens,
            rows=(line.number - 1 for line in lines),
        )
        return map(self._scored, lines, generations)

    def _scored(self, line: PromptLine, generation: Generation) -> Generation:
        """With the reward, where the method asked for none."""
        if generation.reward is None and self.reward is not None:
            conversation = Conversation(generation.prompt_ids, line.prompt, self.policy.tokenizer)
            generation.reward = self.reward.score_response(conversation, generation.token_ids)
        return generation


def _decoder(settings: MethodSettings, policy: LoadedPolicy, reward: Reward | None) -> Decoder:
    method = METHODS[settings.method]
    options: dict[str, Any] = {**settings.options, **method.fixed}
    if not method.guided:
        return method.decoder(**options)
    options["tokenizer"] = policy.tokenizer
    if "candidates" in options:
        check_candidates(policy.model, options["candidates"])
    preset = options.pop("preset", None)
    decoder: Any = method.decoder
    return decoder.from_preset(preset, reward, **options) if preset else decoder(reward, **options)
