"""The reference implementation, retro-pytorch 0.3.9, made to run beside this project.

It is measured as it is. Only what keeps it from running at all is stood in for: it imports autofaiss, which
wants an old NumPy, and it fetches its BERT from torch.hub.
"""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def import_reference() -> ModuleType:
    """`retro_pytorch`, whether or not autofaiss is installed (`pip install --no-deps retro-pytorch==0.3.9`)."""
    try:
        import autofaiss  # noqa: F401
    except ImportError:
        stub = ModuleType("autofaiss")
        stub.build_index = None
        sys.modules["autofaiss"] = stub
    import retro_pytorch

    return retro_pytorch


def give_bert(folder: str | Path) -> Any:
    """Let the reference embed with the BERT in `folder` instead of torch.hub's bert-base-cased; return it."""
    from transformers import BertModel, BertTokenizerFast

    import_reference()
    from retro_pytorch import retrieval

    retrieval.TOKENIZER = BertTokenizerFast.from_pretrained(folder)
    retrieval.MODEL = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    return retrieval.MODEL
