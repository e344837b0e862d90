"""Raw downloads to records: `runner` is the way, with a row of `DATASETS` for each dataset of recordings."""

from elm_jax.data.prepare.code15 import CODE15
from elm_jax.data.prepare.conversations import CONVERSATIONS
from elm_jax.data.prepare.echonext import ECHONEXT
from elm_jax.data.prepare.heed import HEED
from elm_jax.data.prepare.mimic_iv import MIMIC_IV
from elm_jax.data.prepare.physionet import CPSC, CSN, FOLDER, GEORGIA, LUDB, NINGBO, PTBDB
from elm_jax.data.prepare.ptb_xl import PTB_XL
from elm_jax.data.prepare.raw import LeftOut, RawDataset, RawRecording
from elm_jax.errors import UserError
from elm_jax.registry import Registry

# What `prepare` does with prepared recordings.
OTHERS = ("ecg_qa", "ecg_lm", "synthetic", "grounding", "check", "stats", "card", "push", *CONVERSATIONS)
DATASETS: Registry[RawDataset] = Registry(
    "DATASET",
    {
        "ptb_xl": PTB_XL,
        "mimic_iv": MIMIC_IV,
        "code15": CODE15,
        "csn": CSN,
        "cpsc": CPSC,
        "georgia": GEORGIA,
        "ningbo": NINGBO,
        "echonext": ECHONEXT,
        "heed": HEED,
        "ludb": LUDB,
        "ptbdb": PTBDB,
        "folder": FOLDER,
    },
)

__all__ = ["DATASETS", "LeftOut", "RawDataset", "RawRecording", "register_dataset"]


def register_dataset(name: str, dataset: RawDataset) -> None:
    """Let `prepare NAME` read a dataset; what it makes is called by the name.

    Raises:
        UserError: the name is no identifier, or one of the package's datasets.
    """
    if name in OTHERS or not name.isidentifier():
        raise UserError(f"DATASET {name!r}", "a name that is taken, or no identifier", "a name of its own", "rename it")
    DATASETS.register(name, dataset)
