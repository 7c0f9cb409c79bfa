"""The first ids of every vocabulary; words start at len(RESERVED)."""

PADDING_ID = 0
UNKNOWN_ID = 1
END_ID = 2
RESERVED = ("<pad>", "<unk>", "<eos>")
