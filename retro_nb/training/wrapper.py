"""TrainingWrapper: chunks, vectors, neighbours, training and sampling tied together for one corpus.

It builds the missing files in one work folder and provides a dataset, a training loop, and sampling that
retrieves from the corpus while it writes (notebooks 05 and 06).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.data import DataLoader

from retro_nb.common.arrays import PathLike, write_json
from retro_nb.model.base import ChunkedLM
from retro_nb.model.sampling import generate, left_pad, top_k
from retro_nb.store.files import CHUNKS, DOC_IDS, INDEX, SEQS, Files
from retro_nb.store.index import Distances, Neighbours
from retro_nb.store.retrieval import Generation
from retro_nb.store.settings import StoreSettings
from retro_nb.store.splits import DocumentName, hold_out, of_documents, without_documents
from retro_nb.store.store import Store, choose_tokenizer
from retro_nb.text.opening import as_corpus
from retro_nb.text.tokens import PAD_ID, decode, tokenize
from retro_nb.training.log import History
from retro_nb.training.training import fit, get_optimizer


class TrainingWrapper(nn.Module):
    """Everything that a RETRO needs from one corpus.

    The constructor chunks, embeds, indexes and searches the corpus. It reuses files that an earlier run built with
    the same settings; REPROCESS=1 in the environment rebuilds all. If only the corpus has changed, only its new
    documents are embedded (`updating.update_store`). `.store` is the result, `.stats` describes it, `.ds` is the
    dataset, `.retriever` answers questions about the corpus. `over` takes an existing store.

    Args:
        retro: the model.
        chunk_size: m, in tokens; it must be the model's.
        documents_path: a folder of text files, another name or path that `opening.open_corpus` accepts, a corpus, or
            any iterable of `Document`. An iterable needs a `work_dir`, and is chunked again each time, because changes
            in it cannot be detected.
        knn: k, neighbours per chunk.
        glob: one or several patterns for the texts of a folder; by default .txt and .md files.
        chunks_memmap_path, seqs_memmap_path, doc_ids_memmap_path: files to write, by default in `work_dir`. Vectors,
            index and neighbours are stored beside the first.
        max_chunks, max_seqs: stop before the document that would exceed them; None for no limit.
        keep_out: documents that the database leaves out, so that nothing retrieves them: their titles or numbers, or
            a share of all, drawn by `splits.hold_out` (see `StoreSettings` for a corpus that changes).
            `fit` validates on them unless it is given a `valid_share`.
        knn_extra_neighbors: the reference's margin for same-document exclusion; unused, since exclusion is exact here.
        processed_stats_json_path: file for `.stats`; None writes none.
        faiss_index_filename: name of the index, beside the chunks.
        work_dir: one folder for all files; by default the corpus's folder under data/work.
        bert: the BERT that embeds (see `tokens.bert_folder`).
        tokenizer: a Hugging Face tokenizer by folder or name; a number, for a byte-level BPE of that size, trained on
            this corpus (see `tokens.train_tokenizer`); or None for the model's tokenizer, if it has one (as those
            from `retrofit` do), else the BERT's.
        chunks_to_embeddings_batch_size: chunks that the BERT embeds at a time; the device's if left out.
        max_rows_per_file: no effect: blocks have a fixed size here.
        force_reprocess: embed, index and search again in any case.
        progress: show progress bars.
        **index_kwargs: other fields of `StoreSettings`: `index`, `max_similarity`, `use_cls_repr`, …

    Raises:
        TypeError: `retro` is neither a RETRO nor made by `retrofit`.
        ValueError: the sizes of model and corpus, or of model and tokenizer, do not match; `knn` is less than 1; or
            an iterable comes without `work_dir`.
    """

    def __init__(
        self,
        *,
        retro: ChunkedLM,
        chunk_size: int,
        documents_path: Any,
        knn: int,
        glob: Sequence[str] | str | None = None,
        chunks_memmap_path: PathLike | None = None,
        seqs_memmap_path: PathLike | None = None,
        doc_ids_memmap_path: PathLike | None = None,
        max_chunks: int | None = None,
        max_seqs: int | None = None,
        keep_out: float | int | Sequence[DocumentName] = (),
        knn_extra_neighbors: int = 0,
        processed_stats_json_path: PathLike | None = None,
        faiss_index_filename: str = INDEX,
        work_dir: PathLike | None = None,
        bert: PathLike | None = None,
        tokenizer: int | PathLike | None = None,  # `settings.parse_as` tries the types in this order
        chunks_to_embeddings_batch_size: int | None = None,
        max_rows_per_file: int | None = None,
        force_reprocess: bool = False,
        progress: bool = True,
        **index_kwargs: Any,
    ) -> None:
        super().__init__()
        self._check(retro, chunk_size)
        corpus, default = as_corpus(documents_path, glob)
        place = default if work_dir is None else work_dir
        if place is None:
            raise ValueError(f"a {type(corpus).__name__} has no fingerprint to name its files by: pass work_dir=…")
        folder = Path(place)
        settings = StoreSettings(
            chunk_size=chunk_size, seq_len=retro.seq_len, knn=knn, bert=bert, keep_out=keep_out, max_chunks=max_chunks,
            max_seqs=max_seqs, tokenizer=retro.tokenizer if tokenizer is None else tokenizer, **index_kwargs,
        )  # fmt: skip
        if isinstance(tokenizer, int):
            self._check_tokenizer(retro, tokenizer, PAD_ID)  # before training it: it will have at most that many ids
        tokens = choose_tokenizer(settings, corpus, folder, progress)
        self._check_tokenizer(retro, tokens.size, tokens.ids.pad, tokens.fingerprint)
        files = Files(
            Path(chunks_memmap_path or folder / CHUNKS), Path(seqs_memmap_path or folder / SEQS),
            Path(doc_ids_memmap_path or folder / DOC_IDS), faiss_index_filename,
        )  # fmt: skip
        settings = replace(settings, tokenizer=tokens)
        store = Store.build(
            corpus, folder, settings, files=files, batch_size=chunks_to_embeddings_batch_size,
            force_reprocess=force_reprocess, progress=progress,
        )  # fmt: skip
        self._tie(retro, store, folder)
        if processed_stats_json_path is not None:
            write_json(processed_stats_json_path, self.stats)

    @classmethod
    def over(cls, retro: ChunkedLM, store: Store) -> "TrainingWrapper":
        """Wrap an existing store: `TrainingWrapper.over(RETRO(max_seq_len=512), Store.open("my_store"))`.

        The model's chunk_size and max_seq_len must be the store's, its vocabulary at least as large, its padding the
        same; a RETROfit must have the store's tokenizer. Whether a RETRO was trained with it, nobody can tell.

        Raises:
            TypeError: `retro` is neither a RETRO nor made by `retrofit`.
            ValueError: model and store do not match.
        """
        cls._check(retro, store.settings.chunk_size)
        if retro.seq_len != store.settings.seq_len:
            raise ValueError(
                f"the model reads {retro.seq_len} tokens, the store's sequences have {store.settings.seq_len}: make "
                f"them equal"
            )
        cls._check_tokenizer(retro, store.tokenizer.size, store.tokenizer.ids.pad, store.tokenizer.fingerprint)
        wrapper = cls.__new__(cls)
        nn.Module.__init__(wrapper)
        wrapper._tie(retro, store, store.folder)
        return wrapper

    def _tie(self, retro: ChunkedLM, store: Store, work_dir: Path) -> None:
        self.retro, self.store, self.ds, self.retriever = retro, store, store.dataset(), store.retriever()
        self.chunk_size, self.max_seq_len, self.bert = retro.chunk_size, retro.seq_len, store.settings.bert
        self.stats, self.kept_out, self.tokenizer = store.stats, store.kept_out, store.tokenizer
        self.work_dir = work_dir
        self.fetch_knn_chunks_fn = self.retriever.fetch

    @staticmethod
    def _check(retro: nn.Module, chunk_size: int) -> None:
        if not isinstance(retro, ChunkedLM):
            raise TypeError(f"retro is a {type(retro).__name__}: pass a retro_nb.RETRO, or what retrofit(…) returns")
        if chunk_size != retro.chunk_size:
            raise ValueError(f"chunk_size {chunk_size}, but the model was made for {retro.chunk_size}: make them equal")

    @staticmethod
    def _check_tokenizer(retro: ChunkedLM, size: int, pad: int, fingerprint: str | None = None) -> None:
        own = retro.tokenizer
        if own is not None and own.fingerprint != fingerprint:
            raise ValueError(
                f"the model has a tokenizer of its own ({own.size} ids), this one is another ({size} ids): leave "
                f"tokenizer out, or pass the model's, as in StoreSettings(tokenizer=model.tokenizer)"
            )
        if retro.num_tokens < size or retro.pad_id != pad:
            raise ValueError(
                f"the model knows {retro.num_tokens} tokens and pads with {retro.pad_id}, the tokenizer gives {size} "
                f"and pads with {pad}: make it with RETRO(num_tokens={size}, pad_id={pad}, …)"
            )

    def forward(self, seq: Int[Tensor, "b n"], retrieved: Tensor | None = None, return_loss: bool = False) -> Tensor:
        """The model's forward pass."""
        return self.retro(seq, retrieved, return_loss)

    # training

    def get_dataloader(self, **kwargs: Any) -> DataLoader:
        """A DataLoader over `.ds`; keyword arguments are DataLoader's."""
        return DataLoader(self.ds, **kwargs)

    def get_optimizer(self, **kwargs: Any) -> torch.optim.AdamW:
        """AdamW over the model's parameters; keyword arguments are those of `training.get_optimizer`."""
        return get_optimizer(self.retro.parameters(), **kwargs)

    def fit(self, *, valid_share: float | int | None = None, **kwargs: Any) -> History:
        """Train the model on this corpus.

        Args:
            valid_share: share of the documents held out of training for the validation loss; 0 for none. By
                default, the documents that the database keeps out; if there are none, a tenth of all. That tenth
                stays in the database: training documents may retrieve it.
            **kwargs: `steps` or `epochs`, and other arguments of `training.fit`.

        Returns:
            The log: one record per step.
        """
        documents = self.held_out(valid_share, kwargs.get("seed", 0))
        if not documents:
            return fit(self.retro, self.ds, None, **kwargs)
        train, valid = without_documents(self.ds, documents), of_documents(self.ds, documents)
        return fit(self.retro, train, valid, **kwargs)

    def held_out(self, valid_share: float | int | None = None, seed: int = 0) -> list[int]:
        """The documents that `fit` holds out for this share and seed."""
        if valid_share == 0:
            return []
        if valid_share is None and self.kept_out:
            return self.kept_out
        return hold_out(np.arange(self.stats["docs"]), valid_share or 0.1, seed).tolist()

    # sampling

    def generate(
        self,
        start: Int[Tensor, "b n"] | None = None,
        retrieved: Int[Tensor, "b l k r"] | None = None,
        filter_fn: Callable = top_k,
        filter_thres: float | int = 0.9,
        temperature: float | int = 1.0,
        *,
        exclude: Sequence[DocumentName] = (),
        on_retrieved: Callable[[int, Distances, Neighbours], object] | None = None,
        **options: Any,
    ) -> Int[Tensor, "b n_out"]:
        """Sample from the model, retrieving for every chunk as it is completed.

        Args:
            start: prompts; by default only the token that opens a document.
            retrieved: neighbours of the prompt's complete chunks, used instead of retrieving them.
            filter_fn, filter_thres, temperature: `top_k` or `top_p`, the share that it filters out, and the
                temperature of the rest (0: the likeliest token).
            exclude: numbers or titles of documents that must not be retrieved, e.g. the prompt's document.
            on_retrieved: called with a chunk's number and, for each row, the distances and ids found for it.
            **options: `max_new_tokens`, `generator`, `prompt_lengths`, `on_token` of `sampling.generate`.

        Returns:
            Prompts and samples, at most n tokens; a row ends with the token that closes a document, then padding.
        """
        if start is None:
            start = torch.full((1, 1), self.tokenizer.ids.sos)
        self.retriever.excluded(exclude)  # rejects an unknown document now, not after the first chunk

        def fetch(chunk: Tensor, u: int) -> Tensor:
            distances, ids = self.retriever.nearest(chunk, exclude)
            if on_retrieved is not None:
                on_retrieved(u, distances, ids)
            return self.retriever.tokens(ids)

        return generate(
            self.retro,
            start,
            fetch,
            retrieved=retrieved,
            filter_fn=filter_fn,
            filter_thres=filter_thres,
            temperature=temperature,
            eos_id=self.tokenizer.ids.eos,
            **options,
        )

    def generate_text(
        self,
        prompt: str = "",
        *,
        exclude: Sequence[DocumentName] = (),
        end_chunk: bool = False,
        on_text: Callable[[str], object] | None = None,
        **options: Any,
    ) -> Generation:
        """Continue a prompt, and report for each chunk what was retrieved and from which document.

        Args:
            prompt: the beginning of the text.
            exclude: numbers or titles of documents that must not be retrieved.
            end_chunk: pad before the prompt so that it ends with a chunk. Then even the first word written after a
                short prompt reads the neighbours retrieved for it (see `sampling.left_pad`).
            on_text: called with the text so far after each token, for streaming.
            **options: those of `generate` except `on_token` and `on_retrieved`. Chunks covered by `retrieved`, and a
                last chunk that no token follows, have no neighbours in the result.

        Raises:
            ValueError: `end_chunk` is set for a model that would read the padding as text, as a RETRO does.
        """
        start = tokenize(prompt, tokenizer=self.tokenizer)[:, :-1]  # without the token that closes a document
        if end_chunk:
            if not self.retro.hides_padding:
                raise ValueError("end_chunk puts padding before the prompt, which a RETRO would read: use a RETROfit")
            start = left_pad(start, self.chunk_size, self.retro.pad_id)
        written, found = start[0].tolist(), {}

        def stream(position: int, tokens: Tensor) -> None:
            written.append(int(tokens[0]))
            if on_text is not None:
                on_text(decode(written, tokenizer=self.tokenizer))

        def note(u: int, distances: Distances, ids: Neighbours) -> None:
            found[u] = distances[0], ids[0]

        on_token = None if on_text is None else stream  # reading a token makes a GPU wait
        row = self.generate(start, exclude=exclude, on_token=on_token, on_retrieved=note, **options)[0].cpu()
        text = decode(row, tokenizer=self.tokenizer)
        return Generation(text, tuple(row.tolist()), self.retriever.annotate(row, found))
