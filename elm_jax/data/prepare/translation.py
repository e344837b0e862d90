"""Reports in English by a translation model: any sequence-to-sequence or causal one, a folder of Hugging Face's.

PyTorch runs it, greedily unless the folder's generation_config.json says how many beams. What was translated is kept in
a file, a line each, as it comes: a second run translates what is not there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import xxhash
from tqdm import tqdm

from elm_jax.errors import UserError, refused
from elm_jax.folders import file_checksum
from elm_jax.json_text import parse_json
from elm_jax.stopping import each
from elm_jax.text.torch_models import check_parts, check_room
from elm_jax.text.vocabulary import load_tokenizer, refused_panics

REPORT = "{report}"  # in a prompt
CACHE = "translations.jsonl"
_BATCH, _MOST_NEW = 24, 256  # reports, tokens of a translation
_WHERE, _FIX = "--translator", "give the folder of a model that translates, or of a causal language model"
_EXPECTED = "a sequence-to-sequence or causal language model with its tokenizer"
_VOCABULARIES = ("tokenizer.json", "*.spm", "*.model", "vocab.*")
_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # how architectures are called
_CHAT = f"Translate this ECG report to English. Answer with the translation alone.\n\n{REPORT}"
_PLAIN = f"German: {REPORT}\nEnglish:"
_FROM, _TO = "de", "en"  # for models whose template asks for it
_ENDLESS = 1 << 31  # what has no bound on its tokens says more


class Translated(NamedTuple):
    """A translation; whole: neither it nor what it was made of was cut off."""

    text: str
    whole: bool


class Translator:
    """The model in `folder`, and what it has translated, in the file `cache`.

    prompt: with REPORT in it, what the model is given; "": the report itself, and a request where the model is causal.

    Raises:
        UserError: the folder has no such model, or the prompt no place for a report.
    """

    def __init__(self, folder: Path, cache: Path, prompt: str = "", progress: bool = True) -> None:
        if prompt and REPORT not in prompt:
            raise UserError("--translator-prompt", repr(prompt), f"a text with {REPORT} in it", "say where it goes")
        if not (folder / "config.json").is_file():
            raise UserError(_WHERE, f"{folder} without config.json", "a model's folder on this machine", _FIX)
        self._folder, self._cache, self._prompt, self._progress = folder, cache, prompt, progress
        self._causal = self._read_kind()

    @cached_property
    def name(self) -> str:
        """Of whom a translation is: the content of the folder and the prompt."""
        with refused(_WHERE, "", "files that can be read", _FIX):
            files = {path.name: file_checksum(path) for path in sorted(self._folder.iterdir()) if path.is_file()}
        return xxhash.xxh3_64_hexdigest(json.dumps([files, self._prompt, _MOST_NEW]).encode())

    def __call__(self, texts: Iterable[str]) -> Mapping[str, Translated]:
        """Of each text its translation.

        Raises:
            UserError: the model cannot be read or fails, or the file cannot be written.
        """
        known, wanted = self._kept(), set(texts)
        left = sorted(wanted - known.keys(), key=lambda text: (len(text), text))
        batches = [left[start : start + _BATCH] for start in range(0, len(left), _BATCH)]
        for batch in each(tqdm(batches, "translating", unit="batch", disable=not self._progress), "batch"):
            made = dict(zip(batch, self._translate(batch), strict=True))
            self._keep(made)
            known |= made
        return {text: known[text] for text in wanted}

    def _kept(self) -> dict[str, Translated]:
        found: dict[str, Translated] = {}
        with refused(self._cache, "", "translations", "correct it, or delete it to translate anew"):
            lines = self._cache.read_text(encoding="utf-8").split("\n") if self._cache.is_file() else []
        for line in lines:
            try:
                said = parse_json(line)
                whose, text, made, whole = said["by"], said["of"], said["text"], said["whole"]
            except (ValueError, TypeError, KeyError):  # cut off when the machine stopped
                continue
            if whose == self.name and isinstance(text, str) and isinstance(made, str):
                found[text] = Translated(made, bool(whole))
        return found

    def _keep(self, made: Mapping[str, Translated]) -> None:
        """Lines of their own, whatever was cut off before, and on the disk."""
        rows = [{"by": self.name, "of": text, "text": one.text, "whole": one.whole} for text, one in made.items()]
        lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
        with refused(self._cache, "", "a place to write to", "name another --out, or make room", OSError):
            self._cache.parent.mkdir(parents=True, exist_ok=True)
            with self._cache.open("a", encoding="utf-8") as file:
                file.write(f"\n{lines}")
                file.flush()
                os.fsync(file.fileno())

    def _read_kind(self) -> bool:
        """Whether the model continues texts; False: it makes one text of another."""
        try:
            from transformers import AutoConfig
        except ImportError as error:
            raise UserError(_WHERE, str(error), "transformers", "pip install transformers") from error
        with refused_panics(_WHERE, f"{self._folder}, which cannot be read", _EXPECTED, _FIX):
            check_parts(self._folder / "config.json", _WHERE, _FIX)
            self._config: Any = AutoConfig.from_pretrained(
                str(self._folder), trust_remote_code=False, local_files_only=True
            )
            kinds = self._config.architectures or []
            if not self._config.is_encoder_decoder and not any(kind.endswith(_CAUSAL) for kind in kinds):
                raise UserError(_WHERE, f"{self._folder}, a {', '.join(kinds) or 'model'}", _EXPECTED, _FIX)
            return not self._config.is_encoder_decoder

    @cached_property
    def _model(self) -> Any:
        try:
            import torch
            from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
        except ImportError as error:
            raise UserError(_WHERE, str(error), "PyTorch, for a translator", "pip install torch") from error
        # Where PEFT is installed, transformers asks the hub for adapters too, unless these are local as well.
        local: dict[str, Any] = {"local_files_only": True, "adapter_kwargs": {"local_files_only": True}}
        kind: Any = AutoModelForCausalLM if self._causal else AutoModelForSeq2SeqLM
        device = "cuda" if torch.cuda.is_available() else "cpu"
        local["dtype"] = "auto" if device == "cuda" else torch.float32
        with refused_panics(_WHERE, f"{self._folder}, which cannot be read", _EXPECTED, _FIX):
            with torch.device("meta"):
                empty = kind.from_config(self._config, trust_remote_code=False)
                check_room(self._folder, _WHERE, _EXPECTED, _FIX, empty)
            model, loaded = kind.from_pretrained(
                str(self._folder), trust_remote_code=False, weights_only=True, output_loading_info=True, **local
            )
            if loaded["missing_keys"]:
                found = f"{self._folder} without {sorted(loaded['missing_keys'])[0]}"
                raise UserError(_WHERE, found, "all weights of the model", "download it again")
            return model.eval().to(device)

    @cached_property
    def _tokenizer(self) -> Any:
        if not any(any(self._folder.glob(pattern)) for pattern in _VOCABULARIES):  # or transformers makes an empty one
            raise UserError(_WHERE, f"{self._folder} without a tokenizer", _EXPECTED, _FIX)
        tokenizer = load_tokenizer(self._folder, _WHERE, local_files_only=True)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left" if self._causal else "right"
        return tokenizer

    def _translate(self, texts: list[str]) -> list[Translated]:
        import torch

        tokenizer, model = self._tokenizer, self._model
        most = getattr(self._config, "max_position_embeddings", None), tokenizer.model_max_length
        limit = None if self._causal else min((n for n in most if n and 0 < n < _ENDLESS), default=None)
        with refused_panics(_WHERE, "a model that fails at a report", _EXPECTED, _FIX), torch.inference_mode():
            asked, templated = self._asked(texts)
            special = {"add_special_tokens": not templated}
            lengths = [len(ids) for ids in tokenizer(asked, verbose=False, **special)["input_ids"]]
            cut: dict[str, Any] = {"truncation": True, "max_length": limit} if limit else {}
            given = tokenizer(asked, return_tensors="pt", padding=True, **cut, **special).to(model.device)
            ids = {name: given[name] for name in ("input_ids", "attention_mask")}
            made = model.generate(**ids, do_sample=False, max_new_tokens=_MOST_NEW)
            made = made[:, ids["input_ids"].shape[1] :] if self._causal else made
            ends = {tokenizer.pad_token_id, *_listed(model.generation_config.eos_token_id)}
            said = tokenizer.batch_decode(made, skip_special_tokens=True)
            # Without a template a model goes on with a report of its own, in the next line.
            continued = self._causal and not templated
            lines = [text.strip().partition("\n") if continued else (text, "", "") for text in said]
            read = [limit is None or length <= limit for length in lengths]
            ended = [bool(line[1]) or int(row[-1]) in ends for line, row in zip(lines, made, strict=True)]
        rows = zip(lines, read, ended, strict=True)
        return [Translated(" ".join(line[0].split()), whole and end) for line, whole, end in rows]

    def _asked(self, texts: list[str]) -> tuple[list[str], bool]:
        """What the model is given for each text, and whether that is by its own chat template."""
        template = getattr(self._tokenizer, "chat_template", None) if self._causal else None
        prompt = self._prompt or (REPORT if not self._causal else _CHAT if template else _PLAIN)
        asked = [prompt.replace(REPORT, text) for text in texts]
        if not template:
            return asked, False
        contents: list[Any] = list(asked)
        if "source_lang_code" in str(template) and not self._prompt:  # TranslateGemma's
            told = {"type": "text", "source_lang_code": _FROM, "target_lang_code": _TO}
            contents = [[{**told, "text": text}] for text in texts]
        told = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        turns = ([{"role": "user", "content": content}] for content in contents)
        return [self._tokenizer.apply_chat_template(turn, **told) for turn in turns], True


def _listed(ids: Any) -> list[int]:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]
