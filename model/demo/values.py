"""What people in the demo tell about themselves and ask for later: from a list, or put together from parts.

A model that reads the same eighty names again and again learns to recognise them; one to which a new name is told each
time has to copy it. So most names, numbers and places are made for the occasion, and a few, or parts of them, are kept
for the test.
"""

import re

from model.errors import UserError

UNSEEN = 80  # values of each slot that only the test uses
UNSEEN_PARTS = 40  # those made of parts that only the test uses
PART = re.compile(r"{(\w+)}")


class Values:
    """The values of one slot of memory.json.

    listed: those of the table. unseen: made of the parts that training uses too, but none of them is in a training text;
    unseen_parts: made of parts of which no value is made in training. ([] where the table has no such pattern.)
    """

    def __init__(self, place, words, known_text, rng):
        """words: the slot's entry; known_text: all that tables say, where no unseen value may occur. UserError naming
        `place` when "made" is incomplete or too small."""
        self.place, self.listed, self.made = place, words["values"], words.get("made", {})
        if self.made and not self.made.get("patterns"):
            raise UserError(f'{place}: "made" has no "patterns"')
        self.known_text, self.unseen, self.unseen_parts = known_text, [], []
        self.unseen = self.sample(rng, "unseen", UNSEEN)
        self.unseen_parts = self.sample(rng, "unseen_parts", UNSEEN_PARTS)

    def sample(self, rng, patterns, count):
        """`count` values of these patterns which are not in known_text."""
        patterns = self.made.get(patterns)
        if not patterns:
            return []
        found = {}
        for _ in range(100 * count):
            value = self.fill(rng, rng.choice(patterns))
            if value not in self.known_text:
                found[value] = None
            if len(found) == count:
                return list(found)
        raise UserError(f'{self.place}: "made" gives less than {count} values that are not in the tables')

    def fill(self, rng, pattern):
        try:
            return PART.sub(lambda part: rng.choice(self.made[part[1]]), pattern)
        except (KeyError, IndexError):
            raise UserError(f'{self.place}: "made" lacks a part of its pattern {pattern}') from None

    def draw(self, rng, made_share=0.65):
        """A value for training: a listed one or, in `made_share` of the cases, a new one that holds none of the unseen."""
        if not self.made or rng.random() >= made_share:
            return rng.choice(self.listed)
        for _ in range(1000):
            value = self.fill(rng, rng.choice(self.made["patterns"]))
            if not any(unseen in value for unseen in (*self.unseen, *self.unseen_parts)):
                return value
        raise UserError(f'{self.place}: "made" gives no more values than the {UNSEEN} that are kept for the test')
