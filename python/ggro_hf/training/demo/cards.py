"""Model cards of the embedded demo models."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ggro_hf.training.demo.policy import PolicyRecipe
from ggro_hf.training.demo.reward import RewardRecipe

if TYPE_CHECKING:
    from ggro_hf.training.demo.models import DemoReport

_CITATION = """\
## Data and citation

Trained on the Large Movie Review Dataset, released for research use. The weights are for research and demonstration.

```bibtex
@inproceedings{maas-etal-2011-learning,
  title     = {Learning Word Vectors for Sentiment Analysis},
  author    = {Maas, Andrew L. and Daly, Raymond E. and Pham, Peter T. and
               Huang, Dan and Ng, Andrew Y. and Potts, Christopher},
  booktitle = {Proceedings of the 49th Annual Meeting of the Association for Computational Linguistics},
  year      = {2011},
  pages     = {142--150}
}
```
"""

_TOKENIZER = """\
Byte-level BPE, {vocab_size} entries, trained on the same reviews; `<br />` marks became newlines. `<|begin|>` is put
in front by the tokenizer, `<|end|>` closes a review, `<|pad|>` pads. The three models share it."""

_HOW_MADE = """\
## How it was made

```
ggro train-demo --data DIR --output python/ggro_hf/demo_models --seed {seed}
```

`DIR` holds `train.jsonl.gz` and `val.jsonl.gz`, one `{{"text", "label"}}` per line. {minutes:.0f} minutes on two CPU
cores shared with other work{beside}. Stored as float16, computed in float32; every figure above was measured on the
stored weights, loaded back in float32 by plain transformers. Another CPU, thread count or torch version rounds
differently, so the command repeats the recipe, not the bits."""


def policy_card(
    recipe: PolicyRecipe, report: "DemoReport", sizes: Mapping[str, int], seed: int, samples: list[str]
) -> str:
    """Model card of the policy."""
    epochs = recipe.steps * recipe.tokens_per_step / sizes["tokens"]
    quoted = "\n\n---\n\n".join("\n".join(f"> {line}".rstrip() for line in text.splitlines()) for text in samples)
    return f"""\
---
license: other
library_name: transformers
pipeline_tag: text-generation
language: en
---
# Demo policy: a small language model of film reviews

Llama, {report.parameters["policy"] / 1e6:.2f} million parameters: {recipe.layers} layers, {recipe.hidden_size} wide,
{recipe.attention_heads} heads over {recipe.key_value_heads} key/value heads, MLP {recipe.intermediate_size},
tied embeddings, context {recipe.context} (trained on rows of {recipe.early_row_length} tokens and, in the last
{recipe.long_row_steps} steps, of {recipe.row_length}).
{_TOKENIZER.format(vocab_size=report.vocab_size)}

| held out: {sizes["held_out"]:,} reviews cut to {recipe.row_length} tokens | |
|---|---|
| perplexity per token | {report.perplexity:.2f} |
| bits per UTF-8 byte | {report.bits_per_byte:.3f} |

Trained on all {sizes["train"]:,} training reviews ({sizes["tokens"] / 1e6:.2f} million tokens): {recipe.steps} steps
of {recipe.tokens_per_step} tokens ({epochs:.2f} epochs), Muon for matrices (learning rate {recipe.matrix_lr:g}) and
AdamW for the rest ({recipe.other_lr:g}), {recipe.warmup} warm-up steps, linear decay to zero over the last
{recipe.decay}, weight decay {recipe.weight_decay:g} on matrices, bfloat16 autocast.

{_HOW_MADE.format(seed=seed, minutes=report.seconds["policy"] / 60, beside="")}

## Samples

Temperature 0.8, at most 160 tokens, from the first two demo prompts, unselected:

{quoted}

## Limitations

A demonstration of decoding methods, not a writer: sentences are mostly grammatical and on topic, but the text has no
plan, invents films and people, contradicts itself, and repeats what anonymous reviewers wrote, prejudice included.
English only.

{_CITATION}"""


def reward_card(name: str, recipe: RewardRecipe, report: "DemoReport", sizes: Mapping[str, int], seed: int) -> str:
    """Model card of the reward or the gold model."""
    accuracy = report.accuracy[name]
    prefixes = [length for length in accuracy if length.isdigit()]
    half, use = {
        "reward": ("first", "It guides the decoding."),
        "gold": ("second", "It judges texts that the reward model guided; the two were trained on disjoint reviews."),
    }[name]
    return f"""\
---
license: other
library_name: transformers
pipeline_tag: text-classification
language: en
---
# Demo {name} model: sentiment of a film review, at every prefix

{use} `LlamaForSequenceClassification` with one label: the score at the last token is the log-odds
that the review, of which the text may be only a beginning, is positive.
{report.parameters[name] / 1e6:.2f} million parameters: the demo policy's embedding, first {recipe.layers} layers and
final norm, trained further, and a head.
{_TOKENIZER.format(vocab_size=report.vocab_size)}

Held-out accuracy at threshold 0, {sizes["held_out"]:,} reviews, by prefix length in tokens (`<|begin|>` counted; a
shorter review is scored at its last token). Finished: reviews of up to {prefixes[-1]} tokens, scored at `<|end|>`.

| {" | ".join(prefixes)} | finished |
|{"---|" * (len(prefixes) + 1)}
| {" | ".join(f"{100 * accuracy[length]:.1f} %" for length in prefixes)} | {100 * accuracy["finished"]:.1f} % |

Trained on the {half} half of the training reviews ({sizes["train"] // 2:,}), {recipe.epochs} epochs in steps of about
{recipe.tokens_per_step} tokens. The loss of a review is {1 - recipe.last_weight:g} times the mean binary cross-entropy
over its positions from {recipe.first_position} on plus {recipe.last_weight:g} times that of its last position.
{100 * recipe.hide_probability:.0f} % of the tokens are hidden, dropout {recipe.dropout:g} before the head; complete
reviews end in `<|end|>` with probability {recipe.end_probability:g}. Muon for matrices (learning rate
{recipe.matrix_lr:g}), AdamW for the rest ({recipe.other_lr:g}), {recipe.warmup} warm-up steps, linear decay to zero,
weight decay {recipe.weight_decay:g} on matrices, bfloat16 autocast. The policy it starts from has read all training
reviews, both halves, without their labels. The learning rates were chosen on the first 600 held-out reviews.

{_HOW_MADE.format(seed=seed, minutes=report.seconds[name] / 60, beside=", beside the other of the two")}

## Limitations

Reads sentiment, not quality or truth; short prefixes carry little of it, so their scores stay near the prior. Trained
on human reviews: text optimised against the score can please it without being a better or even a positive review.
English film reviews only.

{_CITATION}"""
