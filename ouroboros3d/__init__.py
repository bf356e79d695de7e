"""Ouroboros3D: image-to-3D generation by 3D-aware recursive diffusion (Wen et al., CVPR 2025)."""

import logging
import sys
from typing import TYPE_CHECKING, Any

if sys.version_info < (3, 10):  # noqa: UP036 - before anything is imported that such a Python cannot parse
    sys.exit("error: Python 3.10 or newer is needed, this is %d.%d" % sys.version_info[:2])  # noqa: UP031

if TYPE_CHECKING:
    from ouroboros3d.pipeline import Ouroboros3DPipeline

__version__ = "0.1.0"
__all__ = ["Ouroboros3DPipeline"]

# Importing SVD's pipeline, of which only the image resize is used, would warn about image processors.
logging.getLogger("transformers.utils.import_utils").addFilter(lambda record: "torchvision" not in record.getMessage())


def __getattr__(name: str) -> Any:
    """`Ouroboros3DPipeline`, imported when it is asked for: torch and diffusers take seconds."""
    if name == "Ouroboros3DPipeline":
        from ouroboros3d.pipeline import Ouroboros3DPipeline

        return Ouroboros3DPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
