"""What the papers print of their own models, row by row, beside what is counted here.

cat, cabvit, coat, crossvit   the figures of each paper's tables, and why a cell differs
table                         what a row is
measure                       parameters and MACs of a row's model
verdict                       whether a cell agrees to the printed digits
operators                     the closed forms of the operators beside their counts
command                       ``python -m xattn_ops flops``

The papers print multiply-accumulates (MACs) and call them FLOPs; so do the names here say MACs.
"""

from xattn_ops.papers import cabvit, cat, coat, crossvit
from xattn_ops.papers.measure import Measured, measure
from xattn_ops.papers.table import Cell, Paper, Row
from xattn_ops.papers.verdict import Verdict, judge

PAPERS = (cat.PAPER, cabvit.PAPER, coat.PAPER, crossvit.PAPER)

__all__ = ["PAPERS", "Cell", "Measured", "Paper", "Row", "Verdict", "judge", "measure"]
