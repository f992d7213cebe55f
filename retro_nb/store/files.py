"""Names and paths of a store's arrays."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from retro_nb.common.arrays import PathLike
from retro_nb.common.digests import digest

CHUNKS, SEQS, DOC_IDS = "chunks.npy", "seqs.npy", "doc_ids.npy"
VECTORS, INDEX, NEIGHBOURS = "chunks.embedded.npy", "knn.index", "chunks.knn.npy"


def companion(chunks_memmap_path: PathLike, kind: str) -> Path:
    """Path of a file next to a chunk array: `chunks.spans.npy` for `chunks.npy` and the kind "spans.npy"."""
    path = Path(chunks_memmap_path)
    return path.with_name(f"{path.stem}.{kind}")


def knn_path(chunk_memmap_path: PathLike, exclude: Sequence[tuple[int, int]] = ()) -> Path:
    """Path of a chunk array's neighbours: `chunks.knn.npy` for `chunks.npy`.

    If `exclude`, ranges [first, stop) of chunks that are never retrieved, is not empty, the name has its digest.
    """
    kept_out = f"-{digest([list(each) for each in exclude], 8)}" if exclude else ""
    return companion(chunk_memmap_path, f"knn{kept_out}{Path(chunk_memmap_path).suffix}")


@dataclass(frozen=True)
class Files:
    """Paths of one store's arrays. Vectors, index, neighbours and metadata are next to the chunks."""

    chunks: Path
    seqs: Path
    doc_ids: Path
    index_name: str = INDEX

    @classmethod
    def of(cls, folder: PathLike) -> "Files":
        """The default paths in a folder."""
        return cls(Path(folder) / CHUNKS, Path(folder) / SEQS, Path(folder) / DOC_IDS)

    @property
    def vectors(self) -> Path:
        """Path of the chunks' vectors."""
        return companion(self.chunks, "embedded.npy")

    @property
    def kept_out(self) -> Path:
        """Path of the note of the documents that are kept out (`splits.document_numbers`)."""
        return companion(self.chunks, "kept_out.json")

    @property
    def index(self) -> Path:
        """Path of the index."""
        return self.chunks.parent / self.index_name
