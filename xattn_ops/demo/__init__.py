"""A real photo through a model: ``python -m xattn_ops demo``.

photo      the image as a tensor and as a picture
attention  attention maps in plain PyTorch, from a module and what entered it
measure    agreement with float64, MACs and latency of each operator on the photo's activations
pictures   the PNGs
command    the order of it all, and what is printed
"""

from xattn_ops.demo.command import run

__all__ = ["run"]
