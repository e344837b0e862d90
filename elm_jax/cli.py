"""The edge of every command: flags and config files in, a checked Config out, errors as one line.

A command driven by a config ends with `if __name__ == "__main__": cli.run(main)`; one with flags of its own
makes a `cli.Parser` and ends with `sys.exit(cli.guard(main))`. For --help to be fast a command imports jax
inside its `main`.

Flags are written as ml_collections has them: `--config FILE` or `--config=FILE:ARGUMENT`, then
`--config.optim.lr=1e-4`, `--config.optim.lr 1e-4`, `--config.data.pack` or `--noconfig.data.pack`. A list is
`a,b`, a dictionary JSON, or one entry of it: `--config.llm.scratch.layers=2`. The last of two flags counts.
"""

import argparse
import contextlib
import inspect
import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from ml_collections import ConfigDict

from elm_jax import config, schema, stopping
from elm_jax.config import SCHEMA, Config
from elm_jax.errors import UserError, closest, nearest, printable

USAGE = "--config FILE, --config.KEY=VALUE, --register FILE, --debug or --help"
PACKAGED = Path(__file__).parent / "configs"


def run(main: Callable[[Config], int | None], argv: Sequence[str] | None = None) -> NoReturn:
    """Run `main` on the Config that `argv` (default: the process's) describes, and exit with its status."""

    def command(args: Sequence[str]) -> int | None:
        if any(arg in ("--help", "-h", "-help", "--helpfull", "--helpshort") for arg in args):
            print(_help(main))
            return 0
        flags = ConfigFlags.parse(args)
        if flags.rest:
            raise _not_a_flag(flags.rest[0])
        loaded = flags.load()
        try:
            return main(loaded)
        except UserError as error:
            return report(error, loaded.debug)

    sys.exit(guard(command, argv))


def guard(command: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Call `command(argv)` and return the exit status: its own, 0 for None, that of a UserError (2, rarely 75), or of
    a signal that asked it to end (143, for SIGINT 130).

    A UserError is one line on stderr, after the traceback if `--debug` is among the arguments; so is a signal. Other
    SystemExits and all other exceptions pass through. The files of `--register FILE` are imported first.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if logging.lastResort is not None:  # what shows warnings unless a program sets up its own log
        logging.lastResort.setFormatter(_Printable())
    with stopping.listening():
        try:
            stopping.doing("starting")
            return command(_without_registered(args)) or 0
        except UserError as error:
            return report(error, "--debug" in args)
        except (stopping.Stopped, stopping.Interrupted) as stop:
            print(stop.text, file=sys.stderr)
            return stop.status


def _without_registered(args: Sequence[str]) -> list[str]:
    """The arguments after each `--register FILE`, which imports a file that calls `elm_jax.register_...`."""
    rest, waiting = [], list(args)
    while waiting:
        arg = waiting.pop(0)
        flag, equals, file = arg.partition("=")
        if flag == "--register":
            _import(file if equals else _following(arg, waiting))
        else:
            rest.append(arg)
    return rest


def _import(file: str) -> None:
    """Import a file of the user's, as a module that is called as it is: workers of a loader can import it too."""
    path = Path(file).resolve()
    if not path.is_file():
        raise UserError("--register", f"no file {file}", "a Python file", "correct the path")
    _look_beside(path)
    with _named_errors(file, path):
        module = import_module(path.stem)
        if Path(module.__file__ or "").resolve() != path:
            found = f"{file}, called as {module.__file__}"
            raise UserError("--register", found, "a name of its own", "rename the file")


class _Printable(logging.Formatter):
    """Log lines hold names and texts out of files."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), "\n")


def report(error: UserError, debug: bool) -> int:
    """Print a user's error as `guard` does; returns its status."""
    if debug:
        traceback.print_exception(error)
    print(f"error: {error}", file=sys.stderr)
    return error.status


class Parser(argparse.ArgumentParser):
    """The arguments of the command `elm_jax.<command>`, described by its module's docstring.

    Errors are UserErrors; flags are not abbreviated; it knows --debug.
    """

    def __init__(self, command: str = "", **kwargs: Any) -> None:
        if command:
            kwargs |= {"prog": f"python -m elm_jax.{command}", "formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(**{"allow_abbrev": False, **kwargs})
        self.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks of user errors"
        )
        own = "import a file of yours first, which adds an encoder, a dataset ... (docs/extend.md)"  # `guard` does it
        self.add_argument("--register", metavar="FILE", default=argparse.SUPPRESS, help=own)

    def read(self, argv: Sequence[str]) -> tuple["ConfigFlags", argparse.Namespace]:
        """The flags of the configuration in `argv`, and the command's own arguments."""
        flags = ConfigFlags.parse(argv)
        return flags, self.parse_args(flags.rest)

    def error(self, message: str) -> NoReturn:
        """Raise `message`, which argparse words, as a UserError."""
        _, known, unknown = message.partition("unrecognized arguments: ")
        flag = unknown.strip().partition(" ")[0].partition("=")[0] if known else ""
        wrong, names = flag, self._option_string_actions
        if chosen := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            wrong, names = chosen[1], re.findall(r"[\w-]+", chosen[2])
        fix = nearest(wrong, names) or f"run {self.prog} --help"
        raise UserError("command line", message, "the arguments that --help lists", fix)


@dataclass
class ConfigFlags:
    """The part of a command line that says the configuration, and the rest of it."""

    path: str | None = None
    values: dict[str, Any] = field(default_factory=dict)  # dotted key -> value, in the order last given
    rest: list[str] = field(default_factory=list)

    @classmethod
    def parse(cls, argv: Sequence[str]) -> "ConfigFlags":
        """Split `argv`; `--debug` is `--config.debug`."""
        flags, args = cls(), list(argv)
        while args:
            arg = args.pop(0)
            name, equals, text = arg.lstrip("-").partition("=")
            is_flag = arg.startswith("-")
            if is_flag and name == "config":
                flags.path = text if equals else _following(arg, args)
            elif is_flag and name.startswith("config."):
                key = name.removeprefix("config.")
                flags._set(key, text if equals else "true" if _is_bool(key) else _following(arg, args))
            elif is_flag and name.startswith("noconfig.") and not equals:
                key = name.removeprefix("noconfig.")
                if not _is_bool(key):
                    kind = schema.type_name(SCHEMA[_home(key)].type)
                    raise UserError(arg, "'no' before a key", kind, f"write --config.{key}=VALUE")
                flags._set(key, "false")
            elif arg == "--debug":
                flags._set("debug", "true")
            else:
                flags.rest.append(arg)
        return flags

    def load(self) -> Config:
        """Read the config file, apply the flags, check the result."""
        if self.path is None:
            raise UserError(
                "--config", "no config file", "--config FILE", f"give one, such as {_packaged()[0]}"
            )
        return self.over(*read_config_file(self.path))

    def over(self, tree: dict[str, Any], name: str = "default") -> Config:
        """The checked configuration `tree` with these flags in place of its values."""
        tree = config.renamed(tree)
        for key, value in config.renamed(self.values, "--config.").items():
            *sections, leaf = key.split(".")
            place = tree
            for section in sections:
                if not isinstance(place.get(section), dict):
                    place[section] = {}
                place = place[section]
            place[leaf] = value
        return config.resolve(tree, name)

    def _set(self, key: str, text: str) -> None:
        home = _home(key)
        inside = key.startswith(f"{home}.")
        value = schema.read_literal(text) if inside else config.from_text(home, text)
        self.values.pop(key, None)  # so that of a dictionary and an entry of it, too, the last one wins
        self.values[key] = value


def read_config_file(argument: str) -> tuple[dict[str, Any], str]:
    """What get_config of `FILE` or `FILE:ARGUMENT` returns, as a dict, and the run's name that it implies.

    A file `configs/X.py` or `configs/FOLDER/X.py` that is not there is taken from the package. What lies beside a file
    it can import.
    """
    named, _, text = argument.partition(":")
    path = _find(named)
    _look_beside(path)
    with _named_errors(named, path):
        loader = SourceFileLoader(f"_config_{path.stem}", str(path))
        module = ModuleType(loader.name)
        module.__file__ = str(path)
        loader.exec_module(module)
        if not callable(getattr(module, "get_config", None)):
            raise UserError(named, "no function get_config", "get_config() -> ConfigDict", "define it")
        result = module.get_config(*([text] if text else []))
    if not isinstance(result, ConfigDict | dict):
        raise UserError(
            named, f"get_config() returning {type(result).__name__}", "a ConfigDict", "return one"
        )
    tree = result.to_dict() if isinstance(result, ConfigDict) else result
    return tree, "_".join([path.stem, *text.replace("/", " ").split()])


def _look_beside(path: Path) -> None:
    """Let a file of the user's import what lies beside it, as a script can; last, so that it takes no other's place."""
    folder = path.resolve().parent
    if PACKAGED not in (folder, *folder.parents) and str(folder) not in sys.path:
        sys.path.append(str(folder))


@contextlib.contextmanager
def _named_errors(named: str, path: Path) -> Iterator[None]:
    """Whatever a file of the user's raises is a UserError that names its line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
        raise UserError(f"{named}{_line(error, path)}", found, "a Python file that runs", "mend it") from error


def _find(named: str) -> Path:
    path = Path(named)
    if path.is_file():
        return path
    known = _packaged()
    for name in (path.as_posix(), f"configs/{path.as_posix()}"):
        if name in known:
            return PACKAGED.parent / name
    fix = nearest(named, known) or f"give the path of one, or {' or '.join(known)}"
    raise UserError("--config", f"no file {named}", "a Python file with get_config()", fix)


def _packaged() -> list[str]:
    """The package's config files, as `--config` takes them from anywhere."""
    return sorted(file.relative_to(PACKAGED.parent).as_posix() for file in PACKAGED.rglob("[!_]*.py"))


def _line(error: Exception, path: Path) -> str:
    if isinstance(error, SyntaxError):
        return f" line {error.lineno}"
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)
    ]
    return f" line {lines[-1]}" if lines else ""


def _home(key: str) -> str:
    """The key of the schema that `key` names or, for an entry of a dictionary, lies in; else UserError."""
    key = config.OLDER.get(key, key)
    parents = [key[:place] for place, char in enumerate(key) if char == "."]
    for known in (key, *parents):
        if known in SCHEMA and (known == key or dict in schema.kinds(SCHEMA[known].type)):
            return known
    raise config.unknown_key(key, "--config.")


def _is_bool(key: str) -> bool:
    return bool in schema.kinds(SCHEMA[_home(key)].type)


def _following(flag: str, args: list[str]) -> str:
    if not args or args[0].startswith("--"):
        raise UserError(flag, "no value", "a value", f"write {flag}=VALUE")
    return args.pop(0)


def _not_a_flag(arg: str) -> UserError:
    name, _, text = arg.lstrip("-").partition("=")
    own = closest(name, ("config", "debug", "help"))
    key = config.closest_key(name)
    flag = f"--{own}" if own else f"--config.{key}={text or 'VALUE'}" if key else ""
    fix = f"did you mean {flag}?" if flag else "remove it"
    return UserError("command line", f"{arg!r}, which is not a flag", USAGE, fix)


def _help(main: Callable[..., Any]) -> str:
    module = sys.modules[main.__module__]
    name = module.__spec__.name if module.__spec__ else module.__name__
    text = inspect.getdoc(module) or inspect.getdoc(main) or ""
    usage = f"usage: python -m {name} --config FILE [--config.KEY=VALUE ...] [--register FILE] [--debug]"
    files = f"config files of the package: {', '.join(_packaged())}"
    return f"{usage}\n\n{text}\n\n{files}\n\nkeys, with default and type:\n{help_text()}"


def help_text() -> str:
    """Every key as its flag, with type, default, meaning and choices."""
    lines = []
    for name, k in config.SCHEMA.items():
        choices = f": {', '.join(k.choices)}" if k.choices else ""
        kind = schema.type_name(k.accepts or k.type)
        lines.append(f"  --config.{name}={schema.to_text(k.default)}  ({kind})")
        lines.append(f"      {k.meaning}{choices}")
    return "\n".join(lines)
