"""Ouroboros3D: image-to-3D generation by 3D-aware recursive diffusion (Wen et al., CVPR 2025)."""

__version__ = "0.1.0"
