"""fast_inference.py, run by Streamlit's own test harness, which has no browser; tests/test_browser.py has one."""

import sys

import pytest

pytest.importorskip("streamlit")
from streamlit.testing.v1 import AppTest

from conftest import ROOT, run_script, save_chat, trained_adapter
from fake_endpoint import KEY
from model.inference.labels import LABELS, STARTERS

ZH, EN = LABELS["zh"], LABELS["en"]


@pytest.fixture
def page(monkeypatch):
    """Open the page with its flags, in Chinese."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def open_page(*words):
        monkeypatch.setattr(sys, "argv", ["fast_inference.py", *map(str, words)])
        return checked(AppTest.from_file(str(ROOT / "fast_inference.py"), default_timeout=120).run())

    return open_page


@pytest.fixture
def local(page, out, small_tokenizer_path):
    """Open the page on the models in `out`."""
    flags = ("--tokenizer_path", small_tokenizer_path, "--device", "cpu", "--dtype", "float32")
    return lambda: page("--out_dir", out, *flags)


def checked(app):
    """The page, which has no traceback on it."""
    assert not app.exception, app.exception[0].value
    return app


def ask(app, question):
    return checked(app.chat_input[0].set_value(question).run())


def press(app, key):
    return checked(app.button(key=key).click().run())


def said(app):
    """[(who, text), ...] of the conversation."""
    return [(turn.name, turn.text[0].value) for turn in app.chat_message]


def captions(app):
    return " ".join(caption.value for caption in app.caption)


def test_an_empty_folder_gets_the_command_to_run(page, tmp_path):
    app = page("--out_dir", tmp_path)
    assert app.code[0].value == "make quickstart" and str(tmp_path) in app.markdown[0].value
    assert app.subheader[0].value == ZH["empty_title"] and not app.chat_input
    app = checked(app.segmented_control(key="language").set_value("en").run())
    assert app.subheader[0].value == EN["empty_title"]


def test_a_tiny_model_answers_again_and_is_cleared(local, out, monkeypatch):
    app = local()
    assert app.selectbox(key="model").options == ["single_chat/full_sft_32"]
    app.slider(key="max_new_tokens").set_value(16)
    app = ask(app, "你好")
    (_, question), (_, answer) = said(app)
    assert (
        question == "你好" and answer and " 词元/秒" in captions(app) and "single_chat/full_sft_32 · " in captions(app)
    )
    again = said(press(app, "regenerate"))
    assert [who for who, _ in again] == ["user", "assistant"] and again[0][1] == "你好" and again[1][1] != answer
    assert len(said(ask(app, "再见"))) == 4
    assert not said(press(app, "clear")) and app.button(key=f"starter {STARTERS[0]}")
    assert said(press(app, f"starter {STARTERS[0]}"))[0] == ("user", STARTERS[0])


def test_temperature_zero_and_the_same_question_give_the_same_answer(local, out):
    app = local()
    app.slider(key="temperature").set_value(0.0)
    app.slider(key="max_new_tokens").set_value(16)
    answer = said(ask(app, "你好"))[1]
    assert said(press(app, "regenerate"))[1] == answer


def test_the_language_changes_and_the_conversation_stays(local, out):
    app = local()
    app.slider(key="temperature").set_value(0.25)
    before = said(ask(app, "你好"))
    app = checked(app.segmented_control(key="language").set_value("en").run())
    assert said(app) == before and app.button(key="clear").label == EN["clear"] and " tokens/s" in captions(app)
    assert app.slider(key="temperature").value == 0.25 and app.slider(key="temperature").label == EN["temperature"]


def test_both_languages_say_the_same_things():
    assert ZH.keys() == EN.keys()
    for name in ZH:
        fields = [sorted(part.split("}")[0] for part in str(label[name]).split("{")[1:]) for label in (ZH, EN)]
        assert fields[0] == fields[1], name


def save_adapter(path, base, sha256=None):
    """A LoRA adapter on the checkpoint `base`, as stage 4 writes it."""
    import json

    import torch

    from model.checkpoint import file_sha256, load_model

    model, _ = load_model(base)
    torch.save(trained_adapter(model, ["layers.0.attention.wq", "layers.1.feed_forward.w1"]), path)
    config = json.loads(base.with_suffix(".json").read_text())["config"]
    parent = {"file": str(base), "sha256": sha256 or file_sha256(base)}
    record = {"stage": "lora", "config": config, "lora": {"rank": 4, "alpha": 32, "targets": "x"}, "parent": parent}
    path.with_suffix(".json").write_text(json.dumps(record))


def test_models_and_the_adapters_that_fit(local, out, small_tokenizer):
    base = out / "single_chat/full_sft_32.pth"
    save_chat(out / "quickstart/dpo_32.pth", small_tokenizer, seed=1)
    save_adapter(out / "lora_tone_32.pth", base)
    save_adapter(out / "lora_other_32.pth", base, sha256="0" * 64)
    (out / "lora_broken_32.pth").write_bytes(b"")
    app = local()
    assert app.selectbox(key="model").options == ["single_chat/full_sft_32", "quickstart/dpo_32"]
    app.slider(key="temperature").set_value(0.0)
    app.slider(key="max_new_tokens").set_value(16)
    choice = app.selectbox(key=f"adapter of {base}")
    assert choice.options == [ZH["no_adapter"], "lora_tone_32"]
    plain = said(ask(app, "你好"))[1]
    app = checked(app.selectbox(key=f"adapter of {base}").select(out / "lora_tone_32.pth").run())
    changed = said(press(app, "regenerate"))[1]
    assert changed != plain and "full_sft_32 + lora_tone_32 · " in captions(app)
    app = checked(app.selectbox(key=f"adapter of {base}").select(None).run())
    assert said(press(app, "regenerate"))[1] == plain
    app = checked(app.selectbox(key="model").select(out / "quickstart/dpo_32.pth").run())
    assert len(app.selectbox) == 1, "no adapter fits the other model"
    assert said(press(app, "regenerate"))[1] != plain and "quickstart/dpo_32 · " in captions(app)
    base.write_bytes((out / "quickstart/dpo_32.pth").read_bytes())  # another model under the old description
    app = checked(app.selectbox(key="model").select(base).run())
    app = checked(app.selectbox(key=f"adapter of {base}").select(out / "lora_tone_32.pth").run())
    assert "lora_tone_32.pth: was trained on" in app.error[0].value


def test_a_model_is_loaded_once_and_again_when_its_file_is_new(local, out, small_tokenizer, monkeypatch):
    import model.inference.open as opening

    loads, load = [], opening.load_model
    monkeypatch.setattr(opening, "load_model", lambda *words, **more: loads.append(words) or load(*words, **more))
    for _ in range(2):  # two visitors
        ask(local(), "你好")
    assert len(loads) == 1
    save_chat(out / "single_chat/full_sft_32.pth", small_tokenizer, seed=5)
    ask(local(), "你好")
    assert len(loads) == 2


def test_a_damaged_checkpoint_is_one_message(local, out, small_tokenizer):
    path = save_chat(out / "dpo_32.pth", small_tokenizer)
    path.write_bytes(path.read_bytes()[:500])
    app = local()
    assert len(app.error) == 1 and "dpo_32.pth: not a PyTorch checkpoint" in app.error[0].value
    app = checked(app.selectbox(key="model").select(out / "single_chat/full_sft_32.pth").run())
    assert not app.error and app.chat_input


def test_a_pretrained_model_is_offered_last_and_explained(local, out, small_tokenizer):
    save_chat(out / "pretrain_32.pth", small_tokenizer)
    app = local()
    assert app.selectbox(key="model").options == ["single_chat/full_sft_32", "pretrain_32"] and not app.info
    assert checked(app.selectbox(key="model").select(out / "pretrain_32.pth").run()).info[0].value == ZH["pretrained"]


def test_what_does_not_fit_the_context_is_said(local, out):
    app = local()
    app.slider(key="max_new_tokens").set_value(16)
    for _ in range(4):
        app = ask(app, "一二三四五六七")
    assert "放不下" in captions(app)
    app = ask(app, "字" * 200)
    assert "context only 64" in app.error[0].value and ZH["stats_empty"].format(
        model="single_chat/full_sft_32"
    ) in captions(app)
    assert len(said(ask(app, "好"))) == 12, "the conversation goes on"


def test_a_server_answers(page, fake):
    fake.answer = ["<img src=x onerror=alert(1)>", "**好**"]
    app = page("--api", fake.url)
    assert app.selectbox(key="model").options == fake.models
    app.slider(key="temperature").set_value(0.5)
    app.slider(key="top_p").set_value(0.9)
    app.slider(key="top_k").set_value(7)
    app.slider(key="max_new_tokens").set_value(32)
    app.slider(key="history").set_value(1)
    app.text_area(key="system").set_value("简短。")
    app = checked(app.selectbox(key="model").select("minimind-lora").run())
    for question in ("一", "二", "三"):
        app = ask(app, question)
    assert said(app)[1] == ("assistant", "<img src=x onerror=alert(1)>**好**"), "as text, not as HTML"
    assert " · 4 词元 · " in captions(app), "the server counts them"
    asked = fake.requests[2]
    assert (asked["model"], asked["temperature"], asked["top_p"]) == ("minimind-lora", 0.5, 0.9)
    assert (asked["top_k"], asked["max_tokens"], asked["stream"]) == (7, 32, True)
    assert [message["content"] for message in asked["messages"]] == ["简短。", "二", said(app)[1][1], "三"]


def test_a_server_in_trouble(page, fake, monkeypatch):
    app = page("--api", fake.url)
    fake.answer = ["半", None]
    app = ask(app, "你好")
    assert said(app)[1] == ("assistant", "半") and "broke off" in app.error[0].value
    fake.answer = ["好"]
    app = press(app, "regenerate")
    assert said(app)[1] == ("assistant", "好") and not app.error
    fake.answer = [("error", "![p](http://127.0.0.1:9/p) <b>")]
    assert press(app, "regenerate").error[0].value.endswith(r"!\[p\](http://127.0.0.1:9/p) \<b>")
    fake.stop()
    import streamlit as st

    st.cache_data.clear()  # as after a while
    app = press(app, "regenerate")
    assert "cannot be reached" in app.error[0].value and len(said(app)) == 2 and app.chat_input, "nothing is lost"
    fake.start()
    app = page("--api", fake.url)
    fake.answer = ["好"]
    fake.finish_reason = "length"
    assert ZH["length"] in captions(ask(app, "再"))
    fake.key = KEY
    st.cache_data.clear()
    assert "wants a key: OPENAI_API_KEY (HTTP status 401)" in page("--api", fake.url).error[0].value
    assert "expected a URL" in page("--api", "localhost").error[0].value
    fake.key, fake.models = None, []
    assert page("--api", fake.url).error[0].value == ZH["no_models"]
    assert page("--api", fake.url.removesuffix("/v1")).error[0].value == ZH["no_version"]


def test_the_models_of_a_server_that_was_started_again(page, fake):
    import streamlit as st

    app = page("--api", fake.url)
    app = checked(app.selectbox(key="model").select("minimind-lora").run())
    fake.models = ["other", *fake.models]
    st.cache_data.clear()  # as after a while
    app = checked(app.run())
    assert app.selectbox(key="model").options == fake.models and app.selectbox(key="model").value == "minimind-lora"


def test_a_conversation_with_a_server_that_outgrows_the_context(page, fake):
    """12 characters: a question's 4 and one exchange of 4 + 4."""
    fake.context, fake.answer = 12, ["好好好好"]
    app = page("--api", fake.url)
    for question in ("一一一一", "二二二二", "三三三三"):
        app = ask(app, question)
    assert len(said(app)) == 6 and not app.error
    assert captions(app).count(ZH["dropped"].format(count=2)) == 1
    assert [message["content"] for message in fake.requests[-1]["messages"]] == ["二二二二", "好好好好", "三三三三"]
    app = ask(app, "长" * 13)
    assert f"13 characters are too many; ask a shorter question, or begin anew with {ZH['clear']} / {EN['clear']}" in (
        app.error[0].value
    )
    assert not ask(app, "四四四四").error[1:], "the conversation goes on"


def test_wrong_flags_and_a_start_without_streamlit(page, out):
    assert "Wrong flags" in page("--out_dri", out).error[0].value
    process = run_script("fast_inference.py")
    assert process.returncode == 2 and "streamlit run " in process.stderr.splitlines()[-1]
    assert "--api URL" in run_script("fast_inference.py", "--help").stdout
