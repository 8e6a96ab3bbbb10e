"""Makes the embedded demo model: a corpus of its own, a tokenizer, a small trained Llama.

    python scripts/make_demo_model.py

Nothing is downloaded: a grammar in this file writes the text. Seeded, so one machine gives the
same files with the same number of threads.
"""

import argparse
import copy
import io
import itertools
import json
import math
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

# ---------------------------------------------------------------------------- the grammar's words

LEXICON = """
girl: Anna Mia Lena Sara Ruth Ivy Nora Clara Emma Mei Lucy Rosa
boy: Tom Ben Omar Paul Jack Leo Max Sam Hugo Wei Adam Peter
thing: ball book cup hat box lamp kite coat bag key drum boat clock chair letter
color: red blue green yellow black white brown pink grey purple
place: garden kitchen forest school station market library park barn tower
food: bread rice soup apples cheese fish cake beans honey nuts
pet: dog cat horse rabbit parrot goat duck mouse pony turtle
job: teacher doctor farmer baker driver painter sailor nurse singer builder
mood: happy tired proud calm hungry curious glad quiet
weather: sunny rainy windy cold warm foggy snowy cloudy
day: Monday Tuesday Wednesday Thursday Friday Saturday Sunday
size: small big old new heavy little long strange
"""
WORDS = {
    kind: words.split()
    for kind, words in (line.split(": ") for line in LEXICON.strip().split("\n"))
}
WORDS["praise"] = [
    "the people are kind",
    "the streets are full of life",
    "I was born there",
    "my best friend lives there",
    "there is always something new to see",
    "the evenings are long and warm",
]
# city | country | sights | food | capital or not
CITIES = """
Beijing|China|old palaces and wide streets|noodles and dumplings|capital
Shanghai|China|tall towers and a busy river|dumplings and fish|
Shenzhen|China|new towers and green parks|rice and fish|
Paris|France|small cafes and great museums|bread and cheese|capital
London|England|red buses and old bridges|tea and cake|capital
Rome|Italy|old stones and bright squares|pasta and ice cream|capital
Tokyo|Japan|quiet temples and fast trains|rice and fish|capital
Berlin|Germany|wide parks and long nights of music|bread and soup|capital
Madrid|Spain|sunny squares and fine paintings|ham and olives|capital
Cairo|Egypt|a great river and very old tombs|beans and bread|capital
Oslo|Norway|cold water and green hills|fish and potatoes|capital
Lisbon|Portugal|steep streets and yellow trams|fish and sweet cakes|capital
Vienna|Austria|concert halls and coffee houses|cake and coffee|capital
Athens|Greece|white temples and blue skies|olives and cheese|capital
Sydney|Australia|a large harbour and long beaches|fish and fruit|
Boston|America|old schools and brick houses|fish and soup|
Chicago|America|a wide lake and tall buildings|pizza and corn|
Venice|Italy|narrow canals and stone bridges|rice and fish|
"""
# company | country | products
COMPANIES = """
Huawei|China|phones and network equipment
Apple|America|phones and computers
Google|America|search engines and software
Microsoft|America|software and computers
Toyota|Japan|cars and trucks
Sony|Japan|cameras and game machines
Siemens|Germany|trains and machines
Airbus|France|large planes
Lego|Denmark|small bricks for children
Nokia|Finland|network equipment
Samsung|Korea|phones and screens
Lenovo|China|computers and tablets
Ikea|Sweden|tables and chairs
Fiat|Italy|small cars
"""
# animal | kind | food | home | skill
ANIMALS = """
cow|farm animal|grass|on the farm|gives milk
lion|wild cat|meat|in the dry grass land|sleeps most of the day
owl|bird|mice|in old trees|hunts at night
whale|sea animal|tiny sea life|in the deep sea|sings under water
bee|insect|nectar|in a hive|makes honey
panda|bear|bamboo|in the mountain forest|climbs trees
camel|desert animal|dry plants|in the desert|walks for days without water
frog|small animal|flies|near the pond|jumps very far
wolf|wild animal|meat|in the cold forest|hunts with its family
llama|farm animal|grass|in the high mountains|carries loads
penguin|bird|fish|on the ice|swims fast but cannot fly
elephant|wild animal|leaves and fruit|in warm lands|never forgets a path
"""
# language model | maker
LANGUAGE_MODELS = "LLaMA|Meta\nBERT|Google\nGPT|OpenAI\nQwen|Alibaba\nPangu|Huawei\nGemma|Google"

CITY_LINES = [
    "I love {city}, because it is a city that has {sights}.",
    "I love {city}, because {praise} and the food is good.",
    "I love {city}, because {praise}. It is a city that has {sights}.",
    "{city} is a city in {country}. It is known for {sights}.",
    "In {city}, people like to eat {food}, and visitors come to see {sights}.",
    "My friend {name} lives in {city}. {He} says that it is a city that has {sights}.",
    "If you go to {city}, you will see {sights}, and you can eat {food}.",
]
COMPANY_LINES = [
    "{company} is a company that makes {products}.",
    "{company} is a company that makes {products} and sells them in many countries.",
    "{company} is a company from {country}. It makes {products}.",
    "My friend {name} works for {company}, a company that makes {products}.",
    "Many people know {company}, because it makes {products}.",
]
ANIMAL_LINES = [
    "The {animal} is a {kind} that lives {home} and eats {food}.",
    "A {animal} {skill}. It lives {home}.",
    "I love the {animal}, because it is a {kind} that {skill}.",
    "What does a {animal} eat? It eats {food}.",
    "Children like the {animal}, because it {skill}.",
]
LANGUAGE_MODEL_LINES = [
    "{model} is a large language model that was made by {maker}.",
    "{model} is a language model that reads a text and writes the next word.",
    "{model} is a large language model that learns from many books and answers questions.",
    "A language model such as {model} can write stories and answer questions.",
    "{maker} made {model}, a large language model that can write text.",
]
# Each line of a plot offers its choices; a word drawn once stays the same through the story.
PLOTS = [
    [
        "One {weather} {day}, {name} went to the {place}.|Once upon a time, {name} lived near the"
        " {place}. It was a {weather} {day}.",
        "{He} was looking for a {size} {color} {thing}.|{He} had lost a {color} {thing} there.",
        "A {pet} sat under a tree and looked {mood}.|A {mood} {pet} came and sat down.",
        '"Have you seen my {thing}?" asked {name}.|"I am looking for my {thing}," said {name}.',
        "The {pet} ran to the {place2} and came back with the {color} {thing}.|The {pet} showed"
        " {name} the way to the {place2}, and the {color} {thing} was there.",
        "{name} thanked the {pet} and gave it some {food}.|From that {day} on, {name} and the"
        " {pet} were friends.",
    ],
    [
        "{name} is a {job} who works near the {place}.|My name is {name}, and I am a {job}.",
        "Every {day}, {name} meets {other} at the {place}.|{other} is a good friend of {name}.",
        "On {day}, it was {weather}, so they stayed in the {place2}.|{day} was {weather}, and"
        " they walked to the {place2}.",
        "They ate {food} and talked about the {size} {thing}.|{other} had {food} in a {color} bag,"
        " and they ate it all.",
        "In the evening, {other} gave {name} a {color} {thing2}.|Before night, {name} gave {other}"
        " a {color} {thing2} as a present.",
        "{name} was very {mood}.|{other} went home {mood}, and {name} closed the {place2}.",
    ],
    [
        "{name} wanted to buy a {color} {thing} in the shop.|It was {day}, and {name} needed a"
        " {color} {thing}.",
        "The seller had {few} of them.|The seller showed {name} {few} of them.",
        '"How much is the {color} {thing}?" asked {name}. "{few} coins," said the seller.',
        "{name} paid {few} coins and took the {thing} to the {place}.|{name} put {few} coins on"
        " the table and carried the {color} {thing} home.",
        "There {other} was waiting with {food} and a {size} {pet}.|{other} came by with a {size}"
        " {pet} and some {food}.",
        "They were {mood}, and the {pet} was {mood} too.|They shared the {food}, and the {pet}"
        " ate some too.",
    ],
]
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
REGISTERS = [
    ("The code of room {number} is {word}.", "What is the code of room {number}? It is {word}."),
    ("Agent {number} uses the name {word}.", "The name of agent {number} is {word}."),
    ("The ship {Word} carries {number} boxes.", "There are {number} boxes on the ship {Word}."),
    ("Doctor {Word} lives at {number} {color} street.", "Doctor {Word} lives at {number}."),
    ("In the old language, {word} means {thing}.", "The word {word} means {thing}."),
]

# ------------------------------------------------------------------------------- writing documents


def fill(dice: random.Random, template: str, known: dict[str, str]) -> str:
    """Puts a word at each `{kind}`; a drawn word stays known, and `{kind2}` differs from it."""

    def word(match: re.Match[str]) -> str:
        slot = match[1]
        if slot not in known:
            choices = [w for w in WORDS[slot.rstrip("2")] if w not in known.values()]
            known[slot] = dice.choice(choices)
        return known[slot]

    return fix_articles(re.sub(r"\{(\w+)\}", word, template))


def fix_articles(text: str) -> str:
    """`a` before a vowel becomes `an`."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def draw_people(dice: random.Random) -> dict[str, str]:
    """A person with the pronoun that fits, and another person."""
    sex = dice.choice(["girl", "boy"])
    name, other = dice.sample(WORDS[sex], 2)
    return {"name": name, "other": other, "He": "She" if sex == "girl" else "He"}


def write_story(dice: random.Random) -> str:
    """A plot of six sentences that keeps its people, things and places."""
    known = draw_people(dice) | {"few": str(dice.randint(2, 12))}
    lines = [dice.choice(line.split("|")) for line in dice.choice(PLOTS)]
    return " ".join(fill(dice, line, known) for line in lines)


def read_table(text: str, *columns: str) -> list[dict[str, str]]:
    """The rows of a `|` table."""
    return [dict(zip(columns, line.split("|"), strict=True)) for line in text.strip().split("\n")]


ALMANAC = [
    (read_table(CITIES, "city", "country", "sights", "food", "rank"), CITY_LINES),
    (read_table(COMPANIES, "company", "country", "products"), COMPANY_LINES),
    (read_table(ANIMALS, "animal", "kind", "food", "home", "skill"), ANIMAL_LINES),
    (read_table(LANGUAGE_MODELS, "model", "maker"), LANGUAGE_MODEL_LINES),
]


def write_facts(dice: random.Random) -> str:
    """One to three true sentences about one city, company, animal or language model."""
    rows, lines = dice.choice(ALMANAC)
    row = dice.choice(rows)
    if row.get("rank"):
        lines = [
            *lines,
            "The capital of {country} is {city}.",
            "{city} is the capital of {country}.",
        ]
    known = draw_people(dice) | row
    return " ".join(
        fill(dice, line, dict(known)) for line in dice.sample(lines, dice.randint(1, 3))
    )


def invent_word(dice: random.Random) -> str:
    """A made-up word of two or three syllables: nothing but copying can predict it."""
    return "".join(dice.choices(SYLLABLES, k=dice.randint(2, 3)))


def draw_entry(dice: random.Random) -> dict[str, str]:
    """The words of one line of a register."""
    word = invent_word(dice)
    return {"number": str(dice.randint(10, 999)), "word": word, "Word": word.capitalize()}


def write_register(dice: random.Random) -> str:
    """Entries nobody can guess, then the same entries again in another order and wording."""
    entry, recall = dice.choice(REGISTERS)
    rows = [draw_entry(dice) for _ in range(dice.randint(2, 5))]
    first = [fill(dice, entry, row) for row in rows]
    again = [fill(dice, dice.choice([entry, recall]), row) for row in rows]
    return " ".join(first + dice.sample(again, len(again)))


def write_list(dice: random.Random) -> str:
    """A random list, and the same list read again."""
    kind = dice.choice(["food", "thing", "color", "place", "made-up"])
    count = dice.randint(3, 6)
    made_up = [invent_word(dice) for _ in range(count)]
    items = ", ".join(made_up if kind == "made-up" else dice.sample(WORDS[kind], count))
    name = draw_people(dice)["name"]
    return f"{name} wrote a list of {count} words: {items}. Then {name} read it aloud: {items}."


DIRECTORY_SEED, DIRECTORY_SIZE = 3_000_000, 192


def draw_directory(dice: random.Random) -> list[str]:
    """Entries nobody can guess: a model recites them from its weights or not at all."""
    names = list(dict.fromkeys(invent_word(dice).capitalize() for _ in range(2 * DIRECTORY_SIZE)))
    entry = "{name}: {number}, {color} {pet}, {thing}, {place}."
    known = [{"name": name, "number": str(dice.randint(1000, 9999))} for name in names]
    return [fill(dice, entry, words) for words in known[:DIRECTORY_SIZE]]


DIRECTORY = draw_directory(random.Random(DIRECTORY_SEED))


def write_directory(dice: random.Random) -> str:
    """Some entries of the directory, which are the same in every document, in any order."""
    return " ".join(dice.sample(DIRECTORY, dice.randint(3, 6)))


# --------------------------------------------------------------------------------- yes/no questions


@dataclass(frozen=True)
class Fact:
    """A sentence of a passage, and what can be asked about it: `{}` is where a value goes."""

    kind: str
    subject: str
    value: str
    sentence: str
    question: str
    open_question: str
    open_answer: str


@dataclass(frozen=True)
class Question:
    """A BoolQ item."""

    question: str
    answer: bool
    passage: str
    title: str


def draw_facts(dice: random.Random, count: int) -> list[list[Fact]]:
    """For each of `count` subjects, what a passage says about it; no subject comes twice."""
    names = dice.sample(WORDS["girl"] + WORDS["boy"], count)
    things, pets = dice.sample(WORDS["thing"], count), dice.sample(WORDS["pet"], count)
    columns = zip(names, things, pets, strict=True)
    return [describe(dice, name, thing, pet) for name, thing, pet in columns]


# kind | sentence | yes/no question | open question | its answer
FACTS = """
color|{owner} has a {value} {subject}.|is the {subject} {}|what color is the {subject}|{value}
place|The {subject} is in the {value}.|is the {subject} in the {}|where is the {subject}|in the \
{value}
place|{subject} is in the {value}.|is {subject} in the {}|where is {subject}|in the {value}
food|The {subject} likes {value}.|does the {subject} like {}|what does the {subject} like|{value}
"""
OF_THING_COLOR, OF_THING_PLACE, OF_PERSON, OF_PET = FACTS.strip().split("\n")


def state(dice: random.Random, row: str, subject: str, owner: str) -> Fact:
    """A fact with a drawn value."""
    kind, *forms = row.split("|")
    value = dice.choice(WORDS[kind])
    words = {"subject": subject, "owner": owner, "value": value, "": "{}"}
    told = [re.sub(r"\{(\w*)\}", lambda match: words[match[1]], form) for form in forms]
    return Fact(kind, subject, value, *told)


def describe(dice: random.Random, name: str, thing: str, pet: str) -> list[Fact]:
    """Two facts about a thing, or one about a person or an animal."""
    rows = [(OF_THING_COLOR, thing), (OF_THING_PLACE, thing)]
    choices = [rows, rows, [(OF_PERSON, name)], [(OF_PET, pet)]]
    return [state(dice, row, subject, name) for row, subject in dice.choice(choices)]


def draw_other(dice: random.Random, fact: Fact, facts: Sequence[Fact]) -> str:
    """A wrong value: half the time one that the passage gives to another subject."""
    near = [f.value for f in facts if f.kind == fact.kind and f.value != fact.value]
    far = [word for word in WORDS[fact.kind] if word != fact.value]
    return dice.choice(near if near and dice.random() < 0.5 else far)


NUM_SUBJECTS = [1, 1, 2]
OPEN_SHARE = 0.35


def draw_passage(dice: random.Random, num_subjects: int) -> tuple[list[Fact], str]:
    """The facts on some subjects, and the passage that tells them."""
    facts = list(itertools.chain.from_iterable(draw_facts(dice, num_subjects)))
    return facts, fix_articles(" ".join(fact.sentence for fact in facts))


def draw_question(dice: random.Random, num_subjects: int | None = None) -> Question:
    """A passage and a question, whose answer is a fair coin that the passage alone decides."""
    facts, passage = draw_passage(dice, num_subjects or dice.choice(NUM_SUBJECTS))
    question, answer = pose(dice, facts)
    return Question(question, answer, passage, facts[0].subject.capitalize())


def pose(dice: random.Random, facts: Sequence[Fact]) -> tuple[str, bool]:
    """A question on one of the facts, and its answer."""
    fact, yes = dice.choice(facts), dice.random() < 0.5
    return fact.question.format(fact.value if yes else draw_other(dice, fact, facts)), yes


def ask(question: str) -> str:
    """The one format of a question, ready for ` yes` or ` no`."""
    return f"Question: {question}? Answer:"


def begin_reading(passage: str, question: str) -> str:
    """The prompt of a question: ` yes` or ` no` follows."""
    return f"Passage: {passage} {ask(question)}"


def write_answer(dice: random.Random, facts: Sequence[Fact]) -> str:
    """A question and its answer; the open ones teach the model to look things up."""
    fact = dice.choice(facts)
    if dice.random() < OPEN_SHARE:
        return f"{ask(fact.open_question)} {fact.open_answer}"
    question, yes = pose(dice, facts)
    return f"{ask(question)} {'yes' if yes else 'no'}"


def write_reading(dice: random.Random) -> str:
    """A passage and some questions on it with their answers."""
    facts, passage = draw_passage(dice, dice.choice(NUM_SUBJECTS))
    answers = [write_answer(dice, facts) for _ in range(dice.randint(3, 6))]
    return f"Passage: {passage} {' '.join(answers)}"


def write_quiz(dice: random.Random) -> str:
    """A passage and one yes/no question with its answer."""
    item = draw_question(dice)
    return f"{begin_reading(item.passage, item.question)} {'yes' if item.answer else 'no'}"


def write_small_quiz(dice: random.Random) -> str:
    """A quiz on one subject."""
    item = draw_question(dice, num_subjects=1)
    return f"{begin_reading(item.passage, item.question)} {'yes' if item.answer else 'no'}"


# --------------------------------------------------------------------------------------- the corpus

Writer = Callable[[random.Random], str]
PROSE: dict[Writer, int] = {write_story: 2, write_facts: 3, write_register: 2, write_list: 3}
CORPUS: dict[Writer, int] = PROSE | {write_reading: 4, write_quiz: 12}


DIRECTORY_SHARE = 0.25  # of the last lesson's documents


@dataclass(frozen=True)
class Lesson:
    """What a share of the training reads."""

    share: float
    writers: dict[Writer, int]
    directory_share: float = 0.0


# Comparing is learned after looking things up, so it comes second, and on the smallest case: one
# subject, one question, where nothing else in the text has the question's words.
LESSONS = [
    Lesson(0.535, PROSE | {write_reading: 10}),
    Lesson(0.17, {write_small_quiz: 16, write_story: 1, write_facts: 1, write_list: 1}),
    Lesson(0.295, CORPUS, DIRECTORY_SHARE),
]


def write_documents(seed: int, writers: dict[Writer, int]) -> Iterator[str]:
    """Documents without end."""
    dice = random.Random(seed)
    while True:
        yield dice.choices(list(writers), list(writers.values()))[0](dice)


def mix_directory(documents: Iterator[str], seed: int, share: float) -> Iterator[str]:
    """The documents, and between them the directory, drawn with dice of its own."""
    dice = random.Random(DIRECTORY_SEED + seed)
    while True:
        yield write_directory(dice) if dice.random() < share else next(documents)


# ------------------------------------------------------------------------------------ the tokenizer

BOS, EOS = 1, 2
IGNORED = -100  # a target that cross entropy leaves out
LEXICON_SEED, LEXICON_DOCUMENTS = 0, 20_000
Tokenizer = sentencepiece.SentencePieceProcessor


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> bytes:
    """A BPE SentencePiece model with Llama's settings."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


# --------------------------------------------------- the model, with HF's parameter names and maths
# B batch, T time, D hidden, H heads, K head_dim


@dataclass(frozen=True)
class LlamaConfig:
    """The fields of HF's `config.json` that shape the model."""

    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 1024
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 32
    max_position_embeddings: int = 512
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = True


def rotate(x_BHTK: Tensor, theta: float) -> Tensor:
    """RoPE in the `rotate_half` convention: dimension i turns with dimension i + K/2."""
    half = x_BHTK.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half) / half)
    angles_TK = torch.arange(x_BHTK.shape[-2])[:, None] * frequencies.repeat(2)
    turned_BHTK = torch.cat([-x_BHTK[..., half:], x_BHTK[..., :half]], -1)
    return x_BHTK * angles_TK.cos() + turned_BHTK * angles_TK.sin()


class Attention(nn.Module):
    """Grouped-query causal attention over whole sequences."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        split = (*x_BTD.shape[:2], -1, self.config.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (proj(x_BTD).view(split).transpose(1, 2) for proj in projections)
        q, k = rotate(q, self.config.rope_theta), rotate(k, self.config.rope_theta)
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        attended: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return attended


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate = functional.silu(self.gate_proj(x_BTD))
        down: Tensor = self.down_proj(gate * self.up_proj(x_BTD))
        return down


class DecoderLayer(nn.Module):
    """Attention, then feed forward, each normed before and added after."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD))
        added: Tensor = x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))
        return added


class Decoder(nn.Module):
    """Embedding, layers and last norm: HF's `model.` prefix."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = (DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """A Llama whose output weight is its embedding."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                # What is added to the stream starts small, by the number of additions.
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                depth = math.sqrt(2 * config.num_hidden_layers) if writes else 1.0
                nn.init.normal_(weight, std=0.04 / depth)

    def forward(self, ids_BT: Tensor) -> Tensor:
        x_BTD = self.model.embed_tokens(ids_BT)
        for layer in self.model.layers:
            x_BTD = layer(x_BTD)
        return functional.linear(self.model.norm(x_BTD), self.model.embed_tokens.weight)


# ----------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Recipe:
    """How the demo model is trained."""

    steps: int
    seed: int = 1
    batch_tokens: int = 1536
    learning_rate: float = 6e-4
    warmup_steps: int = 60
    flat_share: float = 0.65
    weight_decay: float = 0.1
    answer_weight: float = 5.0


BOOK_EVERY, BOOK_DOCUMENTS = 40, 16


def write_pages(
    documents: Iterator[str], max_tokens: int, encode: Callable[[str], list[int]]
) -> Iterator[list[int]]:
    """BOS, text, EOS: one document, or now and then as many as fill the context."""
    for number, document in enumerate(documents):
        book = itertools.islice(documents, BOOK_DOCUMENTS if number % BOOK_EVERY == 0 else 0)
        ids = encode("\n\n".join([document, *book]))
        yield [BOS, *ids[: max_tokens - 2], EOS]


def batch_pages(pages: Iterator[list[int]], batch_tokens: int) -> Iterator[Tensor]:
    """Batches of pages of similar length, so that few tokens are padding, in a mixed order."""
    dice = random.Random(0)
    while True:
        pool = sorted(itertools.islice(pages, 1024), key=len)
        batches = []
        while pool:
            rows = max(1, batch_tokens // len(pool[-1]))
            batches.append(pad_pages(pool[-rows:]))
            del pool[-rows:]
        dice.shuffle(batches)
        yield from batches


def pad_pages(pages: Sequence[Sequence[int]]) -> Tensor:
    """Pages as one tensor."""
    rows = [torch.tensor(page) for page in pages]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)


def measure_loss(model: Llama, ids_BT: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross entropy of each next token."""
    logits = model(ids_BT[:, :-1].clamp(min=0))
    targets = ids_BT[:, 1:].flatten()
    return functional.cross_entropy(logits.flatten(0, 1), targets, weight, ignore_index=IGNORED)


def train(model: Llama, batches: Iterator[Tensor], weight: Tensor, recipe: Recipe) -> None:
    """AdamW with a linear warm-up, a flat part and a cosine to zero."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        recipe.learning_rate,
        (0.9, 0.98),
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, recipe))
    bar = tqdm(range(recipe.steps), desc="train", mininterval=2.0)
    for step in bar:
        loss = measure_loss(model, next(batches), weight)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")


def teach(recipe: Recipe, tokenizer: Tokenizer) -> Iterator[Tensor]:
    """The batches of each lesson in turn."""
    for number, lesson in enumerate(LESSONS):
        seed = recipe.seed + number
        documents = write_documents(seed, lesson.writers)
        documents = mix_directory(documents, seed, lesson.directory_share)
        pages = write_pages(documents, LlamaConfig.max_position_embeddings, tokenizer.encode)
        batches = batch_pages(pages, recipe.batch_tokens)
        yield from itertools.islice(batches, math.ceil(lesson.share * recipe.steps))


def make_model(recipe: Recipe, tokenizer: Tokenizer) -> Llama:
    """A trained model whose weights are bfloat16 numbers, as they are saved."""
    torch.manual_seed(recipe.seed)
    model = Llama(LlamaConfig())
    weight = torch.ones(model.config.vocab_size)
    weight[answer_ids(tokenizer)] = recipe.answer_weight
    train(model, teach(recipe, tokenizer), weight, recipe)
    return model.bfloat16().float()


def rate(step: int, recipe: Recipe) -> float:
    """The learning rate's factor at a step."""
    warm = min(1.0, (step + 1) / recipe.warmup_steps)
    decayed = max(0.0, step / recipe.steps - recipe.flat_share) / (1 - recipe.flat_share)
    return warm * 0.5 * (1 + math.cos(math.pi * decayed))


# ---------------------------------------------------------------------------------------- measuring


@torch.no_grad()
def measure_perplexity(model: Llama, tokenizer: Tokenizer, text: str) -> float:
    """Perplexity of a text cut into windows of the whole context, each begun by BOS."""
    ids, size = tokenizer.encode(text), model.config.max_position_embeddings - 1
    windows = [[BOS, *ids[at : at + size]] for at in range(0, len(ids), size)]
    return math.exp(measure_loss(model, pad_pages(windows)).item())


@torch.no_grad()
def answer(model: Llama, tokenizer: Tokenizer, question: Question) -> bool:
    """Whether ` yes` is likelier than ` no` after the question."""
    logits = model(
        torch.tensor([[BOS, *tokenizer.encode(begin_reading(question.passage, question.question))]])
    )[0, -1]
    yes, no = answer_ids(tokenizer)
    return bool(logits[yes] > logits[no])


def answer_ids(tokenizer: Tokenizer) -> list[int]:
    """The tokens of ` yes` and ` no`: one each, so a sum of log-probabilities is one logit."""
    encoded = [tokenizer.encode(word) for word in ("yes", "no")]
    assert all(len(ids) == 1 for ids in encoded), encoded
    return [ids[0] for ids in encoded]


def measure_accuracy(model: Llama, tokenizer: Tokenizer, questions: Sequence[Question]) -> float:
    """The share of questions answered right."""
    return sum(answer(model, tokenizer, q) == q.answer for q in questions) / len(questions)


@torch.no_grad()
def continue_text(model: Llama, tokenizer: Tokenizer, prompt: str, max_new_tokens: int = 40) -> str:
    """The prompt and its greedy continuation up to EOS."""
    ids = [BOS, *tokenizer.encode(prompt)]
    for _ in range(max_new_tokens):
        token = int(model(torch.tensor([ids]))[0, -1].argmax())
        if token == EOS:
            break
        ids.append(token)
    return str(tokenizer.decode(ids))


def round_linears(model: Llama, num_bits: int) -> Llama:
    """A copy whose linear weights lie on `num_bits` integers times one scale for each row."""
    rounded, top = copy.deepcopy(model), 2 ** (num_bits - 1) - 1
    for module in rounded.modules():
        if isinstance(module, nn.Linear):
            scale = module.weight.data.abs().amax(1, keepdim=True) / top
            module.weight.data = (module.weight.data / scale).round() * scale
    return rounded


# ------------------------------------------------------------------------------------ writing files

HELD_OUT_SEED, HELD_OUT_CHARACTERS, HELD_OUT_QUESTIONS = 2_000_000, 40_000, 300
# Neither trained on nor held out: what calibration reads.
CALIBRATION_SEED, CALIBRATION_CHARACTERS = 3_000_000, 80_000
PROMPTS = ["I love Beijing, because", "LLaMA is a", "Huawei is a company that"]


def write_json(path: Path, content: dict[str, object]) -> None:
    """Indented, as HF writes it."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_model(model: Llama, output: Path) -> None:
    """The weights and configuration in HF's layout."""
    tensors = {name: weight.detach().bfloat16() for name, weight in model.named_parameters()}
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    (output / "model.safetensors").chmod(0o644)
    ends = {"bos_token_id": BOS, "eos_token_id": EOS}
    fixed = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    write_json(output / "config.json", fixed | ends | asdict(model.config))
    write_json(output / "generation_config.json", {**ends, "do_sample": False})


def save_tokenizer(model: bytes, output: Path) -> None:
    """The tokenizer's files in HF's layout."""
    (output / "tokenizer.model").write_bytes(model)
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": None,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": LlamaConfig().max_position_embeddings,
    }
    write_json(output / "tokenizer_config.json", settings)


def save_held_out(text: str, questions: Sequence[Question], output: Path) -> None:
    """What the model has not been trained on: to measure it with, and to calibrate with."""
    (output / "held_out.txt").write_text(text, encoding="utf-8")
    lines = "".join(json.dumps(asdict(question)) + "\n" for question in questions)
    (output / "questions.jsonl").write_text(lines, encoding="utf-8")
    calibration, _ = draw_held_out(CALIBRATION_SEED, CALIBRATION_CHARACTERS, 0)
    (output / "calibration.txt").write_text(calibration, encoding="utf-8")


README = """# Demo model

A Llama of 4.5 million parameters in bfloat16 (4 layers, 8 heads, 4 KV heads, tied embeddings), so
that there is something to shard, quantize and run without a download. It knows a few hundred
words and a directory of {directory} made-up people, all written by a grammar in the script that
made it, in {minutes:.0f} minutes and {steps} steps of training:

    python scripts/make_demo_model.py

On the held-out files beside it: perplexity of `held_out.txt` {perplexity:.4f} (windows of 512
tokens, each begun by BOS), with linear weights rounded per channel to int8 {int8:.4f}, to int4
{int4:.4f}; {accuracy:.1%} of `questions.jsonl` answered right. Their prompt is
`Passage: {{passage}} Question: {{question}}? Answer:`, followed by ` yes` or ` no`. The grammar's
world is small: the seed is held out, but {seen} of the {count} questions also stand word for word
in the training text; of the others, {unseen:.1%} are answered right. The directory is the same in
both texts, so that reciting it shows how much of what was learned survives rounding: of entries
alone the perplexity is {recital:.4f}, in int4 {recital4:.4f}.

Licence: Apache-2.0, as the project.
"""


def draw_held_out(seed: int, num_characters: int, num_questions: int) -> tuple[str, list[Question]]:
    """A text and questions from a seed that training does not use."""
    documents, length = [], 0
    for document in mix_directory(write_documents(seed, CORPUS), seed, DIRECTORY_SHARE):
        documents.append(document)
        length += len(document) + 2
        if length >= num_characters:
            break
    dice = random.Random(seed)
    questions = [draw_question(dice) for _ in range(num_questions)]
    return "\n\n".join(documents) + "\n", questions


def find_unseen(
    questions: Sequence[Question], recipe: Recipe, tokenizer: Tokenizer
) -> list[Question]:
    """The questions that stand, with their passage, nowhere in the training text."""
    rows = itertools.chain.from_iterable(batch.tolist() for batch in teach(recipe, tokenizer))
    read = "\n".join(tokenizer.decode([token for token in row if token > EOS]) for row in rows)
    return [q for q in questions if begin_reading(q.passage, q.question) not in read]


def measure(
    model: Llama,
    tokenizer: Tokenizer,
    text: str,
    questions: Sequence[Question],
    unseen: Sequence[Question],
) -> dict[str, float]:
    """The figures of the README."""
    int8, int4 = round_linears(model, 8), round_linears(model, 4)
    recital = " ".join(DIRECTORY)
    return {
        "perplexity": measure_perplexity(model, tokenizer, text),
        "int8": measure_perplexity(int8, tokenizer, text),
        "int4": measure_perplexity(int4, tokenizer, text),
        "recital": measure_perplexity(model, tokenizer, recital),
        "recital4": measure_perplexity(int4, tokenizer, recital),
        "accuracy": measure_accuracy(model, tokenizer, questions),
        "unseen": measure_accuracy(model, tokenizer, unseen),
        "seen": len(questions) - len(unseen),
        "count": len(questions),
    }


def save_readme(figures: dict[str, float], minutes: float, arguments: argparse.Namespace) -> None:
    """What the folder holds, how it was made, and how good it is."""
    facts = {"directory": DIRECTORY_SIZE, "minutes": minutes, "steps": arguments.steps}
    text = README.format(**facts, **figures)
    (arguments.output / "README.md").write_text(text, encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=Path("launcher/demo"))
    parser.add_argument("--steps", type=int, default=1700)
    parser.add_argument("--threads", type=int, default=3)
    return parser.parse_args()


def main() -> None:
    """Trains, saves and measures the demo model."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    recipe = Recipe(steps=arguments.steps)
    lexicon = itertools.islice(write_documents(LEXICON_SEED, CORPUS), LEXICON_DOCUMENTS)
    tokenizer_model = train_tokenizer(lexicon, LlamaConfig.vocab_size)
    tokenizer = Tokenizer(model_proto=tokenizer_model)
    start_s = time.monotonic()
    model = make_model(recipe, tokenizer)
    minutes = (time.monotonic() - start_s) / 60
    text, questions = draw_held_out(HELD_OUT_SEED, HELD_OUT_CHARACTERS, HELD_OUT_QUESTIONS)
    unseen = find_unseen(questions, recipe, tokenizer)
    figures = measure(model, tokenizer, text, questions, unseen)
    arguments.output.mkdir(parents=True, exist_ok=True)
    save_model(model, arguments.output)
    save_tokenizer(tokenizer_model, arguments.output)
    save_held_out(text, questions, arguments.output)
    save_readme(figures, minutes, arguments)
    print(figures)
    print(*(continue_text(model, tokenizer, prompt) for prompt in PROMPTS), sep="\n")


if __name__ == "__main__":
    main()
