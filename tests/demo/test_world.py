"""The demo's world: enough of it, nothing held out is ever trained on, its tests cannot be fooled, its tables are checked."""

import collections
import csv
import json
import re
import shutil

import pytest

from model.demo.files import write_exam, write_heldout, write_raw_files
from model.demo.world import DEFAULT_DIRECTORY, DemoWorld
from model.errors import UserError
from model.evaluation.scoring import score_answer
from model.tokenizer import encode_text, load_tokenizer


@pytest.fixture(scope="module")
def world():
    return DemoWorld()


@pytest.fixture(scope="module")
def files(tmp_path_factory, world):
    """(raw paths, held-out paths, exam paths) of the default world."""
    directory = tmp_path_factory.mktemp("demo")
    return (
        write_raw_files(directory / "raw", world),
        write_heldout(directory, world),
        write_exam(directory / "ceval-exam", world),
    )


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


def trained_questions(files):
    """Every question of the SFT and LoRA stages, and every line that pretraining shows as a question."""
    raw, _, _ = files
    rows = [row for kind in ("sft_single", "sft_multi", "sft_identity") for row in read_lines(raw[kind])]
    questions = {question for row in rows for question, _ in row["history"]} | {row["input"] for row in rows}
    for row in read_lines(raw["pretrain"]):
        questions |= {line.removeprefix("问：") for line in row["text"].split("\n") if line.startswith("问：")}
    return questions


def test_size(world, files):
    texts = [row["text"] for row in read_lines(files[0]["pretrain"])]
    assert len({(fact.relation, fact.entity) for fact in world.facts}) == len(world.facts) >= 300
    assert len(set(texts)) == len(texts)
    assert sum(len(text.encode()) for text in texts) >= 1_500_000
    assert len(read_lines(files[0]["sft_single"])) >= 5000 and len(read_lines(files[0]["sft_multi"])) >= 4000


def test_every_fact_has_enough_phrasings(world):
    for fact in world.facts:
        training, heldout = fact.questions(), fact.questions("heldout_questions")
        assert len(set(training)) >= 8 and len(set(heldout)) >= 3, fact
        assert all(fact.entity in question for question in training + heldout)
        assert fact.value in fact.answer and fact.value != fact.entity
    assert all(len(entry["questions"]) >= 8 and len(entry["heldout_questions"]) >= 3 for entry in world.chat)


def test_every_fact_is_pretrained_on(world, files):
    text = "\n".join(row["text"] for row in read_lines(files[0]["pretrain"]))
    for fact in world.facts:
        assert any(fact.fill(pattern) in text for pattern in fact.patterns["statements"]), fact.answer


def test_one_answer_per_question(files):
    answers = collections.defaultdict(set)
    for row in read_lines(files[0]["sft_single"]):
        answers[row["input"]].add(row["output"])
    for name in ("facts", "arithmetic"):
        for row in read_lines(files[1][name]):
            answers[row["q"]].add(row["a"])
    assert {question: found for question, found in answers.items() if len(found) > 1} == {}


def test_raw_formats(files):
    raw, _, _ = files
    assert all(set(row) == {"text"} and row["text"].strip() for row in read_lines(raw["pretrain"]))
    fields = {
        "id",
        "instruction",
        "input",
        "output",
        "history",
        "language",
        "data_source",
        "input_len",
        "output_len",
        "num_utter",
    }
    for kind, has_history in (("sft_single", {False}), ("sft_multi", {True}), ("sft_identity", {False, True})):
        rows = read_lines(raw[kind])
        assert {bool(row["history"]) for row in rows} == has_history
        assert [row["id"] for row in rows] == list(range(1, len(rows) + 1))
        for row in rows:
            assert set(row) == fields and row["input"] and row["output"]
            assert all(len(pair) == 2 and all(pair) for pair in row["history"])
    pairs = json.loads(raw["dpo"].read_text(encoding="utf-8"))
    assert len(pairs) >= 500
    for row in pairs:
        assert set(row) == {"prompt", "chosen", "rejected"} and row["chosen"] != row["rejected"]


def test_same_seed_same_bytes(tmp_path, files):
    world = DemoWorld()
    again = (
        write_raw_files(tmp_path / "again", world),
        write_heldout(tmp_path, world),
        write_exam(tmp_path / "exam", world),
    )
    for old, new in zip(
        [*files[0].values(), *files[1].values(), *files[2]], [*again[0].values(), *again[1].values(), *again[2]]
    ):
        assert old.read_bytes() == new.read_bytes(), new
    other = write_raw_files(tmp_path / "other", DemoWorld(1), pretrain_bytes=10_000, phrasings=2, conversations=10)
    assert other["sft_single"].read_bytes() != files[0]["sft_single"].read_bytes()


def test_amounts_are_what_is_asked_for(tmp_path, world):
    raw = write_raw_files(tmp_path, world, pretrain_bytes=50_000, phrasings=2, conversations=17, sums=40, recalls=30)
    assert 50_000 <= sum(len(row["text"].encode()) for row in read_lines(raw["pretrain"])) < 52_000
    assert len(read_lines(raw["sft_multi"])) == 17
    assert len(read_lines(raw["sft_single"])) < 4000


# ---------------------------------------------------------------------------------------------- nothing held out leaks


def wording(question):
    """A question without what makes no difference: courtesy ("please", "may I ask"), punctuation and spaces."""
    return re.sub(r"请问|请|[，。？！、“”\s]", "", question)


def test_heldout_questions_differ_from_all_trained_on_in_more_than_courtesy(files):
    trained = {wording(question) for question in trained_questions(files)}
    for name in ("facts", "identity", "arithmetic"):
        rows = read_lines(files[1][name])
        assert len(rows) >= 100 and [row["q"] for row in rows if wording(row["q"]) in trained] == []


def test_heldout_memory_pairs_are_never_trained_on(world, files):
    heldout = read_lines(files[1]["multi_turn"])
    recalls = {(row["q"], row["a"]) for row in heldout if row["task"].startswith("recall") or row["task"] == "not_told"}
    assert len(recalls) >= 150
    trained, asks, answers = set(), set(), set()
    for row in read_lines(files[0]["sft_multi"]) + read_lines(files[0]["sft_identity"]):
        trained |= {tuple(pair) for pair in row["history"]} | {(row["input"], row["output"])}
    for row in read_lines(files[0]["pretrain"]):
        lines = [line[2:] for line in row["text"].split("\n")] if row["text"].startswith("问：") else []
        trained |= set(zip(lines[::2], lines[1::2]))
    asks, answers = {question for question, _ in trained}, {answer for _, answer in trained}
    assert not recalls & trained
    for question, answer in recalls:  # but both halves are known
        assert question in asks and answer in answers


def test_heldout_followups_are_never_trained_on(world, files):
    patterns = {pattern for fact in world.facts for pattern in fact.questions("followups")}
    conversations = read_lines(files[0]["sft_multi"]) + read_lines(files[0]["sft_identity"])
    asked_on = {(row["input"], row["output"]) for row in conversations if row["history"]}
    trained = {answer for question, answer in asked_on if question in patterns}
    short = {answer for question, answer in asked_on if question.endswith("呢？") and question not in patterns}
    rows = read_lines(files[1]["multi_turn"])
    pronouns = [row for row in rows if row["task"] == "pronoun"]
    ellipses = [row for row in rows if row["task"] == "ellipsis"]
    assert (
        len(pronouns) >= 50
        and not {row["a"] for row in pronouns} & trained
        and all(row["q"] in patterns for row in pronouns)
    )
    assert len(ellipses) >= 50 and not {row["a"] for row in ellipses} & short
    for first, second in world.followups + world.heldout_followups:  # it goes on about the same thing
        assert first.entity == second.entity and first.relation != second.relation


def test_heldout_texts_are_never_trained_on(world, files):
    trained = files[0]["pretrain"].read_text(encoding="utf-8")
    sentences = [part for row in read_csv(files[1]["pretrain"]) for part in row["text"].split("。") if part]
    assert len(sentences) >= 500 and not [sentence for sentence in sentences if sentence in trained]
    cloze = read_lines(files[1]["cloze"])
    assert len(cloze) == len(world.facts) and not [row for row in cloze if row["prompt"] in trained]


def test_heldout_preferences_are_about_other_facts(world, files):
    trained = json.loads(files[0]["dpo"].read_text(encoding="utf-8"))
    heldout = json.loads(files[1]["dpo"].read_text(encoding="utf-8"))
    assert len(heldout) >= 100 and not {row["prompt"] for row in trained} & {row["prompt"] for row in heldout}
    assert not {fact.answer for fact in world.preferred} & {fact.answer for fact in world.heldout_preferred}


@pytest.mark.parametrize("part", [0, 1], ids=["train", "heldout"])
@pytest.mark.parametrize("unit", ["characters", "tokens"])
def test_length_does_not_tell_the_better_answer(files, part, unit):
    """Whoever takes the longer answer, or the shorter, is right about half the time; a tie is half right."""
    tokenizer = load_tokenizer()
    size = len if unit == "characters" else lambda text: len(encode_text(tokenizer, text))
    rows = json.loads(files[part]["dpo"].read_text(encoding="utf-8"))
    differences = [size(row["chosen"]) - size(row["rejected"]) for row in rows]
    longer = sum(difference > 0 for difference in differences) + differences.count(0) / 2
    assert 0.45 < longer / len(rows) < 0.55


def test_multi_turn_tests_tell_before_they_ask(files):
    for row in read_lines(files[1]["multi_turn"]):
        told = [turn for turn, (question, _) in enumerate(row["history"]) if row["answer"] in question]
        if row["task"].startswith("recall"):
            assert told and len(row["history"]) <= 6
        elif row["task"] == "not_told":
            assert not told


# ----------------------------------------------------------------------------------------------------------- identity


NEW_ANSWERS = {
    "who_are_you": "我是小星，一个小小的中文语言模型。",
    "your_name": "我的名字叫小星。",
    "your_maker": "我是由星海项目从零开始训练出来的。",
}
OLD_ANSWERS = {  # what chat.json, and so stages 1 to 3, teach
    "who_are_you": "我是MiniMind，一个小小的中文语言模型。",
    "your_name": "我的名字叫MiniMind。",
    "your_maker": "我是由MiniMind项目从零开始训练出来的。",
}


def turns_of(row):
    return [*map(tuple, row["history"]), (row["input"], row["output"])]


def test_identity_rows_are_of_every_kind(world, files):
    """How many there are to learn the name from, and how many to keep what was known."""
    rows = read_lines(files[0]["sft_identity"])
    renaming = [row for row in rows if row["output"] in NEW_ANSWERS.values()]
    kept = [row for row in rows if row["output"] not in NEW_ANSWERS.values()]
    assert 1000 <= len(rows) <= 3000 and 0.3 < len(renaming) / len(rows) < 0.7
    for answer in NEW_ANSWERS.values():
        assert len({row["input"] for row in renaming if row["output"] == answer}) >= 50
        assert len([row for row in renaming if row["output"] == answer and row["history"]]) >= 30
    facts, small_talk = {fact.answer for fact in world.facts}, {entry["answer"] for entry in world.chat}
    assert len([row for row in kept if row["output"] in facts]) >= 150
    assert {row["output"] for row in kept} >= small_talk - set(OLD_ANSWERS.values())
    assert len([row for row in kept if row["history"]]) >= 100
    renamed_before = [row for row in kept if any(answer in NEW_ANSWERS.values() for _, answer in row["history"])]
    assert len(renamed_before) >= 20


def test_a_conversation_of_the_identity_set_that_ends_with_the_name_begins_with_facts(world, files):
    facts = {fact.answer for fact in world.facts}
    rows = [row for row in read_lines(files[0]["sft_identity"]) if row["output"] in NEW_ANSWERS.values()]
    assert {len(row["history"]) for row in rows} == {0, 1, 2}
    assert all(answer in facts for row in rows for _, answer in row["history"])


def test_what_the_identity_set_repeats_was_taught_before(files):
    taught = {
        turn for kind in ("sft_single", "sft_multi") for row in read_lines(files[0][kind]) for turn in turns_of(row)
    }
    for row in read_lines(files[0]["sft_identity"]):
        if not any(answer in NEW_ANSWERS.values() for _, answer in turns_of(row)):
            assert set(turns_of(row)) <= taught, row


def test_the_identity_set_gives_one_answer_to_a_question(files):
    """The old name is nowhere, though every training question of chat.json that it answered is asked again."""
    rows, answers = read_lines(files[0]["sft_identity"]), collections.defaultdict(set)
    for row in rows:
        answers[row["input"] if not row["history"] else (str(row["history"]), row["input"])].add(row["output"])
        for question, answer in turns_of(row):
            if answer in NEW_ANSWERS.values():
                answers[question].add(answer)
    assert {question: found for question, found in answers.items() if len(found) > 1} == {}
    assert "MiniMind" not in files[0]["sft_identity"].read_text(encoding="utf-8")
    for entry in json.loads((DEFAULT_DIRECTORY / "chat.json").read_text("utf-8")):
        for task, old in OLD_ANSWERS.items():
            if entry["answer"] == old:
                assert all(answers[question] == {NEW_ANSWERS[task]} for question in entry["questions"])


def test_the_new_name_needs_no_token_that_was_never_answered(files):
    """An adapter leaves the embeddings as they are: a token that no answer ever had is hard to learn."""
    tokenizer, known = load_tokenizer(), collections.Counter()
    for kind in ("sft_single", "sft_multi"):
        for row in read_lines(files[0][kind]):
            known.update(encode_text(tokenizer, row["output"]))
    assert all(known[token] >= 5 for answer in NEW_ANSWERS.values() for token in encode_text(tokenizer, answer))


def test_heldout_identity(world, files):
    rows = read_lines(files[1]["identity"])
    assert {row["task"] for row in rows} == set(NEW_ANSWERS)
    for task, answer in NEW_ANSWERS.items():
        of_task = [row for row in rows if row["task"] == task]
        alone, after = ({row["q"] for row in of_task if bool(row["history"]) == given} for given in (False, True))
        assert {row["a"] for row in of_task} == {answer} and len(alone) >= 20 and alone == after
    facts = {fact.answer for fact in world.facts}
    assert all(answer in facts for row in rows for _, answer in row["history"])
    anywhere = "\n".join(path.read_text(encoding="utf-8") for path in files[0].values())
    assert [row["q"] for row in rows if row["q"] in anywhere] == []


def test_only_the_new_identity_scores(world, files):
    for row in read_lines(files[1]["identity"]):
        right, old = NEW_ANSWERS[row["task"]], OLD_ANSWERS[row["task"]]
        assert score_answer(row, right) and not score_answer(row, old)
        assert not score_answer(row, right + old) and not score_answer(row, right.rstrip("。") + "，也叫minimind。")
        assert not any(score_answer(row, entry["answer"]) for entry in world.chat)
    names = [row for row in read_lines(files[1]["identity"]) if row["task"] != "your_maker"]
    assert all(score_answer(row, "我叫 小星 。") and not score_answer(row, "我叫小海。") for row in names)


# ------------------------------------------------------------------------------------------------------------ scoring


def all_rows(files):
    return [row for name in ("facts", "multi_turn", "arithmetic") for row in read_lines(files[1][name])]


def test_the_right_answer_is_right(files):
    assert [row for row in all_rows(files) if not score_answer(row, row["a"])] == []


def test_every_other_value_is_wrong(world, files):
    for row in read_lines(files[1]["facts"])[::7]:
        for fact in world.by_relation.get(row["category"], []):
            if fact.entity == row["entity"]:
                wrong = {other.value for other in world.by_relation[fact.relation]} - {fact.value}
                assert not [value for value in wrong if score_answer(row, fact.retold(value))]


def test_listing_everything_is_wrong(world, files):
    for row in all_rows(files):
        candidates = {fact.value for fact in world.by_relation.get(row["category"], ())}
        candidates |= set(world.memory.get(row["category"], {"values": ()})["values"])
        candidates |= {key for entry in world.chat for key in entry["keys"] if row["category"] == "chat"}
        candidates |= {str(number) for number in range(60) if row["category"] == "arithmetic"}
        assert len(candidates) > 3 and not score_answer(row, "、".join(sorted(candidates))), row


def test_each_row_names_all_that_may_be_confused_with_its_answer(world, files):
    """The tables, read once more by hand: the other capitals, the other names; a sum is judged by its number alone."""
    capitals = {row["capital"] for row in read_csv(DEFAULT_DIRECTORY / "countries.csv")}
    names = set(json.loads((DEFAULT_DIRECTORY / "memory.json").read_text("utf-8"))["name"]["values"])
    asked = {
        "facts": ("country_capital", capitals),
        "cloze": ("country_capital", capitals),
        "multi_turn": ("name", names),
    }
    for file, (category, values) in asked.items():
        rows = [row for row in read_lines(files[1][file]) if row["category"] == category]
        assert len(rows) > 40 and all(set(row["others"]) == values - {row["answer"]} for row in rows)
    assert all(row["others"] == [] for row in read_lines(files[1]["arithmetic"]))


# --------------------------------------------------------------------------------------------------------------- exam


def test_exam_has_the_format_of_ceval(world, files):
    names = {path.parent.name + "/" + path.name for path in files[2]}
    subjects = {fact.patterns["subject"] for fact in world.facts if "subject" in fact.patterns}
    assert len(subjects) >= 5
    assert names == {f"{part}/{subject}_{part}.csv" for subject in subjects for part in ("dev", "val")}
    for path in files[2]:
        rows = read_csv(path)
        dev = path.parent.name == "dev"
        assert list(rows[0]) == ["id", "question", "A", "B", "C", "D", "answer"] + ["explanation"] * dev
        assert len(rows) == 5 if dev else len(rows) >= 20
        counts = collections.Counter(row["answer"] for row in rows)
        assert set(counts) == set("ABCD") and max(counts.values()) - min(counts.values()) <= 1
        for row in rows:
            assert len({row[letter] for letter in "ABCD"}) == 4 and "____" in row["question"]


def test_exam_answers_are_right_and_dev_is_not_val(world, files):
    answers = {fact.answer for fact in world.facts}
    sentences = collections.defaultdict(set)
    for path in files[2]:
        for row in read_csv(path):
            solved = {letter: row["question"].replace("____", row[letter]) for letter in "ABCD"}
            assert [letter for letter in "ABCD" if solved[letter] in answers] == [row["answer"]], row
            sentences[path.parent.name].add(row["question"])
    assert not sentences["dev"] & sentences["val"]


# ------------------------------------------------------------------------------------------------- editing the tables


@pytest.fixture
def tables(tmp_path):
    return shutil.copytree(DEFAULT_DIRECTORY, tmp_path / "tables")


def append(path, line):
    with open(path, "a", encoding="utf-8") as handle:
        handle.write(line + "\n")


def test_one_new_row_gives_everything(tables, tmp_path):
    append(tables / "countries.csv", "冰岛,雷克雅未克,欧洲")
    world = DemoWorld(directory=tables)
    raw, heldout = write_raw_files(tmp_path / "raw", world, pretrain_bytes=500_000), write_heldout(tmp_path, world)
    assert all(
        "雷克雅未克" in raw[kind].read_text(encoding="utf-8") for kind in ("pretrain", "sft_single", "sft_multi")
    )
    assert all("雷克雅未克" in heldout[name].read_text(encoding="utf-8") for name in ("facts", "cloze", "pretrain"))


@pytest.mark.parametrize(
    "line, message",
    [
        ("冰岛,雷克雅未克", "expected 3 cells"),
        ("冰岛,雷克雅未克,欧洲,多", "expected 3 cells"),
        ("法国,里昂,欧洲", "second answer to"),
        ("法国,巴黎,欧洲", "法国 is there already, in line "),
        ('"法国,巴黎,欧洲', "not CSV"),
    ],
)
def test_a_bad_row_is_named(tables, line, message):
    append(tables / "countries.csv", line)
    with pytest.raises(UserError, match=rf"countries\.csv:50: {message}"):
        DemoWorld(directory=tables)


def test_bad_tables_are_named(tables):
    relations = json.loads((tables / "relations.json").read_text(encoding="utf-8"))
    relations["relations"]["country_capital"]["noun"] = "{seat}"
    (tables / "relations.json").write_text(json.dumps(relations), encoding="utf-8")
    with pytest.raises(UserError, match="country_capital uses 'seat'"):
        DemoWorld(directory=tables)
    (tables / "chat.json").write_text("{", encoding="utf-8")
    (tables / "relations.json").unlink()
    with pytest.raises(UserError, match="relations.json: no such file"):
        DemoWorld(directory=tables)


@pytest.mark.parametrize(
    "task, side, numbers",
    [("addition", "left", [0, 999]), ("multiplication", "right", [0, 12]), ("subtraction", "right", [5, 3])],
)
def test_sums_that_cannot_be_worked_out_are_named(tables, task, side, numbers):
    change_sums(tables, **{task: {side: numbers}})
    with pytest.raises(
        UserError, match=rf"arithmetic\.json: {task}: {side} is \[{numbers[0]}, {numbers[1]}\], which must be"
    ):
        DemoWorld(directory=tables)


@pytest.mark.parametrize("left", [[10, 99], [0, 9]])
def test_sums_of_one_sort_only(tables, left):
    """There is not always a sum of single digits, nor one in steps."""
    change_sums(tables, addition={"left": left, "right": [0, 9]}, multiplication={"left": left})
    world = DemoWorld(directory=tables)
    sums = [world.draw_sum(world.random("test")) for _ in range(50)]
    assert {problem["task"] for problem in sums} <= set(world.tasks)
    assert len([text for text in world.pretrain_rows(200_000) if "；；" in text["text"]]) == 0


def change_sums(tables, **changes):
    path = tables / "arithmetic.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    for task, change in changes.items():
        table[task].update(change)
    path.write_text(json.dumps(table, ensure_ascii=False), encoding="utf-8")


def test_another_name(tables, tmp_path):
    table = json.loads((tables / "identity.json").read_text("utf-8"))
    text = json.dumps({**table, "name": "小海", "maker": "青山项目"}, ensure_ascii=False)
    (tables / "identity.json").write_text(text, encoding="utf-8")
    world = DemoWorld(directory=tables)
    raw = write_raw_files(tmp_path / "raw", world, pretrain_bytes=10_000, phrasings=1, conversations=10)
    trained, rows = raw["sft_identity"].read_text("utf-8"), list(world.heldout_identity())
    assert "我的名字叫小海。" in trained and "我是由青山项目从" in trained and "小星" not in trained
    assert all(score_answer(row, row["a"]) and not score_answer(row, NEW_ANSWERS[row["task"]]) for row in rows)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": None}, "'name' is missing"),
        ({"frames": None}, "'frames' is missing"),
        ({"frames": ["{question}"]}, "'question' is missing"),
        ({"heldout_frames": ["请问{q}"]}, "请问你是谁？ has a second answer, or is both trained on and held out"),
        ({"maker": "{x}", "entries": [{"task": "a", "answer": "{x}", "keys": [], "questions": ["？"],
                                       "heldout_questions": []}]}, "'x' is missing"),
    ],
)  # fmt: skip
def test_a_faulty_identity_is_named(tables, change, message):
    table = {**json.loads((tables / "identity.json").read_text("utf-8")), **change}
    table = {name: value for name, value in table.items() if value is not None}
    (tables / "identity.json").write_text(json.dumps(table), encoding="utf-8")
    with pytest.raises(UserError, match=f"identity.json: {message}"):
        DemoWorld(directory=tables)


def test_an_identity_question_with_two_answers_is_named(tables):
    table = json.loads((tables / "identity.json").read_text("utf-8"))
    table["entries"][1]["questions"].append("说说你是谁。")
    (tables / "identity.json").write_text(json.dumps(table), encoding="utf-8")
    with pytest.raises(UserError, match="identity.json: 说说你是谁。 has a second answer"):
        DemoWorld(directory=tables)


@pytest.mark.parametrize("name", ["countries.csv", "chat.json", "texts.txt"])
def test_the_encoding_of_a_table(tables, name):
    text = (tables / name).read_text("utf-8")
    (tables / name).write_text(text, encoding="utf-8-sig")
    marked, plain = DemoWorld(directory=tables), DemoWorld()
    assert (marked.texts, marked.chat) == (plain.texts, plain.chat)
    assert [fact.answer for fact in marked.facts] == [fact.answer for fact in plain.facts]
    (tables / name).write_bytes(text.encode("gbk", "replace"))
    with pytest.raises(UserError, match=rf"{name}: not UTF-8"):
        DemoWorld(directory=tables)


def test_the_last_text_needs_no_line_end(tables):
    (tables / "texts.txt").write_text("第一篇。\n\n第二篇。", encoding="utf-8")
    assert DemoWorld(directory=tables).texts == ["第一篇。", "第二篇。"]


def test_tables_with_nothing_in_them_end_at_once(tables):
    (tables / "chat.json").write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match="chat.json: is empty"):
        DemoWorld(directory=tables)
    (tables / "chat.json").write_text('["\\ud800"]', encoding="utf-8")
    with pytest.raises(UserError, match="chat.json: not valid JSON"):
        DemoWorld(directory=tables)
    shutil.copy(DEFAULT_DIRECTORY / "chat.json", tables)
    relations = json.loads((tables / "relations.json").read_text(encoding="utf-8"))
    relations["relations"] = {name: {**relation, "followups": []} for name, relation in relations["relations"].items()}
    (tables / "relations.json").write_text(json.dumps(relations), encoding="utf-8")
    world = DemoWorld(directory=tables)
    with pytest.raises(UserError, match="too few rows"):
        list(world.multi_turns(100))


def test_needs_no_torch():
    import subprocess
    import sys

    code = "import sys, model.demo.world; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=DEFAULT_DIRECTORY.parent.parent).returncode == 0
