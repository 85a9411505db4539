"""Write rows until told to stop; one line on stdout for each acknowledged batch.

`python milvus_writer.py URI WRITER BATCHES BATCH_ROWS DIM`: ids are `<writer>-<number>`, and each line is
the number of the first row that is not written yet.
"""

import sys

import numpy as np

from jobworker.handlers.vectors.milvus.store import Row, open_vectors


def main() -> None:
    uri, writer, count, size, dim = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
    store = open_vectors(uri, timeout_s=30)
    store.ensure_collection("story_segments", dim)
    random = np.random.default_rng(1)
    for number in range(count):
        vectors = random.normal(size=(size, dim)).astype(np.float32)
        first = number * size
        rows = [
            Row(f"{writer}-{first + row}", vectors[row], "tenant", writer, text_content="夜" * 200)
            for row in range(size)
        ]
        store.upsert("story_segments", rows)
        print(first + size, flush=True)


if __name__ == "__main__":
    main()
