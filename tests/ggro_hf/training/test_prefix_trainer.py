"""The trainer's loss and gradient against a plain pass for every partial response, and what may not change them."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    OPTConfig,
    OPTForSequenceClassification,
    TrainingArguments,
)

from ggro_hf.pairs import PartialPair, PreferencePair
from ggro_hf.rewards.formats import ChatTemplate, Pair
from ggro_hf.training.prefix_reader import PrefixReader
from ggro_hf.training.prefix_trainer import NonFiniteLossError, PairCollator, PrefixTrainer, WeighedInputs
from ggro_hf.training.scoring import PrefixScorer
from ggro_hf.training.units import Tokens, Words
from tests.ggro_hf.small_models import small_tokenizer
from tests.ggro_hf.training.preference_data import VOCABULARY, causal_classifier, encoder_classifier, weighed_pairs

TOKENIZER = small_tokenizer()


def arguments(directory, **changes):
    settings = {
        "output_dir": str(directory),
        "use_cpu": True,
        "report_to": [],
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return TrainingArguments(**settings | changes)


def plain_reward(model, reader, prompt, response, length):
    """A pass for one partial response, read where the model itself reads."""
    (encoded,) = reader._encoder(prompt)(response, (length,))
    return model(**{name: torch.tensor([values]) for name, values in encoded.items()}).logits[0, 0]


def plain_loss(model, reader, pairs):
    """Mean over all comparisons."""
    losses = []
    for weighed in pairs:
        pair = weighed.partial.pair
        for length, weight in zip(weighed.partial.lengths, weighed.weights, strict=True):
            chosen, rejected = (
                plain_reward(model, reader, pair.prompt, response, length) for response in (pair.chosen, pair.rejected)
            )
            losses.append(-weight * logsigmoid(chosen - rejected))
    return torch.stack(losses).mean()


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def chat_tokenizer():
    tokenizer = small_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}<|begin_of_text|>{{ message['role'] }}: {{ message['content'] }}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}<|begin_of_text|>assistant: {% endif %}"
    )
    return tokenizer


def closed(family, implementation):
    """Every partial response closed: branches of the longest."""
    tokenizer = chat_tokenizer()
    model = causal_classifier(family)
    model.set_attn_implementation(implementation)
    return model, PrefixReader.for_model(model, tokenizer, Tokens(tokenizer), ChatTemplate(tokenizer))


def older_classifier(kind):
    """One whose forward computes its loss by itself, so that no loss function is given all rewards."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "gpt2":
            config = GPT2Config(
                vocab_size=VOCABULARY,
                n_embd=32,
                n_layer=2,
                n_head=4,
                num_labels=1,
                pad_token_id=3,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                initializer_range=0.2,
            )
            return GPT2ForSequenceClassification(config)
        shape = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2, "dropout": 0.0}
        config = OPTConfig(vocab_size=VOCABULARY, num_attention_heads=4, num_labels=1, pad_token_id=3, **shape)
        return OPTForSequenceClassification(config)


def readers():
    causal = {"causal": True}
    return {
        "closed": closed("llama", "sdpa"),
        "closed, eager": closed("llama", "eager"),
        "closed, two kinds of layers": closed("gemma3", "sdpa"),
        "closed, two kinds of layers, eager": closed("qwen3", "eager"),
        "closed, all layers with a window": closed("mistral", "sdpa"),
        "tokens": (causal_classifier(), PrefixReader(TOKENIZER, Tokens(TOKENIZER), **causal)),
        "words joined anew": (causal_classifier(), PrefixReader(TOKENIZER, Words(rejoin=True), **causal)),
        "sliding window": (causal_classifier("gemma3"), PrefixReader(TOKENIZER, Words(), **causal)),
        "GPT-2": (older_classifier("gpt2"), PrefixReader(TOKENIZER, Tokens(TOKENIZER), **causal)),
        "OPT": (older_classifier("opt"), PrefixReader(TOKENIZER, Tokens(TOKENIZER), **causal)),
        "encoder": (
            encoder_classifier(TOKENIZER),
            PrefixReader(TOKENIZER, Tokens(TOKENIZER), causal=False, format=Pair()),
        ),
    }


@pytest.mark.parametrize("name", readers())
def test_loss_and_gradient_are_those_of_a_pass_for_every_partial_response(name, tmp_path):
    model, reader = readers()[name]
    pairs = weighed_pairs(3)
    expected = plain_loss(model.train(), reader, pairs)
    expected.backward()
    wanted = gradients(model)
    model.zero_grad()
    trainer = PrefixTrainer(model, arguments(tmp_path), reader, pairs)
    data = WeighedInputs(pairs, reader)
    loss = trainer.compute_loss(model, PairCollator(reader)([data[index] for index in range(len(pairs))]))
    loss.backward()
    assert math.isclose(loss.item(), expected.item(), rel_tol=2e-6)
    assert wanted.keys() == gradients(model).keys()
    largest = max(gradient.abs().max() for gradient in wanted.values())
    for parameter, gradient in gradients(model).items():
        # Some are zero but for rounding: a bias of keys, say.
        scale = max(wanted[parameter].abs().max(), 0.1 * largest)
        assert (gradient - wanted[parameter]).abs().max() <= 2e-5 * scale, parameter


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3", "mistral"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_closed_turns_are_branches_of_one_input(family, implementation):
    model, reader = closed(family, implementation)
    pairs = weighed_pairs(3, lengths=(1, 2, 5, 8, None))
    for weighed in pairs:
        read = reader.read(weighed.partial)
        assert len(read.inputs) == 2
        apart = PrefixReader(reader.tokenizer, reader.unit, causal=True, format=reader.format).read(weighed.partial)
        assert len(apart.inputs) > 6
        assert (
            sum(len(row["input_ids"]) for row in read.inputs) < sum(len(row["input_ids"]) for row in apart.inputs) / 2
        )
    scorer = PrefixScorer(model, reader)
    one_by_one = PrefixScorer(model, PrefixReader(reader.tokenizer, reader.unit, causal=True, format=reader.format))
    partials = [weighed.partial for weighed in pairs]
    for together, alone in zip(scorer.score(partials), one_by_one.score(partials), strict=True):
        assert together.chosen == pytest.approx(alone.chosen, abs=2e-5)
        assert together.rejected == pytest.approx(alone.rejected, abs=2e-5)


def test_equal_beginnings_closed_are_a_tie():
    model, reader = closed("llama", "sdpa")
    pair = PreferencePair(1, "Tell me", " the cat and then", " the cat was there")
    (rewards,) = PrefixScorer(model, reader).score([PartialPair(pair, (1, 2, None))])
    assert rewards.chosen[:2] == rewards.rejected[:2]
    assert rewards.chosen[2] != rewards.rejected[2]


def test_an_attention_without_masks_reads_closed_turns_one_by_one():
    model = causal_classifier()
    model.config._attn_implementation = "flash_attention_2"
    tokenizer = chat_tokenizer()
    reader = PrefixReader.for_model(model, tokenizer, Tokens(tokenizer), ChatTemplate(tokenizer))
    assert reader.masks is None
    assert len(reader.read(PartialPair(PreferencePair(1, "Tell me", " a cat", " the cat"), (1, None))).inputs) == 4


def test_a_causal_model_computes_a_response_once(tmp_path):
    reader = PrefixReader(TOKENIZER, Tokens(TOKENIZER), causal=True)
    pairs = weighed_pairs(2, lengths=(*range(1, 20), None))
    data = WeighedInputs(pairs, reader)
    batch = PairCollator(reader)([data[0], data[1]])
    assert batch["input_ids"].shape[0] == 4
    assert batch["labels"].shape == (40, 2)


def trained(tmp_path, model, pairs, **changes):
    reader = PrefixReader.for_model(model, TOKENIZER, Tokens(TOKENIZER))
    trainer = PrefixTrainer(model, arguments(tmp_path, **changes), reader, pairs)
    trainer.train()
    return {name: values.clone() for name, values in model.state_dict().items()}


def assert_same_weights(one, other, tolerance):
    for name, values in one.items():
        assert (values - other[name]).abs().max() <= tolerance, name


def test_batches_and_accumulation_do_not_change_the_step(tmp_path):
    # Pairs of unequal numbers of comparisons: a mean of means would differ.
    pairs = weighed_pairs(5, lengths=(1, 2, None)) + weighed_pairs(3, lengths=(4,), seed=5)
    # SGD: Adam would hide a factor.
    options = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
    whole = trained(tmp_path, causal_classifier(), pairs, per_device_train_batch_size=8, **options)
    parts = trained(
        tmp_path,
        causal_classifier(),
        pairs,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        **options,
    )
    start = causal_classifier().state_dict()
    assert max((whole[name] - start[name]).abs().max() for name in start) > 1e-3
    assert_same_weights(whole, parts, 1e-6)


def test_pairs_of_similar_length_are_put_together_where_transformers_is_asked_to(tmp_path):
    pairs = weighed_pairs(64, lengths=(1, None))
    tokens = {}
    for strategy in ("random", "group_by_length"):
        model = causal_classifier()
        reader = PrefixReader.for_model(model, TOKENIZER, Tokens(TOKENIZER))
        options = {"train_sampling_strategy": strategy, "learning_rate": 0.0}
        trainer = PrefixTrainer(model, arguments(tmp_path, **options), reader, pairs, pairs[:8])
        batches = []
        model.get_input_embeddings().register_forward_hook(
            lambda _, args, output, batches=batches: batches.append(args[0].numel())
        )
        trainer.train()
        tokens[strategy] = sum(batches)
        trainer.evaluate()
    assert tokens["group_by_length"] < 0.95 * tokens["random"]


def test_gradient_checkpointing_does_not_change_the_training(tmp_path):
    pairs = weighed_pairs(8)
    plain = trained(tmp_path, causal_classifier(), pairs)
    assert_same_weights(plain, trained(tmp_path, causal_classifier(), pairs, gradient_checkpointing=True), 1e-6)


def test_bf16_arithmetic_stays_near(tmp_path):
    pairs = weighed_pairs(8)
    options = {"optim": "sgd", "learning_rate": 0.01}
    plain = trained(tmp_path, causal_classifier(), pairs, **options)
    half = trained(tmp_path, causal_classifier(), pairs, bf16=True, **options)
    start = causal_classifier().state_dict()
    moved = max((plain[name] - start[name]).abs().max() for name in start)
    assert_same_weights(plain, half, 0.1 * moved)
    assert all(values.dtype == torch.float32 for values in half.values())


def test_training_raises_the_agreement_that_evaluation_reports(tmp_path):
    pairs = weighed_pairs(48, lengths=(2, 5, None))
    model = causal_classifier()
    reader = PrefixReader.for_model(model, TOKENIZER, Tokens(TOKENIZER))
    trainer = PrefixTrainer(model, arguments(tmp_path, num_train_epochs=6, learning_rate=3e-3), reader, pairs, pairs)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"]
    for name in ("eval_agreement", "eval_agreement_2", "eval_agreement_5", "eval_agreement_finished"):
        assert after[name] > before[name], name


def test_evaluation_counts_what_a_plain_pass_for_every_partial_response_counts(tmp_path):
    pairs = weighed_pairs(7, lengths=(2, None)) + weighed_pairs(2, lengths=(3,), seed=3)
    model = causal_classifier().eval()
    reader = PrefixReader.for_model(model, TOKENIZER, Tokens(TOKENIZER))
    metrics = PrefixTrainer(model, arguments(tmp_path, per_device_eval_batch_size=2), reader, pairs, pairs).evaluate()
    right = {2: [], 3: [], None: []}
    gaps = []
    for weighed in pairs:
        pair = weighed.partial.pair
        for length in weighed.partial.lengths:
            with torch.no_grad():
                chosen, rejected = (
                    plain_reward(model, reader, pair.prompt, text, length).item()
                    for text in (pair.chosen, pair.rejected)
                )
            right[length].append(chosen > rejected)
            if length is not None:
                gaps.append(abs(chosen - rejected))
    for length, values in right.items():
        name = "finished" if length is None else length
        assert metrics[f"eval_agreement_{name}"] == pytest.approx(sum(values) / len(values))
    assert metrics["eval_reward_gap"] == pytest.approx(sum(gaps) / len(gaps), rel=1e-4)


def test_a_loss_that_is_no_number_stops_and_leaves_the_batch(tmp_path):
    pairs = weighed_pairs(6)
    model = causal_classifier()
    with torch.no_grad():
        model.score.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteLossError, match=r"loss is nan at step 0 \(rows \d+, .*Lower the learning rate"):
        trained(tmp_path, model, pairs)
    (path,) = tmp_path.glob("non_finite_batch_0.safetensors")
    saved = load_file(path)
    assert saved["rows"].numel() == 4
    assert {"input_ids", "labels", "weights", "lengths"} <= saved.keys()


def test_several_gpus_in_a_process_are_refused(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 2
    model = causal_classifier()
    with pytest.raises(ValueError, match=r"2 GPUs are visible to one process; .*accelerate launch"):
        PrefixTrainer(model, args, PrefixReader.for_model(model, TOKENIZER, Tokens(TOKENIZER)), weighed_pairs(2))
