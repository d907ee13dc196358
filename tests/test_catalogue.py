"""The catalogue: every entry leads somewhere, every citation is whole."""

import importlib

import pytest

import allrounder as ar
from allrounder.catalogue import nearest, paper


@pytest.mark.parametrize("slug", list(ar.papers()))
def test_every_entry_leads_to_its_method_and_study(slug):
    entry = paper(slug)
    assert callable(entry.load())
    assert callable(importlib.import_module(entry.study).run)
    for field in (entry.title, entry.authors, entry.arxiv, entry.sentence):
        assert field.strip() == field != ""
        assert "{" not in field
    assert entry.bibtex.count("{") == entry.bibtex.count("}")
    assert entry.arxiv in entry.bibtex
    assert ar.cite(entry.load()) == ar.cite(slug) == entry.bibtex


def test_citations_by_object():
    assert "2407.02880" in ar.cite(ar.merging.atlas_negation)
    with pytest.raises(ar.InputError, match="'len' belongs to no paper"):
        ar.cite(len)


def test_the_nearest_name_is_offered():
    assert nearest("tall-mask", list(ar.papers())) == "did you mean 'tall-masks'?"
    assert nearest("zzz", ["a", "b"]) == "there are a, b"
    with pytest.raises(ar.InputError, match="no paper is called 'adamergin'; did you mean 'adamerging'"):
        paper("adamergin")
