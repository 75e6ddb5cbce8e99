"""Reading requests: their bodies, and what they ask for."""

import json
from dataclasses import dataclass
from urllib.parse import parse_qs

# of a body that is too large: a client that is still sending does not read the answer
MOST_IGNORED = 32_000_000
CLIENT_GONE = 499  # a status that nobody reads, for the metrics
FORM = "application/x-www-form-urlencoded"


class RequestError(Exception):
    """An answer that is an error.

    Attributes:
        status: of HTTP.
        headers: to send.
    """

    def __init__(self, status, message, headers=None):
        super().__init__(message)
        self.status, self.headers = status, headers or {}


@dataclass(frozen=True)
class TranslationRequest:
    """A request for ``/translate``.

    Attributes:
        texts: to translate.
        is_list: whether they came as a list.
        source, target: languages of the model.
        alternatives: further translations of each text.
        with_capacity: whether to return the passes of the tokens.
    """

    texts: list
    is_list: bool
    source: str
    target: str
    alternatives: int
    with_capacity: bool


async def read_body(request, limit):
    """The body of a request.

    Raises:
        RequestError: it is larger than ``limit`` bytes.
    """
    body, size = bytearray(), 0
    async for block in request.stream():
        size += len(block)
        if size <= limit:
            body += block
        elif size > limit + MOST_IGNORED:
            break
    if size > limit:
        raise RequestError(413, f"the body has more than {limit:,} bytes", {"Connection": "close"})
    return bytes(body)


def parse_body(body, content_type):
    """The fields of a JSON object or of a form, a dict.

    Raises:
        RequestError: it is neither.
    """
    kind = content_type.split(";")[0].strip().lower()
    try:
        if kind == FORM:
            fields = parse_qs(body.decode(), keep_blank_values=True, max_num_fields=100)
            return {name: values[0] for name, values in fields.items()}
        fields = json.loads(body)
    except (ValueError, RecursionError):
        what = "form" if kind == FORM else "JSON"
        raise RequestError(400, f"the body is no {what} in UTF-8") from None
    if not isinstance(fields, dict):
        raise RequestError(400, "the body has to be a JSON object")
    return fields


def read_translation_request(fields, languages, limits):
    """The :class:`TranslationRequest` of some fields.

    Args:
        languages: :class:`~fairseq_smoe.serving.languages.Languages`
        limits: :class:`~fairseq_smoe.serving.limits.Limits`

    Raises:
        RequestError: a field is missing or wrong.
    """
    q = fields.get("q")
    texts = q if isinstance(q, list) else [q]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise RequestError(400, "q: expected a string, or a list of strings")
    for text in texts:
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                raise RequestError(400, "q: holds half of a surrogate pair") from None
    if len(texts) > limits.texts:
        raise RequestError(413, f"q: {len(texts):,} texts; at most {limits.texts:,}")
    characters = sum(map(len, texts))
    if characters > limits.characters:
        raise RequestError(413, f"q: {characters:,} characters; at most {limits.characters:,}")
    if fields.get("format", "text") != "text":
        raise RequestError(400, f"format {_shown(fields['format'])}: expected text")
    source, target = (_language(fields, name, languages) for name in ("source", "target"))
    if source == target:
        raise RequestError(400, f"target {target}: is the source, too")
    return TranslationRequest(
        texts,
        isinstance(q, list),
        source,
        target,
        _number(fields, "alternatives", limits.alternatives),
        fields.get("capacity") in (True, "true", "1"),
    )


def _language(fields, name, languages):
    given = fields.get(name)
    if not isinstance(given, str) or not given:
        raise RequestError(400, f"{name}: give a language")
    if given == "auto":
        raise RequestError(
            400, f"{name} auto: languages are not detected here; give one of {_listed(languages)}"
        )
    found = languages.find(given)
    if found is None:
        raise RequestError(400, f"{name} {_shown(given)}: expected one of {_listed(languages)}")
    return found


def _listed(languages):
    return ", ".join(languages.codes)


def _number(fields, name, most):
    value = fields.get(name, 0)
    try:
        number = int(value) if isinstance(value, str | int) and not isinstance(value, bool) else -1
    except ValueError:
        number = -1
    if not 0 <= number <= most:
        raise RequestError(400, f"{name} {_shown(value)}: expected a number from 0 to {most}")
    return number


def _shown(value):
    """A value of the user's for a message: short, and in one line."""
    text = value if isinstance(value, str) else json.dumps(value)
    text = "".join(c if c.isprintable() else "?" for c in text[:41])
    return text if len(text) <= 40 else text[:40] + "..."
