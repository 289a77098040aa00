"""The invented world: a generator of documents, questions, instructions and needles that no model has seen.

Seeded, pure functions of (split, seed, index). Splits share syllables and words, but no entity, no value and no form.
"""

from memjax.evaluate.world.common import COMMON_FACTS, CommonFact, choices
from memjax.evaluate.world.documents import Document, Fact, document, documents
from memjax.evaluate.world.names import SPLITS, split_of
from memjax.evaluate.world.prompts import Prompt, document_prompts, general_prompts
from memjax.evaluate.world.questions import QUESTION_KINDS, Question, near_duplicates, questions

__all__ = [
    "COMMON_FACTS",
    "QUESTION_KINDS",
    "SPLITS",
    "CommonFact",
    "Document",
    "Fact",
    "Prompt",
    "Question",
    "choices",
    "document",
    "document_prompts",
    "documents",
    "general_prompts",
    "near_duplicates",
    "questions",
    "split_of",
]
