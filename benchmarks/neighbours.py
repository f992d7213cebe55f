"""The neighbours of all 37,207 chunks of the speeches, same-document ones excluded: ours against the reference's.

    python benchmarks/neighbours.py            3 minutes; writes benchmarks/results/neighbours-untuned-….json

Both sides start from the same vectors on the disk, index them, search, and write k = 2 neighbours of each chunk.
The reference fetches 10 more than it needs (its default; its TrainingWrapper asks for 100, which takes longer) and
drops those of the own document. The vectors are MiniLM's where data/work/speeches-0 has them (growth.py makes them, in
minutes); else the means of the chunks' word vectors, which lie in clusters and documents alike.

The reference builds its index with autofaiss, which chooses HNSW32 here and then tunes the effort of the search for
minutes. It wants NumPy 1 and must not come into the environment, but it runs from a folder of its own:

    pip install --no-deps --target /tmp/autofaiss autofaiss==2.17.0 embedding-reader==1.8.1 fire termcolor \\
        fsspec pyarrow pandas python-dateutil six
    PYTHONPATH=/tmp/autofaiss python benchmarks/neighbours.py          20 minutes; writes neighbours-….json

Without it, the same kind of index with the effort that FAISS presets stands in: a reference that nobody has, many
times faster than the one there is and less exact. With it both are compared, the real one 3 times instead of 5.
"""

import contextlib
import importlib.util
import io
import json
import os
import shutil
import tempfile
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
from measure import compare, write_results
from peer import import_reference

from retro_nb.common.arrays import WORK, open_array
from retro_nb.reference import chunks_to_embeddings_, chunks_to_precalculated_knn_, documents_to_chunks_
from retro_nb.store import knn
from retro_nb.store.embedding import get_bert
from retro_nb.store.index import recall, rows_of
from retro_nb.text.speeches import speeches

K, EXTRA = 2, 10
CHECKED = 1000  # chunks whose neighbours are compared with brute force in double precision
AUTOFAISS = importlib.util.find_spec("autofaiss") is not None
BUILT = ("knn.index", "chunks.knn.npy")


def chunked_speeches() -> tuple[Path, np.ndarray, np.ndarray]:
    """Folder, chunks and document ids of all speeches in chunks of 64; as notebook 03 with max_chars = 0."""
    folder = WORK / "speeches-0"
    paths = {f"{name}_memmap_path": folder / f"{name}.npy" for name in ("chunks", "seqs", "doc_ids")}
    documents_to_chunks_(speeches(), **paths, chunk_size=64, seq_len=512)
    return folder, open_array(folder / "chunks.npy"), open_array(folder / "doc_ids.npy")


def speeches_store() -> tuple[np.ndarray, np.ndarray]:
    """MiniLM's vectors of all these chunks, and their documents."""
    folder, chunks, doc_ids = chunked_speeches()
    chunks_to_embeddings_(
        num_chunks=len(chunks),
        chunks_memmap_path=folder / "chunks.npy",
        embeddings_memmap_path=folder / "chunks.embedded.npy",
        chunk_size=64,
    )
    return np.array(open_array(folder / "chunks.embedded.npy")), np.array(doc_ids)


def mean_word_vectors(chunks: np.ndarray) -> np.ndarray:
    """The mean of each chunk's rows in BERT's table of words."""
    words = get_bert(device="cpu").get_input_embeddings().weight.detach().float().numpy()
    return np.stack([words[row[row > 102]].mean(axis=0) for row in chunks[:, :-1]])


# ours


def our_neighbours(folder: Path, count: int) -> np.ndarray:
    """Index, search and save, from the embedded chunks on; measuring the recall is part of it."""
    for name in BUILT:
        (folder / name).unlink(missing_ok=True)
    path, _ = chunks_to_precalculated_knn_(
        num_nearest_neighbors=K,
        num_chunks=count,
        chunk_size=64,
        chunk_memmap_path=folder / "chunks.npy",
        doc_ids_memmap_path=folder / "doc_ids.npy",
        progress=False,
    )
    return np.array(open_array(path))


# the reference


def prepare_reference(folder: Path, vectors: np.ndarray, doc_ids: np.ndarray) -> Any:
    """`retro_pytorch.retrieval`, with these vectors as the result of its embedding."""
    import_reference()
    from retro_pytorch import retrieval

    vectors.tofile(folder / "chunks.dat.embedded")
    doc_ids.astype(np.int32).tofile(folder / "doc_ids.dat")
    retrieval.chunks_to_embeddings_ = lambda **_: None
    # It does not hand the width on to its own function, which takes all vectors for 768 wide.
    retrieval.chunks_to_index_and_embed = partial(retrieval.chunks_to_index_and_embed, embed_dim=vectors.shape[1])
    retrieval.build_index = stand_in
    return retrieval


def stand_in(embeddings: str, index_path: str, max_index_memory_usage: str, **_: Any) -> None:
    """What autofaiss 2.17 chooses from 10,000 vectors on, if that many bytes suffice: a graph in memory."""
    vectors = np.concatenate([np.load(file) for file in sorted(Path(embeddings).iterdir())])
    count, width = vectors.shape
    links = int((float(max_index_memory_usage.rstrip("m")) * 1024**2 / (4 * count) - width) / 2)
    if count < 10_000 or links < 8:
        raise ValueError(f"for {count} vectors of width {width} autofaiss chooses another index: install it")
    index = faiss.index_factory(width, f"HNSW{min(links, 32)}")
    index.add(vectors)
    faiss.write_index(index, index_path)


def use_autofaiss(retrieval: Any) -> None:
    """Undo `stand_in`."""
    from autofaiss import build_index
    from autofaiss.external import optimize

    # Its report of the tuning has a float32 in it, which JSON does not know.
    optimize.json = SimpleNamespace(dump=partial(json.dump, default=float))
    retrieval.build_index = build_index


def their_neighbours(retrieval: Any, count: int) -> tuple[np.ndarray, faiss.Index]:
    """The reference's own function, in its own folder, without what it prints."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        path, index = retrieval.chunks_to_precalculated_knn_(
            num_nearest_neighbors=K,
            num_chunks=count,
            chunk_size=64,
            chunk_memmap_path="chunks.dat",
            doc_ids_memmap_path="doc_ids.dat",
            num_extra_neighbors=EXTRA,
            force_reprocess=True,
        )
    return np.array(np.memmap(path, np.int32, "r", shape=(count, K))), index


def rows_left_unfilled(index: faiss.Index, vectors: np.ndarray, doc_ids: np.ndarray, extra: int) -> int:
    """Chunks that keep fewer than K neighbours when `extra` more are fetched and the own document's dropped."""
    _, found = index.search(rows_of(vectors, slice(None)), 1 + K + extra)
    strangers = (found[:, 1:] >= 0) & (doc_ids[found[:, 1:]] != doc_ids[:, None])
    return int((strangers.sum(axis=1) < K).sum())


# the comparison


def brute_force(vectors: np.ndarray, doc_ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Squared distances of these chunks to all, in double precision; infinite within a document."""
    exact = vectors.astype(np.float64)
    squares = (exact**2).sum(axis=1)
    distances = squares[rows][:, None] + squares - 2 * exact[rows] @ exact.T
    return np.where(doc_ids[rows][:, None] == doc_ids, np.inf, distances)


def check(found: np.ndarray, vectors: np.ndarray, doc_ids: np.ndarray, rows: np.ndarray, truth: np.ndarray) -> None:
    """Every row full, no chunk of the own document, and as near as brute force finds, in order."""
    assert found.shape == (len(vectors), K) and found.min() >= 0
    assert not np.any(doc_ids[found] == doc_ids[:, None])
    near = np.take_along_axis(truth, found[rows].astype(np.int64), axis=1)
    np.testing.assert_allclose(near, np.sort(truth, axis=1)[:, :K], rtol=1e-5)


def describe(found: np.ndarray, vectors: np.ndarray, rows: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """How many rows have a −1 in them, and recall@K on the rows that brute force answered."""
    nearest = np.argsort(truth, axis=1)[:, :K]
    share = recall(vectors, vectors[rows], found[rows].astype(np.int64), nearest)
    return {"rows not full": int((found < 0).any(axis=1).sum()), f"recall@{K}": share}


def main() -> None:
    store, chunks, doc_ids = chunked_speeches()
    embedded = (store / "chunks.embedded.npy").exists()
    vectors, doc_ids = speeches_store() if embedded else (mean_word_vectors(chunks), np.array(doc_ids))
    count = len(vectors)
    rows = np.linspace(0, count - 1, CHECKED).astype(np.int64)
    truth = brute_force(vectors, doc_ids, rows)
    warnings.filterwarnings("ignore", "building .* again")  # each run builds what the last one has built
    with tempfile.TemporaryDirectory() as temporary:
        folder, home = Path(temporary) / "ours", Path.cwd()
        folder.mkdir()
        for name in ("chunks.npy", "doc_ids.npy"):
            shutil.copy(store / name, folder)
        np.save(folder / "chunks.embedded.npy", vectors)
        knn.chunks_to_embeddings_ = lambda **_: {"dim": vectors.shape[1]}
        os.chdir(temporary)  # where the reference makes its folders
        retrieval = prepare_reference(Path(temporary), vectors, doc_ids)
        mine = our_neighbours(folder, count)
        check(mine, vectors, doc_ids, rows, truth)
        theirs, index = their_neighbours(retrieval, count)
        quality = {
            "ours": describe(mine, vectors, rows, truth),
            "reference, untuned": describe(theirs, vectors, rows, truth),
            "reference, untuned, 100 extra": {"rows not full": rows_left_unfilled(index, vectors, doc_ids, 100)},
        }
        print(quality, flush=True)
        equal = f"ours is exact: {CHECKED} rows as brute force in float64; every row full"
        what, amounts = "neighbours of 37 k chunks", {"amount": count, "target": 1.0, "equal": equal}
        both = partial(our_neighbours, folder, count), partial(their_neighbours, retrieval, count)
        settings = {"chunks": count, "width": vectors.shape[1], "k": K, "extra": EXTRA}
        settings["vectors"] = "MiniLM" if embedded else "means of word vectors"
        row = compare(f"{what}, the reference untuned", "chunks/s", *both, **amounts)
        write_results("neighbours-untuned", [row], settings | {"index": "HNSW32, efSearch 16"}, quality=quality)
        if AUTOFAISS:
            use_autofaiss(retrieval)
            row = compare(what, "chunks/s", *both, repeats=3, **amounts)
            theirs = np.array(np.memmap("chunks.knn.dat", np.int32, "r", shape=(count, K)))
            quality["reference"] = describe(theirs, vectors, rows, truth)
            write_results("neighbours", [row], settings, quality=quality)
        os.chdir(home)


if __name__ == "__main__":
    main()
