"""Talk with a trained model about ECGs, in the terminal.

    python -m elm_jax.chat --checkpoint runs/demo
    python -m elm_jax.chat --checkpoint runs/demo --ecg demo:test:3

A line is a message to the model, or one of:

    /ecg PATH     show an ECG: a recording of any format, demo:test:3, noise or flatline; as many as you like
    /system TEXT  another system prompt, from the next answer on; alone: the one there is
    /save FILE    keep the conversation: FILE.json, a record as datasets have them, and FILE.txt to read
    /new          begin a new conversation about the same ECGs
    /clear        begin a new conversation, without ECGs
    /help         these lines
    /quit         leave; so does the end of the input

At a terminal ECGs are drawn in Braille characters, and answers come word by word. --png D draws each ECG on paper
(25 mm/s, 10 mm/mV) as the model reads it, at its own sampling rate: D/ecg_1.png and so on. Several ECGs stand where
they came up, or at the markers <ecg> in your message. A message that begins with / is written with a blank before it.
A model of phase pretrain goes on with your line; an empty line asks for a text.

Input that is no terminal is read as a script: each answer is then one line, "assistant: ...". Errors are lines
on stderr, "error: ...", and the chat goes on. --config.eval.* says how answers are made, such as
--config.eval.max_new_tokens=64 or --config.eval.temperature=0.7. Where answers are drawn, --config.eval.seeds=7 draws
others.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING

from elm_jax import cli
from elm_jax.errors import UserError, nearest, one_line, printable, refused

if TYPE_CHECKING:
    import numpy as np

    from elm_jax.inference.session import Session

COMMANDS = ("/ecg", "/system", "/save", "/new", "/clear", "/help", "/quit")
assert __doc__ is not None
HELP = __doc__.split("\n\n")[3]


def main(argv: Sequence[str]) -> None:
    """Parse the arguments, load the run, talk until the input ends."""
    parser = cli.Parser("chat", description=__doc__)
    parser.add_argument("--checkpoint", metavar="W", required=True, help="the run's folder")
    parser.add_argument("--step", default="best", help="latest, best or a number")
    parser.add_argument("--ecg", metavar="F", action="append", default=[], help="begin with this ECG; may be repeated")
    parser.add_argument(
        "--sampling-rate", metavar="HZ", type=float, help="of .npy files that state none; default: the model's own rate"
    )
    parser.add_argument("--png", metavar="D", type=Path, help="a folder for pictures of the ECGs")
    parser.add_argument("--system", metavar="TEXT", help="a system prompt other than the run's: a text or a file")
    flags, options = parser.read(argv)
    from elm_jax.data.dataset import read_system_prompt
    from elm_jax.data.pages import is_image
    from elm_jax.data.specs import signal_spec
    from elm_jax.ecg.recording import LEAST_RATE, MOST_RATE
    from elm_jax.inference.model import TrainedModel
    from elm_jax.inference.session import Session, read_input
    from elm_jax.run.config import config_of_run
    from elm_jax.runtime.compilation import keep_compiled

    keep_compiled()
    config = config_of_run(options.checkpoint, flags)
    rate = options.sampling_rate
    if rate is not None and not LEAST_RATE <= rate <= MOST_RATE:
        expected = f"{LEAST_RATE:g} to {MOST_RATE:g} Hz"
        raise UserError("--sampling-rate", f"{rate:g}", expected, "give the rate of the file")
    spec = signal_spec(config.data, config.seed, compat=config.compat)
    waveforms = replace(spec, representation="signal", bare_rate=rate)
    for path in options.ecg:  # what cannot be read is said before the model is loaded, which is slow
        if not is_image(path):  # which the model itself reads
            read_input(path, waveforms)
    session = Session(TrainedModel(config, options.step), rate)
    if options.system is not None:
        session.instruct(read_system_prompt(options.system) or "")
    print(printable(_banner(session), "\n"), file=sys.stderr)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, TextIOWrapper):  # what is no text in the terminal's encoding is no reason to stop
            stream.reconfigure(errors="replace")
    talk(session, sys.stdin.isatty() and sys.stdout.isatty(), options.png, options.ecg)


def talk(session: "Session", is_terminal: bool, pictures: Path | None = None, ecgs: Sequence[str] = ()) -> None:
    """Show the ECGs, then obey and answer line after line; a user's mistake is a line on stderr."""
    chat = _Chat(session, is_terminal, pictures)
    for path in ecgs:
        chat.show(path)
    for line in _typed() if is_terminal else sys.stdin:
        try:
            if not chat.obey(line.rstrip("\r\n")):
                return
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            print("\nstopped; the question is not part of the conversation", file=sys.stderr, flush=True)


class _Chat:
    """What a line does. `pictures`: the folder for them, if there shall be any."""

    def __init__(self, session: "Session", is_terminal: bool, pictures: Path | None) -> None:
        self.session, self.is_terminal, self.pictures = session, is_terminal, pictures
        self.shown = 0  # ECGs, of cleared conversations too: no picture is written twice

    def obey(self, line: str) -> bool:
        """Do what one line says; False to leave."""
        if line.startswith("/"):
            name, _, argument = line.partition(" ")
            return self._command(name, argument.strip())
        if line.strip() or self.session.model.assembly.text.phase == "pretrain":
            self._answer(line.strip())
        return True

    def show(self, path: str) -> None:
        """Add an ECG to the conversation, and draw it."""
        ecg = self.session.add_ecg(path)
        self.shown += 1
        number = len(self.session.ecgs)
        print(f"ecg {number}: {one_line(ecg.summary)}", flush=True)
        if self.is_terminal and "utf" in (sys.stdout.encoding or "").lower():
            print("\n".join(self._drawn(ecg.recorded)), flush=True)
        if self.pictures is not None:
            print(printable(f"ecg {number}: drawn in {self._written(ecg.recorded)}"), flush=True)

    def _drawn(self, recorded: "np.ndarray") -> list[str]:
        from elm_jax.ecg.recording import LEADS
        from elm_jax.pictures.braille import in_characters

        return in_characters(recorded, LEADS, self.session.spec.sampling_rate, get_terminal_size().columns)

    def _written(self, recorded: "np.ndarray") -> Path:
        """The file of the picture. The ECG is part of the conversation already, even where it cannot be written."""
        from elm_jax.pictures.ecg_paper import draw_ecg

        assert self.pictures is not None
        path = self.pictures / f"ecg_{self.shown}.png"
        with refused("--png", "", "a folder that can be written", "name another", OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            draw_ecg(recorded, self.session.spec.sampling_rate, path)
        return path

    def _answer(self, text: str) -> None:
        pieces, shown, blind = [], False, not (self.session.ecgs or self.session.turns)
        for piece in self.session.spoken(text):
            pieces.append(piece)
            if self.is_terminal:
                print(("" if shown else "assistant: ") + printable(piece, "\n\t"), end="", flush=True)
                shown = True
        if blind:
            print("note: no ECG was shown: this is from the text alone", file=sys.stderr, flush=True)
        if self.session.shortened:
            room = f"the {self.session.room} tokens that a prompt may have"
            print(f"note: the conversation was shortened to {room}", file=sys.stderr, flush=True)
        if self.session.cut:
            left = f"the last {self.session.cut} tokens of ECGs, which found no room in its context"
            print(f"note: the model did not see {left}", file=sys.stderr, flush=True)
        if shown:
            print(flush=True)
        else:
            print(f"assistant: {one_line(''.join(pieces))}", flush=True)

    def _command(self, name: str, argument: str) -> bool:
        given = argument.strip("'\"")
        if name in ("/ecg", "/save") and not given:
            what = "name a file, demo:test:3, noise or flatline" if name == "/ecg" else "name a file"
            raise UserError(name, "no path", f"{name} PATH", what)
        if name == "/ecg":
            self.show(given)
        elif name == "/save":
            print(printable(f"saved in {' and '.join(map(str, self.session.save(given)))}"), flush=True)
        elif name == "/system":
            if argument:
                self.session.instruct(argument)
            print(f"system prompt: {one_line(self.session.system or 'none')}", flush=True)
        elif name == "/new":
            self.session.renew()
            print(f"a new conversation; ECGs: {len(self.session.ecgs)}", flush=True)
        elif name == "/clear":
            self.session.clear()
            print("cleared: no turns, no ECGs", flush=True)
        elif name == "/help":
            print(HELP, flush=True)
        elif name != "/quit":
            fix = nearest(name, COMMANDS) or "write a blank before a message that begins with /"
            raise UserError(name, "an unknown command", f"{', '.join(COMMANDS[:-1])} or {COMMANDS[-1]}", fix)
        return name != "/quit"


def _banner(session: "Session") -> str:
    model, options = session.model, session.model.config.eval
    drawn = f"drawn at temperature {options.temperature:g}" if options.temperature else "greedy"
    kind = "goes on with a text about the ECGs" if model.assembly.text.phase == "pretrain" else "answers questions"
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


if __name__ == "__main__":
    sys.exit(cli.guard(main))
