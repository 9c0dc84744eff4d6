"""The world of the demo: its facts, its texts, its words, and the rule that answers are judged by."""

import pytest

from prt_hf import VocabularyContract
from prt_hf.demo.facts import Country, examples, halves, judge, texts_about, word_tokenizer

NORWAY = Country("Norway", "Oslo", "Europe")


def test_halves_have_no_country_in_common():
    tuning, judged = halves(0)
    countries = tuning + judged
    assert len(tuning) == len(judged) == 70
    assert len({country.name for country in countries}) == len({country.capital for country in countries}) == 140
    assert NORWAY in countries and Country("Papua New Guinea", "Port Moresby", "Oceania") in countries
    assert len({country.continent for country in countries}) == 6
    assert halves(1) != halves(0) == (tuning, judged)


@pytest.mark.parametrize(
    ("answer", "form", "facts"),
    [
        (NORWAY.answer, True, True),
        ('["The capital of Norway is Oslo.", "Norway lies in Europe."]', True, True),
        ("The capital of Norway is Oslo. Norway lies in Europe.", False, True),
        ("Oslo, Europe", False, True),
        ('["The capital of Norway is Lima.", "Norway lies in Europe."]', True, False),
        ('["The capital of Norway is Oslo.", "Norway lies in South America."]', True, False),
        ('["The capital of Norway is Oslo.", "Norway lies in iron."]', True, False),
        ('["The capital of Sweden is Oslo.", "Sweden lies in Europe."]', False, True),
        ('["The capital of Norway is Oslo."]', False, False),
        ('["Norway lies in Europe.", "The capital of Norway is Oslo."]', False, True),
        ('["The capital of Norway is Oslo.", "Norway lies in Europe."] and so on', False, True),
        ('["The capital of Norway is Oslo.", "Norway lies in Europe.", "Norway lies in Asia."]', False, False),
        ("Oslo or Lima, Europe", False, False),
        ("Oslovia, Europe", False, False),
        ("", False, False),
    ],
)
def test_answers_are_judged_by_form_and_facts(answer, form, facts):
    assert judge(answer, NORWAY) == (form, facts)


def test_every_right_answer_is_judged_right_and_no_other():
    for country, other in zip(*halves(0), strict=True):
        assert judge(country.answer, country) == (True, True)
        assert judge(country.answer, other) == (False, False)


def test_no_model_reads_a_list_about_a_country():
    tuning, judged = halves(0)
    texts = texts_about(tuning, judged, 20, 0.2, seed=0)
    lists = [text for text in texts if "[" in text]
    assert 0.6 < len(lists) / (20 * 30) < 0.8  # of the texts about 30 elements
    assert not any(country.name in text for text in lists for country in tuning + judged)


def test_the_old_model_seldom_reads_the_judged_capitals():
    tuning, judged = halves(0)
    texts = texts_about(tuning, judged, 20, 0.2, seed=0)
    told = [sum(country.capital in text for text in texts for country in half) / (20 * 70) for half in (tuning, judged)]
    assert told[0] == 1.0 and abs(told[1] - 0.2) < 0.04  # a standard error of 0.011
    everything = texts_about(tuning, judged, 2, 1.0, seed=0)
    assert sum(country.capital in text for text in everything for country in judged) == 2 * 70
    assert texts == texts_about(tuning, judged, 20, 0.2, seed=0) != texts_about(tuning, judged, 20, 0.2, seed=1)


def test_the_tokenizer_knows_every_word_and_gives_texts_back():
    tokenizer, (tuning, judged) = word_tokenizer(), halves(0)
    texts = [row["prompt"] + row["completion"] for row in examples(tuning + judged)]
    for text in texts + texts_about(tuning, judged, 3, 1.0, seed=0):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in ids, text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_prompt_is_the_beginning_of_its_example_in_tokens_too():
    tokenizer = word_tokenizer()
    prompt, whole = tokenizer([NORWAY.prompt, NORWAY.prompt + NORWAY.answer])["input_ids"]
    assert whole[: len(prompt)] == prompt


def test_names_at_the_end_of_a_sentence_and_of_a_quotation_are_one_token():
    tokenizer = word_tokenizer()
    contract = VocabularyContract.from_tokenizer(tokenizer)
    assert {b"Oslo", b"Norway ", b"Norway", b"Papua New Guinea ", b'["', b'."]'} <= contract.vocabulary.keys()
    oslo = contract.vocabulary[b"Oslo"]
    assert oslo in tokenizer("The capital of Norway is Oslo.")["input_ids"]
    assert oslo in tokenizer(NORWAY.answer)["input_ids"]
