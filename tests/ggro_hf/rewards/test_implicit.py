"""The implicit reward against log-softmax of two plain language models' logits."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from ggro_hf.results import Counters
from ggro_hf.rewards.base import Conversation
from ggro_hf.rewards.implicit import ImplicitReward
from tests.ggro_hf.small_models import FAMILIES, small_policy, small_reward, small_tokenizer

VOCABULARY = 300
PROMPT = [0, 41, 77, 130, 250, 12, 9, 33, 61, 18]


def pair(family="llama", **changes):
    return [small_policy(family, seed=seed, vocabulary=VOCABULARY, gain=2.0, **changes) for seed in (1, 2)]


def by_hand(tuned, reference, prompt, response, beta=1.0):
    total = 0.0
    for model, sign in ((tuned, 1), (reference, -1)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0].double()
        for place, token in enumerate(response, start=len(prompt)):
            total += sign * logits[place - 1].log_softmax(-1)[token].item()
    return beta * total


@pytest.mark.parametrize("family", FAMILIES)
def test_several_sequences_over_several_rounds(family):
    models = pair(family)
    counters = Counters()
    scoring = ImplicitReward(*models, beta=0.7).open(Conversation(PROMPT), counters, 32)

    def expected(sequences, continuations):
        return [
            [pytest.approx(by_hand(*models, PROMPT, sequence + tokens, 0.7), abs=1e-9) for tokens in own]
            for sequence, own in zip(sequences, continuations, strict=True)
        ]

    first = [[[5, 6, 7], [], [5], [5, 6, 7], [88], [88, 3]]]
    assert scoring.score(first) == expected([[]], first)
    scoring.keep([(0, 5), (0, 0), (0, 1), (0, 5)])
    sequences = [[88, 3], [5, 6, 7], [], [88, 3]]
    second = [[[10], [11], [12, 13, 14]], [[]], [[200, 201], []], []]
    assert scoring.score(second) == expected(sequences, second)
    scoring.keep([(1, 0), (2, 0), (0, 2)])
    sequences = [[5, 6, 7], [200, 201], [88, 3, 12, 13, 14]]
    third = [[[1, 2, 3, 4, 5, 6, 7, 8, 9]], [[17], []], [[19]]]
    assert scoring.score(third) == expected(sequences, third)
    scoring.keep([(0, 0)])
    fourth = [[[20], [21], []]]
    assert scoring.score(fourth) == expected([[5, 6, 7, 1, 2, 3, 4, 5, 6, 7, 8, 9]], fourth)


def test_scoring_again_without_keeping():
    models = pair()
    scoring = ImplicitReward(*models).open(Conversation(PROMPT), Counters(), 8)
    first = scoring.score([[[5, 6], [7]]])
    assert scoring.score([[[5, 6], [7]]]) == first
    scoring.score([[[9, 9, 9]]])
    assert scoring.score([[[5, 6], [7]]]) == first


def test_candidates_for_one_token_are_one_token_of_work():
    counters = Counters()
    scoring = ImplicitReward(*pair()).open(Conversation(PROMPT), counters, 8)
    assert counters.reward_forward_tokens == 2 * (len(PROMPT) - 1)
    for step in range(3):
        scoring.score([[[token] for token in range(30)]])
        scoring.keep([(0, 7)])
        assert counters.reward_forward_tokens == 2 * (len(PROMPT) + step)


def test_a_prompt_of_one_token():
    models = pair("gemma3")
    scoring = ImplicitReward(*models).open(Conversation([3]), Counters(), 8)
    assert scoring.score([[[5], [6, 7]]]) == [
        [pytest.approx(by_hand(*models, [3], tokens), abs=1e-9) for tokens in ([5], [6, 7])]
    ]
    with pytest.raises(ValueError, match="prompt has no tokens"):
        ImplicitReward(*models).open(Conversation([]), Counters(), 8)


def test_a_whole_response():
    models = pair("qwen3")
    assert ImplicitReward(*models, beta=2.0).score_response(Conversation(PROMPT), [7, 8, 9]) == pytest.approx(
        by_hand(*models, PROMPT, [7, 8, 9], 2.0), abs=1e-9
    )


def test_equal_models_have_no_reward():
    model = small_policy(seed=1, vocabulary=VOCABULARY)
    assert ImplicitReward(model, model).score_response(Conversation(PROMPT), [7, 8, 9]) == 0


def test_directories_with_tied_and_untied_heads(tmp_path):
    models = [
        small_policy(seed=seed, vocabulary=VOCABULARY, dtype=torch.float32, tie_word_embeddings=tied)
        for seed, tied in ((1, True), (2, False))
    ]
    for name, model in zip(("tuned", "reference"), models, strict=True):
        model.save_pretrained(tmp_path / name)
        small_tokenizer().save_pretrained(tmp_path / name)
    reward = ImplicitReward.from_pretrained(tmp_path / "tuned", tmp_path / "reference")
    assert len(reward.tokenizers) == 2
    reward.check_tokenizer(small_tokenizer())
    assert reward.score_response(Conversation(PROMPT), [7, 8, 9]) == pytest.approx(
        by_hand(*models, PROMPT, [7, 8, 9]), abs=1e-4
    )
    low = ImplicitReward.from_pretrained(tmp_path / "tuned", tmp_path / "reference", dtype=torch.bfloat16)
    assert low.tuned.model.dtype == torch.bfloat16


def test_a_checkpoint_without_its_head_is_refused(tmp_path):
    small_policy(seed=1, vocabulary=VOCABULARY, dtype=torch.float32).save_pretrained(tmp_path / "whole")
    small_reward(seed=1, vocabulary=VOCABULARY, dtype=torch.float32).save_pretrained(tmp_path / "classifier")
    with pytest.raises(ValueError, match=r"lacks the weights lm_head\.weight"):
        ImplicitReward.from_pretrained(tmp_path / "whole", tmp_path / "classifier")


def test_capped_logits(random_gemma2):
    models = [random_gemma2(seed) for seed in (1, 2)]
    assert ImplicitReward(*models).score_response(Conversation(PROMPT), [7, 8, 9]) == pytest.approx(
        by_hand(*models, PROMPT, [7, 8, 9]), abs=1e-4
    )


@pytest.fixture
def random_gemma2():
    def make(seed):
        config = Gemma2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            query_pre_attn_scalar=8,
            final_logit_softcapping=2.0,
            initializer_range=0.3,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Gemma2ForCausalLM(config).float().eval()

    return make


def test_logits_changed_in_an_unknown_way_are_refused():
    model = small_policy(seed=1, vocabulary=VOCABULARY)
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits * 3)
    with pytest.raises(ValueError, match="reference model LlamaForCausalLM has log-probabilities that"):
        ImplicitReward(small_policy(seed=2, vocabulary=VOCABULARY), model)


def test_bad_input_is_refused():
    models = pair()
    for beta in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="beta is"):
            ImplicitReward(*models, beta=beta)
    with pytest.raises(ValueError, match="LlamaForSequenceClassification"):
        ImplicitReward(models[0], small_reward(seed=1, vocabulary=VOCABULARY))
    reward = ImplicitReward(*models)
    with pytest.raises(ValueError, match="context has 512"):
        reward.open(Conversation(PROMPT), Counters(), 600)
    scoring = reward.open(Conversation(PROMPT), Counters(), 8)
    with pytest.raises(ValueError, match="2 lists for 1 sequences"):
        scoring.score([[[1]], [[2]]])


def test_the_policys_tokenizer_must_agree_with_both():
    class Other:
        def get_vocab(self):
            return {"a": 0}

    reward = ImplicitReward(*pair(), tokenizers=[small_tokenizer(), Other()])
    with pytest.raises(ValueError, match="do not share a vocabulary"):
        reward.check_tokenizer(small_tokenizer())
    capabilities = reward.capabilities
    assert capabilities.reads_ids and capabilities.tree and not capabilities.gradient and capabilities.max_tokens == 512
