"""Fixtures that several test modules use."""

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test asks the network
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core; and no warning about forks in DataLoader workers
# The programs that tests start find what lies beside this file, as the tests do (`pythonpath` in pyproject.toml).
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from retro_nb.text.document import Document
from retro_nb.text.tokens import bert_folder, train_tokenizer


def pytest_configure() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables that change what the package does are not inherited from the caller's shell."""
    for name in ("REPROCESS", "RETRO_NB_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random BERT of width 32 and the default BERT's vocabulary: real code, no time."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny_bert")
    config = BertConfig(
        vocab_size=30522,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=512,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    for file in Path(bert_folder()).glob("*token*.json"):
        shutil.copy(file, folder)
    shutil.copy(Path(bert_folder()) / "vocab.txt", folder)
    return folder


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with tokenizers as language models have them, of a few hundred entries.

    bpe      byte-level, as `train_tokenizer` makes it
    gpt2     the same with GPT-2's single special token, which opens and closes documents, and no padding
    llama3   byte-level, split by Llama 3's rule, no padding either
    llama2   SentencePiece's "▁" before the whole text: pieces of a text are not what the text is
    """
    texts = ["the people of every state --- and the union.. it's 1862, 12 345 !! \t\tthe  thé 中文 " * 3, "a b ab abab"]
    root = tmp_path_factory.mktemp("tokenizers")
    train_tokenizer(texts, root / "bpe", size=300, progress=False)
    changed = {
        "gpt2": {"bos_token": "<|end|>", "eos_token": "<|end|>"},
        "llama3": {"bos_token": "<|start|>", "eos_token": "<|end|>"},
    }
    for name, special in changed.items():
        (root / name).mkdir()
        about = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
        (root / name / "tokenizer_config.json").write_text(json.dumps(about))
        rules = json.loads((root / "bpe" / "tokenizer.json").read_text(encoding="utf-8"))
        if name == "llama3":
            by = {"type": "Split", "pattern": {"Regex": LLAMA_3}, "behavior": "Isolated", "invert": False}
            bytes_ = {**rules["pre_tokenizer"], "use_regex": False}
            rules["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [by, bytes_]}
        (root / name / "tokenizer.json").write_text(json.dumps(rules), encoding="utf-8")
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False))
    rules = json.loads(backend.to_str())
    rules["added_tokens"] = rules["added_tokens"][:3]  # bytes are text
    backend = Tokenizer.from_str(json.dumps(rules))
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(root / "llama2")
    return {name: root / name for name in ("bpe", "gpt2", "llama3", "llama2")}


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="session")
def assert_whole() -> Callable[[Callable], None]:
    """Draw a figure in the house style; it must leave none open, and have nothing beyond its edges."""
    from matplotlib import pyplot as plt
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from retro_nb.plotting import use_style

    def check(draw: Callable) -> None:
        with plt.rc_context():
            use_style()
            figure = draw()
            assert not plt.get_fignums()
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
        drawn, (width, height) = figure.get_tightbbox(canvas.get_renderer()), figure.get_size_inches()
        assert -0.02 <= drawn.x0 and -0.02 <= drawn.y0 and drawn.x1 <= width + 0.02 and drawn.y1 <= height + 0.02

    return check


@pytest.fixture
def sample_corpus() -> list[Document]:
    """Five documents of 9 to 400 words, words of one and of several pieces; the same each time."""
    words = "the people of every state shall prosper, and Commerce with foreign nations; antediluvian".split()
    lengths = [9, 64, 130, 400, 33]
    return [
        Document(" ".join(words[(i * i + d) % len(words)] for i in range(n)), f"document {d}", f"sample/{d}.txt")
        for d, n in enumerate(lengths)
    ]


@pytest.fixture(scope="session")
def run_apart() -> Callable[..., list[int]]:
    """Run a function in one or more processes of their own at once; return their exit codes.

    They are forks of a server that has imported the heavy modules once: real processes, at 0.1 s each.
    """
    context = multiprocessing.get_context("forkserver")
    heavy = ["pytest", "hypothesis", "retro_nb.store.embedding", "transformers.models.bert.modeling_bert"]
    context.set_forkserver_preload(heavy)

    def run(function: Callable, *args: object, processes: int = 1) -> list[int]:
        children = [context.Process(target=function, args=args) for _ in range(processes)]
        for child in children:
            child.start()
        for child in children:
            child.join(60)
        codes = [child.exitcode for child in children]
        for child in children:
            child.kill()
        return codes

    return run
