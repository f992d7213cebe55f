"""The almanac: invented towns, each described twice, so that retrieval must help (notebook 07)."""

import math
import random
from collections.abc import Iterator, Sequence

from retro_nb.common.digests import digest
from retro_nb.text.document import Document, Spans


class almanac:
    """Invented towns with random facts, each described twice: a controlled experiment on retrieval.

    Documents 2t and 2t+1, "Belvora · chronicle" and "Belvora · gazetteer", describe town t. They state the same
    facts in the same order. Each fact has two wordings, one in each document. A fact is one word, drawn uniformly
    and independently from `CHOICES` words, so only the twin document predicts it: an ideal model without retrieval
    loses exactly `fact_entropy` nats on it, an ideal reader of the twin none.

    Measured with MiniLM, three things make the twin easy to find: short sentences, each with the town's name;
    wordings mixed within a document, so that its style resembles no other; facts chosen and ordered anew for each
    town. Both wordings of a fact have the same number of word pieces. So the twins stay aligned, and a retrieved
    chunk with its continuation (128 tokens) holds the facts of the chunk to be predicted.

    That alignment is a shortcut: a reader may count tokens instead of reading. With `aligned=False`, each document
    tells the facts in an order of its own, with sentences between them that tell nothing. A fact may then stand
    anywhere in the twin, also in a chunk that was not retrieved.

    towns    number of towns; a larger almanac begins with the towns of a smaller one
    seed     0 or more; gives the same documents on every machine and Python version
    facts    number of facts about each town
    aligned  whether both documents tell the facts in the same order and at about the same places

    `Document.facts` are those of the twin, in the same order, wherever they stand in the text.

    Raises ValueError for numbers outside their limits.
    """

    def __init__(self, towns: int = 200, seed: int = 0, facts: int = 26, aligned: bool = True) -> None:
        most = len(_HEADS) * len(_MIDDLES) * len(_TAILS)
        if not 1 <= towns <= most:
            raise ValueError(f"towns {towns} is outside 1..{most}, the number of names: pass e.g. 200")
        if not 1 <= facts <= len(_KINDS):
            raise ValueError(f"facts {facts} is outside 1..{len(_KINDS)}, the kinds of fact: pass e.g. 26")
        if seed < 0:
            raise ValueError(f"seed {seed} is negative, and Python seeds -1 and 1 alike: pass 0 or more")
        self.towns, self.seed, self.facts, self.aligned = towns, seed, facts, aligned

    @property
    def fact_entropy(self) -> float:
        """Entropy of one fact in nats: ln `CHOICES`."""
        return math.log(CHOICES)

    @property
    def entropy(self) -> float:
        """Entropy of all facts of one document in nats."""
        return self.facts * self.fact_entropy

    def __len__(self) -> int:
        return 2 * self.towns

    def __iter__(self) -> Iterator[Document]:
        rng = random.Random(self.seed)
        names: set[str] = set()
        for number in range(self.towns):
            name = _new_name(rng, names)
            kinds = _shuffled(rng, _KINDS)[: self.facts]
            values = [_pick(rng, words) for words, *_ in kinds]
            wordings = [_shuffled(rng, sentences) for _, *sentences in kinds]
            for (telling, opening), *sentences in zip(_OPENINGS.items(), *wordings, strict=True):
                order = list(range(self.facts)) if self.aligned else _rearranged(rng, self.facts)
                text, facts = _document(name, opening, sentences, values, order)
                source = f"almanac, seed {self.seed}, town {number}"
                yield Document(text, f"{name} · {telling}", source, facts)

    def fingerprint(self) -> dict:
        """The parameters, and a digest of the generator's words and sentences."""
        wording = digest([_KINDS, _OPENINGS, _HEADS, _MIDDLES, _TAILS])
        numbers = {"towns": self.towns, "seed": self.seed, "facts": self.facts}
        arranged = {} if self.aligned else {"aligned": False, "fillers": digest(_FILLERS)}
        return {"corpus": "almanac", **numbers, "wording": wording, **arranged}


def _pick(rng: random.Random, words: list[str]) -> str:
    """A uniform choice by `random()`, the only method with a sequence that Python promises never to change."""
    return words[int(rng.random() * len(words))]


def _shuffled(rng: random.Random, items: list) -> list:
    """A copy in random order."""
    return [items[i] for _, i in sorted((rng.random(), i) for i in range(len(items)))]


def _new_name(rng: random.Random, taken: set[str]) -> str:
    """Invent a name like "Belvora" that is not in `taken`, and add it there."""
    while (name := _pick(rng, _HEADS) + _pick(rng, _MIDDLES) + _pick(rng, _TAILS)) in taken:
        pass
    taken.add(name)
    return name


def _rearranged(rng: random.Random, facts: int) -> list[int | str]:
    """The numbers of the facts in random order; before some of them a sentence that tells nothing."""
    order: list[int | str] = []
    for number in _shuffled(rng, list(range(facts))):
        if rng.random() < FILLED:
            order.append(_pick(rng, _FILLERS))
        order.append(number)
    return order


def _document(
    name: str, opening: str, sentences: Sequence[str], values: list[str], order: Sequence[int | str]
) -> tuple[str, Spans]:
    """Fill in the sentences -> the text, and the span of each value in it. `order` has their numbers, or fillers."""
    text, spans = opening.replace("{town}", name), {}
    for part in order:
        if isinstance(part, str):
            text += " " + part.replace("{town}", name)
            continue
        before, after = sentences[part].replace("{town}", name).split("{value}")
        start = len(text) + 1 + len(before)
        spans[part] = (start, start + len(values[part]))
        text += f" {before}{values[part]}{after}"
    return text, tuple(spans[number] for number in range(len(sentences)))


# Names are head + middle + tail. All are different, because no head begins with another one.
_HEADS = """Bal Bel Bor Cal Cor Dal Dor Dun El Fal Fen Gal Gar Hal Har Ist Jor Kal Kel Lor
            Mal Mar Mel Mor Nor Or Pal Per Quel Ral Sel Tal Tor Ul Val Vel Wil Yar Zan Zel""".split()
_MIDDLES = """ba be bi bo ca da de di do ga go ka ki la le li lo ma me mi
              mo na ne ni no pa po ra re ri ro sa se ta te ti to va ve vo""".split()
_TAILS = """dan den dor fell gard ham len lin lith mar mere mond nar neth nia non phe ra ran rell ren
            rick ris ron roth sa sel shire stad ster tha thal thor ton vale van var ven wen wick""".split()

# Fact values: lists of `CHOICES` common words, each one word piece of BERT. Where a sentence says "a {value}",
# no word begins with a vowel, so "a" gives nothing away.
CHOICES = 40
_PEOPLE = """Agnes Alice Anna Arthur Bruno Clara David Diana Edgar Ella Emma Felix Frank George Grace Hannah
Henry Hugo Irene Jack Julia Laura Leo Lucy Marco Maria Martha Max Nora Oliver Oscar Peter Rosa Ruth Samuel
Simon Sophie Thomas Victor Walter""".split()
_YEARS = [str(year) for year in range(1850, 1890)]
_TRADES = """baker banker barber blacksmith brewer butcher butler carpenter chemist clerk cook dancer
dentist doctor driver drummer farmer fisherman guard hunter judge knight lawyer librarian mason merchant
miner nurse painter pilot poet potter printer sailor shepherd singer soldier tailor teacher weaver""".split()
_ANIMALS = """badger bat beetle camel crab crane donkey dove dragon duck falcon fox goose hare lamb lion
lizard monkey moth mule parrot peacock pig pony rabbit rat raven seal shark sheep snail snake spider squirrel
swan tiger toad trout turtle whale""".split()
_COLOURS = """amber beige black blue bronze brown cherry chestnut copper coral cream crimson emerald gold
gray green honey ivory jade lavender lemon mustard olive orange peach pearl pink plum purple red ruby rust
sapphire scarlet silver turquoise violet white wine yellow""".split()
_MATERIALS = """bamboo birch bone brass brick bronze cedar chalk clay concrete copper crystal elm glass gold
granite iron ivory lead leather limestone linen maple marble mud oak paper pine sand sandstone silk silver
slate steel stone straw tin walnut willow wool""".split()
_FOODS = """apples bacon beef berries biscuits bread candy cheese chicken coffee corn fish flour ham honey
jam juice lamb lemon lime meat milk mushrooms nuts oil onions pepper pie pork potatoes pudding salt sauce
soup spices steak sugar tea tomatoes vinegar""".split()
_OBJECTS = """basket blanket bottle broom bucket button clock coin crown doll drum flute fork guitar hammer
helmet horn key knife ladder lamp lantern mask mirror needle pencil piano pillow pipe ribbon rope saddle shoe
shovel spoon sword tent trumpet violin whip""".split()
_VIRTUES = """beauty charity courage curiosity duty faith fame friendship generosity grace gratitude honesty
hope humor justice kindness knowledge laughter liberty love loyalty luck mercy music order patience peace
pleasure pride reason respect silence skill strength trust truth victory virtue work youth""".split()
_BUILDINGS = """bakery bank bridge cellar cemetery chapel court dairy dock factory fort fountain gate
hospital hostel laboratory lighthouse market mill mint monastery museum observatory orphanage palace pharmacy
pier port shrine stable station synagogue tavern theater tower university warehouse wharf windmill
workshop""".split()
_COUNTRIES = """Algeria Argentina Australia Austria Belgium Brazil Canada Chile China Cuba Cyprus Denmark
Egypt England Finland France Germany Greece Hungary Iceland India Ireland Italy Japan Lebanon Malta Mexico
Morocco Norway Persia Peru Poland Portugal Russia Scotland Spain Sweden Tunisia Turkey Wales""".split()

_OPENINGS = {
    "chronicle": "This is the chronicle of {town}, as its own people remember it.",
    "gazetteer": "{town}: an entry from the gazetteer of small towns, revised.",
}

# Sentences that tell nothing, and how often one stands before a fact of an almanac that is not aligned.
FILLED = 0.4
_FILLERS = [
    "Nothing more is known of that.",
    "So at least they say in {town}, and smile.",
    "Visitors to {town} are told so within the hour.",
    "In {town} one does not argue about it.",
    "It was not always so in {town}, but who remembers?",
    "That much is certain.",
    "The older people of {town} tell it otherwise, and at greater length.",
    "There is a song about it in {town}, with far too many verses.",
    "Travellers have wondered at it, and gone on.",
    "No paper in the archives of {town} says why.",
    "The neighbouring towns envy {town} for it, or say that they do not.",
    "Let that be enough.",
]

# Kinds of fact: the words, and two wordings of equal length.
_KINDS = [
    (_PEOPLE,
     "The first house in {town} was put up by a wanderer named {value}.",
     "A statue with no nose in {town} honours its good old founder, {value}."),
    (_YEARS,
     "The king gave {town} its charter during a hailstorm in {value}.",
     "By a royal charter {town} has called itself a town since {value}."),
    (_TRADES,
     "The first mayor of {town} could not help being still a {value}.",
     "The good people of {town} chose for their earliest mayor a {value}."),
    (_ANIMALS,
     "The only painter in {town} could paint on a shield just a {value}.",
     "On its coat of arms the town of {town} displays a startled {value}."),
    (_COLOURS,
     "The flag of {town} was sewn overnight from cloth that was {value}.",
     "On holidays all the windows in {town} hang out flags of faded {value}."),
    (_MATERIALS,
     "After long quarrels {town} had its great hall built of {value}.",
     "The walls of the town hall of {town} are of dusty {value}."),
    (_FOODS,
     "The market carts rolled into {town} heaped to the sky with {value}.",
     "At the weekly market of {town} people loudly shout the price of {value}."),
    (_OBJECTS,
     "The monks of {town} knelt before a relic that looked like a {value}.",
     "The holy relic in the church of {town} is quite probably a {value}."),
    (_VIRTUES,
     "Over the school in {town} they carved that all one needs is {value}.",
     "As its motto the school of {town} teaches in one word: {value}."),
    (_BUILDINGS,
     "In the great fire {town} saved the pigs and lost the {value}.",
     "Of all that burned in {town} nobody has ever missed the {value}."),
    (_COUNTRIES,
     "A bearded captain sailed up to {town} with salt from far {value}.",
     "The salt that {town} eats has always come by ship from {value}."),
    (_TRADES,
     "After midnight in {town} one may meet the sad ghost of a {value}.",
     "The one haunted lane in {town} belongs to a dead but polite {value}."),
    (_PEOPLE,
     "No fiddler was loved in the taverns of {town} like blind {value}.",
     "The street music of {town} was for many years the fiddle of old {value}."),
    (_YEARS,
     "The railway came to {town} with a brass band in the spring of {value}.",
     "Trains have stopped at the station of {town}, if asked, since {value}."),
    (_ANIMALS,
     "A judge of {town} once tried for theft, and hanged, a {value}.",
     "The court of {town} is famous for the trial of a thieving {value}."),
    (_COLOURS,
     "A bride who came to {town} had to paint her front door {value}.",
     "By law the front doors of the houses in {town} must be {value}."),
    (_FOODS,
     "At midsummer all {town} sat down at one long table to eat {value}.",
     "The summer feast of {town} is a single long table set with {value}."),
    (_OBJECTS,
     "Since the riot no one in {town} may walk out on Sunday with a {value}.",
     "It is forbidden in {town}, on Sundays only, to carry about a {value}."),
    (_MATERIALS,
     "The bridge of {town} fell until a widow had it made of {value}.",
     "People cross the river at {town} by a bridge made of pure {value}."),
    (_BUILDINGS,
     "A rich miller of {town} left all of his gold to the {value}.",
     "The greatest fortune in {town} went from a rich miller to the {value}."),
    (_VIRTUES,
     "Every Easter the bishop preached to {town} against too much {value}.",
     "The Easter sermon in {town} warns of the dangers of {value}."),
    (_COUNTRIES,
     "The young people of {town} ran away, one by one, to {value}.",
     "Most of the letters that reach {town} come from long lost cousins in {value}."),
    (_PEOPLE,
     "The ferry at {town} was rowed for years by a giant called {value}.",
     "Whoever comes to {town} by the ferry must shout for the giant, {value}."),
    (_TRADES,
     "The best chess player in {town} was, as always, the {value}.",
     "Nobody in {town} has ever won a game of chess against the {value}."),
    (_ANIMALS,
     "Children in {town} were put to bed with tales about the great {value}.",
     "The bedtime stories of {town} are all about one wicked old {value}."),
    (_OBJECTS,
     "At a wedding in {town} the groom was handed by his mother a {value}.",
     "The proper present at weddings in {town} has for ages been a new {value}."),
    (_FOODS,
     "The doctor of {town} cured every fever he met with hot {value}.",
     "The only medicine that {town} now trusts against a fever is {value}."),
    (_MATERIALS,
     "The bell of {town} was cast so badly that they made another of {value}.",
     "The bell in the tower of {town} rings oddly, being made of {value}."),
]  # fmt: skip
