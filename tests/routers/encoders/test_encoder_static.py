"""Static encoders: the mean of token vectors, fitted to texts in closed form; and damaged files are refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from routers.encoders.build import StaticEncoder, build_encoder
from routers.encoders.distill import components, distill, fitted, token_shares
from routers.errors import InvalidEncoder

WORDS = ["red", "green", "blue", "square", "circle", "of", "a", "the"]


class Teacher:
    """A model of eight words: each is a direction, and a text is the unit mean of the directions of its words."""

    name, dim, digest, max_tokens = "teacher", 8, "sha256:0", None

    def __init__(self):
        tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)} | {"[UNK]": 8}, "[UNK]"))
        tokenizer.pre_tokenizer = Whitespace()
        tokenizer.enable_truncation(2)  # common in tokenizers of models; it must not be kept
        self.json = tokenizer.to_str()
        self.rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0].astype(np.float32)

    def tokenizer_json(self):
        return self.json

    def token_vectors(self, on_progress=None):
        if on_progress is not None:
            on_progress(9, 9)
        return np.vstack([np.eye(8), np.full((1, 8), 0.35)]).astype(np.float32)

    def encode(self, texts):
        meant = np.eye(8, dtype=np.float32) @ self.rotation
        rows = np.array([np.mean([meant[WORDS.index(word)] for word in text.split()], axis=0) for text in texts])
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def sentences(n, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=rng.integers(1, 7))) for _ in range(n)]


@pytest.fixture
def folder(tmp_path):
    distill(Teacher(), tmp_path / "static", dim=8)
    return tmp_path / "static"


def test_a_text_is_the_unit_mean_of_its_tokens_whatever_its_length(folder):
    encoder = build_encoder(str(folder))
    assert isinstance(encoder, StaticEncoder) and (encoder.dim, encoder.max_tokens) == (8, None)
    centred = Teacher().token_vectors() - Teacher().token_vectors().mean(axis=0)
    expected = centred[0] + centred[1] + centred[1]
    assert encoder.encode(["red green green"])[0] == pytest.approx(expected / np.linalg.norm(expected), abs=1e-6)
    long = "red green green " * 5000
    assert encoder.encode([long])[0] == pytest.approx(encoder.encode(["red green green"])[0], abs=1e-5)
    assert encoder.truncated([long]).tolist() == [False]


def test_batches_equal_single_texts_and_odd_texts_are_fine(folder):
    encoder = StaticEncoder(folder)
    texts = ["red", "", "\ud83d", "blue circle", "名前", "red"]
    batch = encoder.encode(texts)
    assert np.array_equal(batch, np.vstack([encoder.encode([text]) for text in texts]))
    assert np.linalg.norm(batch, axis=1) == pytest.approx(np.ones(6), abs=1e-6)
    assert batch[1].tolist() == [1.0] + [0.0] * 7
    assert encoder.encode([]).shape == (0, 8)


def test_fitting_to_texts_comes_nearer_to_the_teacher_on_other_texts(tmp_path):
    teacher = Teacher()
    fit = distill(teacher, tmp_path / "fit", dim=8, texts=sentences(2000))
    new = sentences(300, seed=1)
    nearer = np.einsum("nd,nd->n", fit.encode(new), teacher.encode(new)).mean()
    plain = np.einsum("nd,nd->n", distill(teacher, tmp_path / "plain", dim=8).encode(new), teacher.encode(new)).mean()
    assert nearer > 0.99 > plain


def test_the_fit_is_the_ridge_solution():
    rng = np.random.default_rng(0)
    shares = np.abs(rng.normal(size=(30, 6))).astype(np.float32)
    vectors, targets = rng.normal(size=(6, 4)).astype(np.float32), rng.normal(size=(30, 4)).astype(np.float32)
    means = shares @ vectors
    gram = means.T @ means
    mapped = vectors @ np.linalg.solve(gram + 0.01 * np.trace(gram) / 4 * np.eye(4), means.T @ targets)
    correction = np.linalg.solve(shares.T @ shares + 0.1 * np.eye(6), shares.T @ (targets - shares @ mapped))
    assert fitted(vectors, csr_matrix(shares), targets) == pytest.approx(mapped + correction, abs=1e-3)


def test_shares_are_of_all_tokens_of_a_text():
    shares = token_shares(Teacher().json, ["red red blue", ""]).toarray()
    assert shares[0, 0] == pytest.approx(2 / 3) and shares[0, 2] == pytest.approx(1 / 3) and not shares[1].any()


def test_fewer_dimensions_keep_the_directions_of_largest_variance():
    x = np.random.default_rng(0).normal(size=(400, 3)).astype(np.float32) * [0.1, 3.0, 1.0]
    kept = components(x, 2)
    assert np.abs(kept.T) == pytest.approx(np.array([[0, 1, 0], [0, 0, 1]]), abs=0.1)


def test_the_digest_is_of_the_content_alone(folder, tmp_path):
    again = distill(Teacher(), tmp_path / "again", dim=8)
    assert again.digest == StaticEncoder(folder).digest
    other = distill(Teacher(), tmp_path / "other", dim=4)
    assert other.digest != again.digest and other.dim == 4
    assert json.loads((folder / "static.json").read_text())["source"]["name"] == "teacher"


def test_what_cannot_be_distilled_or_loaded_is_said(folder, tmp_path):
    with pytest.raises(InvalidEncoder, match="dim must lie between 2 and the 8 of encoder teacher, got 9"):
        distill(Teacher(), tmp_path / "x", dim=9)
    with pytest.raises(InvalidEncoder, match="different texts are too few"):
        distill(Teacher(), tmp_path / "x", dim=8, texts=sentences(20))
    (folder / "vectors.safetensors").write_bytes(b"no")
    with pytest.raises(InvalidEncoder, match="cannot load the static encoder"):
        StaticEncoder(folder).encode(["red"])
    (folder / "vectors.safetensors").unlink()
    with pytest.raises(InvalidEncoder, match="lacks a file"):
        _ = StaticEncoder(folder).digest
    (folder / "static.json").write_text('{"format": 2, "dim": 8}')
    with pytest.raises(InvalidEncoder, match="has format 2, this version reads 1"):
        build_encoder(str(folder))
    (folder / "static.json").write_text("{")
    with pytest.raises(InvalidEncoder, match="missing or damaged"):
        build_encoder(str(folder))
