"""Talk with a trained model about ECGs, in the terminal.

    python -m elm_jax.chat --checkpoint runs/demo
    python -m elm_jax.chat --checkpoint runs/demo --ecg demo:test:3

A line is a message to the model, or one of:

    /ecg PATH   show an ECG: a .npy file, a WFDB record, demo:test:3, noise or flatline; as many as you like
    /clear      begin a new conversation, without ECGs
    /help       these lines
    /quit       leave; so does the end of the input

Several ECGs stand where they came up, or at the markers <ecg> in your message. A message that begins with / is
written with a blank before it. A model of phase pretrain goes on with your line; an empty line asks for a text.

Input that is no terminal is read as a script: each answer is then one line, "assistant: ...". Errors are lines
on stderr, "error: ...", and the chat goes on. --config.eval.* says how answers are made, such as
--config.eval.max_new_tokens=64 or --config.eval.temperature=0.7.
"""

import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from io import TextIOWrapper
from typing import TYPE_CHECKING

from elm_jax import cli
from elm_jax.errors import UserError, nearest, one_line

if TYPE_CHECKING:
    from elm_jax.inference.session import Ecg, Session

COMMANDS = ("/ecg", "/clear", "/help", "/quit")
assert __doc__ is not None
HELP = __doc__.split("\n\n")[3]


def main(argv: Sequence[str]) -> None:
    """Parse the arguments, load the run, talk until the input ends."""
    parser = cli.Parser(prog="python -m elm_jax.chat", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", metavar="W", required=True, help="the run's folder")
    parser.add_argument("--step", default="best", help="latest, best or a number")
    parser.add_argument("--ecg", metavar="F", action="append", default=[], help="begin with this ECG; may be repeated")
    flags = cli.ConfigFlags.parse(argv)
    options = parser.parse_args(flags.rest)
    from elm_jax.data.represent import signal_spec
    from elm_jax.inference.model import TrainedModel
    from elm_jax.inference.session import Session, read_input
    from elm_jax.runtime.compilation import keep_compiled
    from elm_jax.training.run import config_of_run

    keep_compiled()
    config = config_of_run(options.checkpoint, flags)
    waveforms = replace(signal_spec(config.data, config.seed), representation="signal")
    for path in options.ecg:  # what cannot be read is said before the model is loaded, which is slow
        read_input(path, waveforms)
    session = Session(TrainedModel(config, options.step))
    print(_banner(session), file=sys.stderr)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, TextIOWrapper):  # what is no text in the terminal's encoding is no reason to stop
            stream.reconfigure(errors="replace")
    for path in options.ecg:
        _show(session, session.add_ecg(path))
    talk(session, is_terminal=sys.stdin.isatty() and sys.stdout.isatty())


def talk(session: "Session", is_terminal: bool) -> None:
    """Obey and answer line after line; a user's mistake is a line on stderr."""
    for line in _typed() if is_terminal else sys.stdin:
        try:
            if not _obey(session, line.rstrip("\r\n"), is_terminal):
                return
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            print("\nstopped; the question is not part of the conversation", file=sys.stderr, flush=True)


def _obey(session: "Session", line: str, is_terminal: bool) -> bool:
    """Do what one line says; False to leave."""
    if line.startswith("/"):
        name, _, argument = line.partition(" ")
        return _command(session, name, argument.strip())
    pretrained = session.model.config.phase == "pretrain"
    if line.strip() or pretrained:
        answer = session.say(line.strip())
        if session.shortened:
            room = f"the {session.room} tokens that a prompt may have"
            print(f"note: the conversation was shortened to {room}", file=sys.stderr, flush=True)
        print(f"assistant: {_printable(answer) if is_terminal else one_line(_printable(answer))}", flush=True)
    return True


def _command(session: "Session", name: str, argument: str) -> bool:
    if name == "/ecg":
        path = argument.strip("'\"")
        if not path:
            raise UserError("/ecg", "no path", "/ecg PATH", "name a file, demo:test:3, noise or flatline")
        _show(session, session.add_ecg(path))
    elif name == "/clear":
        session.clear()
        print("cleared: no turns, no ECGs", flush=True)
    elif name == "/help":
        print(HELP, flush=True)
    elif name != "/quit":
        fix = nearest(name, COMMANDS) or "write a blank before a message that begins with /"
        raise UserError(name, "an unknown command", "/ecg PATH, /clear, /help or /quit", fix)
    return name != "/quit"


def _show(session: "Session", ecg: "Ecg") -> None:
    print(f"ecg {len(session.ecgs)}: {ecg.summary}", flush=True)


def _banner(session: "Session") -> str:
    model, options = session.model, session.model.config.eval
    drawn = f"drawn at temperature {options.temperature:g}" if options.temperature else "greedy"
    kind = "goes on with a text about the ECGs" if model.config.phase == "pretrain" else "answers questions"
    return (
        f"{model.folder}, step {model.step}: a model that {kind}, up to {options.max_new_tokens} tokens ({drawn}).\n"
        "/ecg PATH shows an ECG, /help says more, /quit leaves. The first answer takes longer: it compiles the model."
    )


def _typed() -> Iterator[str]:
    """Lines typed at a prompt, with editing and history where Python has them; Ctrl-C and Ctrl-D leave."""
    with suppress(ImportError):
        import readline  # noqa: F401
    while True:
        try:
            line = input("you: ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        yield line


def _printable(text: str) -> str:
    """Without control characters, which an untrained model may well spell."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


if __name__ == "__main__":
    sys.exit(cli.guard(main))
