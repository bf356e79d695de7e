"""One page of all objects of a run: index.html with every input, its views, its turntable and links to its files."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from ouroboros3d.files import write_whole
from ouroboros3d.inference.jobs import Record

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; color: #222 }
article { display: flex; flex-wrap: wrap; gap: 1em; padding: 1em 0; border-top: 1px solid #ddd }
article h2 { flex-basis: 100%; margin: 0; font-size: 1.05em; overflow-wrap: anywhere }
img, video { height: 192px; max-width: 100%; object-fit: contain; background: #f4f4f4 }
.failed { color: #a00 }
"""


def write_summary(path: Path, records: Mapping[str, Record], failures: Sequence[str] = ()) -> None:
    """Writes the page, atomically; links are relative to it. `records` by the name of the results."""
    articles = "".join(_article(name, record) for name, record in records.items())
    failed = "".join(f'<p class="failed">{html.escape(line)}</p>' for line in failures)
    title = f"{len(records)} objects" + (f", {len(failures)} failed" if failures else "")
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Ouroboros3D: '
        f'{title}</title><meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
        f"<body><h1>{title}</h1>{failed}{articles}</body></html>\n"
    )
    write_whole(path, page)


def _article(name: str, record: Record) -> str:
    def shown(ending: str, tag: str) -> str:
        file = f"{name}{ending}"
        return tag.format(quote(file), html.escape(f"{name}: {ending}")) if file in record.files else ""

    pictures = shown("_input.png", '<img src="{}" alt="{}">') + shown(".png", '<img src="{}" alt="{}">')
    video = shown(".mp4", '<video src="{}" title="{}" autoplay loop muted playsinline></video>')
    links = " ".join(
        f'<a href="{quote(file)}">{html.escape("player" if file == f"{name}.html" else file.removeprefix(name))}</a>'
        for file in record.files
    )
    facts = f"seed {record.seed}, elevation {record.elevation:g}°"
    return f"<article><h2>{html.escape(name)}</h2>{pictures}{video}<p>{facts}<br>{links}</p></article>"
