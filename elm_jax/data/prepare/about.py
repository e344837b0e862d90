"""What is known of a published dataset beside its files: its licence, where it is had, how much it is.

The pages in docs/data begin with these facts (`about_page`), and so do cards.
"""

from dataclasses import dataclass

from elm_jax.pictures.page import filled

# Of `prepare` by its defaults: processor ms of a recording of 10 s, KB of its window as .npy and in shards
# (scripts/bench_prepare.py, docs/benchmarks.md), and ms of a published conversation of 300 characters.
MS_A_RECORDING, KB_NPY, KB_SHARDS, MS_A_CONVERSATION = 15, 240.6, 35.0, 0.07
WINDOW = 10  # s


@dataclass(frozen=True)
class About:
    """A published dataset.

    title, with the version that was read. licence: as its source names it; "" where that was not found. hub: the
    identifier that the Hugging Face hub has for it, "" where it has none. where: the page it is had from. recordings,
    patients: how many, 0 where it brings none of its own or nobody says. seconds, rate: of a recording, by far the
    most; rate in Hz. restricted: why it is given on to nobody without thought; "" where anybody may.
    """

    title: str
    licence: str
    hub: str
    where: str
    recordings: int = 0
    patients: int = 0
    seconds: float = 10
    rate: float = 500
    restricted: str = ""


_CC_BY, _ODC_BY, _ODBL = ("CC BY 4.0", "cc-by-4.0"), ("ODC-By 1.0", "odc-by"), ("ODbL 1.0", "odbl")
_PHYSIONET = "https://physionet.org/content"
_OF_MIMIC = "of patients of MIMIC-IV, whose own records are had with credentials alone"
_AGREED = "had by agreement, with credentials alone"
ABOUT: dict[str, About] = {
    "ptb_xl": About("PTB-XL 1.0.3", *_CC_BY, f"{_PHYSIONET}/ptb-xl/", 21_799, 18_869),
    "mimic_iv": About(
        "MIMIC-IV-ECG 1.0", *_ODBL, f"{_PHYSIONET}/mimic-iv-ecg/", 800_035, 161_352, restricted=_OF_MIMIC
    ),
    "code15": About("CODE-15%", *_CC_BY, "https://zenodo.org/records/4916206", 345_779, 233_770, rate=400),
    "csn": About("Chapman-Shaoxing-Ningbo 1.0.0", *_CC_BY, f"{_PHYSIONET}/ecg-arrhythmia/", 45_152, 45_152),
    "cpsc": About("CPSC 2018, as in the challenge of 2020", *_CC_BY, f"{_PHYSIONET}/challenge-2020/", 10_330),
    "georgia": About("Georgia 12-lead, of the challenge of 2020", *_CC_BY, f"{_PHYSIONET}/challenge-2020/", 10_344),
    "ningbo": About("Ningbo, of the challenge of 2021", *_CC_BY, f"{_PHYSIONET}/challenge-2021/", 34_905),
    "echonext": About(
        "EchoNext 1.1.1", "restricted, by agreement", "", f"{_PHYSIONET}/echonext/", 100_000, rate=250,
        restricted=_AGREED,
    ),
    "heed": About(
        "Harvard-Emory ECG database 5.0", "restricted, by agreement", "", "https://bdsp.io/content/heedb/", 10_000_000,
        restricted=_AGREED,
    ),
    "ludb": About("LUDB 1.0.1", *_ODC_BY, f"{_PHYSIONET}/ludb/", 200, 200),
    "ptbdb": About("PTB-DB 1.0.0", *_ODC_BY, f"{_PHYSIONET}/ptbdb/", 549, 290, seconds=115, rate=1000),
    "ecg_qa": About("ECG-QA", *_CC_BY, "https://github.com/Jwoo5/ecg-qa"),
    "ecg_lm": About("Instruction pairs of PTB-XL+ 1.0.1", *_CC_BY, f"{_PHYSIONET}/ptb-xl-plus/"),
    "pretrain_mimic": About(
        "ECG-Chat's reports of MIMIC-IV-ECG", "", "", "https://github.com/YubaoZhao/ECG-Chat", restricted=_OF_MIMIC
    ),
    "ecg_instruct_45k": About(
        "ECG-Instruct-45k", "", "", "https://github.com/YubaoZhao/ECG-Chat", restricted=_OF_MIMIC
    ),
    "ecg_instruct_pulse": About(
        "ECGInstruct", "", "", "https://huggingface.co/datasets/PULSE-ECG/ECGInstruct", restricted=_OF_MIMIC
    ),
    "ecg_bench_pulse": About("ECGBench", "", "", "https://huggingface.co/datasets/PULSE-ECG/ECGBench"),
    "ecg_grounding": About(
        "ECG-Grounding", "", "", "https://huggingface.co/datasets/LANSG/ECG-Grounding", restricted=_OF_MIMIC
    ),
    "ecg_protocol_cot": About(
        "ECG-Protocol-Guided-Grounding-CoT", "", "",
        "https://huggingface.co/datasets/PKUDigitalHealth/ECG-Protocol-Guided-Grounding-CoT", restricted=_OF_MIMIC,
    ),
    "ecg_qa_cot": About("ECG-QA-CoT", "", "", "https://github.com/StanfordBDHG/OpenTSLM"),
    "ecg_reasoning_benchmark": About(
        "ECG-Reasoning-Benchmark", "", "", "https://huggingface.co/datasets/Jwoo5/ECG-Reasoning-Benchmark",
        restricted=_OF_MIMIC,
    ),
}  # fmt: skip


def about_page(name: str, holds: str) -> str:
    """How the page docs/data/<name>.md begins; `holds`: what the folder or file of --raw has."""
    about = ABOUT[name]
    windows = about.recordings * max(int(about.seconds // WINDOW), 1)
    ms = MS_A_RECORDING if about.recordings else MS_A_CONVERSATION
    number = about.recordings * about.seconds / WINDOW if about.recordings else 1_000_000
    return filled(
        "dataset_page.md", name=name, about=about, holds=holds, minutes=number * ms / 60_000, ms=ms,
        windows=windows, kilobytes={"npy": KB_NPY, "shards": KB_SHARDS},
    )  # fmt: skip
