"""A model that writes down what it is asked and answers from a list: for tests of what stands around a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

from elm_jax.config import Config, resolve
from elm_jax.data.dataset import Dataset, text_spec
from elm_jax.data.demo import demo_tokenizer
from elm_jax.data.sources import load_records
from elm_jax.data.specs import signal_spec
from elm_jax.inference.speaker import Answer, Speaker
from elm_jax.text.render import add_tokens, stop_ids

SECONDS, RATE = 10, 50


def fake_config(**keys: Any) -> Config:
    """A demo-like config with these dotted keys (dots as two underscores)."""
    tree: dict[str, Any] = {
        "workdir": "run",
        "encoder": {"name": "merl", "tokens": 2},
        "data": {"names": ["demo"], "sampling_rate": RATE, "segment_len": SECONDS * RATE, "system_prompt": "Be brief."},
        "eval": {"max_new_tokens": 8},
    }
    for key, value in keys.items():
        place = tree
        *sections, leaf = key.split("__")
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = value
    return resolve(tree)


class FakeModel:
    """Has of `TrainedModel` what a session uses; `prompts` and `seeds` are what it got."""

    def __init__(self, config: Config, family: str = "qwen2", context: int = 256, answers: Sequence[str] = ()) -> None:
        self.config, self.folder, self.step = config, config.workdir, 3
        tokenizer = demo_tokenizer()
        add_tokens(tokenizer, config.objective)
        text = text_spec(config.data, family, config.encoder.tokens, config.objective, config.compat)
        signal, llm = signal_spec(config.data, config.seed), SimpleNamespace(max_len=context)
        self.assembly = SimpleNamespace(text=text, signal=signal, tokenizer=tokenizer, llm=llm)
        self.arrays: dict[str, Any] = {}
        self.stops = stop_ids(tokenizer, family)
        self.engine = SimpleNamespace(prefills=SimpleNamespace(forget=lambda: None), calls=Counter())
        self.prompts: list[Any] = []
        self.seeds: list[int] = []
        self._answers = list(answers)

    def written(self, prompt: Any, new: int) -> Any:
        return Speaker.written(cast(Any, self), prompt, new)

    def spoken(self, prompt: Any, options: Any, seed: int = 0) -> Iterator[str]:
        assert options is self.config.eval
        assert prompt.rendered.signal_positions.shape[0] == len(prompt.signals)
        assert len(prompt.rendered.ids) + options.max_new_tokens <= self.assembly.llm.max_len
        self.prompts.append(prompt)
        self.seeds.append(seed)
        answer = self._answers.pop(0) if self._answers else "60"
        yield answer[:2]
        if answer == "fail":
            raise KeyboardInterrupt
        yield answer[2:]


class Asked(FakeModel):
    """A `FakeModel` that has data and answers every prompt of a batch: `reply` says what, of what it is asked."""

    def __init__(self, config: Config, context: int) -> None:
        super().__init__(config, context=context)
        self.assembly.dataset = self.dataset
        self.reply: Callable[[Any], str] = lambda prompt: "yes"

    def dataset(self, split: Any, fold: int | None = None) -> Dataset:
        data = self.config.data if fold is None else replace(self.config.data, fold=fold)
        records = load_records(data, split, 0)
        return Dataset(records, self.assembly.tokenizer, self.assembly.text, self.assembly.signal)

    def stream(self, prompts: Sequence[Any], options: Any, seed: int = 0) -> Iterator[Answer]:
        for number, prompt in enumerate(prompts):
            assert 0 < len(prompt.rendered.ids) <= self.assembly.llm.max_len - options.max_new_tokens
            self.prompts.append(prompt)
            yield Answer(number, self.reply(prompt), 0.01, 1, True)
