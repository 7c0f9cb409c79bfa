"""Numbers the contexts of documents: authors, products or domains."""

from collections.abc import Sequence

from data_pipelines.errors import InputError
from data_pipelines.prepare.drafts import Draft
from data_pipelines.store.manifest import MAX_CONTEXTS


def context_names(drafts: Sequence[Draft], key: str) -> list[str]:
    """Returns the contexts of training documents, sorted; others are unknown.

    Raises:
        InputError: there are none, or too many.
    """
    names = set()
    for draft in drafts:
        if draft.part.split == "train":
            names.update(draft.contexts())
    names.discard("")
    if not names:
        raise InputError(f"--context_key={key}: no training document has a value there")
    if len(names) > MAX_CONTEXTS:
        raise InputError(
            f"--context_key={key} has {len(names):,} different values in training documents, more "
            f"than {MAX_CONTEXTS:,}: choose a column with fewer"
        )
    return sorted(names)
