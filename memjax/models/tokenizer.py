"""Text to ids and back, and conversations to prompts: `tokenizers` plus a sandboxed chat template.

Templates are rendered with the settings of `transformers` (utils/chat_template_utils.py) so that a prompt here is the
prompt the base was trained on; `transformers` itself is imported only for folders without a tokenizer.json.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from memjax.errors import InputError, WeightsError
from memjax.ids import bytes_hash, text_hash

Message = Mapping[str, Any]  # {"role": "system" | "user" | "assistant", "content": text}

# For bases without a template: each message on lines of its own, the answer is what follows.
PLAIN_TEMPLATE = "{{ start }}{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}"

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_PROBE = "memjaxprobe"
_INCOMPLETE = "\ufffd"  # what a cut UTF-8 sequence decodes to


class Tokenizer:
    """The tokenizer of one base. Immutable. Special tokens are only those written in a text or by the template."""

    def __init__(
        self,
        definition: bytes,
        *,
        template: str | None = None,
        special: Mapping[str, str] | None = None,
        eos_ids: Iterable[int] = (),
        prompt_style: str = "chat",
    ) -> None:
        """definition: the bytes of a tokenizer.json; special: {"bos_token": "<s>", ...}; eos_ids: of configs;
        prompt_style: the form of prompts that the base was trained for (`"memjax_prompt"` in tokenizer_config.json).
        """
        try:
            self._backend = tokenizers.Tokenizer.from_buffer(definition)
        except Exception as error:  # the library raises bare Exception
            raise WeightsError(f"tokenizer.json cannot be read ({error}); fetch the base again") from None
        self._backend.no_truncation()
        self._backend.no_padding()
        self._special = dict(special or {})
        self.template = template
        self.prompt_style = prompt_style
        self.id = bytes_hash(definition)
        self.template_id = text_hash(template) if template else ""
        self.vocab_size = self._backend.get_vocab_size()
        self.bos_id = self.token_id(self._special.get("bos_token"))
        own = (self.token_id(self._special.get("eos_token")), self._turn_end())
        self.eos_ids = tuple(dict.fromkeys([*eos_ids, *(index for index in own if index is not None)]))

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer of a Hugging Face folder.

        Reads tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja and the eos ids of
        generation_config.json and config.json. WeightsError where there is no tokenizer or it cannot be read.
        """
        folder = Path(folder)
        config = _read_json(folder / "tokenizer_config.json")
        # An older folder keeps its special tokens in a file of their own; tokenizer_config.json wins.
        named = _read_json(folder / "special_tokens_map.json") | config
        special = {name: text for name in _SPECIAL_NAMES if (text := _content(named.get(name))) is not None}
        eos_ids: list[int] = []
        for name in ("generation_config.json", "config.json"):
            found = _read_json(folder / name).get("eos_token_id")
            eos_ids += found if isinstance(found, list) else [] if found is None else [found]
        path = folder / "tokenizer.json"
        definition = path.read_bytes() if path.is_file() else _converted(folder)
        style = config.get("memjax_prompt", "chat")
        return cls(definition, template=_template(folder, config), special=special, eos_ids=eos_ids, prompt_style=style)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; nothing is added."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], keep_special: bool = False) -> str:
        """The text of `ids`, without special tokens unless they are kept."""
        return self._backend.decode(list(ids), skip_special_tokens=not keep_special)

    def token_id(self, token: str | None) -> int | None:
        """The id of one token by its exact text, or None."""
        return None if token is None else self._backend.token_to_id(token)

    @functools.cached_property
    def prefix_ids(self) -> tuple[int, ...]:
        """What the base expects before a plain text: its bos id, or nothing. Chat templates write it themselves."""
        first = self._backend.encode("", add_special_tokens=True).ids[:1]
        return tuple(first) if first and first[0] == self.bos_id else ()

    def apply_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any) -> str:
        """The conversation as the text of a prompt, by the base's template or `PLAIN_TEMPLATE`.

        variables are passed to the template (for example enable_thinking=False). InputError with the template's own
        words where it refuses the conversation.
        """
        import jinja2

        start = self._special.get("bos_token", "") if self.prefix_ids else ""
        names = {"start": start, "tools": None, "documents": None, **self._special, **variables}
        try:
            return self._compiled.render(
                messages=[dict(message) for message in messages], add_generation_prompt=add_generation_prompt, **names
            )
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            raise InputError(f"the base's chat template refuses this conversation: {error}") from None

    def encode_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any) -> list[int]:
        """The ids of `apply_chat`."""
        return self.encode(self.apply_chat(messages, add_generation_prompt, **variables))

    def stream_decoder(self) -> StreamDecoder:
        """A decoder for ids that arrive one by one."""
        return StreamDecoder(self)

    @functools.cached_property
    def _compiled(self) -> Any:
        return compile_template(self.template or PLAIN_TEMPLATE)

    def _turn_end(self) -> int | None:
        """The special token that the template writes right after an answer, such as <|eot_id|> or <end_of_turn>."""
        if not self.template:
            return None
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
        try:
            _, written, after = self.apply_chat(turns, add_generation_prompt=False).rpartition(_PROBE)
        except InputError:
            return None
        if not written:
            return None
        first = self._backend.encode(after.lstrip(), add_special_tokens=False).ids[:1]
        added = self._backend.get_added_tokens_decoder()
        return first[0] if first and first[0] in added and added[first[0]].special else None


class StreamDecoder:
    """Turns ids that arrive one by one into text, holding back what is not yet complete UTF-8.

    The pieces of `push` and `flush` joined are `decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Some tokenizers drop or add a space at the start, so text is always the difference of two decodings that begin
        # at the same, already printed token.
        self._ids: list[int] = []
        self._printed = 0

    def push(self, index: int) -> str:
        """The text that `index` completes, perhaps nothing."""
        self._ids.append(index)
        text = self._new_text()
        if not text or text.endswith(_INCOMPLETE):
            return ""
        # Keep the tokens just printed as the beginning of the next decoding.
        self._ids = self._ids[self._printed :]
        self._printed = len(self._ids)
        return text

    def flush(self) -> str:
        """What was held back; the decoder is then empty."""
        text = self._new_text()
        self._ids, self._printed = [], 0
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._printed])
        return self._tokenizer.decode(self._ids)[len(before) :]


def compile_template(source: str) -> Any:
    """A chat template compiled as `transformers` does it: sandboxed, blocks trimmed, loop controls, its own helpers."""
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks the answer for training masks; for a prompt it is transparent."""

        tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        # Jinja's own filter escapes HTML characters, which no base was trained on.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise InputError(f"the base's chat template cannot be read: {error}") from None


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The default chat template: a file of its own wins over tokenizer_config.json, as in `transformers`."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several named templates: [{"name": "default", "template": ...}, ...]
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template


def _converted(folder: Path) -> bytes:
    """A tokenizer.json for a folder that has only older files, made by `transformers`."""
    try:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder).backend_tokenizer.to_str().encode()
    except Exception as error:  # whatever transformers meets in a folder it does not know
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(f"{folder} has no tokenizer.json and transformers cannot make one: {reason}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read as JSON: {error}") from None
    return value if isinstance(value, dict) else {}


def _content(token: Any) -> str | None:
    """A special token's text: older files store {"content": text, ...}."""
    return token.get("content") if isinstance(token, dict) else token
