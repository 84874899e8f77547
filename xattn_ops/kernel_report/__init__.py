"""What the compilers make of the kernels: ``python -m xattn_ops kernels``. Needs no GPU.

cards     what architectures allow
triton    compiled ahead of time, at the shapes of the papers
cuda      read from the built library
command   the command, and its tables
"""

from xattn_ops.kernel_report.cards import CARDS
from xattn_ops.kernel_report.triton import CALLS, DTYPES

__all__ = ["CALLS", "CARDS", "DTYPES"]
