"""Unique English sentences from a small grammar: letters only, four to ten words."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

# Each <name> is replaced by a random expansion of that name.
GRAMMAR: dict[str, Sequence[str]] = {
    "sentence": (
        "<who> <did> <what>",
        "<who> <did> <what> <place>",
        "<who> <did> <what> <time>",
        "<who> <went> <place>",
        "<who> <went> <place> <time>",
        "<time> <who> <did> <what>",
        "<time> <who> <went> <place>",
        "<number> <people> <did> <what> <place>",
        "<who> and <who> <went> <place>",
        "where did <who> <find> <what>",
        "why did <who> <find> <what> <time>",
        "please <find> <what> <place>",
        "there was <thing> <place>",
        "<who> <thought> <who> <did> <what>",
    ),
    "who": ("<name>", "<name>", "the <person>", "the <quality> <person>", "my <relative>"),
    "name": ("anna", "peter", "maria", "john", "helen", "george", "lucy", "mark", "sarah", "tom"),
    "person": (
        "teacher farmer doctor child woman sailor neighbour baker driver student soldier painter"
    ).split(),
    "people": ("men", "women", "children", "friends", "horses", "birds", "students", "farmers"),
    "relative": ("mother", "father", "brother", "sister", "uncle", "cousin"),
    "number": ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "many"),
    "quality": ("old young tall quiet happy tired strong clever gentle lazy hungry famous").split(),
    "kind": (
        "small large green red blue white heavy broken golden empty warm cold round wooden "
        "strange simple new dark"
    ).split(),
    "object": (
        "boat letter window garden basket bottle book chair flower picture coat hammer bridge "
        "clock key lamp map box stone wheel apple cheese candle mirror"
    ).split(),
    "did": (
        "found carried painted opened lost sold bought saw watched wanted moved remembered "
        "followed loved hid took cleaned showed"
    ).split(),
    "find": ("find", "carry", "open", "bring", "hide", "sell", "paint", "watch", "move", "take"),
    "went": ("walked", "travelled", "ran", "waited", "worked", "stood", "slept", "sang"),
    "thought": ("thought", "hoped", "knew", "said", "believed"),
    "what": ("the <object>", "the <kind> <object>", "<thing>", "<number> <kind> <plural>"),
    "thing": ("a <kind> <object>", "one <kind> <object>"),
    "plural": ("boats", "letters", "books", "chairs", "flowers", "keys", "stones", "candles"),
    "place": (
        "near the <site>",
        "behind the <site>",
        "in the <site>",
        "under the <site>",
        "beside the <kind> <site>",
        "far from the <site>",
    ),
    "site": (
        "river village station forest kitchen school market harbour mountain church field "
        "house tower shop"
    ).split(),
    "time": (
        "today",
        "yesterday",
        "every morning",
        "in the evening",
        "last winter",
        "after dinner",
        "before the storm",
        "on sunday",
        "at night",
        "for a long time",
    ),
}


def sentences(rng: random.Random, *, shortest: int = 4, longest: int = 10) -> Iterator[str]:
    """Yield unique lower-case sentences of ``shortest`` to ``longest`` words, without end.

    The grammar has more than a million sentences.
    """
    used: set[str] = set()
    while True:
        sentence = _expand("sentence", rng)
        if shortest <= len(sentence.split()) <= longest and sentence not in used:
            used.add(sentence)
            yield sentence


def _expand(name: str, rng: random.Random) -> str:
    words = []
    for word in rng.choice(GRAMMAR[name]).split():
        words.append(_expand(word[1:-1], rng) if word.startswith("<") else word)
    return " ".join(words)
