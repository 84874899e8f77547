"""CabViT: Cross Attention among Blocks for Vision Transformer, Zhang, Hu and Wang, 2022."""

from typing import Any

from xattn_ops.papers.table import Paper, differs, row

_MORE = (
    "the official code counts {} G, {} G less what it spends on queries of digests that nobody "
    "reads; what else the paper counts it does not say, and its LayerNorms and GELUs are 0.01 G"
)
_L1, _L2 = _MORE.format("1.37", "1.36"), _MORE.format("3.60", "3.57")
_OTHERWISE = (
    "table 4 counts otherwise than tables 1 and 2, which print 1.2 for the ConvNeXt-T of half the "
    "width that it gives 1.06, and does not say how"
)
_STEP = (
    _OTHERWISE + "; digests cost 0.09 G here and 0.05 G there: either their attention or their "
    "keys and values are not in it"
)
_PARAMS = (
    "10.43 M with ConvNeXt's stem and downsampling, 10.35 M with the hybrids'; the paper does not "
    "say which these rows have, nor what else"
)

# Table 4 goes from ConvNeXt-T to CabViT-H-L1; rows 1 to 5 are half as wide.
_FULL: dict[str, Any] = {
    "dims": (96, 192, 384, 768),
    "depths": (3, 3, 9, 3),
    "embed": "patch",
    "digests": False,
    "tme": False,
}
_HALF = _FULL | {"dims": (48, 96, 192, 384)}
CHAIN = (
    _FULL | {"attention": "none"},
    _HALF | {"attention": "none"},
    _HALF | {"attention": "window"},
    _HALF,
    _HALF | {"digests": True, "digest_scale": False},
    _HALF | {"digests": True},
)
_OTHERS = ("10.5", _PARAMS)

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
        row("4", "0: ConvNeXt-T", "cabvit_h_l1", "29", "4.5", CHAIN[0]),
        row(
            "4", "1: of half the width", "cabvit_h_l1", "7.4", differs("1.06", _OTHERWISE), CHAIN[1]
        ),
        row(
            "4",
            "2: window attention",
            "cabvit_h_l1",
            differs(*_OTHERS),
            differs("1.38", _OTHERWISE),
            CHAIN[2],
        ),
        row(
            "4",
            "3: global attention",
            "cabvit_h_l1",
            differs(*_OTHERS),
            differs("1.47", _OTHERWISE),
            CHAIN[3],
        ),
        row("4", "4: digests", "cabvit_h_l1", differs(*_OTHERS), differs("1.52", _STEP), CHAIN[4]),
        row(
            "4",
            "5: scale factors",
            "cabvit_h_l1",
            differs(*_OTHERS),
            differs("1.52", _STEP),
            CHAIN[5],
        ),
        row("4", "6: CabViT-H-L1", "cabvit_h_l1", "6.2", differs("1.46", _L1)),
        row("4", "7: CabViT-H-L2", "cabvit_h_l2", "16.3", differs("3.9", _L2)),
    ),
    notes=("Rows 0 to 5 of table 4 are options of the hybrid models.",),
)
