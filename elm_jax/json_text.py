"""JSON that comes from a file or a command line, of whoever wrote it."""

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """The value of JSON text.

    Raises:
        ValueError: it is none, is nested too deeply or holds half a surrogate pair or a number of thousands of
            digits; a JSONDecodeError, which says the place, for whatever is no JSON.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError:
        raise ValueError("a number of thousands of digits") from None
    if b"\\u" in text if isinstance(text, bytes) else "\\u" in text:  # nothing else can spell half a pair
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("half of a surrogate pair") from None
    return value
