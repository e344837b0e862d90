"""What a Hugging Face folder has beside the weights: configuration, generation configuration, tokenizer, licence.

And how the model writes conversations, as a chat template: for programs that know nothing of elm_jax. A template makes
one text, which is tokenised at once. Training tokenises a conversation piece by piece, and cleans what users say. A
template is written where the two agree, and refuses, when it is used, the texts where they would not.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import string
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from elm_jax import compat as behaviours
from elm_jax.assemble import Assembly
from elm_jax.folders import read_json
from elm_jax.models.families import FAMILIES, text_part, to_hf
from elm_jax.text.forms import CHAT_FORMS
from elm_jax.text.render import TextSpec, stop_ids, to_prompt
from elm_jax.text.vocabulary import SIGNAL_TOKEN, THINK_TOKENS, vocabulary
from elm_jax.text.write import THINK_PREFIX
from elm_jax.weights.llava import MODEL_TYPES

_DTYPE_KEYS = ("dtype", "torch_dtype")  # of newer and of older configurations
_LICENCES = ("LICENSE*", "NOTICE*", "USE_POLICY*")
GENERATION = "generation_config.json"
_REFERENCE = ("clean_answers", "response_by_ids", "special_tokens_in_text")  # ways to write that no template has
_SPEAKERS = ["", "user", "assistant", "human", "gpt", "model", "system", "q", "a"]  # which training takes away
_WRITER = "elm_jax.text.render.render_prompt writes it as in training"


# What the form decides is set before it (`_settings`). `low`: as regular expressions see it that know no case.
_TEMPLATE = (
    "{% if messages and messages[0].role == 'system' %}"
    "{% set system = messages[0].content %}{% set messages = messages[1:] %}{% endif %}"
    "{% set turn = system_open + system + system_close if has_system and system is not none"
    " and (system or empty_system) else '' %}"
    "{% for name in names + [signal] %}{% if turn and name in system %}"
    "{{ raise_exception('a system prompt with ' + name + ': ' + writer) }}{% endif %}{% endfor %}"
    "{{ bos }}{% if not inside %}{{ turn }}{% endif %}"
    "{% set seen = namespace(written=false, asked=false, asking=false) %}"
    "{% for message in messages %}{% set text = message.content | trim if strip else message.content %}"
    "{% if message.role == 'user' %}"
    "{% set low = text.replace('\u0131', 'i').replace('\u0130', 'i').replace('\u017f', 's') | lower %}"
    "{% for name in names + tags %}{% if name in text %}"
    "{{ raise_exception('a message with ' + name + ': ' + writer) }}{% endif %}{% endfor %}"
    "{% if 'image' in low or 'picture' in low or '<ecg>' in (low.split() | join) %}"
    "{{ raise_exception('a message with image, picture or <ecg>: ' + writer) }}{% endif %}"
    "{% for part in low.replace('\uff1a', ':').split(signal) %}"
    "{% if ':' in part and (part.split(':')[0] | trim) in speakers %}"
    "{{ raise_exception('a message that begins with a speaker: ' + writer) }}{% endif %}{% endfor %}"
    "{% if loose and (not text or text != text.rstrip()) %}"
    "{{ raise_exception('a message that ends in white space: ' + writer) }}{% endif %}"
    "{{ (between if seen.written else '') + user_open + (turn if inside and not seen.asked else '')"
    " + text + user_close }}"
    "{% set seen.written = true %}{% set seen.asked = true %}{% set seen.asking = true %}"
    "{% elif message.role == 'assistant' %}{% if text %}"
    "{% for name in names + [signal] %}{% if name in text %}"
    "{{ raise_exception('an answer with ' + name + ': ' + writer) }}{% endif %}{% endfor %}"
    "{% set rest = text[thought | length:] if thought and text.startswith(thought) else text %}"
    "{% if rest != rest.lstrip() or text != text.lstrip() or (spaced and text.startswith('<'))"
    " or ((loose or spaced) and not seen.asking) %}"
    "{{ raise_exception('an answer to no question, or that begins with white space or a tag: ' + writer) }}"
    "{% endif %}"
    "{{ answer_open + text + answer_close }}{% set seen.written = true %}{% set seen.asking = false %}{% endif %}"
    "{% else %}{{ raise_exception('a turn of ' + message.role + ': ' + writer) }}{% endif %}{% endfor %}"
    "{% if not seen.asked %}{{ raise_exception('no message of the user: ' + writer) }}{% endif %}"
    "{% if add_generation_prompt %}{{ opening }}"
    "{% elif messages[-1].role == 'assistant' and messages[-1].content %}{{ final }}{% endif %}"
)


def write_config(folder: Path, assembly: Assembly, dtypes: Iterable[np.dtype], as_it_came: bool) -> None:
    """Write config.json, where there was one as it was but for the size of the vocabulary and the dtype.

    Of a model with more parts it is that of its language model, the only part that is written.

    `as_it_came`: the weights are those of the folder that the run names, so that its dtype holds too.
    """
    source, rows = assembly.llm_folder, assembly.llm.vocab_size
    dtype = str(functools.reduce(jnp.promote_types, dtypes))
    if source is None or read_json(source / "config.json").get("model_type") in MODEL_TYPES:  # of more than the LLM
        # Transformers has a padding id for each family where a file has none; it may be beyond this vocabulary.
        content = {**to_hf(assembly.llm), "dtype": dtype, "pad_token_id": None, **_token_ids(assembly)}
        (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return
    text = (source / "config.json").read_text(encoding="utf-8")
    whole = json.loads(text)
    if (part := text_part(whole)) is not whole:
        text = json.dumps({"architectures": [FAMILIES[assembly.llm.model_type].architecture], **part}, indent=2) + "\n"
    changes: dict[str, Any] = {} if as_it_came else dict.fromkeys(_DTYPE_KEYS, dtype)
    (folder / "config.json").write_text(edited(text, {"vocab_size": rows, **changes}), encoding="utf-8")


def edited(text: str, changes: Mapping[str, Any]) -> str:
    """The text of a JSON object with other values of those of these keys that it has; nothing else of it changes."""
    wanted = json.loads(text)
    changes = {key: value for key, value in changes.items() if key in wanted and wanted[key] != value}
    wanted |= changes
    for key, value in changes.items():
        said = json.dumps(value)
        text = re.sub(rf'("{key}"\s*:\s*)("[^"]*"|[^\s,}}]+)', lambda match, said=said: match[1] + said, text, count=1)
    # A key of the same name within another value may have come first.
    return text if json.loads(text) == wanted else json.dumps(wanted, indent=2, ensure_ascii=False) + "\n"


def write_companions(folder: Path, assembly: Assembly) -> str:
    """The tokenizer with its added tokens and the run's chat template, the generation configuration, the base's
    licences. Returns why there is no chat template, or "".

    A template that the tokenizer came with does not stay: it asks otherwise than the run has trained.
    """
    tokenizer, source = assembly.tokenizer, assembly.llm_folder
    given = tokenizer.chat_template
    tokenizer.chat_template, reason = chat_template(assembly.text, tokenizer)
    tokenizer.save_pretrained(folder)
    tokenizer.chat_template = given
    if source is not None and (source / GENERATION).is_file():
        shutil.copyfile(source / GENERATION, folder / GENERATION)
    else:
        content = {"do_sample": False, **_token_ids(assembly)}
        content["eos_token_id"] = list(stop_ids(tokenizer, assembly.text.family))
        (folder / GENERATION).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for file in [] if source is None else [file for pattern in _LICENCES for file in source.glob(pattern)]:
        shutil.copyfile(file, folder / file.name)
    return reason


def _token_ids(assembly: Assembly) -> dict[str, int]:
    ids = {f"{name}_token_id": getattr(assembly.tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return {name: value for name, value in ids.items() if value is not None}


def chat_template(spec: TextSpec, tokenizer: Any) -> tuple[str | None, str]:
    """The form of the run as a template in Jinja, for turns of the roles system, user and assistant; or None, and why.

    ECGs are written into the text of a turn by whoever calls it, as in training: N times `<signal>` and a newline.
    """
    if spec.phase == "pretrain":
        return None, "phase pretrain has no conversations"
    asked = [name for name in _REFERENCE if behaviours.enabled(name, spec.compat)]
    if asked:
        return None, f"compat {', '.join(asked)} writes conversations as no template can"
    for said in _probes(spec):
        rendered = to_prompt(said, tokenizer, replace(spec, max_len=None), 1)
        if tokenizer(rendered.prompt, add_special_tokens=False)["input_ids"] != rendered.ids.tolist():
            return None, f"training cuts a conversation where one text does not ({rendered.prompt[-60:]!r})"
    settings = _settings(spec, tokenizer).items()
    # JSON is Jinja, but for its null.
    values = ((name, "none" if value is None else json.dumps(value, ensure_ascii=False)) for name, value in settings)
    return "".join(f"{{% set {name} = {value} %}}" for name, value in values) + _TEMPLATE, ""


def _probes(spec: TextSpec) -> list[list[dict[str, str]]]:
    """Conversations whose questions and answers begin and end with all sorts of characters."""
    thought = THINK_PREFIX if spec.explicit_thinking else ""
    edges = [*string.ascii_letters, *string.digits, *string.punctuation, *"éßµΩж心。？ف한🙂"]
    return [
        [
            {"role": "user", "content": f"Is it {edge}"},
            {"role": "assistant", "content": f"{thought}{edge} or <think> this {edge}</think> {edge}"},
            {"role": "user", "content": f"{edge} 60 {edge}"},
        ]
        for edge in edges
    ]


def _settings(spec: TextSpec, tokenizer: Any) -> dict[str, Any]:
    form, system = CHAT_FORMS[spec.family], spec.system_prompt
    ends = {"{bos}": tokenizer.bos_token or "", "{eos}": tokenizer.eos_token or ""}
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    spaced = vocabulary(tokenizer).spaces_runs and form.answer[0].endswith(" ")
    header = form.answer[0].removesuffix(" ") if spaced and not spec.explicit_thinking else form.answer[0]
    opened, closed = form.system or ("", "")
    texts = {
        "bos": form.bos, "system_open": opened, "system_close": closed, "between": form.between,
        "user_open": form.user[0], "user_close": form.user[1], "answer_open": form.answer[0],
        "answer_close": form.answer[1] + form.answer[2], "final": form.final,
        "opening": header + (THINK_PREFIX if spec.explicit_thinking else ""),
    }  # fmt: skip
    for mark, token in ends.items():
        texts = {name: text.replace(mark, token) for name, text in texts.items()}
    return texts | {
        "system": form.default_system if system is None else system,
        "has_system": form.system is not None,
        "empty_system": form.default_system is not None,
        "inside": form.system_in_user,
        "strip": form.strip,
        "loose": not form.user[1] and not form.answer[0].startswith(form.tokens),
        "spaced": spaced,
        "thought": THINK_PREFIX if spec.explicit_thinking else "",
        "names": sorted({*special, *filter(None, [tokenizer.unk_token])} - {SIGNAL_TOKEN, *THINK_TOKENS}),
        "tags": list(THINK_TOKENS),
        "signal": SIGNAL_TOKEN,
        "speakers": _SPEAKERS,
        "writer": _WRITER,
    }
