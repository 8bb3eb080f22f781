"""`coe encoder distill`: the output is an encoder; a model that cannot be distilled is an error."""

from __future__ import annotations

import json

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from coe.cli.encoder import app as encoder_app
from routers.encoders.build import build_encoder
from routers.errors import InvalidEncoder

app = typer.Typer()
app.add_typer(encoder_app, name="encoder")


def test_only_models_can_be_distilled(tmp_path):
    result = CliRunner().invoke(app, ["encoder", "distill", "--out", str(tmp_path / "x"), "--from", "hashing:64"])
    assert isinstance(result.exception, InvalidEncoder) and "nothing to distill" in str(result.exception)


@pytest.mark.integration
@pytest.mark.slow
def test_a_distilled_minilm_tells_like_from_unlike(tmp_path, monkeypatch):
    monkeypatch.setenv("COE_HOME", str(tmp_path / "home"))
    arguments = ["encoder", "distill", "--out", str(tmp_path / "static"), "--dim", "128", "--json", "-"]
    written = json.loads(CliRunner().invoke(app, arguments, catch_exceptions=False).stdout)
    encoder = build_encoder(str(tmp_path / "static"))
    assert (written["dim"], written["digest"]) == (encoder.dim, encoder.digest) == (128, encoder.digest)
    like, query, unlike = encoder.encode(
        ["The dog sat on the carpet.", "A puppy is lying on the rug.", "Quarterly tax revenue fell by three percent."]
    )
    assert np.dot(like, query) > np.dot(query, unlike) + 0.2
