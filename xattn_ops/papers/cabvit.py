"""CabViT: Cross Attention among Blocks for Vision Transformer, Zhang, Hu and Wang, 2022."""

from xattn_ops.papers.table import Paper, differs, row

_MORE = (
    "the official code counts {} G, {} G less what it spends on queries of digests that nobody "
    "reads; what else the paper counts it does not say, and its LayerNorms and GELUs are 0.01 G"
)
_L1, _L2 = _MORE.format("1.37", "1.36"), _MORE.format("3.60", "3.57")

PAPER = Paper(
    "cabvit",
    "CabViT",
    (
        row("1", "CabViT-P-L0", "cabvit_p_l0", "5.9", None),
        row("1", "CabViT-H-L1", "cabvit_h_l1", "6.2", differs("1.5", _L1)),
        row("1", "CabViT-H-L2", "cabvit_h_l2", "16.3", differs("3.9", _L2)),
        row("2", "CabViT-P-L0", "cabvit_p_l0", "5.9", None),
        row("2", "CabViT-H-L1", "cabvit_h_l1", "6.2", differs("1.5", _L1)),
        row("2", "CabViT-H-L2", "cabvit_h_l2", "16.3", differs("3.9", _L2)),
        row("4", "6: CabViT-H-L1", "cabvit_h_l1", "6.2", differs("1.46", _L1)),
        row("4", "7: CabViT-H-L2", "cabvit_h_l2", "16.3", differs("3.9", _L2)),
    ),
)
