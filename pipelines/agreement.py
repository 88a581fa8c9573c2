"""Which sentences are acceptable: a small English grammar, and one wrong word in half of its sentences.

Subjects agree with their verbs across prepositional phrases and relative clauses whose nouns may be of the other
number, determiners agree with nouns, auxiliaries govern the form of their verb, and reflexives agree with the subject
of their clause. As in CoLA (arXiv 1805.12471), 1 is acceptable. A third of the words is in no sentence to train on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import TypeVar

import numpy as np

SIZES = {"train": 4000, "validation": 1000, "test": 2000}
SEED = 20180601
MOST_WORDS = 12
DEEPEST = 1
"""Noun phrases inside of a noun phrase."""

Word = tuple[str, tuple[str, ...]]
"""A word of an acceptable sentence, and those that would make it unacceptable in its place."""

Forms = tuple[str, str]
"""Singular and plural."""

T = TypeVar("T")

_DETERMINERS: tuple[Forms, ...] = (("this", "these"), ("that", "those"), ("every", "many"), ("each", "several"))
_HAVE, _BE, _DO = ("has", "have"), ("is", "are"), ("does", "do")
_MODALS = ("can", "must", "will")
_PREPOSITIONS = ("behind", "beside", "near", "with")
_REFLEXIVES = {"he": "himself", "she": "herself", "it": "itself"}
_THEMSELVES = "themselves"


@dataclass(frozen=True)
class Lexicon:
    """The words of the open classes.

    Args:
        people: a noun, and he, she or it for its reflexive.
        places: nouns.
        transitive: verbs, regular in all their forms.
        intransitive: likewise.
        adjectives: of people and animals.
    """

    people: tuple[tuple[str, str], ...]
    places: tuple[str, ...]
    transitive: tuple[str, ...]
    intransitive: tuple[str, ...]
    adjectives: tuple[str, ...]

    def seen(self) -> Lexicon:
        """Without every third word of each class."""
        return Lexicon(*(tuple(w for i, w in enumerate(getattr(self, f.name)) if i % 3 < 2) for f in fields(self)))


WORDS = Lexicon(
    people=(
        ("boy", "he"), ("girl", "she"), ("dog", "it"), ("queen", "she"), ("robot", "it"), ("king", "he"),
        ("horse", "it"), ("uncle", "he"), ("aunt", "she"), ("father", "he"), ("mother", "she"), ("tiger", "it"),
        ("sister", "she"), ("parrot", "it"), ("brother", "he"), ("monkey", "it"), ("prince", "he"), ("nun", "she"),
        ("monk", "he"), ("daughter", "she"), ("lion", "it"), ("widow", "she"), ("rabbit", "it"), ("son", "he"),
    ),
    places=("table", "window", "garden", "river", "tower", "bridge", "lamp", "door", "car", "tree", "boat", "house"),
    transitive=(
        "admire", "help", "follow", "ignore", "remember", "visit", "praise", "trust", "avoid", "amuse", "thank",
        "blame", "invite", "warn", "defend", "accuse", "attack", "observe",
    ),
    intransitive=(
        "smile", "wait", "laugh", "listen", "work", "arrive", "rest", "vanish", "return", "wander", "dance", "sail",
    ),
    adjectives=("old", "young", "happy", "clever", "quiet", "proud", "lazy", "brave", "tired"),
)  # fmt: skip


@cache
def examples(split: str) -> tuple[tuple[str, int], ...]:
    """The sentences of train, validation or test with their labels, half of them 1; no sentence is in two of these."""
    before = list(SIZES)[: list(SIZES).index(split)]
    taken = {text for earlier in before for text, _ in examples(earlier)}
    grammar = Grammar(np.random.default_rng([SEED, len(before)]), WORDS.seen() if split == "train" else WORDS)
    found: dict[str, int] = {}
    while len(found) < SIZES[split]:
        acceptable = len(found) % 2 == 0
        text = grammar.acceptable() if acceptable else grammar.unacceptable()
        if text not in taken:
            found.setdefault(text, int(acceptable))
    return tuple(found.items())


def acceptable(seed: int) -> Iterator[str]:
    """Acceptable sentences of all words, without end, none of them in any split."""
    taken = {text for split in SIZES for text, _ in examples(split)}
    grammar = Grammar(np.random.default_rng([SEED, len(SIZES), seed]), WORDS)
    while True:
        text = grammar.acceptable()
        if text not in taken:
            yield text


def vocabulary() -> list[str]:
    """Every word that a sentence may hold, sorted."""
    nouns = [noun for noun, _ in WORDS.people] + list(WORDS.places)
    closed = [form for forms in (*_DETERMINERS, _HAVE, _BE, _DO) for form in forms]
    closed += [*_MODALS, *_PREPOSITIONS, *_REFLEXIVES.values(), _THEMSELVES, "the", "that", "not", "."]
    forms = [
        form for verb in WORDS.transitive + WORDS.intransitive for form in (*_present(verb), _past(verb), _ing(verb))
    ]
    return sorted({*closed, *WORDS.adjectives, *forms, *(form for noun in nouns for form in (noun, f"{noun}s"))})


@dataclass(frozen=True)
class Grammar:
    """Sentences of a lexicon, drawn from rng."""

    rng: np.random.Generator
    words: Lexicon

    def acceptable(self) -> str:
        return " ".join(word for word, _ in self._sentence())

    def unacceptable(self) -> str:
        """An acceptable sentence with one word replaced."""
        sentence = self._sentence()
        place = self._one([place for place, (_, wrong) in enumerate(sentence) if wrong])
        sentence[place] = (self._one(sentence[place][1]), ())
        return " ".join(word for word, _ in sentence)

    def _sentence(self) -> list[Word]:
        while True:
            (noun, pronoun), plural = self._one(self.words.people), self._plural()
            sentence = [*self._noun_phrase(noun, pronoun, plural, 0), *self._predicate(pronoun, plural, 0), (".", ())]
            if len(sentence) <= MOST_WORDS:
                return sentence

    def _noun_phrase(self, noun: str, pronoun: str, plural: bool, depth: int) -> Iterator[Word]:
        if self.rng.random() < 0.6:
            yield "the", ()
        else:
            forms = self._one(_DETERMINERS)
            yield forms[plural], (forms[not plural],)
        if self.rng.random() < 0.2:
            yield self._one(self.words.adjectives), ()
        yield _noun(noun, plural), ()
        more = self.rng.choice(("nothing", "place", "subject", "object"), p=(0.35, 0.25, 0.2, 0.2))
        # "the girl near the boys that admires the dog" is acceptable, as it may be the girl who does.
        if depth == DEEPEST or more == "nothing" or (more == "subject" and depth):
            return
        if more == "place":
            yield self._one(_PREPOSITIONS), ()
            if self.rng.random() < 0.4:
                yield "the", ()
                yield _noun(self._one(self.words.places), self._plural()), ()
            else:
                yield from self._noun_phrase(*self._one(self.words.people), self._plural(), depth + 1)
            return
        yield "that", ()
        if more == "subject":
            yield from self._predicate(pronoun, plural, depth + 1)
        else:
            many = self._plural()
            yield from self._noun_phrase(*self._one(self.words.people), many, depth + 1)
            yield from self._verb(self._one(self.words.transitive), many)

    def _predicate(self, pronoun: str, plural: bool, depth: int) -> Iterator[Word]:
        """A verb that agrees with a subject, and its object, so deep."""
        kind = self.rng.choice(("alone", "reflexive", "object"), p=(0.4, 0.2, 0.4))
        yield from self._verb(self._one(self.words.intransitive if kind == "alone" else self.words.transitive), plural)
        if kind == "reflexive":
            single = _REFLEXIVES[pronoun]
            others = tuple(form for form in _REFLEXIVES.values() if form != single)
            yield (_THEMSELVES, tuple(_REFLEXIVES.values())) if plural else (single, (_THEMSELVES, *others))
        elif kind == "object":
            yield from self._noun_phrase(*self._one(self.words.people), self._plural(), depth)

    def _verb(self, verb: str, plural: bool) -> Iterator[Word]:
        base, present, past, ing = verb, _present(verb), _past(verb), _ing(verb)
        kind = self.rng.choice(("present", "perfect", "progressive", "negated", "modal"), p=(0.4, 0.2, 0.2, 0.1, 0.1))
        agreeing = {"present": present, "perfect": _HAVE, "progressive": _BE, "negated": _DO}
        if kind in agreeing:
            yield agreeing[kind][plural], (agreeing[kind][not plural],)
        else:
            yield self._one(_MODALS), ()
        if kind == "negated":
            yield "not", ()
        if kind == "perfect":
            yield past, (base, ing)
        elif kind == "progressive":
            yield ing, (base, present[0])
        elif kind != "present":
            yield base, (past, present[0])

    def _plural(self) -> bool:
        return bool(self.rng.random() < 0.5)

    def _one(self, among: Sequence[T]) -> T:
        return among[int(self.rng.integers(len(among)))]


def _noun(noun: str, plural: bool) -> str:
    return f"{noun}s" if plural else noun


def _present(verb: str) -> Forms:
    return f"{verb}{'es' if verb.endswith('sh') else 's'}", verb


def _past(verb: str) -> str:
    return f"{verb.removesuffix('e')}ed"


def _ing(verb: str) -> str:
    return f"{verb.removesuffix('e')}ing"
