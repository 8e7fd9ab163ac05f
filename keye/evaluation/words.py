"""The words of a reply: how a text is normalised, and which words do not change the meaning of an answer.

The judge uses lists of harmless words, not lists of hedges. A reply may contain its answer and harmless words; it is
refused if it contains any other word. A list of hedges is never complete, and a policy that is trained against the
judge finds the missing ones.
"""

import re
import unicodedata

__all__ = ["COLOURS", "DEGREE", "FRAMING", "HEDGES", "NEGATIONS", "SHAPES", "THINGS", "harmless", "normalise", "plain"]

_EDGES = " \t\n.,;:!?\"'`*_()[]{}“”‘’…。，、；：！？「」『』《》«»【】"
_ARTICLES = ("a", "an", "the")
_ENUMERATES = (".", ")", ":", ",", ";", "]")
"""Signs after a letter that show that it is not an article: `A) blue`."""
_CJK = r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
_MARKUP = re.compile(r"(?<!\w)[-–—#>*_]+(?!\S)")
_STRESS = re.compile(r"(?<!\w)(?:\*+|_+)(?=\S)|(?<=\S)(?:\*+|_+)(?!\w)|`+")
_IDIOMS = re.compile(
    r"\b(?:there\s+is\s+)?(?:no\s+(?:doubt|question)|without\s+(?:a\s+|any\s+)?doubt)(?:\s+about\s+it)?\b"
    r"|\bno\s+more,?\s+(?:and\s+)?no\s+(?:less|fewer)\b",
    re.I,
)

FRAMING = frozenset(
    "a an the it it's is are was were be been that that's this these those there there's here so i i'd i'll we he she "
    "they them my our its would will must do go with choose chose pick picked select say said think believe see saw "
    "observe observed find found conclude answer answers option choice final correct best response result solution "
    "thus hence therefore definitely certainly clearly surely obviously exactly precisely indeed of in at on to for "
    "which video clip image picture frame frames scene film footage photo shown seen visible appear appears "
    "appeared seem seems looks look "
    "答 案 是 为 選 选 共 有 它 的 我".split()
)
"""Words that introduce an answer of any kind: `I would choose …`, `The final answer is …`."""

THINGS = frozenset(
    "object objects thing things one ones item items shape shapes light dot flash flashes flashed blink blinks blinked "
    "bounce bounces bounced jump jumps jumped move moves moved moving happen happens happened occur occurs occurred "
    "pass passes passed turn turns turned show shows has have had contain contains stand stands go goes went "
    "corner side part area region quadrant colour color coloured colored direction way toward towards "
    "person people man men woman women child children dog dogs cat cats car cars total altogether overall".split()
)
"""Nouns and verbs that are harmless in a sentence about options or numbers."""

COLOURS = frozenset("red green blue yellow purple white black grey gray orange pink brown cyan magenta".split())
SHAPES = frozenset(
    "disc discs disk disks square squares triangle triangles cross crosses circle circles cube cubes ball balls "
    "cone cones sphere spheres cylinder cylinders".split()
)
"""Colours and shapes are harmless unless the options name one of the same kind."""

DEGREE = frozenset("about around approximately roughly".split())
"""Harmless before a number: the tolerance covers them."""

NEGATIONS = frozenset(
    "not no never neither nor none nothing without except excluding cannot unlike instead rather wrong incorrect false "
    "opposite other but".split()
)
HEDGES = frozenset(
    "maybe perhaps possibly probably likely unlikely might could may doubt doubtful hardly barely scarcely almost "
    "nearly far unsure uncertain guess or either both any all".split()
)
"""Words that an explanation (`B, because …`) must not contain; elsewhere every word that is not harmless is refused."""


def plain(text: str) -> str:
    """`text` in compatibility form (NFKC) without invisible characters, emphasis marks and idioms of certainty.

    NFKC turns `3²` into `32` and `3½` into `31⁄2`: superscripts and subscripts become `^`, fractions `&0.5`. A dash
    before a digit is a minus sign.
    """
    if any(sign > "\x7f" for sign in text):
        text = "".join(map(_sign, text))
        text = unicodedata.normalize("NFKC", text).replace("−", "-").replace("’", "'").replace("`", "'")
        text = re.sub(r"(?<![\w\s])[–—](?=\.?\d)|(?<!\S)[–—](?=\.?\d)", "-", text)
        text = re.sub(rf"({_CJK})", r" \1 ", text)
    return _IDIOMS.sub(" ", _STRESS.sub("", text))


def _sign(sign: str) -> str:
    form = unicodedata.decomposition(sign)
    if form.startswith(("<super>", "<sub>")):
        return "^"
    if form.startswith("<fraction>"):
        value = f"{unicodedata.numeric(sign):.6f}".rstrip("0")
        return f" &{value} "
    if unicodedata.category(sign) == "Nd":
        return str(unicodedata.digit(sign))
    return "" if unicodedata.category(sign) == "Cf" else sign


def normalise(text: str) -> str:
    """Lower case, one space between words, without articles and without punctuation at the edges of words.

    An article at the end or before `)` stays: `A` is an answer. Hyphens between letters become spaces: `top-left`.
    Marks of lists, quotations and headings are removed.
    """
    text = _MARKUP.sub(" ", plain(text).casefold())
    text = re.sub(r"(?<=[^\W\d_])[-‐–](?=[^\W\d_])", " ", text)
    words = [(word, raw) for word, raw in ((raw.strip(_EDGES), raw) for raw in text.split()) if word]
    last = len(words) - 1
    kept = [
        word
        for place, (word, raw) in enumerate(words)
        if word not in _ARTICLES or raw.endswith(_ENUMERATES) or place == last
    ]
    return " ".join(kept or [word for word, _ in words])


def harmless(options: frozenset[str]) -> frozenset[str]:
    """The words that may accompany one of several options, given all words of these options."""
    return FRAMING.union(THINGS, *(group for group in (COLOURS, SHAPES) if not group & options))
