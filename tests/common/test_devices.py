"""Which attention kernels are allowed, seen where attention is computed."""

import pytest
import torch
import torch.nn.functional as F
from tiny_language_models import TOKENIZERS, language_model, move

from retro_nb import RETRO, retrofit
from retro_nb.common.devices import attention_kernels, few_cpu_threads

M, K = 64, 2
HEADS = dict(heads=2, dim_head=8)


@pytest.fixture
def seen(monkeypatch) -> list[tuple[int, int, bool, bool]]:
    """Of every attention that is computed: queries, keys, whether cuDNN is allowed, and whether other kernels are."""
    calls, compute = [], F.scaled_dot_product_attention

    def watch(q, k, *args, **options):
        backends = torch.backends.cuda
        others = backends.flash_sdp_enabled() and backends.mem_efficient_sdp_enabled() and backends.math_sdp_enabled()
        calls.append((q.shape[-2], k.shape[-2], backends.cudnn_sdp_enabled(), others))
        return compute(q, k, *args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    return calls


SIZES = [(0, 0), (128, 128), (256, 64), (64, 256), (128, 257), (1, 128), (2048, 2048)]


@pytest.mark.parametrize(("queries", "keys"), SIZES)
def test_cudnn_gets_whole_tiles_only(queries, keys):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with attention_kernels(queries, keys):
        assert torch.backends.cuda.cudnn_sdp_enabled() == (queries >= 128 and queries % 128 == 0 == keys % 128)
        assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_in_every_attention_of_retro(seen):
    retro = RETRO(
        num_tokens=50, max_seq_len=4 * M, enc_dim=8, enc_depth=1, dec_dim=8, dec_depth=1, dec_cross_attn_layers=(1,),
        chunk_size=M, **HEADS,
    )  # fmt: skip
    seq, retrieved = torch.randint(1, 50, (2, 4 * M)), torch.randint(1, 50, (2, 4, K, 2 * M))
    retro(torch.cat((seq, seq[:, :1]), dim=1), retrieved, return_loss=True).backward()
    sizes = {(queries, keys): cudnn for queries, keys, cudnn, _ in seen}
    assert sizes == {
        (4 * M, 4 * M): True,  # causal self-attention
        (2 * M, 2 * M): True,  # self-attention of a neighbour
        (K * 2 * M, M): False,  # the neighbours read their chunk
        (M, K * 2 * M + 1): False,  # an attending chunk reads its neighbours and the null key
    }
    assert all(others for *_, others in seen)


def test_a_language_model_gets_none_of_cudnns(seen, tokenizers):
    """Its masks and sizes are its own."""
    model = retrofit(
        language_model("gpt2", n_positions=128), start=2, every=2, chunk_size=16, enc_dim=8, enc_depth=1,
        tokenizer=str(tokenizers[TOKENIZERS["gpt2"]]), **HEADS,
    )  # fmt: skip
    move(model.reader)
    model(torch.randint(1, 300, (1, 128)), torch.randint(1, 300, (1, 8, K, 32)))
    own = [(queries, keys, cudnn) for queries, keys, cudnn, _ in seen if queries == keys == 128]
    assert own and not any(cudnn for *_, cudnn in own)


@pytest.mark.parametrize(("device", "before", "inside"), [("cpu", 6, 6), ("cuda", 6, 4), ("cuda", 1, 1)])
def test_few_cpu_threads_run_beside_a_gpu(device, before, inside):
    usual = torch.get_num_threads()
    try:
        torch.set_num_threads(before)
        with pytest.raises(KeyError), few_cpu_threads(torch.device(device)):
            assert torch.get_num_threads() == inside
            raise KeyError
        assert torch.get_num_threads() == before
    finally:
        torch.set_num_threads(usual)
