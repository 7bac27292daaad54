#!/bin/bash
# lm-eval's API clients do not send a task's stop strings as they are: at most four to a chat, and with or without the
# end-of-text string depending on the number of concurrent requests.
#
# Version:      lm_eval 0.4.13 with aiohttp 3.14.5, CPython 3.11, x86-64.
# Likely guess: the `until` of a task arrives at the server as its `stop`, and num_concurrent changes only the speed.
# Behaviour:    local-chat-completions sends the first four strings and drops the others without a word: OpenAI's own
#               limit, also to servers that take more. local-completions adds the end-of-text string (`eos_string`, or
#               the tokenizer's) with num_concurrent=1 and does not with 2 or more, where another code path makes the body.
# Matters:      humaneval's list has five strings, of which "\nprint" is never a stop for a chat: answers go on where those
#               of other model types of lm-eval end. A model that writes the end of text as plain text is cut there in
#               sequential runs only, so the same command scores other texts when it is made faster.
# Seen:         local-completions, num_concurrent 1: the five and </s>; 2: the five
#               local-chat-completions, 1 and 2: the first four
#
# Exits with 1 if this changes.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --disable-pip-version-check "lm_eval==0.4.13" "aiohttp==3.14.5" requests tenacity tqdm
cd "$scratch"
"$scratch/venv/bin/python" - <<'PYTHON'
import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from lm_eval.api.instance import Instance
from lm_eval.models.api_models import JsonChatStr
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

logging.getLogger("lm_eval").setLevel(logging.ERROR)
seen = []


class Server(BaseHTTPRequestHandler):
    def do_POST(self):
        seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["stop"])
        body = json.dumps({"choices": [{"index": 0, "text": "x", "message": {"content": "x"}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
until = ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]  # of lm_eval/tasks/humaneval/humaneval.yaml
chat = JsonChatStr(json.dumps([{"role": "user", "content": "hi"}]))
for name, kind, context in (("completions", LocalCompletionsAPI, "hi"), ("chat", LocalChatCompletion, chat)):
    for concurrent in (1, 2):
        model = kind(
            model="m", base_url=f"http://127.0.0.1:{server.server_port}/v1", num_concurrent=concurrent,
            tokenizer_backend="none" if kind is LocalCompletionsAPI else None, eos_string="</s>",
        )
        model.generate_until([Instance("generate_until", {}, (context, {"until": list(until)}), 0)], disable_tqdm=True)
        print(f"{name}, num_concurrent {concurrent}: {seen[-1]}")
holds = seen == [[*until, "</s>"], until, until[:4], until[:4]]
raise SystemExit(0 if holds else 1)
PYTHON
