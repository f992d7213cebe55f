"""RETRO written out from the paper, one vector and one loop at a time, in float64.

Nothing here is fast and nothing is shared with retro_nb: a model lends its weights only. Indices count from 1
where the paper's do. What the paper leaves open (rotary positions, a null key, GELU) is as in the reference.
"""

import math

import torch
from torch import Tensor


@torch.no_grad()
def rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    return x / math.sqrt(sum(float(value) ** 2 for value in x) / len(x)) * gamma


def normalised(norm, x: Tensor) -> Tensor:
    """RMSNorm of one vector, with its gate if it has one."""
    out = rms_norm(x, norm.gamma)
    return out if norm.gate is None else out * torch.sigmoid(norm.gate * x)


@torch.no_grad()
def turned(vector: Tensor, position: int) -> Tensor:
    """Rotary position: feature i and feature i + half are the two coordinates of a plane."""
    dim = min(len(vector), 32)
    half, out = dim // 2, vector.clone()
    for i in range(half):
        angle = position / 10000 ** (2 * i / dim)
        point = complex(vector[i], vector[i + half]) * complex(math.cos(angle), math.sin(angle))
        out[i], out[i + half] = point.real, point.imag
    return out


@torch.no_grad()
def attention(weights, x: Tensor, position: int, context: list[tuple[Tensor, int]]) -> Tensor:
    """One query at a position; context: the visible vectors with their positions (eq. 4, per head)."""
    size, heads = weights.dim_head, []
    for h in range(weights.heads):
        rows = slice(h * size, (h + 1) * size)
        q = turned(weights.to_q.weight[rows] @ x, position)
        logits, values = [], []
        if weights.null_k is not None:
            logits.append(q @ weights.null_k[rows])
            values.append(weights.null_v[rows])
        for y, place in context:
            logits.append(q @ turned(weights.to_k.weight[rows] @ y, place))
            values.append(weights.to_v.weight[rows] @ y)
        exponentials = [math.exp(float(logit) / math.sqrt(size)) for logit in logits]
        heads.append(sum(e * v for e, v in zip(exponentials, values, strict=True)) / sum(exponentials))
    return weights.to_out.weight @ torch.cat(heads) + weights.to_out.bias


@torch.no_grad()
def feed_forward(weights, x: Tensor) -> Tensor:
    first, last = weights.net[0], weights.net[-1]
    inner = first.weight @ x + first.bias
    inner = torch.stack([value * 0.5 * (1 + math.erf(float(value) / math.sqrt(2))) for value in inner])
    return last.weight @ inner + last.bias


def attn(block, H: list[Tensor], causal: bool, visible: list[bool] | None = None) -> list[Tensor]:
    normed = [normalised(block.norm, h) for h in H]
    out = []
    for i, h in enumerate(H):
        context = [(y, j) for j, y in enumerate(normed) if (not causal or j <= i) and (visible is None or visible[j])]
        out.append(h + attention(block.fn, normed[i], i, context))
    return out


def ffw(block, H: list[Tensor]) -> list[Tensor]:
    return [h + feed_forward(block.fn, normalised(block.norm, h)) for h in H]


def cca(block, H: list[Tensor], E: dict, visible: dict, m: int) -> list[Tensor]:
    """CCA(H, E), eq. 3: token um+i−1 reads E_u with relative positions d(i, i') = i − i' + m − 1, eq. 6.

    E[u][j] lists the encoded tokens of neighbour j of chunk u, visible[u][j] which of them are not padding.
    The null key stands at 0, beside each neighbour's first token.
    """
    n, out = len(H), list(H)
    for u in range(1, n // m + 1):
        for i in range(1, m + 1):
            token = u * m + i - 1
            if token > n:
                continue
            first = 1 - 1 + m - 1  # d(1, 1): how far the first query stands behind each neighbour's first token
            context = [  # all neighbours in one softmax
                (y, place - 1)
                for neighbour, seen in zip(E[u], visible[u], strict=True)
                for place, (y, real) in enumerate(zip(neighbour, seen, strict=True), start=1)
                if real
            ]
            normed = normalised(block.norm, H[token - 1])
            out[token - 1] = H[token - 1] + attention(block.fn.attn, normed, first + i - 1, context)
    return out


def encode(encoder, neighbour: list[Tensor], visible: list[bool], H_u: list[Tensor]) -> list[Tensor]:
    """E_u^j = ENCODER(RET(C_u)^j, H_u), Algorithm 1; d_enc(i', i) = i' − i, eq. 7."""
    E = neighbour
    for layer in encoder.layers:
        E = attn(layer.attn, E, causal=False, visible=visible)
        if layer.cross_attn is not None:
            context = [(h, place) for place, h in enumerate(H_u)]
            cross = layer.cross_attn
            E = [e + attention(cross.fn, normalised(cross.norm, e), i, context) for i, e in enumerate(E)]
        E = ffw(layer.ff, E)
    E = [normalised(encoder.norm_out, e) for e in E]
    if isinstance(encoder.project_out, torch.nn.Linear):
        E = [encoder.project_out.weight @ e + encoder.project_out.bias for e in E]
    return E


@torch.no_grad()
def retro_logits(model, seq: Tensor, retrieved: Tensor | None = None) -> Tensor:
    """Algorithm 1 for one sequence (n,) with its neighbours (l, k, r), or RETRO[OFF] without them.

    `model` is a pre-norm retro_nb.RETRO in float64; returns the logits (n, v).
    """
    m = model.chunk_size
    P = [p for p, layer in enumerate(model.decoder.layers, start=1) if layer.cross_attn is not None]
    table = model.token_emb.weight
    H = [table[token] for token in seq]
    if model.pos_emb is not None:
        H = [h + model.pos_emb.weight[i] for i, h in enumerate(H)]
    if isinstance(model.to_dec_dim, torch.nn.Linear):
        H = [model.to_dec_dim.weight @ h + model.to_dec_dim.bias for h in H]

    E, visible = {}, {}
    enc_table = table if model.enc_token_emb is None else model.enc_token_emb.weight
    for p, layer in enumerate(model.decoder.layers, start=1):
        H = attn(layer.attn, H, causal=True)
        if retrieved is not None and p == min(P):
            for u in range(1, len(seq) // m + 1):
                RET = retrieved[u - 1]
                visible[u] = [[bool(token != model.pad_id) for token in neighbour] for neighbour in RET]
                E[u] = [
                    encode(model.encoder, [enc_table[token] for token in RET[j]], seen, H[(u - 1) * m : u * m])
                    if any(seen)
                    else [torch.zeros(layer.cross_attn.fn.attn.to_k.in_features).double()] * len(RET[j])
                    for j, seen in enumerate(visible[u])
                ]
        if retrieved is not None and p in P:
            H = cca(layer.cross_attn, H, E, visible, m)
        H = ffw(layer.ff, H)
    H = [normalised(model.decoder.norm_out, h) for h in H]
    return torch.stack([model.to_logits.weight @ h + model.to_logits.bias for h in H])


# RETROfit (section 4.2): the layers of a Hugging Face language model, with the same reading in some of them

PARTS = {  # of a layer, in the order in which a token passes through them
    "gpt2": ("ln_1", "attn", "ln_2", "mlp"),
    "llama": ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"),
}


@torch.no_grad()
def retrofit_logits(model, seq: Tensor, retrieved: Tensor | None = None) -> Tensor:
    """RETROfit for one sequence (n,) with its neighbours (l, k, r), or the language model without them.

    `model` is a retro_nb.RETROfit of a GPT-2 or Llama, in float64; returns the logits (n, v). Tokens of neighbours,
    and H_u, are normalised before the encoder reads them.
    """
    backbone, reader, m, n = model.backbone.base_model, model.reader, model.chunk_size, len(seq)
    later = torch.full((1, 1, n, n), -math.inf).double().triu(1)
    if model.backbone.config.model_type == "gpt2":
        table, layers, norm_out, about = backbone.wte.weight, backbone.h, backbone.ln_f, {}
        H = table[seq] + backbone.wpe.weight[:n]
    else:
        table, layers, norm_out = backbone.embed_tokens.weight, backbone.layers, backbone.norm
        H = table[seq]
        about = {"position_embeddings": backbone.rotary_emb(H, torch.arange(n)[None])}
    P = range(model.config["start"], len(layers) + 1, model.config["every"])

    def read_token(token: Tensor) -> Tensor:
        norm, linear = reader.embed
        word = table[token % len(table)]  # padding may be no word; nothing reads it
        return linear.weight @ normalised(norm, word) + linear.bias

    E, visible = {}, {}
    for p, layer in enumerate(layers, start=1):
        norm, attend, second_norm, feed = (getattr(layer, part) for part in PARTS[model.backbone.config.model_type])
        H = H + attend(norm(H)[None], attention_mask=later, **about)[0][0]
        if retrieved is not None and p in P:
            for u in range(1, n // m + 1) if p == min(P) else ():
                chunk = [normalised(reader.norm_chunk, h) for h in H[(u - 1) * m : u * m]]
                visible[u] = [[bool(token != model.pad_id) for token in neighbour] for neighbour in retrieved[u - 1]]
                E[u] = [
                    encode(reader.encoder, [read_token(token) for token in neighbour], seen, chunk)
                    if any(seen)
                    else [torch.zeros(reader.embed[1].out_features).double()] * len(neighbour)
                    for neighbour, seen in zip(retrieved[u - 1], visible[u], strict=True)
                ]
            H = torch.stack(cca(reader.cross_attn[str(p)], list(H), E, visible, m))
        H = H + feed(second_norm(H))
    return norm_out(H) @ model.backbone.lm_head.weight.T
