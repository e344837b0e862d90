"""All commands by one name: `elm train --config configs/demo.py` is `python -m elm_jax.train --config configs/demo.py`.

    elm COMMAND ...        a command; each has --help
    elm --version
"""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

import elm_jax
from elm_jax import cli
from elm_jax.errors import UserError, nearest


def commands() -> dict[str, str]:
    """Name -> the first line of what its module says, of every module of the package that runs as a program."""
    found = {}
    for file in sorted(Path(__file__).parent.glob("[!_]*.py")):
        text = file.read_text(encoding="utf-8")
        if '\nif __name__ == "__main__":' in text:
            said = ast.get_docstring(ast.parse(text)) or ""
            found[file.stem] = said.split("\n\n")[0].replace("\n", " ")
    return found


def main() -> None:
    """Run the command that the first argument names, as `python -m` does."""
    name, *rest = sys.argv[1:] or ["--help"]
    known = commands()
    if name in known:
        sys.argv = [f"elm {name}", *rest]
        runpy.run_module(f"elm_jax.{name}", run_name="__main__", alter_sys=True)
        return
    if name in ("--version", "-V"):
        print(f"elm_jax {elm_jax.__version__}")
    elif name in ("--help", "-h", "help"):
        print(__doc__)
        print("\n".join(f"{command:<15} {said}" for command, said in known.items()))
    else:
        fix = nearest(name, known) or "elm --help lists them"
        sys.exit(cli.report(UserError("elm", name, f"a command: {', '.join(known)}", fix), debug=False))


if __name__ == "__main__":
    main()
