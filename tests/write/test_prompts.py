"""Prompts: what the reader and the teacher see, where an answer begins, and the shipped general prompts."""

from memjax.evaluate.world import general_prompts as world_prompts
from memjax.write.prompts import answer_text, ask_tokens, general_prompts, prompt_style, read_tokens
from tests.support import small_base

TOKENIZER = small_base().tokenizer
PLAIN, CHAT = prompt_style("plain"), prompt_style("chat")


def test_a_plain_prompt_is_the_question_behind_its_context_and_nothing_else():
    asked = TOKENIZER.decode(ask_tokens(TOKENIZER, PLAIN, "Who rules Delu?"), keep_special=True)
    assert asked == "<bos><q> Who rules Delu?<a>"
    read = TOKENIZER.decode(read_tokens(TOKENIZER, PLAIN, "Derze rules Delu.", "Who rules Delu?"), keep_special=True)
    assert read == "<bos><doc> Derze rules Delu.</doc><q> Who rules Delu?<a>"


def test_an_answer_begins_as_the_template_or_the_lead_writes_it():
    assert answer_text(TOKENIZER, PLAIN, "Derze") == " Derze"
    assert answer_text(TOKENIZER, CHAT, "Derze") == " Derze"


def test_general_prompts_are_many_and_different_and_those_of_the_plain_style_come_from_the_training_world():
    for style in (PLAIN, CHAT):
        prompts = general_prompts(style)
        assert len(prompts) == len(set(prompts)) >= 400
    assert general_prompts(PLAIN) == list(dict.fromkeys(p.text for p in world_prompts("train", 0, 900)))[:480]
