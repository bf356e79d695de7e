"""The web app: drop a picture, watch every step of the recursion, turn the object, download it.

    ouroboros3d app
    ./run.sh app --port 7861
    python scripts/app.py --config configs/baseline.yaml --ckpt path/to/checkpoint --device cuda

It answers on this machine alone (127.0.0.1) unless --host says otherwise; there is no login, so think before opening
it to a network. Needs the extra `app` (Gradio). Ctrl-C stops it and removes everything that it wrote.
"""

from __future__ import annotations

import argparse
import threading
import webbrowser

from ouroboros3d.cli.options import SMALL_CONFIG, Parser, say_loading
from ouroboros3d.config.checks import check_config
from ouroboros3d.config.loading import load_config
from ouroboros3d.config.schema import Config
from ouroboros3d.devices import DTYPE_NAMES
from ouroboros3d.files import locate


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options and the key=value arguments."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--config", default=SMALL_CONFIG, help="YAML file (default: configs/small.yaml)")
    add("--ckpt", metavar="FOLDER", help="weights (default: the config's)")
    add("--device", help="cpu, cuda, cuda:<number> or mps (default: what the machine has)")
    add("--dtype", choices=DTYPE_NAMES, help="default: float32 on a CPU, fp16 on CUDA")
    add("--host", default="127.0.0.1", help="address to answer on; 0.0.0.0 is every network (default: %(default)s)")
    add("--port", type=int, default=7860, help="1 to 65535 (default: %(default)s)")
    add("--limit_mb", type=int, default=20, help="largest upload in megabytes (default: %(default)s)")
    add("--open", action="store_true", help="open a browser")
    add("overrides", nargs="*", metavar="key=value", help="of the configuration")
    options = parser.parse_args(arguments)
    if not 1 <= options.port <= 65535:
        parser.error(f"--port {options.port} does not lie in 1 .. 65535")
    if options.limit_mb < 1:
        parser.error(f"--limit_mb {options.limit_mb} must be positive")
    return options, options.overrides


def configure(options: argparse.Namespace, overrides: list[str]) -> Config:
    """The configuration with --ckpt on top. Raises ConfigError."""
    config = load_config(options.config, overrides)
    if options.ckpt is not None:
        config.model.pretrained.checkpoint = options.ckpt
    check_config(config)
    return config


def main(arguments: list[str]) -> None:
    options, overrides = parse(arguments)
    config = configure(options, overrides)
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
