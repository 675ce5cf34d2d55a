"""`ggro generate`: responses to one prompt or a file of prompts."""

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

from tqdm.auto import tqdm
from transformers import TextStreamer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ggro_hf.cli.errors import CommandError, check_writable, one_line
from ggro_hf.cli.models import load_tokenizer
from ggro_hf.cli.session import MethodSettings, Session, add_arguments
from ggro_hf.decoding import NoProgressError
from ggro_hf.evaluation import RECORD_FIELDS, generation_record
from ggro_hf.jsonl import BadLine, PromptLine, RowFile, RowFileError, read_prompt_lines, row_of
from ggro_hf.report import ReportPrompt, ReportResponse, write_report
from ggro_hf.rewards import describe


def register(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "generate",
        help="decode one prompt or a file of prompts",
        description="Decode one prompt, or every line of a JSON-lines file. A killed run continues when repeated.",
    )
    parser.set_defaults(run=run)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="one prompt; the chat template is applied if there is one")
    source.add_argument(
        "--input",
        metavar="FILE",
        help='one {"prompt": text} or {"messages": [...]} a line; other fields are carried over',
    )
    parser.add_argument("--output", metavar="FILE", help="JSON-lines file of results; without it they go to stdout")
    parser.add_argument("--report", metavar="FILE", help="also write a page that shows every token and candidate")
    add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Decode, write, report; 1 where a line of the input could not be served."""
    settings = MethodSettings.from_arguments(args)
    check_writable("--report", args.report)
    try:
        lines = _read_lines(args)
        if args.output is None:
            return _run_to_stdout(args, settings, lines)
        with RowFile(args.output, settings.record()) as rows:
            return _run_to_file(args, settings, lines, rows)
    except (OSError, RowFileError) as error:
        raise CommandError(one_line(error)) from error


def _read_lines(args: argparse.Namespace) -> list[PromptLine | BadLine]:
    if args.input is not None:
        return list(read_prompt_lines(args.input, reserved=RECORD_FIELDS))
    if not args.prompt.strip():
        raise CommandError("--prompt is empty; give it some text")
    return [PromptLine(1, args.prompt, {"prompt": args.prompt})]


def _run_to_file(
    args: argparse.Namespace, settings: MethodSettings, lines: list[PromptLine | BadLine], rows: RowFile
) -> int:
    todo = [line for line in lines if isinstance(line, BadLine) or row_of(rows, line) is None]
    done = len(lines) - len(todo)
    session = _open(settings) if any(isinstance(line, PromptLine) for line in todo) else None
    if done:
        _say(f"{args.output}: {done} of {len(lines)} lines are done already")
    failures = 0
    try:
        with tqdm(total=len(lines), initial=done, unit="prompt", disable=len(lines) == 1) as bar:
            for outcome in _outcomes(session, todo):
                if isinstance(outcome, str):
                    failures += 1
                    _say(outcome)
                else:
                    line, record = outcome
                    rows.append(line.number, {**line.fields, **record})
                bar.update()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"; {rows.count()} rows are in {args.output}, repeat the command to continue") from None
    if args.report:
        tokenizer = session.policy.tokenizer if session else load_tokenizer(settings.policy_path)
        written = [row_of(rows, line) for line in lines if isinstance(line, PromptLine)]
        _write_report(args.report, settings, tokenizer, [row for row in written if row is not None])
    _say(f"{args.output}: {len(lines) - failures} of {len(lines)} lines done" + _failed(failures))
    return 1 if failures else 0


def _run_to_stdout(args: argparse.Namespace, settings: MethodSettings, lines: list[PromptLine | BadLine]) -> int:
    session = _open(settings)
    streams = args.prompt is not None and sys.stdout.isatty()
    if streams:
        session.decoder.streamer = TextStreamer(session.policy.tokenizer, skip_prompt=True, skip_special_tokens=True)
    rows = []
    for outcome in _outcomes(session, lines):
        if isinstance(outcome, str):
            _say(outcome)
            continue
        line, record = outcome
        rows.append({"line": line.number, **line.fields, **record})
        if args.input is not None:
            print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
        elif not streams:
            print(record["text"])
    if args.report:
        _write_report(args.report, settings, session.policy.tokenizer, rows)
    failures = len(lines) - len(rows)
    if failures and args.input is not None:
        _say(f"{len(rows)} of {len(lines)} lines done" + _failed(failures))
    return 1 if failures else 0


def _open(settings: MethodSettings) -> Session:
    session = Session(settings)
    if session.reward is not None:
        _say(describe(session.reward))
    return session


def _outcomes(
    session: Session | None, lines: list[PromptLine | BadLine]
) -> Iterator[tuple[PromptLine, dict[str, Any]] | str]:
    """Every line with its record, or what is wrong with it; `session` may be missing where all lines are bad."""
    served = [line for line in lines if isinstance(line, PromptLine)]
    responses = session.responses(served) if session is not None else iter(())
    for line in lines:
        if isinstance(line, BadLine):
            yield f"line {line.number}: {line.reason}"
        else:
            try:
                yield line, generation_record(next(responses))
            except (ValueError, FloatingPointError, NoProgressError) as error:
                yield f"line {line.number}: {one_line(error)}"


def _write_report(
    path: str, settings: MethodSettings, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]
) -> None:
    prompts = [
        ReportPrompt(
            row["prompt"] if "prompt" in row else row["messages"], ReportResponse(settings.method, row, row["reward"])
        )
        for row in rows
    ]
    write_report(
        path,
        title=f"{settings.method}: {len(rows)} response{'' if len(rows) == 1 else 's'}",
        settings=settings.record(),
        tokenizer=tokenizer,
        prompts=prompts,
        entropy_threshold=settings.entropy_threshold,
    )
    _say(f"{path} written")


def _failed(failures: int) -> str:
    return f", {failures} failed (named above)" if failures else ""


def _say(message: str) -> None:
    tqdm.write(message, file=sys.stderr)
