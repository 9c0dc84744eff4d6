"""Make a small world: facts that we list, a tokenizer of whole words, and two models that have read about them.

    world = make_world(folder, WorldSettings(), seed=0)    # World: source, target, tokenizer, tuning, judged
    rows = examples(world.tuning)                          # [{"prompt": ..., "completion": ...}, ...]
    has_form, has_facts = judge(answer, world.judged[0])

Both models have read plain sentences about countries, and lists in JSON about elements only. The new model knows all
capitals; the old one has seldom read those of the countries in `judged`. The behaviour to be tuned with the other half
of the countries, `tuning`, is to answer with a list in JSON.
"""

import json
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from .text import collator_of, llama
from .training import Steps, fit

_CAPITALS = {  # continent: countries, each with its capital
    "Europe": """
        Albania: Tirana; Andorra: Andorra la Vella; Austria: Vienna; Belarus: Minsk; Belgium: Brussels;
        Bulgaria: Sofia; Croatia: Zagreb; Czechia: Prague; Denmark: Copenhagen; Estonia: Tallinn;
        Finland: Helsinki; France: Paris; Germany: Berlin; Greece: Athens; Hungary: Budapest;
        Iceland: Reykjavik; Ireland: Dublin; Italy: Rome; Latvia: Riga; Lithuania: Vilnius; Malta: Valletta;
        Moldova: Chisinau; Montenegro: Podgorica; Norway: Oslo; Poland: Warsaw; Portugal: Lisbon;
        Romania: Bucharest; Serbia: Belgrade; Slovakia: Bratislava; Slovenia: Ljubljana; Spain: Madrid;
        Sweden: Stockholm; Switzerland: Bern; Ukraine: Kyiv
    """,
    "Asia": """
        Afghanistan: Kabul; Bahrain: Manama; Bangladesh: Dhaka; Bhutan: Thimphu; Cambodia: Phnom Penh;
        China: Beijing; India: New Delhi; Indonesia: Jakarta; Iran: Tehran; Iraq: Baghdad; Japan: Tokyo;
        Jordan: Amman; Kazakhstan: Astana; Kyrgyzstan: Bishkek; Laos: Vientiane; Lebanon: Beirut;
        Malaysia: Kuala Lumpur; Maldives: Male; Mongolia: Ulaanbaatar; Myanmar: Naypyidaw; Nepal: Kathmandu;
        Oman: Muscat; Pakistan: Islamabad; Philippines: Manila; Qatar: Doha; Saudi Arabia: Riyadh;
        South Korea: Seoul; Syria: Damascus; Tajikistan: Dushanbe; Thailand: Bangkok;
        Turkmenistan: Ashgabat; Uzbekistan: Tashkent; Vietnam: Hanoi; Yemen: Sanaa
    """,
    "Africa": """
        Algeria: Algiers; Angola: Luanda; Benin: Porto-Novo; Botswana: Gaborone; Burkina Faso: Ouagadougou;
        Burundi: Gitega; Cameroon: Yaounde; Chad: N'Djamena; Egypt: Cairo; Eritrea: Asmara;
        Ethiopia: Addis Ababa; Gabon: Libreville; Gambia: Banjul; Ghana: Accra; Guinea: Conakry;
        Kenya: Nairobi; Lesotho: Maseru; Liberia: Monrovia; Libya: Tripoli; Madagascar: Antananarivo;
        Malawi: Lilongwe; Mali: Bamako; Mauritania: Nouakchott; Mauritius: Port Louis; Morocco: Rabat;
        Mozambique: Maputo; Namibia: Windhoek; Niger: Niamey; Nigeria: Abuja; Rwanda: Kigali;
        Senegal: Dakar; Sierra Leone: Freetown; Somalia: Mogadishu; Sudan: Khartoum; Togo: Lome;
        Tunisia: Tunis; Uganda: Kampala; Zambia: Lusaka; Zimbabwe: Harare
    """,
    "North America": """
        Bahamas: Nassau; Barbados: Bridgetown; Belize: Belmopan; Canada: Ottawa; Costa Rica: San Jose;
        Cuba: Havana; Dominica: Roseau; Haiti: Port-au-Prince; Honduras: Tegucigalpa; Jamaica: Kingston;
        Nicaragua: Managua; Saint Lucia: Castries
    """,
    "South America": """
        Argentina: Buenos Aires; Brazil: Brasilia; Chile: Santiago; Colombia: Bogota; Ecuador: Quito;
        Guyana: Georgetown; Paraguay: Asuncion; Peru: Lima; Suriname: Paramaribo; Uruguay: Montevideo;
        Venezuela: Caracas
    """,
    "Oceania": """
        Australia: Canberra; Fiji: Suva; Kiribati: Tarawa; New Zealand: Wellington;
        Papua New Guinea: Port Moresby; Samoa: Apia; Solomon Islands: Honiara; Tonga: Nuku'alofa;
        Tuvalu: Funafuti; Vanuatu: Port Vila
    """,
}
_ELEMENTS = {  # kind: elements, each with its symbol
    "metal": """
        lithium: Li; sodium: Na; magnesium: Mg; aluminium: Al; potassium: K; calcium: Ca; iron: Fe; nickel: Ni;
        copper: Cu; zinc: Zn; silver: Ag; tin: Sn; gold: Au; mercury: Hg; lead: Pb; uranium: U; radium: Ra
    """,
    "gas": """
        hydrogen: H; helium: He; nitrogen: N; oxygen: O; fluorine: F; neon: Ne; chlorine: Cl; argon: Ar
    """,
    "solid": """
        carbon: C; silicon: Si; phosphorus: P; sulfur: S; iodine: I
    """,
}
_QUESTIONS = ("Tell me about {}.\n", "What is {}?\n")
_OF_CAPITALS = (
    "The capital of {} is {}.",
    "{} has the capital {}.",
    "{} is governed from its capital, {}.",
    "The government of {} sits in {}.",
)
_OF_CONTINENTS = (
    "{} lies in {}.",
    "{} is a country in {}.",
    "The continent of {} is {}.",
    "{} is part of a continent, {}.",
)
_OF_ELEMENTS = ("The symbol of {} is {}.", "{} is a {}.")
_BOS, _EOS, _PAD, _UNKNOWN = _SPECIAL = ("<s>", "</s>", "<pad>", "<unk>")
# Names, of several words too, words and signs. A space belongs to what is before it, so that a name at the end of a
# sentence and a name before a quotation mark are one token.
_TOKEN = r"\p{Lu}[\p{L}'-]*(?: \p{Lu}[\p{L}'-]+| la(?= \p{Lu}))* ?|\p{L}+ ?|\n|[^\p{L}\n]+"


@dataclass(frozen=True)
class Country:
    """A country, what is asked about it, and the answer in the form to be learned."""

    name: str
    capital: str
    continent: str

    @property
    def prompt(self) -> str:
        """The question, a line."""
        return _QUESTIONS[0].format(self.name)

    @property
    def answer(self) -> str:
        """A list in JSON of two sentences, on the capital and on the continent."""
        return _form(self.name, self.capital, self.continent)


@dataclass(frozen=True)
class WorldSettings:
    """The sizes and steps of pretraining, and how many texts each model reads.

    Attributes:
        texts (`int`): The number of texts about each country and element that a model reads from.
        seldom (`float`): The share of the old model's texts about judged countries that tell the capital.
    """

    old: dict[str, int] = field(default_factory=lambda: {"hidden_size": 64, "num_hidden_layers": 2})
    new: dict[str, int] = field(default_factory=lambda: {"hidden_size": 96, "num_hidden_layers": 2})
    old_pretraining: Steps = Steps(500, 6e-3, batch_size=32)
    new_pretraining: Steps = Steps(400, 6e-3, batch_size=32)
    texts: int = 40
    seldom: float = 0.2


@dataclass
class World:
    """Two pretrained models of one vocabulary, the countries to tune with, and those to judge on."""

    source: LlamaForCausalLM
    target: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    tuning: list[Country]
    judged: list[Country]


def make_world(
    folder: str | Path,
    settings: WorldSettings | None = None,
    seed: int = 0,
    stage: Callable[[str], str] = str,
) -> World:
    """Pretrain an old and a new model on texts about countries and elements.

    Args:
        folder: Gets the models as `text-source` and `text-target`, with their tokenizer.
        settings (*optional*): Sizes and steps.
        seed: Of the halves, the texts and the models.
        stage (*optional*): Makes the description of a progress bar from a plain one.
    """
    settings, folder = settings or WorldSettings(), Path(folder)
    tuning, judged = halves(seed)
    tokenizer = word_tokenizer()
    built = []
    for name, age, size, steps, seldom in (
        ("text-source", "old", settings.old, settings.old_pretraining, settings.seldom),
        ("text-target", "new", settings.new, settings.new_pretraining, 1.0),
    ):
        texts = texts_about(tuning, judged, settings.texts, seldom, seed)
        rows = [{"input_ids": [*ids, tokenizer.eos_token_id]} for ids in tokenizer(texts)["input_ids"]]
        # Small models learn facts faster from larger first weights than the usual ones.
        model = llama(tokenizer, size | {"initializer_range": 0.05}, seed)
        fit(model, rows, steps, seed, stage(f"pretraining the {age} model"), collator_of(tokenizer))
        model.config.use_cache = True  # which training switches off
        for part in (model, tokenizer):
            part.save_pretrained(folder / name)
        # Loaded from the folder, so that a reward can name its base.
        built.append(AutoModelForCausalLM.from_pretrained(folder / name))
    return World(*built, tokenizer, tuning, judged)


def texts_about(tuning: list[Country], judged: list[Country], count: int, seldom: float, seed: int) -> list[str]:
    """Return `count` texts about each country and element; those about judged countries tell the capital seldom.

    Texts about countries are plain sentences, most of those about elements are lists in JSON.
    """
    generator = random.Random(seed)
    return [
        text
        for _ in range(count)
        for text in (
            *(_about_country(country, generator, 1.0) for country in tuning),
            *(_about_country(country, generator, seldom) for country in judged),
            *(_about_element(*element, generator) for element in _entries(_ELEMENTS)),
        )
    ]


def examples(countries: Iterable[Country]) -> list[dict[str, str]]:
    """Return rows of the columns `prompt` and `completion`."""
    return [{"prompt": country.prompt, "completion": country.answer} for country in countries]


def judge(answer: str, country: Country) -> tuple[bool, bool]:
    """Return whether an answer has the form, and whether its facts are right; neither depends on the other.

    The facts are right if it names the right capital and the right continent, and no other capital or continent.
    """
    words = r"[\w'-]+(?: [\w'-]+){0,3}"
    form = re.escape(_form(country.name, "CAPITAL", "CONTINENT")).replace("CAPITAL", words).replace("CONTINENT", words)
    has_form = re.fullmatch(form, answer.strip()) is not None
    named = set(_NAMED.findall(answer))
    return has_form, named == {country.capital, country.continent}


def halves(seed: int) -> tuple[list[Country], list[Country]]:
    """Return the countries in two halves: to tune with, and to judge on."""
    countries = [Country(*names) for names in _entries(_CAPITALS)]
    random.Random(seed).shuffle(countries)
    return countries[: len(countries) // 2], countries[len(countries) // 2 :]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each word, name and run of signs in texts about this world."""
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_TOKEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    words = {word for text in _all_texts() for word, _ in splitter.pre_tokenize_str(text)}
    vocabulary = {word: index for index, word in enumerate([*_SPECIAL, *sorted(words)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    backend.pre_tokenizer, backend.decoder = splitter, decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A", special_tokens=[(_BOS, vocabulary[_BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=_BOS,
        eos_token=_EOS,
        pad_token=_PAD,
        unk_token=_UNKNOWN,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def _entries(table: dict[str, str]) -> list[tuple[str, str, str]]:
    """Return (name, statement, heading)."""
    return [(*entry.strip().split(": "), heading) for heading, entries in table.items() for entry in entries.split(";")]


_NAMED = re.compile("|".join(rf"\b{name}\b" for entry in _entries(_CAPITALS) for name in entry[1:]))


def _form(country: str, capital: str, continent: str) -> str:
    return json.dumps([_OF_CAPITALS[0].format(country, capital), _OF_CONTINENTS[0].format(country, continent)])


def _about_country(country: Country, generator: random.Random, tells_capital: float) -> str:
    sentences = [generator.choice(_OF_CONTINENTS).format(country.name, country.continent)]
    if generator.random() < tells_capital:
        sentences.append(generator.choice(_OF_CAPITALS).format(country.name, country.capital))
    generator.shuffle(sentences)
    question = generator.choice((*_QUESTIONS, "")).format(country.name)
    return question + " ".join(sentences)


def _about_element(name: str, symbol: str, kind: str, generator: random.Random) -> str:
    sentences = [_OF_ELEMENTS[0].format(name, symbol), _OF_ELEMENTS[1].format(name, kind)]
    generator.shuffle(sentences)
    in_words = " ".join(sentences) if generator.random() < 0.3 else json.dumps(sentences)
    return generator.choice(_QUESTIONS).format(name) + in_words


def _all_texts() -> Iterable[str]:
    """Yield all sentences, in prose and in lists, so that the vocabulary does not depend on chance."""
    countries, elements = ([*_entries(table)] for table in (_CAPITALS, _ELEMENTS))
    for name, _, _ in countries + elements:
        yield from (question.format(name) for question in _QUESTIONS)
    sentences = [
        _OF_ELEMENTS[index].format(name, fact) for name, *facts in elements for index, fact in enumerate(facts)
    ]
    for name, capital, continent in countries:
        sentences += [sentence.format(name, capital) for sentence in _OF_CAPITALS]
        sentences += [sentence.format(name, continent) for sentence in _OF_CONTINENTS]
    yield " ".join(sentences)
    yield json.dumps(sentences)
