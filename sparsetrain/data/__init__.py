"""Training data: sources, tokenisation, synthetic tasks, packing, and a stream of rows that resumes exactly."""

from sparsetrain.data.batch import Batch, Row, Step, collate
from sparsetrain.data.build import build_rows
from sparsetrain.data.loader import StepLoader
from sparsetrain.data.stream import RowStream
from sparsetrain.data.synthetic import RetrievalPrompt, multikey_prompt, passkey_prompt
from sparsetrain.data.tokens import token_stream

__all__ = [
    "Batch",
    "RetrievalPrompt",
    "Row",
    "RowStream",
    "Step",
    "StepLoader",
    "build_rows",
    "collate",
    "multikey_prompt",
    "passkey_prompt",
    "token_stream",
]
