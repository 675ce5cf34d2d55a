"""Process reward models: every family from a directory, against what its own code does with plain passes."""

import math
import random as random_module

import pytest
import torch
from transformers import AutoModelForTokenClassification

from ggro_hf.results import Counters
from ggro_hf.rewards.base import Conversation
from ggro_hf.rewards.heads import Gated, LoadedBackbone
from ggro_hf.rewards.process import ProcessReward
from ggro_hf.rewards.steps import EndedSteps, MarkedSteps, StepTurns, TaggedSteps
from tests.ggro_hf.rewards.head_models import OWN_CLASS, VOCABULARY, WIDTH, checkpoint, hidden_states, two_layers
from tests.ggro_hf.small_models import small_config, small_policy, small_reward, small_tokenizer

PROBLEM = "what is one and three"
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def tokenizer_with(*special, template=None):
    tokenizer = small_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end_of_text|>", *special]})
    tokenizer.chat_template = template
    assert len(tokenizer) <= VOCABULARY
    return tokenizer


@pytest.fixture
def random():
    return torch.Generator().manual_seed(11)


class Qwen:
    """Qwen2.5-Math-PRM: two classes at <extra_0>, through a two-layer `score`, beside an lm_head that is not read."""

    format, separator = "qwen-math-prm", "\n\n"

    def save(self, directory, random):
        self.tokenizer = tokenizer_with("<extra_0>", "<|im_start|>", "<|im_end|>", template=CHATML)
        self.tensors = {name: 0.2 * each for name, each in two_layers(random, "score", outputs=2).items()}
        self.backbone = checkpoint(
            directory, self.tensors, family="qwen3", tokenizer=self.tokenizer, keep_lm_head=True, config=OWN_CLASS
        )

    def values(self, steps, problem=PROBLEM):
        messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": problem},
            {"role": "assistant", "content": "<extra_0>".join(steps) + "<extra_0>"},
        ]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
        ids = self.tokenizer.encode(text)
        hidden = hidden_states(self.backbone, ids)
        inner = (hidden @ self.tensors["score.0.weight"].T + self.tensors["score.0.bias"]).relu()
        classes = (inner @ self.tensors["score.2.weight"].T + self.tensors["score.2.bias"]).softmax(-1)
        marker = self.tokenizer.encode("<extra_0>")[0]
        return [classes[index, 1].item() for index, token in enumerate(ids) if token == marker]


class MathShepherd:
    """Math-Shepherd: a language model's odds of + against - at the tag."""

    format, separator = "math-shepherd", "\n"

    def save(self, directory, random):
        self.tokenizer = tokenizer_with(" ки")
        self.model = small_policy("mistral", seed=3, vocabulary=VOCABULARY, dtype=torch.float32)
        self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)

    def values(self, steps):
        text = f"{PROBLEM} " + "\n".join(f"{step} ки" for step in steps)
        ids = torch.tensor([self.tokenizer.encode(text)])
        candidates = [self.tokenizer.encode("+")[-1], self.tokenizer.encode("-")[-1]]
        with torch.no_grad():
            scores = self.model(ids).logits[:, :, candidates].softmax(-1)[:, :, 0]
        return scores[ids == self.tokenizer.encode(" ки")[-1]].tolist()


class RLHFlow:
    """RLHFlow's: a pass for every step, + against - at the third token from the end."""

    format, separator = "rlhflow-prm", "\n\n"

    def save(self, directory, random):
        self.tokenizer = tokenizer_with("<|start_header_id|>", "<|end_header_id|>", template=LLAMA3)
        self.model = small_policy("llama", seed=3, vocabulary=VOCABULARY, dtype=torch.float32, tie_word_embeddings=True)
        self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)

    def values(self, steps):
        candidates = [self.tokenizer.encode("+")[-1], self.tokenizer.encode("-")[-1]]
        conversation, values = [], []
        for number, step in enumerate(steps):
            text = f"{PROBLEM} {step.strip()}" if number == 0 else step.strip()
            conversation += [{"role": "user", "content": text}, {"role": "assistant", "content": "+"}]
            ids = self.tokenizer.apply_chat_template(conversation, return_tensors="pt", return_dict=True)["input_ids"]
            with torch.no_grad():
                values.append(self.model(ids).logits[0, -3, candidates].softmax(-1)[0].item())
        return values


class Skywork:
    """Skywork-o1-Open-PRM: the sigmoid of a linear v_head at the newline after each step."""

    format, separator = "skywork-o1-prm", "\n"

    def save(self, directory, random):
        self.tokenizer = tokenizer_with()
        self.tensors = {
            "v_head.summary.weight": 0.2 * torch.randn(1, WIDTH, generator=random),
            "v_head.summary.bias": torch.randn(1, generator=random),
        }
        self.backbone = checkpoint(
            directory, self.tensors, family="qwen3", shards=2, tokenizer=self.tokenizer, keep_lm_head=True
        )

    def values(self, steps):
        ids = self.tokenizer.encode(self.tokenizer.bos_token + PROBLEM + "\n")
        places = []
        for step in steps:
            ids += [*self.tokenizer.encode(step), self.tokenizer.encode("\n")[-1]]
            places.append(len(ids) - 1)
        hidden = hidden_states(self.backbone, ids)
        values = hidden @ self.tensors["v_head.summary.weight"][0] + self.tensors["v_head.summary.bias"]
        return values.sigmoid()[places].tolist()


class TRL:
    """What TRL's PRMTrainer leaves: a token classifier, whose `score` has a bias, read at the end of each step."""

    format, separator = "trl-prm", "\n"

    def save(self, directory, random):
        self.tokenizer = tokenizer_with()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            config = small_config("mistral", vocabulary=VOCABULARY, num_labels=2)
            self.model = AutoModelForTokenClassification.from_config(config).eval()
            self.model.score.bias.data.normal_()
        self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)

    def values(self, steps):
        ids = [self.tokenizer.bos_token_id, *self.tokenizer(PROBLEM, add_special_tokens=False)["input_ids"]]
        places = []
        for step in steps:
            ids += self.tokenizer(step + "\n", add_special_tokens=False)["input_ids"]
            places.append(len(ids) - 1)
        with torch.no_grad():
            return self.model(torch.tensor([ids])).logits[0].softmax(-1)[places, 1].tolist()


PUBLISHED = [Qwen, MathShepherd, RLHFlow, Skywork, TRL]
REDUCTIONS = {
    "last": lambda values: values[-1],
    "min": min,
    "mean": lambda values: sum(values) / len(values),
    "product": math.prod,
}


@pytest.fixture(params=PUBLISHED)
def published(request, tmp_path, random):
    model = request.param()
    model.save(tmp_path, random)
    return model


def conversation(prompt=PROBLEM):
    policy = small_tokenizer()
    return Conversation(policy(PROBLEM)["input_ids"], prompt, policy)


def ids_of(text):
    return small_tokenizer()(text)["input_ids"]


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_a_response_as_the_models_own_code_scores_it(published, tmp_path, reduce):
    reward = ProcessReward.from_pretrained(tmp_path, published.format, reduce=reduce)
    steps = ["one is a one", "and then the other", "so it is 4"]
    values = published.values(steps)
    assert len(values) == 3 and max(values) - min(values) > 1e-3
    expected = pytest.approx(REDUCTIONS[reduce](values), abs=1e-5)
    joined = published.separator.join(steps)
    assert reward.score_response(conversation(), ids_of(joined)) == expected
    assert reward.score_response(conversation(), [*ids_of(joined + published.separator), 2]) == expected


def test_unfinished_and_missing_steps(published, tmp_path):
    reward = ProcessReward.from_pretrained(tmp_path, published.format)
    separator = published.separator
    for response, steps in (
        (f"one is{separator}and the", ["one is", "and the"]),
        ("one i", ["one i"]),
        ("", [""]),
        (f"{separator}{separator}one{separator}{separator}two", ["one", "two"]),
    ):
        expected = pytest.approx(published.values(steps)[-1], abs=1e-5)
        assert reward.score_response(conversation(), ids_of(response)) == expected, response


def test_several_sequences_over_several_rounds(published, tmp_path):
    reward = ProcessReward.from_pretrained(tmp_path, published.format, reduce="mean")
    end = published.separator
    sequences = [""]
    counters = Counters()
    scoring = reward.open(conversation(), counters, 64)
    rounds = [
        ([["one", " is", "one", "", f"one{end}", "the one and the other"]], [(0, 0), (0, 4), (0, 0)]),
        ([[f" is{end}the", " is"], ["then", ""], ["", f"{end}and é"]], [(0, 0), (1, 0)]),
        ([[f" other{end}", ""], [" this", f"{end}4"]], [(1, 1)]),
        ([["", " and", "2", f"{end}so"]], [(0, 3)]),
        ([["", " it is 4"]], [(0, 1)]),
    ]
    separately = 0
    for texts, chosen in rounds:
        rewards = scoring.score([[ids_of(text) for text in own] for own in texts])
        for sequence, own, got in zip(sequences, texts, rewards, strict=True):
            for text, value in zip(own, got, strict=True):
                steps = [step for step in (sequence + text).split(end) if step.strip()] or [""]
                expected = published.values(steps)
                separately += len(ids_of(PROBLEM + sequence + text))
                assert value == pytest.approx(sum(expected) / len(expected), abs=1e-5), sequence + text
        scoring.keep(chosen)
        sequences = [sequences[sequence] + texts[sequence][number] for sequence, number in chosen]
    assert counters.reward_forward_tokens < separately


@pytest.mark.parametrize("seed", range(3))
def test_random_texts_and_choices(published, tmp_path, seed):
    draw = random_module.Random(seed)
    pieces = ["one", " the", " ", "é", "1", "\n", "\n\n", published.separator, "ан", " and 3"]
    scoring = ProcessReward.from_pretrained(tmp_path, published.format).open(conversation(), Counters(), 64)
    sequences = [""]
    for _ in range(5):
        texts = [
            ["".join(draw.choices(pieces, k=draw.randint(0, 4))) for _ in range(draw.randint(1, 4))] for _ in sequences
        ]
        rewards = scoring.score([[ids_of(text) for text in own] for own in texts])
        for sequence, own, got in zip(sequences, texts, rewards, strict=True):
            for text, value in zip(own, got, strict=True):
                steps = [step for step in (sequence + text).split(published.separator) if step.strip()] or [""]
                assert value == pytest.approx(published.values(steps)[-1], abs=1e-5), (sequence, text)
        if draw.random() < 0.8:
            places = [(sequence, number) for sequence, own in enumerate(texts) for number in range(len(own))]
            chosen = draw.choices(places, k=draw.randint(1, 3))
            scoring.keep(chosen)
            sequences = [sequences[sequence] + texts[sequence][number] for sequence, number in chosen]


def test_what_is_known_is_not_computed_again(tmp_path, random):
    Skywork().save(tmp_path, random)
    counters = Counters()
    scoring = ProcessReward.from_pretrained(tmp_path, "skywork-o1-prm").open(conversation(), counters, 64)
    scoring.score([[ids_of("one\nfirst"), ids_of("two\nsecond")]])
    scoring.keep([(0, 0), (0, 1), (0, 0)])
    before = counters.reward_forward_tokens
    candidates = ["1", "2", "3", "4"]
    scoring.score([[ids_of(text) for text in candidates]] * 3)
    # A letter and the end of the step for each; two of the three sequences are equal.
    assert counters.reward_forward_tokens - before == 2 * 2 * len(candidates)


def test_messages_and_markers_of_the_problem_and_the_policy(tmp_path, random):
    qwen = Qwen()
    qwen.save(tmp_path, random)
    reward = ProcessReward.from_pretrained(tmp_path, "qwen-math-prm")
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": PROBLEM}]
    expected = pytest.approx(qwen.values(["one", "two"])[-1], abs=1e-5)
    assert reward.score_response(conversation(messages), ids_of("one\n\ntwo")) == expected
    assert reward.score_response(conversation(messages[1:]), ids_of("one\n\ntwo")) == expected
    assert reward.score_response(conversation(messages), ids_of("one<extra_0>\n\n<extra_0>two")) == expected
    # The problem's own marker comes first.
    values = qwen.values(["one", "two"], problem=f"{PROBLEM}<extra_0>")
    assert len(values) == 3
    marked = [{"role": "user", "content": f"{PROBLEM}<extra_0>"}]
    product = ProcessReward(
        LoadedBackbone(reward.model, reward.head, reward.tokenizer), MarkedSteps(), reduce="product"
    )
    assert product.score_response(conversation(marked), ids_of("one\n\ntwo")) == pytest.approx(
        values[1] * values[2], abs=1e-5
    )


def test_a_tag_that_is_several_tokens_and_a_tag_in_the_text(tmp_path):
    tokenizer, policy = small_tokenizer(), small_policy("mistral", seed=3, vocabulary=VOCABULARY, dtype=torch.float32)
    policy.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reward = ProcessReward.from_pretrained(tmp_path, TaggedSteps(), reduce="product")
    steps = ["ки is ки", "киев ки"]
    ids = tokenizer.encode(f"{PROBLEM} {steps[0]} ки")
    both = tokenizer.encode(f"{PROBLEM} {steps[0]} ки\n{steps[1]} ки")
    assert both[: len(ids)] == ids
    with torch.no_grad():
        logits = policy(torch.tensor([both])).logits[0]
    good, bad = tokenizer.encode("+")[-1], tokenizer.encode("-")[-1]
    values = logits[[len(ids) - 1, len(both) - 1]][:, [good, bad]].softmax(-1)[:, 0]
    expected = pytest.approx(values.prod().item(), abs=1e-6)
    assert reward.score_response(conversation(), ids_of("\n".join(steps))) == expected


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_a_nan_is_not_hidden(tmp_path, random, reduce):
    Skywork().save(tmp_path, random)
    reward = ProcessReward.from_pretrained(tmp_path, "skywork-o1-prm", reduce=reduce)
    reward.values = lambda hidden: [0.1] * (len(hidden) - 1) + [math.nan]
    assert math.isnan(reward.score_response(conversation(), ids_of("one\ntwo")))


def test_bad_arguments_are_refused(tmp_path, random):
    Skywork().save(tmp_path, random)
    with pytest.raises(ValueError, match=r"format is 'prm'.*qwen-math-prm"):
        ProcessReward.from_pretrained(tmp_path, "prm")
    with pytest.raises(ValueError, match=r"reduce is 'max'.*last, min, mean, product"):
        ProcessReward.from_pretrained(tmp_path, "skywork-o1-prm", reduce="max")
    with pytest.raises(ValueError, match="makes 9 tokens of the marker '<extra_0>'"):
        reward = ProcessReward.from_pretrained(tmp_path, MarkedSteps())
        reward.tokenizer.chat_template = CHATML
        reward.open(conversation(), Counters(), 8)
    with pytest.raises(ValueError, match="no chat template"):
        ProcessReward.from_pretrained(tmp_path, MarkedSteps()).open(conversation(), Counters(), 8)
    backbone = LoadedBackbone.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no tokenizer"):
        ProcessReward(LoadedBackbone(backbone.model, backbone.head, None), EndedSteps())


def test_heads_that_are_no_values_of_steps_are_refused(tmp_path, random):
    checkpoint(tmp_path, two_layers(random, "score", outputs=3), tokenizer=small_tokenizer())
    with pytest.raises(ValueError, match="has 3 outputs, but only 1 or 2"):
        ProcessReward.from_pretrained(tmp_path, EndedSteps())
    model = small_reward(seed=1, vocabulary=VOCABULARY)
    gate = LoadedBackbone.from_model(model).head
    gated = Gated(torch.nn.Linear(WIDTH, 2), torch.eye(2), gate, torch.ones(()), 1.0, [1])
    with pytest.raises(ValueError, match="head Gated"):
        ProcessReward(LoadedBackbone(model.model, gated, small_tokenizer()), EndedSteps())


def test_a_language_model_format_needs_a_language_model(tmp_path):
    small_reward(seed=1, vocabulary=VOCABULARY, dtype=torch.float32).save_pretrained(tmp_path)
    small_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks the weights lm_head\.weight"):
        ProcessReward.from_pretrained(tmp_path, "math-shepherd")


def test_a_missing_head_is_refused(tmp_path):
    small_policy(seed=1, vocabulary=VOCABULARY, dtype=torch.float32).save_pretrained(tmp_path)
    small_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lacks the weights of a head"):
        ProcessReward.from_pretrained(tmp_path, "qwen-math-prm")


def test_texts_are_needed_and_must_fit(tmp_path, random):
    Skywork().save(tmp_path, random)
    reward = ProcessReward.from_pretrained(tmp_path, "skywork-o1-prm")
    with pytest.raises(ValueError, match="no tokenizer"):
        reward.open(Conversation([1, 2]), Counters(), 8)
    with pytest.raises(ValueError, match="one problem"):
        reward.open(conversation([{"role": "system", "content": "a"}]), Counters(), 8)
    with pytest.raises(ValueError, match=r"prompt alone takes \d+ tokens.*512"):
        reward.open(conversation("x " * 600), Counters(), 8)
    with pytest.raises(ValueError, match=r"take \d+ tokens.*has 512.*continuation 1 of sequence 0"):
        reward.open(conversation(), Counters(), 8).score([[ids_of("a"), ids_of("x " * 600)]])
    capabilities = reward.capabilities
    assert capabilities.cached_prefix and capabilities.tree
    assert not capabilities.reads_ids and not capabilities.gradient


def test_a_template_that_rewrites_the_answer_is_refused(tmp_path):
    tokenizer = tokenizer_with("<|start_header_id|>", "<|end_header_id|>", template=LLAMA3.replace("| trim", "| upper"))
    with pytest.raises(ValueError, match="0 places to read the values of 1 steps"):
        StepTurns(answers=("a", "b")).encode(tokenizer, PROBLEM, ["one"])
