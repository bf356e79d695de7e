"""Shards behind an address: the same examples, each orbit fetched once, what broke off goes on."""

import shutil
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from orbit_folders import SIZE, same, write_noise

pytest.importorskip("webdataset")
from orbit_folders import orbit_dataset

from ouroboros3d.cli import call, make_shards
from ouroboros3d.config.loading import check_lists, load_config
from ouroboros3d.data import blocks
from ouroboros3d.data.orbit_files import DataError

IDS = ["a", "b.v2", "c d"]


class Handler(BaseHTTPRequestHandler):
    """Serves a folder, with ranges if `ranges`; `log` takes the requests, `cut` ends that many answers early."""

    def __init__(self, folder: Path, ranges: bool, log: list, cut: list, *args):
        self.folder, self.ranges, self.log, self.cut = folder, ranges, log, cut
        super().__init__(*args)

    def do_GET(self):
        path, asked = self.folder / self.path.lstrip("/"), self.headers.get("Range")
        self.log.append((self.path, asked))
        if not path.is_file():
            return self.send_error(404)
        data = path.read_bytes()
        if asked and self.ranges:
            start, stop = asked.removeprefix("bytes=").split("-")
            data = data[int(start) : int(stop) + 1]
        self.send_response(206 if asked and self.ranges else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.cut and path.suffix == ".tar":
            self.cut.pop()
            data = data[: len(data) // 2]
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> tuple[Path, Path]:
    root, out = tmp_path_factory.mktemp("orbits"), tmp_path_factory.mktemp("shards")
    for k, name in enumerate(IDS):
        write_noise(root / name, elevation=5.0 * k)
    (root / "train.txt").write_text("\n".join(IDS))
    assert call(make_shards.main, [str(root), "--out", str(out), "--per_shard", "2"]) == 0
    return root, out


@pytest.fixture
def serve(shards):
    servers = []

    def start(ranges: bool = True, folder: Path = shards[1]) -> tuple[str, list, list]:
        log, cut = [], []
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, folder, ranges, log, cut))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", log, cut

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("ranges", [True, False])
def test_the_same_examples_as_from_folders_and_fetched_once(ranges, shards, serve, tmp_path):
    address, log, _ = serve(ranges)
    plain = orbit_dataset(shards[0], size=SIZE)
    data = orbit_dataset(address, size=SIZE, cache_dir=str(tmp_path))
    assert all(same(data[k], plain[k]) for k in range(3))
    tars = [request for request in log if request[0].endswith(".tar")]
    assert len([r for r in tars if r[1]]) >= (3 if ranges else 2)
    again = orbit_dataset(address, size=SIZE, cache_dir=str(tmp_path))
    assert all(same(again[k], plain[k]) for k in range(3))
    assert [request for request in log if request[0].endswith(".tar")] == tars


def test_what_broke_off_is_tried_again_and_a_network_that_is_gone_is_named(shards, serve, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "_WAIT", 0.0)
    address, log, cut = serve()
    cut += [1, 1]
    data = orbit_dataset(address, size=SIZE, cache_dir=str(tmp_path))
    assert same(data[1], orbit_dataset(shards[0], size=SIZE)[1])
    assert len([r for r in log if r[0].endswith(".tar")]) == 3
    cut += [1] * 99
    with pytest.raises(DataError, match="cannot be fetched"):
        data[2]


def test_a_pattern_takes_some_shards_and_needs_no_index(shards, serve, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in shards[1].glob("*.tar"):
        (bare / path.name).write_bytes(path.read_bytes())
    address, _, _ = serve(folder=bare)
    for root in (f"{address}/train-{{000000..000001}}.tar", f"{bare}/train-*.tar"):
        assert list(orbit_dataset(root, size=SIZE, cache_dir=str(tmp_path / "c")).ids) == IDS
    one = orbit_dataset(f"{address}/train-{{000001..000001}}.tar", size=SIZE, cache_dir=str(tmp_path / "d"))
    assert list(one.ids) == ["c d"] and len(one[0]["images"]) == 8


def bare_shards(folder: Path, root: Path, *lists: str) -> Path:
    """Shards of these lists of `root`, without lists and index."""
    assert call(make_shards.main, [str(root), "--out", str(folder), "--lists", *lists]) == 0
    for path in folder.iterdir():
        if path.suffix != ".tar":
            path.unlink()
    return folder


def test_a_pattern_has_every_list(shards, tmp_path):
    root = tmp_path / "orbits"
    shutil.copytree(shards[0], root)
    (root / "train.txt").write_text("a\n")
    (root / "val.txt").write_text("c d\n")
    assert call(make_shards.main, [str(root), "--out", str(tmp_path / "listed")]) == 0
    bare_shards(tmp_path / "bare", root, "train.txt", "val.txt")
    for folder in ("listed", "bare"):
        kept = dict(size=SIZE, cache_dir=str(tmp_path / "c"))
        for pattern in ("*.tar", "{train,val}-*.tar", "{train,val}-{000000..000000}.tar"):
            where = f"{tmp_path / folder}/{pattern}"
            check_lists(load_config(None, [f"data.root={where}"]), "train.txt", "val.txt")
            assert list(orbit_dataset(where, **kept).ids) == ["a"]
            assert list(orbit_dataset(where, list_file="val.txt", **kept).ids) == ["c d"]
    with pytest.raises(DataError, match=r"has no orbit of val\.txt; take a pattern that has shards of every list"):
        orbit_dataset(f"{tmp_path}/listed/train-*.tar", list_file="val.txt", **kept)
    with pytest.raises(DataError, match="a brace without its partner"):
        orbit_dataset(f"{tmp_path}/listed/train-{{0..3.tar", **kept)


def test_changed_shards_and_another_folder_of_the_same_name_are_read_anew(tmp_path, monkeypatch):
    values = []
    for k, place in enumerate(("one", "one", "two")):
        write_noise(tmp_path / f"orbits{k}" / "a", elevation=5.0 * k)
        (tmp_path / f"orbits{k}" / "train.txt").write_text("a\n")
        (tmp_path / place).mkdir(exist_ok=True)
        shutil.rmtree(tmp_path / place / "shards", ignore_errors=True)
        bare_shards(tmp_path / place / "shards", tmp_path / f"orbits{k}", "train.txt")
        monkeypatch.chdir(tmp_path / place)
        for cache in ("none", "disk"):
            item = orbit_dataset("shards/train-*.tar", size=SIZE, cache=cache, cache_dir=str(tmp_path / "c"))[0]
            assert same(item, orbit_dataset(tmp_path / f"orbits{k}", size=SIZE)[0])
        values.append(item["c2w"])
    assert not torch.equal(values[0], values[1])


def test_a_download_that_ends_early_is_not_whole(shards, serve, tmp_path):
    address, _, cut = serve()
    shard, path = shards[1] / "train-000000.tar", tmp_path / "x.tar"
    cut.append(1)
    with pytest.raises(OSError, match=f"after .* of {shard.stat().st_size:,} bytes"):
        blocks.fetch_whole(f"{address}/{shard.name}", path)
    assert not path.exists()
    blocks.fetch_whole(f"{address}/{shard.name}", path)
    assert path.read_bytes() == shard.read_bytes()


def test_the_cache_on_disk_is_written_once(shards, tmp_path):
    kept = dict(size=SIZE, cache="disk", cache_dir=str(tmp_path / "c"))
    for _ in range(2):
        assert len(orbit_dataset(f"{shards[1]}/train-*.tar", **kept)) == 3
    assert len(list(tmp_path.rglob("*.npy"))) == 1


def test_a_whole_download_goes_on_where_it_broke_off(shards, serve, tmp_path):
    address, log, _ = serve()
    shard = shards[1] / "train-000000.tar"
    (tmp_path / "x.part").write_bytes(shard.read_bytes()[:1000])
    blocks.fetch_whole(f"{address}/{shard.name}", tmp_path / "x.tar")
    assert (tmp_path / "x.tar").read_bytes() == shard.read_bytes() and log[-1][1].startswith("bytes=1000-")


def test_addresses_without_shards_are_named(serve, tmp_path):
    address, _, _ = serve(folder=tmp_path)
    with pytest.raises(DataError, match=r"has no shards\.tsv"):
        orbit_dataset(address, size=SIZE, cache_dir=str(tmp_path / "c"))
    with pytest.raises(DataError, match="cannot be fetched"):
        orbit_dataset(f"{address}/train-{{0..1}}.tar", size=SIZE, cache_dir=str(tmp_path / "c"))
