"""RETRO, the Retrieval-Enhanced Transformer (Borgeaud et al. 2021), from text to retrieval-augmented samples.

The names here follow the reference implementation, RETRO-pytorch 0.3.9; the notebooks explain them in order.
Data flows one way, from each module only to those below it in this list.
"""

from retro_nb.chunking import documents_to_chunks_, text_folder_to_chunks_
from retro_nb.corpus import Document, jsonl, parts, speeches, text_folder
from retro_nb.dataset import RETRODataset, knn_to_retrieved_chunks
from retro_nb.duplicates import near_duplicates
from retro_nb.embedding import bert_embed, chunks_to_embeddings_, embed_chunks
from retro_nb.index import build_index, exact_search, search
from retro_nb.knn import chunks_to_index_and_embed, chunks_to_precalculated_knn_, neighbours
from retro_nb.libraries import docstrings
from retro_nb.model import RETRO
from retro_nb.opening import open_corpus
from retro_nb.retrieval import Retriever, knn_chunks_from_seq_chunks
from retro_nb.retrofit import RETROfit, retrofit
from retro_nb.sampling import generate, gumbel_sample, left_pad, top_k, top_p
from retro_nb.scale import Plan
from retro_nb.sources import code
from retro_nb.survey import Survey, survey
from retro_nb.tables import hf_dataset, parquet
from retro_nb.tokens import EOS_ID, PAD_ID, SOS_ID, decode, get_tokenizer, tokenize, train_tokenizer
from retro_nb.towns import almanac
from retro_nb.training import evaluate_loss, fit, get_optimizer, split_by_document
from retro_nb.updating import update_store
from retro_nb.wrapper import TrainingWrapper

__version__ = "0.1.0"
__all__ = [
    "EOS_ID",
    "PAD_ID",
    "RETRO",
    "SOS_ID",
    "Document",
    "Plan",
    "RETRODataset",
    "RETROfit",
    "Retriever",
    "Survey",
    "TrainingWrapper",
    "almanac",
    "bert_embed",
    "build_index",
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
    "speeches",
    "split_by_document",
    "survey",
    "text_folder",
    "text_folder_to_chunks_",
    "tokenize",
    "top_k",
    "top_p",
    "train_tokenizer",
    "update_store",
]
