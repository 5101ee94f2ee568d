"""The report on several checkpoints: its figures by hand, hostile texts through both formats, files complete or absent."""

import gc
import html.parser
import json
import types
import weakref

import pytest
from test_judge import KEY, endpoint

import model.evaluation.report as report
from model.errors import UserError
from model.evaluation.judge import Judge, Rating
from model.evaluation.report import Column, repetition, report_paths, summary, to_html, to_markdown, write_report
from model.settings import InferenceSettings, SamplingParameters

HOSTILE = [
    "<script>alert('x')</script>&amp;",
    "a|b\\|c\\\\|d\\",
    "`code` **bold** _low_ ~~gone~~ [link](http://a) ![image](http://a/b.png) $x$",
    "| --- | --- |\n# 标题\n- 一\n\n```\n完",
    '" onmouseover="alert(1)\' </td></table></html>',
    "一\r\n二\r三\t四",
    "&lt;b&gt; &#124; <!-- -->",
]
ROWS = [
    ("a:1", {"q": "河北的省会是哪里？", "answer": "石家庄"}),
    ("a:2", {"q": "你是谁？"}),
    ("a:3", {"q": "天气怎么样？", "answer": ["雨", "风"]}),
]
HISTORIES = [[], [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "好"}], []]


def request(text, token_ids=(1, 2), reason="stop", limit=9):
    return types.SimpleNamespace(text=text, token_ids=list(token_ids), finish_reason=reason, limit=limit, error=None)


def column(path="a.pth", requests=(), right=None, ratings=None):
    unknown = [None] * len(requests)
    return Column(path, "a model", list(requests), right or unknown, ratings or unknown)


def test_repetition_by_hand():
    assert repetition([]) == repetition([1, 1, 1]) == repetition([1, 2, 3, 4, 5]) == repetition([1, 1, 1, 1]) == 0
    assert repetition([1, 1, 1, 1, 1]) == 1 / 2  # 1111 twice
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)  # 1234 2341 3412 4123 1234
    assert repetition([1, 2, 1, 2], n=2) == pytest.approx(1 / 3)  # 12 21 12


def test_the_summary_by_hand():
    requests = [
        request("石家庄", [5] * 6),  # 5555 three times: 2/3
        request("我是小模型吗", range(8), reason="length"),
        None,
        request("", []),
    ]
    ratings = [Rating(9, "好"), Rating(None, "?"), None, Rating(2.5, "空")]
    known = column("a.pth", requests, [True, None, False, None], ratings)
    empty = column("b.pth", [None] * 4)
    header, rows = summary([known, empty])
    assert header[3:] == [
        "ends by itself", "repetition", "mean tokens", "mean characters", "right", "judge, 1 to 10",
    ]  # fmt: skip
    assert rows[0] == ["a.pth", "a model", "3 of 4", "67%", "22.2%", "4.7", "3.0", "50.0% of 2", "5.8 (2 of 3 rated)"]
    assert rows[1][2:] == ["0 of 4", "–", "–", "–", "–", "– of 0", "– (0 of 0 rated)"]
    plain = summary([column(requests=[request("好")])])
    assert plain[0][-1] == "mean characters" and len(plain[1][0]) == len(plain[0]) == 7


class Page(html.parser.HTMLParser):
    """Tags, attributes and the texts of cells and headings of a page, as a browser reads them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.cells = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        if tag in ("td", "th", "h1", "h2", "p", "small"):
            self.cells.append("")

    def handle_data(self, data):
        if self.cells:
            self.cells[-1] += data.removesuffix("\n") if data.isspace() else data


def test_the_page_shows_every_text_as_it_stands_and_fetches_nothing():
    rows = [[text, (text, text)] for text in HOSTILE]
    text = to_html([("heading", 1, HOSTILE[0]), ("text", HOSTILE[2]), ("table", HOSTILE[:2], rows)])
    page = Page(text)
    shown = [one.replace("\r\n", "\n").replace("\r", "\n") for one in HOSTILE]
    assert page.cells == [shown[0], shown[2], *shown[:2], *(one for one in shown for _ in range(3))]
    known = {"html", "meta", "title", "style", "h1", "p", "div", "table", "thead", "tbody", "tr", "th", "td", "small"}
    assert page.tags <= known and {name for name, _ in page.attributes} == {
        "lang", "charset", "name", "content", "http-equiv", "class", "scope",
    }  # fmt: skip
    assert "url(" not in text and "@import" not in text and "default-src 'none'" in text
    assert "width=device-width" in text and "color-scheme: light dark" in text and "overflow-x: auto" in text


def test_markdown_shows_every_text_as_it_stands():
    markdown = pytest.importorskip("markdown_it").MarkdownIt("gfm-like", {"linkify": False})
    rows = [[text, (text, text)] for text in HOSTILE]
    page = Page(markdown.render(to_markdown([("table", ["#", HOSTILE[0]], rows)])).replace("<br>", "\n"))
    assert page.tags == {"table", "thead", "tbody", "tr", "th", "td"} | {"sub"}
    shown = [one.replace("\r\n", "\n").replace("\r", "\n") for one in HOSTILE]
    assert page.cells == ["#", HOSTILE[0], *(cell for one in shown for cell in (one, f"{one}\n{one}"))]


def test_markdown_cells_by_hand():
    table = to_markdown([("table", ["a|b"], [[("x\n`<i>`", "1*")], ["\x00\x1b[1m\x85"]])])
    assert table == ("| a\\|b |\n| --- |\n| x<br>\\`&lt;i&gt;\\`<br><sub>1\\*</sub> |\n| \ufffd\ufffd\\[1m\ufffd |\n")


@pytest.fixture
def engines(monkeypatch, tokenizer):
    """Stand-in checkpoints: {path: replies}. A reply is a text, None (the engine fails), or too long to be asked (...)."""
    replies, alive, seen = {}, [], []

    class Engine:
        description, max_length = "a model", 512

        def __init__(self, path):
            self.tokenizer, self.replies = tokenizer, list(replies[path])

        def check_prompt(self, prompt):
            self.replies.append(self.replies.pop(0))
            if self.replies[-1] is ...:
                self.replies.pop()
                raise UserError("the prompt is too long")

        def generate(self, prompts, parameters, on_finish):
            assert len(prompts) == len(parameters) == len(self.replies)
            seen.extend((tokenizer.decode(ids), each.temperature) for ids, each in zip(prompts, parameters))
            failed = types.SimpleNamespace(finish_reason="error", error="the output is not finite")
            return [failed if text is None else request(text) for text in self.replies]

    def open_engine(settings):
        gc.collect()
        assert not any(engine() for engine in alive), "the checkpoint before is still in memory"
        engine = Engine(settings.checkpoint)
        alive.append(weakref.ref(engine))
        return engine, settings.checkpoint

    monkeypatch.setattr(report, "open_engine", open_engine)
    return types.SimpleNamespace(replies=replies, seen=seen)


def write(tmp_path, engines, judge=None, **replies):
    several = []
    for name, texts in replies.items():
        path = tmp_path / f"{name}.pth"
        path.touch()
        engines.replies[str(path)] = texts
        several.append(InferenceSettings(checkpoint=str(path)))
    paths = report_paths(tmp_path / "out" / "report.html")
    write_report(paths, several, ROWS, HISTORIES, SamplingParameters(temperature=0.7, seed=5), "a", judge)
    return [path.read_text("utf-8") for path in paths]


def test_both_files_hold_every_answer_side_by_side(tmp_path, engines, capsys):
    markdown, page = write(
        tmp_path, engines, first=["石家庄。", "我是一。", "有雨有风"], second=["不知道", "我|是二。", "雨"]
    )
    for question, one, two in (
        ("河北的省会是哪里？<br><sub>expected: 石家庄</sub>", "石家庄。<br><sub>✓ right; ", "不知道<br><sub>✗ wrong; "),
        (
            "user: 你好<br>assistant: 好<br>你是谁？",
            "我是一。<br><sub>ended by itself</sub>",
            "我\\|是二。<br><sub>ended",
        ),
        ("天气怎么样？<br><sub>expected: 雨、风</sub>", "有雨有风<br><sub>✓ right; ", "雨<br><sub>✗ wrong; "),
    ):
        line = next(line for line in markdown.splitlines() if line.startswith(f"| {question} |"))
        assert f"| {one}" in line and line.index(one) < line.index(two)
    for text in (markdown, page):
        assert "100.0% of 2" in text and "0.0% of 2" in text and "1908.04319" in text
    for name, value in (
        ("temperature", 0.7),
        ("seed", 5),
        ("top\\_k", 0),
        ("questions", "a"),
        ("rope\\_scaling", "none"),
    ):
        assert f"| {name} | {value} |" in markdown
    assert "PyTorch" in markdown and "judge" not in markdown
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "report.md"]
    out = capsys.readouterr().out
    assert "| ends by itself |" in out and out.endswith("report.html written\n")
    asked = "<s>user\n你好</s>\n<s>assistant\n好</s>\n<s>user\n你是谁？</s>\n<s>assistant\n"
    assert engines.seen[1] == engines.seen[4] == (asked, 0.7)
    assert [temperature for _, temperature in engines.seen] == [0, 0.7, 0] * 2, "known answers are asked for greedily"


def test_a_question_that_is_refused_is_marked_and_wrong(tmp_path, engines, capsys):
    markdown, _ = write(tmp_path, engines, first=[..., "好", "风雨"], second=["石家庄", ..., "风雨"])
    assert "<sub>✗ wrong; not answered: longer than the context</sub>" in markdown
    assert "| <sub>not answered: longer than the context</sub> |" in markdown
    assert "50.0% of 2" in markdown and "100.0% of 2" in markdown and markdown.count("2 of 3") == 2
    err = capsys.readouterr().err
    assert "a:1: the prompt is too long; counted as wrong\n" in err
    assert "a:2: the prompt is too long; not answered\n" in err


def test_nothing_is_left_when_a_checkpoint_fails_and_what_was_there_stays(tmp_path, engines):
    with pytest.raises(UserError, match="a:2: the output is not finite"):
        write(tmp_path, engines, first=["一", "二", "三"], second=["一", None, "三"])
    assert list((tmp_path / "out").iterdir()) == []
    before = write(tmp_path, engines, first=["一", "二", "三"])
    with pytest.raises(UserError, match="not finite"):
        write(tmp_path, engines, first=[None, "二", "三"])
    assert [(tmp_path / "out" / name).read_text("utf-8") for name in ("report.md", "report.html")] == before


def test_a_missing_checkpoint_is_found_before_any_answers(tmp_path, engines):
    several = [InferenceSettings(checkpoint=path) for path in (__file__, str(tmp_path / "none.pth"))]
    with pytest.raises(UserError, match="none.pth: no such checkpoint"):
        write_report(report_paths(tmp_path / "a.md"), several, ROWS, HISTORIES, SamplingParameters(), "a")
    assert not engines.seen and not list(tmp_path.iterdir())


def test_the_files_of_a_report(tmp_path):
    both = [tmp_path / "a.b.md", tmp_path / "a.b.html"]
    assert report_paths(tmp_path / "a.b.md") == report_paths(tmp_path / "a.b.html") == both
    for name in ("a", "a.pdf", ""):
        with pytest.raises(UserError, match="ends in .md or .html") as caught:
            report_paths(name)
        assert caught.value.exit_code == 2


def test_the_judge_rates_blindly_and_its_key_stays_out(tmp_path, engines, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    scores = iter(('{"score": 9, "reason": "很<好>"}', "七分", '{"score": 4}', '{"score": 2}', '{"score": 3}'))
    with endpoint(lambda body: next(scores)) as (url, requests):
        markdown, page = write(
            tmp_path, engines, Judge(url, "referee"), first=["石家庄", "我", "风雨"], second=["不", ..., ""]
        )
    assert "6.5 (2 of 3 rated)" in markdown and "2.5 (2 of 2 rated)" in page
    assert "judge: 9 of 10, 很&lt;好&gt;" in markdown and "judge: no valid score, 七分" in page
    assert "referee at http" in markdown
    captured = capsys.readouterr()
    assert "first.pth, a:2, '你是谁？': no score from 1 to 10 in the judge's reply '七分'\n" in captured.err
    assert KEY not in markdown + page + captured.out + captured.err
    material = [json.loads(body["messages"][1]["content"]) for _, _, body in requests]
    questions = [row["q"] for _, row in ROWS]
    assert [(one["问题"], one["回答"]) for one in material] == [
        *zip(questions, ("石家庄", "我", "风雨")), (questions[0], "不"), (questions[2], ""),
    ]  # fmt: skip
    assert material[1]["对话"] == HISTORIES[1] and "对话" not in material[0] and material[2]["参考答案"] == ["雨", "风"]
    sent = str([body for _, _, body in requests])
    assert len(requests) == 5 and "first" not in sent and "second" not in sent and "a model" not in sent


def test_a_judge_that_fails_leaves_no_report(tmp_path, engines):
    for reply, message in (("没有分数", "not one valid score"), ((500, "text/plain", b""), "HTTP status 500")):
        with endpoint(lambda body: reply) as (url, _), pytest.raises(UserError, match=message):  # noqa: B023
            write(tmp_path, engines, Judge(url, "referee"), first=["一", "二", "三"])
        assert list((tmp_path / "out").iterdir()) == []
