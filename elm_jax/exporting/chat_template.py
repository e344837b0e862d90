"""How a model writes conversations, as a chat template: for tokenizers that came without one."""

from __future__ import annotations

import json
from typing import Any

from elm_jax.data.chat_forms import CHAT_FORMS

_TEMPLATE = (
    "{{{{ {bos} }}}}"
    "{{% set found = namespace(system={default}, users=0) %}}"
    "{{% if messages and messages[0].role == 'system' %}}{{% set found.system = messages[0].content %}}{{% endif %}}"
    "{{% if not {inside} and found.system is not none %}}"
    "{{{{ {system[0]} + found.system + {system[1]} }}}}{{% endif %}}"
    "{{% for message in messages %}}"
    "{{% set text = {text} %}}"
    "{{% if message.role == 'user' %}}"
    "{{% if found.users %}}{{{{ {between} }}}}{{% endif %}}{{{{ {user[0]} }}}}"
    "{{% if {inside} and not found.users and found.system is not none %}}"
    "{{{{ {system[0]} + found.system + {system[1]} }}}}{{% endif %}}"
    "{{% set found.users = found.users + 1 %}}{{{{ text + {user[1]} }}}}"
    "{{% elif message.role == 'assistant' %}}{{{{ {answer[0]} + text + {answer[1]} + {answer[2]} }}}}"
    "{{% endif %}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ {answer[0]} }}}}{{% endif %}}"
)


def template_of(family: str, tokenizer: Any) -> str:
    """The chat form `family` as a template in Jinja, for turns of the roles system, user and assistant.

    ECGs are written into the text of a turn by whoever calls it, as in training: N times `<signal>` and a newline.
    """
    form = CHAT_FORMS[family]

    def said(text: str) -> str:
        tokens = {"{bos}": tokenizer.bos_token, "{eos}": tokenizer.eos_token}
        for mark, token in tokens.items():
            text = text.replace(mark, token or "")
        return json.dumps(text)

    system = form.system or ("", "")
    return _TEMPLATE.format(
        bos=said(form.bos),
        default="none" if form.default_system is None or form.system is None else said(form.default_system),
        inside="true" if form.system_in_user else "false",
        system=[said(part) for part in system] if form.system else ['""', '""'],
        text="message.content | trim" if form.strip else "message.content",
        between=said(form.between),
        user=[said(part) for part in form.user],
        answer=[said(part) for part in form.answer],
    )
