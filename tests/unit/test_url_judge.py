"""A judge behind a URL: asked as OpenAI's API is, its marks read, and absent where it cannot be reached."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from elm_jax.errors import UserError
from elm_jax.evaluation.store import REPLY, AnswerFile
from elm_jax.evaluation.url_judge import UrlJudge, ask_judge
from elm_jax.keys import JudgeConfig
from elm_jax.scoring.judging import CRITERIA, marks, question

ITEMS = {
    "DiagnosisAccuracy": [2, 0], "AnalysisCompleteness": [1, 1, 0], "AnalysisRelevance": [2, 1],
    "LeadAssessmentCoverage": [1] * 6, "LeadAssessmentAccuracy": [2] * 6, "GroundedECGUnderstanding": [80],
    "EvidenceBasedReasoning": [50], "RealisticDiagnosticProcess": [100],
}  # fmt: skip
VALUES = {
    "DiagnosisAccuracy": 0.5, "AnalysisCompleteness": 2.0, "AnalysisRelevance": 3.0, "LeadAssessmentCoverage": 0.5,
    "LeadAssessmentAccuracy": 0.5, "GroundedECGUnderstanding": 0.8, "EvidenceBasedReasoning": 0.5,
    "RealisticDiagnosticProcess": 1.0,
}  # fmt: skip
GOOD = json.dumps({name: [{"score": s, "explanation": "x"} for s in scores] for name, scores in ITEMS.items()})
LINES = [
    {"id": f"r{i}", "patient": f"p{i}", "answer": f"<think>t{i}</think><answer>a{i}</answer>", "truth": "sinus rhythm"}
    for i in range(3)
]


class Server:
    """What it was asked, and what it answers: status, headers, body."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.answer: Callable[[str], tuple[int, dict[str, str], bytes]] = lambda text: (200, {}, completion(GOOD))
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append((self.path, dict(self.headers), body))
                status, headers, answer = outer.answer(body["messages"][0]["content"])
                self.send_response(status)
                for name, value in {"Content-Length": str(len(answer)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


def completion(text: str) -> bytes:
    return json.dumps({"choices": [{"message": {"content": text}}]}).encode()


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.http.shutdown()
    found.http.server_close()


def judge(url: str, **how: Any) -> UrlJudge:
    return UrlJudge(JudgeConfig(url=url, model="m", **{"retries": 1, "workers": 1, **how}), wait=0.001)


def test_answers_are_marked_and_replies_kept(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELM_JAX_JUDGE_KEY", "secret")
    found = ask_judge(judge(server.url, workers=2), LINES, file := AnswerFile(tmp_path / "j.jsonl", REPLY))
    assert {name: one["value"] for name, one in found["criteria"].items()} == pytest.approx(VALUES)
    assert found["n"] == found["asked"] == 3 and found["model"] == "m" and "DiagnosisAccuracy" in found["prompt"]
    path, headers, body = server.asked[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret" and body["temperature"] == 0
    assert sorted(body["messages"][0]["content"] for _, _, body in server.asked) == sorted(
        question(f"t{i}\na{i}", "sinus rhythm") for i in range(3)
    )
    assert "secret" not in json.dumps(found) and "secret" not in file.path.read_text()
    again = AnswerFile(tmp_path / "j.jsonl", REPLY)
    assert ask_judge(judge(server.url), LINES, again) == found and len(server.asked) == 3, "asked once"
    other = [{**LINES[0], "answer": "another"}, *LINES[1:]]
    assert ask_judge(judge(server.url, limit=2), other, again)["asked"] == 2 and len(server.asked) == 4


def test_busy_judges_are_asked_again_and_marks_that_cannot_be_read_are_counted(server: Server, tmp_path: Path) -> None:
    said = [completion(text) for text in ("I'd say good.", f"```json\n{GOOD}\n```", GOOD.replace("80", "79"))]
    states = iter([(503, {}, b""), (429, {"Retry-After": "0"}, b""), *((200, {}, one) for one in said)])
    server.answer = lambda text: next(states)
    found = ask_judge(judge(server.url, retries=2), LINES, AnswerFile(tmp_path / "j.jsonl", REPLY))
    assert found["n"] == 1 and found["unreadable"] == ["r0", "r2"] and len(server.asked) == 5


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ((401, {}, b"no key"), "status 401"), ((500, {}, b""), "status 500"), ((200, {}, b"<html>"), "choices"),
        ((200, {"Content-Length": "9"}, b"{"), "a reply that was cut off"),
        ((307, {"Location": "http://localhost:1/v1/chat/completions"}, b""), "a redirect to another host"),
        ((302, {"Location": "file:///etc/passwd"}, b""), ""),
    ],
)  # fmt: skip
def test_a_judge_that_fails_is_absent(server: Server, tmp_path: Path, answer: Any, why: str) -> None:
    server.answer = lambda text: answer
    found = ask_judge(judge(server.url, timeout=2.0), LINES, AnswerFile(tmp_path / "j.jsonl", REPLY))
    assert "criteria" not in found and why in found["absent"] and len(server.asked) <= 2 * len(LINES)


def test_a_redirect_to_another_host_is_refused_once(server: Server) -> None:
    server.answer = lambda text: (307, {"Location": "http://localhost:1/v1/chat/completions"}, b"")
    with pytest.raises(UserError, match=r"a redirect to another host, http://localhost; expected no redirect"):
        judge(server.url, retries=2).reply("hello")
    assert len(server.asked) == 1


def test_a_redirect_on_the_same_host_is_followed_with_what_was_asked(server: Server) -> None:
    moved = 307, {"Location": "/v2"}, b""
    server.answer = lambda text: moved if len(server.asked) == 1 else (200, {}, completion(text))
    assert judge(server.url).reply("hello") == "hello" and server.asked[1][0] == "/v2"


def test_nobody_there_is_absent(server: Server, tmp_path: Path) -> None:
    server.http.server_close()
    found = ask_judge(judge(server.url, timeout=2.0), LINES, AnswerFile(tmp_path / "j.jsonl", REPLY))
    assert "found " in found["absent"] and "expected a chat completion" in found["absent"]
    assert "eval.grounding" in ask_judge(judge(server.url), [], AnswerFile(tmp_path / "j.jsonl", REPLY))["absent"]


@pytest.mark.parametrize("url", ["ftp://a/v1", "http://", "https://me:pass@host/v1", "localhost:80", "http://h/v1?key=k"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="eval.judge.url") as caught:
        judge(url)
    assert "pass" not in caught.value.found
    with pytest.raises(UserError, match="eval.judge.model"):
        UrlJudge(JudgeConfig(url="http://h/v1"))


@pytest.mark.parametrize("reply", ["", "{}", "[]", "{" * 2000, GOOD.replace("80", '"80"'), GOOD.replace("[", "", 1)])
def test_marks_that_are_none(reply: str) -> None:
    with pytest.raises(ValueError):
        marks(reply)
    assert set(marks(GOOD)) == set(CRITERIA)
