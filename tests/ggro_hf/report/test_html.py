"""The page, parsed: no markup leaks in, nothing is fetched, and what it shows is what happened."""

import re
from html.parser import HTMLParser

import pytest

from ggro_hf.report import ReportPrompt, ReportResponse, write_report
from tests.ggro_hf.small_models import small_tokenizer

HOSTILE = "<script>alert('x')</script> & \"quoted\" {{ 7 * 7 }}"


class Page(HTMLParser):
    """Tags with their attributes, the text of every element that has a class, and all text outside style and script."""

    VOID = frozenset({"meta", "rect", "link", "img", "br", "input"})

    def __init__(self, source):
        super().__init__()
        self.tags = []
        self.text = ""
        self._open = []
        self.by_class = {}
        self.feed(source)
        assert not self._open, f"unclosed: {self._open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self._open.append((tag, dict(attributes).get("class", "").split(), []))

    def handle_endtag(self, tag):
        if tag in self.VOID:
            return
        name, classes, parts = self._open.pop()
        assert name == tag, f"</{tag}> closes <{name}>"
        for one in classes:
            self.by_class.setdefault(one, []).append("".join(parts))

    def handle_data(self, data):
        if self._open and self._open[-1][0] in ("style", "script"):
            return
        self.text += data
        for _, _, parts in self._open:
            parts.append(data)

    def with_attribute(self, name):
        return [attributes for _, attributes in self.tags if name in attributes]


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


def candidate(tokenizer, text, reward, forced=(), proposals=()):
    return {
        "token_ids": tokenizer(text)["input_ids"],
        "reward": reward,
        "finished": False,
        "forced_tokens": list(forced),
        "boundary_token": None,
        "boundary_entropy": None,
        "proposals": [list(pair) for pair in proposals],
    }


def nudged_record(tokenizer, prompt, first=" on and", nudged=" then\n\n"):
    """Two segments: the policy's own, then one whose second candidate was kept."""
    own = candidate(tokenizer, " a", 0.25, proposals=[(20, 0.5), (30, -0.5)])
    kept = candidate(tokenizer, nudged, 0.75, forced=tokenizer(nudged)["input_ids"][:1])
    opening = candidate(tokenizer, first, 0.1)
    ids = opening["token_ids"] + kept["token_ids"]
    start = len(tokenizer(prompt)["input_ids"])
    segments = [
        {"start": start, "insertion_offset": 0, "chosen_index": 0, "candidates": [opening]},
        {
            "start": start + len(opening["token_ids"]),
            "insertion_offset": 0,
            "chosen_index": 1,
            "candidates": [own, kept],
        },
    ]
    return {
        "text": tokenizer.decode(ids),
        "token_ids": ids,
        "prompt_ids": tokenizer(prompt)["input_ids"],
        "reward": 0.75,
        "finish_reason": "length",
        "nudges": 1,
        "entropies": [0.5 * index for index in range(len(ids))],
        "segments": segments,
        "counters": {},
    }


def plain_record(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    return {
        "text": text,
        "token_ids": ids,
        "prompt_ids": [],
        "reward": None,
        "finish_reason": "eos",
        "nudges": 0,
        "entropies": [1.0] * len(ids),
        "segments": [],
        "counters": {},
    }


def render(tmp_path, tokenizer, prompts, **options):
    path = tmp_path / "report.html"
    options = {"title": "A title", "settings": {"seed": 0}, **options}
    write_report(path, tokenizer=tokenizer, prompts=prompts, **options)
    return path.read_text(encoding="utf-8")


def test_a_nudge_shows_old_and_new_token_and_gain_and_its_card_shows_the_candidates(tmp_path, tokenizer):
    record = nudged_record(tokenizer, "The sea")
    prompts = [ReportPrompt("The sea", ReportResponse("ggro", record, 0.75, gold=-0.5))]
    page = Page(render(tmp_path, tokenizer, prompts, entropy_threshold=1.5))
    # The first of each class is the legend's.
    new = tokenizer.decode(record["segments"][1]["candidates"][1]["forced_tokens"])
    old = tokenizer.decode(record["segments"][1]["candidates"][0]["token_ids"][:1])
    assert page.by_class["nudge"][1] == f"{old}→{new}+0.50"
    response = next(text for text in page.by_class["response"] if text.startswith("The sea"))
    assert response == f"The sea on and{old}→{new}+0.50{' then'[len(new) :]}\n\n"
    opening, card = page.by_class["card"]
    assert "Segment 1" in opening
    assert "opens at 0.00 nats" in opening
    assert "Segment 2" in card
    for shown in (
        "+0.25",
        "+0.75",
        "+0.50",
        "kept",
        "the policy by itself",
        "starts with the proposal",
        "gradient prefers",
    ):
        assert shown in card
    assert "gold −0.50" in re.sub(r"\s+", " ", page.text)


def test_every_card_is_reached_by_keyboard_and_every_trigger_has_its_card(tmp_path, tokenizer):
    prompts = [
        ReportPrompt(text, ReportResponse("ggro", nudged_record(tokenizer, text), 0.75)) for text in ("The", "A sea")
    ]
    page = Page(render(tmp_path, tokenizer, prompts))
    triggers = page.with_attribute("data-card")
    cards = {tag["id"] for tag in page.with_attribute("id") if tag.get("class") == "card"}
    assert len(cards) == 4
    assert {trigger["data-card"] for trigger in triggers} == cards
    assert all(trigger["tabindex"] == "0" and trigger["role"] == "button" for trigger in triggers)


def test_hostile_text_stays_text(tmp_path, tokenizer):
    record = nudged_record(tokenizer, HOSTILE, first=HOSTILE, nudged=HOSTILE)
    response = ReportResponse(HOSTILE, record, 0.0)
    messages = [{"role": HOSTILE, "content": HOSTILE}]
    prompts = [ReportPrompt(prompt, response, [response]) for prompt in (HOSTILE, messages)]
    page = Page(render(tmp_path, tokenizer, prompts, title=HOSTILE, settings={HOSTILE: HOSTILE}))
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert page.text.count(HOSTILE) >= 8


def test_nothing_is_fetched(tmp_path, tokenizer):
    source = render(
        tmp_path, tokenizer, [ReportPrompt("a", ReportResponse("greedy", plain_record(tokenizer, "b"), None))]
    )
    page = Page(source)
    assert not [tag for tag, _ in page.tags if tag in ("link", "img", "iframe")]
    assert not page.with_attribute("src")
    assert all(tag["href"].startswith("#") for tag in page.with_attribute("href"))
    assert not re.search(r"url\(|@import|https?://", source)


def test_a_character_cut_by_a_nudge_does_not_break_the_page(tmp_path, tokenizer):
    record = nudged_record(tokenizer, "The", first=" 🐈", nudged="日本")
    ids = record["token_ids"]
    assert len(ids) > 6
    page = Page(render(tmp_path, tokenizer, [ReportPrompt("The", ReportResponse("ggro", record, 0.5))]))
    response = next(text for text in page.by_class["response"] if text.startswith("The"))
    assert "🐈" in response
    assert "日" in response
    assert "\ufffd" not in response


def test_a_retokenised_response_is_shown_without_entropies(tmp_path, tokenizer):
    record = nudged_record(tokenizer, "The")
    record["entropies"] = record["entropies"][:-1]
    page = Page(render(tmp_path, tokenizer, [ReportPrompt("The", ReportResponse("ggro", record, 0.5))]))
    assert not [tag for tag in page.with_attribute("title") if tag["title"].endswith("nats")]


def test_prompts_to_a_chat_model_are_shown_as_a_turn(tmp_path):
    tokenizer = small_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    page = Page(
        render(tmp_path, tokenizer, [ReportPrompt("a", ReportResponse("x", plain_record(tokenizer, "b"), 1.0))])
    )
    assert [turn.split() for turn in page.by_class["turn"]] == [["user", "a"]]


def test_the_table_has_a_row_for_each_method_and_survives_undefined_figures(tmp_path, tokenizer):
    row = {
        "reward_mean": -0.25,
        "reward_ci95": [-0.5, 0.0],
        "gold_mean": 0.25,
        "gold_ci95": [0.25, 0.25],
        "reward_gain_mean": 0.0,
        "reward_gain_ci95": [0.0, 0.0],
        "gold_gain_mean": 0.0,
        "gold_gain_ci95": [0.0, 0.0],
        **{f"distinct_{n}": None for n in range(1, 5)},
        "diversity": None,
        "tokens_per_second": 12.4,
        "policy_tokens": 3.0,
        "reward_forward_tokens": 0.0,
        "reward_backward_tokens": 0.0,
        "nudges_mean": 0.0,
    }
    better = {**row, "method": "ggro", "reward_gain_mean": 0.5, "reward_gain_ci95": [0.25, 0.75]}
    prompts = [ReportPrompt("a", ReportResponse("ggro", plain_record(tokenizer, "b"), 1.0))]
    page = Page(render(tmp_path, tokenizer, prompts, methods=[{**row, "method": "greedy"}, better]))
    greedy, ggro = page.by_class["methods"][0].partition("Nudges")[2].split("ggro")
    assert "–" in greedy
    assert "+0.50" in ggro
    assert "+0.25 to +0.75" in ggro
    assert page.by_class["up"][0] == "+0.50"
