"""The demo as people start it: as a process, with a real server and real seconds."""

import fcntl
import json
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
import time

import pytest

SHORT = ("--seconds", "3")


@pytest.fixture
def demo():
    started = []

    def start(*words, folder=None, **options):
        command = [sys.executable, "-m", "resilient", "demo", *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=folder, **{**pipes, **options}))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        with process:  # closes its pipes
            pass


def ended(process, patience=30):
    out, err = process.communicate(timeout=patience)
    return process.returncode, out, err


def port_of(introduction):
    return int(re.search(r"http://127\.0\.0\.1:(\d+): ", introduction)[1])


def hear_ctrl_c():
    """Undo what a shell does to jobs in the background, such as this suite on a build server: ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_json_is_one_document_and_the_exit_code_agrees(demo, tmp_path):
    code, out, err = ended(demo("--json", *SHORT, folder=tmp_path))
    data = json.loads(out)
    assert (code, err == "") == ((0, True) if data["better"] else (1, False))
    bare, guarded = data["bare"], data["guarded"]
    assert bare["total"]["hits"] == bare["total"]["calls"] == guarded["total"]["calls"] > 100
    assert bare["total"]["success_rate"] < guarded["total"]["success_rate"]
    assert bare["phases"]["outage"]["hits"] > guarded["phases"]["outage"]["hits"]
    assert bare["errors"]["ReadTimeout"] > 0  # it really hung
    assert data["events"]["circuit breaker"]["circuit.rejected"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_terminal_gets_a_live_table_and_the_summary(demo):
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    process = demo(*SHORT, stdout=terminal, stderr=terminal, env={**environment, "TERM": "xterm-256color"})
    os.close(terminal)
    seen = bytearray()
    try:
        while chunk := os.read(screen, 65536):
            seen += chunk
    except OSError:  # how Linux says that nobody has the other end any more
        pass
    os.close(screen)
    code, text = process.wait(10), seen.decode()
    assert code in (0, 1)
    assert "\x1b[?25l" in text  # the cursor is hidden ...
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # ... and comes back
    assert text.count("In the last second") >= 5
    assert "What each policy did" in text[text.rindex("\x1b[?25h") :]


def test_ctrl_c_ends_it_without_a_traceback_and_without_the_server(demo):
    process = demo(start_new_session=True, preexec_fn=hear_ctrl_c)
    port = port_of(process.stdout.readline())
    assert " | guarded " in process.stdout.readline()
    assert listens(port)
    os.killpg(process.pid, signal.SIGINT)  # a terminal tells the whole group
    code, _, err = ended(process, 10)
    assert (code, err) == (130, "demo: interrupted\n")
    assert not listens(port)


def test_the_server_ends_even_if_the_demo_is_killed(demo):
    process = demo()
    port = port_of(process.stdout.readline())
    assert listens(port)
    process.kill()
    ended(process, 10)
    limit = time.monotonic() + 10
    while listens(port) and time.monotonic() < limit:
        time.sleep(0.02)
    assert not listens(port)


def test_it_ends_quietly_when_nobody_reads_on(demo):
    process = demo()
    port = port_of(process.stdout.readline())
    process.stdout.close()
    assert process.wait(10) == 141
    assert process.stderr.read() == ""
    assert not listens(port)


def test_a_used_port_is_one_clear_line(demo):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, out, err = ended(demo("--port", str(port)))
    assert (code, out) == (2, "")
    assert err == f"demo: cannot listen on port {port} (Address already in use); leave --port out for a free one\n"


@pytest.mark.parametrize("missing", [("rich",), ("httpx", "starlette", "uvicorn")])
def test_a_missing_extra_is_one_clear_line(demo, missing, tmp_path):
    for name in missing:
        (tmp_path / f"{name}.py").write_text("raise ImportError\n")
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    code, out, err = ended(demo(env={**os.environ, "PYTHONPATH": path}))
    assert (code, out) == (2, "")
    assert err == f'demo: {", ".join(missing)} missing; pip install "resilient-toolkit[demo]"\n'
