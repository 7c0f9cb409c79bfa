"""Combines unlabelled text of one source with labelled documents of another."""

from collections.abc import Iterator

from data_pipelines.errors import InputError, raise_if
from data_pipelines.sources.registry import open_source
from data_pipelines.sources.source import BadExample, Example, Source, label_sets_of

TRAINING = ("train", "unsupervised")
LABELLED = ("train", "validation", "test")


class Combined:
    """Pretraining text of one source, labelled splits of another; see `Source`.

    As in Dai & Le 2015, section 4.2. Unlabelled ids and part names begin with "unlabelled/". The
    validation split, also that of pretraining, is the labelled source's.

    Args:
        unlabelled: its splits train and unsupervised become `unsupervised`, without labels.
        labelled: gives train, validation and test.

    Raises:
        InputError: the labelled source has no labels or no training split, or the unlabelled one
            has no training text.
    """

    def __init__(self, unlabelled: Source, labelled: Source) -> None:
        self._texts = unlabelled
        self._labelled = labelled
        faults = []
        if not labelled.class_names or "train" not in labelled.splits:
            faults.append(f"--labelled={labelled.name} has no labelled training documents")
        if not set(TRAINING) & set(unlabelled.splits):
            faults.append(f"--unlabelled={unlabelled.name} has no training text")
        raise_if(faults)
        self.name = f"{unlabelled.name} + {labelled.name}"
        self.class_names = labelled.class_names
        self.label_sets = label_sets_of(labelled)
        self.splits = (*(s for s in LABELLED if s in labelled.splits), "unsupervised")
        read = " and ".join(s for s in TRAINING if s in unlabelled.splits)
        self.note = (
            f"unsupervised is {read} of {unlabelled.name}; train, validation and test, also the "
            f"validation of pretraining, are those of {labelled.name} ({unlabelled.note}; "
            f"{labelled.note})"
        )

    def parts(self, split: str) -> list[str]:
        """Returns the labelled source's parts; unlabelled ones as "unlabelled/SPLIT/PART"."""
        if split != "unsupervised":
            return self._labelled.parts(split)
        return [
            f"unlabelled/{origin}/{part}"
            for origin in TRAINING
            if origin in self._texts.splits
            for part in self._texts.parts(origin)
        ]

    def examples(self, split: str, part: str) -> Iterator[Example | BadExample]:
        """Yields a part's documents in its source's order."""
        if split != "unsupervised":
            yield from self._labelled.examples(split, part)
            return
        _, origin, part = part.split("/", 2)
        for example in self._texts.examples(origin, part):
            if isinstance(example, Example):
                example = Example(f"unlabelled/{example.id}", example.text, None)
            yield example


def open_combined(
    unlabelled: str,
    labelled: str,
    data_dir: str | None = None,
    unlabelled_text_key: str = "",
    **options: object,
) -> Combined:
    """Opens the sources of --unlabelled and --labelled.

    Args:
        unlabelled, labelled: specs of `open_source`; labels of the first are not looked for.
        data_dir: for both; see `SourceOptions`.
        unlabelled_text_key: the `text_key` of the unlabelled source.
        **options: the other fields of `SourceOptions`, for the labelled source.

    Raises:
        InputError: one of them cannot be opened or does not fit; all faults of both.
    """
    own = {"with_labels": False, "text_key": unlabelled_text_key}
    sources, faults = [], []
    for flag, spec, keys in (("unlabelled", unlabelled, own), ("labelled", labelled, options)):
        try:
            sources.append(open_source(spec, data_dir, flag=flag, **keys))
        except InputError as error:
            faults.append(str(error))
    raise_if(faults)
    return Combined(*sources)
