"""The tables of `llmqat info --families` and docs/families.md, against what they describe."""

import json
from pathlib import Path

from llmqat import overview
from llmqat.cli import main
from llmqat.models.compat import MODELS
from llmqat.models.families import FAMILIES
from llmqat.models.shapes import SHAPES

PAGE = Path(__file__).parents[2] / "docs" / "families.md"


def test_page_is_up_to_date():
    text = PAGE.read_text(encoding="utf-8")
    table = text.split("<!-- families: begin -->\n")[1].split("\n<!-- families: end -->")[0]
    assert table == overview.render(), "paste the output of `llmqat info --families` there"


def test_every_family_and_shape_is_listed(capsys):
    assert main(["info", "--families", "--json"]) == 0
    tables = json.loads(capsys.readouterr().out)
    assert [row["family"] for row in tables["families"]] == list(FAMILIES) == list(MODELS)
    assert [row["name"] for row in tables["shapes"]] == list(SHAPES)
    assert {row["family"] for row in tables["shapes"]} == set(FAMILIES)
    assert main(["info", "--families"]) == 0
    assert capsys.readouterr().out == overview.render() + "\n"


def test_models_are_the_families():
    for name, (config, model) in MODELS.items():
        assert config.model_type == name and model.__name__ == FAMILIES[name].architecture
