"""Wiki markup to prose: one case per rule, and no markup left over."""

# ruff: noqa: RUF001 (the dashes of real text are the subject here)

import pytest

from llmqat.demo.wikitext import MIN_PARAGRAPH, excerpt, paragraphs

TAIL = " This sentence makes the paragraph long enough to count as prose."


def _one(markup):
    lines = paragraphs(markup + TAIL)
    assert len(lines) == 1 and lines[0].endswith(TAIL)
    return lines[0].removesuffix(TAIL)


@pytest.mark.parametrize(
    ("markup", "prose"),
    [
        ("'''Bold''' and ''slanted''.", "Bold and slanted."),
        ("A [[page]] and a [[page|link]].", "A page and a link."),
        ("Kept.[[File:x.png|thumb|A [[cat]] by [http://a.b C]]]", "Kept."),
        ("Alkanes.[[Image:a.png|thumb|The [n]-alkanes]]", "Alkanes."),
        ("Broken [[link here.", "Broken link here."),
        ("Text.[[Category:Cats]][[de:Katze]]", "Text."),
        ("See [http://a.b/c the site] now.", "See the site now."),
        ("See [http://a.b the [[thing]] there] now.", "See the thing there now."),
        ("Fact.<ref name=a/> More.<ref>{{cite|x}}</ref>", "Fact. More."),
        ("Fact.<ref>one</ref> Kept.<ref name=b>two</ref>", "Fact. Kept."),
        ("Seen<!-- hidden\nlines -->.", "Seen."),
        ("It is {{convert|5|km|mi}} long.", "It is 5 km long."),
        ("It is {{convert|5|to|7|km|mi}} long.", "It is 5 to 7 km long."),
        ("The {{lang|de|Wort}} and {{lang-fr|mot}}.", "The Wort and mot."),
        ("In {{nowrap|one line}}{{cn|date={{now}}}}.", "In one line."),
        ("1914{{ndash}}1918.", "1914–1918."),
        ("Name ({{IPA|x}}; born 1902) wrote.", "Name (born 1902) wrote."),
        ("Name ({{IPA|x}}) wrote.", "Name wrote."),
        ("a&nbsp;b &amp; c<br />d.", "a b & c d."),
        ("H<sub>2</sub>O.", "H2O."),
        ("The value <math>x^2</math> , as said.", "The value, as said."),
    ],
)
def test_rules(markup, prose):
    assert _one(markup) == prose


def test_tables_lists_headings_and_short_lines_go():
    prose = "A paragraph of prose that is certainly long enough to be kept here."
    assert len(prose) >= MIN_PARAGRAPH
    markup = f"""{{{{Infobox
| name = x {{{{nested}}}}
}}}}
== Heading ==
* {prose}
# {prose}
: {prose}
{{| class="wikitable"
| {prose}
{{| nested
|}}
|}}
Short.
A line that is long enough to be prose but stops in the middle of its
{prose}
"""
    assert paragraphs(markup) == [prose]


def test_unbalanced_template_takes_the_rest_with_it():
    assert paragraphs("Lost " * 20 + ".\n") != []
    assert paragraphs("{{open " + "lost " * 20 + ".\n") == []


def test_excerpt_ends_with_a_sentence():
    sentence = "Ten words of plain prose stand here in one sentence."
    article = " ".join([sentence] * 10)
    assert excerpt(article, 10_000) == article
    cut = excerpt(article, 200)
    assert len(cut) <= 200 and cut == " ".join([sentence] * 3)
    assert excerpt(article, 5) == ""
    assert excerpt("", 100) == ""
