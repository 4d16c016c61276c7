"""Documents from text, Markdown, source code, JSONL, Parquet and saved datasets."""

from model_worker.corpus.files import Choice, Format, places
from model_worker.corpus.reader import Reading, corpus_bytes, read
from model_worker.corpus.rows import Columns
from model_worker.corpus.source import LeftOut, Note, Notes, NoteTaker, Source
from model_worker.corpus.text import BadBytes
from model_worker.corpus.tokens import token_ids, tokenizer_digest

__all__ = [
    "BadBytes",
    "Choice",
    "Columns",
    "Format",
    "LeftOut",
    "Note",
    "NoteTaker",
    "Notes",
    "Reading",
    "Source",
    "corpus_bytes",
    "places",
    "read",
    "token_ids",
    "tokenizer_digest",
]
