"""Edit an index and stored neighbours when chunks are removed and added (for `retro_nb.store.updating`).

Throughout, `was` holds the number that each chunk had before, ascending; −1 for added chunks.
"""

import faiss
import numpy as np
from jaxtyping import Bool, Int32, Int64

from retro_nb.store.index import BLOCK, NO_NEIGHBOUR, Vectors, exact_search, innermost, is_exact, rows_of

EDITABLE = (faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer, faiss.IndexIVFPQ)  # all their data is in the lists
AT_A_TIME = 1024  # chunks compared together
# A search rounds a distance by up to 1.3e-6 of |q|² + d² (measured on 32 to 1024 dimensions). Three such errors meet
# here, one of them of a vector that may be longer, so a chunk within this margin may be nearer.
SLACK = 3e-5


# the index


def edit_lists(index: faiss.Index, was: Int64[np.ndarray, " c"], vectors: Vectors) -> None:
    """Edit an inverted file in place to hold these vectors: drop removed ones, renumber the rest, add new ones."""
    inner, now = innermost(index), np.full(index.ntotal, NO_NEIGHBOUR, np.int64)
    now[was[was >= 0]] = np.flatnonzero(was >= 0)
    lists, size = faiss.ArrayInvertedLists(inner.nlist, inner.code_size), inner.code_size
    for number in range(inner.nlist):
        ids, codes = list_entries(inner.invlists, number, size)
        ids, codes = now[ids], codes[now[ids] >= 0]
        ids = ids[ids >= 0]
        lists.add_entries(number, len(ids), faiss.swig_ptr(ids), faiss.swig_ptr(codes))
    inner.replace_invlists(lists, True)
    lists.this.disown()  # the index owns it now
    inner.ntotal = index.ntotal = int((now >= 0).sum())
    added = np.flatnonzero(was < 0)
    for rows in np.array_split(added, -(-len(added) // BLOCK)) if len(added) else ():
        index.add_with_ids(rows_of(vectors, rows), rows)
    for number in range(inner.nlist):  # in ascending order, as in a list filled from scratch
        ids, codes = list_entries(inner.invlists, number, size)
        order = np.argsort(ids)
        ids[:], codes[:] = ids[order], codes[order]


def list_entries(lists: faiss.InvertedLists, number: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and codes of an inverted list, as views of its memory."""
    count = lists.list_size(number)
    if not count:
        return np.empty(0, np.int64), np.empty((0, size), np.uint8)
    codes = faiss.rev_swig_ptr(lists.get_codes(number), count * size)
    return faiss.rev_swig_ptr(lists.get_ids(number), count), codes.reshape(count, size)


# neighbours


def comparing_pays(index: faiss.Index, added: int) -> bool:
    """Whether comparing a chunk with the added ones shows if its neighbours change, and costs less than a search."""
    if is_exact(index):
        return True
    lists = faiss.downcast_index(index)  # valid while `index` is kept
    if type(lists) is not faiss.IndexIVFFlat:  # other indices compute other distances
        return False
    return added * lists.nlist <= lists.nprobe * lists.ntotal


def renumber(
    before: Int32[np.ndarray, "c_before k"], was: Int64[np.ndarray, " c"]
) -> tuple[Int32[np.ndarray, "c k"], Bool[np.ndarray, " c"]]:
    """Previous neighbours under their new numbers, and which chunks have lost a neighbour."""
    now = np.full(len(before) + 1, NO_NEIGHBOUR, np.int32)  # the last entry stands for −1
    now[was[was >= 0]] = np.flatnonzero(was >= 0)
    found = np.full((len(was), before.shape[1]), NO_NEIGHBOUR, np.int32)
    found[was >= 0] = now[before[was[was >= 0]]]
    lost = np.zeros(len(was), bool)
    lost[was >= 0] = ((found[was >= 0] < 0) & (before[was[was >= 0]] >= 0)).any(axis=1)
    return found, lost


def may_be_nearer(
    vectors: Vectors, found: Int32[np.ndarray, "c k"], rows: Int64[np.ndarray, " b"], added: Int64[np.ndarray, " n"]
) -> Bool[np.ndarray, " b"]:
    """For each chunk in `rows`, whether an added chunk may be nearer than its last neighbour, or it has too few."""
    if not len(added):
        return np.zeros(len(rows), bool)
    others, nearer = rows_of(vectors, added), np.zeros(len(rows), bool)
    for start in range(0, len(rows), AT_A_TIME):
        part = rows[start : start + AT_A_TIME]
        queries, last = rows_of(vectors, part), found[part, -1]
        nearest = exact_search(others, queries, 1)[0][:, 0]
        reach = ((rows_of(vectors, np.maximum(last, 0)) - queries) ** 2).sum(axis=1)
        reach += SLACK * (reach + (queries**2).sum(axis=1))
        nearer[start : start + AT_A_TIME] = (last < 0) | (nearest <= reach)
    return nearer
