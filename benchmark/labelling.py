"""Labels of protocols that were stored before labels were: read again from data that lies on this machine."""

from __future__ import annotations

from moebench.datasets import DATASETS, load_dataset
from moebench.errors import UsageError
from moebench.schema import ProtocolRecord
from moebench.store import Store

BUNDLED = ("digits",)


def fill_labels(store: Store) -> tuple[list[ProtocolRecord], dict[str, str]]:
    """Tells a store the labels that it lacks, where the data is bundled or a file; nothing is downloaded.

    Returns: the protocols that have labels now, and by data set why those of others stay unknown.
    """
    filled: list[ProtocolRecord] = []
    missing: dict[str, str] = {}
    for protocol in store.unlabelled():
        kind = protocol.dataset.partition(":")[0]
        if kind not in DATASETS or (kind not in BUNDLED and DATASETS.get(kind).argument is None):
            missing[protocol.dataset] = "the next evaluation on it tells them"
            continue
        try:
            data = load_dataset(protocol.dataset, split=protocol.split, n=protocol.n)
        except UsageError as error:
            missing[protocol.dataset] = str(error)
            continue
        if data.sha256 != protocol.data_sha256:
            missing[protocol.dataset] = "it holds other samples now"
            continue
        store.tell_labels(protocol, data.labels)
        filled.append(protocol)
    return filled, missing
