"""How the world is told and asked about: relations, sentences, questions, instructions. Tables only.

Each form belongs to one split and no form is in two. Every word of a validation or test form also occurs, in the same
case, in a train form (`tests/evaluate/world/test_templates.py`), so a reader trained on the train world knows all words
and must generalise to the forms. Slots: {s} subject, {o} object, {n} noun of the relation.
"""

from typing import NamedTuple

PERSON, PLACE, THING = "person", "place", "thing"
VALUE, NUMBER = "value", "number"
KINDS = (PERSON, PLACE, THING)


class Forms(NamedTuple):
    """The forms of one split each."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]

    def of(self, split: str) -> tuple[str, ...]:
        """The forms of a split, by its name."""
        return getattr(self, split)


class Relation(NamedTuple):
    """A functional relation: a subject has at most one object. `says`, `asks`: own forms beside the general ones."""

    noun: str
    subject: str
    object: str
    says: Forms
    asks: Forms


RELATIONS = (
    Relation(
        "home", PERSON, PLACE,
        Forms(("{s} lives in {o}", "{s} has made a home in {o}", "in {o} lives {s}"),
              ("{s} has a home in {o}",), ("it is in {o} that {s} lives", "{s} now lives in {o}")),
        Forms(("Where does {s} live?", "In which place does {s} live?"),
              ("In what place does {s} live?",), ("Which place is home for {s}?", "{s} lives in which place?")),
    ),
    Relation(
        "birthplace", PERSON, PLACE,
        Forms(("{s} was born in {o}", "{o} saw the birth of {s}"),
              ("{s} was once born in {o}",), ("it is in {o} that {s} was born", "in {o} {s} was born")),
        Forms(("Where was {s} born?", "In which place was {s} born?"),
              ("In what place was {s} born?",), ("Which place saw the birth of {s}?", "{s} was born in which place?")),
    ),
    Relation(
        "friend", PERSON, PERSON,
        Forms(("{s} trusts {o}", "{o} is trusted by {s}"),
              ("{s} now trusts {o}",), ("it is {o} that {s} trusts",)),
        Forms(("Who is trusted by {s}?", "Whom does {s} trust?"),
              ("By {s} who is trusted?",), ("Who does {s} trust?",)),
    ),
    Relation(
        "teacher", PERSON, PERSON,
        Forms(("{s} learnt from {o}", "{o} taught {s}", "{s} was taught by {o}"),
              ("it was from {o} that {s} learnt",), ("it is {o} who taught {s}",)),
        Forms(("Who taught {s}?", "From whom has {s} learnt?"),
              ("By whom was {s} taught?",), ("Who was it that taught {s}?",)),
    ),
    Relation(
        "treasure", PERSON, THING,
        Forms(("{s} owns {o}", "{o} is owned by {s}"),
              ("{o} is now owned by {s}",), ("it is {o} that {s} owns",)),
        Forms(("What does {s} own?", "Which thing does {s} own?"),
              ("Which thing is owned by {s}?",), ("What is owned by {s}?",)),
    ),
    Relation(
        "craft", PERSON, VALUE,
        Forms(("{s} works at {o}", "{s} earns bread with {o}"),
              ("{s} now works at {o}",), ("it is {o} that {s} works at",)),
        Forms(("At what does {s} work?", "With what does {s} earn bread?"),
              ("What earns bread for {s}?",), ("What does {s} work at?",)),
    ),
    Relation(
        "drink", PERSON, VALUE,
        Forms(("{s} drinks {o}", "{s} likes to drink {o}"),
              ("{s} now drinks {o}",), ("it is {o} that {s} drinks",)),
        Forms(("What does {s} drink?", "{s} likes to drink what?"),
              ("{s} drinks what?",), ("What does {s} like to drink?",)),
    ),
    Relation(
        "song", PERSON, VALUE,
        Forms(("{s} sings {o}", "{s} likes to sing {o}"),
              ("{s} now sings {o}",), ("it is {o} that {s} sings",)),
        Forms(("What does {s} like to sing?", "{s} likes to sing what?"),
              ("{s} sings what?",), ("What does {s} sing?",)),
    ),
    Relation(
        "age", PERSON, NUMBER,
        Forms(("{s} is {o} years old", "{s} has lived for {o} years"),
              ("{s} is now {o} years old",), ("it is {o} years that {s} has lived",)),
        Forms(("How old is {s}?", "How many years has {s} lived?"),
              ("Tell me how old {s} is.",), ("{s} is how old?", "For how many years has {s} lived?")),
    ),
    Relation(
        "ruler", PLACE, PERSON,
        Forms(("{o} rules {s}", "{s} is ruled by {o}", "{s} obeys {o}"),
              ("{s} is now ruled by {o}",), ("it is {o} who rules {s}",)),
        Forms(("Who rules {s}?", "Whom does {s} obey?"),
              ("By whom is {s} ruled?",), ("{s} is ruled by whom?", "Who is it that rules {s}?")),
    ),
    Relation(
        "founder", PLACE, PERSON,
        Forms(("{o} founded {s}", "{s} was founded by {o}"),
              ("{s} was once founded by {o}",), ("it is {o} who founded {s}",)),
        Forms(("Who founded {s}?", "By which person was {s} founded?"),
              ("{s} was founded by which person?",), ("{s} was founded by whom?", "Who is it that founded {s}?")),
    ),
    Relation(
        "market", PLACE, PLACE,
        Forms(("{s} sells to {o}", "{s} sends carts to {o}"),
              ("{s} now sells to {o}",), ("it is {o} that {s} sells to",)),
        Forms(("To which place does {s} sell?", "Where does {s} send carts?"),
              ("To what place does {s} send carts?",), ("Where does {s} sell?", "Which place does {s} sell to?")),
    ),
    Relation(
        "crop", PLACE, VALUE,
        Forms(("{s} grows {o}", "the fields of {s} give {o}"),
              ("{s} now grows {o}",), ("it is {o} that {s} grows", "in {s} the fields give {o}")),
        Forms(("What does {s} grow?", "What do people grow in {s}?"),
              ("What do the people of {s} grow?",), ("What do the fields of {s} give?",)),
    ),
    Relation(
        "stone", PLACE, VALUE,
        Forms(("{s} is built of {o}", "the walls of {s} are {o}"),
              ("the walls of {s} are now {o}",),
              ("it is of {o} that {s} is built", "the walls of {s} are built of {o}")),
        Forms(("Of what is {s} built?", "What are the walls of {s}?"),
              ("Of what are the walls of {s}?",), ("What is {s} built of?",)),
    ),
    Relation(
        "height", PLACE, NUMBER,
        Forms(("{s} stands {o} steps high", "{s} rises {o} steps"),
              ("{s} now stands {o} steps high",), ("it is {o} steps that {s} rises", "{s} is {o} steps high")),
        Forms(("How high is {s}?", "How many steps does {s} rise?"),
              ("Tell me how high {s} is.",), ("{s} is how high?", "How many steps high is {s}?")),
    ),
    Relation(
        "relic", PLACE, THING,
        Forms(("{s} guards {o}", "{o} is guarded by {s}"),
              ("{s} now guards {o}",), ("it is {o} that {s} guards",)),
        Forms(("What does {s} guard?", "Which thing is guarded by {s}?"),
              ("Which thing does {s} guard?",), ("What is guarded by {s}?",)),
    ),
    Relation(
        "maker", THING, PERSON,
        Forms(("{o} made {s}", "{s} was made by {o}"),
              ("{s} was once made by {o}",), ("it is {o} who made {s}",)),
        Forms(("Who made {s}?", "By whom was {s} made?"),
              ("{s} was made by which person?",), ("{s} was made by whom?", "Who is it that made {s}?")),
    ),
    Relation(
        "keeper", THING, PERSON,
        Forms(("{o} keeps {s}", "{s} is kept by {o}"),
              ("{s} is now kept by {o}",), ("it is {o} who keeps {s}",)),
        Forms(("Who keeps {s}?", "By whom is {s} kept?"),
              ("{s} is kept by which person?",), ("{s} is kept by whom?", "Who is it that keeps {s}?")),
    ),
    Relation(
        "shelter", THING, PLACE,
        Forms(("{s} is hidden in {o}", "{o} hides {s}"),
              ("{s} is now hidden in {o}",), ("it is in {o} that {s} is hidden", "in {o} {s} is hidden")),
        Forms(("Where is {s} hidden?", "Which place hides {s}?"),
              ("What place hides {s}?",), ("In which place is {s} hidden?", "{s} is hidden in which place?")),
    ),
    Relation(
        "material", THING, VALUE,
        Forms(("{s} is made of {o}", "{s} was cut from {o}"),
              ("{s} was once cut from {o}",), ("it is of {o} that {s} is made", "from {o} {s} was cut")),
        Forms(("Of what is {s} made?", "From what was {s} cut?"),
              ("{s} is made of what?",), ("What is {s} made of?", "What was {s} cut from?")),
    ),
    Relation(
        "colour", THING, VALUE,
        Forms(("{s} shines {o}", "{s} is painted {o}"),
              ("{s} now shines {o}",), ("it is {o} that {s} is painted", "{s} was painted {o}")),
        Forms(("What colour is {s}?", "How is {s} painted?", "With what colour does {s} shine?"),
              ("How does {s} shine?",), ("{s} is painted what colour?", "What colour was {s} painted?")),
    ),
    Relation(
        "price", THING, NUMBER,
        Forms(("{s} costs {o} coins", "{s} was sold for {o} coins"),
              ("{s} now costs {o} coins",), ("it is {o} coins that {s} costs", "for {o} coins {s} was sold")),
        Forms(("How many coins does {s} cost?", "For how many coins was {s} sold?"),
              ("Tell me how many coins {s} costs.",),
              ("{s} costs how many coins?", "{s} was sold for how many coins?")),
    ),
)  # fmt: skip

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
