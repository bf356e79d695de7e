"""Shards behind an address: the same examples, each orbit fetched once, what broke off goes on."""

import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from orbit_folders import SIZE, same, write_noise

pytest.importorskip("webdataset")
from orbit_folders import orbit_dataset

from ouroboros3d.cli import call, make_shards
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
