import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

READ_AFTER_TRUNCATION = """
import os, sys
import numpy as np
from data_pipelines.store.token_store import TokenStore
view = TokenStore(sys.argv[1]).split("train")
rows = np.arange(len(view))
if sys.argv[3] == "thread":
    from concurrent.futures import ThreadPoolExecutor
    call = lambda function: ThreadPoolExecutor().submit(function).result()
else:
    call = lambda function: function()
call(lambda: view.gather(rows[:1], 9))
os.truncate(sys.argv[2], 0)
call(lambda: (view.gather(rows, 9), view.labels_of(rows)))
"""


@pytest.mark.parametrize("where", ["main", "thread"])
@pytest.mark.parametrize("kind", ["tokens", "offsets", "labels"])
def test_a_shard_that_is_truncated_while_mapped_is_named_in_one_line(
    tmp_path: Path, write_store: Callable, kind: str, where: str
) -> None:
    documents = [[3, 4, 5, 2]] * 4000  # several pages of each file
    store = write_store(tmp_path / "store", documents, 1, 10)
    path = store.folder / f"train-00000-of-00001.{kind}"
    size = path.stat().st_size
    command = [sys.executable, "-c", READ_AFTER_TRUNCATION, str(store.folder), str(path), where]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.returncode == 2, result
    assert result.stderr == (
        f"{path} has 0 bytes instead of {size}: it was truncated while in use; "
        "prepare the store again\n"
    )
