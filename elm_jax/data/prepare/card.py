"""The card of what `prepare` left in a folder, and the folder's way to the Hugging Face hub."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elm_jax.data.prepare.about import ABOUT, About
from elm_jax.data.prepare.splits import SPLITS
from elm_jax.data.represent import FLATLINE, NOISE
from elm_jax.data.sources import ecg_paths
from elm_jax.errors import UserError, refused
from elm_jax.folders import read_json, write_atomic
from elm_jax.pictures.page import filled

CARD = "README.md"
ALL = "all_splits"  # what the Hub calls the rows of a table
# What is pushed of a folder, and nothing else that lies there: reports name the folders of who prepared it.
PUSHED = (CARD, "*.parquet", "*/preprocessed_*/*")
# On the Hub's side * stands for / as well: below lies what no card tells of, and nobody was asked about.
_DEEPER = ("*/*.parquet", "*/*/preprocessed_*/*", "*/preprocessed_*/*/*")
_LEFT_OUT = ("without_recording", "across_splits", "comparisons_not_wanted")  # of reports, questions by number
SYNTHETIC = "synthetic"
_MADE_HERE = (SYNTHETIC, "grounding")  # no source of its own, unless recordings were generated for it
_REPO = re.compile(r"[\w.-]+/[\w.-]+")
_COUNTS = ("rows", "tables", "kinds", "answers", "findings")  # of reports, which are no lists of recordings
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


@dataclass(frozen=True)
class Card:
    """What a card says. sources: what is known of each dataset that is in the folder; tables: rows by split."""

    text: str
    sources: Mapping[str, About | None]
    tables: Mapping[str, Counter[str]]


def make_card(out: Path, licences: Sequence[str] = ()) -> Card:
    """The card of a folder; `licences`: those of what is not published, as its owner says.

    Raises:
        UserError: there is no table, or a file cannot be read.
    """
    reports = {file: read_json(file) for file in sorted(out.glob("*_report.json")) if file.stem != "check_report"}
    tables, files, named = {}, {}, set[str]()
    for path in sorted(out.glob("*.parquet")):
        tables[path.name], files[path.name], datasets = _read(path)
        named |= datasets
    if not tables:
        raise UserError(out, "no .parquet file", "what prepare wrote", "prepare a dataset first, or correct the folder")
    made = [_made(file, report) for file, report in reports.items()]
    named |= {one["dataset"] for one in made if one["dataset"] not in _MADE_HERE or not named}
    named |= {place.parent.name for place in out.glob("*/preprocessed_*")}
    sources = {name: ABOUT.get(name) for name in sorted(named)}
    titles = [about.title if about else name for name, about in sources.items()]
    splits = [*(split for split in SPLITS if any(found[split] for found in tables.values()))]
    splits += sorted({split for found in tables.values() for split in found} - set(splits))
    asked = [name for name, table in files.items() if "text" in table.schema_arrow.names]
    asked = [name for name in asked if not name.endswith("_pretrain.parquet")]
    asked.sort(key=lambda name: not name.startswith(SYNTHETIC))
    text = filled(
        "dataset_card.md", header=_header(titles, sources, tables, files, licences), title=", ".join(titles),
        sources=sources, named=", ".join(licences), made=made, splits=splits, asked=asked, tables=tables, split=ALL,
        versions=sorted({report["made_by"] for report in reports.values() if "made_by" in report}),
    )  # fmt: skip
    return Card(text, sources, tables)


def write_card(out: Path, licences: Sequence[str] = ()) -> dict[str, Any]:
    """Write `make_card` into the folder; returns what it is about. Raises UserError."""
    card = make_card(out, licences)
    write_atomic(out / CARD, lambda file: file.write(card.text.encode()), lasting=True)
    return {"card": str(out / CARD), "datasets": ", ".join(card.sources), "tables": {
        name: dict(found) for name, found in card.tables.items()
    }}  # fmt: skip


def push(out: Path, repo: str, licences: Sequence[str] = (), public: bool = False, api: Any = None) -> dict[str, Any]:
    """Push what `prepare` left in a folder, with its card, to the dataset `repo` ("owner/name") of the Hub.

    What is there already, by its content, is not sent again. `licences`: those of data that are restricted or of
    which no licence is known, to push these too. api: a `huggingface_hub.HfApi`, for other hubs than the one of the
    environment (HF_ENDPOINT, HF_TOKEN).

    Raises:
        UserError: data would be given on whose licence is not among `licences`, a private dataset is public there, or
            the Hub cannot be reached or refuses.
    """
    import huggingface_hub

    if not _REPO.fullmatch(repo):
        raise UserError("OWNER/NAME", repo, "a dataset on the Hub, as jane/ecgs", "name its owner, too")
    card = make_card(out, licences)
    for name, about in card.sources.items():
        _check_licence(name, about, licences)
    told = write_card(out, licences)
    hub = api or huggingface_hub.HfApi()
    fix = "log in by `hf auth login`, see that the Hub can be reached, and push again: what is there is not sent again"
    with refused(f"hub, {repo}", "no way to push", "a dataset that can be written", fix, Exception):
        hub.create_repo(repo, repo_type="dataset", private=not public, exist_ok=True)
        if not public and not hub.repo_info(repo, repo_type="dataset").private:
            raise UserError(f"hub, {repo}", "a public dataset", "a private one", "name another, or give --public")
        commit = hub.upload_folder(
            repo_id=repo, folder_path=out, repo_type="dataset", allow_patterns=list(PUSHED),
            ignore_patterns=list(_DEEPER), commit_message="What elm_jax prepared",
        )  # fmt: skip
    return {**told, "pushed": str(commit.commit_url), "private": str(not public)}


def _check_licence(name: str, about: About | None, licences: Sequence[str]) -> None:
    """Raise UserError where a dataset may not be given on without its licence being named, and that is not."""
    licence = about.licence if about else ""
    if (licence and about and not about.restricted) or licence in licences or (not licence and licences):
        return
    why = about.restricted if about else "recordings of your own"
    found = f"{name}, {why}" if why else f"{name}, of which no licence is known"
    read = f"read the licence at {about.where}" if about else "see what its owner allows"
    fix = f'{read}, and give --licence "{licence or "ITS LICENCE"}"'
    raise UserError("--licence", found, "the name of the licence under which it is pushed", fix)


def _read(file: Path) -> tuple[Counter[str], Any, set[str]]:
    """Of a table the rows by split, the open file, and the datasets of its recordings."""
    import pyarrow.parquet as pq

    splits: Counter[str] = Counter()
    datasets: set[str] = set()
    with refused(file, "an unreadable table", "a table that prepare wrote", "prepare it again", Exception):
        table = pq.ParquetFile(file)
        columns = [name for name in ("ecg_path", "split") if name in table.schema_arrow.names]
        for batch in table.iter_batches(columns=columns):
            rows = batch.to_pydict()
            splits.update(map(str, rows.get("split", ["train"] * len(batch))))
            cells = rows.get("ecg_path", ())
            datasets.update(path.partition("/")[0] for cell in cells for path in ecg_paths(cell, file.name)[0])
        return splits, table, datasets - {NOISE, FLATLINE}


def _made(file: Path, report: Mapping[str, Any]) -> dict[str, Any]:
    """Of a report what the card says: by which command, of what, how many."""
    name = str(report.get("dataset", file.stem.removesuffix("_report")))
    lists = {kind: found for kind, found in report.items() if isinstance(found, dict)}
    return {
        "dataset": name,
        "command": report.get("command", ""),
        "recordings": report.get("records", report.get("recordings", "")),
        "patients": report.get("patients", ""),
        "amiss": [f"{kind} {len(found)}" for kind, found in lists.items() if found and kind not in _COUNTS]
        + [f"{kind} {report[kind]}" for kind in _LEFT_OUT if isinstance(report.get(kind), int) and report[kind]],
    }


def _header(
    titles: Sequence[str], sources: Mapping[str, About | None], tables: Mapping[str, Counter[str]],
    files: Mapping[str, Any], licences: Sequence[str],
) -> str:  # fmt: skip
    """The YAML of the card, by the Hub's own libraries."""
    import datasets
    from datasets.info import DatasetInfosDict
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCardData

    hubs = sorted({(about.hub if about else "") or "other" for about in sources.values()})
    rows = sum(found.total() for found in tables.values())
    others = {about.licence for about in sources.values() if about and not about.hub} | set(licences)
    data = DatasetCardData(
        pretty_name=", ".join(titles),
        license=hubs[0] if len(hubs) == 1 else hubs,
        license_name=(", ".join(sorted(filter(None, others))) or "not known") if "other" in hubs else None,
        size_categories=next((name for most, name in _SIZES if rows < most), "n>1M"),
        source_datasets=[f"extended|other-{name}" for name in sources],
        task_categories=["question-answering", "text-generation"],
        tags=["ecg", "electrocardiogram", "elm_jax"],
    )
    infos, configs = {}, {}
    for file, table in files.items():
        name, groups = Path(file).stem, range(table.num_row_groups)
        size = sum(table.metadata.row_group(group).total_byte_size for group in groups)
        splits = datasets.SplitDict({ALL: datasets.SplitInfo(ALL, size, tables[file].total())})
        features = datasets.Features.from_arrow_schema(table.schema_arrow)
        infos[name] = datasets.DatasetInfo(features=features, splits=splits)
        configs[name] = {"data_files": [{"split": ALL, "path": file}]}
    DatasetInfosDict(infos).to_dataset_card_data(data)
    MetadataConfigs(configs).to_dataset_card_data(data)
    return data.to_yaml()
