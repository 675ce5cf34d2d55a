"""Causal rewards that read text, loaded as checkpoints are, against a plain forward of every whole text."""

import random
from itertools import pairwise

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
)

import ggro_hf
from ggro_hf import ARGS, ChunkBeamSearch
from ggro_hf.results import Counters
from ggro_hf.rewards.base import Conversation
from ggro_hf.rewards.formats import ChatTemplate, Pair, TextTemplate
from ggro_hf.rewards.function import FunctionReward
from ggro_hf.rewards.heads import LoadedBackbone
from ggro_hf.rewards.text import TextReward
from ggro_hf.rewards.tree import CausalTree
from tests.ggro_hf.rewards.head_models import checkpoint, gated, hidden_states
from tests.ggro_hf.rewards.text_models import conversation, encoder_tokenizer, gemma_like_tokenizer, save_causal
from tests.ggro_hf.small_models import (
    END_OF_TURN,
    FAMILIES,
    small_config,
    small_policy,
    small_reward,
    small_tokenizer,
)

POLICY = small_tokenizer()
PROMPT = "where is the end"


def ids(text):
    return POLICY(text)["input_ids"]


def plain(model, tokenizer, response_ids, prompt=PROMPT):
    """The reward as transformers alone computes it."""
    answer = POLICY.decode(response_ids, skip_special_tokens=True).rstrip("\ufffd")
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    with torch.no_grad():
        return model(**tokenizer.apply_chat_template(turns, return_dict=True, return_tensors="pt")).logits[0, 0].item()


def reward_of(family, *, seed=1, **settings):
    tokenizer = gemma_like_tokenizer()
    return TextReward(small_reward(family, seed=seed, vocabulary=len(tokenizer)), tokenizer, **settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_gives_the_rewards_of_plain_forwards(family, tmp_path):
    save_causal(tmp_path, family=family)
    reward = TextReward.from_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    answers = [ids("the end is there"), ids("and"), [], [*ids("the otter"), END_OF_TURN]]
    (rewards,) = reward.open(conversation(PROMPT), Counters(), 20).score([answers])
    assert rewards == pytest.approx([plain(model, tokenizer, answer) for answer in answers], abs=1e-5)
    assert max(rewards) - min(rewards) > 0.01
    assert reward.score_response(conversation(PROMPT), answers[0]) == pytest.approx(rewards[0], abs=1e-5)
    assert TextReward.from_pretrained(tmp_path, dtype=torch.bfloat16).model.dtype is torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_search_over_several_sequences_equals_plain_forwards(family, seed):
    reward = reward_of(family)
    scoring = reward.open(conversation(PROMPT), Counters(), 30)
    draw = random.Random(seed)
    sequences = [[]]
    for _ in range(6):
        # Mostly pieces of text, at times any bytes, special tokens and broken characters among them.
        continuations = [
            [
                draw.choice(
                    [
                        ids(draw.choice(["the", " the", "re", " ", "\n", "!", "!!", "é", "🙂", " <end_of_turn>"]))[:3],
                        [draw.randrange(len(POLICY)) for _ in range(draw.randrange(4))],
                    ]
                )
                for _ in range(draw.randrange(1, 6))
            ]
            for _ in sequences
        ]
        rewards = scoring.score(continuations)
        for sequence, own, got in zip(sequences, continuations, rewards, strict=True):
            expected = [plain(reward.model, reward.tokenizer, sequence + continuation) for continuation in own]
            assert got == pytest.approx(expected, abs=1e-9)
        places = [(sequence, index) for sequence, own in enumerate(continuations) for index in range(len(own))]
        chosen = [draw.choice(places) for _ in range(draw.choice([1, 1, 3, 4]))]
        scoring.keep(chosen)
        sequences = [sequences[sequence] + continuations[sequence][index] for sequence, index in chosen]


def test_tokens_that_change_with_what_follows():
    reward = reward_of("llama")
    whole = [reward.tokenizer("x" + text)["input_ids"] for text in ("th", "the", "there", "th the")]
    # Each text begins with the one before, its tokens do not.
    assert all(first != second[: len(first)] for first, second in pairwise(whole[:3]))
    scoring = reward.open(conversation(PROMPT), Counters(), 20)
    response = []
    for text in ("th", "e", "r", "e", "!", "!", "!", "!", " ", " ", "w", "here"):
        continuations = [ids(text), ids(text + "x"), ids("\n" + text)]
        (rewards,) = scoring.score([continuations])
        expected = [plain(reward.model, reward.tokenizer, response + continuation) for continuation in continuations]
        assert rewards == pytest.approx(expected, abs=1e-9)
        scoring.keep([(0, 0)])
        response += continuations[0]


def test_only_what_is_new_goes_through_the_model():
    reward = reward_of("llama")
    counters = Counters()
    scoring = reward.open(conversation(PROMPT), counters, 20)
    tokens = [ids(letter) for letter in "abcdefghijkl"]
    scoring.score([tokens])
    closing = len(reward.tokenizer("<end_of_turn>\n", add_special_tokens=False)["input_ids"])
    prompt = len(
        reward.tokenizer("<start_of_turn>user\n" + PROMPT + "<end_of_turn>\n<start_of_turn>model\n")["input_ids"]
    )
    assert counters.reward_forward_tokens == prompt + 12 * (1 + closing)
    scoring.keep([(0, 3)])
    scoring.score([tokens])
    assert counters.reward_forward_tokens == prompt + 2 * 12 * (1 + closing)
    # Again without a choice: all is known.
    scoring.score([tokens])
    assert counters.reward_forward_tokens == prompt + 2 * 12 * (1 + closing)
    # Two of one sequence and one of them twice: each goes on from its own.
    scoring.keep([(0, 1), (0, 2), (0, 1)])
    rewards = scoring.score([tokens[:2], tokens[:1], [*tokens[:3], []]])
    assert counters.reward_forward_tokens == prompt + (2 * 12 + 2 + 1 + 1) * (1 + closing)
    assert rewards[0] == rewards[2][:2]


def test_equal_inputs_are_computed_once():
    reward = reward_of("gemma3")
    counters = Counters()
    scoring = reward.open(conversation(PROMPT), counters, 20)
    spelled = [ids(letter)[0] for letter in "the"]
    emoji = ids("🙂")
    # Other tokens of the same text, whitespace that the template trims, special tokens, and half a character.
    continuations = [
        ids("the"),
        spelled,
        ids("the "),
        ids(" the\n"),
        [*ids("the"), END_OF_TURN],
        ids("the") + emoji[:2],
    ]
    (rewards,) = scoring.score([continuations])
    alone = Counters()
    reward.open(conversation(PROMPT), alone, 20).score([[ids("the")]])
    assert len(set(rewards)) == 1
    assert counters.reward_forward_tokens == alone.reward_forward_tokens
    scoring.keep([(0, 5)])
    expected = plain(reward.model, reward.tokenizer, ids("the") + emoji)
    assert scoring.score([[emoji[2:]]]) == [[pytest.approx(expected, abs=1e-9)]]


def test_a_finished_sequence_costs_nothing():
    reward = reward_of("llama")
    counters = Counters()
    scoring = reward.open(conversation(PROMPT), counters, 20)
    (first,) = scoring.score([[[*ids("the"), END_OF_TURN], ids("and")]])
    scoring.keep([(0, 0), (0, 1)])
    before = counters.reward_forward_tokens
    ((kept,), (_,)) = scoring.score([[[]], [ids("re")]])
    assert kept == first[0]
    scored = counters.reward_forward_tokens - before
    assert 0 < scored < 8
    scoring.keep([(0, 0), (1, 0), (0, 0)])
    rewards = scoring.score([[[]], [ids("d")], [ids("re")]])
    assert rewards[0] == [kept]
    for got, response in ((rewards[1], "andred"), (rewards[2], "there")):
        assert got == [pytest.approx(plain(reward.model, reward.tokenizer, ids(response)), abs=1e-9)]


def test_inputs_with_nothing_in_common():
    tokenizer = small_tokenizer()
    format = TextTemplate("{response} {prompt}")
    reward = TextReward(small_reward("qwen3", seed=4, vocabulary=len(tokenizer)), tokenizer, format=format)
    scoring = reward.open(conversation(PROMPT), Counters(), 20)
    for response in ("", "z", "zq"):
        continuations = [ids("the"), ids("z"), ids("q"), []]
        (rewards,) = scoring.score([continuations])
        for got, continuation in zip(rewards, continuations, strict=True):
            text = f"{response}{POLICY.decode(continuation)} {PROMPT}"
            with torch.no_grad():
                expected = reward.model(**tokenizer(text, return_tensors="pt")).logits[0, 0].item()
            assert got == pytest.approx(expected, abs=1e-9)
        scoring.keep([(0, (1, 2, 0)[len(response)])])


def test_another_head_and_a_pair():
    tokenizer = gemma_like_tokenizer(None)
    model = small_reward("llama", seed=3, vocabulary=len(tokenizer))
    weights = torch.linspace(-1, 1, 32, dtype=torch.float64)
    reward = TextReward(model.model, tokenizer, head=lambda hidden: (hidden @ weights).sigmoid(), format=Pair())
    with torch.no_grad():
        hidden = model.model(**tokenizer([PROMPT], ["the"], return_tensors="pt")).last_hidden_state[0, -1]
    expected = (hidden @ weights).sigmoid().item()
    assert reward.score_response(conversation(PROMPT), ids("the")) == pytest.approx(expected, abs=1e-9)
    with pytest.raises(ValueError, match=r"head returned the shape \[2, 32\] for 2 hidden states"):
        TextReward(model.model, tokenizer, head=lambda hidden: hidden)


TURN = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
TURNS_TEMPLATE = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>{% endfor %}"
)


def test_the_gate_of_the_rendered_prompt_is_that_of_every_response(tmp_path):
    tokenizer = gemma_like_tokenizer(TURNS_TEMPLATE)
    tensors = gated(torch.Generator().manual_seed(5))
    checkpoint(tmp_path, tensors, tokenizer=tokenizer)
    loaded = LoadedBackbone.from_pretrained(tmp_path, dtype=torch.float64)
    reward = TextReward(loaded.model, loaded.tokenizer, head=loaded.head)
    turn = tokenizer.encode(TURN, add_special_tokens=False)
    for prompt in (PROMPT, "who"):
        scoring = reward.open(conversation(prompt), Counters(), 99)
        # A response that writes a turn's beginning, not in special tokens, does not move the gate.
        continuations = [ids("the"), [], [*ids("the<|eot"), *ids(TURN.removeprefix("<|eot")), *ids("x")]]
        assert TURN in POLICY.decode(continuations[2], skip_special_tokens=True)
        for rounds in range(2):
            before = "" if rounds == 0 else "the"
            for continuation, got in zip(continuations, scoring.score([continuations])[0], strict=True):
                answer = before + POLICY.decode(continuation, skip_special_tokens=True)
                messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
                # The tokenizer begins the text, which this template does not.
                tokens = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False))["input_ids"]
                hidden = hidden_states(loaded.model, tokens)
                first = next(at for at in range(len(tokens)) if tokens[at : at + len(turn)] == turn)
                readout = loaded.head.for_prompt(turn, hidden[first : first + len(turn)])
                assert got == pytest.approx(readout(hidden[-1:]).item(), abs=1e-6)
            scoring.keep([(0, 0)])
    loaded.tokenizer.chat_template = gemma_like_tokenizer().chat_template
    with pytest.raises(ValueError, match="prompt does not have the tokens"):
        TextReward(loaded.model, loaded.tokenizer, head=loaded.head).open(conversation("who"), Counters(), 9)


@pytest.mark.parametrize(
    "decoder",
    [
        lambda reward: ARGS(reward, weight=20.0, candidates=6),
        lambda reward: ChunkBeamSearch(reward, width=3, successors=2, chunk_length=3, seed=1),
    ],
)
def test_decoders_answer_as_with_a_function_that_computes_everything(decoder):
    reward = reward_of("gemma3")
    policy = small_policy(seed=5, vocabulary=len(POLICY), gain=0.5)

    def whole(texts):
        with torch.no_grad():
            encoded = [reward.tokenizer(text, add_special_tokens=False, return_tensors="pt") for text in texts]
            return [reward.model(**inputs).logits[0, 0] for inputs in encoded]

    answers = []
    for each in (reward, FunctionReward(whole, format=ChatTemplate(reward.tokenizer))):
        prompts = [PROMPT, "who"]
        answers.append(ggro_hf.generate(policy, POLICY, prompts, decoder(each), max_new_tokens=12, progress=False))
    for text, function in zip(*answers, strict=True):
        assert text.token_ids == function.token_ids
        assert text.reward == pytest.approx(function.reward, abs=1e-9)


def test_what_does_not_fit_is_named():
    tokenizer = gemma_like_tokenizer()
    model = small_reward("llama", seed=1, vocabulary=len(tokenizer), max_position_embeddings=64)
    reward = TextReward(model, tokenizer)
    assert reward.capabilities.max_tokens == 64
    with pytest.raises(ValueError, match=r"prompt alone takes \d+ tokens of the reward model, whose context has 64"):
        reward.open(conversation("z" * 60), Counters(), 1)
    scoring = reward.open(conversation("z" * 10), Counters(), 60)
    scoring.score([[ids("q")]])
    with pytest.raises(ValueError, match=r"whose context has 64, at continuation 1 of sequence 0, the text 'qqqqq"):
        scoring.score([[ids("q"), ids("q" * 50)]])


def test_what_is_missing_is_named():
    reward = reward_of("llama")
    with pytest.raises(ValueError, match="pass tokenizer="):
        reward.open(Conversation([1, 2]), Counters(), 1)
    chat = POLICY.apply_chat_template(
        [{"role": "user", "content": "x"}], chat_template="{{ messages[0].content }}<|eot_id|>", return_dict=True
    )["input_ids"]
    with pytest.raises(ValueError, match="ids that no text has"):
        reward.open(Conversation(chat, None, POLICY), Counters(), 1)
    tokenizer = small_tokenizer()
    bare = TextReward(small_reward(seed=1, vocabulary=len(tokenizer)), tokenizer, format=TextTemplate("{response}"))
    with pytest.raises(ValueError, match=r"no tokens at continuation 1 of sequence 0, the text ''"):
        bare.open(conversation(PROMPT), Counters(), 9).score([[ids("a"), []]])


def test_models_that_are_no_causal_classifier_are_refused(tmp_path):
    tokenizer = gemma_like_tokenizer()
    two = LlamaForSequenceClassification(small_config("llama", vocabulary=len(tokenizer), num_labels=2))
    with pytest.raises(ValueError, match="no linear `score` head for one number"):
        TextReward(two, tokenizer)
    two.save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="2 labels"):
        TextReward.from_pretrained(tmp_path / "two")
    policy = small_policy(seed=0, vocabulary=len(tokenizer), dtype=torch.float32, num_labels=1)
    policy.save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    with pytest.raises(ValueError, match=r"lacks the weights score\.weight"):
        TextReward.from_pretrained(tmp_path / "policy")
    with pytest.raises(ValueError, match=r"no linear `score` head"):
        TextReward(policy, tokenizer)
    broken = small_reward(seed=9, vocabulary=len(tokenizer))
    broken.score.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        TextReward(broken, tokenizer)


def test_an_encoder_is_refused():
    tokenizer = encoder_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=1,
        initializer_range=0.5,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForSequenceClassification(config)
    with pytest.raises(ValueError, match="use EncoderReward"):
        TextReward(model, tokenizer)
    with pytest.raises(ValueError, match=r"BertModel.*not causal"):
        TextReward(model, tokenizer, head=lambda hidden: hidden[:, 0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rewound_tree_computes_what_it_has_lost(family):
    vocabulary = 61
    model = small_reward(family, seed=6, vocabulary=vocabulary)
    tree = CausalTree(model.model, Counters())
    beginning, endings = list(range(5, 20)), [[30, 31, 32], [40, 41], [50, 51, 52, 53]]
    tree.extend(beginning)
    tree.branch([endings])
    tree.keep([(0, 0), (0, 1), (0, 2), (0, 0)])
    # Into a tail, all of one, into the common beginning, not at all.
    lengths = [16, 15, 9, 18]
    tree.rewind(lengths)
    wanted = [(beginning + endings[i])[:length] for i, length in zip((0, 1, 2, 0), lengths, strict=True)]
    assert tree.sequences == wanted
    hidden = tree.branch([[[7, 8], [9]], [[7]], [[7, 8]], [[], [7]]])
    for sequence, branches, got in zip(wanted, [[[7, 8], [9]], [[7]], [[7, 8]], [[], [7]]], hidden, strict=True):
        for branch, states in zip(branches, got, strict=True):
            with torch.no_grad():
                expected = model.model(input_ids=torch.tensor([sequence + branch])).last_hidden_state[0, -1]
            torch.testing.assert_close(states[-1], expected, rtol=0, atol=1e-10)
    tree.keep([(2, 0)])
    assert tree.sequences == [[*wanted[2], 7, 8]]
    tree.rewind([3])
    tree.extend([9])
    with torch.no_grad():
        expected = model.model(input_ids=torch.tensor([[*beginning[:3], 9]])).last_hidden_state[0, -1]
    torch.testing.assert_close(tree.branch([[[]]])[0][0][0], expected, rtol=0, atol=1e-10)


def test_a_vocabulary_of_its_own_is_no_obstacle():
    reward = reward_of("llama")
    reward.check_tokenizer(POLICY)
    assert not reward.capabilities.reads_ids
    assert reward.capabilities.cached_prefix and reward.capabilities.tree
