"""`build --engine ray`: what one process builds, whatever dies on the way.

Real local worker processes. Starting Ray takes seconds, and so does each stage, whose workers import everything anew:
one cluster serves all tests here, and few tests build.
"""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import faiss
import numpy as np
import psutil
import pytest

from retro_nb import RETRO, TrainingWrapper
from retro_nb.__main__ import main
from retro_nb.common.arrays import ROOT, open_array
from retro_nb.reference import documents_to_chunks_
from retro_nb.store import cluster as cluster_module
from retro_nb.store import embedding as embedding_module
from retro_nb.store.cluster import _Chunk, _Embed, _Fill, _gpu_share, _results, _Search, _Worker, build_store, cluster
from retro_nb.store.files import Files
from retro_nb.store.index import build_index, lists_path, read_index, write_index
from retro_nb.store.settings import StoreSettings
from retro_nb.store.updating import update_store
from retro_nb.text.files import jsonl, text_folder
from retro_nb.text.speeches import speeches
from retro_nb.text.tokens import get_tokenizer

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[scale]'")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("ray"),
]  # one cluster is enough for two cores (where pytest goes by groups)
SIZES = {"chunk_size": 64, "seq_len": 128}
SPEC = "IVF8,Flat"
BLOCK, SHARD = 32, 90  # chunks embedded or searched, and indexed, together


@pytest.fixture(scope="module")
def running():
    """A cluster of this machine, two workers at a time."""
    with cluster(2, progress=False):
        yield


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Several parts, blocks and shards in a corpus that is tiny."""
    monkeypatch.setattr(embedding_module, "ON_CPU", embedding_module.ON_CPU._replace(block=BLOCK))
    for name, value in {"PIECES": 2, "AT_A_TIME": BLOCK, "SHARD": SHARD, "HANDFUL": 5000}.items():
        monkeypatch.setattr(cluster_module, name, value)


def wrap(folder, corpus, bert, spec=SPEC):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sizes = dict(enc_dim=16, enc_depth=1, dec_dim=16, dec_depth=2, dec_cross_attn_layers=(2,), heads=2, dim_head=8)
        retro = RETRO(num_tokens=30522, chunk_size=64, max_seq_len=128, **sizes)
        what = {"documents_path": corpus, "work_dir": folder, "bert": bert, "chunk_size": 64, "knn": 2}
        return TrainingWrapper(retro=retro, index=spec, max_rows_per_file=BLOCK, progress=False, **what)


def texts(folder: Path) -> Path:
    """Openings of speeches; every seventh file is empty."""
    folder.mkdir()
    for number, document in enumerate(speeches(max_documents=24, max_chars=2500)):
        (folder / f"{number:02}.txt").write_text(document.text if number % 7 else "", encoding="utf-8")
    return folder


def lists(path: Path) -> list[tuple[list[int], bytes]]:
    """Ids and codes of each inverted list."""
    inner = read_index(path)
    found, entries = inner.invlists, []
    for number in range(inner.nlist):
        ids = faiss.rev_swig_ptr(found.get_ids(number), found.list_size(number)).tolist()
        codes = faiss.rev_swig_ptr(found.get_codes(number), found.list_size(number) * found.code_size)
        entries.append((ids, codes.tobytes()))
    return entries


def differing(folder: Path, other: Path) -> list[str]:
    """The files of a store that are not byte for byte those of another; of an inverted file, its lists count."""
    names = {path.name for path in other.iterdir() if path.is_file() and path.name[0] != "."} - {"manifest.json"}
    found = []
    for name in sorted(names - {"knn.index"}):
        if (folder / name).read_bytes() != (other / name).read_bytes():
            found.append(name)
    if isinstance(read_index(other / "knn.index"), faiss.IndexIVF):
        one, two = (read_index(each / "knn.index") for each in (folder, other))
        centroids = [each.quantizer.reconstruct_n(0, each.nlist).tolist() for each in (one, two)]
        same = centroids[0] == centroids[1] and one.nprobe == two.nprobe and one.ntotal == two.ntotal
        return found if same and lists(folder / "knn.index") == lists(other / "knn.index") else [*found, "knn.index"]
    return found if (folder / "knn.index").read_bytes() == (other / "knn.index").read_bytes() else [*found, "knn.index"]


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}


# the same, whatever dies


def killed_once(worker: type[_Worker], marks: Path) -> type[_Worker]:
    """The same worker; but the first time that anyone works, he is killed, and leaves a mark.

    A `_Chunk` has handed in a part of his work by then, an `_Embed` and a `_Search` have done theirs and not yet
    handed it in, a `_Fill` has just begun. The class is made in here, so that it travels to the workers whole.
    """
    mark = marks / worker.__name__

    def kill_once():
        try:
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)

    class Killed(worker):
        def open(self, **arguments):
            cluster_module.HANDFUL = 5000
            super().open(**arguments)

        def work(self, **item):
            if worker is _Fill:
                kill_once()
            for result in super().work(**item):
                if worker is _Chunk:
                    yield result
                    kill_once()
                else:
                    kill_once()
                    yield result

    return Killed


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
def test_a_worker_killed_in_every_stage_changes_nothing(running, tmp_path, tiny_bert, monkeypatch, capfd):
    corpus, marks = speeches(max_documents=24, max_chars=3000), tmp_path / "marks"
    marks.mkdir()
    monkeypatch.setattr(
        cluster_module,
        "_results",
        lambda worker, *rest, **options: _results(killed_once(worker, marks), *rest, **options),
    )
    folder, alone = tmp_path / "cluster", tmp_path / "alone"
    build_store(corpus, folder, StoreSettings(knn=2, bert=tiny_bert, index=SPEC, **SIZES), progress=False)
    assert {path.name for path in marks.iterdir()} == {"_Chunk", "_Embed", "_Fill", "_Search"}
    wrap(alone, corpus, tiny_bert)
    assert len(open_array(folder / "chunks.npy")) > 2 * SHARD
    assert differing(folder, alone) == []
    assert not (folder / "shards").exists() and lists_path(folder / "knn.index").exists()

    before = times(folder)
    shutil.move(folder, tmp_path / "moved")  # a store does not know where it lies
    folder = tmp_path / "moved"
    capfd.readouterr()
    wrapper = wrap(folder, corpus, tiny_bert)  # warns of nothing, which is an error here
    assert times(folder) == before and wrapper.stats["k"] == 2
    assert capfd.readouterr().out == ""  # FAISS would say where the lists lie

    fewer = speeches(max_documents=20, max_chars=3000)
    for each in (folder, alone):
        update_store(fewer, each, bert=tiny_bert, index=SPEC, progress=False)
    assert differing(folder, alone) == [] and not lists_path(folder / "knn.index").exists()


DRIVER = """
import os, signal, sys
from retro_nb.common import arrays
from retro_nb.store import embedding
from retro_nb.__main__ import main

embedding.ON_CPU, write, written = embedding.ON_CPU._replace(block=32), arrays.ResumableRows.write, []

def write_and_die(self, rows, values):
    write(self, rows, values)
    written.append(rows)
    if len(written) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

arrays.ResumableRows.write = write_and_die
main(sys.argv[1:])
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
def test_the_command_goes_on_where_it_was_killed(running, tmp_path, tiny_bert, monkeypatch):
    """`--address` joins the cluster here, is killed while it embeds, and its second call does not embed all again."""
    monkeypatch.setattr(cluster_module, "AT_A_TIME", 1024)  # as in one process
    folder, alone = tmp_path / "cluster", tmp_path / "alone"
    settings = {"corpus": texts(tmp_path / "texts"), "max_chunks": 120, "bert": tiny_bert, "max_seq_len": 128}
    pairs = [part for name, value in settings.items() for part in ("-p", name, str(value))]
    command = ["build", "--engine", "ray", *pairs, "-p", "work_dir", str(folder)]
    address = ray.get_runtime_context().gcs_address
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    killed = subprocess.run(
        [sys.executable, "-c", DRIVER, *command, "--workers", "2", "--address", address],
        env=os.environ | {"PYTHONPATH": path, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"},  # for a cluster on 127.0.0.1
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert "stopped before" in killed.stderr
    done = (folder / "chunks.embedded.npy.progress").read_bytes().split(b"\n", 1)[1]
    assert BLOCK < done.count(b"1") <= 2 * BLOCK < len(done)
    asked, results = {}, cluster_module._results

    def spy(worker, arguments, items, *args, **options):
        asked[worker.__name__] = sum(item["stop"] - item["start"] for item in items)
        return results(worker, arguments, items, *args, **options)

    monkeypatch.setattr(cluster_module, "_results", spy)
    assert main([*command, "--workers", "1"]) == 0
    assert asked == {"_Embed": done.count(b"0"), "_Search": len(done)}  # and nothing was cut again
    with pytest.warns(UserWarning, match=r"max_chunks 120.*stopped before|without a token, left out: 2"):
        assert main(["build", *pairs, "-p", "work_dir", str(alone)]) == 0
    assert differing(folder, alone) == []


# the documents


def chunk(corpus, folder, tokenizer, workers=2, max_chunks=None):
    settings = StoreSettings(tokenizer=tokenizer, max_chunks=max_chunks, **SIZES)
    cluster_module._chunk(corpus, Files.of(folder), settings, workers)


def chunk_alone(corpus, folder, tokenizer, **limits):
    names = {"chunks_memmap_path": "chunks.npy", "seqs_memmap_path": "seqs.npy", "doc_ids_memmap_path": "doc_ids.npy"}
    paths = {name: folder / file for name, file in names.items()}
    documents_to_chunks_(corpus, **paths, tokenizer=tokenizer, progress=False, **SIZES, **limits)


def test_a_corpus_that_cannot_be_divided(running, tmp_path, tiny_bert):
    class Undivided:
        def __init__(self, documents):
            self.documents = documents

        def __iter__(self):
            return iter(self.documents)

        def fingerprint(self):
            return {"corpus": "undivided"}

    corpus = Undivided(list(text_folder(texts(tmp_path / "texts"))))
    folders, tokenizer = (tmp_path / "cluster", tmp_path / "alone"), get_tokenizer(tiny_bert)
    for folder, cut in zip(folders, (chunk, chunk_alone), strict=True):
        with pytest.warns(UserWarning, match=r"max_chunks 60.*stopped before|without a token, left out: 1"):
            cut(corpus, folder, tokenizer, max_chunks=60)
    ours, theirs = ({path.name: path.read_bytes() for path in each.glob("*.*")} for each in folders)
    assert [name for name in theirs if ours[name] != theirs[name]] == [] and len(theirs) > 7


# errors


def test_an_error_in_a_worker_arrives_as_what_it_is(running, tmp_path, tiny_bert, monkeypatch):
    """Paths may be relative, though the cluster was started elsewhere."""
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text('{"text": "one"}\n' * 30 + '{"text": 3}\n')
    with pytest.raises(ValueError) as alone:
        list(jsonl("bad.jsonl"))
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 31: ") as caught:
        chunk(jsonl("bad.jsonl"), tmp_path, get_tokenizer(tiny_bert), workers=1)
    assert str(caught.value) == str(alone.value) and not Path("chunks.npy").exists()
    assert "in a worker" in str(caught.value.__cause__) and "chunk_document" not in str(caught.value)


def test_an_error_while_a_worker_opens_its_files_comes_back_too(tmp_path, tiny_bert):
    arguments = {"chunks_path": tmp_path / "chunks.npy", "bert": tiny_bert, "use_cls_repr": False}
    (result,) = _Embed("", arguments)({"start": np.array([0]), "stop": np.array([3])})
    (failure,) = map(pickle.loads, result["data"])
    assert type(failure.error) is FileNotFoundError and "chunks.npy" in str(failure.error)
    assert "open_array" in failure.trace


def test_a_cluster_started_here_is_reached_from_here_alone(running):
    sockets = [
        (process.name(), *socket.laddr)
        for process in psutil.Process().children(recursive=True)
        for socket in process.net_connections("tcp")
        if socket.status == psutil.CONN_LISTEN
    ]
    assert {"gcs_server", "raylet"} <= {name for name, *_ in sockets}
    assert {host for _, host, _ in sockets} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}, sockets
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in os.environ


def test_more_workers_than_the_cluster_has_room_for(running):
    with pytest.raises(ValueError, match=r"100 workers, but the cluster has \d+ CPUs: ask for no more"):
        with cluster(100):
            pass


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--engine", "ray", "--workers", "0"], "workers 0: pass 1 or more"),
        (["--workers", "2"], "--workers is of a Ray cluster: add --engine ray"),
        (["--address", "auto"], "--address is of a Ray cluster: add --engine ray"),
    ],
)
def test_bad_arguments(more, message, tmp_path, capsys):
    assert main(["build", *more, "-p", "work_dir", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err and not any(tmp_path.iterdir())


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense"])
def test_no_cluster_at_the_address(address, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)  # of the other tests' cluster
    with pytest.raises(ConnectionError, match=f"no Ray cluster at {address} .*: `ray start --head` starts one"):
        with cluster(2, address):
            pass


def test_without_ray(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "ray"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r"ray is not installed.*retro-nb\[scale\]"):
        with cluster(2):
            pass


# shares and memory


def test_every_worker_gets_a_gpu_or_a_part_of_one():
    assert [_gpu_share(workers, 0) for workers in (1, 7)] == [0, 0]
    for gpus in (1, 2, 3, 8):
        for workers in range(1, 30):
            share = _gpu_share(workers, gpus)
            assert 0 < share <= 1 and round(1 / share) * gpus >= workers  # room for all, and none of them on two


def work(worker: _Worker, **item):
    return list(worker.work(**item))


def test_chunks_go_back_by_handfuls(tmp_path, tiny_bert):
    tokenizer = get_tokenizer(tiny_bert)
    (tmp_path / "many.jsonl").write_text('{"text": "the people of every state of the union"}\n' * 200)
    worker = _Chunk("", {})
    worker.open([jsonl(tmp_path / "many.jsonl")], 64, tokenizer.backend.to_str(), tuple(tokenizer.ids))
    handfuls = work(worker, part=0)
    sizes = [sum(each.rows.nbytes + each.spans.nbytes + each.bytes.nbytes + 500 for each in some) for some in handfuls]
    assert sum(map(len, handfuls)) == 200 and len(handfuls) > 10
    assert max(sizes) <= cluster_module.HANDFUL + max(sizes) / len(handfuls[0])


def anonymous() -> int:
    """Bytes of this process that are no page of a file."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells memory from mapped files")
def test_who_searches_maps_the_index_and_the_vectors(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "vectors.npy", rng.normal(size=(100_000, 128)).astype(np.float32))  # 51 MB, and so the index
    np.save(tmp_path / "doc_ids.npy", np.arange(100_000) // 10)
    write_index(build_index(open_array(tmp_path / "vectors.npy"), "Flat"), tmp_path / "knn.index")
    before, worker = anonymous(), _Search("", {})
    options = {"exclude": [], "max_similarity": None}
    worker.open(tmp_path / "knn.index", tmp_path / "vectors.npy", tmp_path / "doc_ids.npy", 2, options)
    assert anonymous() - before < 5_000_000
    ((start, stop, found),) = work(worker, start=10, stop=30)
    assert (start, stop, found.shape) == (10, 30, (20, 2)) and found.dtype == np.int32


def test_who_fills_a_shard_reads_it_alone(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(600, 16)).astype(np.float32)
    np.save(tmp_path / "vectors.npy", vectors)
    trained = cluster_module.train_index(vectors, SPEC)
    write_index(trained, tmp_path / cluster_module.TRAINED)
    worker = _Fill("", {})
    worker.open(tmp_path, tmp_path / "vectors.npy")
    assert work(worker, start=150, stop=300) == [tmp_path / "150.index"]
    trained.add_with_ids(vectors[150:300], np.arange(150, 300))
    write_index(trained, tmp_path / "expected")
    assert (tmp_path / "150.index").read_bytes() == (tmp_path / "expected").read_bytes()


def test_an_embedder_gives_what_one_process_gives(tmp_path, tiny_bert):
    corpus, tokenizer = speeches(max_documents=3, max_chars=2000), get_tokenizer(tiny_bert)
    chunk_alone(corpus, tmp_path, tokenizer)
    chunks = open_array(tmp_path / "chunks.npy")
    worker = _Embed("", {})
    worker.open(tmp_path / "chunks.npy", tiny_bert, False)
    ((start, stop, vectors),) = work(worker, start=2, stop=9)
    expected = embedding_module.begin_block(chunks[2:9, :-1], tokenizer, bert=tiny_bert)()
    assert (start, stop) == (2, 9) and np.array_equal(vectors, expected)
