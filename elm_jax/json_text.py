"""JSON that comes from a file or a command line, of whoever wrote it."""

import json
from typing import Any

_DEEPEST = 100  # far from Python's own bound, so that whatever walks the value afterwards can


def parse_json(text: str | bytes) -> Any:
    """The value of JSON text.

    Raises:
        ValueError: it is none, is nested too deeply or holds half a surrogate pair or a number of thousands of
            digits; a JSONDecodeError, which says the place, for whatever is no JSON.
    """
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text))  # json.loads lets halves of pairs pass
    try:
        text.encode()
        value = json.loads(text)
        if text.count("[") + text.count("{") > _DEEPEST:
            _check_depth(value)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair") from None
    except json.JSONDecodeError:
        raise
    except ValueError:
        raise ValueError("a number of thousands of digits") from None
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_DEEPEST + 1):
        level = [
            item for one in level if isinstance(one, list | dict)
            for item in (one.values() if isinstance(one, dict) else one)
        ]  # fmt: skip
    if level:
        raise RecursionError
