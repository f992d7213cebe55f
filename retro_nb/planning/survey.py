"""A report on a corpus before any long work: its content, the cost of a build, and what to fix first.

    print(survey(text_folder("my_texts")))

The corpus is read once (`planning.counting`). Some hundred of its chunks are embedded to estimate how long a build
takes on this machine (`planning.costs`).
"""

import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import length_hint
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil

from retro_nb.common.arrays import WORK, PathLike
from retro_nb.planning.costs import Rates, Size, Step, lists_of, measure, steps
from retro_nb.planning.counting import COMPARED, Beginning, Reading, is_unsuited, repeated
from retro_nb.store.embedding import embedding_dim
from retro_nb.store.knn import choose_spec
from retro_nb.store.settings import StoreSettings
from retro_nb.store.store import choose_tokenizer
from retro_nb.text.document import Document, printable
from retro_nb.text.duplicates import GRAM, JACCARD, repeating
from retro_nb.text.tokens import TextTokenizer

TRAINED_ON = 5_000_000  # characters to train a tokenizer on; the build trains it on all
WIDTH = 96  # columns of the report
UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "s": 1, "min": 60, "h": 3600, "days": 86400}


@dataclass(frozen=True)
class Survey:
    """The result of `survey`, to be printed. Counts refer to what was read; `whole` and `steps` to the whole corpus.

    `longest`, in characters, and `longest_title` describe the longest document. `lengths[i]` is the number of documents
    of 2^(i−1) to 2^i − 1 characters, `lengths[0]` that of empty ones. A duplicate document has the same text, a
    duplicate chunk the same m tokens, as an earlier one; empty texts do not count. A near-duplicate's 13-grams of
    tokens have a Jaccard similarity of .8 or more with those of an earlier document (`near_duplicates`). Only the first
    `compared_documents` are compared: 10 million tokens, or fewer if the time is up. A padded chunk is less than half
    text.
    """

    chunk_size: int
    seq_len: int
    knn: int
    index: str  # factory string
    seconds: float  # spent reading
    complete: bool  # all was read, so `whole` and the bytes on disk are exact
    length: int | None  # documents of the corpus, if known
    longest_title: str
    first_replaced: str  # the source of the first document with undecodable bytes
    lengths: tuple[int, ...]
    whole: Size  # estimated if not all was read; a lower bound if the corpus also has no length
    rates: Rates
    steps: tuple[Step, ...]  # chunk, embed, index, search
    free_disk: int  # bytes free in the work folder
    all_memory: int  # bytes of the machine's memory
    bert_unsuited: bool  # the BERT reads the texts letter by letter, or not at all
    trained_on_all: bool  # false if the build trains the tokenizer on more text than was used here
    documents: int = 0
    empty_documents: int = 0
    duplicate_documents: int = 0
    compared_documents: int = 0
    near_duplicate_documents: int = 0
    characters: int = 0
    bytes: int = 0
    spaces: int = 0
    longest: int = 0
    replaced_characters: int = 0
    replaced_documents: int = 0
    tokens: int = 0
    unknown_tokens: int = 0
    chunks: int = 0
    seqs: int = 0
    duplicate_chunks: int = 0
    padded_chunks: int = 0
    padding: int = 0  # tokens
    tokenised: int = 0  # characters cut into tokens: all, except the rest of a document that took too long

    @property
    def longest_share(self) -> float:
        """Share of the longest document in all bytes of text."""
        return self.whole.longest / self.whole.bytes

    @property
    def total_seconds(self) -> float:
        """Seconds of all steps."""
        return sum(step.seconds for step in self.steps)

    @property
    def total_disk(self) -> int:
        """Bytes of all files."""
        return sum(step.disk for step in self.steps)

    @property
    def peak_memory(self) -> int:
        """Peak memory of the most demanding step in bytes, roughly."""
        return max(step.memory for step in self.steps)

    @property
    def remarks(self) -> list[str]:
        """Problems to fix before a build, with remedies; empty if none."""
        return [*_about_texts(self), *_about_tokens(self), *_about_machine(self)]

    def __str__(self) -> str:
        remarks = [textwrap.fill(each, WIDTH, initial_indent="! ", subsequent_indent="  ") for each in self.remarks]
        return printable("\n".join([*_found(self), "", *_expected(self), *([""] if remarks else []), *remarks]))


def survey(
    corpus: Iterable[Document],
    settings: StoreSettings | None = None,
    *,
    work_dir: PathLike | None = None,
    seconds: float | int = 20,
    progress: bool = True,
) -> Survey:
    """Read and count a corpus, and measure for some seconds how fast this machine builds a store of it.

    Args:
        corpus: any iterable of `Document`.
        settings: the store's, as for `Store.build`; `max_chunks`, `max_seqs`, `max_similarity` and `keep_out` are
            ignored. A tokenizer to be trained is trained on the first 5 million characters.
        work_dir: the store's folder, to check the free disk space; data/work if left out.
        seconds: time limit for reading, `math.inf` for all. At least one document is read, or 800,000 characters of a
            longer one. If the corpus has a `len`, the survey estimates the rest. The search for near-duplicates has
            the same limit again.
        progress: show a progress bar.

    Raises:
        ValueError: `seconds` is negative or not a number, no document has a token, `settings.index` is not an index,
            or a tokenizer must be trained but the corpus can be read only once.
    """
    if not seconds >= 0:
        raise ValueError(f"seconds {seconds}: pass 0 or more, or math.inf to read all")
    settings, length = settings or StoreSettings(), _length(corpus)
    tokenizer, trained_on_all = _choose_tokenizer(corpus, settings, progress)
    reading = Reading(tokenizer, settings.chunk_size, settings.seq_len // settings.chunk_size)
    took = reading.read(corpus, seconds, progress)
    if not reading.counts["chunks"]:
        raise ValueError(f"no text to survey: {reading.counts['documents']} documents, none with a token")
    repeats, compared = repeating(reading.kept, seconds)
    whole = reading.whole(length)
    index, rates, costs = _measure(reading, whole, settings, reading.counts["tokens"] / took)
    return Survey(
        chunk_size=settings.chunk_size,
        seq_len=settings.seq_len,
        knn=settings.knn,
        index=index,
        seconds=took,
        complete=reading.complete,
        length=length,
        longest_title=reading.longest_title,
        first_replaced=reading.first_replaced,
        lengths=tuple(reading.lengths[i] for i in range(max(reading.lengths) + 1)),
        whole=whole,
        rates=rates,
        steps=costs,
        free_disk=shutil.disk_usage(_existing(Path(work_dir or WORK))).free,
        all_memory=psutil.virtual_memory().total,
        bert_unsuited=reading.unsuited_to(settings.bert),
        trained_on_all=trained_on_all,
        duplicate_documents=repeated(reading.texts),
        compared_documents=compared,
        near_duplicate_documents=len(repeats),
        duplicate_chunks=repeated(reading.hashes),
        **reading.counts,
    )


def _length(corpus: Iterable[Document]) -> int | None:
    """Number of documents, if known. (A streamed dataset has a `len` that raises TypeError.)"""
    length = length_hint(corpus, -1)
    return None if length < 0 else length


def _choose_tokenizer(
    corpus: Iterable[Document], settings: StoreSettings, progress: bool
) -> tuple[TextTokenizer, bool]:
    """The build's tokenizer, and whether it is final: one to be trained sees only the beginning of a long corpus."""
    beginning = Beginning(corpus, TRAINED_ON)
    with TemporaryDirectory() as folder:
        read_once = isinstance(corpus, Iterator)  # `choose_tokenizer` refuses to train on that
        return choose_tokenizer(settings, corpus if read_once else beginning, folder, progress), beginning.is_all


def _measure(
    reading: Reading, whole: Size, settings: StoreSettings, tokens_per_second: float
) -> tuple[str, Rates, tuple[Step, ...]]:
    """The build's index, this machine's rates, and the cost of each step."""
    dim = embedding_dim(settings.bert)
    index = choose_spec(whole.chunks, dim, **settings.of_index())
    rates = measure(
        np.stack(reading.rows),
        reading.tokenizer,
        bert=settings.bert,
        dim=dim,
        knn=settings.knn,
        tokens_per_second=tokens_per_second,
        chunks_per_document=whole.chunks / whole.documents,
        lists=lists_of(index, dim) > 0,
    )
    sizes = {"chunk_size": settings.chunk_size, "knn": settings.knn, "dim": dim}
    return index, rates, steps(whole, rates, **sizes, index=index, tokenizer=reading.tokenizer)


def _existing(folder: Path) -> Path:
    """The folder, or its nearest existing parent."""
    return next(each for each in (folder.resolve(), *folder.resolve().parents) if each.exists())


# what to fix


def _about_texts(s: Survey) -> Iterator[str]:
    one = s.whole.documents == 1
    if one or s.longest_share > 0.5:
        what = "there is only one document" if one else f"{s.longest_title!r} holds {s.longest_share:.0%} of the text"
        few = "no" if one else "few"
        yield (
            f"{what}: its chunks find {few} neighbours, since a chunk's own document is left out of its search. Cut it "
            f"into parts: parts(corpus, max_chars=20000)"
        )
    if s.replaced_documents:
        yield (
            f"{s.replaced_characters:,} undecodable bytes in {s.replaced_documents:,} documents, first in "
            f"{s.first_replaced}: they are not UTF-8. text_folder(…, encoding=None) finds out what they are"
        )
    documents, chunks = s.duplicate_documents / s.documents, s.duplicate_chunks / s.chunks
    if documents > 0.01 or chunks > 0.05:
        yield (
            f"{documents:.0%} of the documents and {chunks:.0%} of the chunks are duplicates: a model learns to copy "
            f"them, and what was seen in training leaks into the validation (notebook 08). Leave them out, or pass "
            f"max_similarity=0.95 so that none is retrieved"
        )
    near = s.near_duplicate_documents / max(1, s.compared_documents)
    if near > max(0.01, documents):
        yield (
            f"{near:.0%} of the documents share most of their text with one before them (a Jaccard similarity of "
            f"{JACCARD} or more between their {GRAM}-grams): near_duplicates(…) finds the pairs. Leave the second out, "
            f"or hold both out of training together"
        )


def _about_tokens(s: Survey) -> Iterator[str]:
    if is_unsuited(s.tokenised, s.spaces * s.tokenised // s.characters, s.tokens, s.unknown_tokens):
        yield (
            f"the tokenizer hardly knows this language: {s.tokenised / s.tokens:.1f} characters a token, "
            f"{s.unknown_tokens / s.tokens:.0%} of the tokens unknown. Pass another one: tokenizer=8000 trains a "
            f"byte-level BPE on the corpus"
        )
    if s.bert_unsuited:
        yield (
            "the BERT, which finds the neighbours, hardly knows this language; the default one is English. Pass "
            "bert=… with one that does"
        )
    if not s.trained_on_all:
        yield (
            f"the tokenizer was trained on the first {TRAINED_ON:,} characters, the build trains it on all: then the "
            f"counts will be a little different"
        )
    mean = s.tokens / max(1, s.documents - s.empty_documents)
    if mean < s.chunk_size / 2:
        yield (
            f"the documents are tiny, {mean:.0f} tokens on average: {s.padding / (s.chunks * s.chunk_size):.0%} of the "
            f"chunks is padding, and a document of one chunk has no continuation to learn from. Pass a smaller "
            f"chunk_size, or join what belongs together"
        )


def _about_machine(s: Survey) -> Iterator[str]:
    if s.total_disk > s.free_disk:
        yield f"it needs {as_size(s.total_disk)} on disk, and {as_size(s.free_disk)} are free: pass another work_dir"
    if s.peak_memory > s.all_memory:
        yield (
            f"it needs {as_size(s.peak_memory)} of memory, and the machine has {as_size(s.all_memory)}: pass "
            f"max_index_memory_usage=…, e.g. '{max(1, s.all_memory // 2**31)}G', and cut the longest document"
        )


# the report


def as_size(size: float | int) -> str:
    """Format bytes as "512 bytes", "1.5 kB", "37 GB"; units are powers of 1000."""
    return f"{size:.0f} bytes" if size < 1000 else _amount(size, 999.5, ("kB", "MB", "GB", "TB"))


def as_time(seconds: float | int) -> str:
    """Format seconds as "1.5 s", "37 min", "4.2 h", "12 days"."""
    return "< 0.1 s" if 0 < seconds < 0.05 else _amount(seconds, 99.5, ("s", "min", "h", "days"))


def _amount(value: float | int, most: float, units: Sequence[str]) -> str:
    """The value in the first unit that leaves less than `most` of it, else in the last one."""
    unit = next((unit for unit in units if value < most * UNITS[unit]), units[-1])
    amount = value / UNITS[unit]
    return f"{amount:,.0f} {unit}" if amount >= 9.95 else f"{amount:.1f} {unit}"


def _found(s: Survey) -> list[str]:
    """Report lines on what was read."""
    unknown, twice = s.unknown_tokens / s.tokens, s.duplicate_chunks / s.chunks
    places, padded = s.chunks * s.chunk_size, s.padded_chunks / s.chunks
    lines = {
        "documents": f"{s.documents:,}, {s.empty_documents:,} of them empty",
        "text": f"{as_size(s.bytes)}, {s.characters:,} characters",
        "longest": f"{as_size(s.whole.longest)}, {s.longest_share:.1%} of all: {s.longest_title:.50}",
        "undecodable": f"{s.replaced_characters:,} bytes in {s.replaced_documents:,} documents",
        "tokens": f"{s.tokens:,}, of {s.tokenised / s.tokens:.1f} characters; {unknown:.1%} are unknown",
        "chunks": f"{s.chunks:,} of {s.chunk_size} tokens, in {s.seqs:,} sequences of up to {s.seq_len:,}",
        "padding": f"{s.padding / places:.1%} of the chunks' places; {padded:.1%} of the chunks are mostly padding",
        "duplicates": f"{s.duplicate_documents:,} documents; {s.duplicate_chunks:,} chunks, {twice:.1%}",
        "near copies": _near_duplicates(s),
    }
    return [_extent(s), "", *(f"{name:<14}{value}" for name, value in lines.items())]


def _near_duplicates(s: Survey) -> str:
    if not s.compared_documents:
        return f"not looked for: the first document has more than {COMPARED:,} tokens, or was cut"
    among = "all" if s.compared_documents == s.documents else f"the first {s.compared_documents:,}"
    return f"{s.near_duplicate_documents:,} of {among} documents, the duplicates among them"


def _extent(s: Survey) -> str:
    """Report lines on how much of the corpus was read, and its total size."""
    if s.complete:
        return f"All was read, in {as_time(s.seconds)}."
    seen = f"Of {s.length:,} documents {s.documents:,}" if s.length else f"{s.documents:,} documents"
    cut = f", {s.tokenised / s.characters:.0%} of their text cut" if s.tokenised < s.characters else ""
    total = f"{as_size(s.whole.bytes)} of text, {s.whole.chunks:,} chunks"
    kind = "In all there will be about" if s.length else "The corpus does not say how long it is: it has at least"
    return f"{seen} were read{cut}, in {as_time(s.seconds)}.\n{kind} {total}."


def _expected(s: Survey) -> list[str]:
    """Report lines on the cost of a build."""
    rates, of = s.rates, f"{s.whole.chunks:,}"
    speed = f"{rates.tokens:,.0f} tokens, {rates.chunks:,.0f} chunks, {rates.comparisons / 1e6:,.0f} M pairs"
    tasks = {
        "chunk": f"cut {as_size(s.whole.bytes)} into chunks",
        "embed": f"embed {of} chunks",
        "index": f"index them: {s.index}",
        "search": f"search {s.knn} neighbours of each",
    }
    rows = [(tasks[each.name], each.seconds, each.disk, each.memory) for each in s.steps]
    rows.append(("all", s.total_seconds, s.total_disk, s.peak_memory))
    return [
        f"{'A build would':<32}{'take':>12}{'on disk':>12}{'in memory':>12}",
        *(f"  {what:<30}{as_time(time):>12}{as_size(disk):>12}{as_size(top):>12}" for what, time, disk, top in rows),
        f"since this machine cuts, embeds, compares a second: {speed}.",
    ]
