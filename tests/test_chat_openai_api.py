"""chat_openai_api.py against a stand-in server: what it sends, prints and remembers, Ctrl-C, and what goes wrong."""

import io
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import threading

import pytest

from conftest import ROOT, assert_one_line_error, run_script, run_without
from fake_endpoint import KEY

SCRIPT = "chat_openai_api.py"


@pytest.fixture
def talk(run_in_process, monkeypatch, fake):
    """Run the script with flags and the lines typed into it at a terminal; returns (exit code, stdout, stderr)."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def call(*words, lines=()):
        terminal = io.TextIOWrapper(io.BytesIO())
        terminal.isatty = lambda: True
        monkeypatch.setattr(sys, "stdin", terminal)
        waiting = iter(lines)
        monkeypatch.setattr("builtins.input", lambda prompt="": print(prompt, end="") or next_line(waiting))
        return run_in_process(SCRIPT, "--base_url", fake.url, *words)

    return call


def next_line(lines):
    """The next of `lines`: text, or a function to call before its text is typed."""
    line = next(lines, None)
    if line is None:
        raise EOFError
    return line() if callable(line) else line


def contents(request):
    return [(message["role"], message["content"]) for message in request["messages"]]


def test_a_conversation_is_streamed_and_remembered(talk, fake):
    code, out, err = talk(lines=("你好", "", "再见", "/clear", "回来", "/exit", "x"))
    assert code == 0 and not err
    assert f"{fake.url}: minimind (--model also knows minimind-lora)" in out.splitlines()[0]
    assert out.count("A: 你好！\n") == 3 and [request["stream"] for request in fake.requests] == [True] * 3
    assert contents(fake.requests[1]) == [("user", "你好"), ("assistant", "你好！"), ("user", "再见")]
    assert contents(fake.requests[2]) == [("user", "回来")]
    asked = fake.requests[0]
    assert asked["model"] == "minimind" and not {"temperature", "top_p", "max_tokens"} & asked.keys()


def test_flags_reach_the_server(talk, fake):
    fake.finish_reason, fake.key = "length", KEY
    flags = ("--temperature", "0", "--top_p", "0.5", "--max_tokens", "3", "--model", "minimind-lora", "--history", "1")
    code, out, err = talk(*flags, "--system", "简短。", "--api_key", KEY, lines=("一", "二", "三"))
    assert code == 0 and out.count("你好！ …(cut at --max_tokens 3)\n") == 3 and KEY not in out, err
    asked = fake.requests[2]
    assert (asked["temperature"], asked["top_p"], asked["max_tokens"], asked["model"]) == (0, 0.5, 3, "minimind-lora")
    assert contents(asked) == [("system", "简短。"), ("user", "二"), ("assistant", "你好！"), ("user", "三")]


def test_the_system_prompt_changes_and_help_is_there(talk, fake):
    code, out, err = talk(lines=("/system 用英文", "一", "/system", "二", "/help"))
    assert code == 0 and out.count("/clear forgets") == 2, err
    assert contents(fake.requests[0])[0] == ("system", "用英文") and contents(fake.requests[1])[0] == ("user", "一")


def test_the_answer_is_printed_while_it_comes(fake):
    """In a process of its own, as a user has it: each piece is there before the next one was sent."""
    gates = [threading.Event(), threading.Event()]
    fake.answer = ["第一", gates[0], "第二", gates[1]]
    command = [sys.executable, SCRIPT, "--base_url", fake.url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as process:
        process.stdin.write("你好\n".encode())
        process.stdin.close()
        seen = b""
        for gate, text in zip(gates, ("第一", "第二")):
            while text.encode() not in seen:
                seen += (piece := os.read(process.stdout.fileno(), 4096))
                assert piece, seen.decode()
            gate.set()
        seen += process.stdout.read()
    assert process.returncode == 0 and "Q: 你好\nA: 第一" in seen.decode()


def test_ctrl_c_stops_the_answer_and_not_the_program(fake):
    """On a terminal: the connection is closed, what came stays in the history, and the next question is answered."""
    fake.answer = lambda body: ["好的"] if len(body["messages"]) > 1 else (str(n) for n in range(10**6))
    fake.pause = 0.01
    terminal, own = pty.openpty()
    command = [sys.executable, SCRIPT, "--base_url", fake.url]
    process = subprocess.Popen(command, stdin=own, stdout=own, stderr=own, cwd=ROOT, start_new_session=True)
    os.close(own)
    seen = reader(terminal)
    try:
        seen("Q: ")
        os.write(terminal, "数数\n".encode())
        seen("345")
        os.killpg(process.pid, signal.SIGINT)
        seen("(stopped)")
        seen("Q: ")
        assert fake.ended.wait(5) and fake.disconnects == 1
        os.write(terminal, "继续\n".encode())
        seen("A: 好的")
        seen("Q: ")
        os.write(terminal, b"\x04")
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    first, second, third = contents(fake.requests[1])
    assert first == ("user", "数数") and third == ("user", "继续")
    assert second[0] == "assistant" and second[1].startswith("012345")


def reader(terminal):
    """seen(text) waits until the terminal shows `text`, behind what the call before waited for."""
    rest = b""

    def seen(text):
        nonlocal rest
        while text.encode() not in rest:
            assert select.select([terminal], [], [], 30)[0], rest.decode(errors="replace")
            rest += os.read(terminal, 1024)
        rest = rest.partition(text.encode())[2]

    return seen


def test_a_server_in_trouble_is_one_line_and_the_conversation_goes_on(talk, fake):
    def refuse(status, message):
        def line():
            fake.refusal = (status, message)
            return f"问{status}"

        return line

    def again(pieces):
        def line():
            fake.refusal, fake.answer = None, pieces
            return "再问"

        return line

    lines = (
        refuse(404, "the model 'minimind' does not exist"),
        refuse(400, "the prompt has 99 tokens\nbut the context only 64"),
        refuse(401, "no"),
        again(["半句", None]),
        again(["半", ("error", "no memory left")]),
        again(["", None]),
        again(["好"]),
    )
    code, out, err = talk("--model", "minimind", lines=lines)
    assert code == 0 and not err
    place = f"(--base_url {fake.url}: "
    for text in (
        "A: " + place + "the model 'minimind' does not exist (HTTP status 404))\n",
        place + "the prompt has 99 tokens but the context only 64 (HTTP status 400))\n",
        place + "wants a key: --api_key or OPENAI_API_KEY (HTTP status 401))\n",
        "A: 半句\n" + place + "the answer broke off; is the server still running?)\n",
        "A: 半\n" + place + "no memory left)\n",
        "A: 好\n",
    ):
        assert text in out, out
    assert contents(fake.requests[-1]) == [
        ("user", "再问"), ("assistant", "半句"), ("user", "再问"), ("assistant", "半"), ("user", "再问")
    ]  # fmt: skip


def test_a_conversation_longer_than_the_context_goes_on(talk, fake):
    """22 characters: the system prompt's 2, a question's 4, and two exchanges of 4 + 4."""
    fake.context, fake.answer = 22, ["好好", "好好"]
    code, out, err = talk("--system", "短。", lines=("一一一一", "二二二二", "三三三三", "四四四四", "五五五五"))
    assert code == 0 and out.count("A: 好好好好\n") == 5
    assert err == 2 * "note: the oldest 2 of 8 messages did not fit the context and were left out\n"
    assert [content for _, content in contents(fake.requests[-1])] == [
        "短。", "三三三三", "好好好好", "四四四四", "好好好好", "五五五五"
    ]  # fmt: skip
    assert len(fake.requests) == 5 + 2, "what was left out once is not sent again"
    code, out, err = talk(lines=("一一一一", "长" * 30, "二二二二"))
    assert code == 0 and "30 characters are too many; ask a shorter question" in out and "/clear" in out.split("A: ")[2]
    assert [content for _, content in contents(fake.requests[-1])] == ["一一一一", "好好好好", "二二二二"]


def test_with_a_pipe_errors_are_on_stderr_and_the_exit_code_tells(fake):
    answers = iter((["半", None], ["好"]))
    fake.answer = lambda body: next(answers)
    process = run_script(SCRIPT, "--base_url", fake.url, input="你好\n再见\n")
    assert_one_line_error(process, "the answer broke off; is the server still running?")
    assert "Q: 你好\nA: 半\n\nQ: 再见\nA: 好\n" in process.stdout and "broke off" not in process.stdout


def test_an_address_without_v1_is_told_at_the_start(talk, fake):
    root = fake.url.removesuffix("v1")
    one_line(talk("--base_url", root), "lists no model (is /v1 missing in the address?); name one with --model")
    code, out, err = talk("--base_url", root, "--model", "m", lines=("你好",))
    assert code == 0 and err == f"warning: --base_url {root}: lists no model (is /v1 missing in the address?)\n"
    assert "no such address (is /v1 missing" in out


def test_a_key_that_the_server_repeats_is_not_printed(talk, fake):
    fake.refusal = (400, f"not with {KEY}")
    code, out, err = talk("--api_key", KEY, lines=("你好",))
    assert code == 0 and "not with … (HTTP status 400)" in out and KEY not in out + err


def test_a_server_that_goes_away_in_the_conversation(talk, fake):
    def line():
        fake.stop()
        return "还在吗？"

    code, out, err = talk(lines=("你好", line, "/help"))
    fake.start()  # for the fixture to stop
    assert code == 0 and "cannot be reached" in out and out.count("/clear forgets") == 2, err


def one_line(result, *parts, code=1):
    assert result[0] == code and result[2].count("\n") == 1 and result[2].startswith("error: "), result
    for part in parts:
        assert part in result[2]


def test_what_is_wrong_at_the_start_ends_with_one_line(talk, fake, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        one_line(talk("--base_url", url), url, "cannot be reached", "is the server running")
    one_line(talk("--base_url", "localhost:8000"), "--base_url", "expected a URL", code=2)
    fake.key = KEY
    result = talk("--api_key", "sk-wrong")
    one_line(result, "wants another key than that of --api_key (HTTP status 401)")
    assert "sk-wrong" not in result[2]
    one_line(talk(), "wants a key: --api_key or OPENAI_API_KEY (HTTP status 401)")
    one_line(talk("--api_key", "密钥"), "--api_key: holds a character", code=2)
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    assert talk(lines=("你好",))[0] == 0, "the key of the environment"
    fake.models = []
    one_line(talk(), "lists no model; name one with --model")
    assert talk("--model", "m", lines=("你好",))[0] == 0 and fake.requests[-1]["model"] == "m"
    assert talk("--top_p", "2")[0] == talk("--temperature", "2.1")[0] == 2


def test_help_needs_no_openai_package():
    run_without({"openai", "torch", "transformers"}, SCRIPT, "--help")


def test_the_client_needs_no_torch(fake):
    """It starts quickly, also where only the openai package is installed."""
    process = run_without({"torch", "transformers"}, SCRIPT, "--base_url", fake.url, input="你好\n")
    assert "A: 你好！" in process.stdout, process.stderr
