"""Where the arrays of a store lie: the one place that knows their names."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from retro_nb.common.arrays import PathLike
from retro_nb.common.digests import digest

CHUNKS, SEQS, DOC_IDS = "chunks.npy", "seqs.npy", "doc_ids.npy"
VECTORS, INDEX, NEIGHBOURS = "chunks.embedded.npy", "knn.index", "chunks.knn.npy"


def companion(chunks_memmap_path: PathLike, kind: str) -> Path:
    """A file beside a chunk array: `chunks.spans.npy` for `chunks.npy` and the kind "spans.npy"."""
    path = Path(chunks_memmap_path)
    return path.with_name(f"{path.stem}.{kind}")


def knn_path(chunk_memmap_path: PathLike, exclude: Sequence[tuple[int, int]] = ()) -> Path:
    """Where the neighbours of a chunk array lie: `chunks.knn.npy` for `chunks.npy`.

    Those of a database that leaves out the chunks `exclude`, as ranges [first, stop), lie beside it under another name.
    """
    kept_out = f"-{digest([list(each) for each in exclude], 8)}" if exclude else ""
    return companion(chunk_memmap_path, f"knn{kept_out}{Path(chunk_memmap_path).suffix}")


@dataclass(frozen=True)
class Files:
    """The files of one store. Vectors, neighbours and what is known of the documents lie beside the chunks."""

    chunks: Path
    seqs: Path
    doc_ids: Path
    index: Path

    @classmethod
    def of(cls, folder: PathLike) -> "Files":
        """Those of a store in this folder."""
        return cls(*(Path(folder) / name for name in (CHUNKS, SEQS, DOC_IDS, INDEX)))

    @property
    def vectors(self) -> Path:
        """Where the chunks' vectors lie."""
        return companion(self.chunks, "embedded.npy")
