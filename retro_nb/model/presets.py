"""The sizes and choices of the paper, as arguments of RETRO (notebook 04; paper, Tables 2 and 10)."""

EVERY_THIRD = (9, 12, 15, 18, 21, 24)
PRESETS = {
    "172M": dict(dec_dim=896, heads=16, dim_head=64, dec_depth=12, dec_cross_attn_layers=(6, 9, 12)),
    "425M": dict(dec_dim=1536, heads=12, dim_head=128, dec_depth=12, dec_cross_attn_layers=(6, 9, 12)),
    "1.5B": dict(dec_dim=2048, heads=16, dim_head=128, dec_depth=24, dec_cross_attn_layers=EVERY_THIRD),
    "7.5B": dict(dec_dim=4096, heads=32, dim_head=128, dec_depth=32, dec_cross_attn_layers=(*EVERY_THIRD, 27, 30, 32)),
}
# Shared by all sizes. The encoder: width 896, 16 heads of 64, 2 layers.
AS_IN_THE_PAPER = dict(
    enc_dim=896, enc_depth=2, enc_heads=16, enc_dim_head=64, enc_cross_attn_layers=(1,), chunk_size=64,
    separate_embeddings=True, absolute_positions=False, tied_output=True, project_encoded=False,
)  # fmt: skip
