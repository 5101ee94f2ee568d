"""fast_inference.py in a real browser, on a desktop and on a phone: Chinese is typed, answers come while they are written and
are stopped, models are switched. Skipped where there is no Chromium: apt-get install chromium fonts-wqy-microhei, or
python -m playwright install chromium. `make screenshots` takes the pictures in images/."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from conftest import ROOT, save_chat
from model.inference.labels import LABELS, STARTERS

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

ZH, EN = LABELS["zh"], LABELS["en"]
WAIT = 90_000  # milliseconds: a busy machine takes its time
SIZES = {"desktop": dict(width=900, height=760), "phone": dict(width=390, height=844)}
QUICKSTART = ROOT / "out/quickstart"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        own = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        path = own or driver.chromium.executable_path
        if not Path(path).exists():
            pytest.skip("no browser: apt-get install chromium, or python -m playwright install chromium")
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])  # root needs it
        yield browser
        browser.close()


@contextlib.contextmanager
def served(*flags):
    """The page with its flags, served by Streamlit; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", "fast_inference.py", "--server.port", port, "--", *flags]
    process = subprocess.Popen([str(word) for word in command], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health")
                break
            assert process.poll() is None
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(WAIT / 1000)


@pytest.fixture
def visit(browser):
    """Open the page at an address, ready to be typed into; none of its scripts may fail until the test ends."""
    pages, errors = [], []

    def visit(address, size="desktop"):
        pages.append(page := browser.new_page(viewport=SIZES[size], device_scale_factor=2))
        page.on("pageerror", lambda error: errors.append(error))
        page.set_default_timeout(WAIT)
        page.goto(address)
        page.get_by_test_id("stChatInput").wait_for()
        return page

    yield visit
    for page in pages:
        page.close()
    assert not errors


def ask(page, question):
    box = page.get_by_test_id("stChatInput").locator("textarea")
    box.fill(question)
    box.press("Enter")


def come_to_rest(page):
    """Wait until the page stands still: what is drawn anew meanwhile closes a list that is open."""
    page.locator("[data-test-script-state=notRunning]").wait_for()


def finished(page, count):
    """Wait until `count` answers are complete and the page stands still."""
    page.get_by_text(" 词元/秒 · ").nth(count - 1).wait_for()
    page.get_by_role("button", name=ZH["regenerate"]).wait_for()
    come_to_rest(page)


def gone(part):
    """Wait until the page, which is drawn anew bit by bit, shows nothing of a part any more."""
    playwright.expect(part).to_have_count(0, timeout=WAIT)


def answer(page):
    """The last answer's place."""
    return page.get_by_test_id("stChatMessage").last


def choose(page, label, option):
    """Choose from a list as one does by hand: opened again where the page, drawn anew in that moment, has closed it."""
    box = page.get_by_test_id("stSelectbox").filter(has_text=label)
    for _ in range(10):
        come_to_rest(page)
        page.keyboard.press("Escape")
        box.locator("input").click()
        try:
            page.get_by_role("option", name=option, exact=True).click(timeout=WAIT / 10)
        except playwright.TimeoutError:
            continue
        return
    raise AssertionError(f"{label}: no option {option}")


# By how many pixels the tallest of what scrolls is too high for the window.
OVERFLOW = """() => Math.max(0, ...[...document.querySelectorAll("*")]
  .filter(part => ["auto", "scroll"].includes(getComputedStyle(part).overflowY))
  .map(part => part.scrollHeight - part.clientHeight))"""
# Without a font for them all characters are the same box.
DRAWS_CHINESE = """() => {
  const [one, other] = ["广", "州"].map(text => {
    const canvas = document.createElement("canvas");
    canvas.getContext("2d").fillText(text, 20, 20);
    return canvas.toDataURL();
  });
  return one !== other;
}"""


def take_picture(page, path):
    """A picture of the page in a window so high that nothing is cut off."""
    while missing := page.evaluate(OVERFLOW):
        page.set_viewport_size({**page.viewport_size, "height": page.viewport_size["height"] + missing})
        assert page.viewport_size["height"] < 2000
    page.screenshot(path=path, animations="disabled")


def fits_the_width(page):
    """Whether nothing sticks out at the side."""
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_a_model_answers_on_desktop_and_phone(visit, tmp_path, small_tokenizer, small_tokenizer_path):
    out = tmp_path / "out"
    save_chat(out / "single_chat/full_sft_32.pth", small_tokenizer)
    save_chat(out / "quickstart/dpo_32.pth", small_tokenizer, seed=1)
    flags = ("--out_dir", out, "--tokenizer_path", small_tokenizer_path, "--device", "cpu", "--dtype", "float32")
    with served(*flags) as address:
        for size in SIZES:
            page = visit(address, size)
            page.screenshot(path=tmp_path / f"{size}_start.png")
            ask(page, "广州有什么好吃的？")
            finished(page, 1)
            assert "广州有什么好吃的？" in page.get_by_test_id("stChatMessage").first.inner_text()
            assert "single_chat/full_sft_32 · " in answer(page).inner_text() and fits_the_width(page)
            page.screenshot(path=tmp_path / f"{size}_answer.png")
            choose(page, ZH["model"], "quickstart/dpo_32")
            ask(page, "那成都呢？")
            page.get_by_text("quickstart/dpo_32 · ").wait_for()
            finished(page, 2)
            page.get_by_role("button", name=ZH["settings"]).click()
            page.get_by_text(ZH["temperature"], exact=True).wait_for()
            assert fits_the_width(page)
            page.screenshot(path=tmp_path / f"{size}_settings.png")
            page.keyboard.press("Escape")
            page.get_by_role("radio", name="English").or_(page.get_by_role("button", name="English")).first.click()
            page.get_by_role("button", name=EN["clear"]).click()
            page.get_by_role("button", name=STARTERS[0]).wait_for()
            gone(page.get_by_test_id("stChatMessage"))
    assert len(list(tmp_path.glob("*.png"))) == 6


def test_answers_are_streamed_stopped_and_never_html(visit, fake, tmp_path):
    """Two visitors at once: one stops in the middle and asks on, the other's answer is not touched."""
    gates = {question: threading.Event() for question in ("甲", "乙")}
    html = '<img src="x" onerror="document.title=\'broken into\'"><b>粗</b> ![p](http://127.0.0.1:9/p.png)'

    def pieces(body):
        question = body["messages"][-1]["content"]
        if question == "长":
            return (f"{number}，" for number in range(10**6))
        return ["开头", gates[question], "结尾"] if question in gates else [html]

    fake.answer, fake.pause = pieces, 0.02
    with served("--api", fake.url) as address:
        first, second = visit(address), visit(address, "phone")
        ask(first, "长")
        ask(second, "乙")
        first.get_by_text("5，6，7，").wait_for()
        second.get_by_text("开头").wait_for()
        first.screenshot(path=tmp_path / "streaming.png")
        first.get_by_role("button", name=ZH["stop"]).click()
        first.get_by_text(ZH["stopped"]).wait_for()
        assert fake.ended.wait(20) and fake.disconnects == 1, "the server has been told"
        written = answer(first).inner_text()
        assert "5，6，7，" in written
        gone(first.get_by_text("▌"))
        first.get_by_role("button", name=ZH["regenerate"]).wait_for()

        ask(first, "长")
        first.get_by_text("5，6，7，").nth(1).wait_for()
        gone(first.get_by_role("button", name=ZH["regenerate"]))  # while the next answer comes
        ask(first, "甲")  # whoever asks on stops the answer; while it comes, a slider moves: the answer goes on
        first.get_by_text("开头").wait_for()
        first.get_by_role("button", name=ZH["settings"]).click()
        first.get_by_role("slider").first.press("ArrowRight")
        assert fake.disconnects == 2
        first.keyboard.press("Escape")
        gates["甲"].set()
        first.get_by_text("开头结尾").wait_for()
        assert [message["content"] for message in fake.requests[-1]["messages"]][0] == "长"

        ask(first, "网页")
        first.get_by_text("<b>粗</b>").wait_for()
        assert first.title() == "MiniMind" and not answer(first).locator("img, b").count()
        choose(first, ZH["model"], "minimind-lora")
        ask(first, "网页")
        first.get_by_text("minimind-lora · ").wait_for()
        assert fake.requests[-1]["model"] == "minimind-lora"

        gates["乙"].set()
        second.get_by_text("开头结尾").wait_for()
        second.screenshot(path=tmp_path / "phone.png")


def test_screenshots_of_the_quickstart_model(visit, tmp_path):
    """Answers as the model gives them, right or wrong. SCREENSHOTS in the environment: the folder for the pictures."""
    if not (QUICKSTART / "dpo_192.pth").exists() or (QUICKSTART / "quickstart.json").exists():
        pytest.skip(f"{QUICKSTART.relative_to(ROOT)} holds no finished model: make quickstart")
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    with served("--out_dir", QUICKSTART) as address:
        for size in SIZES:
            page = visit(address, size)
            if not page.evaluate(DRAWS_CHINESE):
                pytest.skip("no Chinese font: apt-get install fonts-wqy-microhei")
            for count, question in enumerate(("我叫王芳。", "世界上最高的山峰是什么？", "你还记得我叫什么吗？"), 1):
                ask(page, question)
                finished(page, count)
            take_picture(page, folder / f"chat_{size}.png")
        page = visit(address)
        choose(page, ZH["model"], "multi_chat/full_sft_192")
        choose(page, ZH["adapter"], "lora_identity_192")
        ask(page, "你是谁？")
        finished(page, 1)
        assert "multi_chat/full_sft_192 + lora_identity_192 · " in answer(page).inner_text()
        page.get_by_role("button", name=ZH["settings"]).click()
        page.get_by_text(ZH["history"], exact=True).wait_for()
        take_picture(page, folder / "chat_settings.png")
    assert all(path.stat().st_size < 300_000 for path in folder.glob("chat_*.png"))
