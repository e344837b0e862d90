"""Where a model looks: attention from the answer to ECG and text, drawn on the waveform.

    python -m elm_jax.analyze --checkpoint runs/demo --ecg demo:test:3 --question "What is the heart rate?"

Leaves attention_1.png (one for each --ecg) and attention.json in --out (default: W/analysis). The weights are the mean
over layers, heads and the answer's tokens. "parts" in the JSON: first and last lead, first and last sample (ends
excluded) that an ECG token stands for. --answer TEXT: look at this answer in place of the model's own. A model of phase
pretrain is given no --question.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from elm_jax import cli
from elm_jax.errors import UserError, printable


def main(argv: Sequence[str]) -> None:
    """Parse the arguments, answer the question, draw the attention."""
    parser = cli.Parser("analyze", description=__doc__)
    parser.add_argument("--checkpoint", metavar="W", required=True, help="the run's folder")
    parser.add_argument("--step", default="best", help="latest, best or a number")
    parser.add_argument("--ecg", metavar="F", action="append", required=True, help="an ECG; may be repeated")
    parser.add_argument("--question", help="what is asked; several ECGs stand at its <ecg> markers")
    parser.add_argument("--answer", help="look at this answer")
    parser.add_argument("--out", type=Path, metavar="D", help="where to write; default: W/analysis")
    flags, options = parser.read(argv)
    from elm_jax.evaluation.attention import attention
    from elm_jax.evaluation.attention_picture import as_json, draw_attention
    from elm_jax.folders import writable_folder
    from elm_jax.inference.model import Prompt, TrainedModel
    from elm_jax.inference.session import read_input
    from elm_jax.run.config import config_of_run
    from elm_jax.runtime.compilation import keep_compiled
    from elm_jax.text.render import Turn, to_prompt

    keep_compiled()
    config = config_of_run(options.checkpoint, flags)
    out = writable_folder(options.out or Path(config.workdir) / "analysis", "--out")
    model = TrainedModel(config, options.step)
    assembly, spec = model.assembly, model.assembly.signal
    question = _question(options.question, assembly.text.phase)
    ecgs = [read_input(path, spec, number) for number, path in enumerate(options.ecg)]
    text = replace(assembly.text, max_len=None)
    rendered = to_prompt([Turn("user", question)], assembly.tokenizer, text, len(ecgs))
    prompt = Prompt(rendered, [ecg.signal for ecg in ecgs])
    answer = options.answer if options.answer is not None else model.answers([prompt], model.config.eval)[0]
    found = attention(model, prompt, answer)
    title = f"{question}  →  {answer or '(empty)'}"
    for number, ecg in enumerate(ecgs):
        picture = out / f"attention_{number + 1}.png"
        draw_attention(found, number, ecg.recorded, spec.sampling_rate, spec.leads, title, picture)
    facts = {"question": question, "answer": answer, "ecg": options.ecg, "step": model.step}
    (out / "attention.json").write_text(json.dumps(as_json(found, facts), indent=1) + "\n", encoding="utf-8")
    print(f"answer: {printable(answer)}")
    print(f"attention to ECGs: {found.ecg_share:.3f} (uniform: {found.uniform_share:.3f})")
    print(f"written to {out}")


def _question(asked: str | None, phase: str) -> str:
    """What is asked: nothing of a pretrained model, which writes about the ECGs alone."""
    if phase == "pretrain" and asked is not None:
        raise UserError("--question", repr(asked), "none: a model of phase pretrain is asked nothing", "leave it out")
    if phase != "pretrain" and asked is None:
        raise UserError("--question", "none", "what is to be asked", 'give --question "What is the heart rate?"')
    return asked or ""


if __name__ == "__main__":
    sys.exit(cli.guard(main))
