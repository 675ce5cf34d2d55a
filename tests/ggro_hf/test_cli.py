"""The `ggro` command: what it writes, how it continues, and how it gives up."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

import ggro_kernels
from ggro_hf import ARGS, GGRO, BestOfN, Greedy, RewardModel, demo_models, generate
from ggro_hf.cli import demo, doctor, main, self_check
from ggro_hf.cli.session import METHODS
from ggro_hf.decoding import batch
from ggro_hf.rewards import EncoderReward, TextReward
from ggro_kernels import dispatch
from ggro_kernels.library import registered_ops
from tests.ggro_hf.rewards.text_models import save_causal, save_encoder
from tests.ggro_hf.small_models import END_OF_TURN, small_policy, small_reward, small_tokenizer

ROOT = Path(__file__).parents[2]
VOCABULARY = 300
TOKENS = 10


def save(directory, model, tokenizer=None):
    model.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of a policy and of two reward models."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = small_tokenizer()
    policy = small_policy(seed=0, vocabulary=VOCABULARY, gain=2.0, dtype=torch.float32)
    return {
        "policy": save(root / "policy", policy, tokenizer),
        "reward": save(root / "reward", small_reward(seed=1, vocabulary=VOCABULARY, dtype=torch.float32), tokenizer),
        "gold": save(root / "gold", small_reward(seed=2, vocabulary=VOCABULARY, dtype=torch.float32), tokenizer),
    }


def pair(models):
    return ["--policy", models["policy"], "--reward", models["reward"]]


def run(capsys, *arguments):
    """Exit code, stdout, stderr."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def write_prompts(path, *rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def read_rows(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def without_counters(rows):
    return [{name: value for name, value in row.items() if name != "counters"} for row in rows]


# What is written


def test_a_prompt_prints_what_the_library_answers(models, capsys):
    policy = AutoModelForCausalLM.from_pretrained(models["policy"])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(models["policy"])
    reward = RewardModel.from_pretrained(models["reward"])
    for method, decoder, options in (
        (
            "ggro",
            GGRO(reward, entropy_threshold=0.5, refinements=3, candidates=8),
            ["--entropy-threshold", 0.5, "--refinements", 3, "--candidates", 8],
        ),
        ("greedy", Greedy(), []),
        ("best-of-n", BestOfN(reward, samples=3, seed=5), ["--samples", 3, "--seed", 5]),
    ):
        code, out, _ = run(
            capsys,
            "generate",
            *pair(models),
            "--method",
            method,
            "--prompt",
            "The sea",
            "--max-new-tokens",
            TOKENS,
            *options,
        )
        (expected,) = generate(policy, tokenizer, ["The sea"], decoder, max_new_tokens=TOKENS, progress=False)
        assert code == 0
        assert out == expected.text + "\n"


def test_rows_carry_the_fields_of_their_line_and_bad_lines_are_named(models, capsys, tmp_path):
    prompts = write_prompts(
        tmp_path / "in.jsonl",
        {"prompt": "The sea", "id": "a", "label": [1]},
        '{"prompt": ',
        {"prompt": " "},
        "",
        {"prompt": "And then"},
        {"prompt": "a " * 600},
        {"messages": [{"role": "user", "content": "no template"}]},
    )
    output, report = tmp_path / "out.jsonl", tmp_path / "out.html"
    code, out, err = run(
        capsys,
        "generate",
        *pair(models),
        "--input",
        prompts,
        "--output",
        output,
        "--report",
        report,
        "--max-new-tokens",
        TOKENS,
    )
    assert code == 1
    assert out == ""
    for message in (
        "line 2: not valid JSON",
        "line 3: the prompt is empty",
        "line 6: prompt of ",
        "line 7: prompt is a list of messages",
        "2 of 6 lines done, 4 failed",
    ):
        assert message in err
    first, second = read_rows(output)
    assert (first["line"], first["id"], first["label"], second["line"]) == (1, "a", [1], 5)
    assert first["token_ids"]
    assert len(first["token_ids"]) <= TOKENS
    assert first["finish_reason"] == ("eos" if first["token_ids"][-1] == END_OF_TURN else "length")
    reward = RewardModel.from_pretrained(models["reward"])
    assert first["reward"] == pytest.approx(reward.score(first["prompt_ids"] + first["token_ids"]), abs=1e-4)
    assert first["counters"]["reward_backward_tokens"] > 0
    assert "ggro: 2 responses" in report.read_text(encoding="utf-8")


def test_without_an_output_file_the_rows_of_an_input_file_go_to_stdout(models, capsys, tmp_path):
    prompts = write_prompts(tmp_path / "in.jsonl", {"prompt": "The sea"}, {"prompt": "And"}, "[]")
    options = ["--method", "sample", "--max-new-tokens", 4]
    code, out, err = run(capsys, "generate", *pair(models), "--input", prompts, *options)
    assert code == 1
    assert "line 3: holds a list" in err
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["line"] for row in rows] == [1, 2]
    # Methods without a search are scored all the same.
    assert all(isinstance(row["reward"], float) for row in rows)


def test_a_preset_brings_its_settings_and_options_override_them(models, capsys, tmp_path):
    output = tmp_path / "out.jsonl"
    code, _, _ = run(
        capsys,
        "generate",
        *pair(models),
        "--prompt",
        "The",
        "--output",
        output,
        "--preset",
        "hh-rlhf-3b",
        "--candidates",
        5,
        "--max-new-tokens",
        6,
    )
    assert code == 0
    (row,) = read_rows(output)
    assert row["settings"]["preset"] == "hh-rlhf-3b"
    assert all(len(segment["candidates"]) <= 3 for segment in row["segments"])
    assert max(len(one["proposals"]) for segment in row["segments"] for one in segment["candidates"]) <= 5


def test_a_terminal_sees_the_tokens_as_they_come(models, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    arguments = ["generate", *pair(models), "--prompt", "The sea", "--max-new-tokens", TOKENS]
    _, streamed, _ = run(capsys, *arguments)
    monkeypatch.undo()
    _, printed, _ = run(capsys, *arguments)
    assert streamed.strip() == printed.strip() != ""


BRIEF = {
    "ggro": ["--entropy-threshold", 0.5, "--refinements", 2, "--candidates", 4],
    "exhaustive": ["--entropy-threshold", 0.5, "--candidates", 6, "--prune", 3],
    "greedy": [],
    "sample": [],
    "best-of-n": ["--samples", 2],
    "rejection-sampling": ["--reward-threshold", 0, "--attempts", 3],
    "args": ["--candidates", 4, "--weight", 2],
    "tbs": ["--width", 2, "--successors", 2],
    "cbs": ["--width", 2, "--successors", 2, "--chunk-length", 3],
    "cards": ["--reward-threshold", 0, "--attempts", 3, "--entropy-threshold", 1],
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_writes_rows_and_a_report(models, capsys, tmp_path, method):
    prompts = write_prompts(tmp_path / "in.jsonl", {"prompt": "The sea"}, {"prompt": "And then"})
    output, report = tmp_path / "out.jsonl", tmp_path / "out.html"
    options = ["--input", prompts, "--output", output, "--report", report, "--max-new-tokens", 6, *BRIEF[method]]
    code, out, _ = run(capsys, "generate", *pair(models), "--method", method, *options)
    assert (code, out) == (0, "")
    reward = RewardModel.from_pretrained(models["reward"])
    rows = read_rows(output)
    assert [row["line"] for row in rows] == [1, 2]
    for row in rows:
        assert 0 < len(row["token_ids"]) <= 6
        assert row["settings"]["method"] == method
        assert row["reward"] == pytest.approx(reward.score(row["prompt_ids"] + row["token_ids"]), abs=1e-4)
    page = report.read_text(encoding="utf-8")
    assert f"{method}: 2 responses" in page
    assert page.count("<article") == 2


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """Directories of reward models with tokenizers of their own: a causal one and an encoder."""
    root = tmp_path_factory.mktemp("foreign")
    save_causal(root / "causal", family="llama")
    save_encoder(root / "encoder")
    return {"causal": str(root / "causal"), "encoder": str(root / "encoder")}


@pytest.mark.parametrize(("kind", "made"), [("causal", TextReward), ("encoder", EncoderReward)])
def test_rewards_with_another_tokenizer_guide_every_method_but_ggro(models, foreign, capsys, kind, made):
    arguments = ["generate", *pair({**models, "reward": foreign[kind]}), "--prompt", "The sea"]
    code, out, err = run(capsys, *arguments, "--method", "args", "--candidates", 4, "--max-new-tokens", TOKENS)
    assert code == 0
    assert f"{made.__name__} reads text" in err
    policy = AutoModelForCausalLM.from_pretrained(models["policy"])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(models["policy"])
    decoder = ARGS(made.from_pretrained(foreign[kind]), candidates=4)
    (expected,) = generate(policy, tokenizer, ["The sea"], decoder, max_new_tokens=TOKENS, progress=False)
    assert out == expected.text + "\n"
    message = {"causal": "do not share a vocabulary", "encoder": "encoder"}[kind]
    assert_gives_up(capsys, *arguments, message=message)


# Continuing


def greedy_search(models, *options):
    """GGRO with short segments, in batches of the given budget."""
    return ["generate", *pair(models), "--entropy-threshold", 0.5, "--refinements", 2, "--candidates", 4, *options]


@pytest.mark.parametrize("budget", [1, 60, None])
def test_rows_of_a_batch_come_in_order_whatever_the_budget(models, capsys, tmp_path, budget):
    """Those that finish out of turn, fail or are done already do not move the others."""
    rows = [{"prompt": "The sea" + " and then" * (index % 3)} for index in range(9)]
    rows[2], rows[5], rows[7] = {"prompt": "a " * 600}, "?", {"messages": [{"role": "user", "content": "no template"}]}
    prompts = write_prompts(tmp_path / "in.jsonl", *rows)
    options = [] if budget is None else ["--max-batch-tokens", budget]
    output = tmp_path / "out.jsonl"
    arguments = greedy_search(models, "--input", prompts, "--max-new-tokens", 8)
    code, _, err = run(capsys, *arguments, "--output", output, *options)
    assert code == 1
    assert re.findall(r"line (\d): ", err) == ["3", "6", "8"]
    assert [row["line"] for row in read_rows(output)] == [1, 2, 4, 5, 7, 9]
    for row in read_rows(output):
        code, out, _ = run(capsys, *greedy_search(models, "--prompt", row["prompt"], "--max-new-tokens", 8))
        assert (code, out) == (0, row["text"] + "\n")
    # The budget is no setting of the rows: another one continues them.
    write_prompts(prompts, *rows[:5], {"prompt": "mended"}, *rows[6:])
    code, _, err = run(capsys, *arguments, "--output", output, "--max-batch-tokens", 100)
    assert "6 of 9 lines are done already" in err
    assert [row["line"] for row in read_rows(output)] == [1, 2, 4, 5, 7, 9, 6]


def test_rows_are_written_when_they_come(models, capsys, tmp_path, monkeypatch):
    """Whatever ends the run in the middle of a batch, those before it are in the file."""
    prompts = write_prompts(tmp_path / "in.jsonl", *({"prompt": f"The {index} thing"} for index in range(6)))
    output = tmp_path / "out.jsonl"
    arguments = greedy_search(models, "--input", prompts, "--output", output, "--max-new-tokens", 6)
    plain = batch.Batch._tick

    def interrupted(self):
        if output.read_bytes().count(b"\n") == 2:
            raise KeyboardInterrupt
        plain(self)

    with monkeypatch.context() as patch:
        patch.setattr(batch.Batch, "_tick", interrupted)
        code, _, err = run(capsys, *arguments, "--max-batch-tokens", 40)
    assert code == 130
    written = read_rows(output)
    assert [row["line"] for row in written] in ([1, 2], [1, 2, 3])
    assert f"{len(written)} rows are in {output}" in err
    assert run(capsys, *arguments)[0] == 0
    assert [row["line"] for row in read_rows(output)] == list(range(1, 7))


def test_a_budget_is_for_methods_that_decode_several_prompts_at_once(models, capsys):
    arguments = ["generate", *pair(models), "--prompt", "a", "--max-batch-tokens", 100, "--method", "greedy"]
    assert_gives_up(capsys, *arguments, message="--max-batch-tokens has no meaning for --method greedy")


def arguments_of_a_long_run(models, tmp_path):
    prompts = write_prompts(tmp_path / "in.jsonl", *({"prompt": f"The {index} thing"} for index in range(14)))
    options = ["--method", "best-of-n", "--samples", 4, "--seed", 1, "--max-new-tokens", 60]
    return ["generate", *pair(models), "--input", prompts, *options]


def test_a_run_stopped_by_ctrl_c_and_then_killed_ends_as_an_undisturbed_one(models, capsys, tmp_path):
    arguments = arguments_of_a_long_run(models, tmp_path)
    output = tmp_path / "out.jsonl"

    def start_and_stop(sent, rows_before):
        process = start(*arguments, "--output", output)
        wait_for_rows(output, rows_before + 2, process)
        process.send_signal(sent)
        _, err = process.communicate(timeout=300)
        return process.returncode, err

    code, err = start_and_stop(signal.SIGINT, 0)
    rows = len(read_rows(output))
    assert code == 130
    assert f"{rows} rows are in {output}, repeat the command to continue" in err
    assert "Traceback" not in err
    code, _ = start_and_stop(signal.SIGKILL, rows)
    assert code == -signal.SIGKILL
    assert rows + 2 <= output.read_bytes().count(b"\n") < 14
    with open(output, "ab") as file:
        file.write(b'{"line": 9, "prom')
    code, _, err = run(capsys, *arguments, "--output", output)
    assert code == 0
    assert "lines are done already" in err

    undisturbed = tmp_path / "undisturbed.jsonl"
    run(capsys, *arguments, "--output", undisturbed)
    assert without_counters(read_rows(output)) == without_counters(read_rows(undisturbed))
    assert len(read_rows(output)) == 14


def start(*arguments):
    """The command in a process of its own."""
    path = os.pathsep.join([str(ROOT / "python"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", "import sys; from ggro_hf.cli import main; sys.exit(main())", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background of a shell has Ctrl-C ignored, and so would its children.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_rows(path, count, process):
    deadline = time.monotonic() + 300
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_finished_run_needs_no_models_and_a_mended_line_is_done(models, capsys, tmp_path):
    prompts = write_prompts(tmp_path / "in.jsonl", {"prompt": "The sea"}, "?")
    output = tmp_path / "out.jsonl"
    arguments = ["generate", "--policy", tmp_path / "policy", *pair(models)[2:], "--input", prompts, "--output", output]
    arguments += ["--max-new-tokens", 4]
    (tmp_path / "policy").symlink_to(models["policy"])
    assert run(capsys, *arguments)[0] == 1
    (tmp_path / "policy").unlink()
    assert run(capsys, *arguments)[0] == 1
    (tmp_path / "policy").symlink_to(models["policy"])
    write_prompts(prompts, {"prompt": "The sea"}, {"prompt": "mended"})
    code, _, err = run(capsys, *arguments)
    assert code == 0
    assert "1 of 2 lines are done already" in err
    assert [row["line"] for row in read_rows(output)] == [1, 2]


def test_other_settings_do_not_continue_a_file(models, capsys, tmp_path):
    output = tmp_path / "out.jsonl"
    arguments = ["generate", *pair(models), "--prompt", "The sea", "--output", output, "--method", "greedy"]
    assert run(capsys, *arguments, "--max-new-tokens", 4)[0] == 0
    before = output.read_bytes()
    code, _, err = run(capsys, *arguments, "--max-new-tokens", 5)
    assert code == 2
    assert "max_new_tokens was 4, is 5" in err
    assert output.read_bytes() == before


# Giving up


def assert_gives_up(capsys, *arguments, message):
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert re.search(message, err), err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("role", ["policy", "reward"])
def test_missing_and_damaged_models(models, capsys, tmp_path, role):
    def arguments(directory):
        return ["generate", *pair({**models, role: str(directory)}), "--prompt", "a"]

    assert_gives_up(capsys, *arguments(tmp_path / "nowhere"), message="there is no such directory")
    (tmp_path / "empty").mkdir()
    assert_gives_up(capsys, *arguments(tmp_path / "empty"), message=r"no config\.json")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in Path(models[role]).iterdir():
        content = file.read_bytes()
        (damaged / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".safetensors" else content)
    assert_gives_up(capsys, *arguments(damaged), message="damaged or cut short.*download it again")
    (damaged / "model.safetensors").unlink()
    assert_gives_up(capsys, *arguments(damaged), message="model.safetensors")
    (damaged / "config.json").write_text("{")
    assert_gives_up(capsys, *arguments(damaged), message="(?i)json")


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_policy_without_a_tokenizer(models, capsys, tmp_path, family):
    # For qwen3 transformers makes one up that has special tokens only.
    mute = save(tmp_path / "mute", small_policy(family, seed=0, vocabulary=VOCABULARY, dtype=torch.float32))
    arguments = ["generate", *pair({**models, "policy": mute}), "--prompt", "a"]
    assert_gives_up(capsys, *arguments, message="policy .*mute': comes without a tokenizer")


def test_a_reward_model_with_two_labels(models, capsys, tmp_path):
    model = small_reward(seed=1, vocabulary=VOCABULARY, dtype=torch.float32)
    model.config.num_labels = 2
    model.score = torch.nn.Linear(model.config.hidden_size, 2, bias=False)
    wrong = save(tmp_path / "two", model, small_tokenizer())
    assert_gives_up(capsys, "generate", *pair({**models, "reward": wrong}), "--prompt", "a", message="2 labels")


def bert(kind, **settings):
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.5,
        **settings,
    )
    torch.manual_seed(0)
    return kind(config)


def test_encoders_in_either_place(models, capsys, tmp_path):
    encoder = save(tmp_path / "encoder", bert(BertForMaskedLM), small_tokenizer())
    classifier = save(tmp_path / "classifier", bert(BertForSequenceClassification, num_labels=1), small_tokenizer())
    arguments = pair({**models, "policy": encoder})
    assert_gives_up(capsys, "generate", *arguments, "--prompt", "a", message="an encoder, not a causal language model")
    arguments = pair({**models, "reward": classifier})
    assert_gives_up(capsys, "generate", *arguments, "--prompt", "a", message="encoder")


def test_models_in_each_others_place_and_a_foreign_vocabulary(models, capsys, tmp_path):
    arguments = pair({**models, "policy": models["reward"]})
    assert_gives_up(
        capsys, "generate", *arguments, "--prompt", "a", message="without the weights of a language model's head"
    )
    tokenizer = small_tokenizer()
    tokenizer.add_tokens(["new"])
    policy = save(tmp_path / "other", small_policy(seed=0, vocabulary=VOCABULARY, dtype=torch.float32), tokenizer)
    arguments = pair({**models, "policy": policy})
    assert_gives_up(capsys, "generate", *arguments, "--prompt", "a", message="do not share a vocabulary")


def test_options_that_do_not_go_together(models, capsys, tmp_path):
    both = ["generate", *pair(models)]
    assert_gives_up(capsys, *both, "--prompt", " ", message="--prompt is empty")
    assert_gives_up(
        capsys, *both, "--prompt", "a", "--samples", 3, message="--samples has no meaning for --method ggro"
    )
    assert_gives_up(
        capsys,
        *both,
        "--prompt",
        "a",
        "--method",
        "greedy",
        "--seed",
        0,
        message="--seed has no meaning for --method greedy",
    )
    assert_gives_up(capsys, *both[:3], "--prompt", "a", message="needs its --reward")
    assert_gives_up(capsys, *both, "--prompt", "a", "--candidates", 301, message="vocabulary has 300 tokens")
    assert_gives_up(capsys, *both, "--input", tmp_path / "none.jsonl", message="No such file")
    assert_gives_up(capsys, *both, "--prompt", "a", "--output", tmp_path / "no" / "out", message="No such file")
    assert_gives_up(capsys, *both, "--prompt", "a", "--report", tmp_path / "no" / "out", message="cannot be written")
    assert_gives_up(capsys, "demo", "--json", tmp_path, message="--json .* cannot be written")
    prompt = [*both, "--prompt", "a", "--method"]
    assert_gives_up(capsys, *prompt, "sample", "--temperature", -1, message="(?i)temperature")
    assert_gives_up(capsys, *prompt, "cards", message="cards needs --reward-threshold")
    assert_gives_up(capsys, *prompt, "cards", "--reward-threshold", "nan", message="reward_threshold is nan")
    assert_gives_up(
        capsys, *prompt, "args", "--preset", "review", message="review is one of GGRO, not of --method args"
    )
    assert_gives_up(
        capsys, *prompt, "tbs", "--chunk-length", 3, message="--chunk-length has no meaning for --method tbs"
    )
    assert_gives_up(capsys, *prompt, "args", "--candidates", 301, message="vocabulary has 300 tokens")
    nowhere = {"meta:nowhere": "Invalid device string"}
    if not torch.cuda.is_available():
        nowhere["cuda"] = "(CUDA enabled|NVIDIA driver|CUDA)"
    for device, message in nowhere.items():
        assert_gives_up(capsys, *both, "--prompt", "a", "--device", device, message=f"--device '{device}': .*{message}")
    for arguments in (["--max-new-tokens", "0"], ["--max-new-tokens", "-3"], ["--method", "none"], []):
        with pytest.raises(SystemExit) as error:
            run(capsys, "generate", *arguments)
        assert error.value.code == 2


# The other commands


def test_doctor_passes_here_and_checks_a_pair(models, capsys):
    code, out, _ = run(capsys, "doctor", *pair(models))
    assert code == 0
    assert "all checks passed" in out
    for shown in (torch.__version__, "entropy_topk, reference: 24 cases ok", "LlamaForCausalLM", "decodes by: "):
        assert shown in out


def test_doctor_fails_for_a_pair_that_cannot_work(models, capsys):
    code, out, _ = run(capsys, "doctor", "--policy", models["policy"], "--reward", models["policy"])
    assert code == 1
    assert "some checks FAILED" in out
    assert run(capsys, "doctor", "--policy", models["policy"])[0] == 2


@pytest.mark.parametrize(
    ("kind", "facts"),
    [
        ("causal", ["TextReward reads text; candidates of one prefix", "cached prefix: agrees with a plain forward"]),
        ("encoder", ["EncoderReward reads text; every candidate is computed whole", "context: 512"]),
    ],
)
def test_doctor_says_how_a_reward_with_another_tokenizer_scores(models, foreign, capsys, monkeypatch, kind, facts):
    monkeypatch.setattr(doctor, "check_kernels", lambda: iter(()))
    code, out, _ = run(capsys, "doctor", *pair({**models, "reward": foreign[kind]}))
    assert code == 0
    for fact in [*facts, "gradients: no: every method but ggro"]:
        assert fact in out
    assert ("cached prefix" in out) == (kind == "causal")


def test_the_self_check_covers_every_op():
    results = list(self_check.check_kernels())
    assert {result.op for result in results} == set(registered_ops()) & set(ggro_kernels.__all__)
    assert all(result.failure is None and result.cases >= 9 for result in results)


def slightly_wrong(tensor):
    """Off by a ten thousandth, or by one where it holds integers."""
    return tensor + 1 if tensor.dtype == torch.int64 else tensor * (1 + 1e-4)


@pytest.mark.skipif(dispatch.native_error is not None, reason=f"native: {dispatch.native_error}")
@pytest.mark.parametrize(
    ("op", "output", "spoil"),
    [
        ("entropy_topk", "entropy", lambda result: result._replace(entropy=slightly_wrong(result.entropy))),
        ("project_topk", "indices", lambda result: result._replace(indices=slightly_wrong(result.indices))),
        ("prefix_attention", "output", slightly_wrong),
        ("candidate_scores", "gradient of gradient", lambda scores: slightly_wrong(scores) - 1e-4 * scores.detach()),
    ],
)
def test_doctor_fails_where_a_kernel_is_wrong(models, capsys, monkeypatch, op, output, spoil):
    right = getattr(ggro_kernels, op)

    def wrong(*, impl, **arguments):
        result = right(**arguments, impl=impl)
        return spoil(result) if impl == "native" else result

    monkeypatch.setattr(ggro_kernels, op, wrong)
    code, out, _ = run(capsys, "doctor", *pair(models))
    assert code == 1
    assert f"{op}, native: FAILED: {output} of {op}(" in out
    assert out.count("FAILED: ") == 1


def test_demo_writes_the_table_the_page_and_the_figures(models, capsys, tmp_path, monkeypatch):
    for name in ("policy", "reward", "gold"):
        monkeypatch.setattr(demo_models, name.upper(), Path(models[name]))
    monkeypatch.setattr(demo, "_FEWEST_PROMPTS", 3)
    figures, report = tmp_path / "demo.json", tmp_path / "report.html"
    code, out, _ = run(
        capsys, "demo", "--prompts", 3, "--max-new-tokens", 6, "--json", figures, "--report", report, "--seed", 4
    )
    assert code == 0
    assert "ggro minus greedy on the same prompts: guiding" in out
    written = json.loads(figures.read_text())
    assert list(written) == ["prompts", "max_new_tokens", "seed", "versions", "methods"]
    assert (written["prompts"], written["max_new_tokens"], written["seed"]) == (3, 6, 4)
    rows = {row["method"]: row for row in written["methods"]}
    assert list(rows) == ["greedy", "sample", "best-of-5", "rejection", "cards", "cbs", "tbs", "args", "ggro"]
    assert len({tuple(row) for row in written["methods"]}) == 1
    assert rows["ggro"]["reward_mean"] >= rows["greedy"]["reward_mean"]
    assert report.read_text(encoding="utf-8").count("<article") == 3


def test_demo_refuses_too_few_prompts(capsys):
    assert_gives_up(capsys, "demo", "--prompts", 31, message="from 32 to 48")


def test_version_and_a_missing_command(capsys):
    for arguments, code in ((["--version"], 0), ([], 2)):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == code
