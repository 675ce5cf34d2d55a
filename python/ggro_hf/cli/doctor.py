"""`ggro doctor`: what is installed, what loaded, and whether it computes what it should."""

import argparse
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from transformers import PreTrainedModel

from ggro_hf import Greedy, demo_models, step_pool
from ggro_hf.cli.errors import CommandError
from ggro_hf.cli.models import default_device, load_policy, load_reward
from ggro_hf.cli.self_check import check_kernels
from ggro_hf.decoding.base import Request, end_of_sequence_ids
from ggro_hf.models import context_length
from ggro_hf.rewards import HeadReward, RewardModel, describe
from ggro_kernels import info


def register(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "doctor",
        help="check the installation",
        description="Show what is installed and what loaded, and check every kernel against its reference.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("--policy", metavar="DIR_OR_ID", help="with --reward: check that the two work together")
    parser.add_argument("--reward", metavar="DIR_OR_ID", help="with --policy: check that the two work together")


def run(args: argparse.Namespace) -> int:
    """Print the tree; 1 where a check fails."""
    if (args.policy is None) != (args.reward is None):
        raise CommandError("--policy and --reward are checked together; give both or neither")
    capabilities = info.capabilities()
    capabilities["versions"]["transformers"] = version("transformers")
    print("ggro")
    _print_tree({section: content for section, content in capabilities.items() if section != "ops"})
    _print_tree({"impl=auto": capabilities["ops"]})
    healthy = _check_kernels()
    if args.policy is not None:
        healthy &= _check_pair("models", args.policy, args.reward)
    else:
        healthy &= _check_pair("embedded models", str(demo_models.POLICY), str(demo_models.REWARD))
    print("\nall checks passed" if healthy else "\nsome checks FAILED")
    return 0 if healthy else 1


def _check_kernels() -> bool:
    print("├─ kernels against the fp64 reference")
    results = list(check_kernels())
    for number, result in enumerate(results, start=1):
        outcome = f"{result.cases} cases ok" if result.failure is None else f"FAILED: {result.failure}"
        branch = "└─" if number == len(results) else "├─"
        print(f"│  {branch} {result.op}, {result.impl}: {outcome} ({result.seconds:.1f} s)")
    return all(result.failure is None for result in results)


def _check_pair(title: str, policy_name: str, reward_name: str) -> bool:
    print(f"└─ {title}")
    try:
        policy = load_policy(policy_name, None, default_device())
        facts = {
            "class": type(policy.model).__name__,
            "parameters": f"{policy.model.num_parameters():,}",
            "dtype": policy.model.dtype,
            "context": context_length(policy.model),
            "end of sequence": sorted(end_of_sequence_ids(policy.model))
            or "none: responses end at max_new_tokens only",
            "decodes by": _decoding(policy.model),
            "chat template": "yes" if policy.tokenizer.chat_template else "no: prompts are continued as they are",
        }
        _print_tree({"policy": facts}, indent="   ")
        reward = load_reward(reward_name, policy.tokenizer, None, default_device())
        reward.check_tokenizer(policy.tokenizer)
    except (CommandError, FloatingPointError, ValueError) as error:
        print(f"   └─ FAILED: {error}")
        return False
    can = reward.capabilities
    facts = {
        "scores": describe(reward),
        "gradients": "yes" if can.gradient else "no: every method but ggro",
        "context": can.max_tokens,
    }
    if can.cached_prefix:
        facts["cached prefix"] = "agrees with a plain forward"
    if isinstance(reward, RewardModel | HeadReward) and reward.tokenizer is None:
        facts["vocabulary"] = "NOT CHECKED: the reward model comes without a tokenizer"
    _print_tree({"reward": facts}, indent="   ", last=True)
    return True


def _decoding(model: PreTrainedModel) -> str:
    # Three tokens: the second is the first to follow one that the response has.
    Greedy().respond(Request(model, [0, 0], 3, frozenset()))
    return step_pool.describe(model)


def _print_tree(tree: Mapping[str, Any], indent: str = "", *, last: bool = False) -> None:
    for number, (name, value) in enumerate(tree.items(), start=1):
        ends = last and number == len(tree)
        branch = "└─" if ends else "├─"
        if isinstance(value, Mapping):
            print(f"{indent}{branch} {name}")
            _print_tree(value, indent + ("   " if ends else "│  "), last=True)
        else:
            print(f"{indent}{branch} {name}: {_shown(value)}")


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)
