"""Cross-Attention Multi-Scale Vision Transformer, ICCV 2021, arXiv:2103.14899.

Throughput is that of Tables 2 and 4: images/s of a V100 at batch 64.
"""

from xattn_ops.papers.table import Paper, cut, differs, row, without_embeddings

_ALL_ATTENTION = (
    "equation 2 as it stands, whose MACs agree, has 26.9 M; the paper's further 0.28 M a stage "
    "take part in hardly any product, and it does not describe them"
)
_TWICE = (
    "5.6 is what a second cross-attention costs that is handed the class token alone; ours gets "
    "the patches too, as section 3.3 describes the module"
)
_480 = {"img_size": 480}

PAPER = Paper(
    "crossvit",
    "CrossViT",
    (
        row("2", "Ti", "crossvit_tiny", without_embeddings("6.9"), "1.6", throughput=1668),
        row("2", "9", "crossvit_9", "8.6", "1.8", throughput=1530),
        row("2", "9†", "crossvit_9_dagger", "8.8", "2.0", throughput=1463),
        row("2", "S", "crossvit_small", without_embeddings("26.7"), "5.6", throughput=690),
        row("2", "15", "crossvit_15", without_embeddings("27.4"), "5.8", throughput=640),
        row("2", "15†", "crossvit_15_dagger", "28.2", "6.1", throughput=626),
        row("2", "B", "crossvit_base", without_embeddings("104.7"), "21.2", throughput=239),
        row("2", "18", "crossvit_18", "43.3", "9.0", throughput=430),
        row("2", "18†", "crossvit_18_dagger", "44.3", "9.5", throughput=418),
        row("3", "15", "crossvit_15", without_embeddings("27.4"), "5.8"),
        row("3", "15†", "crossvit_15_dagger", "28.2", "6.1"),
        row("3", "18", "crossvit_18", "43.3", "9.0"),
        row("3", "18†", "crossvit_18_dagger", "44.3", "9.5"),
        row("4", "15", "crossvit_15", without_embeddings("27.4"), "5.8", throughput=640),
        row("4", "15†", "crossvit_15_dagger", "28.2", "6.1", throughput=626),
        row("4", "15†@384", "crossvit_15_dagger_384", "28.5", "21.4", side=384, throughput=158),
        row("4", "18", "crossvit_18", "43.3", "9.03", throughput=430),
        row("4", "18†", "crossvit_18_dagger", "44.3", "9.5", throughput=418),
        row("4", "18†@384", "crossvit_18_dagger_384", "44.6", "32.4", side=384, throughput=112),
        row("4", "18†@480", "crossvit_18_dagger", "44.9", "56.6", _480, side=480, throughput=57),
        row("6", "S, none", "crossvit_small", "23.7", "5.3", {"fusion": "none"}),
        row(
            "6",
            "S, all-attention",
            "crossvit_small",
            differs("27.7", _ALL_ATTENTION),
            "7.6",
            {"fusion": "all_attention"},
        ),
        row("6", "S, class token", "crossvit_small", "24.2", "5.4", {"fusion": "class_token"}),
        row("6", "S, pairwise", "crossvit_small", "24.2", "5.5", {"fusion": "pairwise"}),
        row("6", "S, cross-attention", "crossvit_small", without_embeddings("26.7"), "5.6"),
        row("7", "S", "crossvit_small", without_embeddings("26.7"), "5.6"),
        row(
            "7",
            "A: patches 8, 16",
            "crossvit_small",
            without_embeddings("26.7"),
            "6.7",
            {"patches": (8, 16)},
        ),
        row(
            "7",
            "B: widths 384, 384",
            "crossvit_small",
            without_embeddings("31.4"),
            "7.7",
            {"dims": (384, 384)},
        ),
        row(
            "7", "C: N = 2", "crossvit_small", without_embeddings("28.0"), "6.3", {"depths": (2, 4)}
        ),
        row(
            "7",
            "D: L = 2",
            "crossvit_small",
            without_embeddings("28.9"),
            differs("5.6", _TWICE),
            {"fusion_depth": 2},
        ),
        row(
            "7",
            "E: K = 6, M = 2",
            "crossvit_small",
            cut(without_embeddings("31.1")),
            "6.6",
            {"stages": 6, "depths": (1, 2)},
        ),
    ),
    notes=(
        "Table 7, and some cells of the others, leave class tokens and position embeddings out.",
        "† three convolutions in place of the linear patch embedding.",
    ),
)
