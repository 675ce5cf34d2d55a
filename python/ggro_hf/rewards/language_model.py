"""Causal language models as part of a reward: what they think of given tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ggro_hf.models import TOLERANCE, device_of, embedding_rows
from ggro_hf.policy import check_policy
from ggro_hf.rewards.heads import FeedForward
from ggro_hf.rewards.loading import load_tokenizer
from ggro_hf.transfer import to_device
from ggro_kernels import candidate_scores, lm_head_entropy_topk

# Tokens of the self-check.
_CHECK_TOKENS = 6


def load_language_model(
    name: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A causal language model and its tokenizer, if it has one, from a directory or a hub id (safetensors only).

    `dtype=None` keeps the checkpoint's. Raises ValueError where weights are missing, OSError where files are.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        name, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True, revision=revision or "main"
    )
    model, loading = loaded
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ValueError(
            f"model {str(name)!r} lacks the weights {', '.join(missing[:3])}: they would be random; "
            "use the checkpoint of a whole language model"
        )
    return model.to(device) if device is not None else model, load_tokenizer(name, revision=revision or "main")


class LanguageModel:
    """A causal language model as backbone and head; of the logits only what is needed is computed, none is kept.

    The parameters are frozen (`requires_grad_(False)`). `role` names it in errors. Raises ValueError unless it has one
    linear head whose log-probabilities we reproduce.
    """

    def __init__(self, role: str, model: PreTrainedModel) -> None:
        check_policy(model)
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise ValueError(f"{role} {type(model).__name__} has no linear head; use one with an lm_head")
        self.model = model.eval().requires_grad_(False)
        self._head = head
        self._softcap = getattr(model.config.get_text_config(decoder=True), "final_logit_softcapping", None)
        self._check_parity(role)

    @property
    def backbone(self) -> PreTrainedModel:
        """The model without its head."""
        return cast(PreTrainedModel, self.model.base_model)

    def log_probabilities(self, hidden: Tensor, rows: Tensor, token_ids: Tensor) -> Tensor:
        """Log-probabilities [T], fp32 or better, of `token_ids[T]`, each predicted by the row `rows[T]` of `hidden`."""
        weight, bias = self._head.weight, self._head.bias
        logsumexp = lm_head_entropy_topk(hidden, weight, 1, bias=bias, softcap=self._softcap).logsumexp
        logits = candidate_scores(hidden[rows], weight, token_ids[:, None])[:, 0]
        if bias is not None:
            logits = logits + bias[token_ids]
        if self._softcap is not None:
            logits = self._softcap * torch.tanh(logits / self._softcap)
        return logits - logsumexp[rows]

    def answers(self, token_ids: Sequence[int]) -> FeedForward:
        """A head whose outputs are these tokens' logits.

        Raises ValueError for a model that caps its logits.
        """
        if self._softcap is not None:
            raise ValueError(
                f"{type(self.model).__name__} caps its logits at {self._softcap}, which a head of two answers does "
                "not; use a model without final_logit_softcapping"
            )
        precision = torch.float64 if self.model.dtype == torch.float64 else torch.float32
        layer = nn.Linear(self._head.in_features, len(token_ids), bias=self._head.bias is not None, device="meta")
        for name, parameter in self._head.named_parameters():
            setattr(layer, name, nn.Parameter(parameter.detach()[list(token_ids)].to(precision)))
        return FeedForward([layer]).requires_grad_(False)

    @torch.inference_mode()
    def _check_parity(self, role: str) -> None:
        """Models scale and cap their logits in ways of their own: compare with the model's, once, at load."""
        if self.model.device.type == "meta":
            return
        vocabulary = embedding_rows(self.model)
        ids = to_device([[(7 * token + 1) % vocabulary for token in range(_CHECK_TOKENS)]], device_of(self.model))
        logits = self.model(input_ids=ids, use_cache=False).logits[0, :-1]
        expected = logits.double().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        hidden = self.backbone(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
        rows = torch.arange(_CHECK_TOKENS - 1, device=hidden.device)
        error = float((self.log_probabilities(hidden, rows, ids[0, 1:]).double() - expected).abs().max())
        tolerance = TOLERANCE[self.model.dtype] * max(1.0, float(expected.abs().max()))
        if not error <= tolerance:
            raise ValueError(
                f"{role} {type(self.model).__name__} has log-probabilities that its last hidden states and its head "
                f"do not give (off by {error:.2g}, tolerance {tolerance:.1g}): it changes its logits in a way that is "
                "not known here, or its weights are not finite"
            )
