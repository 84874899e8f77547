"""Co-Scale Conv-Attentional Image Transformers, ICCV 2021, arXiv:2104.06399."""

from xattn_ops.papers.table import Paper, cut, row, with_elementwise

_NO_RELATIVE = {"conv_relative": False}
_NO_POSITION = {"conv_position": False}

PAPER = Paper(
    "coat",
    "CoaT",
    (
        row("1", "CoaT-Lite Tiny", "coat_lite_tiny", "5.7", None),
        row("1", "CoaT-Lite Mini", "coat_lite_mini", "11", None),
        row("1", "CoaT-Lite Small", "coat_lite_small", "20", None),
        row("1", "CoaT Tiny", "coat_tiny", "5.5", None),
        row("1", "CoaT Mini", "coat_mini", "10", None),
        row("2", "CoaT-Lite Tiny", "coat_lite_tiny", "5.7", "1.6"),
        row("2", "CoaT Tiny", "coat_tiny", "5.5", with_elementwise("4.4")),
        row("2", "CoaT-Lite Mini", "coat_lite_mini", "11", "2.0"),
        row("2", "CoaT Mini", "coat_mini", "10", "6.8"),
        row("2", "CoaT-Lite Small", "coat_lite_small", "20", with_elementwise("4.0")),
        row(
            "5",
            "Lite Tiny, neither encoding",
            "coat_lite_tiny",
            None,
            None,
            _NO_POSITION | _NO_RELATIVE,
        ),
        row("5", "Lite Tiny, Conv-Rel-Pos", "coat_lite_tiny", None, None, _NO_POSITION),
        row("5", "Lite Tiny, Conv-Pos", "coat_lite_tiny", None, None, _NO_RELATIVE),
        row("5", "Lite Tiny, both", "coat_lite_tiny", None, None),
        row("6", "Lite Tiny w/o relative", "coat_lite_tiny", cut("5.6"), "1.6", _NO_RELATIVE),
        row("6", "CoaT Tiny w/o relative", "coat_tiny", "5.5", "4.3", _NO_RELATIVE),
        row("6", "CoaT-Lite Tiny", "coat_lite_tiny", "5.7", "1.6"),
        row("6", "CoaT Tiny", "coat_tiny", "5.5", with_elementwise("4.4")),
        row("6", "Lite Mini w/o relative", "coat_lite_mini", "11", cut("1.9"), _NO_RELATIVE),
        row("6", "CoaT Mini w/o relative", "coat_mini", "10", "6.7", _NO_RELATIVE),
        row("6", "CoaT-Lite Mini", "coat_lite_mini", "11", "2.0"),
        row("6", "CoaT Mini", "coat_mini", "10", "6.8"),
        row("6", "Lite Small w/o relative", "coat_lite_small", cut("19"), "3.9", _NO_RELATIVE),
        row("6", "CoaT-Lite Small", "coat_lite_small", "20", with_elementwise("4.0")),
        row("7", "w/o co-scale", "coat_tiny", "5.5", with_elementwise("4.4"), {"co_scale": "none"}),
        row(
            "7",
            "direct cross-layer",
            "coat_tiny",
            "5.5",
            with_elementwise("4.8"),
            {"co_scale": "direct"},
        ),
        row("7", "feature interpolation", "coat_tiny", "5.5", with_elementwise("4.4")),
    ),
    notes=(
        "The paper does not say how it counts; products and convolutions, plus 5 for each element "
        "of a LayerNorm and 1 for each of a GELU, print every GMAC cell as it has it but one, "
        "which is cut off.",
        "Table 5 prints accuracies alone.",
    ),
)
