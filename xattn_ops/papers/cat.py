"""CAT: Cross Attention in Vision Transformer, arXiv:2106.05786."""

from xattn_ops.papers.table import Paper, differs, row

_SMALL = (
    "the official code counts 6.06 too; without the products of attention CAT-S would be 5.88, but "
    "then CAT-T and CAT-B would be 2.65 and 8.70, which the same table does not print"
)

PAPER = Paper(
    "cat",
    "CAT",
    (
        row("2", "CAT-T", "cat_tiny", "17", "2.8"),
        row("2", "CAT-S", "cat_small", "37", differs("5.9", _SMALL)),
        row("2", "CAT-B", "cat_base", "52", "8.9"),
    ),
)
