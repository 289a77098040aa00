"""The tokenizer of the tiny base and its chat template: a byte-level BPE built from the words of the train world.

Syllables, words of train forms and digits are one token each; anything else falls back to syllables, letters and bytes,
so every UTF-8 text encodes and decodes to itself. Merges build syllables only and words are matched whole
(`ignore_merges`, as in Llama 3), hence a name is always the same two tokens, seen or unseen.
"""

import json
import re

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from memjax.evaluate.world import common, lines, templates
from memjax.evaluate.world.names import ENDS, FOLK, NAME_STARTS, VALUE_STARTS
from memjax.evaluate.world.relations import RELATIONS

PAD, BOS, END = "<pad>", "<bos>", "<end>"
DOC, DOC_END, ASK, ANSWER, SYSTEM = "<doc>", "</doc>", "<q>", "<a>", "<sys>"
SPECIALS = (PAD, BOS, END, DOC, DOC_END, ASK, ANSWER, SYSTEM)

# A word, a digit or a mark, each with the space before it; any other white space by itself.
PIECES = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]|\s"

# A user turn is "context\n\nquestion" (the last blank line separates them) or a bare question.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}<sys> {{ m['content'] | trim }}"
    "{% elif m['role'] == 'user' %}{% set parts = (m['content'] | trim).rsplit('\\n\\n', 1) %}"
    "{% if parts | length == 2 %}<doc> {{ parts[0] }}</doc>{% endif %}<q> {{ parts[-1] }}"
    "{% else %}<a> {{ m['content'] | trim }}<end>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def chat(doc: str | None, turns: list[tuple[str, str]], system: str | None = None) -> str:
    """What the chat template renders for a document and (question, answer) turns: the format that pretraining uses."""
    text = BOS + (f"{SYSTEM} {system}" if system else "") + (f"{DOC} {doc}{DOC_END}" if doc else "")
    return text + "".join(f"{ASK} {question}{ANSWER} {answer}{END}" for question, answer in turns)


def lexicon() -> list[str]:
    """All words of train forms, common knowledge and needle lines, in the case they are written in; sorted."""
    texts = []
    for form in templates.forms_of("train"):
        texts += [form, form[0].upper() + form[1:]]
    for relation in RELATIONS:
        texts.append(relation.noun)
    texts += [templates.YES, templates.NO, templates.NOT_STATED]
    for fact in common.COMMON_FACTS:
        texts += [common.ask(fact, form) for form in range(common.forms(fact))] + [fact.answer]
    texts += [lines.GRASS, lines.NEEDLE, lines.NEEDLE_QUESTION, lines.KEYED_NEEDLE, "VAR"]
    texts += [*lines.KEYED_QUESTIONS, *lines.CHAIN_QUESTIONS, lines.KEYED_OPENING]
    words = set()
    for text in texts:
        words.update(re.findall(r"[A-Za-z]+", re.sub(r"\{\w\}(folk)?", " ", text)))
    return sorted(words)


def build_tokenizer() -> str:
    """The text of tokenizer.json; the same at every call."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    space = "Ġ"
    merges: list[tuple[str, str]] = []
    # Consonant + vowel first, everywhere; then what may stand before and after.
    merges += [(s[0], s[1]) for s in ENDS if len(s) == 2]
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    merges += [(space, s) for s in ENDS if len(s) == 2]
    merges += [(space, letter) for letter in letters + "0123456789="]
    merges += [(space + s[0], s[1]) for s in NAME_STARTS if len(s) == 2]
    merges += [(space + s[:2], s[2]) for s in NAME_STARTS + VALUE_STARTS if len(s) == 3]
    merges += [(s[:2], s[2]) for s in ENDS if len(s) == 3]
    merges += [("f", "o"), ("l", "k"), ("fo", "lk")]
    assert merges[-1][0] + merges[-1][1] == FOLK
    words = lexicon()
    starting = [word for word in words if word[0].isupper()]
    tokens = [*SPECIALS, *alphabet, *(a + b for a, b in merges), *(space + word for word in words), *starting]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return tokenizer.to_str(pretty=False)


def tokenizer_config(window: int = 512) -> str:
    """The text of tokenizer_config.json."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": PAD,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": window,
        "memjax_prompt": "plain",  # the turns of `chat` and nothing else: no system line, no examples, no lead
        "chat_template": CHAT_TEMPLATE,
    }
    return json.dumps(config, indent=2) + "\n"
