"""From the path in a record to what a model is given of the ECG: an array, an image, or tokens."""

import contextlib
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import xxhash

from elm_jax import compat as behaviours
from elm_jax import stopping
from elm_jax.data.batch import ArraySpec, Layout, Shown, Signal
from elm_jax.data.confined import is_inside, is_still_inside, mended
from elm_jax.data.ecg_ids import EcgIds
from elm_jax.data.ecg_tokens import EcgTokens
from elm_jax.data.kept_features import Features
from elm_jax.data.pages import NOTHING, Paper, Read, image_layout, is_image, read_image
from elm_jax.data.retrieving import Retrieving, Sought
from elm_jax.data.shown import Views
from elm_jax.ecg import shards
from elm_jax.ecg.augment import augment_ecg, augment_image, noise_ecg
from elm_jax.ecg.images import Processing, process, stacked
from elm_jax.ecg.rasterize import DPI
from elm_jax.ecg.recording import LEADS, in_slots, min_max, normalize, read_ecg, to_segment
from elm_jax.ecg.wear import worn
from elm_jax.ecg.wfdb_record import files_of, header_of
from elm_jax.elms import said
from elm_jax.errors import UserError
from elm_jax.symbols.coder import EcgByte
from elm_jax.text.turns import Words

SIGNALS = 2  # version of what recordings become: goes up when the same file and settings give another signal
NOISE, FLATLINE, DEMO = *NOTHING, "demo:"
SHORTEST = 1.0  # s of a signal, where a view takes signals of any length
PLAIN_PAPER, ALL_VIEWS = Paper(), Views({})


@dataclass(frozen=True)
class SignalSpec:
    """All that decides what becomes of an ECG path, by `representation`:

    signal: the leads (C, L) float32, scaled to [0, 1], or as `normalize` says. With `some_leads` a recording may have
        fewer of both, and it is a dict that says which leads are there, and how many samples (`in_slots`).
    stacked_signal: those as the grey levels of an image of C x L pixels; rgb: the leads on ECG paper. Both are then
        resized as `processing` says: (H, W, 3) uint8, or patches with their mask and grid shape (see `images`).
        What `paper` says of pages decides their layout, and whether an image that lies in its folder stands instead.
    symbolic: the ids (n,) int32 that `tokens` has for it in the language model, or `ids` for an encoder.

    With `features` it is instead what a frozen encoder has made of these: (N, E).

    That is the view called `view`; `further` are other views of the same recording, of which only what is said of
    their representation counts, `texts` what others write of it, `retrieval` what the view `retrieved` does. `shown`
    says which of them an ECG has.

    Paths are relative to `root`, or begin with one of `prefixes`, in whose place there is a folder; they lie in it
    unless `outside_root`. `leads` are indices into the canonical order, `length` L samples at `sampling_rate` Hz, at
    which a file that states no rate is taken to be unless `bare_rate` says another. `augment_*` hold where an epoch is
    given.
    """

    root: str
    leads: tuple[int, ...]
    length: int
    sampling_rate: float
    norm_eps: float
    perturb: str | None
    seed: int
    representation: str = "signal"
    processing: Processing | None = None
    tokens: EcgTokens | None = None
    augment_ecg: bool = False
    augment_rgb: bool = False
    dpi: int = DPI  # of the paper
    compat: tuple[str, ...] = ()  # of the reference's ways to read a recording
    features: Features | None = None
    outside_root: bool = field(default=False, repr=False)  # changes nothing of what is read
    prefixes: Mapping[str, str] = field(default_factory=dict, repr=False)
    bare_rate: float | None = field(default=None, repr=False)
    ids: EcgIds | None = field(default=None, repr=False)  # as the next, younger than what is kept by this
    normalize: str = field(default="minmax", repr=False)
    view: str = field(default="ecg", repr=False)
    some_leads: bool = field(default=False, repr=False)  # as its encoder says, which is named beside it
    further: Mapping[str, "SignalSpec"] = field(default_factory=dict, repr=False)
    texts: Mapping[str, Callable[..., str]] = field(default_factory=dict, repr=False)
    retrieval: Retrieving | None = field(default=None, repr=False)
    paper: Paper = field(default=PLAIN_PAPER, repr=False)
    shown: Views = field(default=ALL_VIEWS, repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        """(C, L)."""
        return len(self.leads), self.length

    @property
    def names(self) -> tuple[str, ...]:
        """Of the leads, in their order."""
        return tuple(LEADS[i] for i in self.leads)

    @property
    def views(self) -> dict[str, "SignalSpec"]:
        return {self.view: self, **self.further}

    @property
    def ecg_byte(self) -> EcgByte | None:
        """What makes ECGs ids or tokens, where one of the views has such."""
        return next((by.coder for spec in self.views.values() if (by := spec.ids or spec.tokens)), None)

    @property
    def layout(self) -> dict[str, Layout]:
        """By view, the shapes and dtypes of what a batch holds; symbols are held by its tokens."""
        return {view: spec.own_layout for view, spec in self.views.items() if spec.tokens is None}

    @property
    def own_layout(self) -> Layout:
        """The shapes and dtypes of what `load` returns."""
        if self.features is not None:
            return self.features.layout
        if self.ids is not None:
            return ArraySpec((self.ids.length,), np.int32)
        if self.some_leads:
            rows = ArraySpec(self.shape[:1], np.int32)
            return {"signal": ArraySpec(self.shape), "leads": rows, "samples": ArraySpec((), np.int32)}
        return ArraySpec(self.shape) if self.processing is None else image_layout(self.processing)

    @property
    def changes(self) -> bool:
        """Whether training shows an ECG otherwise from epoch to epoch."""
        return self.augment_ecg or self.augment_rgb or self.paper.worn or self.shown.vary

    def show(self, path: str, key: int, epoch: int | None = None) -> Shown:
        """The ECG at `path` in every view that it has; it is read once. See `load`.

        Raises UserError where it has none, or lacks one that it must have.
        """
        if not self.further:
            return {self.view: self.load(path, key, epoch)}
        read, shown = self._read(path, key), {}
        for view, spec in self.views.items():
            lacking = spec._lacking(path, read)
            if view in self.shown.left_out or (lacking is not None and self.shown.missing == "mask"):
                continue
            if lacking is not None:
                raise lacking
            shown[view] = spec._shown(read, epoch)
        if not shown:
            fix = "leave it out, or fewer views with data.left_out"
            raise UserError(f"ecg_path {path}", "an ECG of which nothing is shown", "one view at least", fix)
        drawn = None if epoch is None or read.unreal else _generator(self.seed, epoch, read.path, b"views")
        return self.shown.chosen(shown, drawn)

    def _lacking(self, path: str, read: Read) -> UserError | None:
        """What is wrong where the ECG at `path` has not what this view shows."""
        if self.representation != "rgb" and is_image(path):
            found, fix = "an image, of which there is no signal", "set --config.data.missing=mask, or leave it out"
            return UserError(f"ecg_path {path}", found, f"a recording, for view {self.view}", fix)
        drawn = path in NOTHING or self.paper.folder is None or self.shown.missing == "draw"
        # A control has no image of its own, and stands for one that there is.
        if self.representation == "rgb" and read.image is None and not drawn and self._image_file(path) is None:
            found, expected = "no image of it", f"{path}.png or .jpg in data.images={self.paper.folder}"
            fix = "add it, or set --config.data.missing=draw, or mask where the model has other views"
            return UserError(f"ecg_path {path}", found, expected, fix)
        return None

    @property
    def writes(self) -> bool:
        """Whether views write text of an ECG."""
        return bool(self.texts) or self.retrieval is not None

    def words(self, path: str, key: int, sought: Sought | None = None) -> Words:
        """What views write of the ECG at `path`, a line each, and of what is retrieved for it, or for another that is
        `sought`. Raises UserError as `load`."""
        leads, names = self._leads(path, key) if self.texts else (np.zeros(0), ())
        behind = "".join(f"{said(text, leads, self.sampling_rate, names)}\n" for text in self.texts.values())
        found = self.retrieval.words(sought or self.sought(path, key)) if self.retrieval else Words()
        return Words(behind + found.behind, found.system)

    def sought(self, path: str, key: int, about: frozenset[str] = frozenset()) -> Sought:
        """The ECG at `path`, as it is shown, for which others are retrieved."""
        told = self.names_of(path, key)[1], self.perturb, self.seed if self.perturb else 0, self.leads, sorted(about)
        name = xxhash.xxh3_64_intdigest(repr(told).encode())
        return Sought(path, about, name, lambda: self._leads(path, key)[0])

    def _leads(self, path: str, key: int) -> tuple[np.ndarray, tuple[str, ...]]:
        """What is measured of an ECG: its leads (C, L), and their names."""
        _, leads, names, _ = self._read(path, key)
        if leads is None:
            found = "an image, in which nothing is measured"
            raise UserError(f"ecg_path {path}", found, "a recording", "leave it out, or choose another elm")
        return leads, names

    def load(self, path: str, key: int, epoch: int | None = None) -> Signal:
        """The ECG at `path` as the model sees it in the first view.

        The paths "noise" and "flatline" stand for signals without a recording: standard normal samples drawn from
        `key`, and a constant; `perturb` puts the same in place of any recording, drawn from the seed and the path.
        Paths that begin with "demo:" are generated. Augmentation is drawn from the seed, `epoch` and the path, and
        leaves what is no recording alone.
        Raises UserError for a recording that cannot be read or is too short.
        """
        if self.features is not None:
            return self._kept(path, key)
        read = self._read(path, key)
        if (lacking := self._lacking(path, read)) is not None:
            raise lacking
        return self._shown(read, epoch)

    def _read(self, path: str, key: int) -> Read:
        """What is at a path, or what `perturb` puts there: leads before normalisation, and an image of them."""
        if self.perturb == "noise" and path not in (NOISE, FLATLINE):
            key = zlib.crc32(path.encode(), self.seed)  # all that is asked of a recording is asked of one noise
        path = {"zeros": FLATLINE, "noise": NOISE}.get(self.perturb or "", path)
        image = None if (file := self._image_file(path)) is None else read_image(file)
        if is_image(path):
            return Read(path, None, (), image)
        raw, names = self.recorded(path, key)
        if names == self.names:
            return Read(path, raw, names, image)
        chosen = tuple(name for name in self.names if name in names)
        if not chosen:
            expected = f"one of {', '.join(self.names)}"
            raise UserError(self._place(path)[1], f"leads {', '.join(names)}", expected, "leave it out")
        return Read(path, raw[[names.index(name) for name in chosen]], chosen, image)

    def _shown(self, read: Read, epoch: int | None) -> Signal:
        """What becomes of what was read."""
        drawn = None if epoch is None or read.unreal else _generator(self.seed, epoch, read.path)
        raw, names = read.leads, read.names
        if raw is not None and drawn is not None and self.augment_ecg:
            raw = augment_ecg(raw, drawn)
        if self.representation == "rgb" and read.image is not None:
            return self._image(read.image, drawn)
        assert raw is not None, "it lacks what is shown"
        if self.representation == "rgb":
            return self._image(self.paper.draw(raw, self.sampling_rate, names, self.dpi), drawn)
        if self.representation == "stacked_signal":
            return self._image(stacked(min_max(raw, self.norm_eps)), drawn)
        if coder := self.ids or self.tokens:
            return coder.encode(raw, self.norm_eps)
        signal = normalize(raw, self.norm_eps, self.normalize)
        return in_slots(signal, names, self.names, self.length) if self.some_leads else signal

    def _image_file(self, path: str) -> str | None:
        """The image of the ECG at `path`, where one is given. Raises UserError where it lies outside its folder."""
        if path in NOTHING or all(spec.representation != "rgb" for spec in self.views.values()):
            return None
        if is_image(path):
            return str(self._files(path)[0])
        file = self.paper.image_of(path)
        if file is not None:
            self._confine(path, file, str(self.paper.folder))
        return file

    def names_of(self, path: str, key: int) -> tuple[str, str]:
        """What an encoder's output for the ECG at `path` is kept as, and what it is asked for by.

        Both change with the file. The first, which counts when a run starts, changes with all that happens to it; the
        second does not with what leaves it as it is: its mode, its links.
        """
        drawn = path == NOISE or (path == FLATLINE and self.perturb == "noise")
        stamp = [] if drawn else self.stamp(path, kept=True)
        return f"{path}:{key if drawn else stamp}", f"{path}:{key if drawn else [times[:2] for times in stamp]}"

    def _kept(self, path: str, key: int) -> Signal:
        assert self.features is not None
        kept = self.features.load(self.features.names.get(self.names_of(path, key)[1], ""))
        if kept is None:
            replace(self, features=None).load(path, key)  # says what is wrong with it
            found = "a recording that has changed since the encoder read it"
            raise UserError(self._place(path)[1], found, "the file as it was", "start the run again")
        return kept

    def stamp(self, path: str, kept: bool = False) -> list[tuple[int, ...]]:
        """Size and time of the file at `path`, of a WFDB record of all its files; nothing for what is no file.

        kept: for what is kept on this machine, with the time of the last change of any kind, which nobody can set.
        """
        found = []
        with contextlib.suppress(UserError):
            for file in dict.fromkeys((*self._files(path), *filter(None, [self._image_file(path)]))):
                with contextlib.suppress(OSError, ValueError):  # no file, or what none can be called
                    stat = os.stat(file)
                    found.append((stat.st_size, stat.st_mtime_ns, *([stat.st_ctime_ns] if kept else [])))
        return found

    def look_for(self, path: str) -> None:
        """Raise UserError where the ECG at `path` is a file that is not there, or that may not be read."""
        if path in (NOISE, FLATLINE) or path.startswith(DEMO) or self.perturb in ("noise", "zeros"):
            return
        file = self._files(path)[0]
        if not os.path.isfile(file):
            shards.check_index(*os.path.split(file))
            expected = "a recording: a .npy file, a WFDB record with its .hea, or another format of docs/records.md"
            raise UserError(str(file), "no file", expected, mended(path, self.root) or "check the path (and data.root)")

    def _place(self, path: str) -> tuple[str, str]:
        """(the folder in which the ECG at `path` has to lie, its file)."""
        prefix = max((prefix for prefix in self.prefixes if path.startswith(prefix)), key=len, default="")
        folder = self.prefixes.get(prefix, self.root)
        return folder, os.path.join(folder, path.removeprefix(prefix).lstrip("/") if prefix else path)

    def _files(self, path: str) -> Sequence[str | Path]:
        """The files of the ECG at `path`: of a WFDB record its header first, and those that this names; of others the
        shard that they are in, if any.

        Raises UserError where one lies outside its folder, links followed, and `outside_root` does not allow that.
        """
        folder, whole = self._place(path)
        self._confine(path, whole, folder)
        if whole.endswith(".npy"):  # thousands a second: a Path costs as much as the rest
            if (place := shards.find(whole)) is None:
                return [whole]
            for file in (place.shard, os.path.join(os.path.dirname(whole), shards.INDEX)):
                if not self.outside_root and not is_still_inside(file, folder, os.getcwd()):
                    self._confine(path, file, folder)
            return [place.shard]
        file = Path(whole)
        header = header_of(file) if file.name else file
        if not os.path.isfile(header):
            return [whole]
        self._confine(path, str(header), folder)
        files = files_of(header)
        for named in files:
            self._confine(path, str(named), folder)
        return files

    def _confine(self, path: str, file: str, folder: str) -> None:
        if not self.outside_root and not is_inside(file, folder):
            fix = "set data.root to a folder with all recordings, or --config.data.outside_root=true for data you trust"
            found = f"{file}, which lies or leads outside {'data.root' if folder == self.root else folder}"
            absent = not os.path.exists(file) and not os.path.exists(f"{file}.hea")
            fix = (absent and mended(path, self.root)) or fix
            raise UserError(f"ecg_path {path}", found, f"files in {folder}", fix)

    def load_raw(self, path: str, key: int) -> np.ndarray:
        """The 12 leads (12, L) before normalisation: in mV where the recording is, zeros where it has no more. See
        `load`."""
        raw, names = self.recorded(path, key)
        return raw if raw.shape == (len(LEADS), self.length) else in_slots(raw, names, LEADS, self.length)["signal"]

    def recorded(self, path: str, key: int) -> tuple[np.ndarray, tuple[str, ...]]:
        """Leads (C, L) before normalisation, and their names: all, and `length` samples, where a view needs them."""
        if path == FLATLINE:
            return np.zeros((len(LEADS), self.length), np.float32), LEADS
        if path == NOISE:
            seed = np.array([key % 2**64, zlib.crc32(b"noise")], dtype=np.uint64)
            return noise_ecg((len(LEADS), self.length), np.random.Generator(np.random.Philox(key=seed))), LEADS
        if path.startswith(DEMO):
            from elm_jax.data.demo import load_demo_ecg

            return load_demo_ecg(path, self.sampling_rate, self.length), LEADS
        with stopping.reading(path):
            self._files(path)  # all of them may be read
            return self._from_file(self._place(path)[1])

    @property
    def takes_some(self) -> bool:
        """Whether every view takes recordings with some of the leads, and short ones; what is retrieved is found by all
        twelve."""
        return self.retrieval is None and all(spec.some_leads for spec in self.views.values())

    def _from_file(self, path: str) -> tuple[np.ndarray, tuple[str, ...]]:
        order = LEADS if behaviours.enabled("lead_order", self.compat) else None
        some, bare_rate = self.takes_some, self.bare_rate or self.sampling_rate
        recording = read_ecg(path, order, bare_rate=bare_rate, some_leads=some)
        least = round(SHORTEST * self.sampling_rate) if some else None
        try:
            return to_segment(recording, self.sampling_rate, self.length, self.compat, least), recording.leads
        except UserError as error:
            raise UserError(path, error.found, error.expected, error.fix) from None

    def _image(self, image: np.ndarray, drawn: np.random.Generator | None) -> Signal:
        assert self.processing is not None
        if drawn is not None and self.paper.worn and self.representation == "rgb":
            image = worn(image, drawn)
        if drawn is not None and self.augment_rgb:
            image = augment_image(image, drawn)
        return process(image, self.processing)


def _generator(seed: int, epoch: int, path: str, what: bytes = b"augment") -> np.random.Generator:
    key = np.array([zlib.crc32(path.encode()) << 32 | epoch, seed << 32 | zlib.crc32(what)], np.uint64)
    return np.random.Generator(np.random.Philox(key=key))
