"""Export a run for PyTorch: the LLM as a Hugging Face folder, encoder and connector, a checkpoint of the reference.

    python -m elm_jax.export --checkpoint runs/demo --out exported
    python -m elm_jax.export --checkpoint runs/qa --out exported --merge --dtype bfloat16
    python -m elm_jax.export --checkpoint runs/qa --out exported --push_to_hub me/my-elm
    python -m elm_jax.export --checkpoint runs/gem --out exported --llava

It leaves in D: llm/ (AutoModelForCausalLM.from_pretrained loads it) with the tokenizer; adapter/ (a PEFT folder)
where the run trained LoRA and --merge was not given; encoder.safetensors and connector.safetensors with the
reference's names; elm.json, how ECGs and prompts are prepared; README.md, the model card; and with PyTorch elm.pt
and encoder.pt, for --elm_ckpt and --encoder_ckpt of the reference. With --llava also llava/, the folder that the
programs of GEM and PULSE load.

Weights come out in the dtype in which they were trained, or, where they were not, in the one in which they came.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from elm_jax import cli
from elm_jax.errors import UserError, printable

_UNITS = {"MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


def main(argv: Sequence[str]) -> None:
    """Parse the arguments, export the run, upload it if asked."""
    flags, options = _parser().read(argv)
    shard_bytes = _bytes(options.max_shard_size)
    from elm_jax.exchange.export import export
    from elm_jax.exchange.hub import check_repo, push
    from elm_jax.run.config import config_of_run

    if options.push_to_hub:
        check_repo(options.push_to_hub)
    config = config_of_run(options.checkpoint, flags)
    for line in export(config, options.out, options.step, options.merge, options.dtype, shard_bytes, options.llava):
        print(printable(line))
    print(f"exported to {options.out}")
    if options.push_to_hub:
        print(f"uploaded to {push(Path(options.out), options.push_to_hub, options.public)}")


def _parser() -> cli.Parser:
    parser = cli.Parser("export", description=__doc__)
    parser.add_argument("--checkpoint", metavar="W", required=True, help="the run's folder")
    parser.add_argument("--out", metavar="D", required=True, help="the folder to write; an earlier export is replaced")
    parser.add_argument("--step", default="best", help="latest, best or a number")
    parser.add_argument("--merge", action="store_true", help="add LoRA to the weights that it adapts")
    parser.add_argument("--llava", action="store_true", help="also a folder as LLaVA, GEM and PULSE have theirs")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of every parameter")
    parser.add_argument(
        "--max_shard_size", "--max-shard-size", metavar="N", default="5GB", help="of a file of the LLM: 500MB, 5GB"
    )
    parser.add_argument(
        "--push_to_hub", "--push-to-hub", metavar="REPO", help="upload the folder to the Hugging Face hub: owner/name"
    )
    parser.add_argument("--public", action="store_true", help="a new repository of --push_to_hub is for all to see")
    return parser


def _bytes(size: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)", size, re.IGNORECASE)
    unit = _UNITS.get(found[2].upper()) if found else None
    if not found or unit is None or float(found[1]) <= 0:
        raise UserError("--max_shard_size", repr(size), "a number of MB or GB, such as 5GB", "write it so")
    return int(float(found[1]) * unit)


if __name__ == "__main__":
    sys.exit(cli.guard(main))
