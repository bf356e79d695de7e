"""The CUDA renderer: gsplat (Ye et al. 2024), all views of all scenes in one call.

Written against gsplat 1.5.3 and checked against its Python side; its kernels have not been run here. The
shapes are [..., N, 3] for Gaussians and [..., C, 4, 4] for cameras, with our B for `...`. gsplat normalises
quaternions, which our Gaussians may rely on not to happen: hence `covars=`, which makes it ignore `quats` and
`scales`.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from ouroboros3d.cameras import Cameras
from ouroboros3d.errors import UserError
from ouroboros3d.gaussians import Gaussians
from ouroboros3d.interfaces import Rendering
from ouroboros3d.rendering.rules import RULES, Rules

VERSION = "1.5"  # whose largest alpha, 0.999, is in RULES["gsplat"]; 1.6 has another
LIBRARY = "gsplat_cuda"  # that gsplat compiles at its first use on a machine
FAR = 1e10  # gsplat's own default; it compiles with fast math, where infinities are not safe


class RendererError(UserError, ImportError):
    """gsplat cannot render here; the message is one line."""


def load_kernels() -> None:
    """Imports gsplat's CUDA kernels, so that what is missing shows before models are loaded. Raises RendererError.

    The first import on a machine compiles them, which takes minutes. gsplat deletes the build folder and its lock
    before it compiles, in every process: a lock of our own lets one process in at a time.
    """
    if importlib.util.find_spec("gsplat") is None:
        raise RendererError("rendering on CUDA needs gsplat: pip install gsplat==1.5.3, or use --device cpu")
    found = getattr(importlib.import_module("gsplat"), "__version__", VERSION)
    if not found.startswith(VERSION):
        raise RendererError(f"gsplat {found} blends by other rules than {VERSION}: pip install gsplat==1.5.3")
    from torch.utils import cpp_extension  # half a second, which a CPU need not wait for

    folder = Path(cpp_extension._get_build_directory(LIBRARY, verbose=False))
    with FileLock(folder.parent / f"{LIBRARY}.ouroboros3d.lock"):
        if importlib.util.find_spec("gsplat.csrc") is None and not (folder / f"{LIBRARY}.so").exists():
            _check_compiler()
            print(f"gsplat compiles its CUDA kernels once, in {folder}; this takes minutes", file=sys.stderr)
        try:
            kernels = importlib.import_module("gsplat.cuda._backend")._C
        except Exception as error:  # torch's, ninja's and the linker's own
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise RendererError(f"gsplat's kernels do not load ({reason}): delete {folder} and try again") from error
    if kernels is None:
        raise RendererError(_no_compiler())


def _check_compiler() -> None:
    """Raises RendererError if there is no nvcc, or one of another CUDA than torch's."""
    from torch.utils import cpp_extension

    home = cpp_extension._find_cuda_home()
    nvcc = Path(home or "") / "bin" / "nvcc"
    if home is None or not nvcc.is_file():
        raise RendererError(_no_compiler())
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", text)
    wanted = torch.version.cuda
    if release and wanted and release[1] != wanted.split(".")[0]:
        raise RendererError(
            f"{nvcc} is of CUDA {release[1]}.{release[2]} and torch {torch.__version__} of CUDA {wanted}: gsplat's "
            f"kernels would not load; set CUDA_HOME to a CUDA {wanted} toolkit, or install a torch built for "
            f"CUDA {release[1]}"
        )


def _no_compiler() -> str:
    return (
        f"gsplat compiles its kernels with nvcc, and there is none: install the CUDA {torch.version.cuda} toolkit and "
        "set CUDA_HOME to it, or use --device cpu"
    )


def rasterize(
    gaussians: Gaussians, cameras: Cameras, size: int, background: Tensor, rules: Rules, near: float, far: float
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
