"""Raw downloads to records: `runner` is the way, with a row of `DATASETS` for each dataset of recordings."""

from elm_jax.data.prepare.conversations import CONVERSATIONS
from elm_jax.data.prepare.ptb_xl import PTB_XL
from elm_jax.data.prepare.runner import RawDataset, RawRecording
from elm_jax.errors import UserError
from elm_jax.registry import Registry

OTHERS = ("ecg_qa", *CONVERSATIONS)  # what `prepare` makes of prepared recordings
DATASETS: Registry[RawDataset] = Registry("DATASET", {"ptb_xl": PTB_XL})

__all__ = ["DATASETS", "RawDataset", "RawRecording", "register_dataset"]


def register_dataset(name: str, dataset: RawDataset) -> None:
    """Let `prepare NAME` read a dataset; what it makes is called by the name.

    Raises:
        UserError: the name is no identifier, or one of the package's datasets.
    """
    if name in OTHERS or not name.isidentifier():
        raise UserError(f"DATASET {name!r}", "a name that is taken, or no identifier", "a name of its own", "rename it")
    DATASETS.register(name, dataset)
