"""RETRO, the Retrieval-Enhanced Transformer (Borgeaud et al. 2021), from text to retrieval-augmented samples.

The names here follow the reference implementation, RETRO-pytorch 0.3.9; the notebooks explain them in order. README has
a map of the modules.
"""

from retro_nb.common.arrays import WORK
from retro_nb.lab.lesson import check, show, start
from retro_nb.model.retro import RETRO
from retro_nb.model.retrofit import RETROfit, retrofit
from retro_nb.model.sampling import generate, gumbel_sample, left_pad, top_k, top_p
from retro_nb.planning.scale import Plan
from retro_nb.planning.survey import Survey, survey
from retro_nb.reference import (
    chunks_to_embeddings_,
    chunks_to_index_and_embed,
    chunks_to_precalculated_knn_,
    documents_to_chunks_,
    knn_chunks_from_seq_chunks,
    text_folder_to_chunks_,
)
from retro_nb.store.dataset import RETRODataset, knn_to_retrieved_chunks
from retro_nb.store.embedding import bert_embed, embed_chunks
from retro_nb.store.index import build_index, exact_search, search
from retro_nb.store.knn import neighbours
from retro_nb.store.retrieval import Retriever
from retro_nb.store.settings import StoreSettings
from retro_nb.store.splits import split_by_document
from retro_nb.store.store import Store
from retro_nb.store.updating import update_store
from retro_nb.text.almanac import almanac
from retro_nb.text.docstrings import docstrings
from retro_nb.text.document import Document
from retro_nb.text.duplicates import near_duplicates
from retro_nb.text.files import jsonl, text_folder
from retro_nb.text.opening import open_corpus
from retro_nb.text.parts import parts
from retro_nb.text.sources import code
from retro_nb.text.speeches import speeches
from retro_nb.text.tables import hf_dataset, parquet
from retro_nb.text.tokens import EOS_ID, PAD_ID, SOS_ID, decode, get_tokenizer, tokenize, train_tokenizer
from retro_nb.training.training import evaluate_loss, fit, get_optimizer
from retro_nb.training.wrapper import TrainingWrapper

__version__ = "0.1.0"
__all__ = [
    "EOS_ID",
    "PAD_ID",
    "RETRO",
    "SOS_ID",
    "WORK",
    "Document",
    "Plan",
    "RETRODataset",
    "RETROfit",
    "Retriever",
    "Store",
    "StoreSettings",
    "Survey",
    "TrainingWrapper",
    "almanac",
    "bert_embed",
    "build_index",
    "check",
    "chunks_to_embeddings_",
    "chunks_to_index_and_embed",
    "chunks_to_precalculated_knn_",
    "code",
    "decode",
    "docstrings",
    "documents_to_chunks_",
    "embed_chunks",
    "evaluate_loss",
    "exact_search",
    "fit",
    "generate",
    "get_optimizer",
    "get_tokenizer",
    "gumbel_sample",
    "hf_dataset",
    "jsonl",
    "knn_chunks_from_seq_chunks",
    "knn_to_retrieved_chunks",
    "left_pad",
    "near_duplicates",
    "neighbours",
    "open_corpus",
    "parquet",
    "parts",
    "retrofit",
    "search",
    "show",
    "speeches",
    "split_by_document",
    "start",
    "survey",
    "text_folder",
    "text_folder_to_chunks_",
    "tokenize",
    "top_k",
    "top_p",
    "train_tokenizer",
    "update_store",
]
