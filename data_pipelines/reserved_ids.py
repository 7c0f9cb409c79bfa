"""The ids that every vocabulary starts with; words follow from len(RESERVED)."""

PADDING_ID = 0
UNKNOWN_ID = 1
END_ID = 2
RESERVED = ("<pad>", "<unk>", "<eos>")
