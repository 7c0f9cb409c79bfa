"""Moved to `data_pipelines.tokenizers`."""

from data_pipelines.tokenizers.word import WordTokenizer as WordTokenizer
