"""Names of skills: equal names, synonyms, and the skill of a word."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from routers.encoders.build import HashingEncoder
from routers.errors import InvalidOutcomes
from routers.kinds.skill.vocabulary import NONE, Vocabulary, counted, labelled, normalised, padded
from routers.outcomes.table import OutcomeTable

ENCODER = HashingEncoder(256)


class Angles:
    """Words as directions in a plane, in degrees: the cosine of two words is that of the angle between them."""

    name, dim, digest, max_tokens = "angles", 2, "sha256:angles", None

    def __init__(self, **degrees: float) -> None:
        self.degrees = degrees
        self.encoded: list[str] = []

    def encode(self, texts):
        self.encoded += texts
        angles = np.deg2rad([self.degrees[text] for text in texts]).reshape(-1, 1)
        return np.hstack([np.cos(angles), np.sin(angles)]).astype(np.float32)

    def truncated(self, texts):
        return np.zeros(len(texts), dtype=bool)


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("Linear Algebra", "linear algebra"),
        ("  linear \t algebra. ", "linear algebra"),
        ('"Problem-Solving"', "problem solving"),
        ("“problem solving”", "problem solving"),
        ("(optics)", "optics"),
        ("«[Optics]».", "optics"),
        ("* high_school/physics", "high school physics"),
        ("ﬁnance", "finance"),  # a ligature
        ("ＳＱＬ", "sql"),  # full width
        ("STRASSE", "strasse"),
        ("straße", "strasse"),
        ("C++", "c++"),
        (".NET", ".net"),
        ("Newton's laws", "newton's laws"),
        ("dynamic programming (DP)", "dynamic programming (dp)"),
        ("...", ""),
        ("", ""),
        ('""', ""),
        ("-", ""),
    ],
)
def test_names_are_written_in_one_way(word, name):
    assert normalised(word) == name
    assert normalised(name) == name


def test_the_more_frequent_name_stands_for_its_synonyms():
    encoder = Angles(algebra=0, maths=20, optics=90)
    named = [["Maths", "maths"], ["algebra"], ["Algebra."], ["optics"], ["algebra"]]
    vocabulary = Vocabulary.learned(named, encoder, 0.9)  # the cosine of 20 degrees is 0.94
    assert vocabulary.names == ("algebra", "optics") and len(vocabulary) == 2
    assert vocabulary.words == ("algebra", "maths", "optics")
    assert vocabulary.skills_of(["optics", "MATHS", "algebra", "law"]) == (1, 0)
    assert Vocabulary.learned(named, encoder, 0.95).names == ("algebra", "maths", "optics")
    assert Vocabulary.learned(named, encoder, None).names == ("algebra", "maths", "optics")


def test_synonyms_are_those_of_the_name_and_not_of_another_synonym():
    vocabulary = Vocabulary.learned([["a"], ["a"], ["b"], ["c"]], Angles(a=0, b=20, c=40), 0.9)
    assert vocabulary.names == ("a", "c")  # c is near to b, but b is no name


def test_a_synonym_joins_the_nearest_name():
    vocabulary = Vocabulary.learned([["a", "z"], ["a", "z"], ["m"]], Angles(a=0, z=30, m=20), 0.9)
    assert vocabulary.names == ("a", "z")
    assert vocabulary.skills_of(["m"]) == vocabulary.skills_of(["z"])


def test_merging_does_not_depend_on_the_order_of_the_rows():
    words = ["probability", "probabilities", "probability theory", "optics", "optic", "law", "laws"]
    rng = np.random.default_rng(0)
    rows = [list(rng.choice(words, 2)) for _ in range(40)]
    one = Vocabulary.learned(rows, ENCODER, 0.6)
    other = Vocabulary.learned([rows[i] for i in rng.permutation(40)], ENCODER, 0.6)
    assert one.words == other.words and one.skill_of.tolist() == other.skill_of.tolist()
    assert len(one) < len(words)


def test_a_word_counts_once_a_query():
    named = [["b", "B", "b."], ["a"], ["a"]]
    assert Vocabulary.learned(named, Angles(a=0, b=90), None).names == ("a", "b")


def test_words_are_looked_up_by_name_by_synonym_and_by_likeness():
    encoder = Angles(algebra=0, maths=20, optics=90, geometry=10, lenses=80, gossip=200)
    vocabulary = Vocabulary.learned([["algebra", "optics"], ["algebra"], ["maths"]], encoder, 0.9)
    encoder.encoded.clear()
    [first, second, none] = vocabulary.look_up(
        [["Algebra", "MATHS", "lenses"], ["gossip", "", "geometry"], []], encoder, 0.3
    )
    assert [(m.word, m.skill, m.found) for m in first] == [
        ("algebra", 0, "exact"),
        ("maths", 0, "alias"),
        ("lenses", 1, "nearest"),
    ]
    assert [m.cosine for m in first] == [1.0, 1.0, pytest.approx(np.cos(np.deg2rad(10)))]
    assert [(m.word, m.skill) for m in second] == [("gossip", NONE), ("geometry", 0)]
    assert none == []
    assert encoder.encoded == ["geometry", "gossip", "lenses"]  # known words are not encoded


def test_known_words_need_no_encoder():
    vocabulary = Vocabulary.learned([["algebra"]], ENCODER, None)
    assert vocabulary.look_up([["Algebra"]], Angles(), 0.3)[0][0].found == "exact"


def test_a_vocabulary_is_restored_from_arrays_and_settings():
    vocabulary = Vocabulary.learned([["algebra", "maths"], ["optics", "algebra"]], ENCODER, 0.3)
    again = Vocabulary.restored(vocabulary.arrays(), vocabulary.settings())
    assert (again.words, again.names) == (vocabulary.words, vocabulary.names)
    words = [["algebras", "opticks"]]
    assert again.look_up(words, ENCODER, 0.0) == vocabulary.look_up(words, ENCODER, 0.0)


@pytest.mark.parametrize("named", [[], [[]], [["", "..."], []]])
def test_without_any_name_there_is_no_vocabulary(named):
    with pytest.raises(InvalidOutcomes, match="no row names a skill"):
        Vocabulary.learned(named, ENCODER, None)


def table(**columns) -> OutcomeTable:
    n = len(next(iter(columns.values())))
    ids = [f"q{i}" for i in range(n)]
    return OutcomeTable.from_frame(pd.DataFrame({"query_id": ids, "prompt": ids, "score::m": [1.0] * n, **columns}))


def test_columns_of_skills_are_lists_or_text_with_commas():
    rows = table(
        listed=[["algebra", "optics"], [], None],
        text=["algebra, optics", "", np.nan],
        array=[np.array(["law"]), np.array([]), None],
    )
    assert labelled(rows, "listed") == [("algebra", "optics"), (), ()]
    assert [tuple(map(normalised, row)) for row in labelled(rows, "text")] == [("algebra", "optics"), ("",), ()]
    assert labelled(rows, "array") == [("law",), (), ()]
    assert labelled(table(level=[1, 2]), "level") == [("1",), ("2",)]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_lists_of_skills_come_back_from_files(suffix, tmp_path):
    table(skills=[["algebra", "optics"], []]).write(tmp_path / f"outcomes{suffix}")
    again = OutcomeTable.read(tmp_path / f"outcomes{suffix}")
    assert labelled(again, "skills") == [("algebra", "optics"), ()]


def test_a_domain_is_one_skill_unless_its_column_is_named():
    rows = table(domain=["law, international", "law"])
    assert labelled(rows, None) == [("law, international",), ("law",)]
    assert labelled(rows, "domain") == [("law", " international"), ("law",)]


def test_a_table_without_labels_says_what_to_do():
    with pytest.raises(InvalidOutcomes, match="name their column \\(`skill_column`\\) or the feature"):
        labelled(table(other=["a"]), None)
    with pytest.raises(InvalidOutcomes, match="no column 'skill' in the table; did you mean 'skills'"):
        labelled(table(skills=["a"]), "skill")


def test_skills_of_rows_are_padded_and_counted():
    rows = padded([(1, 0), (), (2,)])
    assert rows.tolist() == [[1, 0], [NONE, NONE], [2, NONE]]
    assert counted(rows, 3).tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert padded([(), ()]).shape == (2, 1)
