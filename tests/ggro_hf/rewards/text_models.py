"""Small random reward models that read text, with tokenizers other than the policy's."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification, PreTrainedTokenizerFast

from ggro_hf.rewards.base import Conversation
from tests.ggro_hf.small_models import small_reward, small_tokenizer

# As Gemma's: it writes the begin-of-sequence token itself, trims the answer, and closes its turn.
TRIMMING_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_SPECIAL = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
_MERGES = (
    "e r",
    "er e",
    "t h",
    "h e",
    "th e",
    "o u",
    "Ġ w",
    "a t",
    "! !",
    "!! !!",
    "Ġ Ġ",
    "n d",
    "a nd",
    "i s",
    "Ġ is",
)
_ENCODER_SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")


def gemma_like_tokenizer(template: str | None = TRIMMING_TEMPLATE) -> PreTrainedTokenizerFast:
    """Byte-level BPE over whole texts, so that merges cross words and the end of the prompt; adds <bos> itself."""
    tokens = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = [tuple(merge.split(" ")) for merge in _MERGES]
    vocabulary = {token: index for index, token in enumerate(tokens + ["".join(merge) for merge in merges])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        additional_special_tokens=list(_SPECIAL[3:]),
    )
    wrapped.chat_template = template
    return wrapped


def encoder_tokenizer(max_length: int = 512) -> PreTrainedTokenizerFast:
    """As DeBERTa-v3's: [CLS] a [SEP] b [SEP], no chat template, no begin-of-sequence token."""
    tokens = [*_ENCODER_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = [tuple(merge.split(" ")) for merge in _MERGES]
    vocabulary = {token: index for index, token in enumerate(tokens + ["".join(merge) for merge in merges])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        model_max_length=max_length,
    )


def small_encoder(tokenizer: PreTrainedTokenizerFast, *, seed: int = 0, **changes: object):
    """A DeBERTa-v3 with relative positions, fp32."""
    config = DebertaV2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        type_vocab_size=0,
        relative_attention=True,
        position_buckets=16,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,
        **{"num_labels": 1} | changes,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return DebertaV2ForSequenceClassification(config).eval()


def save_encoder(path: Path, **changes: object) -> PreTrainedTokenizerFast:
    """An encoder and its tokenizer as a checkpoint has them."""
    tokenizer = encoder_tokenizer()
    small_encoder(tokenizer, **changes).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return tokenizer


def save_causal(path: Path, *, family: str = "gemma3", template: str | None = TRIMMING_TEMPLATE, **changes: object):
    """A causal classifier in fp32 and its tokenizer as a checkpoint has them."""
    tokenizer = gemma_like_tokenizer(template)
    model = small_reward(family, seed=1, vocabulary=len(tokenizer), dtype=torch.float32, **changes)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return tokenizer


def conversation(prompt="where is the end", policy: PreTrainedTokenizerFast | None = None) -> Conversation:
    """A prompt that came in as text, or as messages (of which the ids do not matter here)."""
    policy = policy or small_tokenizer()
    text = prompt if isinstance(prompt, str) else str(prompt)
    return Conversation(policy(text)["input_ids"], prompt, policy)
