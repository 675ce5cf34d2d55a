"""The method options of the command line, and the models and decoder that they ask for."""

import argparse
from dataclasses import dataclass
from inspect import signature
from typing import Any

from ggro_hf import demo_models
from ggro_hf.cli.errors import CommandError, one_line
from ggro_hf.cli.models import DTYPES, LoadedPolicy, check_device, default_device, load_policy, load_reward
from ggro_hf.decoding import GGRO, PRESETS, BestOfN, Decoder, Greedy, Sample
from ggro_hf.generation import generate_iter
from ggro_hf.jsonl import PromptLine
from ggro_hf.results import Generation
from ggro_hf.rewards import RewardModel

EMBEDDED = "embedded"

_DEFAULT_MAX_NEW_TOKENS = 128
_DEFAULT_ENTROPY_THRESHOLD: float = signature(GGRO).parameters["entropy_threshold"].default
_SAMPLING = ("temperature", "top_k", "top_p", "seed")
# What each method reads, by the name of the decoder's argument. Any other option given is an error, never ignored.
_OPTIONS = {
    "ggro": (
        "preset",
        "entropy_threshold",
        "refinements",
        "candidates",
        "check_every",
        "nudge_tokens",
        "perplexity_ratio",
        "as_released",
    ),
    "greedy": (),
    "sample": _SAMPLING,
    "best-of-n": ("samples", *_SAMPLING),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of models and methods."""
    models = parser.add_argument_group("models")
    models.add_argument(
        "--policy", metavar="DIR_OR_ID", default=EMBEDDED, help="causal language model (default: the embedded one)"
    )
    models.add_argument(
        "--reward", metavar="DIR_OR_ID", help="reward model on the policy's vocabulary (default: the embedded one)"
    )
    models.add_argument(
        "--dtype", choices=DTYPES, help="default: float32 for the embedded models, else the checkpoint's"
    )
    models.add_argument("--device", default=default_device(), help="default: cuda where available, else cpu")
    method = parser.add_argument_group("method")
    method.add_argument("--method", choices=_OPTIONS, default="ggro")
    method.add_argument("--max-new-tokens", type=positive, metavar="N", help="default: the preset's, else 128")
    ggro = parser.add_argument_group("ggro")
    ggro.add_argument("--preset", choices=PRESETS, metavar="NAME", help=f"settings by name: {', '.join(PRESETS)}")
    ggro.add_argument(
        "--entropy-threshold", type=float, metavar="NATS", help="a token at or above it opens a new segment (1.5)"
    )
    ggro.add_argument(
        "--refinements", type=positive, metavar="N", help="passes per segment, the policy's own included (8)"
    )
    ggro.add_argument(
        "--candidates", type=positive, metavar="K", help="likeliest tokens that compete for a position (25)"
    )
    ggro.add_argument("--check-every", type=positive, metavar="N", help="only every n-th token may open a segment (1)")
    ggro.add_argument(
        "--nudge-tokens", type=positive, metavar="N", help="most tokens that one intervention replaces (1)"
    )
    ggro.add_argument(
        "--perplexity-ratio", type=float, metavar="R", help="limit of a candidate's perplexity to the policy's own"
    )
    ggro.add_argument(
        "--as-released", action="store_true", default=None, help="the released code's behaviour, token for token"
    )
    sampling = parser.add_argument_group("sample and best-of-n")
    sampling.add_argument("--samples", type=positive, metavar="N", help="responses drawn by best-of-n (8)")
    sampling.add_argument("--temperature", type=float, metavar="T", help="divides the logits (1.0)")
    sampling.add_argument("--top-k", type=positive, metavar="K", help="draw from the K likeliest tokens only")
    sampling.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the smallest set of tokens of probability P only"
    )
    sampling.add_argument("--seed", type=int, help="of the random draws (0)")


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
    options: dict[str, Any]

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> "MethodSettings":
        """Check what `add_arguments` parsed; raises CommandError for options that do not go together."""
        given = {name: getattr(args, name) for names in _OPTIONS.values() for name in names}
        given = {name: value for name, value in given.items() if value is not None}
        foreign = sorted(given.keys() - set(_OPTIONS[args.method]))
        if foreign:
            raise CommandError(
                f"--{foreign[0].replace('_', '-')} has no meaning for --method {args.method}; leave it out"
            )
        reward = args.reward or (EMBEDDED if args.policy == EMBEDDED else None)
        if reward is None and args.method in ("ggro", "best-of-n"):
            raise CommandError(f"--method {args.method} with another --policy needs its --reward; name a reward model")
        dtype = args.dtype or ("float32" if args.policy == EMBEDDED else "auto")
        of_preset = PRESETS[args.preset].max_new_tokens if args.preset else None
        max_new_tokens = args.max_new_tokens or of_preset or _DEFAULT_MAX_NEW_TOKENS
        return cls(args.policy, reward, dtype, args.device, args.method, max_new_tokens, given)

    @property
    def policy_path(self) -> str:
        """Directory or hub id of the policy."""
        return str(demo_models.POLICY) if self.policy == EMBEDDED else self.policy

    @property
    def entropy_threshold(self) -> float | None:
        """Nats at which GGRO opens a segment; None for other methods."""
        if self.method != "ggro":
            return None
        preset = self.options.get("preset")
        settings = PRESETS[preset].settings if preset else {}
        default = settings.get("entropy_threshold", _DEFAULT_ENTROPY_THRESHOLD)
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
        self.reward = load_reward(reward_path, dtype, settings.device) if reward_path else None
        self._max_new_tokens = settings.max_new_tokens
        try:
            self.decoder = _decoder(settings, self.policy, self.reward)
            if self.reward is not None:
                self.reward.check_tokenizer(self.policy.tokenizer)
        except ValueError as error:
            raise CommandError(one_line(error)) from error

    def respond(self, line: PromptLine) -> Generation:
        """Decode one line; its random draws depend on its number alone, whichever lines came before in this run."""
        responses = generate_iter(
            self.policy.model,
            self.policy.tokenizer,
            [line.prompt],
            self.decoder,
            max_new_tokens=self._max_new_tokens,
            first_row=line.number - 1,
        )
        generation = next(responses)
        if generation.reward is None and self.reward is not None:
            generation.reward = self.reward.score(generation.prompt_ids + generation.token_ids)
        return generation


def _decoder(settings: MethodSettings, policy: LoadedPolicy, reward: RewardModel | None) -> Decoder:
    options = dict(settings.options)
    if reward is None or settings.method in ("greedy", "sample"):
        return Greedy() if settings.method == "greedy" else Sample(**options)
    if settings.method == "best-of-n":
        return BestOfN(reward, **options)
    options["tokenizer"] = policy.tokenizer
    preset = options.pop("preset", None)
    decoder = GGRO.from_preset(preset, reward, **options) if preset else GGRO(reward, **options)
    rows = policy.model.get_output_embeddings().weight.shape[0]
    if decoder.candidates > rows:
        raise ValueError(
            f"--candidates is {decoder.candidates}, but the policy's vocabulary has {rows} tokens; lower it"
        )
    return decoder
