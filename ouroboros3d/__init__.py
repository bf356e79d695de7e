"""Ouroboros3D: image-to-3D generation by 3D-aware recursive diffusion (Wen et al., CVPR 2025)."""

import logging

__version__ = "0.1.0"

# Importing SVD's pipeline, of which only the image resize is used, would warn about image processors.
logging.getLogger("transformers.utils.import_utils").addFilter(lambda record: "torchvision" not in record.getMessage())
