"""Vision transformers built on the operators; their state has the official checkpoints' layout."""

from xattn_ops.models import cabvit as _cabvit  # noqa: F401  (registers its models)
from xattn_ops.models import cat as _cat  # noqa: F401
from xattn_ops.models import coat as _coat  # noqa: F401
from xattn_ops.models import crossvit as _crossvit  # noqa: F401
from xattn_ops.models.checkpoints import LoadReport, load_official
from xattn_ops.models.registry import create_model, list_models

__all__ = ["LoadReport", "create_model", "list_models", "load_official"]
