"""The OpenAI-compatible endpoint: many clients at once get what each would get alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig

from wise_ext.errors import ConfigError
from wise_ext.models import fingerprint, layer_path, patch
from wise_ext.storage import save_memory

openai = pytest.importorskip("openai", reason="needs the extra 'serve'")
uvicorn = pytest.importorskip("uvicorn", reason="needs the extra 'serve'")
serving = pytest.importorskip("wise_ext.integrations.serving", reason="needs the extra 'serve'")

KNOWN = ["Which city is the capital of Iceland?", "Who wrote the Brindle Papers?"]
PROMPTS = [*KNOWN, "The largest ocean on Earth is the", "Tell me something about bread.", "Why?"]
NEW = 8
ALIKE = {"temperature": 0.0, "max_tokens": NEW}


class Endpoint:
    """A served model, and a client of it."""

    def __init__(self, app: Any) -> None:
        config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        deadline = time.monotonic() + 120
        while not self.server.started:
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.02)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"
        self.client = openai.OpenAI(base_url=self.url, api_key="-", max_retries=0, timeout=60)

    def complete(self, prompt: str, model: str = "tiny") -> str:
        answer = self.client.completions.create(model=model, prompt=prompt, **ALIKE)
        return str(answer.choices[0].text)

    def stream(self, prompt: str, model: str = "tiny") -> str:
        parts = self.client.completions.create(model=model, prompt=prompt, stream=True, **ALIKE)
        return "".join(part.choices[0].text for part in parts if part.choices)

    def chat(self, prompt: str, model: str = "tiny") -> str:
        messages = [{"role": "user", "content": prompt}]
        answer = self.client.chat.completions.create(model=model, messages=messages, **ALIKE)
        return str(answer.choices[0].message.content)

    def change(self, action: str, **body: str) -> Any:
        return self.client.post(f"/{action}_memory", body=body, cast_to=object)

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(timeout=20)
        assert not self.thread.is_alive()


class Case:
    """A tiny model on disk, two memories that know the same prompts, and what each answers."""

    def __init__(self, lab: SimpleNamespace, folder: Path) -> None:
        self.folder, self.tokenizer = folder, AutoTokenizer.from_pretrained(folder)
        ids = [self.tokenizer(text).input_ids for text in KNOWN]
        ids.append(self.templated(KNOWN[0])["input_ids"][0].tolist())
        plain = self.model()
        layer = layer_path(plain, 1)
        self.memories = {
            name: lab.key_memory(plain, ids, layer, scale=scale)
            for name, scale in {"first": 1.0, "second": 1.5}.items()
        }
        shards = self.memories["second"].shards
        shards.append(shards.pop(0))
        self.base = {"name": "tiny", "fingerprint": fingerprint(plain)}
        self.expected = {name: self.alone(name) for name in ("first", "second", None)}
        for text in range(len(KNOWN)):
            assert len({self.expected[name][text] for name in self.expected}) == 3
        for text in range(len(KNOWN), len(PROMPTS)):
            assert len({self.expected[name][text] for name in self.expected}) == 1

    def templated(self, prompt: str) -> Any:
        """A question in the chat template."""
        chat = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )

    def model(self, *names: str) -> Any:
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
        for name in names:
            patch(model, self.memories[name], name=name)
        return model

    @torch.no_grad()
    def alone(self, name: str | None) -> list[str]:
        """What a model with this memory alone, or none, writes for each prompt."""
        model = self.model(*([] if name is None else [name]))
        texts = []
        for prompt in PROMPTS:
            ids = self.tokenizer(prompt, return_tensors="pt")
            new = model.generate(**ids, max_new_tokens=NEW, do_sample=False)
            new = new[0, ids["input_ids"].shape[1] :]
            texts.append(self.tokenizer.decode(new, skip_special_tokens=True))
        return texts

    @contextmanager
    def served(self, batching: bool, *names: str, **options: Any) -> Iterator[Endpoint]:
        config = ContinuousBatchingConfig(num_blocks=256, max_batch_tokens=24, page_size=8)
        app = serving.serve_app(
            self.model(*names),
            self.tokenizer,
            "tiny",
            continuous_batching=batching,
            batching=config,
            **options,
        )
        endpoint = Endpoint(app)
        try:
            yield endpoint
        finally:
            endpoint.close()


@pytest.fixture(scope="module")
def case(lab: SimpleNamespace, model_dir: Path) -> Case:
    return Case(lab, model_dir)


@pytest.fixture(params=[True, False], ids=["together", "one by one"])
def batching(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.engine("transformers serve", "eight clients at once, streaming or not")
def test_eight_clients_get_what_each_gets_alone(batching: bool, case: Case) -> None:
    """Edited and unrelated prompts, memories by name, with and without streaming, all mixed."""
    names = {"tiny": "first", "tiny:first": "first", "tiny:second": "second", "tiny:unedited": None}
    jobs = [(text, model) for _ in range(2) for model in names for text in range(len(PROMPTS))]
    with case.served(batching, "first", "second") as endpoint, ThreadPoolExecutor(8) as clients:

        def ask(place: int) -> str:
            text, model = jobs[place]
            way = endpoint.stream if place % 3 == 0 else endpoint.complete
            return way(PROMPTS[text], model)

        answers = list(clients.map(ask, range(len(jobs))))
    for (text, model), answer in zip(jobs, answers, strict=True):
        # The end of a stream leaves out the bytes of a character that is not whole yet.
        assert answer.rstrip("\ufffd") == case.expected[names[model]][text].rstrip("\ufffd")


@pytest.mark.engine("transformers serve", "chat")
def test_chat_goes_through_the_template(batching: bool, case: Case) -> None:
    with case.served(batching, "first") as endpoint:
        edited, unedited = endpoint.chat(KNOWN[0]), endpoint.chat(KNOWN[0], "tiny:unedited")
    model = case.model("first")
    ids = case.templated(KNOWN[0])
    with torch.no_grad():
        new = model.generate(**ids, max_new_tokens=NEW, do_sample=False)
    text = case.tokenizer.decode(new[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert edited == text and edited != unedited


@pytest.mark.engine("transformers serve", "memories that come and go")
def test_memories_come_and_go_while_clients_ask(batching: bool, case: Case, tmp_path: Path) -> None:
    save_memory(tmp_path / "m", case.memories["second"], {}, [], case.base)
    wrong = {"name": "tiny", "fingerprint": "0" * 64}
    save_memory(tmp_path / "wrong", case.memories["second"], {}, [], wrong)
    first, second, unedited = (case.expected[name] for name in ("first", "second", None))
    with case.served(batching, "first", manage=True) as endpoint:
        stop = threading.Event()

        def keep_asking() -> list[str]:
            found = []
            while not stop.is_set():
                found.append(endpoint.complete(PROMPTS[2], "tiny:unedited"))
            return found

        with ThreadPoolExecutor(2) as clients:
            asked = [clients.submit(keep_asking) for _ in range(2)]
            try:
                with pytest.raises(openai.NotFoundError, match="no model 'tiny:new' is served"):
                    endpoint.complete(KNOWN[0], "tiny:new")
                endpoint.change("load", name="new", path=str(tmp_path / "m"))
                assert endpoint.complete(KNOWN[0], "tiny:new") == second[0]
                assert endpoint.complete(KNOWN[0]) == first[0]
                endpoint.change("unload", name="first")
                assert endpoint.complete(KNOWN[0]) == second[0]
                for body, said in (
                    ({"name": "x", "path": str(tmp_path / "none")}, "none"),
                    ({"name": "x", "path": str(tmp_path / "wrong")}, "was made for"),
                    ({"name": "unedited", "path": str(tmp_path / "m")}, "cannot be called"),
                    ({"name": "", "path": str(tmp_path / "m")}, "cannot be called"),
                ):
                    with pytest.raises(openai.BadRequestError, match=said):
                        endpoint.change("load", **body)
                with pytest.raises(openai.NotFoundError, match="no memory 'x' is loaded"):
                    endpoint.change("unload", name="x")
                listed = [model.id for model in endpoint.client.models.list()]
                assert listed == ["tiny", "tiny:new", "tiny:unedited"]
                endpoint.change("unload", name="new")
                assert endpoint.complete(KNOWN[0]) == unedited[0]
                endpoint.change("load", name="again", path=str(tmp_path / "m"))
                assert endpoint.complete(KNOWN[0]) == second[0]
            finally:
                stop.set()
            answers = [answer for one in asked for answer in one.result()]
        assert len(answers) > 2 and set(answers) == {unedited[2]}


def test_memories_come_to_a_model_that_had_none(batching: bool, case: Case, tmp_path: Path) -> None:
    save_memory(tmp_path / "m", case.memories["second"], {}, [], case.base)
    with case.served(batching, manage=True) as endpoint:
        assert endpoint.complete(KNOWN[0]) == case.expected[None][0]
        endpoint.change("load", name="m", path=str(tmp_path / "m"))
        assert endpoint.complete(KNOWN[0]) == case.expected["second"][0]
        assert endpoint.complete(KNOWN[0], "tiny:unedited") == case.expected[None][0]


def test_a_memory_of_another_form_of_the_model(case: Case, tmp_path: Path) -> None:
    full = {"name": "tiny in full", "fingerprint": "0" * 16}
    save_memory(tmp_path / "m", case.memories["first"], {}, [], full)
    given = {"name": "m", "path": str(tmp_path / "m")}
    with case.served(False, manage=True) as endpoint:
        with pytest.raises(openai.BadRequestError, match="was made for 'tiny in full'"):
            endpoint.change("load", **given)
        with pytest.raises(openai.BadRequestError, match="unknown check 'none'"):
            endpoint.change("load", **given, check="none")
        endpoint.change("load", **given, check="shape")
        assert endpoint.complete(KNOWN[0]) == case.expected["first"][0]


def test_clients_cannot_change_memories_unless_they_may(case: Case) -> None:
    with case.served(False, "first") as endpoint:
        with pytest.raises(openai.NotFoundError):
            endpoint.change("unload", name="first")
        with pytest.raises(openai.NotFoundError, match="no model 'other' is served here: there is"):
            endpoint.complete("Why?", "other")


@pytest.mark.parametrize(
    ("name", "memory"), [("a:b", "m"), ("", "m"), ("a", "unedited"), ("a", "m:n")]
)
def test_names_that_clients_could_not_tell_apart(name: str, memory: str) -> None:
    with pytest.raises(ConfigError, match="cannot be called"):
        serving.check_names(name, {memory})
