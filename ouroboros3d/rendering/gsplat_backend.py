"""The CUDA renderer: gsplat (Ye et al. 2024), all views of all scenes in one call.

Written against gsplat 1.5.3 and checked against its Python side; its kernels have not been run here. The
shapes are [..., N, 3] for Gaussians and [..., C, 4, 4] for cameras, with our B for `...`. gsplat normalises
quaternions, which our Gaussians may rely on not to happen: hence `covars=`, which makes it ignore `quats` and
`scales`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ouroboros3d.cameras import Cameras
from ouroboros3d.gaussians import Gaussians
from ouroboros3d.interfaces import Rendering
from ouroboros3d.rendering.rules import RULES, Rules

FAR = 1e10  # gsplat's own default; it compiles with fast math, where infinities are not safe


def rasterize(
    gaussians: Gaussians,
    cameras: Cameras,
    size: int,
    background: Tensor,
    rules: Rules,
    near: float,
    far: float,
) -> Rendering:
    """See `rendering.render`; float32 whatever the input.

    It follows RULES["gsplat"], which is compiled in. That also serves for `exact`: they differ where an alpha
    exceeds 0.99. `release` cuts visibly more and is refused.
    """
    if rules == RULES["release"]:
        raise ValueError("gsplat cannot follow the release's extents; use rules='gsplat' or backend='cpu'")
    try:
        from gsplat import rasterization
    except ImportError as error:
        raise ImportError(
            "rendering on CUDA needs gsplat: pip install gsplat==1.5.3 (it compiles its kernels at the first "
            "use, with the nvcc of CUDA_HOME). Without it, move Gaussians and cameras to the CPU"
        ) from error

    if gaussians.means.shape[1] == 0:  # gsplat fails on empty buffers; one of opacity 0 leaves no trace
        gaussians = Gaussians(*(x.new_zeros(len(x), 1, *x.shape[2:]) for x in vars(gaussians).values()))
    gaussians, cameras = gaussians.to(torch.float32), cameras.to(torch.float32)
    K = cameras.K.clone()
    K[..., :2, :] *= size  # image widths to pixels
    images, alphas, _ = rasterization(
        means=gaussians.means.contiguous(),
        quats=None,
        scales=None,
        opacities=gaussians.opacities.contiguous(),
        colors=gaussians.rgb.contiguous(),
        viewmats=cameras.w2c.contiguous(),
        Ks=K.contiguous(),
        width=size,
        height=size,
        near_plane=near,
        far_plane=min(far, FAR),
        radius_clip=0.0,
        eps2d=rules.blur,
        packed=False,
        tile_size=rules.tile,
        render_mode="RGB+D",  # D is the accumulated depth, ED the expected one
        rasterize_mode="classic",
        covars=gaussians.covariances().contiguous(),
    )
    images, alpha = images.movedim(-1, 2), alphas.movedim(-1, 2)
    rgb, depth = images.split([3, 1], dim=2)
    return Rendering(rgb + (1 - alpha) * background.float()[:, None, None], depth, alpha)
