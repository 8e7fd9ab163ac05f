"""Replies judged by hand: the right and wrong replies for every correct answer. Written before the judge."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Truth:
    answer: str
    right: list[str]
    wrong: list[str]
    options: list[str] | None = None
    tolerance: float | None = None
    replies: list[tuple[str, bool]] = field(init=False)

    def __post_init__(self) -> None:
        rows = [(reply, True) for reply in self.right] + [(reply, False) for reply in self.wrong]
        object.__setattr__(self, "replies", rows)


SILENT = ["", " ", "\n", ".", "?!", "()", "<think>", "<think>still thinking", "<answer></answer>",
                 "<answer> . </answer>",
          "<|im_end|>", "\\boxed{}", "…"]  # fmt: skip
"""Empty replies. They are wrong for every answer."""

BALL = ["a red ball", "a blue cube", "a green cone", "nothing"]
COLOURS = ["red", "blue", "green"]
CORNERS = ["top left", "top right", "bottom left", "bottom right"]
SHADES = ["red", "dark red", "light blue"]
YES_NO = ["yes", "no"]
COUNTS = ["1", "2", "3", "4"]
LETTERED = ["A. red", "B. blue", "C. green"]

TRUTHS = [
    # --- options whose truth is given as a letter
    Truth("A", options=BALL,
          right=["A", "a", "A.", "(A)", "(a)", "[A]", "A)", "A:", "**A**", "A) a red ball", "A. a red ball",
                 "a red ball",
                 "A red ball.", "red ball", "the red ball", "Answer: A", "The answer is A.",
                 "The final answer is (A)",
                 "Option A", "option a", "<answer>A</answer>", "<think>B?</think>A", "<answer>a red ball</answer>",
                 "It is a red ball.", "\\boxed{A}", "A, because it is a red ball", "RED BALL", "A<|im_end|>"],
          wrong=[*SILENT, "B", "b", "C", "D", "E", "(B)", "not a red ball", "It is not a red ball", "A or B", "A, B",
                 "A B C D", "ABCD", "A) a blue cube", "a red ball or a blue cube", "a red ball, a blue cube", "ball",
                 "red"]),
    Truth("B", options=BALL,
          right=["B", "b", "B)", "B) a blue cube", "a blue cube", "B blue cube", "The answer is: B", "blue cube",
                 "Choice B", "I think it is a blue cube", "B. It is a blue cube"],
          wrong=[*SILENT, "A", "B or A", "B) a red ball", "no blue cube", "never a blue cube", "a blue cube? no",
                 "B is wrong, it is a red ball", "cube", "blue", "BB", "neither"]),
    Truth("D", options=BALL,
          right=["D", "nothing", "Nothing.", "(d)", "D) nothing", "The answer is nothing"],
          wrong=[*SILENT, "A", "none", "not nothing", "I do not know", "something"]),
    # --- options whose truth is given as a text
    Truth("red", options=COLOURS,
          right=["red", "Red.", "RED", "the red", "A", "(A)", "a", "It is red.", "A) red", "red colour", "“red”",
                 "*red*",
                 "Answer: red", "The colour is red", "so \\boxed{red}", "Ｒｅｄ"],
          wrong=[*SILENT, "blue", "B", "not red", "It isn't red", "It is not red.", "never red", "no red",
                 "red or blue",
                 "red, blue, green", "red and green", "neither red nor blue", "anything but red", "other than red",
                 "A) blue", "B) red", "reddish", "infrared", "red is wrong", "everything except red", "rod", "colour",
                 "without red", "the opposite of red", "redred", "D", "Z"]),
    Truth("blue", options=COLOURS,
          right=["blue", "B", "**Answer:** B", "Answer: **blue**", "A blue one", "a blue thing", "Blue!", "b)",
                 "I see blue", "blue, not red"],
          wrong=[*SILENT, "A", "a", "red", "C", "not blue, red", "blue instead of red", "I", "be"]),
    Truth("red", options=SHADES,
          right=["red", "A", "It is red", "A. red"],
          wrong=[*SILENT, "dark red", "B", "It is dark red", "light blue", "dark", "red or dark red"]),
    Truth("dark red", options=SHADES,
          right=["dark red", "B", "a dark red", "dark-red", "It is dark red.", "Dark Red"],
          wrong=[*SILENT, "red", "A", "dark", "not dark red", "light red", "light blue", "dark blue"]),
    Truth("top left", options=CORNERS,
          right=["top left", "top-left", "In the top left corner", "A", "(a)", "Top Left.", "the top left",
                 "A: top left"],
          wrong=[*SILENT, "left", "top", "top right", "B", "bottom left", "not top left", "left top",
                 "top left, top right",
                 "topleft"]),
    Truth("no", options=YES_NO,
          right=["no", "No.", "B", "NO", "No, it does not.", "No, it does not move", "Answer: no", "(b)"],
          wrong=[*SILENT, "yes", "A", "yes, no", "not no", "no or yes", "Yes, there is no doubt", "maybe",
                 "nope, yes",
                 "It does not", "none"]),
    Truth("false", options=["true", "false"], right=["false", "It is false.", "B", "False, it is not so"],
          wrong=[*SILENT, "true", "not false", "It is not false", "true or false", "A"]),
    Truth("yes", options=YES_NO,
          right=["yes", "Yes!", "A", "Yes, it moves.", "Yes, it is"],
          wrong=[*SILENT, "no", "B", "not yes", "yes and no", "yesterday", "not", "y"]),
    Truth("3", options=COUNTS,
          right=["3", "three", "3.", "C", "(c)", "3 times", "It flashes 3 times.", "three times", "C) 3", "3.0",
                 "thrice"],
          wrong=[*SILENT, "4", "13", "33", "3 or 4", "1 2 3 4", "not 3", "more than 3", "at least 3", "3 3", "D",
                 "C) 4",
                 "three hundred", "30", "-3", "minus three", "up to 3", "fewer than 3", "2 + 1"]),
    Truth("B", options=LETTERED,
          right=["B", "blue", "B. blue", "b", "It is blue", "(B) blue"],
          wrong=[*SILENT, "A", "red", "A. red", "not blue", "B. red", "B. red, blue, green"]),
    Truth("A. red", options=LETTERED, right=["A", "red", "A. red", "a) red"], wrong=[*SILENT, "B", "blue",
                 "A. blue"]),
    # --- a letter without options
    Truth("A", right=["A", "a", "(A)", "A.", "A) a red ball", "The answer is A", "**A**", "A: it moves"],
          wrong=[*SILENT, "B", "a red ball", "an", "the", "AB", "B) A", "apple", "not A", "AA"]),
    # --- numbers
    Truth("3", right=["3", "3.0", "+3", "three", "3 times",
                      "The red one flashes three times.", "3s", "about 3 of them", "The answer is 3.", "3 flashes",
                      "\\boxed{3}", "3 ."],
          wrong=[*SILENT, "4", "13", "31", "3 or 4", "03", "-3", "minus 3", "negative three", "not 3", "isn't 3",
                 "3/4",
                 "3.5", "3e5", "3 hundred", "three dozen", "3 and a half", "more than 3", "less than 3",
                 "at most 3", ">3",
                 "≥ 3", "1, 2, 3", "A", "twenty-three", "thirty three", "one two three", "3 3", "12:03"]),
    Truth("1", right=["1", "one", "once", "one time"], wrong=[*SILENT, "the red one", "that one", "2", "which one"]),
    Truth("0", right=["0", "zero", "never", "0 times"], wrong=[*SILENT, "o", "none of them is right", "1", "10",
                 "00"]),
    Truth("21", right=["21", "twenty-one", "twenty one", "21.0"], wrong=[*SILENT, "20", "one", "20 1", "2 1", "210"]),
    Truth("1000", right=["1000", "1,000", "1e3", "1000 m"], wrong=[*SILENT, "1", "1.000", "10,00", "1 000",
                 "one thousand"]),
    Truth("-4", right=["-4", "−4", "minus four", "minus 4", "-4.0", "negative 4"], wrong=[*SILENT, "4", "four",
                 "- 4 5"]),
    Truth("0.5", right=["0.5", ".5", "0.50", "0.5 seconds"], wrong=[*SILENT, "5", "half", "1/2", "0,5", "0.05"]),
    Truth("07", right=["07", "07.", "<answer>07</answer>"], wrong=[*SILENT, "7", "seven", "0 7", "007", "70", "7.0"]),
    Truth("3", tolerance=0.5,
          right=["3", "3.5", "2.5", "2.5 seconds", "at 3 s", "0:03", "three", "3.2s"],
          wrong=[*SILENT, "3.6", "2.4", "3 4", "1 2 3 4 5", "not 3", "over 3", "under 3", "30",
                 "three or so, or four",
                 "0:30", "-3", "3e1", "3,5"]),
    Truth("65", tolerance=1,
          right=["65", "1:05", "0:01:05", "66 seconds", "64.0", "sixty-five", "00:65"],
          wrong=[*SILENT, "1:50", "1", "5", "1 05", "65 66", "1:5", "67", "105"]),
    # --- boxes
    Truth("[0, 0, 100, 100]", right=["[0, 0, 100, 100]", "(0,0),(100,100)", "0,0,100,100", "[0, 0, 100, 50]"],
          wrong=[*SILENT, "[0, 0, 100, 49]", "[100, 100, 0, 0]", "0 0 100 100", "[0, 0, 100]",
                 "[0,0,100,100] [0,0,1,1]",
                 "[0, 0, 1000, 1000]", "[50, 50, 150, 150]", "not [0, 0, 100, 100]", "[0,0,0,0]"]),
    # --- words
    Truth("a red disc at the top left", right=["A red disc at the top left.", "red disc at top left",
                 "a red disc at the top-left"],
          wrong=[*SILENT, "a red disc", "a red disc at the top right", "not a red disc at the top left", "red",
                 "a red disc at the top left and a cube"]),
    Truth("blue", right=["blue", "Blue.", "the  Blue", "The answer is blue", "Answer: blue", "BLUE!"],
          wrong=[*SILENT, "bluish", "not blue", "blue red", "B", "blue blue", "bleu"]),
]  # fmt: skip
