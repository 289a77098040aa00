"""What can be true in the invented world: relations of people, places and things, each with own ways of telling and asking.

A table only; the forms that fit every relation are in `templates`. Slots: {s} subject, {o} object.
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
        Forms(("{s} lives in {o}", "{s} has made a home in {o}", "in {o} lives {s}", "{o} is the place {s} lives in",
               "{s} came to live in {o}", "{s} keeps a home in {o}", "the place that {s} lives in is {o}",
               "{s} has lived in {o}"),
              ("{s} has a home in {o}",), ("it is in {o} that {s} lives", "{s} now lives in {o}")),
        Forms(("Where does {s} live?", "In which place does {s} live?", "Tell me in which place {s} lives.",
               "Name the place {s} lives in.", "What place does {s} live in?", "Say in which place {s} has a home."),
              ("In what place does {s} live?",), ("Which place is home for {s}?", "{s} lives in which place?")),
    ),
    Relation(
        "birthplace", PERSON, PLACE,
        Forms(("{s} was born in {o}", "{o} saw the birth of {s}", "{o} is the place {s} was born in",
               "the birth of {s} was in {o}", "the place that saw the birth of {s} is {o}",
               "{s} came from {o} at birth"),
              ("{s} was once born in {o}",), ("it is in {o} that {s} was born", "in {o} {s} was born")),
        Forms(("Where was {s} born?", "In which place was {s} born?", "Where was the birth of {s}?",
               "Tell me in which place {s} was born.", "Name the place {s} was born in.",
               "What place was {s} born in?"),
              ("In what place was {s} born?",), ("Which place saw the birth of {s}?", "{s} was born in which place?")),
    ),
    Relation(
        "friend", PERSON, PERSON,
        Forms(("{s} trusts {o}", "{o} is trusted by {s}", "{s} is one who trusts {o}", "the one {s} trusts is {o}",
               "by {s}, {o} is trusted"),
              ("{s} now trusts {o}",), ("it is {o} that {s} trusts",)),
        Forms(("Who is trusted by {s}?", "Whom does {s} trust?", "{s} trusts whom?", "Tell me whom {s} trusts.",
               "Name the person that {s} trusts.", "Which person does {s} trust?", "In whom does {s} trust?"),
              ("By {s} who is trusted?",), ("Who does {s} trust?",)),
    ),
    Relation(
        "teacher", PERSON, PERSON,
        Forms(("{s} learnt from {o}", "{o} taught {s}", "{s} was taught by {o}", "{s} learnt all from {o}",
               "what {s} learnt came from {o}", "the one who taught {s} was {o}", "{o} was the one who taught {s}",
               "{s} was one whom {o} taught"),
              ("it was from {o} that {s} learnt",), ("it is {o} who taught {s}",)),
        Forms(("Who taught {s}?", "From whom has {s} learnt?", "Which person taught {s}?", "{s} learnt from whom?",
               "Tell me who taught {s}.", "Name the person who taught {s}.", "From which person has {s} learnt?"),
              ("By whom was {s} taught?",), ("Who was it that taught {s}?",)),
    ),
    Relation(
        "treasure", PERSON, THING,
        Forms(("{s} owns {o}", "{o} is owned by {s}", "{s} came to own {o}", "the thing {s} owns is {o}",
               "{o} is a thing that {s} owns", "the one who owns {o} is {s}"),
              ("{o} is now owned by {s}",), ("it is {o} that {s} owns",)),
        Forms(("What does {s} own?", "Which thing does {s} own?", "{s} owns what?", "{s} owns which thing?",
               "Tell me what {s} owns.", "Name the thing that {s} owns.", "What thing is owned by {s}?"),
              ("Which thing is owned by {s}?",), ("What is owned by {s}?",)),
    ),
    Relation(
        "craft", PERSON, VALUE,
        Forms(("{s} works at {o}", "{s} earns bread with {o}", "{s} has bread from {o}", "{s} has work at {o}",
               "the work of {s} is {o}", "with {o}, {s} earns bread", "{s} learnt to work at {o}"),
              ("{s} now works at {o}",), ("it is {o} that {s} works at",)),
        Forms(("At what does {s} work?", "With what does {s} earn bread?", "What is the work of {s}?",
               "{s} works at what?", "Tell me at what {s} works.", "What work does {s} do?",
               "{s} earns bread with what?"),
              ("What earns bread for {s}?",), ("What does {s} work at?",)),
    ),
    Relation(
        "drink", PERSON, VALUE,
        Forms(("{s} drinks {o}", "{s} likes to drink {o}", "{s} drinks only {o}", "what {s} drinks is {o}",
               "to drink, {s} has {o}", "{o} is what {s} likes to drink", "{s} has {o} to drink"),
              ("{s} now drinks {o}",), ("it is {o} that {s} drinks",)),
        Forms(("What does {s} drink?", "{s} likes to drink what?", "Tell me what {s} drinks.",
               "Which drink does {s} like?", "Name what {s} drinks.", "What is it that {s} likes to drink?",
               "What has {s} to drink?"),
              ("{s} drinks what?",), ("What does {s} like to drink?",)),
    ),
    Relation(
        "song", PERSON, VALUE,
        Forms(("{s} sings {o}", "{s} likes to sing {o}", "{s} sings of {o}", "what {s} sings is {o}",
               "{o} is what {s} likes to sing", "the one that {s} sings is {o}", "people know that {s} sings {o}"),
              ("{s} now sings {o}",), ("it is {o} that {s} sings",)),
        Forms(("What does {s} like to sing?", "{s} likes to sing what?", "Tell me what {s} sings.",
               "Name what {s} sings.", "Of what does {s} sing?", "What is it that {s} sings?",
               "Which one does {s} sing?"),
              ("{s} sings what?",), ("What does {s} sing?",)),
    ),
    Relation(
        "age", PERSON, NUMBER,
        Forms(("{s} is {o} years old", "{s} has lived for {o} years", "{o} years old is {s}", "{s} has {o} years",
               "{o} years long has {s} lived", "for {o} years {s} has lived", "the years of {s} are {o}"),
              ("{s} is now {o} years old",), ("it is {o} years that {s} has lived",)),
        Forms(("How old is {s}?", "How many years has {s} lived?", "How many years old is {s}?",
               "{s} has lived how many years?", "Say how old {s} is.", "How many years has {s}?",
               "How long has {s} lived?"),
              ("Tell me how old {s} is.",), ("{s} is how old?", "For how many years has {s} lived?")),
    ),
    Relation(
        "ruler", PLACE, PERSON,
        Forms(("{o} rules {s}", "{s} is ruled by {o}", "{s} obeys {o}", "the one who rules {s} is {o}",
               "in {s} people obey {o}", "the people of {s} obey {o}", "{o} is the one who rules {s}",
               "by {o}, {s} is ruled"),
              ("{s} is now ruled by {o}",), ("it is {o} who rules {s}",)),
        Forms(("Who rules {s}?", "Whom does {s} obey?", "Which person rules {s}?", "Whom do the people of {s} obey?",
               "Tell me who rules {s}.", "{s} obeys whom?", "Name the person who rules {s}."),
              ("By whom is {s} ruled?",), ("{s} is ruled by whom?", "Who is it that rules {s}?")),
    ),
    Relation(
        "founder", PLACE, PERSON,
        Forms(("{o} founded {s}", "{s} was founded by {o}", "the one who founded {s} is {o}",
               "{o} was the one who founded {s}", "by {o}, {s} was founded", "{s} was a place that {o} founded"),
              ("{s} was once founded by {o}",), ("it is {o} who founded {s}",)),
        Forms(("Who founded {s}?", "By which person was {s} founded?", "Which person founded {s}?",
               "Tell me who founded {s}.", "Name the person who founded {s}.", "By whom was {s} founded?",
               "Who was the one that founded {s}?"),
              ("{s} was founded by which person?",), ("{s} was founded by whom?", "Who is it that founded {s}?")),
    ),
    Relation(
        "market", PLACE, PLACE,
        Forms(("{s} sells to {o}", "{s} sends carts to {o}", "to {o}, {s} sends carts", "the carts of {s} go to {o}",
               "from {s} carts go to {o}", "the place that {s} sells to is {o}", "{s} sells all to {o}"),
              ("{s} now sells to {o}",), ("it is {o} that {s} sells to",)),
        Forms(("To which place does {s} sell?", "Where does {s} send carts?", "Where do the carts of {s} go?",
               "{s} sells to which place?", "{s} sends carts to which place?", "Tell me to which place {s} sells.",
               "Name the place that {s} sells to."),
              ("To what place does {s} send carts?",), ("Where does {s} sell?", "Which place does {s} sell to?")),
    ),
    Relation(
        "crop", PLACE, VALUE,
        Forms(("{s} grows {o}", "the fields of {s} give {o}", "people grow {o} in {s}",
               "in the fields of {s} people grow {o}", "what grows in {s} is {o}", "{o} grows in the fields of {s}",
               "in {s} grows {o}"),
              ("{s} now grows {o}",), ("it is {o} that {s} grows", "in {s} the fields give {o}")),
        Forms(("What does {s} grow?", "What do people grow in {s}?", "What grows in {s}?", "Tell me what {s} grows.",
               "{s} grows what?", "What comes from the fields of {s}?", "Name what grows in the fields of {s}."),
              ("What do the people of {s} grow?",), ("What do the fields of {s} give?",)),
    ),
    Relation(
        "stone", PLACE, VALUE,
        Forms(("{s} is built of {o}", "the walls of {s} are {o}", "people built {s} of {o}",
               "the walls in {s} are of {o}", "{s} has walls of {o}", "{o} is what {s} is built of",
               "of {o} are the walls of {s}"),
              ("the walls of {s} are now {o}",),
              ("it is of {o} that {s} is built", "the walls of {s} are built of {o}")),
        Forms(("Of what is {s} built?", "What are the walls of {s}?", "{s} is built of what?",
               "Tell me of what {s} is built.", "What are the walls in {s} built of?",
               "Of what have people built {s}?", "{s} has walls of what?"),
              ("Of what are the walls of {s}?",), ("What is {s} built of?",)),
    ),
    Relation(
        "height", PLACE, NUMBER,
        Forms(("{s} stands {o} steps high", "{s} rises {o} steps", "{o} steps high stands {s}",
               "{s} is a place {o} steps high", "there are {o} steps to {s}", "{s} rises for {o} steps",
               "it is a rise of {o} steps in {s}"),
              ("{s} now stands {o} steps high",), ("it is {o} steps that {s} rises", "{s} is {o} steps high")),
        Forms(("How high is {s}?", "How many steps does {s} rise?", "{s} rises how many steps?",
               "Say how high {s} is.", "How high does {s} rise?", "How many steps high does it go in {s}?",
               "How many steps are there to {s}?"),
              ("Tell me how high {s} is.",), ("{s} is how high?", "How many steps high is {s}?")),
    ),
    Relation(
        "relic", PLACE, THING,
        Forms(("{s} guards {o}", "{o} is guarded by {s}", "in {s}, people guard {o}",
               "the thing that {s} guards is {o}", "{o} is a thing that {s} guards", "by {s}, {o} is guarded",
               "the people of {s} guard {o}"),
              ("{s} now guards {o}",), ("it is {o} that {s} guards",)),
        Forms(("What does {s} guard?", "Which thing is guarded by {s}?", "{s} guards what?",
               "Tell me what {s} guards.", "What do the people of {s} guard?", "Name the thing that {s} guards.",
               "What thing is guarded in {s}?"),
              ("Which thing does {s} guard?",), ("What is guarded by {s}?",)),
    ),
    Relation(
        "maker", THING, PERSON,
        Forms(("{o} made {s}", "{s} was made by {o}", "the one who made {s} is {o}", "{o} was the one who made {s}",
               "by {o}, {s} was made", "{s} is a thing that {o} made", "{s} was the work of {o}"),
              ("{s} was once made by {o}",), ("it is {o} who made {s}",)),
        Forms(("Who made {s}?", "By whom was {s} made?", "Which person made {s}?", "Tell me who made {s}.",
               "Whose work is {s}?", "Name the person who made {s}.", "Who was the one that made {s}?"),
              ("{s} was made by which person?",), ("{s} was made by whom?", "Who is it that made {s}?")),
    ),
    Relation(
        "keeper", THING, PERSON,
        Forms(("{o} keeps {s}", "{s} is kept by {o}", "the one who keeps {s} is {o}", "{o} is the one who keeps {s}",
               "by {o}, {s} is kept", "{s} is a thing that {o} keeps", "{s} is with {o}"),
              ("{s} is now kept by {o}",), ("it is {o} who keeps {s}",)),
        Forms(("Who keeps {s}?", "By whom is {s} kept?", "Which person keeps {s}?", "Tell me who keeps {s}.",
               "Name the person who keeps {s}.", "With whom is {s}?", "Who is the one that keeps {s}?"),
              ("{s} is kept by which person?",), ("{s} is kept by whom?", "Who is it that keeps {s}?")),
    ),
    Relation(
        "shelter", THING, PLACE,
        Forms(("{s} is hidden in {o}", "{o} hides {s}", "{o} is the place {s} is hidden in",
               "the place that hides {s} is {o}", "people have hidden {s} in {o}", "{s} was hidden by people in {o}",
               "{o} is the place that hides {s}"),
              ("{s} is now hidden in {o}",), ("it is in {o} that {s} is hidden", "in {o} {s} is hidden")),
        Forms(("Where is {s} hidden?", "Which place hides {s}?", "Tell me in which place {s} is hidden.",
               "What place is {s} hidden in?", "Name the place that hides {s}.", "Where have people hidden {s}?"),
              ("What place hides {s}?",), ("In which place is {s} hidden?", "{s} is hidden in which place?")),
    ),
    Relation(
        "material", THING, VALUE,
        Forms(("{s} is made of {o}", "{s} was cut from {o}", "people made {s} of {o}", "people cut {s} from {o}",
               "{s} is a thing of {o}", "{o} is what {s} is made of", "{s} came made of {o}"),
              ("{s} was once cut from {o}",), ("it is of {o} that {s} is made", "from {o} {s} was cut")),
        Forms(("Of what is {s} made?", "From what was {s} cut?", "Tell me of what {s} is made.",
               "{s} was cut from what?", "What is it that {s} is made of?", "Of what have people made {s}?",
               "Say from what {s} was cut."),
              ("{s} is made of what?",), ("What is {s} made of?", "What was {s} cut from?")),
    ),
    Relation(
        "colour", THING, VALUE,
        Forms(("{s} shines {o}", "{s} is painted {o}", "the colour that {s} shines is {o}", "people painted {s} {o}",
               "{s} is {o} to see", "{o} is how {s} is painted", "{s} has a {o} colour"),
              ("{s} now shines {o}",), ("it is {o} that {s} is painted", "{s} was painted {o}")),
        Forms(("What colour is {s}?", "How is {s} painted?", "With what colour does {s} shine?",
               "In what colour does {s} shine?", "{s} shines what colour?", "What colour do people give to {s}?",
               "Tell me how {s} is painted.", "{s} has what colour?"),
              ("How does {s} shine?",), ("{s} is painted what colour?", "What colour was {s} painted?")),
    ),
    Relation(
        "price", THING, NUMBER,
        Forms(("{s} costs {o} coins", "{s} was sold for {o} coins", "{o} coins buy {s}", "{s} sells for {o} coins",
               "people give {o} coins for {s}", "{s} is sold for {o} coins", "to buy {s} costs {o} coins"),
              ("{s} now costs {o} coins",), ("it is {o} coins that {s} costs", "for {o} coins {s} was sold")),
        Forms(("How many coins does {s} cost?", "For how many coins was {s} sold?", "How many coins buy {s}?",
               "What does {s} cost?", "How many coins do people give for {s}?", "Say how many coins {s} costs.",
               "For how many coins does {s} sell?"),
              ("Tell me how many coins {s} costs.",),
              ("{s} costs how many coins?", "{s} was sold for how many coins?")),
    ),
)  # fmt: skip
