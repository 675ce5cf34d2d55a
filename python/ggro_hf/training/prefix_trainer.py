"""HuggingFace's Trainer on comparisons of partial responses."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainingArguments

from ggro_hf.training.prefix_reader import PairInputs, PrefixReader, flat_places
from ggro_hf.training.scoring import pad_inputs
from ggro_hf.training.weights import WeighedPair
from ggro_kernels import weighted_bt_loss

# What transformers ignores in labels, and so in its count of items.
_PADDING = -100
_OF_MODELS = ("input_ids", "position_ids", "attention_mask", "token_type_ids")
# The length of finished responses in tensors of lengths.
_FINISHED = -1


class NonFiniteLossError(FloatingPointError):
    """The loss is no number; the message names the file that holds the batch."""


class Example(TypedDict):
    """A pair and what the model reads of it; `input_ids`, its longest input, is what transformers groups by length."""

    weighed: WeighedPair
    pair: PairInputs
    input_ids: list[int]


class WeighedInputs(Dataset):
    """Weighed pairs as inputs of a model, tokenised when they are asked for."""

    def __init__(self, pairs: Sequence[WeighedPair], reader: PrefixReader) -> None:
        self._pairs = pairs
        self._reader = reader

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Example:
        pair = self._reader.read(self._pairs[index].partial)
        longest = max((encoded["input_ids"] for encoded in pair.inputs), key=len)
        return {"weighed": self._pairs[index], "pair": pair, "input_ids": longest}


class PairCollator:
    """A batch of B pairs with N inputs and P comparisons.

    The model's inputs, padded on the right `[N, T]`; `labels[P, 2]`, where the rewards of the chosen and of the
    rejected partial response are in `[N, T]` rewards, row after row (`[N, 1]` for an encoder); `weights[P]`;
    `lengths[B, K]` of the comparisons, padded; `rows[B]` of the source.
    """

    def __init__(self, reader: PrefixReader) -> None:
        self._reader = reader

    def __call__(self, batch: list[Example]) -> dict[str, Any]:
        pairs = [example["pair"] for example in batch]
        inputs = pad_inputs([row for pair in pairs for row in pair.inputs], self._reader)
        width = inputs["input_ids"].shape[1] if self._reader.causal else 1
        weights = [weight for example in batch for weight in example["weighed"].weights]
        lengths = [
            torch.tensor([_FINISHED if length is None else length for length in example["weighed"].partial.lengths])
            for example in batch
        ]
        return {
            **inputs,
            "labels": torch.tensor(flat_places(pairs, width)),
            # As bits: DeepSpeed rounds every floating-point input to the model's dtype.
            "weights": torch.tensor(weights, dtype=torch.float32).view(torch.int32),
            "lengths": pad_sequence(lengths, batch_first=True, padding_value=_PADDING),
            "rows": torch.tensor([pair.row for pair in pairs]),
        }


class PrefixTrainer(Trainer):
    """Trains a sequence classifier with one label by the weighted preference loss on partial responses (SP-PRM, eq. 3).

    A causal model computes the rewards of all partial responses of a response in one pass. The loss of an optimizer
    step is the mean over its comparisons, whatever batches, accumulation and processes they came in. Evaluation reports
    the unweighted loss and how often the chosen response has the larger reward, by length. A loss that is no number
    stops the training with NonFiniteLossError and leaves the batch in `output_dir`. Resumed training gives the same
    result, but for `train_sampling_strategy="group_by_length"` after the first epoch: transformers does not keep that
    order.

    Raises ValueError where torch would split batches over several GPUs in one process.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        reader: PrefixReader,
        train_pairs: Sequence[WeighedPair],
        eval_pairs: Sequence[WeighedPair] = (),
        **options: Any,
    ) -> None:
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process; start one for each with `accelerate launch`, or set "
                "CUDA_VISIBLE_DEVICES"
            )
        # Otherwise the Trainer drops what the model's forward does not name.
        args.remove_unused_columns = False
        self._all_rewards = _AllRewards(model) if reader.causal else None
        super().__init__(
            model=model,
            args=args,
            train_dataset=WeighedInputs(train_pairs, reader),
            eval_dataset=WeighedInputs(eval_pairs, reader) if eval_pairs else None,
            data_collator=PairCollator(reader),
            compute_metrics=_agreement,
            processing_class=reader.tokenizer,
            **options,
        )
        # Makes the Trainer count the labels of all batches of a step.
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The weighted loss, summed over the batch and divided by the comparisons of the whole step."""
        places, rewards = inputs["labels"], self._rewards(model, inputs)
        flat = rewards.reshape(1, -1)
        weights = inputs["weights"].view(torch.float32)
        loss = weighted_bt_loss(flat, flat, places[None, :, 0], places[None, :, 1], weights[None], reduction="sum")
        if num_items_in_batch is None:
            loss = loss / len(places)
        else:
            # A comparison has two labels.
            loss = 2 * loss / num_items_in_batch
            if self.args.average_tokens_across_devices:
                # Gradients are averaged over the processes, but the divisor is already that of all.
                loss = loss * self.accelerator.num_processes
        if model.training and not torch.isfinite(loss):
            self._stop(inputs, loss)
        return (loss, {"rewards": rewards}) if return_outputs else loss

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Loss, rewards `[B, K, 2]` of chosen and rejected, and lengths `[B, K]`, both padded."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        lengths = inputs["lengths"]
        rewards = torch.full((*lengths.shape, 2), float(_PADDING), device=lengths.device)
        rewards[lengths != _PADDING] = outputs["rewards"].flatten()[inputs["labels"]].float()
        return loss, rewards, lengths

    def _rewards(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Rewards `[N, T]` of a causal model at every position, `[N, 1]` of an encoder."""
        known = {name: inputs[name] for name in _OF_MODELS if name in inputs}
        return model(**known).logits if self._all_rewards is None else self._all_rewards.of(model, known)

    def _stop(self, inputs: dict[str, Any], loss: torch.Tensor) -> None:
        rows = inputs["rows"].tolist()
        path = Path(str(self.args.output_dir)) / f"non_finite_batch_{self.args.process_index}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: values for name, values in inputs.items() if isinstance(values, torch.Tensor)}
        save_file({name: values.contiguous().cpu() for name, values in tensors.items()}, path)
        raise NonFiniteLossError(
            f"loss is {float(loss.detach())} at step {self.state.global_step} (rows {', '.join(map(str, rows))}); the "
            f"batch is in {path}. Lower the learning rate, clip gradients, train in float32, or look at these rows"
        )


class _AllRewards:
    """Gets the rewards `[N, T]` of all positions out of a classifier's forward, which returns one of each row.

    Calling the parts instead would go round the wrappers that distribute a model over processes. Most classifiers hand
    all rewards to their loss function, which then returns them in place of a loss; from others, older ones, a hook
    takes them, which FSDP does not follow.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        classifier: Any = model
        if hasattr(classifier, "get_base_model"):
            classifier = classifier.get_base_model()
        self._hooked: list[torch.Tensor] = []
        self._by_loss = "loss_function" in inspect.unwrap(type(classifier).forward).__code__.co_names
        if self._by_loss:
            classifier.loss_function = _all_rewards
        else:
            classifier.score.register_forward_hook(lambda _, __, output: self._hooked.append(output))

    def of(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Rewards of a batch by the model, wrapped or not."""
        if self._by_loss:
            return model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
        model(**inputs, use_cache=False)
        return self._hooked.pop()[..., 0]


def _all_rewards(*, logits: torch.Tensor, **_: Any) -> torch.Tensor:
    # FSDP warns of views.
    return logits[..., 0].clone()


def _agreement(prediction: EvalPrediction) -> dict[str, float]:
    """Share of comparisons whose chosen response has the larger reward, by length and over all."""
    rewards, lengths = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
    right = rewards[..., 0] > rewards[..., 1]
    metrics = {}
    for length in lengths[lengths != _PADDING].unique().tolist():
        name = "agreement_finished" if length == _FINISHED else f"agreement_{length}"
        metrics[name] = right[lengths == length].double().mean().item()
    partial = lengths >= 0
    if partial.any():
        metrics["agreement"] = right[partial].double().mean().item()
        metrics["reward_gap"] = (rewards[..., 0] - rewards[..., 1])[partial].abs().double().mean().item()
    return metrics
