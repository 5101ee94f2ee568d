"""A chat page in the browser, for the models in out/ or for an OpenAI-compatible server.

    streamlit run fast_inference.py                                    # the models in out/, on this machine
    streamlit run fast_inference.py -- --out_dir out/quickstart
    streamlit run fast_inference.py -- --api http://127.0.0.1:8000/v1  # those of a server; its key: OPENAI_API_KEY

A model is loaded once, however many look at the page; who asks while another is being answered joins the same batch.
Streamlit runs this file from top to bottom whenever somebody touches a widget, so what is to last lies in
st.session_state (one visitor's) or st.cache_resource (everybody's).
"""

import dataclasses
import re
from functools import partial
from pathlib import Path

import streamlit as st

from model.cli import add_flags, from_flags, script_parser
from model.errors import UserError, describe, run_main
from model.inference.labels import LABELS, LANGUAGES, STARTERS
from model.settings import InferenceSettings, SamplingParameters

MACHINE = ("out_dir", "tokenizer_path", "device", "dtype", "compile")
LOOK = 0.05  # seconds between two looks at an answer that is being written
STYLE = """<style>
.stMainBlockContainer { padding: 1.5rem 1rem 7rem; max-width: 46rem; }
[data-testid="stBottomBlockContainer"] { padding: 0.5rem 1rem 1.25rem; max-width: 46rem; }
[data-testid="stText"] { font-family: inherit; line-height: 1.7; white-space: pre-wrap; overflow-wrap: anywhere; }
</style>"""


def parse_arguments():
    parser = script_parser(__doc__)
    parser.add_argument("--api", metavar="URL", help="an OpenAI-compatible server instead of the models in --out_dir")
    others = [field.name for field in dataclasses.fields(InferenceSettings) if field.name not in MACHINE]
    add_flags(parser, InferenceSettings, "checkpoints and machine", leave_out=others)
    return parser.parse_args()


def main():
    try:
        args = parse_arguments()
    except SystemExit:
        if st.runtime.exists():  # it would end the thread that draws the page, not the server
            st.error("Wrong flags: see the terminal, or python fast_inference.py --help")
            st.stop()
        raise
    if not st.runtime.exists():
        raise UserError(f"this is a page for the browser: streamlit run {Path(__file__).name}", exit_code=2)
    st.set_page_config(page_title="MiniMind", page_icon="💬", layout="centered")
    st.html(STYLE)
    label = header(args)
    try:
        name, ask = choose_of_server(args.api, label) if args.api else choose_checkpoint(args, label)
        conversation(name, ask, label)
    except Exception as error:
        line, _ = describe(error)
        if line is None:
            raise
        st.error(plain(line))
        st.button(label["retry"])


def header(args):
    """Title and switch of language; returns the labels in the one chosen."""
    with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
        st.title("MiniMind", anchor=False)
        choice = {"options": list(LANGUAGES), "format_func": LANGUAGES.get, "label_visibility": "collapsed"}
        language = st.segmented_control("语言 / Language", default="zh", key="language", **choice)
    label = LABELS[language or "zh"]
    st.caption(label["intro_api"].format(url=plain(args.api)) if args.api else label["intro"])
    return label


def choose_checkpoint(args, label):
    """A checkpoint in --out_dir and an adapter on it, loaded: (name, ask), ask(messages, parameters) gives Pieces."""
    from model.inference.open import all_checkpoints, fitting_adapters

    checkpoints = all_checkpoints(args.out_dir)
    if not checkpoints:
        empty_page(args.out_dir, label)
    path = st.selectbox(label["model"], checkpoints, format_func=partial(short_name, args.out_dir), key="model")
    adapters = [None, *fitting_adapters(args.out_dir, path)]
    adapter = None
    if len(adapters) > 1:
        title = partial(short_name, args.out_dir, none=label["no_adapter"])
        adapter = st.selectbox(label["adapter"], adapters, format_func=title, key=f"adapter of {path}")
    if path.name.startswith("pretrain_"):
        st.info(label["pretrained"])
    with st.spinner(label["loading"]):
        settings = dataclasses.replace(from_flags(InferenceSettings, args), checkpoint=str(path))
        engine = load_engine(settings, path.stat().st_mtime_ns)
        name = engine.add_adapter(adapter) if adapter else None
    shown = short_name(args.out_dir, path) + (f" + {short_name(args.out_dir, adapter)}" if adapter else "")
    return shown, partial(engine.stream, adapter=name)


@st.cache_resource(max_entries=3, show_spinner=False)
def load_engine(settings, changed):
    """The SharedEngine of a checkpoint. changed: when its file was; one that was trained again is loaded again."""
    from model.inference.open import open_engine
    from model.inference.shared import SharedEngine
    from model.stages import STAGES

    engine, _ = open_engine(settings, tuple(STAGES), prefix_rows=8)
    return SharedEngine(engine, settings.checkpoint)


def short_name(out_dir, path, none=""):
    """What the page calls the file `path`."""
    return str(path.relative_to(out_dir).with_suffix("")) if path else none


def choose_of_server(url, label):
    """The same as choose_checkpoint for a model of the server at `url`."""
    endpoint = open_endpoint(url)
    try:
        models = list_models(url)
    except UserError:  # while the server is away the conversation stays on the page
        models = st.session_state.get("models")
        if not models:
            raise
    if not models:
        raise UserError(label["no_version" if endpoint.hint else "no_models"])
    st.session_state["models"] = models
    model = st.selectbox(label["model"], models, key="model")

    def ask(messages, parameters):
        sampling = parameters.temperature, parameters.top_p, parameters.max_new_tokens, parameters.top_k
        return endpoint.stream(model, messages, *sampling)

    return model, ask


@st.cache_resource(show_spinner=False)
def open_endpoint(url):
    from model.inference.endpoint import Endpoint

    buttons = " / ".join(label["clear"] for label in LABELS.values())
    way_out = f"ask a shorter question, or begin anew with {buttons} and a shorter system prompt"
    return Endpoint(url, flag="--api", key_flag=None, way_out=way_out)


@st.cache_data(ttl=20, show_spinner=False)
def list_models(url):
    return open_endpoint(url).models()


def empty_page(out_dir, label):
    """What to do where there is no model yet; ends the page."""
    st.subheader(label["empty_title"], anchor=False)
    st.markdown(label["empty"].format(folder=out_dir))
    st.code("make quickstart", language="bash")
    st.markdown(label["empty_after"])
    st.code("streamlit run fast_inference.py -- --out_dir FOLDER", language="bash")
    st.button(label["retry"])
    st.stop()


def sampling_widgets(label):
    """(SamplingParameters, system prompt, number of past exchanges) as the settings say."""

    def slider(name, *limits, **options):
        return st.slider(label[name], *limits, key=name, help=label.get(f"{name}_help"), **options)

    with st.popover(label["settings"], icon=":material/tune:"):
        system = st.text_area(label["system"], key="system", help=label["system_help"], height=80)
        parameters = SamplingParameters(
            temperature=slider("temperature", 0.0, 2.0, 0.7, 0.05),
            top_p=slider("top_p", 0.05, 1.0, 1.0, 0.05),
            top_k=slider("top_k", 0, 100, 8),
            max_new_tokens=slider("max_new_tokens", 16, 2048, 256, 16),
        )
        history = slider("history", 0, 20, 5)
    return parameters, system, history


def conversation(name, ask, label):
    """The settings, the exchanges so far, the answer that is being written, and what may be asked next."""
    from model.inference.shared import Answer, as_messages

    turns = st.session_state.setdefault("turns", [])  # (question, Answer, name of the model)
    parameters, system, history = sampling_widgets(label)
    question = st.chat_input(label["ask"])
    if not turns and not question:
        question = starters(label)
    if "again" in st.session_state:
        question = st.session_state.pop("again")
    if question:
        if turns:
            turns[-1][1].stop()  # whoever asks on does not wait for the rest
        messages = as_messages([turn[:2] for turn in turns], system, history)
        turns.append((question, Answer(ask([*messages, {"role": "user", "content": question}], parameters)), name))
    for turn in turns[:-1]:
        show_turn(*turn, label)
    if turns:
        show_turn(*turns[-1], label, last=True)


def starters(label):
    """Questions to begin with, as buttons; returns the one that was pressed."""
    with st.empty().container():
        st.caption(label["try"])
        with st.container(horizontal=True):
            pressed = [text for text in STARTERS if st.button(text, key=f"starter {text}")]
    if pressed:
        st.session_state["again"] = pressed[0]
        st.rerun()  # so that the buttons are gone while it is answered


def show_turn(question, answer, name, label, last=False):
    """One exchange; the last one until it is done, with its buttons. Text is shown as text: a model's answer is never
    HTML, nor Markdown, whose pictures would be fetched from wherever it says."""
    with st.chat_message("user"):
        st.text(question)
    with st.chat_message("assistant"):
        place = st.empty()
        if not answer.done:
            st.button(label["stop"], icon=":material/stop_circle:", key="stop", on_click=answer.stop)
            while not answer.wait(LOOK):
                place.text(answer.text + " ▌")
            st.rerun()
        place.text(answer.text)
        footer(answer, name, label)
        buttons = st.empty()  # also where none are: else those of before would stand there until the page is complete
        if last:
            with buttons.container(horizontal=True):
                st.button(label["regenerate"], icon=":material/refresh:", key="regenerate", on_click=ask_again)
                st.button(label["clear"], icon=":material/delete:", key="clear", on_click=clear)


def footer(answer, name, label):
    """Speed of an answer, how it ended, and what went wrong."""
    figures = dict(tokens=answer.tokens, rate=answer.tokens_per_second, first=answer.first_seconds or 0)
    notes = [label["stats" if answer.text else "stats_empty"].format(model=plain(name), **figures)]
    notes += [label[answer.finish_reason]] if answer.finish_reason in ("stopped", "length") else []
    st.caption(" · ".join(notes))
    if answer.dropped:
        st.caption(label["dropped"].format(count=answer.dropped))
    if answer.error:
        st.error(plain(answer.error))


def plain(text):
    """`text`, which a server or a file's name may have chosen, so that Streamlit's Markdown shows it as it is."""
    return re.sub(r"([\\`*\[\]$<~])", r"\\\1", text)


def ask_again():
    """Callback: the last question once more."""
    st.session_state["again"], *_ = st.session_state["turns"].pop()


def clear():
    """Callback: forget the conversation."""
    st.session_state["turns"].clear()


if __name__ == "__main__":
    if st.runtime.exists():
        main()
    else:
        run_main(main)
