"""The demo's data: a small world of true facts, kept as tables, told as the raw corpora that real data comes in.

dataset/demo_world/ holds what a learner edits: one CSV row is one thing, relations.json says which column is asked
about and in which words. From these, DemoWorld makes for every stage what it trains on (raw rows for data_process.py)
and what it is tested on, of which no question, pair or text is trained on in that stage:

    stage              trained on                                  held out
    pretraining        statements, dialogues, stories, sums        other sentence patterns (pretrain.csv, cloze.jsonl)
    SFT, single turn   all phrasings of each question, sums        other phrasings (facts.jsonl), other pairs of numbers
                                                                   (arithmetic.jsonl)
    SFT, multi-turn    what was told x how it is asked, 3 in 4     the other pairs (multi_turn.jsonl); names, numbers and
                                                                   places that are in no training text (unseen_*.jsonl)
    LoRA               a new name, and a part of the above         other phrasings (identity.jsonl)
    preferences        4 facts in 5                                the fifth (dpo.json), whose right answers SFT has taught
    exam               nothing                                     multiple choice as in C-Eval (dev, val)
"""

import collections
import csv
import io
import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path

from model.demo.arithmetic import all_problems, needs_steps, operands
from model.demo.values import Values
from model.errors import UserError
from model.evaluation.scoring import NUMBER, normalise
from model.evaluation.subjects import LETTERS

DEFAULT_DIRECTORY = Path(__file__).resolve().parents[2] / "dataset" / "demo_world"
TABLE_SUFFIXES = (".csv", ".json", ".txt")
SHARES = (6, 6, 4, 1, 3, 3, 1)  # of the kinds of documents in pretrain_rows
DEV_QUESTIONS, VAL_QUESTIONS = 5, 40  # per exam subject; C-Eval has 5 and about 26


@dataclass(frozen=True, eq=False)
class Fact:
    """One thing's one property: the capital of France. `fields` fill the sentence patterns in `patterns`."""

    relation: str
    entity: str
    value: str
    fields: dict
    patterns: dict

    def fill(self, pattern):
        return pattern.format_map(self.fields)

    @property
    def answer(self):
        return self.fill(self.patterns["answer"])

    def questions(self, kind="questions"):
        return [self.fill(pattern) for pattern in self.patterns.get(kind, ())]

    def retold(self, value):
        """The answer with another value in it."""
        return self.patterns["answer"].format_map({**self.fields, "value": value})


def read_text(path):
    """The text of a UTF-8 file, with or without a byte order mark; UserError for another encoding or no file."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; save it in that encoding") from None


def read_json(path):
    try:
        value = json.loads(read_text(path))
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair shows here
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not value:
        raise UserError(f"{path}: is empty")
    return value


def read_table(path):
    """Yield (line number, {column: cell}) of a CSV file; UserError for a row with missing or surplus cells."""
    reader = csv.DictReader(io.StringIO(read_text(path)), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                columns = reader.fieldnames
                raise UserError(f"{path}:{reader.line_num}: expected {len(columns)} cells: {','.join(columns)}")
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num + 1}: not CSV ({error})") from None


def read_facts(directory):
    """All facts, in the order of relations.json. An empty cell means: no such fact. UserError names the faulty line."""
    description = read_json(directory / "relations.json")
    relations, facts, answers, lines = description["relations"], [], {}, {}
    for name, relation in relations.items():
        relation = {**relations.get(relation.get("extends"), {}), **relation}
        relation = {**description["frames"][relation["frame"]], **relation}
        path = directory / f"{relation['table']}.csv"
        for line, row in read_table(path):
            try:
                fact = make_fact(name, relation, row)
            except KeyError as error:
                place = directory / "relations.json"
                raise UserError(f"{place}: {name} uses {error}, not a column of {path.name}") from None
            if fact is None:
                continue
            for question in fact.questions() + fact.questions("heldout_questions"):
                if answers.setdefault(question, fact.answer) != fact.answer:
                    raise UserError(f"{path}:{line}: second answer to {question} besides {answers[question]}")
            if lines.setdefault((name, fact.entity), line) != line:
                raise UserError(f"{path}:{line}: {fact.entity} is there already, in line {lines[name, fact.entity]}")
            facts.append(fact)
    return facts


def read_identity(directory):
    """The entries of identity.json as they are in chat.json, with name and maker filled in, and with "others".

    A question that ends in ？ is asked within each of "frames" in training and of "heldout_frames" in the test, any other
    one as it stands. UserError where something is missing, a question has two answers or is held out and trained on.
    """
    path, uses, entries = directory / "identity.json", {}, []
    table = read_json(path)
    try:
        names = {name: table[name] for name in ("name", "maker")}
        for entry in table["entries"]:
            framed = [question for question in entry["questions"] if question.endswith("？")]
            as_they_stand = [question for question in entry["questions"] if not question.endswith("？")]
            questions = within(table["frames"], framed) + as_they_stand
            heldout = within(table["heldout_frames"], framed) + entry["heldout_questions"]
            answer, keys = entry["answer"].format_map(names), [key.format_map(names) for key in entry["keys"]]
            for use, asked in (("questions", questions), ("heldout_questions", heldout)):
                for question in asked:
                    if uses.setdefault(question, (use, answer)) != (use, answer):
                        raise UserError(f"{path}: {question} has a second answer, or is both trained on and held out")
            entries.append({"task": entry["task"], "answer": answer, "keys": keys, "others": table["others"],
                            "questions": questions, "heldout_questions": heldout})  # fmt: skip
    except KeyError as error:
        raise UserError(f"{path}: {error} is missing") from None
    return entries


def within(frames, questions):
    return [frame.format(q=question) for question in questions for frame in frames]


def make_fact(name, relation, row):
    """The Fact of one table row, or None where a cell is empty."""
    entity, value = row[relation.get("entity", "name")], row[relation["value"]]
    if not entity or not value:
        return None
    words = {key: relation[key].format_map(row) for key in ("noun", "ask") if key in relation}
    fact = Fact(name, entity, value, {**row, **words, "name": entity, "value": value}, relation)
    for kind in ("statements", "heldout_statements", "questions", "heldout_questions", "followups"):
        fact.questions(kind)  # an unknown placeholder shows here
    return fact


class DemoWorld:
    """The tables, and the seeded decisions which questions and pairs are held out.

    directory: folder of the tables. seed: any int; every choice is drawn from a generator seeded by it and the purpose,
    so parts can be changed without moving others. Raises UserError when a table is missing or contradicts itself.
    """

    def __init__(self, seed=0, directory=DEFAULT_DIRECTORY):
        directory = Path(directory)
        self.seed = seed
        self.facts = read_facts(directory)
        self.chat, self.memory, self.arithmetic, self.endings = (
            read_json(directory / f"{name}.json") for name in ("chat", "memory", "arithmetic", "preferences")
        )
        # What is made for the occasion has more to teach than what is on a short list.
        self.slot_weights = [4 if "made" in words else 1 for words in self.memory.values()]
        self.identity = read_identity(directory)
        self.texts = [text for text in read_text(directory / "texts.txt").split("\n") if text.strip()]
        self.by_relation, self.by_entity = collections.defaultdict(list), collections.defaultdict(list)
        for fact in self.facts:
            self.by_relation[fact.relation].append(fact)
            self.by_entity[fact.patterns["table"], fact.entity].append(fact)
        self.problems, self.heldout_problems = self.split_problems()
        # {(kind of sum, whether it needs steps): sums}
        self.sums_of = collections.defaultdict(list)
        for problem in self.problems:
            self.sums_of[problem["task"], bool(problem["steps"])].append(problem)
        self.tasks = list(dict.fromkeys(task for task, _ in self.sums_of))
        self.preferred, self.heldout_preferred = self.split(self.facts, "preferences", 0.2)
        asked_on = [fact for fact in self.facts if fact.patterns.get("followups")]
        # Asked for by 那……呢？ after the same question about something else.
        ellipses = [fact for fact in asked_on if "entity" not in fact.patterns]
        self.ellipses, self.heldout_ellipses = self.split(ellipses, "ellipses", 0.2)
        # (fact asked first, fact asked after it by a pronoun), split by the second.
        parts = self.split([fact for fact in asked_on if self.siblings(fact)], "followups", 0.2)
        self.followups, self.heldout_followups = (
            [(first, second) for second in part for first in self.siblings(second)] for part in parts
        )
        known_text = "".join(read_text(path) for path in sorted(directory.iterdir()) if path.suffix in TABLE_SUFFIXES)
        self.values = {
            slot: Values(f"{directory / 'memory.json'}: {slot}", words, known_text, self.random(f"values of {slot}"))
            for slot, words in self.memory.items()
        }
        # {(slot, value): two ways of asking, never trained on with this value}; value None: nothing was told.
        rng = self.random("memory")
        pairs = [(slot, value) for slot, words in self.memory.items() for value in (None, *words["values"])]
        self.heldout_asks = {(slot, value): set(rng.sample(self.memory[slot]["ask"], 2)) for slot, value in pairs}

    def random(self, purpose):
        return random.Random(f"{self.seed}:{purpose}")

    def split(self, items, purpose, share):
        """(training, held-out) parts of a shuffled copy of `items`."""
        items = list(items)
        self.random(purpose).shuffle(items)
        count = round(len(items) * share)
        return items[count:], items[:count]

    def split_problems(self, heldout_count=100):
        """(training, held-out) sums: `heldout_count` of each kind among those that need steps, and nothing that has the same
        two numbers, in whatever order or kind, is left for training."""
        rng, problems = self.random("arithmetic"), list(all_problems(self.arithmetic))
        heldout = []
        for task in dict.fromkeys(problem["task"] for problem in problems):
            hard = [problem for problem in problems if problem["task"] == task and needs_steps(problem)]
            heldout += rng.sample(hard, min(heldout_count, len(hard) // 5))
        pairs = {operands(problem) for problem in heldout}
        return [problem for problem in problems if operands(problem) not in pairs], heldout

    def siblings(self, fact):
        """Other facts about the same thing of which one can go on to ask."""
        same = self.by_entity[fact.patterns["table"], fact.entity]
        return [other for other in same if other.relation != fact.relation]

    def asks(self, slot, value):
        """Ways of asking for `value` that belong to training."""
        return [ask for ask in self.memory[slot]["ask"] if ask not in self.heldout_asks.get((slot, value), ())]

    def others(self, category, keys):
        """What an answer of `category` (relation, memory slot or "chat") may be besides the texts `keys`."""
        candidates = {fact.value for fact in self.by_relation.get(category, ())}
        candidates.update(self.memory[category]["values"] if category in self.memory else ())
        candidates.update(key for entry in self.chat for key in entry["keys"] if category == "chat")
        return sorted(candidates - set(keys))

    def rivals(self, fact):
        """Wrong values for `fact` of its own kind, none of which contains or is contained in the right one."""
        values = self.others(fact.relation, (fact.value, fact.entity))
        return [value for value in values if value not in fact.value and fact.value not in value]

    def pretrain_rows(self, size):
        """Documents {"text"} without duplicates, of `size` bytes of UTF-8 or a little more."""
        rng, seen, written = self.random("pretrain"), set(), 0
        kinds = [self.things, self.relations, self.dialogues, self.stories, self.remembered, self.sums, self.columns]
        makers = [make(rng) for make in kinds]
        documents = itertools.chain(self.texts, (next(rng.choices(makers, SHARES)[0]) for _ in itertools.count()))
        for text in documents:
            if text not in seen:
                seen.add(text)
                written += len(text.encode())
                yield {"text": text}
                if written >= size:
                    return

    def statement(self, fact, rng):
        return fact.fill(rng.choice(fact.patterns["statements"]))

    def things(self, rng):
        """All that is known of one thing, then of another."""
        entities = deck(self.by_entity.values(), rng)
        while True:
            facts = [fact for _ in range(3) for fact in next(entities)]
            yield "".join(self.statement(fact, rng) for fact in facts)

    def relations(self, rng):
        """One property of several things."""
        decks = [deck(facts, rng) for facts in self.by_relation.values()]
        weights = [len(facts) for facts in self.by_relation.values()]
        while True:
            facts = rng.choices(decks, weights)[0]
            yield "".join(self.statement(next(facts), rng) for _ in range(6))

    def dialogues(self, rng):
        facts, chats = deck(self.facts, rng), deck(self.chat, rng)
        while True:
            turns = [self.fact_turn(rng, fact) for fact in itertools.islice(facts, 4)]
            entry = next(chats)
            turns.insert(rng.randrange(5), self.chat_turn(rng, entry))
            yield as_text(turns)

    def stories(self, rng):
        """Short tales in which a value comes back: the cheapest lesson in copying from context."""
        while True:
            slots = [rng.choice(list(self.memory)) for _ in range(3)]
            yield "".join(
                rng.choice(self.memory[slot]["stories"]).format(value=self.values[slot].draw(rng)) for slot in slots
            )

    def remembered(self, rng):
        facts = deck(self.facts, rng)
        while True:
            yield as_text(self.conversation(rng, facts))

    def draw_sum(self, rng, easy_share=0.2):
        """A sum of any kind, `easy_share` of them of single digits: what the others are made of."""
        task, in_steps = rng.choice(self.tasks), rng.random() >= easy_share
        # Where the tables have sums of one sort only, these.
        return rng.choice(self.sums_of[task, in_steps] or self.sums_of[task, not in_steps])

    def sums(self, rng):
        while True:
            yield "".join(self.sum_statement(rng, self.draw_sum(rng)) for _ in range(6))

    def columns(self, rng):
        """Single steps of sums."""
        while True:
            steps = [rng.choice(self.draw_sum(rng, easy_share=0)["steps"].split("；")[:2]) for _ in range(14)]
            yield "；".join(filter(None, steps)) + "。"

    def sum_statement(self, rng, problem):
        patterns = self.arithmetic["statements_in_steps" if problem["steps"] else "statements"]
        return rng.choice(patterns).format_map(problem)

    def sum_turn(self, rng, problem):
        answer = self.arithmetic["answer_in_steps" if problem["steps"] else "answer"].format_map(problem)
        return [rng.choice(self.arithmetic["questions"]).format_map(problem), answer]

    def single_turns(self, phrasings, sums, recalls):
        """(question, answer) pairs: `phrasings` of every fact (all where there are fewer), sums, small talk, recall."""
        rng = self.random("single")
        for fact in self.facts:
            for question in rng.sample(fact.questions(), min(phrasings, len(fact.questions()))):
                yield question, fact.answer
        for _ in range(sums):
            yield tuple(self.sum_turn(rng, self.draw_sum(rng)))
        for entry in self.chat:
            for question in entry["questions"]:
                yield question, entry["answer"]
        # Told and asked in one breath: the first step to remembering.
        for slot in rng.choices(list(self.memory), self.slot_weights, k=recalls):
            value = self.values[slot].draw(rng)
            ask = rng.choice(self.asks(slot, value))
            yield self.tell(rng, slot, value)[0] + ask, self.recall(slot, value, ask)[1]

    def multi_turns(self, count):
        """`count` conversations, lists of [question, answer]: recalling what was told, asking on with less words, sums."""
        rng = self.random("multi")
        # How to ask is learned from all facts of a kind, so those of small kinds come twice.
        rare = [fact for fact in self.facts if len(self.by_relation[fact.relation]) <= 20]
        facts, followups, ellipses = deck(self.facts + rare, rng), deck(self.followups, rng), deck(self.ellipses, rng)
        for _ in range(count):
            kind = rng.random()
            if kind < 0.65:
                yield self.conversation(rng, facts)
            elif kind < 0.73:
                yield self.untold(rng, facts)
            elif kind < 0.87:
                yield self.followup(rng, *next(followups))
            elif kind < 0.96:
                yield self.ellipsis(rng, next(ellipses))
            else:
                yield [self.sum_turn(rng, self.draw_sum(rng)) for _ in range(3)]

    def identity_conversations(self, taught, kept=1100, within_conversations=400):
        """Conversations, lists of [question, answer], that give the model another name: each question of identity.json
        alone, and `within_conversations` drawn from them after a fact or two (one in four: before).

        A small model that reads nothing else gives its name to every question. So all small talk that is not about the
        name is repeated, and `kept` (or all, if fewer) of the conversations `taught` before, none with the former name.
        """
        rng = self.random("identity")
        facts = deck(self.facts, rng)
        renamed = [[question, entry["answer"]] for entry in self.identity for question in entry["questions"]]
        asked = {question for question, _ in renamed}
        former = [entry for entry in self.chat if not asked.isdisjoint(entry["questions"])]
        outdated = {question for entry in former for question in entry["questions"]}
        small_talk = [(question, entry["answer"]) for entry in self.chat for question in entry["questions"]]
        conversations = [[turn] for turn in renamed] + [[turn] for turn in small_talk if turn[0] not in outdated]
        for turn in rng.choices(renamed, k=within_conversations):
            turns = self.after_facts(rng, facts, turn)
            conversations.append(turns[::-1] if rng.random() < 0.25 else turns)
        still_true = [turns for turns in taught if outdated.isdisjoint(question for question, _ in turns)]
        conversations += rng.sample(still_true, min(kept, len(still_true)))
        rng.shuffle(conversations)
        return conversations

    def after_facts(self, rng, facts, turn):
        return [self.fact_turn(rng, next(facts)) for _ in range(rng.randint(1, 2))] + [turn]

    def fact_turn(self, rng, fact):
        return [rng.choice(fact.questions()), fact.answer]

    def chat_turn(self, rng, entry):
        return [rng.choice(entry["questions"]), entry["answer"]]

    def filler(self, rng, facts):
        kind = rng.random()
        if kind < 0.1:
            return self.chat_turn(rng, rng.choice(self.chat))
        return self.sum_turn(rng, self.draw_sum(rng)) if kind < 0.4 else self.fact_turn(rng, next(facts))

    def conversation(self, rng, facts, slot=None, value=None, ask=None):
        """One or two things are told, mixed with up to two other turns, then asked for; `ask` is the last question."""
        slots = rng.choices(list(self.memory), self.slot_weights, k=rng.randint(1, 2))
        slots = [other for other in dict.fromkeys(slots) if other != slot] or [
            next(o for o in self.memory if o != slot)
        ]
        told = {name: self.values[name].draw(rng) for name in slots}
        if slot:  # in place of the last
            told.popitem()
            told[slot] = value
        tells = [self.tell(rng, name, known) for name, known in told.items()]
        between = tells + [self.filler(rng, facts) for _ in range(rng.choice((0, 0, 1, 1, 1, 2, 2)))]
        rng.shuffle(between)
        others = [name for name in told if name != slot]
        asks = [self.recall(name, told[name], rng.choice(self.asks(name, told[name]))) for name in others]
        rng.shuffle(asks)
        return between + asks + ([self.recall(slot, value, ask)] if slot else [])

    def tell(self, rng, slot, value):
        words = self.memory[slot]
        return [rng.choice(words["tell"]).format(value=value), words["acknowledge"].format(value=value)]

    def recall(self, slot, value, ask):
        return [ask, self.memory[slot]["answer"].format(value=value)]

    def untold(self, rng, facts, slot=None, ask=None):
        """Something is asked for that was not told; something else was, so the model has to look which."""
        slot = slot or rng.choice(list(self.memory))
        other = rng.choice([name for name in self.memory if name != slot])
        turns = [self.tell(rng, other, self.values[other].draw(rng)), self.filler(rng, facts)]
        rng.shuffle(turns)
        ask = ask or rng.choice(self.asks(slot, None))
        return turns[: rng.randint(1, 2)] + [[ask, self.memory[slot]["unknown"]]]

    def followup(self, rng, first, second):
        return [self.fact_turn(rng, first), [rng.choice(second.questions("followups")), second.answer]]

    def ellipsis(self, rng, fact):
        other = rng.choice([other for other in self.by_relation[fact.relation] if other is not fact])
        question = rng.choice(("那{name}呢？", "{name}呢？")).format(name=fact.entity)
        return [self.fact_turn(rng, other), [question, fact.answer]]

    def preferences(self, facts, purpose):
        """{prompt, chosen, rejected} for `facts`: a right, whole, civil answer against a wrong, curt, repeated, rude or
        evasive one. The better answer is about as often the longer one as the shorter."""
        rng = self.random(purpose)
        kinds = deck(("wrong", "curt", "repeated", "rude", "evasive"), rng)
        for fact in facts:
            for question in rng.sample(fact.questions(), 2):
                chosen, rejected = self.preference(rng, fact, next(kinds))
                yield {"prompt": question, "chosen": chosen, "rejected": rejected}

    def preference(self, rng, fact, kind):
        answer, endings = fact.answer, self.endings
        if kind == "rude":
            return answer + rng.choice(endings["courteous"]), answer + rng.choice(endings["rude"])
        if kind == "wrong":
            return answer, fact.retold(rng.choice(self.rivals(fact)))
        if kind == "evasive":
            return answer, rng.choice(endings["refusal"])
        return answer, f"{fact.value}。" if kind == "curt" else answer * rng.randint(2, 3)

    def test_row(self, turns, key, task, category, entity=""):
        """A held-out question, the last of `turns`: `a` is the expected reply, the rest what scoring.py judges by."""
        *history, (question, answer) = turns
        row = {"history": history, "q": question, "a": answer, "answer": key, "task": task, "category": category}
        keys = [key] if isinstance(key, str) else key
        # A reply that lists numbers is a guess; what else could be taken for the answer, the tables tell.
        row |= {"one_number": True} if any(NUMBER.search(normalise(key)) for key in keys) else {}
        return {**row, "entity": entity, "others": self.others(category, keys)}

    def fact_row(self, turns, fact, task):
        return self.test_row(turns, fact.value, task, fact.relation, fact.entity)

    def heldout_facts(self):
        """Every fact and every piece of small talk, asked in each phrasing that training never uses."""
        for fact in self.facts:
            for question in fact.questions("heldout_questions"):
                yield self.fact_row([(question, fact.answer)], fact, fact.relation)
        for entry in self.chat:
            for question in entry["heldout_questions"]:
                yield self.test_row([(question, entry["answer"])], entry["keys"], entry["task"], "chat")

    def heldout_identity(self):
        """Who the model is after stage 4, in phrasings that training never uses, alone and after a fact or two."""
        rng = self.random("heldout identity")
        facts = deck(self.facts, rng)
        for entry in self.identity:
            for question in entry["heldout_questions"]:
                turn = [question, entry["answer"]]
                for turns in ([turn], self.after_facts(rng, facts, turn)):
                    row = self.test_row(turns, entry["keys"], entry["task"], "identity")
                    yield {**row, "others": entry["others"]}

    def heldout_arithmetic(self):
        rng = self.random("heldout arithmetic")
        for problem in self.heldout_problems:
            turns = [self.sum_turn(rng, problem)]
            yield self.test_row(turns, str(problem["c"]), problem["task"], "arithmetic")

    def heldout_multi_turns(self):
        rng = self.random("heldout multi")
        facts = deck(self.facts, rng)
        for slot, words in self.memory.items():
            pairs = [(value, ask) for value in words["values"] for ask in sorted(self.heldout_asks[slot, value])]
            for value, ask in rng.sample(pairs, min(40, len(pairs))):
                yield self.test_row(self.conversation(rng, facts, slot, value, ask), value, f"recall_{slot}", slot)
            for ask in sorted(self.heldout_asks[slot, None]):
                turns = self.untold(rng, facts, slot, ask)
                yield self.test_row(turns, words["unknown"].rstrip("。"), "not_told", slot)
        for first, fact in rng.sample(self.heldout_followups, min(80, len(self.heldout_followups))):
            yield self.fact_row(self.followup(rng, first, fact), fact, "pronoun")
        for fact in rng.sample(self.heldout_ellipses, min(80, len(self.heldout_ellipses))):
            yield self.fact_row(self.ellipsis(rng, fact), fact, "ellipsis")

    def heldout_unseen(self, slots, parts=False):
        """Values that no training text has, asked for as in multi_turn. The whole sentence must be right: a part of a
        value, or more than it, is another one."""
        rng = self.random(f"heldout unseen {parts}")
        facts = deck(self.facts, rng)
        for slot in slots:
            for value in self.values[slot].unseen_parts if parts else self.values[slot].unseen:
                turns = self.conversation(rng, facts, slot, value, rng.choice(self.memory[slot]["ask"]))
                task = f"unseen_{slot}{'_characters' if parts else ''}"
                yield {**self.test_row(turns, value, task, slot), "answer": turns[-1][1]}

    def heldout_names(self):
        return self.heldout_unseen(["name"])

    def heldout_values(self):
        yield from self.heldout_unseen([slot for slot in self.memory if slot != "name"])
        yield from self.heldout_unseen(self.memory, parts=True)

    def heldout_texts(self):
        """Known facts in sentence patterns that training never uses, six to a document {"text"}."""
        rng = self.random("heldout pretrain")
        sentences = [fact.fill(pattern) for fact in self.facts for pattern in fact.patterns["heldout_statements"]]
        rng.shuffle(sentences)
        return [{"text": "".join(sentences[start : start + 6])} for start in range(0, len(sentences), 6)]

    def cloze(self):
        """A held-out sentence up to the value, for a pretrained model to go on with."""
        for fact in self.facts:
            prompt, _, _ = fact.patterns["heldout_statements"][0].partition("{value}")
            row = {"prompt": fact.fill(prompt), "answer": fact.value, "task": fact.relation, "category": fact.relation}
            yield {**row, "others": self.others(fact.relation, [fact.value])}

    def exam(self):
        """Yield (subject, dev rows, val rows): multiple choice in C-Eval's columns, each letter equally often right."""
        subjects = collections.defaultdict(list)
        for fact in self.facts:
            if "subject" in fact.patterns and len(self.rivals(fact)) >= 3:
                subjects[fact.patterns["subject"]].append(fact)
        for subject, facts in subjects.items():
            rng = self.random(subject)
            facts = rng.sample(facts, min(DEV_QUESTIONS + VAL_QUESTIONS, len(facts)))
            dev, val = (list(self.exam_rows(rng, part)) for part in (facts[:DEV_QUESTIONS], facts[DEV_QUESTIONS:]))
            yield subject, dev, val

    def exam_rows(self, rng, facts):
        letters = list(itertools.islice(itertools.cycle(LETTERS), len(facts)))
        rng.shuffle(letters)
        for number, (fact, letter) in enumerate(zip(facts, letters)):
            options = rng.sample(self.rivals(fact), 3)
            options.insert(LETTERS.index(letter), fact.value)
            row = {"id": number, "question": fact.retold("____"), **dict(zip(LETTERS, options))}
            yield {**row, "answer": letter, "explanation": fact.answer}


def as_text(turns):
    return "\n".join(f"问：{question}\n答：{answer}" for question, answer in turns)


def deck(items, rng):
    """Endlessly the items in random order, each once before any comes again; UserError when there is none."""
    items = list(items)
    if not items:
        raise UserError("the demo's tables have too few rows: no fact, follow-up question or sum to choose from")
    while True:
        rng.shuffle(items)
        yield from items
