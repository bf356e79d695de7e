"""Starts and stops Gradio: folder, port, limits."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ouroboros3d.app.port import check_gradio, check_port
from ouroboros3d.pipeline import Ouroboros3DPipeline

WAITING = 20  # jobs in the queue, beyond which a user is told to come back


@contextmanager
def serving(
    pipeline: Ouroboros3DPipeline, examples: list[Path], host: str = "127.0.0.1", port: int = 7860, limit_mb: int = 20
) -> Iterator[str]:
    """Serves the app while the block runs, and yields its address. Everything it writes lies in one temporary folder,
    which is removed in the end. Raises AppError."""
    check_port(host, port)
    check_gradio()
    with tempfile.TemporaryDirectory(prefix="ouroboros3d-app-") as folder:
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder}
        from ouroboros3d.app.jobs import Worker
        from ouroboros3d.app.page import build_page

        worker = Worker(pipeline, Path(folder))
        blocks = build_page(worker, examples, limit_mb)
        blocks.queue(max_size=WAITING, api_open=False)
        _, address, _ = blocks.launch(
            server_name=host,
            server_port=port,
            max_file_size=f"{limit_mb}mb",
            allowed_paths=[folder],
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            run_history=False,
            enable_monitoring=False,
            footer_links=[],
        )
        try:
            yield address
        finally:
            worker.close()
            blocks.close(verbose=False)
