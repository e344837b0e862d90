"""Import weights that PyTorch saved into a run folder.

    python -m elm_jax.import_weights epoch_best.pt --out runs/imported --config.llm.name=qwen2.5-1.5b-instruct
    python -m elm_jax.import_weights encoder.pt --out runs/imported --config configs/llava_st_mem.py
    python -m elm_jax.import_weights GEM/ --out runs/gem --config.encoder.checkpoint=cpt_wfep_epoch_20.pt
    python -m elm_jax.import_weights adapter/ --out runs/imported --config configs/llava_merl.py --merge

PATH: a checkpoint of the reference, an encoder's, a folder of GEM, PULSE or another LLaVA, or one that PEFT has saved.
--config and --config.* say what the checkpoint does not; what it does say is taken from it. Nothing in the file but
tensors is read.

W/import_report.json says what went where. `train` starts from W by --config.init_from=W, `evaluate` and `chat` by
--checkpoint W.
"""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from elm_jax import cli
from elm_jax.errors import printable


def main(argv: Sequence[str]) -> None:
    """Parse the arguments, import, say what went where."""
    parser = cli.Parser("import_weights", description=__doc__)
    parser.add_argument("path", metavar="PATH", help="a .pt, .pth, .bin or .safetensors file, or a folder")
    parser.add_argument("--out", metavar="W", required=True, help="the new run folder")
    parser.add_argument("--merge", action="store_true", help="add an adapter to the weights beneath it")
    flags, options = parser.read(argv)
    from elm_jax.exchange.bring_in import import_weights

    report = import_weights(options.path, options.out, flags, options.merge)
    print(printable("\n".join(summary(report, options.out)), "\n"))


def summary(report: Mapping[str, Any], out: str) -> list[str]:
    """The report in a few lines."""
    tensors = report["tensors"]
    lines = [f"{report['source']}: {report['elm']}, LLM {report['llm']}, encoder {report['encoder']}"]
    lines += [f"  {key} = {fact['value']}, by {fact['by']}" for key, fact in report["told"].items()]
    lines += [f"  {key} = {value}, assumed: the file does not say" for key, value in report["assumed"].items()]
    parts = Counter((tensor["to"].split(".")[0], tensor["dtype"]) for tensor in tensors)
    lines += [f"  {part}: {count} tensors, {dtype}" for (part, dtype), count in parts.items()]
    lines += [f"  {part}: {where}" for part, where in report["from_elsewhere"].items()]
    reasons = Counter(report["left_out"].values())
    examples = {why: name for name, why in reversed(report["left_out"].items())}
    lines += [f"  left out: {examples[why]}{_more(count)}: {why}" for why, count in reasons.items()]
    return [*lines, f"{out}: {len(tensors)} tensors imported; {out}/import_report.json says what went where"]


def _more(count: int) -> str:
    return f" and {count - 1} more" if count > 1 else ""


if __name__ == "__main__":
    sys.exit(cli.guard(main))
