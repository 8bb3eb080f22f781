"""Every shipped router config builds the router it names; every kind has a config."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from routers.encoders.build import HashingEncoder, build_encoder
from routers.factory import KINDS, build, reads_text

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "routers").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_builds_its_router(path):
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert set(config) <= {"kind", "encoder", "settings"}
    assert ("encoder" in config) == reads_text(config["kind"])
    if "encoder" in config:
        assert build_encoder(config["encoder"]).name == config["encoder"]
    router = build(config["kind"], HashingEncoder(16), config.get("settings"))
    assert router.kind == config["kind"]


def test_every_kind_has_a_config():
    assert {yaml.safe_load(path.read_text(encoding="utf-8"))["kind"] for path in CONFIGS} == set(KINDS)
