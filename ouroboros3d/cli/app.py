"""The web app: drop a picture, watch every step of the recursion, turn the object, download it.

    ouroboros3d app
    ./run.sh app --port 7861
    python scripts/app.py --config configs/baseline.yaml --ckpt path/to/checkpoint --device cuda

It answers only on this machine (127.0.0.1) unless --host says otherwise. There is no login, so do not open it to an
untrusted network. Needs the extra `app` (Gradio). Ctrl-C stops it and removes everything that it wrote.
"""

from __future__ import annotations

import argparse
import threading
import webbrowser

from ouroboros3d.cli.options import ConfigParser, say_loading
from ouroboros3d.config.loading import load_config
from ouroboros3d.files import locate


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = ConfigParser(__doc__)
    parser.add_checkpoint()
    parser.add_device()
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all networks (default: %(default)s)")
    add("--port", type=int, default=7860, help="port, 1 to 65535 (default: %(default)s)")
    add("--limit_mb", type=int, default=20, help="largest upload in megabytes (default: %(default)s)")
    add("--open", action="store_true", help="open a browser")
    options = parser.parse_args(arguments)
    if not 1 <= options.port <= 65535:
        parser.error(f"--port {options.port} does not lie in 1 .. 65535")
    if options.limit_mb < 1:
        parser.error(f"--limit_mb {options.limit_mb} must be positive")
    return options


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    config = load_config(options.config, options.overrides)
    from ouroboros3d.app.port import check_gradio, check_port

    check_port(options.host, options.port)
    check_gradio()
    say_loading()
    from ouroboros3d.app.server import serving
    from ouroboros3d.pipeline import Ouroboros3DPipeline

    pipeline = Ouroboros3DPipeline.from_config(config, options.device, options.dtype)
    examples = sorted(path for path in locate("testset").glob("*") if path.suffix in (".webp", ".jpg", ".png"))
    with serving(pipeline, examples, options.host, options.port, options.limit_mb) as address:
        print(f"the app is at {address} (Ctrl-C stops it)", flush=True)
        if options.open:
            webbrowser.open(address)
        threading.Event().wait()
