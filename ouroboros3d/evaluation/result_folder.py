"""The folder of an evaluation: its growing table, one picture per orbit, and a grid of the best, median and worst."""

from __future__ import annotations

from pathlib import Path

from accelerate import PartialState
from PIL import Image
from torch import Tensor

from ouroboros3d.evaluation.score_tables import Row, check_settings, key, read_rows, write_rows
from ouroboros3d.files import check_writable_dir
from ouroboros3d.visualize import save_image, stack_with_headings, views_table


class Store:
    """The folder of an evaluation: rows as they finish, pictures, the settings they belong to. Without a folder it
    keeps nothing."""

    def __init__(self, folder: Path | None = None, settings: dict | None = None) -> None:
        self.folder, self.settings = folder, settings
        self._rows: list[Row] = []

    def start(self, state: PartialState) -> dict[tuple[str, int], Row]:
        """The rows that are there already, by orbit and seed. Raises UserError for those of other settings."""
        if self.folder is None:
            return {}
        if state.is_main_process:
            check_writable_dir(self.folder / "pictures")
            check_settings(self.folder, self.settings, occupied=bool(self._tables()))
        state.wait_for_everyone()
        rows = {key(row): row for path in self._tables() for row in read_rows(path)}
        state.wait_for_everyone()  # nobody writes before everybody has read
        self._part = self.folder / (f"part{state.process_index}.csv" if state.num_processes > 1 else "objects.csv")
        self._rows = list(rows.values()) if state.num_processes == 1 else []
        return rows

    def add(self, rows: list[Row]) -> None:
        self._rows += rows
        if self.folder is not None:
            write_rows(self._part, self._rows)

    def picture(self, row: Row, pictures: dict[str, Tensor]) -> None:
        if self.folder is not None:
            save_image(
                picture_path(self.folder, row), views_table([(name, list(views)) for name, views in pictures.items()])
            )

    def finish(self, state: PartialState, rows: list[Row]) -> None:
        """Everybody's rows in one table."""
        if self.folder is not None and state.is_main_process:
            write_rows(self.folder / "objects.csv", rows)
            for path in self.folder.glob("part*.csv"):
                path.unlink()

    def extremes(self, rows: list[Row], count: int) -> Image.Image | None:
        """The pictures of the objects with the best, median and worst 3D at novel cameras (PSNR), below each other;
        None if none of them has a picture."""
        entries = [
            (
                f"{kind}: {row['object']}, 3D {row['render_novel_psnr']:.1f} dB",
                Image.open(picture_path(self.folder, row)),
            )
            for kind, row in extreme_rows([row for row in rows if picture_path(self.folder, row).is_file()], count)
        ]
        return stack_with_headings(entries) if entries else None

    def _tables(self) -> list[Path]:
        """The whole table first, then what an interrupted run of several processes has left."""
        whole = self.folder / "objects.csv"
        return [*([whole] if whole.is_file() else []), *sorted(self.folder.glob("part*.csv"))]


PICTURES = ("truth", "views", "3D")  # the rows of an orbit's picture


def picture_path(folder: Path, row: Row) -> Path:
    """An orbit's picture in the folder of an evaluation."""
    return folder / "pictures" / f"{Path(str(row['id'])).name}_{row['seed']}.png"


def extreme_rows(rows: list[Row], count: int) -> list[tuple[str, Row]]:
    """("best", "median" or "worst", row), up to `count` rows of each, by the 3D's PSNR at novel cameras, none twice."""
    ranked = sorted(rows, key=lambda row: -row["render_novel_psnr"])
    count = min(count, max(1, len(ranked) // 3))
    middle = (len(ranked) - count + 1) // 2
    parts = {"best": ranked[:count], "median": ranked[middle : middle + count], "worst": ranked[-count:]}
    chosen: dict[tuple[str, int], tuple[str, Row]] = {}
    for kind, group in parts.items():
        for row in group:
            chosen.setdefault(key(row), (kind, row))
    return list(chosen.values())
