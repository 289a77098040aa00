"""Golden scores for LongBench's ROUGE-L and code similarity, from the packages its reference calls.

Run in an environment with `rouge` 1.0.1 and `fuzzywuzzy` 0.18.0, without python-Levenshtein:
python tests/goldens/make_longbench.py
"""

import json
from pathlib import Path

from fuzzywuzzy import fuzz
from rouge import Rouge

PAIRS = [
    ("the cat sat on the mat", "the cat was on the mat"),
    ("", "x"),
    ("x", ""),
    ("...", "a. b."),
    (". . a", "a . ."),
    (" ", "a"),
    ("a b c d e", "e d c b a"),
    ("a b. c d", "a c. b d"),
    ("the the the", "the"),
    ("Bavo lives in Tavin.", "bavo lives in tavin"),
    ("one two three. two three four. three four five", "two three. five one. four"),
    ("w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5"),
    ("a  b\tc\nd", "a b c d"),
    ("3.14 is pi", "pi is 3.14"),
    ("x y x y x", "y x y"),
    ("世界 很 大", "世界 大"),
    ("b a c b a", "a b a c"),
]
CODE = [
    ("return x + 1", "return x + 2"),
    ("return x", "return x"),
    ("", ""),
    ("", "a"),
    ("a", ""),
    ("abcd", "bcde"),
    ("for i in range(10):", "for j in range(len(x)):"),
    ("    self.a = a", "self.a = a"),
    ("ab" * 150, "ba" * 150),  # long enough for difflib to set popular characters aside
]


def rouge_l(prediction: str, answer: str) -> float:
    """What the reference calls; it gives 0 where the package raises."""
    try:
        return Rouge().get_scores([prediction], [answer], avg=True)["rouge-l"]["f"]
    except Exception:
        return 0.0


def main() -> None:
    """Writes longbench.json beside this file."""
    goldens = {
        "rouge": [[p, a, rouge_l(p, a)] for p, a in PAIRS],
        "code": [[p, a, fuzz.ratio(p, a) / 100] for p, a in CODE],
    }
    path = Path(__file__).with_name("longbench.json")
    path.write_text(json.dumps(goldens, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
