"""Published traces, read from their files: `read_trace("AzureLLMInferenceTrace_conv.csv")`.

The format is known by the first line: a header of `CSV_FORMATS`, or a JSON object as in Mooncake's
traces. Files whose name ends with `.gz` are unpacked. A row that makes no sense is named by its
line, and nothing is guessed.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from course_lib.traces.trace import Segment, Trace, TraceRequest
from course_lib.validation import number, whole_number

#: Tokens that one of Mooncake's `hash_ids` names: https://github.com/kvcache-ai/Mooncake.
MOONCAKE_BLOCK_TOKENS = 512

#: No request is longer; a larger number is a mistake in the file.
MAX_TOKENS = 10**9


class CsvFormat(NamedTuple):
    """The columns that are read of a CSV trace; it may have others.

    Args:
        arrival: when the request came, in seconds or as a date.
        prompt_tokens: length of the prompt.
        output_tokens: length of the reply.
        arrival_is_date: the arrival is a date and time; without a zone it is UTC.
        zero_output_is_failure: a request without a reply failed. How long its reply would have been
            nobody knows, so it is left out.
    """

    arrival: str
    prompt_tokens: str
    output_tokens: str
    arrival_is_date: bool = False
    zero_output_is_failure: bool = False

    @property
    def columns(self) -> tuple[str, str, str]:
        """Those that must be there."""
        return self.arrival, self.prompt_tokens, self.output_tokens


#: Azure's (https://github.com/Azure/AzurePublicDataset), BurstGPT's
#: (https://github.com/HPMLL/BurstGPT), and the one to write by hand.
CSV_FORMATS = (
    CsvFormat("TIMESTAMP", "ContextTokens", "GeneratedTokens", arrival_is_date=True),
    CsvFormat("Timestamp", "Request tokens", "Response tokens", zero_output_is_failure=True),
    CsvFormat("arrival_s", "prompt_tokens", "output_tokens"),
)


def read_trace(
    path: str | Path,
    *,
    speed: float = 1.0,
    max_prompt_tokens: int | None = None,
    max_output_tokens: int | None = None,
) -> Trace:
    """The requests of a trace, sorted by arrival; arrivals count from the first one.

    Args:
        path: a CSV file with the columns of one of `CSV_FORMATS`, or Mooncake's JSON lines with
            `timestamp` in milliseconds, `input_length`, `output_length` and `hash_ids`. Each id
            names one block of 512 tokens after all before it, the last one perhaps less; what has
            no id is the request's own.
        speed: 2 lets the requests come twice as fast.
        max_prompt_tokens: longer prompts are cut to this, for a small model.
        max_output_tokens: the same for replies.

    Raises:
        ValueError: the file is missing or is no such trace; the message names the line.
    """
    number("speed", speed, above=0)
    for name, limit in (
        ("max_prompt_tokens", max_prompt_tokens),
        ("max_output_tokens", max_output_tokens),
    ):
        if limit is not None:
            whole_number(name, limit)
    path = Path(path)
    text = _text(path)
    is_json = text.lstrip().startswith("{")
    requests = _json_requests(path, text) if is_json else _csv_requests(path, text)
    if not requests:
        raise ValueError(f"{path} holds no requests")
    requests.sort(key=lambda request: request.arrival_s)
    start_s = requests[0].arrival_s
    changed = (
        _cut(
            replace(request, arrival_s=(request.arrival_s - start_s) / speed),
            max_prompt_tokens or request.prompt_tokens,
            max_output_tokens or request.output_tokens,
        )
        for request in requests
    )
    return Trace(path.name, tuple(changed), speed, max_prompt_tokens, max_output_tokens)


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot read the trace {path}: {reason}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: a trace must be text in UTF-8") from None


def _cut(request: TraceRequest, max_prompt_tokens: int, max_output_tokens: int) -> TraceRequest:
    left = prompt_tokens = min(request.prompt_tokens, max_prompt_tokens)
    segments = []
    for content, tokens in request.segments:
        if left > 0:
            segments.append(Segment(content, min(tokens, left)))
        left -= tokens
    return replace(
        request,
        prompt_tokens=prompt_tokens,
        output_tokens=min(request.output_tokens, max_output_tokens),
        segments=tuple(segments),
    )


def _csv_requests(path: Path, text: str) -> list[TraceRequest]:
    requests = []
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        header = [name.strip() for name in next(reader, [])]
        form = _recognised(header)
        places = [header.index(column) for column in form.columns]
        line = reader.line_num + 1
        for row in reader:
            if row:
                if len(row) != len(header):
                    raise ValueError(f"{len(header)} columns are expected, got {len(row)}")
                request = _csv_request(form, [row[place] for place in places])
                requests += [request] if request is not None else []
            line = reader.line_num + 1
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}, line {line}: {error}") from None
    return requests


def _recognised(header: Sequence[str]) -> CsvFormat:
    for form in CSV_FORMATS:
        if set(form.columns) <= set(header):
            return form
    wanted = " or ".join(",".join(form.columns) for form in CSV_FORMATS)
    raise ValueError(
        f"the columns of a trace are {wanted}, got {','.join(header)[:100]!r}; "
        "a trace in JSON lines begins with {"
    )


def _csv_request(form: CsvFormat, fields: Sequence[str]) -> TraceRequest | None:
    """The request of a row; None if it failed."""
    arrival, prompt, output = fields
    least_output = 0 if form.zero_output_is_failure else 1
    output_tokens = _tokens(form.output_tokens, _int_or_text(output), at_least=least_output)
    if output_tokens == 0:
        return None
    return TraceRequest(
        _date_s(form.arrival, arrival)
        if form.arrival_is_date
        else number(form.arrival, _float_or_text(arrival), at_least=0),
        _tokens(form.prompt_tokens, _int_or_text(prompt)),
        output_tokens,
    )


def _json_requests(path: Path, text: str) -> list[TraceRequest]:
    requests = []
    for line, row in enumerate(io.StringIO(text, newline=None), start=1):
        try:
            if row.strip():
                requests.append(_json_request(_json_object(row)))
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}") from None
    return requests


def _json_object(row: str) -> dict[str, Any]:
    wanted = {"timestamp", "input_length", "output_length", "hash_ids"}
    try:
        fields = json.loads(row)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict) or not wanted <= fields.keys():
        raise ValueError(
            "a JSON object with timestamp, input_length, output_length and hash_ids is expected, "
            f"got {row.strip()[:60]!r}"
        )
    return fields


def _json_request(fields: dict[str, Any]) -> TraceRequest:
    prompt_tokens = _tokens("input_length", fields["input_length"])
    ids = fields["hash_ids"]
    most = -(-prompt_tokens // MOONCAKE_BLOCK_TOKENS)
    if not isinstance(ids, list) or len(ids) > most:
        raise ValueError(
            f"hash_ids must be a list of at most {most} ids, one for each "
            f"{MOONCAKE_BLOCK_TOKENS} of {prompt_tokens} tokens, got {str(ids)[:60]}"
        )
    starts = range(0, prompt_tokens, MOONCAKE_BLOCK_TOKENS)
    return TraceRequest(
        number("timestamp", fields["timestamp"], at_least=0) / 1000,
        prompt_tokens,
        _tokens("output_length", fields["output_length"]),
        tuple(
            Segment(
                whole_number("each of hash_ids", content, at_least=0),
                min(MOONCAKE_BLOCK_TOKENS, prompt_tokens - start),
            )
            for content, start in zip(ids, starts, strict=False)
        ),
    )


def _tokens(name: str, value: Any, *, at_least: int = 1) -> int:
    return whole_number(name, value, at_least=at_least, at_most=MAX_TOKENS)


def _int_or_text(text: str) -> int | str:
    try:
        return int(text)
    except ValueError:
        return text


def _float_or_text(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _date_s(name: str, text: str) -> float:
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise ValueError(
            f"{name} must be a date like 2023-11-16 18:15:46.68, got {text[:60]!r}"
        ) from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
