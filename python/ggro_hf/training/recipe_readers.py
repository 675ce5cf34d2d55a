"""How the models of a recipe read its partial responses."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ggro_hf.rewards.formats import ChatTemplate, Dialogue, Format, Pair, TextTemplate
from ggro_hf.rewards.loading import load_classifier, load_tokenizer, naming, require_one_label, require_tokenizer
from ggro_hf.training.fine_tune import set_padding
from ggro_hf.training.prefix_reader import PrefixReader
from ggro_hf.training.recipe import Recipe
from ggro_hf.training.scoring import PrefixScorer
from ggro_hf.training.step import StepError
from ggro_hf.training.units import Unit


def planned_reader(recipe: Recipe) -> PrefixReader:
    """The reader of the model that is to be trained, without its weights."""
    name, revision = recipe.model.name, recipe.model.revision
    with naming("model", name):
        config = AutoConfig.from_pretrained(name, revision=revision or "main")
        require_one_label(config, name)
        tokenizer = _tokenizer(recipe)
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
        set_padding(model, tokenizer)
    return trained_reader(recipe, model, tokenizer)


def trained_reader(recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PrefixReader:
    """The reader of the model that is trained."""
    unit = recipe.partial.make_unit(tokenizer)
    return PrefixReader.for_model(model, tokenizer, unit, _format(recipe.model.format, tokenizer))


def _format(name: str, tokenizer: PreTrainedTokenizerBase) -> Format | None:
    if name == "auto":
        return None
    if name == "chat":
        if tokenizer.chat_template is None:
            raise StepError(
                'model: format is "chat", but the tokenizer has no chat template; wanted dialogue, pair, or a text '
                "with {prompt} and {response}"
            )
        return ChatTemplate(tokenizer)
    if "{" in name:
        try:
            return TextTemplate(name)
        except ValueError as error:
            raise StepError(f"model: format {name!r}: {error}") from error
    formats = {"dialogue": Dialogue, "pair": Pair}
    if name not in formats:
        raise StepError(
            f"model: format is {name!r}; wanted auto, chat, dialogue, pair, or a text with {{prompt}} and {{response}}"
        )
    return formats[name]()


def scorer_of(
    recipe: Recipe,
    name: str | Path,
    device: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    format: str = "auto",
) -> PrefixScorer:
    """A reward model that scores the recipe's partial responses, which are cut in the units of the recipe's model.

    Raises LoadError where it cannot be loaded or read, StepError for a format that is none.
    """
    unit = planned_unit(recipe)
    with naming("reward model", name):
        model, tokenizer = load_classifier(name, dtype=getattr(torch, dtype), device=device, revision=revision)
        tokenizer = require_tokenizer(tokenizer, name)
        reader = PrefixReader.for_model(model, tokenizer, unit, _format(format, tokenizer))
        return PrefixScorer(model, reader, batch_tokens=recipe.batch_tokens)


def planned_unit(recipe: Recipe) -> Unit:
    """What the recipe counts lengths in."""
    with naming("model", recipe.model.name):
        return recipe.partial.make_unit(_tokenizer(recipe))


def _tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    name = recipe.model.name
    return require_tokenizer(load_tokenizer(name, revision=recipe.model.revision or "main"), name)
