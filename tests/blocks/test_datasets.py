"""Datasets in buckets: opened with the options of the store whose bucket it is."""

import gzip
import io
import socket

import polars as pl
import pytest

from hotload.clients.store import Store
from hotload.errors import InvalidProblemsError, StoreUnavailableError
from hotload.options import Problems
from hotload.sampling.problems import read_declared, read_problems
from tests.blocks.conftest import GS, S3

ROWS = b'{"question": "1+1=", "solution": 2}\n{"question": "2+2=", "solution": 4}\n'

pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")


@pytest.mark.parametrize("store", ["memory", S3, GS], indirect=True)
async def test_a_dataset_in_the_stores_own_bucket(store: Store) -> None:
    await store.put_bytes(gzip.compress(ROWS), "data/rows.jsonl.gz")
    declared = Problems(
        dataset=f"{store.url}/data/rows.jsonl.gz", prompt_field="question", answer_field="solution"
    )
    problems = await read_declared(declared, store)
    assert [(one.prompt, one.answer) for one in problems] == [("1+1=", 2), ("2+2=", 4)]
    gone = declared.model_copy(update={"dataset": f"{store.url}/data/gone.jsonl"})
    with pytest.raises(InvalidProblemsError, match="does not exist"):
        await read_declared(gone, store)


@pytest.mark.parametrize("store", [S3], indirect=True)
async def test_shards_in_a_bucket(store: Store) -> None:
    for number in range(2):
        pl.DataFrame({"prompt": [f"{number}"]}).write_parquet(file := io.BytesIO())
        await store.put_bytes(file.getvalue(), f"hub/train-0000{number}-of-00002.parquet")
    for dataset in ("hub", "hub/train-*.parquet"):
        problems = await read_declared(Problems(dataset=f"{store.url}/{dataset}"), store)
        assert [problem.prompt for problem in problems] == ["0", "1"]


def test_a_store_that_is_away_may_come_back() -> None:
    with socket.socket() as bound:  # bound, never listening
        bound.bind(("127.0.0.1", 0))
        options = {"endpoint_url": f"http://127.0.0.1:{bound.getsockname()[1]}"}
        options |= {"key": "AKIAFORTESTS", "secret": "a secret"}
        with pytest.raises(StoreUnavailableError, match="no connection to the store"):
            read_problems("s3://bucket/rows.jsonl", options)
