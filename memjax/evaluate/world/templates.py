"""How the world is told and asked about, whatever the relation: sentences, questions, instructions. Tables only.

Each form belongs to one split and no form is in two. Every word of a validation or test form also occurs, in the same
case, in a train form (`tests/evaluate/world/test_templates.py`), so a reader trained on the train world knows all words
and must generalise to the forms. Slots: {s} subject, {o} object, {n} noun of the relation.
"""

from memjax.evaluate.world.relations import RELATIONS, Forms

# Ways of saying "the {n} of {s} is {o}" that fit every relation.
SAYS = Forms(
    (
        "the {n} of {s} is {o}",
        "{o} is the {n} of {s}",
        "{s} has {o} as {n}",
        "for {s} the {n} is {o}",
        "as {n}, {s} has {o}",
        "{s} has one {n}, and it is {o}",
        "{o} is known as the {n} of {s}",
        "the {n} that belongs to {s} is {o}",
        "{s} took {o} for {n}",
        "{o} became the {n} of {s}",
        "there is {o}, the {n} of {s}",
        "{s} calls {o} the {n}",
        "{o} was given to {s} as {n}",
        "{o} is what {s} has for {n}",
        "what {s} calls the {n} is {o}",
        "for {n}, {s} took {o}",
        "there is one {n} that {s} has: {o}",
        "the {n} that people give to {s} is {o}",
        "as for {s}, the {n} is {o}",
        "{s} is the one that has {o} as {n}",
        "{o} is the one {n} that {s} has",
        "the one known as the {n} of {s} is {o}",
        "the {n}, for {s}, was {o}",
        "of {s} the {n} is {o}",
        "to {s}, the {n} is {o}",
        "the {n} of {s}: {o}",
        "{s} came to have {o} as {n}",
        "{s} likes {o} as {n}",
        "with {s} comes the {n} {o}",
        "{o}, as people say, is the {n} of {s}",
        "{o} stands as {n} to {s}",
        "of all, {o} is the {n} that {s} took",
        "the {n} that {s} keeps is {o}",
        "{o} comes as the {n} of {s}",
        "{o} is the {n} which people know {s} by",
        "in all the land {o} is the {n} of {s}",
    ),
    ("the {n} given to {s} is {o}", "{o} is now the {n} for {s}"),
    ("{s} has the {n} {o}", "the {n} known for {s} is {o}", "{o} belongs to {s} as {n}", "as {n} of {s} there is {o}"),
)
ASKS = Forms(
    (
        "What is the {n} of {s}?",
        "Name the {n} of {s}.",
        "Tell me the {n} of {s}.",
        "Which {n} does {s} have?",
        "{s} has which {n}?",
        "Give the {n} that belongs to {s}.",
        "What is known as the {n} of {s}?",
        "Say what {s} has as {n}.",
        "The {n} of {s}?",
        "For {s}, what is the {n}?",
        "{s} has what as {n}?",
        "What was given to {s} as {n}?",
        "Tell me what {s} has for {n}.",
        "Say which is the {n} that {s} has.",
        "What is the {n} that belongs to {s}?",
        "As {n}, what does {s} have?",
        "Which one is the {n} of {s}?",
        "Name what {s} calls the {n}.",
        "Of {s}, tell me the {n}.",
        "Now, the {n} of {s}?",
        "Of {s}, what is the {n}?",
        "What, as {n}, belongs to {s}?",
        "What do people know as the {n} of {s}?",
        "Which is it that {s} has as {n}?",
        "Write the {n} of {s}.",
        "Write what {s} has for {n}.",
        "What do people say is the {n} of {s}?",
        "The {n} that {s} has is what?",
        "{s} calls what the {n}?",
        "What became the {n} of {s}?",
        "What is it that {s} took for {n}?",
        "Reply with the {n} of {s}.",
        "Which one has {s} as {n}?",
        "From the text, the {n} of {s}?",
    ),
    ("Give me the {n} of {s}.", "Which is the {n} of {s}?", "What {n} belongs to {s}?"),
    ("What {n} does {s} have?", "Say the {n} of {s}.", "The {n} of {s} is which?", "Tell me which {n} {s} has."),
)
# Around a sentence.
FRAMES = Forms(
    (
        "It is now known that {c}",
        "It was known once that {c}",
        "People say that {c}",
        "All agree that {c}",
        "As the old book tells, {c}",
        "In this land {c}",
        "Nobody doubts that {c}",
        "The songs also tell that {c}",
        "Here {c}",
        "Now {c}",
        "Here also {c}",
        "As all know, {c}",
        "The text tells that {c}",
        "People know that {c}",
        "In the songs, {c}",
        "It was known that {c}",
        "As one, people tell that {c}",
        "What is more, {c}",
        "All know that {c}",
        "As people tell, {c}",
        "By now {c}",
        "It follows that {c}",
        "The people of this land tell that {c}",
        "One thing more: {c}",
        "Here is what people know: {c}",
    ),
    ("Here people say that {c}", "It is also known that {c}"),
    ("All people agree that {c}", "The old songs tell that {c}", "In this book {c}"),
)
JOINS = Forms(
    ("{c}, and {d}", "{c}; {d}", "{c}, while {d}"),
    ("{c}; and {d}",),
    ("{c}, and also {d}",),
)
# The subject of a question named through another fact: "the ruler of the home of Bavo".
PATHS = Forms(
    (
        "the {n} of {s}",
        "the {n} that {s} has",
        "the {n} that belongs to {s}",
        "what {s} calls the {n}",
        "the {n} given to {s}",
        "the one {n} of {s}",
        "the one known as the {n} of {s}",
        "what is the {n} of {s}",
        "what {s} took for {n}",
        "what was given to {s} as {n}",
        "the one that {s} has for {n}",
        "the {n} for {s}",
        "the {n} {s} has",
        "the {n} that people give to {s}",
        "the one that {s} calls the {n}",
        "the one that is the {n} of {s}",
        "the {n} which belongs to {s}",
        "the {n} that {s} took",
        "one known {n} of {s}",
    ),
    ("what belongs to {s} as {n}",),
    ("what {s} has as {n}", "the {n} known for {s}"),
)
# A place named through its people.
FOLKS = Forms(("the {s}folk", "the land of the {s}folk"), ("what belongs to the {s}folk",), ("the place of the {s}folk",))
LISTS = Forms(
    (
        "List all who have {o} as {n}.",
        "Name all with the {n} {o}.",
        "Whose {n} is {o}?",
        "Say whose {n} is {o}.",
        "For whom is {o} the {n}?",
        "Give all that have the {n} {o}.",
    ),
    ("Name all whose {n} is {o}.",),
    ("List all with {o} as {n}.", "Tell me whose {n} is {o}."),
)
CHECKS = Forms(
    (
        "Is {o} the {n} of {s}?",
        "Is the {n} of {s} {o}?",
        "Does {s} have {o} as {n}?",
        "Do people say that {o} is the {n} of {s}?",
        "Is it {o} that {s} has as {n}?",
        "Does the {n} {o} belong to {s}?",
    ),
    ("Does {o} belong to {s} as {n}?",),
    ("Does {s} have the {n} {o}?", "Is it known that the {n} of {s} is {o}?"),
)
YES, NO, NOT_STATED = "yes", "no", "not stated"

# Added to a question whose answer is one word (or one number).
BRIEF = Forms(
    ("Answer in one word.", "Use one word.", "Reply with only the answer.", "Reply with one word and no more."),
    ("Reply in one word.",),
    ("Answer with one word.",),
)
BRIEF_NUMBER = Forms(
    ("Reply with only the number.",), ("Answer with the number.",), ("Reply with the number and no more.",)
)

# Instructions about the document.
REPEAT = Forms(
    (
        "Repeat the text.",
        "Repeat the context.",
        "Say the text again word for word.",
        "Copy the whole text.",
        "Write the context again.",
        "Copy the context again from the start.",
    ),
    ("Say the context again.",),
    ("Copy the text word for word.", "Write the whole context again."),
)
CONTINUE = Forms(
    (
        "Continue the text: {c}",
        "Go on from here: {c}",
        "Write what follows: {c}",
        "How does the text go on? {c}",
        "Say how the text continues: {c}",
    ),
    ("Continue from here: {c}",),
    ("Write how the text continues: {c}", "Go on: {c}"),
)
FIRST = Forms(
    ("Write the first sentence.", "Repeat the first sentence of the text.", "How does the text start?"),
    ("Say the first sentence of the text.",),
    ("Write the sentence at the start of the text.",),
)
LAST = Forms(
    (
        "Write the last sentence.",
        "Repeat the last sentence of the text.",
        "How does the text end?",
        "Copy the sentence at the end.",
    ),
    ("Say the last sentence of the text.",),
    ("Write the sentence at the end of the text.",),
)
INVENT = Forms(
    ("Ask a question about the text.", "Write a question on the context.", "Give me a question that the text answers."),
    ("Write a question about the text.",),
    ("Ask a question that the context answers.",),
)

# Instructions that need no document. {w} is a list of words.
ECHO = Forms(
    ("Repeat these words: {w}", "Say again: {w}", "Copy the words: {w}", "Write these words again: {w}"),
    ("Repeat the words: {w}",),
    ("Copy these words: {w}", "Say these words again: {w}"),
)
PICK_FIRST = Forms(
    ("Which word comes first: {w}", "Say the first word: {w}"),
    ("Write the first word: {w}",),
    ("Which is the first word: {w}",),
)
PICK_LAST = Forms(
    ("Which word comes last: {w}", "Say the last word: {w}"),
    ("Write the last word: {w}",),
    ("Which is the last word: {w}",),
)


def forms_of(split: str) -> list[str]:
    """Every form of a split: sentences, questions and instructions of all relations."""
    tables = [
        SAYS,
        ASKS,
        FRAMES,
        JOINS,
        PATHS,
        FOLKS,
        LISTS,
        CHECKS,
        BRIEF,
        BRIEF_NUMBER,
        REPEAT,
        CONTINUE,
        FIRST,
        LAST,
    ]
    tables += [INVENT, ECHO, PICK_FIRST, PICK_LAST]
    forms = [form for table in tables for form in table.of(split)]
    for relation in RELATIONS:
        forms += relation.says.of(split) + relation.asks.of(split)
    return forms
