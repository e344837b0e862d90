"""Published conversations joined to prepared recordings; what is right in the reference's mappings is held to them."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elm_jax.data.prepare.conversations import prepare_conversations, recording_key
from elm_jax.errors import UserError

STEMS = {
    "ptb_xl": ["records500_00000_00021_hr_0", "records500_00000_00021_hr_1", "records500_09000_09195_hr_0"],
    "mimic_iv": ["files_p1000_p10000032_s40689238_40689238_0", "files_p1000_p10000032_s40689238_40689238_1"],
    "code15": ["270272_0"], "csn": ["JS20000_0"], "cpsc": ["A1980_0"], "mine": ["ward_7_x_0"],
}  # fmt: skip


def tree(root: Path, stems: Mapping[str, Sequence[str]] = STEMS, length: int = 2500) -> Path:
    for dataset, files in stems.items():
        folder = root / dataset / f"preprocessed_{length}"
        folder.mkdir(parents=True)
        for stem in files:
            (folder / f"{stem}.npy").touch()
    return root


def join(tmp_path: Path, items: Any, name: str = "items.json", **options: Any) -> tuple[list[dict[str, Any]], Any]:
    raw = tmp_path / name
    raw.parent.mkdir(parents=True, exist_ok=True)
    if raw.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(items), raw)
    else:
        raw.write_text(items if isinstance(items, str) else json.dumps(items))
    out = tmp_path / "table.parquet"
    given = tmp_path / Path(name).parts[0]
    report = prepare_conversations(given, tmp_path / "O", out, progress=False, **options)
    assert json.loads((tmp_path / "table_report.json").read_text()) == json.loads(json.dumps(report))
    return pq.read_table(out).to_pylist(), report


def say(question: str = "q", answer: str = "a") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("files/p1000/p10000032/s40689238/40689238", "MIMIC 40689238"),
        ("mimic_v4/p1000/p10000032/s40689238/40689238-0.png", "MIMIC 40689238"),
        ("files_p1000_p10000032_s40689238_40689238", "MIMIC 40689238"),
        ("/anywhere/mimic-iv/files/p1000/p10000032/s40689238/40689238.dat", "MIMIC 40689238"),
        ("ptb-xl/some/dir/00181_lr-2.png", "PTB-XL 00181"),
        ("records500/21000/21837_hr", "PTB-XL 21837"),
        ("code15/exams_part0/270272", "CODE-15 270272"),
        ("code15_v4/270272-5.png", "CODE-15 270272"),
        ("code15-test/270272-0.png", "CODE-15 270272"),
        ("x/y/JS20000-0.png", "JS 20000"),
        ("training/cpsc_2018/g1/A1980", "CPSC A1980"),
        ("georgia/g1/E00001", "Georgia E00001"),
        ("ptbxl/21.png", ""),
        ("whatever/x", ""),
        ("", ""),
    ],
)
def test_a_recording_is_known_by_its_number_wherever_it_stands(path: str, key: str) -> None:
    assert recording_key(path) == key


def test_every_form_of_the_published_sets_is_joined_and_the_rest_is_listed_with_its_reason(tmp_path: Path) -> None:
    tree(tmp_path / "O")
    items = [
        {"ecg": "files/p1000/p10000032/s40689238/40689238", "conversations": say()},
        {"image": "ptb-xl/00021_lr-0.png", "conversations": say(), "name": "own"},
        {"source": "CODE-15%", "objects": {"ecg": ["code15/x/270272", "another"]},
         "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "<ecg>q"},
                      {"role": "assistant", "content": "c"}]},
        {"ecg_path": "ward/7/x.hea", "text": ["single-verify", "Is it?", ["yes"]]},
        {"source": "Other", "objects": {"ecg": ["whatever/x"]}, "messages": say()},
        {"image": "ptb-xl/14310_hr-0.png", "conversations": say()},
        {"image": "ptb-xl/00021_hr-0.png", "conversations": []},
        {"image": "ptb-xl/00021_hr-0.png", "conversations": [{"who": "x"}]},
        "no item",
    ]  # fmt: skip
    rows, report = join(tmp_path, items)
    told = [(Path(row["ecg_path"]).name, row["name"]) for row in rows]
    assert told == [
        ("files_p1000_p10000032_s40689238_40689238_0.npy", ""), ("files_p1000_p10000032_s40689238_40689238_1.npy", ""),
        ("records500_00000_00021_hr_0.npy", "own"), ("records500_00000_00021_hr_1.npy", "own"),
        ("270272_0.npy", "CODE-15%"), ("ward_7_x_0.npy", ""),
    ]  # fmt: skip
    assert json.loads(rows[4]["text"]) == items[2]["messages"][1:]
    assert rows[0]["patient_id"] == "10000032" and rows[0]["ecg_path"].startswith("mimic_iv/preprocessed_2500/")
    missing = report["without_recording"]
    assert missing["items.json, item 5"] == "no dataset is known by 'whatever/x'"
    assert missing["items.json, item 6"] == "PTB-XL 14310 is not prepared"
    assert list(report["malformed"]) == [f"items.json, item {n}" for n in (7, 8, 9)]
    assert report["conversations"] == 4 and report["items"] == 9


def test_files_of_each_kind_are_read_and_folders_name_their_conversations(tmp_path: Path) -> None:
    tree(tmp_path / "O")
    item = {"image_path": "270272-0.png", "conversations": say()}
    table = [{"image_path": "a/JS20000-0.png", "conversations": say()}]
    (tmp_path / "bench" / "csn-test").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "bench" / "csn-test" / "train-0.parquet")
    line = '[21],"Is it?",yes,single-verify'
    (tmp_path / "bench" / "qa.csv").write_text(f"ecg_id,question,answer,question_type\n{line}\n")
    listed = {"image_path": "e/00021_hr-0.png", "conversations": [
        {"from": "human", "value": ["Is it ", "AF?"]}, {"from": "gpt", "value": ["a", "b"]}]}  # fmt: skip
    (tmp_path / "bench" / "ecgqa.jsonl").write_text(json.dumps(listed) + "\n\n")
    rows, report = join(tmp_path, [item], "bench/code15-test/test.json", split="official")
    found = {Path(row["ecg_path"]).name: (row["name"], row["split"]) for row in rows}
    assert found["270272_0.npy"] == ("code15-test", "test") and found["JS20000_0.npy"] == ("csn-test", "train")
    answers = [json.loads(row["text"])[1]["value"] for row in rows if "00021" in row["ecg_path"]]
    assert answers == ["a, b"] * 2 + ["yes"] * 2
    assert report["rows"] == {"train": 5, "val": 0, "test": 1} and not report["patients_in_several_splits"]


def test_patients_and_their_splits_are_those_of_the_prepared_tables(tmp_path: Path) -> None:
    tree(tmp_path / "O")
    known = [{"ecg_path": f"ptb_xl/preprocessed_2500/{stem}.npy", "patient_id": "p7", "split": "val"}
             for stem in STEMS["ptb_xl"]]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(known), tmp_path / "O" / "ptb_xl_reports.parquet")
    items = [{"image": f"ptb-xl/{number}_hr.png", "conversations": say()} for number in ("00021", "09195")]
    rows, report = join(tmp_path, items)
    assert {row["patient_id"] for row in rows} == {"p7"} and {row["split"] for row in rows} == {"val"}
    assert report["of unknown patients"] == 0
    rows, _ = join(tmp_path, items, split="patient", val=0.0, test=0.0)
    assert {row["patient_id"] for row in rows} == {"p7"} and {row["split"] for row in rows} == {"train"}


def test_a_table_of_its_own_names_no_patients_and_those_of_mimic_are_known_in_any_folder(tmp_path: Path) -> None:
    tree(tmp_path / "O", {"m": STEMS["mimic_iv"], "x": ["7_0"]})
    item = {"image": "files/p1000/p10000032/s40689238/40689238", "conversations": say()}
    paths = [f"m/preprocessed_2500/{stem}.npy" for stem in STEMS["mimic_iv"]]
    table = pa.table({"ecg_path": paths, "patient_id": ["wrong"] * 2, "split": ["test"] * 2})
    for own in ("x_records.parquet", "mine.parquet"):
        pq.write_table(table, tmp_path / "O" / own)
        (tmp_path / "raw.json").write_text(json.dumps([item]))
        report = prepare_conversations(tmp_path / "raw.json", tmp_path / "O", tmp_path / "O" / own, progress=False)
        rows = pq.read_table(tmp_path / "O" / own).to_pylist()
        assert {row["patient_id"] for row in rows} == {"10000032"} and report["of unknown patients"] == 0


def test_other_recordings_of_a_patient_follow_the_split_of_the_table(tmp_path: Path) -> None:
    stems = ["files_p1000_p10000032_s1_1_0", "files_p1000_p10000032_s2_2_0"]
    tree(tmp_path / "O", {"mimic_iv": stems})
    path = f"mimic_iv/preprocessed_2500/{stems[0]}.npy"
    table = pa.table({"ecg_path": [path], "patient_id": ["10000032"], "split": ["test"]})
    pq.write_table(table, tmp_path / "O" / "mimic_iv_questions.parquet")
    rows, _ = join(tmp_path, [{"image": "files/p1000/p10000032/s2/2", "conversations": say()}], val=0.0, test=0.0)
    assert [row["split"] for row in rows] == ["test"]


def test_a_conversation_about_several_recordings_has_them_all_and_is_left_out_across_splits(tmp_path: Path) -> None:
    tree(tmp_path / "O")
    where = "ptb_xl/preprocessed_2500/"
    paths = [f"{where}{stem}.npy" for stem in STEMS["ptb_xl"]]
    table = {"ecg_path": [*paths, "cpsc/preprocessed_2500/A1980_0.npy"], "patient_id": ["1", "1", "2", "3"],
             "split": ["train"] * 3 + ["val"]}  # fmt: skip
    pq.write_table(pa.table({key: table[key] for key in table}), tmp_path / "O" / "ptb_xl_records.parquet")
    pair = ["x/09195_hr", "x/00021_hr"]
    items = [
        {"ecg_path": pair, "conversations": say()},
        {"ecg_path": json.dumps(pair), "conversations": say()},
        {"ecg_id": [9195, 21], "question": "q", "answer": "a"},
        {"ecg_id": "[9195, 21]", "question": "q", "answer": "a"},
        {"ecg_path": ["x/00021_hr", "cpsc/A1980"], "conversations": say()},
        {"ecg_path": ["x/00021_hr", "x/00022_hr"], "conversations": say()},
        {"objects": {"ecg": ["x/00021_hr", "x/09195_hr"]}, "messages": say()},
    ]
    rows, report = join(tmp_path, items)
    assert len(rows) == 5 and {row["patient_id"] for row in rows} == {"1+2"}, "the shorter has one segment"
    expected = [f"{where}records500_{stem}_0.npy" for stem in ("09000_09195_hr", "00000_00021_hr")]
    assert [json.loads(row["ecg_path"]) for row in rows] == [expected] * 4 + [expected[::-1]]
    assert report["across_splits"] == 1 and report["patients"] == 2
    assert report["without_recording"] == {"items.json, item 6": "PTB-XL 00022 is not prepared"}


def test_recordings_are_found_by_their_paths_whatever_their_endings(tmp_path: Path) -> None:
    stems = ["a_b.csv_0", "c.edf_0", "c.csv_0", "ward_00021_hr.csv_0"]
    tree(tmp_path / "O", {"folder": stems, "georgia": ["E00001_0"], "ptb_xl": STEMS["ptb_xl"]})
    asked = ("a/b.csv", "a/b", "a/b.dat", "c.csv", "c", "ward/00021_hr.csv", "training/g1/E00001.mat")
    rows, report = join(tmp_path, [{"ecg": path, "conversations": say()} for path in asked])
    found = [Path(row["ecg_path"]).stem for row in rows]
    assert found == ["a_b.csv_0"] * 3 + ["c.csv_0", "ward_00021_hr.csv_0", "E00001_0"]
    assert list(report["without_recording"]) == ["items.json, item 5"], "which of the two is not said"


def test_a_prepared_segment_is_found_by_its_path_alone_and_what_datasets_share_by_the_one_that_is_named(
    tmp_path: Path,
) -> None:
    own = {"ludb": ["data_1_0", "data_1_1"], "folder": ["g1_E07500_0", "data_1_0", "7_0"], "ptbdb": ["7_0"]}
    tree(tmp_path / "O", {**own, "georgia": ["E07500_0", "E07500_1"], "cpsc": [f"A1986_{n}" for n in range(4)]})
    exact = ["ludb/preprocessed_2500/data_1_1.npy", "georgia/preprocessed_2500/E07500_0.npy",
             "cpsc/preprocessed_2500/A1986_1.npy", "folder/preprocessed_2500/g1_E07500_0.npy"]  # fmt: skip
    asked = [*exact, *(f"O/{path}" for path in exact), "x/E07500.mat", "folder/x/E07500", "7", "data/1"]
    rows, report = join(tmp_path, [{"ecg": path, "conversations": say()} for path in asked[:8]])
    assert [row["ecg_path"] for row in rows] == [*exact, *exact]
    rows, report = join(tmp_path, [{"ecg": path, "conversations": say()} for path in asked[8:]])
    georgia = [f"georgia/preprocessed_2500/E07500_{n}.npy" for n in range(2)]
    assert [row["ecg_path"] for row in rows] == [*georgia, exact[3]]
    assert report["ambiguous"] == {
        "items.json, item 3": "'7' may be of folder and ptbdb, and names none of them",
        "items.json, item 4": "'data/1' may be of folder and ludb, and names none of them",
    }


def test_json_in_a_column_is_what_it_stands_for(tmp_path: Path) -> None:
    tree(tmp_path / "O")
    told = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": ["Is it ", "AF?"]},
        {"from": "gpt", "value": ["a", "b"]},
    ]
    rows, _ = join(tmp_path, [{"ecg": "x/JS20000", "conversations": json.dumps(told)}], "items.parquet")
    assert json.loads(rows[0]["text"]) == say("Is it AF?", "a, b")
    with pytest.raises(UserError, match="an unreadable file .field larger than"):
        join(tmp_path, f"ecg,text\nJS20000,{'x' * 200_000}\n", "items.csv")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("{", "malformed JSON"),
        ("3", "a JSON int"),
        ("[]", "no conversation about a prepared recording among 0"),
        ('[{"ecg": "x", "text": "y"}]', "among 1 (items.json, item 1: no dataset is known by 'x')"),
    ],
)
def test_what_cannot_be_joined_is_one_error(tmp_path: Path, content: str, found: str) -> None:
    tree(tmp_path / "O")
    with pytest.raises(UserError) as error:
        join(tmp_path, content)
    assert found in str(error.value)


def test_segments_of_another_length_are_named(tmp_path: Path) -> None:
    tree(tmp_path / "O", length=1250)
    with pytest.raises(UserError, match="no segments of 2500 samples, but of 1250"):
        join(tmp_path, [])


# Items that only the reference leaves out: it counts the parts of a path, and an empty conversation is one for it.
OURS = {
    "pretrain_mimic": {"4", "5", "6"}, "ecg_instruct_45k": {"4", "5", "6"}, "ecg_grounding": {"6"},
}  # fmt: skip


SETS = ("pretrain_mimic", "ecg_instruct_45k", "ecg_instruct_pulse", "ecg_grounding", "ecg_qa_cot", "ecg_bench_pulse")


@pytest.mark.parametrize("name", SETS)
def test_the_reference_maps_the_same_recordings(tmp_path: Path, golden: Callable[[str], Path], name: str) -> None:
    cases = json.loads((golden("prep_mapping") / "cases.json").read_text())
    case = cases["maps"][name]
    whole = {
        dataset: [stem for stem in stems if f"{stem.rpartition('_')[0]}_0" in stems and not stem.endswith("_100")]
        for dataset, stems in cases["stems"].items()
    }
    tree(tmp_path / "O", whole, cases["segment_len"])
    inputs = case["inputs"]
    if isinstance(inputs, dict):
        for config, items in inputs.items():
            (tmp_path / "raw" / config).mkdir(parents=True)
            (tmp_path / "raw" / config / "data.json").write_text(json.dumps(items))
        prepare_conversations(tmp_path / "raw", tmp_path / "O", tmp_path / "t.parquet", 1250, progress=False)
        rows = pq.read_table(tmp_path / "t.parquet").to_pylist()
    else:
        own = [item for item in inputs if str(item.get("id")) not in OURS.get(name, ())]
        rows, _ = join(tmp_path, own, length=1250)
    wanted = [
        (Path(row["ecg_path"]).name, row["name"], row["text"])
        for row in case["output"]
        if Path(row["ecg_path"]).stem in sum(whole.values(), []) and row["text"]
    ]
    found = [(Path(row["ecg_path"]).name, row["name"], json.loads(row["text"])) for row in rows]
    if name == "ecg_bench_pulse":  # by folders in their order; answers in parts are joined with a comma
        found, wanted = sorted(found, key=str), sorted(wanted, key=str)
        assert [f[:2] for f in found] == [w[:2] for w in wanted]
        return
    assert found == wanted
