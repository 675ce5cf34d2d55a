"""Heads of reward models, by name: what each makes of hidden states, and its loading together with the backbone."""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging
from transformers.utils.hub import cached_file

from ggro_hf.rewards.loading import load_tokenizer

Readout = Callable[[Tensor], Tensor]
"""Hidden states [n, d] to values [n], or [n, outputs] for a head with more than one."""


class Head(nn.Module, ABC):
    """What a reward model makes of hidden states, behind the backbone's last norm.

    Heads compute in fp32, or in fp64 where the backbone does: rounded to bf16, the rewards of good candidates tie.
    """

    outputs: int
    """Values for each hidden state; a reward is 1."""

    @abstractmethod
    def for_prompt(self, token_ids: Sequence[int], hidden: Tensor) -> Readout:
        """The readout of responses to a prompt, given its token ids and their hidden states [tokens, d].

        Raises ValueError where the head needs something of the prompt that it does not have.
        """


class FeedForward(Head):
    """Linear layers with ReLU between them; one layer is a linear head. It reads every hidden state by itself."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.outputs = layers[-1].out_features

    def forward(self, hidden: Tensor) -> Tensor:
        """Values [n], or [n, outputs], of hidden states [n, d]."""
        values = hidden.to(next(self.parameters()).dtype)
        for index, layer in enumerate(self.layers):
            values = layer(values.relu() if index else values)
        return values[..., 0] if self.outputs == 1 else values

    def for_prompt(self, token_ids: Sequence[int], hidden: Tensor) -> Readout:
        return self


class Gated(Head):
    """Several objectives, mixed by a gate that reads the prompt (ArmoRM, Wang et al. 2024, arXiv:2406.12845).

    reward = sum_j g_j (R T)_j with objectives R = W h, a transform T and the gate g = scale * softmax(MLP(h_p) / t) of
    the hidden state h_p where the assistant's turn begins: at the first token of the last occurrence of `pattern`.
    """

    outputs = 1
    transform: Tensor
    scale: Tensor

    def __init__(
        self,
        objectives: nn.Linear,
        transform: Tensor,
        gate: FeedForward,
        scale: Tensor,
        temperature: float,
        pattern: Sequence[int],
    ) -> None:
        super().__init__()
        self.objectives, self.gate = objectives, gate
        self.register_buffer("transform", transform)
        self.register_buffer("scale", scale)
        self.temperature = temperature
        self.pattern = tuple(pattern)

    def for_prompt(self, token_ids: Sequence[int], hidden: Tensor) -> Readout:
        at_turn = hidden[self._turn(token_ids)][None]
        gate = self.scale * torch.softmax(self.gate(at_turn)[0] / self.temperature, dim=-1)
        # With the gate known, objectives, transform and gate are one direction of the hidden states.
        direction = self.objectives.weight.T @ (self.transform @ gate)
        return lambda states: states.to(direction.dtype) @ direction

    def _turn(self, token_ids: Sequence[int]) -> int:
        ids, width = tuple(token_ids), len(self.pattern)
        for start in range(len(ids) - width, -1, -1):
            if ids[start : start + width] == self.pattern:
                return start
        raise ValueError(
            f"prompt does not have the tokens {list(self.pattern)} that end a user's turn and open the assistant's, "
            "which the gate of this reward model reads; use its chat template with add_generation_prompt=True"
        )


class HeadFamily(NamedTuple):
    """A kind of head: the modules (or parameters) of a checkpoint that belong to it, and how it is made of these.

    `build` gets the tensors by name, the model's config and its tokenizer, if there is one; it raises ValueError where
    tensors are missing.
    """

    modules: tuple[str, ...]
    build: Callable[[Mapping[str, Tensor], PretrainedConfig, PreTrainedTokenizerBase | None], Head]


# What ends a user's turn and opens the assistant's in the chat template of a model type.
_TURNS = {
    "llama": "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma2": "<end_of_turn>\n<start_of_turn>model\n",
}


def _score(tensors: Mapping[str, Tensor], config: PretrainedConfig, _: PreTrainedTokenizerBase | None) -> Head:
    return FeedForward(_layers(tensors, "score", config))


def _regression_head(
    tensors: Mapping[str, Tensor], config: PretrainedConfig, _: PreTrainedTokenizerBase | None
) -> Head:
    return FeedForward(_layers(tensors, "regression_head", config))


def _value_head(tensors: Mapping[str, Tensor], config: PretrainedConfig, _: PreTrainedTokenizerBase | None) -> Head:
    if "v_head.weight" in tensors:
        return FeedForward(_layers(tensors, "v_head", config))
    if "v_head.summary.weight" in tensors:
        _check_present(["v_head.summary.bias"], tensors)
    return FeedForward(_layers(tensors, "v_head.summary", config, hidden_layers=getattr(config, "vhead_num_layers", 1)))


def _gated(tensors: Mapping[str, Tensor], config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None) -> Head:
    _check_present(["regression_layer.weight", "reward_transform_matrix", "gating.logit_scale"], tensors)
    (objectives,) = _layers(tensors, "regression_layer", config)
    hidden_layers = getattr(config, "gating_n_hidden", 3)
    gate = FeedForward(_layers(tensors, "gating.layers", config, hidden_layers=hidden_layers, spacing=1))
    transform, count = tensors["reward_transform_matrix"], objectives.out_features
    if list(transform.shape) != [count, count] or gate.outputs != count:
        raise ValueError(
            f"reward model has {count} objectives, but reward_transform_matrix has the shape {list(transform.shape)} "
            f"and the gate {gate.outputs} outputs; a gated head has one of each for every objective"
        )
    turn = _TURNS.get(config.model_type)
    if turn is None or tokenizer is None:
        raise ValueError(
            f"reward model of type {config.model_type!r} has a gate, which reads the prompt where the assistant's turn "
            f"begins; that is known of a {' or '.join(_TURNS)} checkpoint with its tokenizer"
        )
    pattern = tokenizer.encode(turn, add_special_tokens=False)
    temperature = float(getattr(config, "gating_temperature", 10))
    return Gated(objectives, transform, gate, tensors["gating.logit_scale"][0], temperature, pattern)


HEADS: dict[str, HeadFamily] = {
    "score": HeadFamily(("score",), _score),
    "v_head": HeadFamily(("v_head",), _value_head),
    "regression_head": HeadFamily(("regression_head",), _regression_head),
    "gated": HeadFamily(("regression_layer", "reward_transform_matrix", "gating"), _gated),
}
"""Heads by name, as `head=` takes them; others can be added."""


@dataclass(frozen=True, slots=True)
class LoadedBackbone:
    """A causal backbone, the head that reads its hidden states, and the tokenizer of both where there is one.

    All parameters are frozen (`requires_grad_(False)`).
    """

    model: PreTrainedModel
    head: Head
    tokenizer: PreTrainedTokenizerBase | None

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        head: str = "auto",
        outputs: Sequence[int] = (1,),
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        revision: str | None = None,
    ) -> Self:
        """Load backbone, head and tokenizer from a directory or a hub id: safetensors only, no code of the checkpoint.

        `head` is a name in `HEADS`, "auto" takes the one whose tensors are there. `outputs` are the numbers of values
        that the caller can read. `dtype=None` keeps the checkpoint's for the backbone.

        Raises ValueError where the head or weights of the backbone are missing, or the head has another number of
        outputs; OSError where files are missing, SafetensorError where one is damaged.
        """
        _check_head(head)
        revision = revision or "main"
        config = AutoConfig.from_pretrained(name, revision=revision)
        files = _tensor_files(name, revision)
        with _without_load_report():
            model, loading = AutoModel.from_pretrained(
                name,
                config=config,
                revision=revision,
                dtype=dtype or "auto",
                use_safetensors=True,
                output_loading_info=True,
            )
        tokenizer = load_tokenizer(name, revision=revision)
        if device is not None:
            model = model.to(device)
        try:
            _check_present(loading["missing_keys"], {})
            kind = _choose(head, loading["unexpected_keys"], config)
            own = [each for each in files if _belongs(each, HEADS[kind].modules)]
            return cls._assemble(model, kind, {each: _read(files[each], each) for each in own}, outputs, tokenizer)
        except ValueError as error:
            raise ValueError(f"{str(name)!r}: {error}") from error

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        head: str = "auto",
        outputs: Sequence[int] = (1,),
    ) -> Self:
        """Take backbone and head, a copy, of a model in memory; raises ValueError as `from_pretrained` does."""
        _check_head(head)
        weights = model.state_dict()
        kind = _choose(head, (each for each in weights if not _belongs(each, [model.base_model_prefix])), model.config)
        tensors = {each: tensor for each, tensor in weights.items() if _belongs(each, HEADS[kind].modules)}
        return cls._assemble(cast(PreTrainedModel, model.base_model), kind, tensors, outputs, tokenizer)

    @classmethod
    def _assemble(
        cls,
        model: PreTrainedModel,
        kind: str,
        tensors: Mapping[str, Tensor],
        outputs: Sequence[int],
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> Self:
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise ValueError(f"reward model has weights in {name} that are not finite; use an undamaged checkpoint")
        precision = torch.float64 if model.dtype == torch.float64 else torch.float32
        tensors = {name: tensor.detach().to(model.device, precision, copy=True) for name, tensor in tensors.items()}
        built = HEADS[kind].build(tensors, model.config, tokenizer)
        if built.outputs not in outputs:
            wanted = " or ".join(str(number) for number in outputs)
            raise ValueError(
                f"head {kind!r} of the reward model has {built.outputs} outputs, but only {wanted} can be read here; "
                "use a checkpoint with another head"
            )
        return cls(model.eval().requires_grad_(False), built.eval().requires_grad_(False), tokenizer)


def head_tensors(name: str | Path, revision: str | None = None) -> set[str]:
    """Names of a checkpoint's tensors that belong to a head of `HEADS`. Raises OSError where it has no safetensors."""
    modules = [module for family in HEADS.values() for module in family.modules]
    return {tensor for tensor in _tensor_files(name, revision or "main") if _belongs(tensor, modules)}


def _layers(
    tensors: Mapping[str, Tensor],
    module: str,
    config: PretrainedConfig,
    hidden_layers: int | None = None,
    spacing: int = 2,
) -> list[nn.Linear]:
    """The linear layers of a module: itself, or those numbered 0, `spacing`, ... (activations have numbers, too).

    Without `hidden_layers` there are as many as the largest number says, at least one before the last.
    """
    if f"{module}.weight" in tensors:
        names = [module]
    else:
        numbers = [int(found[1]) for name in tensors if (found := re.match(rf"{re.escape(module)}\.(\d+)\.", name))]
        last = max([spacing, *numbers]) if hidden_layers is None else spacing * hidden_layers
        names = [f"{module}.{number}" for number in range(0, last + 1, spacing)]
        _check_present([f"{name}.{part}" for name in names for part in ("weight", "bias")], tensors)
    layers = [_linear(tensors[f"{name}.weight"], tensors.get(f"{name}.bias")) for name in names]
    widths = [config.get_text_config().hidden_size, *(layer.out_features for layer in layers)]
    for name, width, layer in zip(names, widths, layers, strict=False):
        if layer.in_features != width:
            raise ValueError(
                f"reward model has {name}.weight of shape {[layer.out_features, layer.in_features]}, but what it reads "
                f"is {width} wide; the checkpoint's head does not belong to its backbone"
            )
    return layers


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


def _check_present(names: Iterable[str], tensors: Mapping[str, Tensor]) -> None:
    missing = sorted(name for name in names if name not in tensors)
    if missing:
        raise ValueError(
            f"reward model lacks the weights {', '.join(missing[:5])}: they would be random; "
            "use a checkpoint saved with its whole backbone and head"
        )


def _check_head(head: str) -> None:
    if head != "auto" and head not in HEADS:
        raise ValueError(f"head is {head!r}, but there are {', '.join(HEADS)}; use one of them or 'auto'")


def _belongs(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _choose(head: str, names: Iterable[str], config: PretrainedConfig) -> str:
    names = sorted(names)
    present = [kind for kind, family in HEADS.items() if any(_belongs(name, family.modules) for name in names)]
    if head in present:
        return head
    if head != "auto" or not present:
        wanted = ", ".join(
            module for kind in ([*HEADS] if head == "auto" else [head]) for module in HEADS[kind].modules
        )
        raise ValueError(
            f"reward model lacks the weights of a head ({wanted}): they would be random; beside the backbone it has "
            f"{', '.join(names[:5]) or 'nothing'}; use a checkpoint saved with its head"
        )
    if len(present) > 1:
        # A classifier of transformers reads `score`, whatever else a checkpoint that it was trained from has left.
        classifier = any("Classification" in name for name in getattr(config, "architectures", None) or ())
        if not (classifier and "score" in present):
            raise ValueError(
                f"reward model has tensors of several heads: {', '.join(present)}; name the one to use with head=..."
            )
        return "score"
    return present[0]


def _tensor_files(name: str | Path, revision: str) -> dict[str, str]:
    """The safetensors file of every tensor of a checkpoint. Raises OSError where there is none."""
    index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, revision=revision, _raise_exceptions_for_missing_entries=False)
    if index is not None:
        weight_map = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        shards = {shard: str(cached_file(name, shard, revision=revision)) for shard in set(weight_map.values())}
        return {tensor: shards[shard] for tensor, shard in weight_map.items()}
    single = cached_file(name, SAFE_WEIGHTS_NAME, revision=revision, _raise_exceptions_for_missing_entries=False)
    if single is None:
        raise OSError(
            f"reward model {str(name)!r} has no {SAFE_WEIGHTS_NAME}; convert its weights, pickled ones are not read"
        )
    with safe_open(single, framework="pt") as weights:
        return dict.fromkeys(weights.keys(), single)


def _read(file: str, name: str) -> Tensor:
    with safe_open(file, framework="pt") as weights:
        return weights.get_tensor(name)


@contextmanager
def _without_load_report() -> Iterator[None]:
    """To a backbone, which transformers loads by itself, the head's tensors are unexpected; that is no news here."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
